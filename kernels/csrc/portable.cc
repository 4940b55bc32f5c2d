// The reference: what every other level must give, bit for bit.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace pastkey {
namespace {

#include "elementwise.inl"

float row_sum(const Weights& w, size_t row, const int8_t* q, const float* scale) {
  float acc[4] = {};
  for (size_t b = 0; b < w.blocks; b++) {
    const size_t at = row * w.blocks + b;
    int32_t dot = 0;
    for (size_t i = 0; i < kBlock; i++) dot += (w.codes[at * kBlock + i] - 128) * q[b * kBlock + i];
    const float weight_scale = w.scale_codes ? static_cast<float>(w.scale_codes[at]) : w.scales[at];
    acc[b % 4] = std::fma(static_cast<float>(dot) * scale[b], weight_scale, acc[b % 4]);
  }
  return (acc[0] + acc[2]) + (acc[1] + acc[3]);
}

void multiply(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t first, size_t count, float* y,
              size_t stride) {
  for (size_t i = 0; i < rows; i++)
    for (size_t j = 0; j < count; j++) {
      const size_t row = first + j;
      float sum = 0;
      for (size_t t = 0; t < terms; t++) {
        const size_t at = (i * terms + t) * w.blocks;
        const float term = row_sum(w, row, x.q + at * kBlock, x.scale + at);
        sum = t ? sum + term : term;
      }
      if (w.row_scales) sum *= w.row_scales[row];
      if (w.bias) sum += w.bias[row];
      y[i * stride + j] = sum;
    }
}

}  // namespace

const MatMulKernels portable_matmul = {round_row, multiply, activate, normalize};

}  // namespace pastkey
