#include "logits.inl"

namespace pastkey {

const LogitKernels avx512_logits = {largest, sum, finite};

}  // namespace pastkey
