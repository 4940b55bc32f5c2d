#define PASTKEY_USE_I8MM
#include "neon.inl"

namespace pastkey {

const MatMulKernels i8mm_matmul = {round_row, multiply, activate, normalize};

}  // namespace pastkey
