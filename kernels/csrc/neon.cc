#include "neon.inl"

namespace pastkey {

const MatMulKernels neon_matmul = kKernels;

}  // namespace pastkey
