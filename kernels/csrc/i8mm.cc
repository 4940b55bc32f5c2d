#define PASTKEY_USE_I8MM
#include "neon.inl"

namespace pastkey {

const MatMulKernels i8mm_matmul = kKernels;

}  // namespace pastkey
