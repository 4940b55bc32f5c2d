#include "logits.inl"

namespace pastkey {

const LogitKernels avx2_logits = {finite, largest, sum};

}  // namespace pastkey
