// DecoderAttention in plain C++: the reference that the other instruction sets equal bit by bit.
#include <math.h>
#include <string.h>

#include <cstring>

#include "attention.h"

namespace pastkey {
namespace {

struct Vec {
  float v[16];
};
struct Lanes {
  float v[8];
};
struct Quad {
  float v[4];
};

constexpr size_t keys_at_once(size_t) { return 1; }
constexpr size_t columns_at_once(size_t) { return 1; }
void prefetch(const char*) {}

template <class F>
Vec each(F f) {
  Vec y;
  for (size_t i = 0; i < 16; i++) y.v[i] = f(i);
  return y;
}

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

#include "float16.inl"

Vec zero() { return {}; }
// clang-format off: a line each
Vec set1(float x) { return each([&](size_t) { return x; }); }
Vec load(const float* p) { return each([&](size_t i) { return p[i]; }); }
Vec load(const uint16_t* p) { return each([&](size_t i) { return half_to_float(p[i]); }); }
void store(float* p, const Vec& a) { memcpy(p, a.v, sizeof a.v); }
Vec add(const Vec& a, const Vec& b) { return each([&](size_t i) { return a.v[i] + b.v[i]; }); }
Vec sub(const Vec& a, const Vec& b) { return each([&](size_t i) { return a.v[i] - b.v[i]; }); }
Vec mul(const Vec& a, const Vec& b) { return each([&](size_t i) { return a.v[i] * b.v[i]; }); }
Vec div(const Vec& a, const Vec& b) { return each([&](size_t i) { return a.v[i] / b.v[i]; }); }
Vec max(const Vec& a, const Vec& b) { return each([&](size_t i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  return each([&](size_t i) { return fmaf(a.v[i], b.v[i], c.v[i]); });
}
Vec sign(const Vec& a) {
  return each([&](size_t i) { return from_bits((bits_of(a.v[i]) & 0x80000000u) | 0x3f800000u); });
}
Vec exp2_bits(const Vec& a) { return each([&](size_t i) { return from_bits((bits_of(a.v[i]) << 23) + 0x3f800000u); }); }
// clang-format on
Vec zero_below(const Vec& x, float least, const Vec& y) {
  return each([&](size_t i) { return x.v[i] < least ? 0.f : y.v[i]; });
}

Lanes fold(const Vec& a) {
  Lanes y;
  for (size_t i = 0; i < 8; i++) y.v[i] = a.v[i] + a.v[i + 8];
  return y;
}
float sum_of(const Lanes& a) {
  float s[4];
  for (size_t i = 0; i < 4; i++) s[i] = a.v[i] + a.v[i + 4];
  return (s[0] + s[2]) + (s[1] + s[3]);
}
Quad fold4(const Lanes* a) { return {{sum_of(a[0]), sum_of(a[1]), sum_of(a[2]), sum_of(a[3])}}; }
Vec fold16(const Quad* a) {
  return each([&](size_t i) { return a[i / 4].v[i % 4]; });
}
float reduce_add(const Vec& a) { return sum_of(fold(a)); }
float reduce_max(const Vec& a) {
  float most = a.v[0];
  for (float x : a.v) most = x > most ? x : most;
  return most;
}

#include "attention.inl"
#include "recurrence.inl"

}  // namespace

const AttentionKernels portable_attention = {attend, merge, finish, recur, convolve};

}  // namespace pastkey
