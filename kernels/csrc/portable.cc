// The reference: what every other level must give, bit for bit.
#include <math.h>

#include <cstring>

#include "kernels.h"

namespace pastkey {
namespace {

#include "elementwise.inl"

// The sum of 32 products: of block b of a row of W, and q.
int32_t dot_int8(const Weights& w, size_t row, size_t b, const int8_t* q) {
  const uint8_t* codes = w.codes + (row * w.blocks + b) * kBlock;
  int32_t dot = 0;
  for (size_t i = 0; i < kBlock; i++) dot += (codes[i] - 128) * q[i];
  return dot;
}

int32_t dot_int4(const Weights& w, size_t row, size_t b, const int8_t* q) {
  constexpr size_t kHalf = kBlock / 2;
  const uint8_t* codes = w.codes + (row * w.blocks + b) * kHalf;
  const int zero = w.zeros ? w.zeros[row * ((w.blocks + 1) / 2) + b / 2] >> (b % 2 * 4) & 15 : 8;
  int32_t dot = 0;
  for (size_t i = 0; i < kHalf; i++) dot += ((codes[i] & 15) - zero) * q[i] + ((codes[i] >> 4) - zero) * q[kHalf + i];
  return dot;
}

using Dot = int32_t(const Weights&, size_t, size_t, const int8_t*);

template <Dot* dot>
float row_sum(const Weights& w, size_t row, const int8_t* q, const float* scale) {
  float acc[4] = {};
  for (size_t b = 0; b < w.blocks; b++) {
    const size_t at = row * w.blocks + b;
    const auto product = static_cast<float>(dot(w, row, b, q + b * kBlock));
    const float weight_scale = w.scale_codes ? static_cast<float>(w.scale_codes[at]) : w.scales[at];
    acc[b % 4] = fmaf(product * scale[b], weight_scale, acc[b % 4]);
  }
  return (acc[0] + acc[2]) + (acc[1] + acc[3]);
}

template <Dot* dot>
void multiply(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t first, size_t count, float* y,
              size_t stride) {
  for (size_t i = 0; i < rows; i++)
    for (size_t j = 0; j < count; j++) {
      float sums[2];
      for (size_t t = 0; t < terms; t++) {
        const size_t at = (i * terms + t) * w.blocks;
        sums[t] = row_sum<dot>(w, first + j, x.q + at * kBlock, x.scale + at);
      }
      finish(w, first + j, 1, sums, terms == 2 ? sums + 1 : nullptr, y + i * stride + j);
    }
}

}  // namespace

const MatMulKernels portable_matmul = {round_row, multiply<dot_int8>, activate, normalize, multiply<dot_int4>};

}  // namespace pastkey
