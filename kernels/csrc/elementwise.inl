// Loops over floats that every level compiles with its own flags: include it in an unnamed namespace. They are plain
// C++ that compilers turn into vector code, and each operation is rounded once, so all levels give the same bits.

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

constexpr float kToInteger = 12582912.f;  // 1.5 * 2^23: a float added to it is rounded to an integer, half to even
constexpr uint32_t kToIntegerBits = 0x4b400000;

// e^x with a relative error of 2e-7, of x limited to [-87, 88]. NaN stays NaN.
inline float exponential(float x) {
  x = x < -87.f ? -87.f : x;
  x = x > 88.f ? 88.f : x;
  const float shifted = fmaf(x, 1.44269504f, kToInteger), n = shifted - kToInteger;
  const float f = fmaf(n, -1.42860677e-6f, fmaf(n, -0.693145752f, x));  // x - n log(2), |f| <= 0.35
  float p = 1.f / 5040;                                                 // Taylor's polynomial
  p = fmaf(p, f, 1.f / 720);
  p = fmaf(p, f, 1.f / 120);
  p = fmaf(p, f, 1.f / 24);
  p = fmaf(p, f, 1.f / 6);
  p = fmaf(p, f, 0.5f);
  p = fmaf(p, f, 1.f);
  p = fmaf(p, f, 1.f);
  return p * bits_to_float((float_to_bits(shifted) - kToIntegerBits + 127) << 23);
}

inline float silu(float x) { return x / (1.f + exponential(-x)); }

// x / 2 (1 + tanh(u)) = x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
inline float gelu_tanh(float x) { return x / (1.f + exponential(-1.59576912f * fmaf(0.044715f * x * x, x, x))); }

// x times the normal distribution; its tail by Abramowitz and Stegun 7.1.26, absolute error 1e-7.
inline float gelu(float x) {
  const float z = 0.707106781f * (x < 0 ? -x : x), t = 1.f / fmaf(0.3275911f, z, 1.f);
  float p = 1.061405429f;
  p = fmaf(p, t, -1.453152027f);
  p = fmaf(p, t, 1.421413741f);
  p = fmaf(p, t, -0.284496736f);
  p = fmaf(p, t, 0.254829592f);
  const float tail = x * (0.5f * p * t * exponential(-z * z));
  return x > 0 ? x - tail : tail;
}

template <float (*function)(float)>
void activate_by(const float* x, const float* other, float* y, size_t n) {
  if (other)
    for (size_t i = 0; i < n; i++) y[i] = function(x[i]) * other[i];
  else
    for (size_t i = 0; i < n; i++) y[i] = function(x[i]);
}

inline float identity(float x) { return x; }

void activate(Activation activation, const float* x, const float* other, float* y, size_t n) {
  switch (activation) {
    case Activation::none: return activate_by<identity>(x, other, y, n);
    case Activation::silu: return activate_by<silu>(x, other, y, n);
    case Activation::gelu: return activate_by<gelu>(x, other, y, n);
    case Activation::gelu_tanh: return activate_by<gelu_tanh>(x, other, y, n);
  }
}

inline float sum16(const float* lanes) {
  float eight[8], four[4];
  for (int i = 0; i < 8; i++) eight[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; i++) four[i] = eight[i] + eight[i + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

void normalize(bool centered, const float* x, const float* skip, const float* gamma, const float* beta, float epsilon,
               size_t n, float* sum, float* y) {
  if (skip)
    for (size_t i = 0; i < n; i++) y[i] = x[i] + skip[i];
  else
    for (size_t i = 0; i < n; i++) y[i] = x[i];
  if (sum) std::memcpy(sum, y, n * sizeof(float));
  if (centered) {
    float lanes[16] = {};
    for (size_t i = 0; i < n; i += 16)
      for (size_t j = 0; j < 16; j++) lanes[j] += y[i + j];
    const float mean = sum16(lanes) / static_cast<float>(n);
    for (size_t i = 0; i < n; i++) y[i] -= mean;
  }
  float lanes[16] = {};
  for (size_t i = 0; i < n; i += 16)
    for (size_t j = 0; j < 16; j++) lanes[j] = fmaf(y[i + j], y[i + j], lanes[j]);
  const float factor = 1.f / sqrtf(sum16(lanes) / static_cast<float>(n) + epsilon);
  for (size_t i = 0; i < n; i++) y[i] = y[i] * factor * gamma[i];
  if (beta)
    for (size_t i = 0; i < n; i++) y[i] += beta[i];
}

// y of `count` rows of W from `first`: their sums, plus those of the second term (or nullptr), times row scale, plus
// bias.
inline void finish(const Weights& w, size_t first, size_t count, const float* sums, const float* second, float* y) {
  for (size_t j = 0; j < count; j++) {
    float sum = second ? sums[j] + second[j] : sums[j];
    if (w.row_scales) sum *= w.row_scales[first + j];
    if (w.bias) sum += w.bias[first + j];
    y[j] = sum;
  }
}

void round_row(const float* x, size_t blocks, int8_t* q, int32_t* start, float* scale, float* rest) {
  for (size_t b = 0; b < blocks; b++, x += kBlock, q += kBlock) {
    int32_t top = 0;  // as integers, NaN and infinity are the largest floats
    for (size_t i = 0; i < kBlock; i++) {
      const int32_t magnitude = static_cast<int32_t>(float_to_bits(x[i]) & 0x7fffffff);
      top = magnitude > top ? magnitude : top;
    }
    const float largest = bits_to_float(static_cast<uint32_t>(top));
    const bool finite = top < 0x7f800000;
    // A block whose scale would be no normal number counts as zero.
    const float inverse = finite && largest >= 1.5e-36f ? 127.f / largest : 0.f;
    const float step = inverse > 0 ? largest / 127.f : finite ? 0.f : bits_to_float(0x7fc00000);
    int32_t sum = 0;
    for (size_t i = 0; i < kBlock; i++) {
      const int32_t value =
          static_cast<int32_t>(float_to_bits((finite ? x[i] * inverse : 0.f) + kToInteger) - kToIntegerBits);
      q[i] = static_cast<int8_t>(value);
      sum += value;
    }
    start[b] = -128 * sum;
    scale[b] = step;
    if (rest) {
      for (size_t i = 0; i < kBlock; i++) rest[i] = fmaf(static_cast<float>(q[i]), -step, x[i]);
      rest += kBlock;
    }
  }
}
