#include "logits.inl"

namespace pastkey {

const LogitKernels avx512_logits = {finite, largest, sum};

}  // namespace pastkey
