#include "logits.inl"

namespace pastkey {

const LogitKernels avx512_logits = {largest, sum};

}  // namespace pastkey
