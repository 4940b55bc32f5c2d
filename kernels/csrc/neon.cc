#include "neon.inl"

namespace pastkey {

const MatMulKernels neon_matmul = {round_row, multiply, activate, normalize};

}  // namespace pastkey
