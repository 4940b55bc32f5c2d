#define PASTKEY_USE_VNNI
#include "avx2.inl"

namespace pastkey {

const MatMulKernels avx_vnni_matmul = kKernels;

}  // namespace pastkey
