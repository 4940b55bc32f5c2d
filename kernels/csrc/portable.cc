// The reference: what every other level must give, bit for bit.
#include <math.h>

#include <cstring>

#include "kernels.h"

namespace pastkey {
namespace {

#include "elementwise.inl"
#include "numbers.inl"

// The sum of products of block b of a row of W with q; of halves, of 16 from `from`.
template <int bits, Form form>
int32_t dot(const Weights& w, size_t row, size_t b, size_t from, const int8_t* q) {
  constexpr size_t kHalf = kBlock / 2;
  const uint8_t* codes = w.codes + (row * w.blocks + b) * 4 * bits;
  const int zero = form == Form::offsets ? 0
                   : bits == 8           ? 128
                   : w.zeros             ? w.zeros[row * ((w.blocks + 1) / 2) + b / 2] >> (b % 2 * 4) & 15
                                         : 8;
  int32_t sum = 0;
  if (bits == 8)
    for (size_t i = from; i < from + (form == Form::halves ? kHalf : kBlock); i++) sum += (codes[i] - zero) * q[i];
  else
    for (size_t i = 0; i < kHalf; i++) sum += ((codes[i] & 15) - zero) * q[i] + ((codes[i] >> 4) - zero) * q[kHalf + i];
  return sum;
}

template <int bits, Form form>
float row_sum(const Weights& w, size_t row, const Rounded& x, size_t x_row) {
  constexpr size_t kParts = form == Form::halves ? 2 : 1;
  float acc[4] = {};
  for (size_t b = 0; b < w.blocks; b++) {
    const size_t at = x_row * w.blocks + b;
    float& sum = acc[b % 4];
    for (size_t part = 0; part < kParts; part++) {
      const auto product = static_cast<float>(dot<bits, form>(w, row, b, part * kBlock / 2, x.q + at * kBlock));
      sum = fmaf(product * x.scale[at], load_number(w.scales, row, b * kParts + part), sum);
    }
    if (form == Form::offsets) sum = fmaf(x.sums[at], -load_number(w.offsets, row, b), sum);
  }
  return (acc[0] + acc[2]) + (acc[1] + acc[3]);
}

template <int bits, Form form>
void multiply(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t first, size_t count, float* y,
              size_t stride) {
  for (size_t i = 0; i < rows; i++)
    for (size_t j = 0; j < count; j++) {
      float sums[2];
      for (size_t t = 0; t < terms; t++) sums[t] = row_sum<bits, form>(w, first + j, x, i * terms + t);
      finish(w, first + j, 1, sums, terms == 2 ? sums + 1 : nullptr, y + i * stride + j);
    }
}

}  // namespace

const MatMulKernels portable_matmul = {
    round_row,
    activate,
    normalize,
    {multiply<8, Form::plain>, multiply<8, Form::halves>, multiply<8, Form::offsets>},
    {multiply<4, Form::plain>, nullptr, multiply<4, Form::offsets>},
};

}  // namespace pastkey
