#include "avx2.inl"

namespace pastkey {

const MatMulKernels avx2_matmul = {round_row, multiply, activate, normalize};

}  // namespace pastkey
