// Included by the portable file and AMX's in an unnamed namespace.

#include "float16.inl"

// Number i of a row.
inline float load_number(const Numbers& of, size_t row, size_t i) {
  const size_t at = row * of.count + i;
  if (of.floats) return of.floats[at];
  if (of.float16) return half_to_float(of.float16[at]);
  const auto code = static_cast<float>(of.codes[at]);
  return of.groups ? code * of.groups[at >> of.group_shift] : code;
}
