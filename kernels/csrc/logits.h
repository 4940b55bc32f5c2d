// What a choice of a token computes of all logits. A level's table is compiled with its flags, from logits.inl.
#pragma once

#include <cstddef>

namespace pastkey {

constexpr size_t kPart = 64;  // logits with a maximum and a sum of their own

struct LogitKernels {
  // For each part of x, the last of which may be shorter, its largest.
  void (*largest)(const float* x, size_t n, float* largest);
  // For each part, the sum of exp((x - base) * inverse) with a relative error of 1e-12; of arguments up to 1.
  void (*sum)(const float* x, size_t n, double base, double inverse, double* sums);
  bool (*finite)(const float* x, size_t n);  // whether all are
};

extern const LogitKernels portable_logits, avx2_logits, avx512_logits;

}  // namespace pastkey
