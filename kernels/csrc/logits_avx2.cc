#include "logits.inl"

namespace pastkey {

const LogitKernels avx2_logits = {largest, sum, finite};

}  // namespace pastkey
