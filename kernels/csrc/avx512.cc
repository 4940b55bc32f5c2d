// AVX512 with VNNI. Up to four rows of X read W by four rows at a time, each register with two blocks of a row, or four
// of 4 bits. More rows read it by 16 rows: a panel of them is turned in the L1 cache, so that a register has four
// weights of each row. Many rows read two panels, which are turned once for all of them.
#include <immintrin.h>
#include <math.h>

#include <cstring>

#include "kernels.h"

namespace pastkey {
namespace {

#include "elementwise.inl"
#include "transpose16.inl"

constexpr size_t kChunk = 4;   // blocks of a panel: few, so that multiplying goes on while memory is read
constexpr size_t kByRows = 4;  // rows of X that are multiplied without a panel: its 16 rows are slow to read

#include "ahead.inl"

inline __m128i load_bytes(const uint8_t* p, size_t n) {  // at most 16
  return _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p);
}

// 16 zero points of a row.
inline __m128i load_zeros(const Weights& w, size_t row, size_t b, size_t n) {
  if (!w.zeros) return _mm_set1_epi8(8);
  const __m128i pairs = load_bytes(w.zeros + row * ((w.blocks + 1) / 2) + b / 2, (n + 1) / 2), low = _mm_set1_epi8(15);
  return _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
}

// Lanes 4 * block + row of four of 16 blocks, from the b-th.
inline __m512i four_of(const uint8_t* bytes, size_t b) {
  return _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes + b * 4)));
}

// 16 bytes of each of four rows, turned: byte 4 * i + row. Of halves, the first ones of four blocks before the second.
template <int kParts>
inline __m512i turn(const __m128i* of_row) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i halves = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  __m512i v = _mm512_castsi128_si512(of_row[0]);
  v = _mm512_inserti32x4(v, of_row[1], 1);
  v = _mm512_inserti32x4(v, of_row[2], 2);
  v = _mm512_inserti32x4(v, of_row[3], 3);
  if (kParts == 2) v = _mm512_shuffle_epi8(v, halves);
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(order, v), bytes);
}

// Zero points of 16 blocks of four rows, turned.
inline void load_zeros(const Weights& w, const size_t* rows, size_t b, uint8_t* zeros) {
  const size_t n = w.blocks - b < 16 ? w.blocks - b : 16;
  __m128i of_row[4];
  for (int r = 0; r < 4; r++) of_row[r] = load_zeros(w, rows[r], b, n);
  _mm512_store_si512(zeros, turn<1>(of_row));
}

// `n` (at most 16) numbers of a row, then zeros.
inline __m512 load_numbers(const Numbers& of, size_t row, size_t first, size_t n) {
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
  const size_t at = row * of.count + first;
  if (of.floats) return _mm512_maskz_loadu_ps(mask, of.floats + at);
  if (of.float16) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, of.float16 + at));
  const __m512 codes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_bytes(of.codes + at, n)));
  if (!of.groups) return codes;
  const float* groups = of.groups + (at >> of.group_shift);
  const __m512 first_group = _mm512_set1_ps(groups[0]);
  if (n <= size_t{1} << of.group_shift) return _mm512_mul_ps(codes, first_group);
  return _mm512_mul_ps(codes, _mm512_mask_blend_ps(0xff00, first_group, _mm512_set1_ps(groups[1])));
}

// Scales or offsets of four rows of W. Those of four blocks are in lanes 4 * block + row; of halves, those of the first
// halves and those of the second.
template <int kParts>
class Fours {
 public:
  Fours(const Numbers& of, const size_t* rows) : of_(of) {
    for (int r = 0; r < 4; r++) rows_[r] = rows[r] * of.count;
  }

  // Before those of 16 blocks from b.
  PASTKEY_APART void load(size_t b) {
    if (!of_.codes) return;
    const size_t first = b * kParts, n = of_.count - first < 16 * kParts ? of_.count - first : 16 * kParts;
    __m128i of_row[4];
    for (size_t i = 0; i < n; i += 16) {
      for (int r = 0; r < 4; r++) of_row[r] = load_bytes(of_.codes + rows_[r] + first + i, n - i < 16 ? n - i : 16);
      _mm512_store_si512(codes_ + 4 * i, turn<kParts>(of_row));
    }
    if (!of_.groups) return;
    const __mmask8 mask = n > 8 * kParts ? 3 : 1;
    __m128 pairs[4];
    for (int r = 0; r < 4; r++)
      pairs[r] = _mm_maskz_loadu_ps(mask, of_.groups + ((rows_[r] + first) >> of_.group_shift));
    const __m128 low = _mm_unpacklo_ps(pairs[0], pairs[1]), high = _mm_unpacklo_ps(pairs[2], pairs[3]);
    groups_[0] = _mm_movelh_ps(low, high);
    groups_[1] = _mm_movehl_ps(high, low);
  }

  // `n` (at most 4) blocks from b.
  void get(size_t b, size_t n, __m512* out) const {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    if (of_.codes) {
      const __m512 group = _mm512_broadcast_f32x4(groups_[b / 8 % 2]);
      for (size_t part = 0; part < kParts; part++)
        out[part] = _mm512_mul_ps(_mm512_cvtepi32_ps(four_of(codes_, b % 16 * kParts + 4 * part)), group);
    } else if (kParts == 1) {
      out[0] = _mm512_permutexvar_ps(order, load_floats(b, n));
    } else {
      const __m512 first = load_floats(2 * b, n < 2 ? 2 : 4), second = load_floats(2 * b + 4, n < 3 ? 0 : 2 * n - 4);
      const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 16, 20, 24, 28, 18, 22, 26, 30);
      out[0] = _mm512_permutex2var_ps(first, firsts, second);
      out[1] = _mm512_permutex2var_ps(first, _mm512_add_epi32(firsts, _mm512_set1_epi32(1)), second);
    }
  }

 private:
  // `n` (at most 4) of each row: lane 4 * row + i.
  __m512 load_floats(size_t first, size_t n) const {
    const __mmask8 mask = static_cast<__mmask8>((1u << n) - 1);
    if (of_.float16) {
      __m128i v[4];
      for (int r = 0; r < 4; r++) v[r] = _mm_maskz_loadu_epi16(mask, of_.float16 + rows_[r] + first);
      return _mm512_cvtph_ps(_mm256_setr_m128i(_mm_unpacklo_epi64(v[0], v[1]), _mm_unpacklo_epi64(v[2], v[3])));
    }
    __m128 v[4];
    for (int r = 0; r < 4; r++) v[r] = _mm_maskz_loadu_ps(mask, of_.floats + rows_[r] + first);
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_setr_m128(v[0], v[1])), _mm256_setr_m128(v[2], v[3]), 1);
  }

  const Numbers& of_;
  size_t rows_[4];
  alignas(64) uint8_t codes_[64 * kParts];
  __m128 groups_[2] = {_mm_set1_ps(1.f), _mm_set1_ps(1.f)};
};

// The four low bits of each byte.
inline __m512i low_halves(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }

// What sums of 4-bit weights' products start from: -zero point * sum of q, of numbers below 2^15.
inline __m512i start_int4(__m512i zeros, __m512i start) {
  return _mm512_madd_epi16(zeros, _mm512_srai_epi32(start, 7));
}

// In each lane of 128 bits, the sums of the four rows' lanes.
inline __m512i add_lanes(const __m512i* v) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// Which elements of 64 are in `n` (at most 4) blocks of a row.
struct Masks {
  __mmask64 first = ~0ull, second = ~0ull, pairs = ~0ull;  // of the first and last two blocks; of blocks of 4 bits
  __mmask16 lanes = 0xffff;
  __mmask8 blocks = 15;

  void limit(size_t n) {
    first = n > 1 ? ~0ull : 0xffffffffull;
    second = n > 2 ? 0xffffffffull : 0;
    pairs = (1ull << (16 * n)) - 1;
    lanes = static_cast<__mmask16>((1u << (4 * n)) - 1);
    blocks = static_cast<__mmask8>((1u << n) - 1);
  }
};

// Four blocks of four rows of W, and their sums of products with a row of x: lane 4 * block + row. Of 8 bits those of
// the first and of the second halves of the blocks.
template <int bits>
struct Four;

template <>
struct Four<8> {
  __m512i codes[2][4];

  Four(const uint8_t* const* rows, size_t b, const Masks& masks) {
    const size_t at = b * kBlock;
    for (int r = 0; r < 4; r++) {
      codes[0][r] = _mm512_maskz_loadu_epi8(masks.first, rows[r] + at);
      codes[1][r] = _mm512_maskz_loadu_epi8(masks.second, rows[r] + at + 64);
    }
  }
  void dots(__m512i q0, __m512i q1, __m512i start0, __m512i start1, __m512i* d) const {
    __m512i d0[4], d1[4];
    for (int r = 0; r < 4; r++) {
      d0[r] = _mm512_dpbusd_epi32(start0, codes[0][r], q0);
      d1[r] = _mm512_dpbusd_epi32(start1, codes[1][r], q1);
    }
    const __m512i s0 = add_lanes(d0), s1 = add_lanes(d1);
    d[0] = _mm512_shuffle_i32x4(s0, s1, 0x88);
    d[1] = _mm512_shuffle_i32x4(s0, s1, 0xdd);
  }
};

template <>
struct Four<4> {
  __m512i low[4], high[4];  // the even and the odd weights

  Four(const uint8_t* const* rows, size_t b, const Masks& masks) {
    for (int r = 0; r < 4; r++) {
      const __m512i pairs = _mm512_maskz_loadu_epi8(masks.pairs, rows[r] + b * 16);
      low[r] = low_halves(pairs);
      high[r] = low_halves(_mm512_srli_epi16(pairs, 4));
    }
  }
  void dots(__m512i q0, __m512i q1, __m512i start0, __m512i start1, __m512i* d) const {
    const __m512i even = _mm512_shuffle_i32x4(q0, q1, 0x88), odd = _mm512_shuffle_i32x4(q0, q1, 0xdd);
    __m512i sums[4];
    for (int r = 0; r < 4; r++) sums[r] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start0, low[r], even), high[r], odd);
    d[0] = add_lanes(sums);
  }
};

// out[m]: four rows of W from `row`, `there` of them in W, times rows of x from `from`.
template <int bits, Form form, int M>
inline void multiply_rows(const Weights& w, const Rounded& x, size_t from, size_t row, size_t there, float (*out)[4]) {
  constexpr int kParts = form == Form::halves ? 2 : 1;
  const __m512i expand = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const size_t blocks = w.blocks;
  size_t rows[4];
  const uint8_t* codes[4];
  for (size_t r = 0; r < 4; r++) {
    rows[r] = row + (r < there ? r : there - 1);
    codes[r] = w.codes + rows[r] * blocks * 4 * bits;
  }
  __m512 acc[M];
  for (int m = 0; m < M; m++) acc[m] = _mm512_setzero_ps();
  fetch_numbers(w.scales, row);
  if (form == Form::offsets) fetch_numbers(w.offsets, row);
  Fours<kParts> scales(w.scales, rows);
  Fours<1> offsets(w.offsets, rows);
  alignas(64) uint8_t zeros[64];
  Masks masks;
  for (size_t b = 0; b < blocks; b += 4) {
    const size_t n = blocks - b < 4 ? blocks - b : 4;
    if (n < 4) masks.limit(n);
    if (b % 16 == 0) {
      scales.load(b);
      if (form == Form::offsets) offsets.load(b);
      if (bits == 4 && form == Form::plain) load_zeros(w, rows, b, zeros);
    }
    fetch_ahead(w, row, 4, b, 4, 4 * bits, true);
    const Four<bits> four(codes, b, masks);
    __m512 of_w[kParts], offset[1];
    scales.get(b, n, of_w);
    if (form == Form::offsets) offsets.get(b, n, offset);
    for (int m = 0; m < M; m++) {
      const size_t in = (from + m) * blocks + b;
      const __m512i q0 = _mm512_maskz_loadu_epi8(masks.first, x.q + in * kBlock);
      const __m512i q1 = _mm512_maskz_loadu_epi8(masks.second, x.q + in * kBlock + 64);
      const __m512 of_x =
          _mm512_permutexvar_ps(expand, _mm512_castps128_ps512(_mm_maskz_loadu_ps(masks.blocks, x.scale + in)));
      __m512i d[2], start0 = _mm512_setzero_si512(), start1 = start0;
      if (form == Form::halves) {
        start0 = _mm512_sub_epi32(start0, _mm512_dpbusd_epi32(start0, _mm512_set1_epi8(-128), q0));
        start1 = _mm512_sub_epi32(start1, _mm512_dpbusd_epi32(start1, _mm512_set1_epi8(-128), q1));
      }
      four.dots(q0, q1, start0, start1, d);
      auto add = [&](__m512i products, __m512 scale) {
        acc[m] = _mm512_mask3_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(products), of_x), scale, acc[m], masks.lanes);
      };
      if (form == Form::halves) {
        add(d[0], of_w[0]);
        add(d[1], of_w[1]);
        continue;
      }
      if (bits == 8) d[0] = _mm512_add_epi32(d[0], d[1]);
      if (form == Form::plain) {
        const __m512i start =
            _mm512_permutexvar_epi32(expand, _mm512_castsi128_si512(_mm_maskz_loadu_epi32(masks.blocks, x.start + in)));
        d[0] = _mm512_add_epi32(bits == 4 ? start_int4(four_of(zeros, b % 16), start) : start, d[0]);
      }
      add(d[0], of_w[0]);
      if (form == Form::offsets) {
        const __m512 sums =
            _mm512_permutexvar_ps(expand, _mm512_castps128_ps512(_mm_maskz_loadu_ps(masks.blocks, x.sums + in)));
        acc[m] = _mm512_mask3_fnmadd_ps(sums, offset[0], acc[m], masks.lanes);
      }
    }
  }
  for (int m = 0; m < M; m++) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(acc[m]), _mm512_extractf32x8_ps(acc[m], 1));
    _mm_storeu_ps(out[m], _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
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
        finish(w, first + j, there, sums[m], terms == 2 ? sums[(m + 1) % M] : nullptr,
               y + (i + m) / terms * stride + j);
    }
  }
}

struct Panel {
  __m512i codes[kChunk][8];  // [block][j]: weights 4 j to 4 j + 3 of each row
  __m512 scales[16];         // of the block and those that follow up to a multiple of 16; of halves, of 8
  __m512 offsets[16];
  __m512i zeros[16];  // of 4 bits
};

// A block of 8 bits of 16 rows: those of row(i) and of row(i + 4) into a register's halves, and then turned.
template <class Row>
inline void turn_block(const Row& row, __m512i* codes) {
  __m512i turned[2][4];  // rows 0 to 7, 8 to 15: in each lane of 128 bits, four weights of four rows
  for (size_t h = 0; h < 2; h++) {
    __m512i v[4], t[4];
    for (size_t i = 0; i < 4; i++) {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row(8 * h + i)));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row(8 * h + i + 4)));
      v[i] = _mm512_mask_broadcast_i64x4(_mm512_castsi256_si512(low), 0xf0, high);
    }
    for (int i = 0; i < 2; i++) {
      t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
      turned[h][2 * i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      turned[h][2 * i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    }
  }
  for (int i = 0; i < 4; i++) {
    codes[i] = _mm512_shuffle_i32x4(turned[0][i], turned[1][i], 0x88);
    codes[4 + i] = _mm512_shuffle_i32x4(turned[0][i], turned[1][i], 0xdd);
  }
}

template <int bits>
inline void fill_panel(const Weights& w, size_t row, size_t b0, size_t n, Panel& panel);

// `n` blocks from b0 of 16 rows of W.
template <>
inline void fill_panel<8>(const Weights& w, size_t row, size_t b0, size_t n, Panel& panel) {
  const size_t k = w.blocks * kBlock;
  for (size_t b = 0; b < n; b++) {
    const uint8_t* p = w.codes + row * k + (b0 + b) * kBlock;
    fetch_ahead(w, row, 16, b0 + b, 1, kBlock);
    turn_block([&](size_t r) { return p + r * k; }, panel.codes[b]);
  }
}

template <>
inline void fill_panel<4>(const Weights& w, size_t row, size_t b0, size_t n, Panel& panel) {
  static_assert(kChunk == 4, "a register of 64 bytes has four blocks of a row");
  const __mmask64 mask = n > 3 ? ~0ull : (1ull << (16 * n)) - 1;
  const size_t k = w.blocks * 16;
  fetch_ahead(w, row, 16, b0, n, 16);
  __m512i v[16];
  for (size_t r = 0; r < 16; r++) v[r] = _mm512_maskz_loadu_epi8(mask, w.codes + (row + r) * k + b0 * 16);
  transpose(v);
  for (size_t b = 0; b < n; b++)
    for (size_t j = 0; j < 4; j++) {
      panel.codes[b][j] = low_halves(v[4 * b + j]);
      panel.codes[b][4 + j] = low_halves(_mm512_srli_epi16(v[4 * b + j], 4));
    }
}

// At most 16 numbers of 16 rows of W; those behind `last` have its numbers.
inline void fill_numbers(const Numbers& of, size_t row, size_t last, size_t first, __m512* to) {
  const size_t n = of.count - first < 16 ? of.count - first : 16;
  __m512i v[16];
  for (size_t r = 0; r < 16; r++)
    v[r] = _mm512_castps_si512(load_numbers(of, row + r < last ? row + r : last, first, n));
  transpose(v);
  for (size_t i = 0; i < 16; i++) to[i] = _mm512_castsi512_ps(v[i]);
}

inline void fill_zeros(const Weights& w, size_t row, size_t b0, Panel& panel) {
  const size_t some = w.blocks - b0 < 16 ? w.blocks - b0 : 16;
  __m512i v[16];
  for (size_t r = 0; r < 16; r++) v[r] = _mm512_cvtepu8_epi32(load_zeros(w, row + r, b0, some));
  transpose(v);
  for (size_t i = 0; i < 16; i++) panel.zeros[i] = v[i];
}

inline __m512i broadcast(const int8_t* four) {
  int32_t value;
  std::memcpy(&value, four, 4);
  return _mm512_set1_epi32(value);
}

// In assembly, since GCC 12 copies each sum before the instruction.
inline __m512i dot(__m512i acc, __m512i codes, __m512i q) {
#if defined(__GNUC__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(q));
  return acc;
#else
  return _mm512_dpbusd_epi32(acc, codes, q);
#endif
}

// acc[chain] of a row of x, over the blocks of a panel.
template <int bits, Form form>
inline void multiply_panel(const Panel& panel, const Rounded& x, size_t from, size_t blocks, size_t b0, size_t n,
                           __m512 (*acc)[kMaxRows]) {
  constexpr size_t kParts = form == Form::halves ? 2 : 1, kSteps = 8 / kParts;
  for (size_t b = 0; b < n; b++) {
    const size_t in = from * blocks + b0 + b, scale = (b0 + b) * kParts % 16, at = (b0 + b) % 16;
    __m512& sum = acc[b][from];
    const __m512 of_x = _mm512_set1_ps(x.scale[in]);
    for (size_t part = 0; part < kParts; part++) {
      __m512i d = _mm512_setzero_si512();
      if (form != Form::offsets) d = _mm512_set1_epi32(x.start[in * kParts + part]);
      if (form == Form::plain && bits == 4) d = start_int4(panel.zeros[at], d);
      for (size_t j = part * kSteps; j < (part + 1) * kSteps; j++)
        d = dot(d, panel.codes[b][j], broadcast(x.q + in * kBlock + 4 * j));
      sum = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(d), of_x), panel.scales[scale + part], sum);
    }
    if (form == Form::offsets) sum = _mm512_fnmadd_ps(_mm512_set1_ps(x.sums[in]), panel.offsets[at], sum);
  }
}

inline void store_sums(const __m512* chains, size_t stride, float* sums) {
  const __m512 even = _mm512_add_ps(chains[0], chains[2 * stride]);
  _mm512_storeu_ps(sums, _mm512_add_ps(even, _mm512_add_ps(chains[stride], chains[3 * stride])));
}

// 16 rows of W
template <int bits, Form form>
void by_panel(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t row, float* y, size_t stride) {
  constexpr int kParts = form == Form::halves ? 2 : 1;
  Panel panel;
  __m512 acc[kChunk][kMaxRows];
  const size_t all = rows * terms;
  for (size_t chain = 0; chain < 4; chain++)
    for (size_t i = 0; i < all; i++) acc[chain][i] = _mm512_setzero_ps();
  for (size_t b0 = 0; b0 < w.blocks; b0 += kChunk) {
    const size_t n = w.blocks - b0 < kChunk ? w.blocks - b0 : kChunk;
    if (b0 * kParts % 16 == 0) {
      fill_numbers(w.scales, row, row + 15, b0 * kParts, panel.scales);
      if (form == Form::offsets) fill_numbers(w.offsets, row, row + 15, b0, panel.offsets);
      if (form == Form::plain && bits == 4) fill_zeros(w, row, b0, panel);
    }
    fill_panel<bits>(w, row, b0, n, panel);
    for (size_t i = 0; i < all; i++) multiply_panel<bits, form>(panel, x, i, w.blocks, b0, n, acc);
  }
  for (size_t i = 0; i < rows; i++) {
    float sums[2][16];
    for (size_t t = 0; t < terms; t++) store_sums(&acc[0][i * terms + t], kMaxRows, sums[t]);
    finish(w, row, 16, sums[0], terms == 2 ? sums[1] : nullptr, y + i * stride);
  }
}

template <int bits, Form form>
void multiply(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t first, size_t count, float* y,
              size_t stride) {
  size_t j = 0;
  if (rows * terms > kByRows)
    for (; j + 16 <= count; j += 16) by_panel<bits, form>(w, x, rows, terms, first + j, y + j, stride);
  if (j == count) return;
  const size_t all = rows * terms;
  const auto by = all % 4 == 0 ? by_rows<bits, form, 4>
                  : all == 3   ? by_rows<bits, form, 3>
                  : all % 2    ? by_rows<bits, form, 1>
                               : by_rows<bits, form, 2>;
  by(w, x, rows, terms, first + j, count - j, y + j, stride);
}

// Many rows: a block of 16 rows of W, whose weights are code - 128, or with offsets the code.
struct PackedWeights {
  __m512i codes[8];
  __m512 scales[2], offset;
};

// A block of 16 rows of X.
struct PackedRows {
  int8_t q[16][kBlock];
  int32_t start[3][16];  // of the block, and of its halves
  float scale[16], sums[16];
};

static_assert(sizeof(PackedRows) <= packed_rows_size(1, 1) && 2 * sizeof(PackedWeights) <= packed_weights_size(1, 1),
              "the memory of TileKernels");

// packed [terms][blocks]
void pack_rows(const float* x, size_t rows, size_t blocks, size_t terms, uint8_t* packed) {
  std::memset(packed, 0, blocks * terms * sizeof(PackedRows));
  auto* to = reinterpret_cast<PackedRows*>(packed);
  for (size_t r = 0; r < rows; r++)
    for (size_t b = 0; b < blocks; b++) {
      float rest[kBlock];
      const float* from = x + (r * blocks + b) * kBlock;
      for (size_t t = 0; t < terms; t++, from = rest) {
        PackedRows& block = to[t * blocks + b];
        round_row(from, 1, block.q[r], &block.start[0][r], &block.scale[r], t + 1 < terms ? rest : nullptr);
        block.sums[r] = static_cast<float>(block.start[0][r] / -128) * block.scale[r];
        int32_t sum = 0;
        for (size_t i = 0; i < kBlock / 2; i++) sum += block.q[r][i];
        block.start[1][r] = -128 * sum;
        block.start[2][r] = block.start[0][r] - block.start[1][r];
      }
    }
}

// packed [two panels][blocks]
template <int bits>
void pack_weights(const Weights& w, size_t first, size_t count, size_t, uint8_t* packed) {
  constexpr size_t kBytes = 4 * bits;  // of a block
  const size_t last = first + count - 1, parts = w.form == Form::halves ? 2 : 1;
  for (size_t row = first; row < first + kTileRows; row += 16) {
    auto* to = reinterpret_cast<PackedWeights*>(packed) + (row - first) / 16 * w.blocks;
    __m512 scales[16], offsets[16];
    for (size_t b = 0; b < w.blocks; b++) {
      if (b * parts % 16 == 0) fill_numbers(w.scales, row, last, b * parts, scales);
      if (b % 16 == 0 && w.form == Form::offsets) fill_numbers(w.offsets, row, last, b, offsets);
      for (size_t part = 0; part < parts; part++) to[b].scales[part] = scales[(b * parts + part) % 16];
      if (w.form == Form::offsets) to[b].offset = offsets[b % 16];
      fetch_ahead(w, row, 16, b, 1, kBytes);
      uint8_t bytes[16][kBlock];
      turn_block(
          [&](size_t r) {
            const size_t from = row + r < last ? row + r : last;
            const uint8_t* p = w.codes + (from * w.blocks + b) * kBytes;
            if (bits == 8) return p;
            const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
            const __m128i even = _mm_and_si128(pairs, low), odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
            const int zero = w.zeros ? w.zeros[from * ((w.blocks + 1) / 2) + b / 2] >> (b % 2 * 4) & 15 : 8;
            const __m256i codes = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
            const __m256i shift = _mm256_set1_epi8(static_cast<char>(w.form == Form::offsets ? 0 : 128 - zero));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes[r]), _mm256_add_epi8(codes, shift));
            return static_cast<const uint8_t*>(bytes[r]);
          },
          to[b].codes);
    }
  }
}

// acc[m][panel] of 8 rows of x, from the m-th of a block, and two panels.
template <Form form>
inline void multiply_block(const PackedWeights* const* w, const PackedRows& x, size_t from, __m512 (*acc)[2]) {
  constexpr size_t M = 8, kParts = form == Form::halves ? 2 : 1, kSteps = 8 / kParts;
  for (size_t part = 0; part < kParts; part++) {
    __m512i d[M][2];
    for (size_t m = 0; m < M; m++)
      d[m][0] = d[m][1] =
          form == Form::offsets ? _mm512_setzero_si512() : _mm512_set1_epi32(x.start[kParts - 1 + part][from + m]);
    for (size_t j = part * kSteps; j < (part + 1) * kSteps; j++) {
      const __m512i codes[2] = {w[0]->codes[j], w[1]->codes[j]};
      for (size_t m = 0; m < M; m++) {
        const __m512i q = broadcast(x.q[from + m] + 4 * j);
        for (int p = 0; p < 2; p++) d[m][p] = dot(d[m][p], codes[p], q);
      }
    }
    for (size_t m = 0; m < M; m++) {
      const __m512 of_x = _mm512_set1_ps(x.scale[from + m]);
      for (int p = 0; p < 2; p++)
        acc[m][p] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(d[m][p]), of_x), w[p]->scales[part], acc[m][p]);
    }
  }
  if (form != Form::offsets) return;
  for (size_t m = 0; m < M; m++)
    for (int p = 0; p < 2; p++) acc[m][p] = _mm512_fnmadd_ps(_mm512_set1_ps(x.sums[from + m]), w[p]->offset, acc[m][p]);
}

template <Form form>
void multiply_packed(const Weights& w, const uint8_t* weights, const uint8_t* x, size_t rows, size_t terms,
                     size_t first, size_t count, float* y, size_t stride) {
  const auto* of_w = reinterpret_cast<const PackedWeights*>(weights);
  for (size_t i = 0; i < rows; i += 16, x += packed_rows_size(w.blocks, terms)) {
    const auto* of_x = reinterpret_cast<const PackedRows*>(x);
    const size_t n = rows - i < 16 ? rows - i : 16;
    __m512 acc[2][4][16][2];  // [term][chain][row][panel]
    for (size_t t = 0; t < terms; t++) {
      for (auto& chain : acc[t])
        for (auto& row : chain) row[0] = row[1] = _mm512_setzero_ps();
      for (size_t b = 0; b < w.blocks; b++) {
        const PackedWeights* const panels[2] = {of_w + b, of_w + w.blocks + b};
        for (size_t m = 0; m < n; m += 8) multiply_block<form>(panels, of_x[t * w.blocks + b], m, acc[t][b % 4] + m);
      }
    }
    for (size_t m = 0; m < n; m++) {
      float sums[2][kTileRows];
      for (size_t t = 0; t < terms; t++)
        for (int p = 0; p < 2; p++) store_sums(&acc[t][0][m][p], 32, sums[t] + 16 * p);
      finish(w, first, count, sums[0], terms == 2 ? sums[1] : nullptr, y + (i + m) * stride);
    }
  }
}

void multiply_tile(const Weights& w, const uint8_t* weights, const uint8_t* x, size_t rows, size_t terms, size_t first,
                   size_t count, float* y, size_t stride) {
  const auto multiply = w.form == Form::plain    ? multiply_packed<Form::plain>
                        : w.form == Form::halves ? multiply_packed<Form::halves>
                                                 : multiply_packed<Form::offsets>;
  multiply(w, weights, x, rows, terms, first, count, y, stride);
}

void begin(uint8_t*) {}
void end(const uint8_t*) {}

}  // namespace

const MatMulKernels avx512_matmul = {
    round_row,
    activate,
    normalize,
    {multiply<8, Form::plain>, multiply<8, Form::halves>, multiply<8, Form::offsets>},
    {multiply<4, Form::plain>, nullptr, multiply<4, Form::offsets>},
};

const TileKernels avx512_tiles = {16, pack_rows, pack_weights<8>, pack_weights<4>, multiply_tile, begin, end};

}  // namespace pastkey
