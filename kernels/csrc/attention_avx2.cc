// DecoderAttention with AVX2, FMA and F16C: 16 lanes are two registers.
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "attention.h"

namespace pastkey {
namespace {

struct Vec {
  __m256 lo, hi;
};
using Lanes = __m256;
using Quad = __m256;

constexpr size_t keys_at_once(size_t rows) { return rows == 4 ? 1 : rows == 1 ? 4 : 2; }
constexpr size_t columns_at_once(size_t rows) { return rows > 2 ? 1 : 4 / rows; }
inline void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }

inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Vec load(const uint16_t* p) {
  const __m128i* h = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline __m256 sign(__m256 a) { return _mm256_or_ps(_mm256_and_ps(a, _mm256_set1_ps(-0.f)), _mm256_set1_ps(1.f)); }
inline Vec sign(Vec a) { return {sign(a.lo), sign(a.hi)}; }
inline __m256 exp2_bits(__m256 a) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(a), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(0x3f800000)));
}
inline Vec exp2_bits(Vec a) { return {exp2_bits(a.lo), exp2_bits(a.hi)}; }
inline Vec zero_below(Vec x, float least, Vec y) {
  const __m256 l = _mm256_set1_ps(least);
  return {_mm256_and_ps(_mm256_cmp_ps(x.lo, l, _CMP_NLT_UQ), y.lo),
          _mm256_and_ps(_mm256_cmp_ps(x.hi, l, _CMP_NLT_UQ), y.hi)};
}

// Sums of lanes 8, 4, 2 and 1 apart, of two vectors in one operation: blend takes half of each, the other operand the
// rest.
inline Lanes fold(Vec a) { return _mm256_add_ps(a.lo, a.hi); }
inline __m256 fold2(__m256 a, __m256 b) {
  return _mm256_add_ps(_mm256_blend_ps(a, b, 0xf0), _mm256_permute2f128_ps(a, b, 0x21));
}
inline Quad fold4(const Lanes* a) {
  const __m256 x = fold2(a[0], a[1]), y = fold2(a[2], a[3]);
  return _mm256_add_ps(_mm256_blend_ps(x, y, 0xcc), _mm256_shuffle_ps(x, y, 0x4e));
}
inline __m256 fold8(Quad a, Quad b) {
  // hadd gives keys 0, 2 of each quad, then 1, 3
  return _mm256_permutevar8x32_ps(_mm256_hadd_ps(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
inline Vec fold16(const Quad* a) { return {fold8(a[0], a[1]), fold8(a[2], a[3])}; }
inline float reduce_add(Vec a) {
  const __m256 x = fold(a);
  const __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 z = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
inline float reduce_max(Vec a) {
  const __m256 x = _mm256_max_ps(a.lo, a.hi);
  const __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 z = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}

#include "attention.inl"
#include "recurrence.inl"

}  // namespace

const AttentionKernels avx2_attention = {attend, merge, finish, recur, convolve};

}  // namespace pastkey
