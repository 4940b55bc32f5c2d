#include "neon.inl"

namespace pastkey {

const MatMulKernels neon_matmul = {round_row, multiply<8>, activate, normalize, multiply<4>};

}  // namespace pastkey
