// The instruction sets that there are kernels for, and the one that this process uses.
#pragma once

namespace pastkey {

enum class Level { portable, avx2, avx_vnni, avx512, amx, neon, dotprod, i8mm };

// The highest that the processor and the operating system allow, or what PASTKEY_KERNELS names. Chosen at the first
// call. Throws an Error where the variable names none, or one that this machine lacks.
Level level();

const char* to_string(Level level);

}  // namespace pastkey
