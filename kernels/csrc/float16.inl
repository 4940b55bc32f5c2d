// Included by the portable files and AMX's in an unnamed namespace: float16 as processors convert it.

inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  uint32_t bits = sign | ((rest << 13) + (112u << 23));
  if (rest >= 0x7c00) bits = sign | 0x7f800000u | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 0x400000u : 0);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return rest < 0x400 ? copysignf(static_cast<float>(rest) * 5.96046448e-8f, value) : value;
}
