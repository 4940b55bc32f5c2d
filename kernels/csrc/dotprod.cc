#define PASTKEY_USE_DOTPROD
#include "neon.inl"

namespace pastkey {

const MatMulKernels dotprod_matmul = kKernels;

}  // namespace pastkey
