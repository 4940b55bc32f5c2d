#include "levels.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "ort.h"

#if defined(__x86_64__) || defined(_M_X64)
#define PASTKEY_X86
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#define PASTKEY_ARM64
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#endif
#endif

namespace pastkey {
namespace {

bool always() { return true; }

#if defined(PASTKEY_X86)

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
#if defined(_MSC_VER)
  int out[4];
  __cpuid(out, 0);
  if (leaf > static_cast<uint32_t>(out[0])) return r;
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {uint32_t(out[0]), uint32_t(out[1]), uint32_t(out[2]), uint32_t(out[3])};
#else
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
#endif
  return r;
}

// The registers that the operating system saves.
uint64_t xcr0() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
#endif
}

bool bit(uint32_t value, int index) { return (value >> index) & 1; }

// Linux gives a process the 8 KB of tile registers only where it asks, and a container may refuse that.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// AVX2, FMA and F16C, and an operating system that saves their registers.
[[maybe_unused]] bool has_avx2() {
  const Registers basic = cpuid(1, 0);
  constexpr uint64_t kSaved = 0x6;
  return bit(basic.c, 27) && (xcr0() & kSaved) == kSaved &&  // OSXSAVE: xgetbv is there
         bit(cpuid(7, 0).b, 5) && bit(basic.c, 12) && bit(basic.c, 29);
}

[[maybe_unused]] bool has_avx_vnni() { return has_avx2() && bit(cpuid(7, 1).a, 4); }

[[maybe_unused]] bool has_avx512() {  // F, DQ, BW, VL and VNNI
  const Registers more = cpuid(7, 0);
  constexpr uint64_t kSaved = 0xe6;
  return has_avx2() && (xcr0() & kSaved) == kSaved && bit(more.b, 16) && bit(more.b, 17) && bit(more.b, 30) &&
         bit(more.b, 31) && bit(more.c, 11);
}

[[maybe_unused]] bool has_amx() {  // AVX512-BF16 to convert, AMX-BF16 and AMX-TILE to multiply
  const Registers more = cpuid(7, 0);
  constexpr uint64_t kSaved = 0x60000;
  return has_avx512() && bit(cpuid(7, 1).a, 5) && bit(more.d, 22) && bit(more.d, 24) && (xcr0() & kSaved) == kSaved &&
         tiles_permitted();
}

#elif defined(PASTKEY_ARM64)

#if defined(__APPLE__)
bool feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
#endif

[[maybe_unused]] bool has_dotprod() {
#if defined(__linux__)  // and Android
  return getauxval(AT_HWCAP) >> 20 & 1;
#elif defined(__APPLE__)
  return feature("hw.optional.arm.FEAT_DotProd");
#elif defined(_WIN32)
  return IsProcessorFeaturePresent(43);  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
#else
  return false;
#endif
}

[[maybe_unused]] bool has_i8mm() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) >> 13 & 1;
#elif defined(__APPLE__)
  return feature("hw.optional.arm.FEAT_I8MM");
#elif defined(_WIN32)
  return IsProcessorFeaturePresent(66);  // PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE, which older headers lack
#else
  return false;
#endif
}

#endif

// From the lowest to the highest. A compiler that lacks a level leaves its functions out.
const LevelKernels kLevels[] = {
    {"portable", always, portable_matmul, portable_attention, portable_logits},
#if defined(PASTKEY_AVX2)
    {"avx2", has_avx2, avx2_matmul, avx2_attention, avx2_logits},
#endif
#if defined(PASTKEY_AVX_VNNI)
    {"avx_vnni", has_avx_vnni, avx_vnni_matmul, avx2_attention, avx2_logits},
#endif
#if defined(PASTKEY_AVX512)
    {"avx512", has_avx512, avx512_matmul, avx512_attention, avx512_logits, &avx512_tiles},
#endif
#if defined(PASTKEY_AMX)
    {"amx", has_amx, avx512_matmul, avx512_attention, avx512_logits, &amx_tiles, &amx_attention_tiles},
#endif
#if defined(PASTKEY_NEON)  // part of every 64-bit ARM
    {"neon", always, neon_matmul, neon_attention, portable_logits},
#endif
#if defined(PASTKEY_DOTPROD)
    {"dotprod", has_dotprod, dotprod_matmul, neon_attention, portable_logits},
#endif
#if defined(PASTKEY_I8MM)
    {"i8mm", has_i8mm, i8mm_matmul, neon_attention, portable_logits},
#endif
};

const LevelKernels& choose() {
  const char* forced = std::getenv("PASTKEY_KERNELS");
  const LevelKernels* highest = nullptr;
  std::string names;
  for (const LevelKernels& level : kLevels) {
    if (!level.supported()) continue;
    if (forced && std::strcmp(forced, level.name) == 0) return level;
    highest = &level;
    names += (names.empty() ? "" : ", ") + std::string(level.name);
  }
  if (!forced || !*forced) return *highest;
  refuse("PASTKEY_KERNELS is %.40s, and this machine and this build have %s", forced, names.c_str());
}

}  // namespace

const LevelKernels& level() {
  static const LevelKernels& chosen = choose();
  return chosen;
}

}  // namespace pastkey
