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

// What a sum of products starts from, or is added to. `start`: that of Rounded.
template <int bits, Form form>
inline __m256i begin(__m256i zeros, __m256i start) {
  if (bits == 4) return form == Form::offsets ? _mm256_setzero_si256() : start_int4(zeros, start);
  if (form == Form::offsets) return kStarts ? _mm256_setzero_si256() : _mm256_sub_epi32(_mm256_setzero_si256(), start);
  return kStarts ? start : _mm256_setzero_si256();
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

// 16 bytes of each of four rows, turned: byte 4 * i + row.
inline void turn(const __m128i* of_row, uint8_t* to) {
  const __m128i a[2] = {_mm_unpacklo_epi8(of_row[0], of_row[1]), _mm_unpackhi_epi8(of_row[0], of_row[1])};
  const __m128i b[2] = {_mm_unpacklo_epi8(of_row[2], of_row[3]), _mm_unpackhi_epi8(of_row[2], of_row[3])};
  auto* quarters = reinterpret_cast<__m128i*>(to);
  for (int i = 0; i < 2; i++) {
    _mm_storeu_si128(quarters + 2 * i, _mm_unpacklo_epi16(a[i], b[i]));
    _mm_storeu_si128(quarters + 2 * i + 1, _mm_unpackhi_epi16(a[i], b[i]));
  }
}

// Zero points of at most 16 blocks from b of four rows, turned.
inline void load_zeros(const Weights& w, const size_t* rows, size_t b, uint8_t* to) {
  const size_t n = w.blocks - b < 16 ? w.blocks - b : 16, bytes = (w.blocks + 1) / 2;
  const __m128i low = _mm_set1_epi8(15);
  __m128i of_row[4];
  for (int r = 0; r < 4; r++) {
    of_row[r] = _mm_set1_epi8(8);
    if (!w.zeros) continue;
    const __m128i pairs = load_bytes(w.zeros, rows[r] * bytes + b / 2, (n + 1) / 2);
    of_row[r] = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
  }
  turn(of_row, to);
}

// Lanes 4 * i + row of two of 16 turned bytes.
inline __m256i two_of(const uint8_t* bytes, size_t i) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + i * 4)));
}

// Scales or offsets of 16 blocks of four rows of W. Those of two blocks are in lanes 4 * block + row; of halves, those
// of the first halves and those of the second.
template <int kParts>
class Fours {
 public:
  Fours(const Numbers& of, const size_t* rows) : of_(of) {
    for (int r = 0; r < 4; r++) rows_[r] = rows[r];
  }

  void load(size_t b) {
    const size_t first = b * kParts, n = of_.count - first < 16 * kParts ? of_.count - first : 16 * kParts;
    if (of_.codes)
      for (size_t i = 0; i < n; i += 16) load_codes(first + i, n - i < 16 ? n - i : 16, floats_ + 4 * i);
    else
      for (size_t i = 0; i < n; i += 8) load_floats(first + i, n - i < 8 ? n - i : 8, floats_ + 4 * i);
  }

  // Of blocks b and b + 1.
  __m256 get(size_t b, size_t part) const { return _mm256_load_ps(floats_ + 4 * (b % 16 * kParts + 2 * part)); }

 private:
  void load_codes(size_t first, size_t n, float* to) const {
    // Of halves, the first ones of two blocks before the second.
    const __m128i halves = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    __m128i of_row[4];
    for (int r = 0; r < 4; r++) {
      of_row[r] = load_bytes(of_.codes, rows_[r] * of_.count + first, n);
      if (kParts == 2) of_row[r] = _mm_shuffle_epi8(of_row[r], halves);
    }
    uint8_t codes[64];
    turn(of_row, codes);
    for (size_t i = 0; i < n; i += 8 * kParts) {
      __m128 group = _mm_set1_ps(1.f);
      if (of_.groups) {
        const float* groups = of_.groups + (first + i) / (8 * kParts);
        const size_t all = of_.count / (8 * kParts);
        group =
            _mm_setr_ps(groups[rows_[0] * all], groups[rows_[1] * all], groups[rows_[2] * all], groups[rows_[3] * all]);
      }
      for (size_t j = i; j < i + 8 * kParts; j += 2)
        _mm256_store_ps(to + 4 * j, _mm256_mul_ps(_mm256_cvtepi32_ps(two_of(codes, j)), pair(group, group)));
    }
  }
  void load_floats(size_t first, size_t n, float* to) const {
    __m256 v[4];
    for (int r = 0; r < 4; r++) {
      const size_t at = rows_[r] * of_.count + first;
      if (of_.float16) {
        v[r] = _mm256_cvtph_ps(load_bytes(reinterpret_cast<const uint8_t*>(of_.float16), 2 * at, 2 * n));
      } else if (n == 8) {
        v[r] = _mm256_loadu_ps(of_.floats + at);
      } else {
        float copy[8] = {};
        std::memcpy(copy, of_.floats + at, n * sizeof(float));
        v[r] = _mm256_loadu_ps(copy);
      }
    }
    __m256 turned[4];  // the numbers i and 4 + i
    for (int i = 0; i < 2; i++) {
      const __m256 a = i ? _mm256_unpackhi_ps(v[0], v[1]) : _mm256_unpacklo_ps(v[0], v[1]);
      const __m256 b = i ? _mm256_unpackhi_ps(v[2], v[3]) : _mm256_unpacklo_ps(v[2], v[3]);
      turned[2 * i] = _mm256_shuffle_ps(a, b, 0x44);
      turned[2 * i + 1] = _mm256_shuffle_ps(a, b, 0xee);
    }
    for (int i = 0; i < 2; i++) {
      const __m256 a = turned[kParts == 1 ? 2 * i : i], b = turned[kParts == 1 ? 2 * i + 1 : i + 2];
      _mm256_store_ps(to + 8 * i, _mm256_permute2f128_ps(a, b, 0x20));
      _mm256_store_ps(to + 16 + 8 * i, _mm256_permute2f128_ps(a, b, 0x31));
    }
  }

  const Numbers& of_;
  size_t rows_[4];
  alignas(32) float floats_[64 * kParts];
};

// Blocks b and next of four rows of W, and their sums of products with a row of x: lane 4 * block + row. Of 8 bits
// those of the first and of the second halves of the blocks.
template <int bits>
struct Four;

template <>
struct Four<8> {
  __m256i weights[2][4];

  Four(const uint8_t* const* rows, size_t b, size_t next) {
    for (int r = 0; r < 4; r++) {
      weights[0][r] = prepare(load(rows[r] + b * kBlock));
      weights[1][r] = prepare(load(rows[r] + next * kBlock));
    }
  }
  void dots(__m256i q0, __m256i q1, __m256i* d) const {
    __m256i d0[4], d1[4];
    for (int r = 0; r < 4; r++) {
      d0[r] = dot(_mm256_setzero_si256(), weights[0][r], q0);
      d1[r] = dot(_mm256_setzero_si256(), weights[1][r], q1);
    }
    const __m256i s0 = add_lanes(d0), s1 = add_lanes(d1);
    d[0] = _mm256_permute2x128_si256(s0, s1, 0x20);
    d[1] = _mm256_permute2x128_si256(s0, s1, 0x31);
  }
};

template <>
struct Four<4> {
  __m256i pairs[4];  // the weights as they are stored: taken apart, they would not fit into the registers

  Four(const uint8_t* const* rows, size_t b, size_t next) {
    for (int r = 0; r < 4; r++)
      pairs[r] = _mm256_setr_m128i(load_half(rows[r] + b * 16), load_half(rows[r] + next * 16));
  }
  void dots(__m256i q0, __m256i q1, __m256i* d) const {
    const __m256i even = _mm256_permute2x128_si256(q0, q1, 0x20), odd = _mm256_permute2x128_si256(q0, q1, 0x31);
    __m256i sums[4];
    for (int r = 0; r < 4; r++)
      sums[r] = dot_int4(_mm256_setzero_si256(), low_halves(pairs[r]), high_halves(pairs[r]), even, odd);
    d[0] = add_lanes(sums);
  }
};

// out[m]: four rows of W from `row`, `there` of them in W, times rows of x from `from`.
template <int bits, Form form, int M>
inline void multiply_rows(const Weights& w, const Rounded& x, size_t from, size_t row, size_t there, float (*out)[4]) {
  constexpr int kParts = form == Form::halves ? 2 : 1;
  const size_t blocks = w.blocks;
  size_t rows[4];
  const uint8_t* codes[4];
  for (size_t r = 0; r < 4; r++) {
    rows[r] = row + (r < there ? r : there - 1);
    codes[r] = w.codes + rows[r] * blocks * 4 * bits;
  }
  fetch_numbers(w.scales, row);
  if (form == Form::offsets) fetch_numbers(w.offsets, row);
  Fours<kParts> scales(w.scales, rows);
  Fours<1> offsets(w.offsets, rows);
  uint8_t zeros[64];
  __m256 acc[2][M];  // chains 0 | 1 and 2 | 3
  for (int m = 0; m < M; m++) acc[0][m] = acc[1][m] = _mm256_setzero_ps();
  const auto step = [&](size_t b, __m256* acc) {
    const bool both = b + 1 < blocks;
    const size_t next = both ? b + 1 : b;
    fetch_ahead(w, row, 4, b, 2, 4 * bits, true);
    const Four<bits> four(codes, b, next);
    const __m256i of_zeros = form == Form::plain && bits == 4 ? two_of(zeros, b % 16) : _mm256_setzero_si256();
    for (int m = 0; m < M; m++) {
      const size_t first = (from + m) * blocks + b, second = (from + m) * blocks + next;
      __m256i d[2];
      four.dots(load(x.q + first * kBlock), load(x.q + second * kBlock), d);
      if (form != Form::halves && bits == 8) d[0] = _mm256_add_epi32(d[0], d[1]);
      const __m256 of_x = pair(_mm_set1_ps(x.scale[first]), _mm_set1_ps(x.scale[second]));
      __m256& sum = acc[m];
      __m256 more = sum;
      for (size_t part = 0; part < kParts; part++) {
        const __m256i start = _mm256_setr_m128i(_mm_set1_epi32(x.start[first * kParts + part]),
                                                _mm_set1_epi32(x.start[second * kParts + part]));
        const __m256i all = _mm256_add_epi32(d[part], begin<bits, form>(of_zeros, start));
        more = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(all), of_x), scales.get(b, part), more);
      }
      if (form == Form::offsets)
        more = _mm256_fnmadd_ps(pair(_mm_set1_ps(x.sums[first]), _mm_set1_ps(x.sums[second])), offsets.get(b, 0), more);
      sum = both ? more : _mm256_blend_ps(sum, more, 0x0f);
    }
  };
  constexpr bool kTwice = bits == 8 || M == 1;  // sums stay in registers; else they are for the weights
  for (size_t b = 0; b < blocks; b += 2) {
    if (b % 16 == 0) {
      scales.load(b);
      if (form == Form::offsets) offsets.load(b);
      if (form == Form::plain && bits == 4) load_zeros(w, rows, b, zeros);
    }
    step(b, acc[kTwice ? 0 : b / 2 % 2]);
    if (kTwice && b + 2 < blocks) step(b += 2, acc[1]);
  }
  for (int m = 0; m < M; m++) {
    const __m256 sum = _mm256_add_ps(acc[0][m], acc[1][m]);
    _mm_storeu_ps(out[m], _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)));
  }
}

template <int bits, Form form, int M>
void by_rows(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t first, size_t count, float* y,
             size_t stride) {
  for (size_t j = 0; j < count; j += 4) {
    const size_t there = count - j < 4 ? count - j : 4;
    for (size_t i = 0; i < rows * terms; i += M) {
      float sums[M][4];
      multiply_rows<bits, form, M>(w, x, i, first + j, there, sums);
      for (size_t m = 0; m < M; m += terms)
        finish(w, first + j, there, sums[m], terms == 2 ? sums[M - 1] : nullptr, y + (i + m) / terms * stride + j);
    }
  }
}

struct Panel {
  __m256i weights[kChunk][8];  // [block][j]: weights 4 j to 4 j + 3 of each row
  __m256 scales[kChunk][2];    // of halves, of each
  __m256 offsets[kChunk];
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
    if (bits == 8) continue;
    int32_t zeros[kRows];
    for (size_t r = 0; r < kRows; r++) zeros[r] = load_zero(w, row + r, b0 + b);
    panel.zeros[b] = load(zeros);
  }
}

// Numbers of blocks b and b + 1 of 8 rows: to[part] and next[part].
template <int kParts>
inline void get_eight(const Fours<kParts>* fours, size_t b, __m256* to, __m256* next) {
  for (int part = 0; part < kParts; part++) {
    const __m256 low = fours[0].get(b, part), high = fours[1].get(b, part);
    to[part] = _mm256_permute2f128_ps(low, high, 0x20);
    next[part] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

inline __m256i broadcast(const int8_t* four) {
  int32_t value;
  std::memcpy(&value, four, 4);
  return _mm256_set1_epi32(value);
}

// acc[chain][m] of M rows of x from `from`, over the blocks of the panel.
template <int bits, Form form, int M>
inline void multiply_panel(const Panel& panel, const Rounded& x, size_t from, size_t blocks, size_t b0, size_t n,
                           __m256 (*acc)[kMaxRows]) {
  constexpr size_t kParts = form == Form::halves ? 2 : 1, kSteps = bits / kParts;
  for (size_t b = 0; b < n; b++) {
    const size_t in = from * blocks + b0 + b;
    for (size_t part = 0; part < kParts; part++) {
      __m256i d[M];
      for (int m = 0; m < M; m++)
        d[m] = begin<bits, form>(panel.zeros[b], _mm256_set1_epi32(x.start[(in + m * blocks) * kParts + part]));
      const __m256i* weights = panel.weights[b];
      for (size_t j = part * kSteps; j < (part + 1) * kSteps; j++)
        for (int m = 0; m < M; m++) {
          const int8_t* q = x.q + (in + m * blocks) * kBlock + 4 * j;
          if (bits == 4)
            d[m] = dot_int4(d[m], weights[j], weights[4 + j], broadcast(q), broadcast(q + kBlock / 2));
          else
            d[m] = dot(d[m], weights[j], broadcast(q));
#if defined(__GNUC__)  // otherwise GCC makes more sums than there are registers
          __asm__("" : "+x"(d[m]));
#endif
        }
      for (int m = 0; m < M; m++) {
        const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(d[m]), _mm256_set1_ps(x.scale[in + m * blocks]));
        acc[b][from + m] = _mm256_fmadd_ps(product, panel.scales[b][part], acc[b][from + m]);
      }
    }
    if (form == Form::offsets)
      for (int m = 0; m < M; m++)
        acc[b][from + m] =
            _mm256_fnmadd_ps(_mm256_set1_ps(x.sums[in + m * blocks]), panel.offsets[b], acc[b][from + m]);
  }
}

// 8 rows of W
template <int bits, Form form>
void by_panel(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t row, float* y, size_t stride) {
  constexpr int kParts = form == Form::halves ? 2 : 1;
  const size_t eight[kRows] = {row, row + 1, row + 2, row + 3, row + 4, row + 5, row + 6, row + 7};
  Fours<kParts> scales[2] = {{w.scales, eight}, {w.scales, eight + 4}};
  Fours<1> offsets[2] = {{w.offsets, eight}, {w.offsets, eight + 4}};
  Panel panel;
  __m256 acc[kChunk][kMaxRows];
  const size_t all = rows * terms;
  for (size_t chain = 0; chain < 4; chain++)
    for (size_t i = 0; i < all; i++) acc[chain][i] = _mm256_setzero_ps();
  for (size_t b0 = 0; b0 < w.blocks; b0 += kChunk) {
    const size_t n = w.blocks - b0 < kChunk ? w.blocks - b0 : kChunk;
    for (int i = 0; b0 % 16 == 0 && i < 2; i++) {
      scales[i].load(b0);
      if (form == Form::offsets) offsets[i].load(b0);
    }
    for (size_t b = 0; b < n; b += 2) {
      get_eight(scales, b0 + b, panel.scales[b], panel.scales[b + 1]);
      if (form == Form::offsets) get_eight(offsets, b0 + b, panel.offsets + b, panel.offsets + b + 1);
    }
    fill_panel<bits>(w, row, b0, n, panel);
    size_t i = 0;
    for (; i + 4 <= all; i += 4) multiply_panel<bits, form, 4>(panel, x, i, w.blocks, b0, n, acc);
    if (i + 2 <= all) multiply_panel<bits, form, 2>(panel, x, i, w.blocks, b0, n, acc), i += 2;
    if (i < all) multiply_panel<bits, form, 1>(panel, x, i, w.blocks, b0, n, acc);
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

template <int bits, Form form>
void multiply(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t first, size_t count, float* y,
              size_t stride) {
  size_t j = 0;
  if (rows * terms > kByRows)
    for (; j + kRows <= count; j += kRows) by_panel<bits, form>(w, x, rows, terms, first + j, y + j, stride);
  if (j == count) return;
  if (rows * terms % 2)
    by_rows<bits, form, 1>(w, x, rows, terms, first + j, count - j, y + j, stride);
  else
    by_rows<bits, form, 2>(w, x, rows, terms, first + j, count - j, y + j, stride);
}

constexpr MatMulKernels kKernels = {
    round_row,
    activate,
    normalize,
    {multiply<8, Form::plain>, multiply<8, Form::halves>, multiply<8, Form::offsets>},
    {multiply<4, Form::plain>, nullptr, multiply<4, Form::offsets>},
};

}  // namespace
}  // namespace pastkey
