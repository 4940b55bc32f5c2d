#define PASTKEY_USE_VNNI
#include "avx2.inl"

namespace pastkey {

const MatMulKernels avx_vnni_matmul = {round_row, multiply<8>, activate, normalize, multiply<4>};

}  // namespace pastkey
