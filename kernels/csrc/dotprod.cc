#define PASTKEY_USE_DOTPROD
#include "neon.inl"

namespace pastkey {

const MatMulKernels dotprod_matmul = {round_row, multiply<8>, activate, normalize, multiply<4>};

}  // namespace pastkey
