// DecoderAttention with AVX512 (F, BW, VL).
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "attention.h"

namespace pastkey {
namespace {

using Vec = __m512;
using Lanes = __m512;
using Quad = __m512;

constexpr size_t keys_at_once(size_t) { return 4; }
constexpr size_t columns_at_once(size_t) { return 4; }
inline void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec sign(Vec a) {
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN));
  return _mm512_castsi512_ps(_mm512_or_si512(sign, _mm512_set1_epi32(0x3f800000)));
}
inline Vec exp2_bits(Vec a) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(a), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(0x3f800000)));
}
inline Vec zero_below(Vec x, float least, Vec y) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(least), _CMP_NLT_UQ), y);
}

// Sums of lanes 8, 4, 2 and 1 apart, of two vectors in one operation: blend takes half of each, the other operand the
// rest.
inline Vec fold8(Vec a, Vec b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
}
inline Lanes fold(Vec a) { return a; }
inline Quad fold4(const Lanes* a) {
  const __m512i other = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  const Vec x = fold8(a[0], a[1]), y = fold8(a[2], a[3]);
  return _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, x, y), _mm512_permutex2var_ps(x, other, y));
}
inline Vec fold2(Vec a, Vec b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
}
inline Vec fold16(const Quad* a) {
  const Vec x = fold2(a[0], a[1]), y = fold2(a[2], a[3]);
  const Vec sums = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd));
  // within 4 lanes: keys of quads 0, 1, 2, 3; 4 lanes each for keys 0, 2, 1, 3 of a quad
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15), sums);
}
inline float reduce_add(Vec a) {
  const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_castps512_ps256(_mm512_shuffle_f32x4(a, a, 0x4e)));
  const __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 z = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }

#include "attention.inl"
#include "recurrence.inl"

}  // namespace

const AttentionKernels avx512_attention = {attend, merge, finish, recur, convolve};

}  // namespace pastkey
