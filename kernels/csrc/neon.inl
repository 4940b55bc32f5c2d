// NEON, and with PASTKEY_USE_DOTPROD or PASTKEY_USE_I8MM the same with sdot or usdot and usmmla: included by the file
// of each. W is taken by four rows at a time, X by one, two or four. A register has the sums of four rows of W; with
// usmmla, of two rows of W times two rows of X.
//
// To MSVC all vectors are of one type: no overloads by vector.
#include <arm_neon.h>
#if defined(_MSC_VER)
#include <intrin.h>
#endif

#include <math.h>

#include <cstring>

#include "kernels.h"

namespace pastkey {
namespace {

#include "elementwise.inl"

#if defined(_MSC_VER) && !defined(__clang__)
#define PASTKEY_FLATTEN
#else
#define PASTKEY_FLATTEN __attribute__((flatten))  // all calls inside become part of the function
#endif

#include "ahead.inl"

// Half a block of a row of W as it is multiplied, and the four sums of a block's products. kStarts: weights of 8 bits
// are unsigned in them, and Rounded's start is added.
#if defined(PASTKEY_USE_I8MM)
using Half = uint8x16_t;
constexpr bool kStarts = true;
inline Half as_stored(uint8x16_t codes) { return codes; }
inline Half centered(uint8x16_t codes) { return codes; }
inline int32x4_t dot(Half w, int8x16_t q) { return vusdotq_s32(vdupq_n_s32(0), w, q); }
inline int32x4_t dot(Half w0, Half w1, int8x16_t q0, int8x16_t q1) { return vusdotq_s32(dot(w0, q0), w1, q1); }
#else
using Half = int8x16_t;
constexpr bool kStarts = false;
inline Half as_stored(uint8x16_t codes) { return vreinterpretq_s8_u8(codes); }
inline Half centered(uint8x16_t codes) { return vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(0x80))); }
#if defined(PASTKEY_USE_DOTPROD)
inline int32x4_t dot(Half w, int8x16_t q) { return vdotq_s32(vdupq_n_s32(0), w, q); }
inline int32x4_t dot(Half w0, Half w1, int8x16_t q0, int8x16_t q1) { return vdotq_s32(dot(w0, q0), w1, q1); }
#else
// Two products stay below 2^15: 128 * 127 * 2.
inline int16x8_t products(Half w, int8x16_t q) {
  return vmlal_s8(vmull_s8(vget_low_s8(w), vget_low_s8(q)), vget_high_s8(w), vget_high_s8(q));
}
inline int32x4_t dot(Half w, int8x16_t q) { return vpaddlq_s16(products(w, q)); }
inline int32x4_t dot(Half w0, Half w1, int8x16_t q0, int8x16_t q1) {
  return vpadalq_s16(dot(w0, q0), products(w1, q1));
}
#endif
#endif

// f(Count<0>()) to f(Count<N - 1>()): arrays that only constants index stay in registers.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <int N, class F>
inline void each(const F& f) {
  if constexpr (N > 1) each<N - 1>(f);
  f(Count<N - 1>());
}

// `n` (at most 4) scales or offsets of four rows, from a multiple of 4: out[i] has a lane for each row.
inline void load_numbers(const Numbers& of, const size_t* rows, size_t first, size_t n, float32x4_t* out) {
  if (of.codes) {
    static const uint8_t turn[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    uint8_t codes[16] = {};
    if (n == 4)
      for (size_t r = 0; r < 4; r++) std::memcpy(codes + 4 * r, of.codes + rows[r] * of.count + first, 4);
    else
      for (size_t r = 0; r < 4; r++) std::memcpy(codes + 4 * r, of.codes + rows[r] * of.count + first, n);
    const uint8x16_t turned = vqtbl1q_u8(vld1q_u8(codes), vld1q_u8(turn));
    const uint16x8_t low = vmovl_u8(vget_low_u8(turned)), high = vmovl_u8(vget_high_u8(turned));
    out[0] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(low)));
    out[1] = vcvtq_f32_u32(vmovl_u16(vget_high_u16(low)));
    out[2] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(high)));
    out[3] = vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)));
    if (!of.groups) return;
    float groups[4];
    for (size_t r = 0; r < 4; r++) groups[r] = of.groups[(rows[r] * of.count + first) >> of.group_shift];
    const float32x4_t group = vld1q_f32(groups);
    for (size_t i = 0; i < 4; i++) out[i] = vmulq_f32(out[i], group);
    return;
  }
  float32x4_t v[4];
  for (size_t r = 0; r < 4; r++) {
    const size_t at = rows[r] * of.count + first;
    if (of.float16) {
      uint16_t four[4] = {};
      std::memcpy(four, of.float16 + at, n * sizeof(uint16_t));
      v[r] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(four)));
    } else {
      float four[4] = {};
      std::memcpy(four, of.floats + at, n * sizeof(float));
      v[r] = vld1q_f32(four);
    }
  }
  const float32x4_t even[2] = {vzip1q_f32(v[0], v[2]), vzip2q_f32(v[0], v[2])};
  const float32x4_t odd[2] = {vzip1q_f32(v[1], v[3]), vzip2q_f32(v[1], v[3])};
  out[0] = vzip1q_f32(even[0], odd[0]), out[1] = vzip2q_f32(even[0], odd[0]);
  out[2] = vzip1q_f32(even[1], odd[1]), out[3] = vzip2q_f32(even[1], odd[1]);
}

// Zero points of 4 bits of `n` (at most 4) blocks from b, a multiple of 4, of four rows: block i's in the bits 4 i to
// 4 i + 3 of each row's lane.
inline uint32x4_t load_zeros(const Weights& w, const size_t* rows, size_t b, size_t n) {
  uint32_t zeros[4] = {0x8888, 0x8888, 0x8888, 0x8888};
  if (w.zeros)
    for (size_t r = 0; r < 4; r++) {
      const uint8_t* pair = w.zeros + rows[r] * ((w.blocks + 1) / 2) + b / 2;
      zeros[r] = pair[0] | (n > 2 ? pair[1] << 8 : 0);
    }
  return vld1q_u32(zeros);
}

// A block of four rows of W.
template <int Bits, Form form>
struct Block {
  static constexpr int kParts = form == Form::halves ? 2 : 1;
  Half halves[4][2];
  float32x4_t scales[kParts], offsets;
  int32x4_t zeros;  // of 4 bits

  // Row r's, from its codes.
  void load(int r, const uint8_t* codes) {
    if constexpr (Bits == 8) {
      halves[r][0] = centered(vld1q_u8(codes)), halves[r][1] = centered(vld1q_u8(codes + 16));
    } else {
      const uint8x16_t pairs = vld1q_u8(codes);
      halves[r][0] = as_stored(vandq_u8(pairs, vdupq_n_u8(15))), halves[r][1] = as_stored(vshrq_n_u8(pairs, 4));
    }
  }
};

// A block times M rows of x from `from`, added to acc [M].
template <int M>
struct Rows {
  static constexpr int kSums = M;

  template <int Bits, Form form>
  static inline void add(const Block<Bits, form>& block, const Rounded& x, size_t from, size_t blocks, size_t b,
                         float32x4_t* acc) {
    constexpr int kParts = Block<Bits, form>::kParts;
    const Half(*halves)[2] = block.halves;
    each<M>([&](auto m) {
      const size_t in = (from + m.value) * blocks + b;
      const int8x16_t q[2] = {vld1q_s8(x.q + in * kBlock), vld1q_s8(x.q + in * kBlock + 16)};
      each<kParts>([&](auto p) {
        int32x4_t sums[4];
        each<4>([&](auto r) {
          sums[r.value] = kParts == 2 ? dot(halves[r.value][p.value], q[p.value])
                                      : dot(halves[r.value][0], halves[r.value][1], q[0], q[1]);
        });
        int32x4_t d = vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3]));
        const int32_t start = x.start[in * kParts + p.value];
        if (form == Form::offsets) {
          if (Bits == 8 && !kStarts) d = vsubq_s32(d, vdupq_n_s32(start));
        } else if (Bits == 4) {
          d = vmlaq_n_s32(d, block.zeros, start / 128);
        } else if (kStarts) {
          d = vaddq_s32(d, vdupq_n_s32(start));
        }
        acc[m.value] = vfmaq_f32(acc[m.value], vmulq_n_f32(vcvtq_f32_s32(d), x.scale[in]), block.scales[p.value]);
      });
      if constexpr (form == Form::offsets)
        acc[m.value] = vfmsq_f32(acc[m.value], vdupq_n_f32(x.sums[in]), block.offsets);
    });
  }
  static inline void sums(const float32x4_t* total, float32x4_t* out) {
    for (int m = 0; m < M; m++) out[m] = total[m];
  }
};

#if defined(PASTKEY_USE_I8MM)
// 8 of two rows side by side
inline uint8x16_t low_halves(uint8x16_t a, uint8x16_t b) {
  return vreinterpretq_u8_u64(vzip1q_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)));
}
inline uint8x16_t high_halves(uint8x16_t a, uint8x16_t b) {
  return vreinterpretq_u8_u64(vzip2q_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)));
}

inline int32x4_t pair_of(int32_t first, int32_t second) { return vzip1q_s32(vdupq_n_s32(first), vdupq_n_s32(second)); }

// The same by usmmla, for M / 2 pairs of rows of x: acc [M / 2][2], lanes w0 x0, w0 x1, w1 x0, w1 x1 of two rows of W.
template <int M>
struct Pairs {
  static constexpr int kSums = M;

  template <int Bits, Form form>
  static inline void add(const Block<Bits, form>& block, const Rounded& x, size_t from, size_t blocks, size_t b,
                         float32x4_t* acc) {
    constexpr int kParts = Block<Bits, form>::kParts;
    const Half(*halves)[2] = block.halves;
    const int32x4_t zeros[2] = {vzip1q_s32(block.zeros, block.zeros), vzip2q_s32(block.zeros, block.zeros)};
    Half weights[2][4];
    each<2>([&](auto p) {
      each<2>([&](auto h) {
        const Half first = halves[2 * p.value][h.value], second = halves[2 * p.value + 1][h.value];
        weights[p.value][2 * h.value] = low_halves(first, second);
        weights[p.value][2 * h.value + 1] = high_halves(first, second);
      });
    });
    each<M / 2>([&](auto m) {
      const size_t in0 = (from + 2 * m.value) * blocks + b, in1 = in0 + blocks;
      int8x16_t q[4];
      each<2>([&](auto h) {
        const uint8x16_t first = vreinterpretq_u8_s8(vld1q_s8(x.q + in0 * kBlock + 16 * h.value));
        const uint8x16_t second = vreinterpretq_u8_s8(vld1q_s8(x.q + in1 * kBlock + 16 * h.value));
        q[2 * h.value] = vreinterpretq_s8_u8(low_halves(first, second));
        q[2 * h.value + 1] = vreinterpretq_s8_u8(high_halves(first, second));
      });
      const float32x4_t scale = vzip1q_f32(vdupq_n_f32(x.scale[in0]), vdupq_n_f32(x.scale[in1]));
      each<2>([&](auto p) {
        float32x4_t& sum = acc[2 * m.value + p.value];
        each<kParts>([&](auto part) {
          int32x4_t d = pair_of(x.start[in0 * kParts + part.value], x.start[in1 * kParts + part.value]);
          if (form == Form::offsets)
            d = vdupq_n_s32(0);
          else if (Bits == 4)
            d = vmulq_s32(zeros[p.value], vshrq_n_s32(d, 7));  // start / 128
          each<4 / kParts>([&](auto i) {
            constexpr int at = 2 * part.value + i.value;
            d = vusmmlaq_s32(d, weights[p.value][at], q[at]);
          });
          const float32x4_t scales = block.scales[part.value];
          sum = vfmaq_f32(sum, vmulq_f32(vcvtq_f32_s32(d), scale),
                          p.value ? vzip2q_f32(scales, scales) : vzip1q_f32(scales, scales));
        });
        if constexpr (form == Form::offsets) {
          const float32x4_t sums = vzip1q_f32(vdupq_n_f32(x.sums[in0]), vdupq_n_f32(x.sums[in1]));
          const float32x4_t offsets = block.offsets;
          sum = vfmsq_f32(sum, sums, p.value ? vzip2q_f32(offsets, offsets) : vzip1q_f32(offsets, offsets));
        }
      });
    });
  }
  static inline void sums(const float32x4_t* total, float32x4_t* out) {
    for (int m = 0; m < M; m += 2) {
      out[m] = vuzp1q_f32(total[m], total[m + 1]);
      out[m + 1] = vuzp2q_f32(total[m], total[m + 1]);
    }
  }
};
template <int M>
using Many = Pairs<M>;
#else
template <int M>
using Many = Rows<M>;
#endif

// out: `four` rows of W times the rows of x from `from` that Product takes.
template <class Product, int Bits, Form form>
PASTKEY_FLATTEN void multiply_rows(const Weights& w, const size_t* four, const Rounded& x, size_t from,
                                   float32x4_t* out) {
  constexpr int N = Product::kSums;
  constexpr size_t kBytes = kBlock * Bits / 8;
  constexpr int kParts = Block<Bits, form>::kParts;
  fetch_numbers(w.scales, four[0]);
  if (form == Form::offsets) fetch_numbers(w.offsets, four[0]);
  float32x4_t acc[4][N];
  each<4>([&](auto chain) { each<N>([&](auto i) { acc[chain.value][i.value] = vdupq_n_f32(0); }); });
  for (size_t b0 = 0; b0 < w.blocks; b0 += 4) {
    const size_t n = w.blocks - b0 < 4 ? w.blocks - b0 : 4;
    float32x4_t scales[4 * kParts], offsets[4];
    each<kParts>([&](auto i) {
      constexpr size_t first = 4 * i.value;
      const size_t left = n * kParts > first ? n * kParts - first : 0;
      if (left)
        load_numbers(w.scales, four, b0 * kParts + first, left < 4 ? left : 4, scales + first);
      else
        each<4>([&](auto j) { scales[first + j.value] = vdupq_n_f32(0); });
    });
    if constexpr (form == Form::offsets) load_numbers(w.offsets, four, b0, n, offsets);
    const uint32x4_t zeros = Bits == 4 && form == Form::plain ? load_zeros(w, four, b0, n) : vdupq_n_u32(0);
    each<4>([&](auto i) {
      if (i.value >= n) return;
      const size_t b = b0 + i.value;
      Block<Bits, form> block;
      fetch_ahead(w, four[0], 4, b, 1, kBytes);
      each<4>([&](auto r) {
        const uint8_t* row = w.codes + four[r.value] * w.blocks * kBytes;
        block.load(r.value, row + b * kBytes);
      });
      each<kParts>([&](auto p) { block.scales[p.value] = scales[i.value * kParts + p.value]; });
      if constexpr (form == Form::offsets) block.offsets = offsets[i.value];
      block.zeros = vreinterpretq_s32_u32(vandq_u32(vshlq_u32(zeros, vdupq_n_s32(-4 * i.value)), vdupq_n_u32(15)));
      Product::add(block, x, from, w.blocks, b, acc[i.value]);
    });
  }
  float32x4_t total[N];
  each<N>([&](auto i) {
    total[i.value] =
        vaddq_f32(vaddq_f32(acc[0][i.value], acc[2][i.value]), vaddq_f32(acc[1][i.value], acc[3][i.value]));
  });
  Product::sums(total, out);
}

template <int Bits, Form form>
void multiply(const Weights& w, const Rounded& x, size_t rows, size_t terms, size_t first, size_t count, float* y,
              size_t stride) {
  const size_t all = rows * terms;
  for (size_t j = 0; j < count; j += 4) {
    const size_t there = count - j < 4 ? count - j : 4;
    size_t four[4];
    for (size_t r = 0; r < 4; r++) four[r] = first + j + (r < there ? r : there - 1);
    float32x4_t sums[kMaxRows];
    size_t i = 0;
    for (; i + 4 <= all; i += 4) multiply_rows<Many<4>, Bits, form>(w, four, x, i, sums + i);
    if (i + 2 <= all) multiply_rows<Many<2>, Bits, form>(w, four, x, i, sums + i), i += 2;
    if (i < all) multiply_rows<Rows<1>, Bits, form>(w, four, x, i, sums + i);
    for (i = 0; i < rows; i++) {
      float of_terms[2][4];
      for (size_t t = 0; t < terms; t++) vst1q_f32(of_terms[t], sums[i * terms + t]);
      finish(w, first + j, there, of_terms[0], terms == 2 ? of_terms[1] : nullptr, y + i * stride + j);
    }
  }
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
