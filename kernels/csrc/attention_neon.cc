// DecoderAttention with NEON: 16 lanes are four registers.
#include <arm_neon.h>
#if defined(_MSC_VER)
#include <intrin.h>
#endif
#include <math.h>
#include <string.h>

#include "attention.h"

namespace pastkey {
namespace {

struct Vec {
  float32x4_t v[4];
};
using Lanes = float32x4_t;
using Quad = float32x4_t;

constexpr size_t keys_at_once(size_t rows) { return rows > 2 ? 1 : 4 / rows; }
constexpr size_t columns_at_once(size_t rows) { return rows > 2 ? 1 : 4 / rows; }
#if defined(_MSC_VER) && !defined(__clang__)
inline void prefetch(const char* p) { __prefetch(p); }
#else
inline void prefetch(const char* p) { __builtin_prefetch(p); }
#endif

template <class F>
inline Vec each(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

// clang-format off: a line each
inline Vec zero() { return each([](int) { return vdupq_n_f32(0); }); }
inline Vec set1(float x) { return each([=](int) { return vdupq_n_f32(x); }); }
inline Vec load(const float* p) { return each([=](int i) { return vld1q_f32(p + 4 * i); }); }
inline Vec load(const uint16_t* p) {
  return each([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline void store(float* p, Vec a) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
}
inline Vec add(Vec a, Vec b) { return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
inline Vec sub(Vec a, Vec b) { return each([&](int i) { return vsubq_f32(a.v[i], b.v[i]); }); }
inline Vec mul(Vec a, Vec b) { return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
inline Vec div(Vec a, Vec b) { return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); }); }
inline Vec fma(Vec a, Vec b, Vec c) { return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); }); }
inline float32x4_t max(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // not vmaxq: of NaN
inline Vec max(Vec a, Vec b) { return each([&](int i) { return max(a.v[i], b.v[i]); }); }
// clang-format on
inline Vec sign(Vec a) {
  return each([&](int i) { return vbslq_f32(vdupq_n_u32(0x80000000u), a.v[i], vdupq_n_f32(1)); });
}
inline Vec exp2_bits(Vec a) {
  return each([&](int i) {
    const uint32x4_t n = vshlq_n_u32(vreinterpretq_u32_f32(a.v[i]), 23);
    return vreinterpretq_f32_u32(vaddq_u32(n, vdupq_n_u32(0x3f800000)));
  });
}
inline Vec zero_below(Vec x, float least, Vec y) {
  return each([&](int i) {
    const uint32x4_t below = vcltq_f32(x.v[i], vdupq_n_f32(least));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y.v[i]), below));
  });
}

// Sums of lanes 8 and 4 apart, then 2 and 1.
inline Lanes fold(Vec a) { return vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3])); }
inline float32x4_t fold2(float32x4_t a, float32x4_t b) {
  return vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)), vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
}
inline Quad fold4(const Lanes* a) { return vpaddq_f32(fold2(a[0], a[1]), fold2(a[2], a[3])); }
inline Vec fold16(const Quad* a) { return {{a[0], a[1], a[2], a[3]}}; }
inline float reduce_add(Vec a) {
  const float32x4_t x = fold(a);
  const float32x2_t y = vadd_f32(vget_low_f32(x), vget_high_f32(x));
  return vget_lane_f32(vpadd_f32(y, y), 0);
}
inline float reduce_max(Vec a) { return vmaxvq_f32(max(max(a.v[0], a.v[1]), max(a.v[2], a.v[3]))); }

#include "attention.inl"
#include "recurrence.inl"

}  // namespace

const AttentionKernels neon_attention = {attend, merge, finish, recur, convolve};

}  // namespace pastkey
