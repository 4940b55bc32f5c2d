#include "avx2.inl"

namespace pastkey {

const MatMulKernels avx2_matmul = {round_row, multiply<8>, activate, normalize, multiply<4>};

}  // namespace pastkey
