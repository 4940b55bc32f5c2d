// Plain C++ that compilers turn into vector code, as elementwise.inl: a file of each level includes it.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "logits.h"

namespace pastkey {
namespace {

// a * b + c, fused where that is fast: sums need not be the same on all levels, only as exact as draw.cc expects.
inline double multiply_add(double a, double b, double c) {
#if defined(__FMA__) || defined(__AVX2__) || defined(__aarch64__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x of x limited to [-700, 1], with a relative error of 1e-11.
inline double exponential(double x) {
  constexpr double kToInteger = 6755399441055744.;  // 1.5 * 2^52: a double added to it is rounded to an integer
  constexpr uint64_t kToIntegerBits = 0x4338000000000000;
  x = x < -700. ? -700. : x;
  x = x > 1. ? 1. : x;
  const double shifted = multiply_add(x, 1.4426950408889634, kToInteger), n = shifted - kToInteger;
  const double f = multiply_add(n, -0.6931471805599453, x);  // |f| <= 0.35
  double p = 1. / 362880;                                    // Taylor's polynomial
  p = multiply_add(p, f, 1. / 40320);
  p = multiply_add(p, f, 1. / 5040);
  p = multiply_add(p, f, 1. / 720);
  p = multiply_add(p, f, 1. / 120);
  p = multiply_add(p, f, 1. / 24);
  p = multiply_add(p, f, 1. / 6);
  p = multiply_add(p, f, 0.5);
  p = multiply_add(p, f, 1.);
  p = multiply_add(p, f, 1.);
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - kToIntegerBits + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Its order as an integer is that of the float, and the other way round.
inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

inline float largest_of(const float* x, size_t n) {
  int32_t top = INT32_MIN;  // integers, since compilers may take their largest in any order
  for (size_t i = 0; i < n; i++) {
    const int32_t value = ordered(bits_of(x[i]));
    top = value > top ? value : top;
  }
  top = ordered(top);
  float value;
  std::memcpy(&value, &top, sizeof value);
  return value;
}

void largest(const float* x, size_t n, float* to) {
  for (; n >= kPart; x += kPart, n -= kPart) *to++ = largest_of(x, kPart);
  if (n) *to = largest_of(x, n);
}

inline void terms_of(const float* x, size_t n, double base, double inverse, double* terms) {
  for (size_t i = 0; i < n; i++) terms[i] = exponential((static_cast<double>(x[i]) - base) * inverse);
}

void sum(const float* x, size_t n, double base, double inverse, double* sums) {
  double terms[kPart] = {};
  for (; n >= kPart; n -= kPart, x += kPart) {
    terms_of(x, kPart, base, inverse, terms);
    for (size_t half = kPart / 2; half; half /= 2)
      for (size_t i = 0; i < half; i++) terms[i] += terms[i + half];
    *sums++ = terms[0];
  }
  if (n == 0) return;
  terms_of(x, n, base, inverse, terms);
  *sums = 0;
  for (size_t i = 0; i < n; i++) *sums += terms[i];
}

bool finite(const float* x, size_t n) {
  int32_t top = 0;
  for (size_t i = 0; i < n; i++) {
    const int32_t size = bits_of(x[i]) & 0x7fffffff;
    top = size > top ? size : top;
  }
  return top < 0x7f800000;
}

}  // namespace
}  // namespace pastkey
