#include "avx2.inl"

namespace pastkey {

const MatMulKernels avx2_matmul = kKernels;

}  // namespace pastkey
