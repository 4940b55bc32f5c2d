// Prefill by AMX-BF16. Weights become bf16 panel by panel in the cache: 32 rows of W, as they lie, times 16 rows of X
// whose pairs along K stand side by side. int8 tiles would have to leave the tile registers after every block of 32 for
// its scale; in bf16 (code * integer is exact to 2^-9) they need not, and X is more exact than in int8.
// With two terms, W and X are sums of two bf16 numbers each, and the product of the two small ones is left out.
#include <immintrin.h>
#include <math.h>

#include <cstring>

#include "kernels.h"

namespace pastkey {
namespace {

#include "numbers.inl"
#include "tiles.inl"

// packed [terms][blocks][16 pairs of K][16 rows][2]
void pack_rows(const float* x, size_t rows, size_t blocks, size_t terms, uint8_t* packed) {
  const size_t k = blocks * kBlock;
  for (size_t b = 0; b < blocks; b++) {
    __m512i parts[2][16];
    for (size_t r = 0; r < 16; r++) {
      __m512 low = _mm512_setzero_ps(), high = low;
      if (r < rows) {
        low = _mm512_loadu_ps(x + r * k + b * kBlock);
        high = _mm512_loadu_ps(x + r * k + b * kBlock + 16);
      }
      for (size_t t = 0; t < terms; t++) {
        parts[t][r] = to_bf16(low, high);
        subtract_bf16(low, high, parts[t][r]);
      }
    }
    for (size_t t = 0; t < terms; t++) {
      transpose(parts[t]);
      for (size_t i = 0; i < 16; i++) _mm512_store_si512(packed + (t * blocks + b) * 1024 + i * 64, parts[t][i]);
    }
  }
}

// packed [terms][blocks][32 rows][32]
template <int bits>
void pack(const Weights& w, size_t first, size_t count, size_t terms, uint8_t* packed) {
  constexpr size_t kBytes = 4 * bits;  // of a block
  const size_t k = w.blocks * kBytes, term = w.blocks * 2048;
  for (size_t b = 0; b < w.blocks; b++)
    for (size_t r = 0; r < kTileRows; r++) {
      uint8_t* to = packed + b * 2048 + r * 64;
      if (r >= count) {
        for (size_t t = 0; t < terms; t++) _mm512_store_si512(to + t * term, _mm512_setzero_si512());
        continue;
      }
      const size_t at = (first + r) * w.blocks + b;
      const uint8_t* p = w.codes + at * kBytes;
      _mm_prefetch(reinterpret_cast<const char*>(p + kTileRows * k), _MM_HINT_T1);
      const bool halves = w.form == Form::halves, offsets = w.form == Form::offsets;
      const float scale = load_number(w.scales, first + r, halves ? 2 * b : b);
      const float second = halves ? load_number(w.scales, first + r, 2 * b + 1) : scale;
      const __m512 offset = _mm512_set1_ps(offsets ? load_number(w.offsets, first + r, b) : 0.f);
      __m128i codes[2] = {_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))};
      int zero = 128;
      if (bits == 8)
        codes[1] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16));
      else {
        const __m128i four = _mm_set1_epi8(15), odd = _mm_and_si128(_mm_srli_epi16(codes[0], 4), four);
        const __m128i even = _mm_and_si128(codes[0], four);
        codes[0] = _mm_unpacklo_epi8(even, odd);
        codes[1] = _mm_unpackhi_epi8(even, odd);
        zero = w.zeros ? w.zeros[(first + r) * ((w.blocks + 1) / 2) + b / 2] >> (b % 2 * 4) & 15 : 8;
      }
      const __m512i zeros = _mm512_set1_epi32(offsets ? 0 : zero);
      __m512 low = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(codes[0]), zeros));
      __m512 high = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(codes[1]), zeros));
      low = _mm512_fmsub_ps(low, _mm512_set1_ps(scale), offset);
      high = _mm512_fmsub_ps(high, _mm512_set1_ps(second), offset);
      for (size_t t = 0; t < terms; t++) {
        const __m512i rounded = to_bf16(low, high);
        _mm512_store_si512(to + t * term, rounded);
        subtract_bf16(low, high, rounded);
      }
    }
}

void multiply_tile(const Weights& w, const uint8_t* weights, const uint8_t* x, size_t rows, size_t terms, size_t first,
                   size_t count, float* y, size_t stride) {
  const size_t size = w.blocks * 1024;
  const uint8_t* x1 = rows > 16 ? x + size * terms : x;  // a placeholder: its results are not stored
  zero_tiles();
  multiply_blocks(weights, x, x1, w.blocks);
  if (terms == 2) {
    multiply_blocks(weights, x + size, x1 + size, w.blocks);
    multiply_blocks(weights + 2 * size, x, x1, w.blocks);
  }
  alignas(64) float tiles[2][2][16][16];  // [half of the weights' rows][half of x's][row of W][row of x]
  _tile_stored(0, tiles[0][0], 64);
  _tile_stored(1, tiles[0][1], 64);
  _tile_stored(2, tiles[1][0], 64);
  _tile_stored(3, tiles[1][1], 64);
  for (size_t h = 0; h < 2 && 16 * h < count; h++) {
    const size_t there = count - 16 * h < 16 ? count - 16 * h : 16, row = first + 16 * h;
    const __mmask16 mask = static_cast<__mmask16>((1u << there) - 1);
    const __m512 scale = w.row_scales ? _mm512_maskz_loadu_ps(mask, w.row_scales + row) : _mm512_set1_ps(1.f);
    const __m512 bias = w.bias ? _mm512_maskz_loadu_ps(mask, w.bias + row) : _mm512_setzero_ps();
    for (size_t g = 0; g < 2; g++) {
      __m512i t[16];
      for (int i = 0; i < 16; i++) t[i] = _mm512_load_si512(tiles[h][g][i]);
      transpose(t);
      for (size_t i = 0; i < 16 && 16 * g + i < rows; i++)
        _mm512_mask_storeu_ps(y + (16 * g + i) * stride + 16 * h, mask,
                              _mm512_fmadd_ps(_mm512_castsi512_ps(t[i]), scale, bias));
    }
  }
}

}  // namespace

const TileKernels amx_tiles = {kDecodeRows, pack_rows, pack<8>, pack<4>, multiply_tile, begin, end};

}  // namespace pastkey
