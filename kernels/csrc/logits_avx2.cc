#include "logits.inl"

namespace pastkey {

const LogitKernels avx2_logits = {largest, sum};

}  // namespace pastkey
