// Included by the portable file and AMX's in an unnamed namespace.

inline float float16_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t exponent = magnitude < 0x7c00 ? 112u << 23 : 224u << 23;  // infinity and NaN keep the largest
  const uint32_t bits = (half & 0x8000u) << 16 | ((magnitude << 13) + exponent);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return magnitude < 0x400 ? copysignf(static_cast<float>(magnitude) * 5.96046448e-8f, value) : value;
}

// Number i of a row.
inline float load_number(const Numbers& of, size_t row, size_t i) {
  const size_t at = row * of.count + i;
  if (of.floats) return of.floats[at];
  if (of.float16) return float16_to_float(of.float16[at]);
  const auto code = static_cast<float>(of.codes[at]);
  return of.groups ? code * of.groups[at >> of.group_shift] : code;
}
