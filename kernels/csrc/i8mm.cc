#define PASTKEY_USE_I8MM
#include "neon.inl"

namespace pastkey {

const MatMulKernels i8mm_matmul = {round_row, multiply<8>, activate, normalize, multiply<4>};

}  // namespace pastkey
