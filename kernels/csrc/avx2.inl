// AVX2, and with PASTKEY_USE_VNNI the same with vpdpbusd: included by the file of either. One or two rows of X take W
// by four rows at a time, each register with one block of a row. More rows take it by 8 rows: a panel of them is turned
// in the L1 cache, so that a register has four weights of each row.
#include <immintrin.h>
#include <math.h>

#include <cstring>

#include "kernels.h"

namespace pastkey {
namespace {

#include "elementwise.inl"

constexpr size_t kRows = 8;    // of a panel
constexpr size_t kChunk = 4;   // blocks of a panel: few, so that multiplying goes on while memory is read
constexpr size_t kByRows = 2;  // rows of X that are multiplied without a panel

// Weights as they are multiplied, acc + weights * q in sums of four, and what a block's sum starts from.
#if defined(PASTKEY_USE_VNNI)
inline __m256i prepare(__m256i codes) { return codes; }
inline __m256i dot(__m256i acc, __m256i weights, __m256i q) { return _mm256_dpbusd_avx_epi32(acc, weights, q); }
constexpr bool kStarts = true;
#else
// vpmaddubsw takes unsigned times signed bytes, and saturates sums of two at 2^15: |w| q with w's sign moved to q stays
// below 128 * 127 * 2.
inline __m256i prepare(__m256i codes) { return _mm256_xor_si256(codes, _mm256_set1_epi8(-128)); }
inline __m256i dot(__m256i acc, __m256i weights, __m256i q) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(q, weights));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
constexpr bool kStarts = false;
#endif

// acc + low * even + high * odd of 4 bits, whose sums of four are below 2^15.
inline __m256i dot_int4(__m256i acc, __m256i low, __m256i high, __m256i even, __m256i odd) {
#if defined(PASTKEY_USE_VNNI)
  return dot(dot(acc, low, even), high, odd);
#else
  const __m256i fours = _mm256_add_epi16(_mm256_maddubs_epi16(low, even), _mm256_maddubs_epi16(high, odd));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(fours, _mm256_set1_epi16(1)));
#endif
}

// The four low bits of each byte.
inline __m256i low_halves(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
inline __m256i high_halves(__m256i bytes) { return low_halves(_mm256_srli_epi16(bytes, 4)); }

inline int load_zero(const Weights& w, size_t row, size_t b) {
  return w.zeros ? w.zeros[row * ((w.blocks + 1) / 2) + b / 2] >> (b % 2 * 4) & 15 : 8;
}

// What sums of 4-bit weights' products start from: -zero point * sum of q, of numbers below 2^15.
inline __m256i start_int4(__m256i zeros, __m256i start) {
  return _mm256_madd_epi16(zeros, _mm256_srai_epi32(start, 7));
}

#include "ahead.inl"

inline float load_scale(const Weights& w, size_t at) {
  return w.scale_codes ? static_cast<float>(w.scale_codes[at]) : w.scales[at];
}

// In each half, the sums of the four rows' halves.
inline __m256i add_lanes(const __m256i* v) {
  const __m256i a = _mm256_add_epi32(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
  const __m256i b = _mm256_add_epi32(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
  return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

inline __m256 pair(__m128 low, __m128 high) { return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1); }

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// `n` (at most 16) bytes from `at`, then zeros. Reads the 16 that end there, unless the array begins later.
inline __m128i load_bytes(const uint8_t* bytes, size_t at, size_t n) {
  alignas(32) static constexpr uint8_t kShift[32] = {0,    1,    2,    3,    4,    5,    6,    7,    8,    9,    10,
                                                     11,   12,   13,   14,   15,   0x80, 0x80, 0x80, 0x80, 0x80, 0x80,
                                                     0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80};
  if (at + n >= 16) return _mm_shuffle_epi8(load_half(bytes + at + n - 16), load_half(kShift + 16 - n));
  uint8_t copy[16] = {};
  std::memcpy(copy, bytes + at, n);
  return load_half(copy);
}

// Scales and zero points of at most 16 blocks from b of four rows of W, turned: byte 4 * block + row.
struct Scales {
  uint8_t codes[64], zeros[64];

  template <int bits>
  void load(const Weights& w, const size_t* rows, size_t b) {
    const size_t n = w.blocks - b < 16 ? w.blocks - b : 16, bytes = (w.blocks + 1) / 2;
    const __m128i low = _mm_set1_epi8(15);
    __m128i of_row[4];
    if (w.scale_codes) {
      for (int r = 0; r < 4; r++) of_row[r] = load_bytes(w.scale_codes, rows[r] * w.blocks + b, n);
      turn(of_row, codes);
    }
    if (bits == 8) return;
    for (int r = 0; r < 4; r++) {
      of_row[r] = _mm_set1_epi8(8);
      if (!w.zeros) continue;
      const __m128i pairs = load_bytes(w.zeros, rows[r] * bytes + b / 2, (n + 1) / 2);
      of_row[r] = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
    }
    turn(of_row, zeros);
  }
  static void turn(const __m128i* of_row, uint8_t* to) {
    const __m128i a[2] = {_mm_unpacklo_epi8(of_row[0], of_row[1]), _mm_unpackhi_epi8(of_row[0], of_row[1])};
    const __m128i b[2] = {_mm_unpacklo_epi8(of_row[2], of_row[3]), _mm_unpackhi_epi8(of_row[2], of_row[3])};
    auto* quarters = reinterpret_cast<__m128i*>(to);
    for (int i = 0; i < 2; i++) {
      _mm_storeu_si128(quarters + 2 * i, _mm_unpacklo_epi16(a[i], b[i]));
      _mm_storeu_si128(quarters + 2 * i + 1, _mm_unpackhi_epi16(a[i], b[i]));
    }
  }
};

// Lanes 4 * block + row of two of the blocks.
inline __m256i two_of(const uint8_t* bytes, size_t b) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + b % 16 * 4)));
}

inline __m128 load_floats(const Weights& w, const size_t* rows, size_t b) {
  float of_row[4];
  for (int r = 0; r < 4; r++) of_row[r] = w.scales[rows[r] * w.blocks + b];
  return _mm_loadu_ps(of_row);
}

// Blocks b and next of four rows of W, and their sums of products with a row of x: lane 4 * block + row.
template <int bits>
struct Four;

template <>
struct Four<8> {
  __m256i weights[2][4];

  Four(const uint8_t* const* rows, size_t b, size_t next, const Scales&) {
    for (int r = 0; r < 4; r++) {
      weights[0][r] = prepare(load(rows[r] + b * kBlock));
      weights[1][r] = prepare(load(rows[r] + next * kBlock));
    }
  }
  __m256i dots(__m256i q0, __m256i q1, __m256i start) const {
    __m256i d0[4], d1[4];
    for (int r = 0; r < 4; r++) {
      d0[r] = dot(_mm256_setzero_si256(), weights[0][r], q0);
      d1[r] = dot(_mm256_setzero_si256(), weights[1][r], q1);
    }
    const __m256i s0 = add_lanes(d0), s1 = add_lanes(d1);
    const __m256i d =
        _mm256_add_epi32(_mm256_permute2x128_si256(s0, s1, 0x20), _mm256_permute2x128_si256(s0, s1, 0x31));
    return kStarts ? _mm256_add_epi32(d, start) : d;
  }
};

template <>
struct Four<4> {
  __m256i pairs[4], zeros;  // the weights as they are stored: taken apart, they would not fit into the registers

  Four(const uint8_t* const* rows, size_t b, size_t next, const Scales& scales) {
    for (int r = 0; r < 4; r++)
      pairs[r] = _mm256_setr_m128i(load_half(rows[r] + b * 16), load_half(rows[r] + next * 16));
    zeros = two_of(scales.zeros, b);
  }
  __m256i dots(__m256i q0, __m256i q1, __m256i start) const {
    const __m256i even = _mm256_permute2x128_si256(q0, q1, 0x20), odd = _mm256_permute2x128_si256(q0, q1, 0x31);
    __m256i d[4];
    for (int r = 0; r < 4; r++)
      d[r] = dot_int4(_mm256_setzero_si256(), low_halves(pairs[r]), high_halves(pairs[r]), even, odd);
    return _mm256_add_epi32(start_int4(zeros, start), add_lanes(d));
  }
};

// out[m]: four rows of W from `row`, `there` of them in W, times rows of x from `from`.
template <int bits, int M>
inline void multiply_rows(const Weights& w, const Rounded& x, size_t from, size_t row, size_t there, float (*out)[4]) {
  size_t rows[4];
  const uint8_t* codes[4];
  for (size_t r = 0; r < 4; r++) {
    rows[r] = row + (r < there ? r : there - 1);
    codes[r] = w.codes + rows[r] * w.blocks * 4 * bits;
  }
  Scales scales;
  __m256 acc[2][M];  // chains 0 | 1 and 2 | 3
  for (int m = 0; m < M; m++) acc[0][m] = acc[1][m] = _mm256_setzero_ps();
  for (size_t b = 0; b < w.blocks; b += 2) {
    const bool both = b + 1 < w.blocks;
    const size_t next = both ? b + 1 : b;
    if (b % 16 == 0) scales.load<bits>(w, rows, b);
    fetch_ahead(w, row, 4, b, 2, 4 * bits);
    const Four<bits> four(codes, b, next, scales);
    const __m256 of_w = w.scale_codes ? _mm256_cvtepi32_ps(two_of(scales.codes, b))
                                      : pair(load_floats(w, rows, b), load_floats(w, rows, next));
    for (int m = 0; m < M; m++) {
      const size_t first = (from + m) * w.blocks + b, second = (from + m) * w.blocks + next;
      const __m256i start = _mm256_setr_m128i(_mm_set1_epi32(x.start[first]), _mm_set1_epi32(x.start[second]));
      const __m256i d = four.dots(load(x.q + first * kBlock), load(x.q + second * kBlock), start);
      const __m256 of_x = pair(_mm_set1_ps(x.scale[first]), _mm_set1_ps(x.scale[second]));
      __m256& sum = acc[b / 2 % 2][m];
      const __m256 more = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(d), of_x), of_w, sum);
      sum = both ? more : _mm256_blend_ps(sum, more, 0x0f);
    }
  }
  for (int m = 0; m < M; m++) {
    const __m256 sum = _mm256_add_ps(acc[0][m], acc[1][m]);
    _mm_storeu_ps(out[m], _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)));
  }
}

template <int bits, int M>
void by_rows(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t first, size_t count, float* y,
             size_t stride) {
  for (size_t j = 0; j < count; j += 4) {
    const size_t there = count - j < 4 ? count - j : 4;
    for (size_t i = 0; i < rows * terms; i += M) {
      float sums[M][4];
      multiply_rows<bits, M>(w, x, i, first + j, there, sums);
      for (size_t m = 0; m < M; m += terms)
        finish(w, first + j, there, sums[m], terms == 2 ? sums[M - 1] : nullptr, y + (i + m) / terms * stride + j);
    }
  }
}

struct Panel {
  __m256i weights[kChunk][8];  // [block][j]: weights 4 j to 4 j + 3 of each row
  __m256 scales[kChunk];
  __m256i zeros[kChunk];  // of 4 bits
};

// `n` blocks from b0 of 8 rows of W.
template <int bits>
inline void fill_panel(const Weights& w, size_t row, size_t b0, size_t n, Panel& panel) {
  constexpr size_t kBytes = 4 * bits;  // of a block
  const size_t k = w.blocks * kBytes;
  for (size_t b = 0; b < n; b++) {
    const uint8_t* p = w.codes + row * k + (b0 + b) * kBytes;
    fetch_ahead(w, row, kRows, b0 + b, 1, kBytes);
    for (size_t h = 0; h < kBytes / 16; h++) {
      __m256i v[4], t[4], turned[4];
      for (size_t i = 0; i < 4; i++)
        v[i] = _mm256_setr_m128i(load_half(p + i * k + 16 * h), load_half(p + (4 + i) * k + 16 * h));
      for (int i = 0; i < 2; i++) {
        t[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
      }
      for (int i = 0; i < 2; i++) {
        turned[2 * i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        turned[2 * i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
      }
      for (int i = 0; i < 4; i++) {
        panel.weights[b][4 * h + i] = bits == 8 ? prepare(turned[i]) : low_halves(turned[i]);
        if (bits == 4) panel.weights[b][4 + i] = high_halves(turned[i]);
      }
    }
    float scales[kRows];
    int32_t zeros[kRows] = {};
    for (size_t r = 0; r < kRows; r++) {
      scales[r] = load_scale(w, (row + r) * w.blocks + b0 + b);
      if (bits == 4) zeros[r] = load_zero(w, row + r, b0 + b);
    }
    panel.scales[b] = _mm256_loadu_ps(scales);
    panel.zeros[b] = load(zeros);
  }
}

inline __m256i broadcast(const int8_t* four) {
  int32_t value;
  std::memcpy(&value, four, 4);
  return _mm256_set1_epi32(value);
}

// acc[chain][m] of M rows of x from `from`, over the blocks of the panel.
template <int bits, int M>
inline void multiply_panel(const Panel& panel, const Rounded& x, size_t from, size_t blocks, size_t b0, size_t n,
                           __m256 (*acc)[kMaxRows]) {
  for (size_t b = 0; b < n; b++) {
    const size_t in = from * blocks + b0 + b;
    __m256i d[M];
    for (int m = 0; m < M; m++) {
      const __m256i start = _mm256_set1_epi32(x.start[in + m * blocks]);
      d[m] = bits == 4 ? start_int4(panel.zeros[b], start) : kStarts ? start : _mm256_setzero_si256();
    }
    const __m256i* weights = panel.weights[b];
    for (int j = 0; j < bits; j++)
      for (int m = 0; m < M; m++) {
        const int8_t* q = x.q + (in + m * blocks) * kBlock + 4 * j;
        if (bits == 4)
          d[m] = dot_int4(d[m], weights[j], weights[4 + j], broadcast(q), broadcast(q + kBlock / 2));
        else
          d[m] = dot(d[m], weights[j], broadcast(q));
      }
    for (int m = 0; m < M; m++) {
      const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(d[m]), _mm256_set1_ps(x.scale[in + m * blocks]));
      acc[b][from + m] = _mm256_fmadd_ps(product, panel.scales[b], acc[b][from + m]);
    }
  }
}

// 8 rows of W
template <int bits>
void by_panel(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t row, float* y, size_t stride) {
  Panel panel;
  __m256 acc[kChunk][kMaxRows];
  const size_t all = rows * terms;
  for (size_t chain = 0; chain < 4; chain++)
    for (size_t i = 0; i < all; i++) acc[chain][i] = _mm256_setzero_ps();
  for (size_t b0 = 0; b0 < w.blocks; b0 += kChunk) {
    const size_t n = w.blocks - b0 < kChunk ? w.blocks - b0 : kChunk;
    fill_panel<bits>(w, row, b0, n, panel);
    size_t i = 0;
    for (; i + 4 <= all; i += 4) multiply_panel<bits, 4>(panel, x, i, w.blocks, b0, n, acc);
    if (i + 2 <= all) multiply_panel<bits, 2>(panel, x, i, w.blocks, b0, n, acc), i += 2;
    if (i < all) multiply_panel<bits, 1>(panel, x, i, w.blocks, b0, n, acc);
  }
  for (size_t i = 0; i < rows; i++) {
    float sums[2][kRows];
    for (size_t t = 0; t < terms; t++) {
      const size_t at = i * terms + t;
      const __m256 even = _mm256_add_ps(acc[0][at], acc[2][at]), odd = _mm256_add_ps(acc[1][at], acc[3][at]);
      _mm256_storeu_ps(sums[t], _mm256_add_ps(even, odd));
    }
    finish(w, row, kRows, sums[0], terms == 2 ? sums[1] : nullptr, y + i * stride);
  }
}

template <int bits>
void multiply(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t first, size_t count, float* y,
              size_t stride) {
  size_t j = 0;
  if (rows * terms > kByRows)
    for (; j + kRows <= count; j += kRows) by_panel<bits>(w, x, rows, terms, first + j, y + j, stride);
  if (j == count) return;
  if (rows * terms % 2)
    by_rows<bits, 1>(w, x, rows, terms, first + j, count - j, y + j, stride);
  else
    by_rows<bits, 2>(w, x, rows, terms, first + j, count - j, y + j, stride);
}

}  // namespace
}  // namespace pastkey
