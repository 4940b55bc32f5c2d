#include "cpu.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

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

constexpr const char* kNames[] = {"portable", "avx2", "avx_vnni", "avx512", "amx", "neon", "dotprod", "i8mm"};
constexpr int kLevels = 8;

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

bool supported(Level level) {
  if (level == Level::portable) return true;
  const Registers basic = cpuid(1, 0), more = cpuid(7, 0), further = cpuid(7, 1);
  if (!bit(basic.c, 27)) return false;  // OSXSAVE: xgetbv is there
  const uint64_t saved = xcr0();
  constexpr uint64_t kAvx = 0x6, kAvx512 = 0xe6, kTiles = 0x60000;
  const bool avx2 = bit(more.b, 5) && bit(basic.c, 12) && bit(basic.c, 29) && (saved & kAvx) == kAvx;  // FMA, F16C
  const bool avx512 = avx2 && (saved & kAvx512) == kAvx512 && bit(more.b, 16) && bit(more.b, 17) && bit(more.b, 30) &&
                      bit(more.b, 31) && bit(more.c, 11);  // F, DQ, BW, VL, VNNI
  switch (level) {
    case Level::avx2: return avx2;
    case Level::avx_vnni: return avx2 && bit(further.a, 4);
    case Level::avx512: return avx512;
    default:  // AVX512-BF16 to convert, AMX-BF16 and AMX-TILE to multiply
      return avx512 && bit(further.a, 5) && bit(more.d, 22) && bit(more.d, 24) && (saved & kTiles) == kTiles &&
             tiles_permitted();
  }
}

#elif defined(PASTKEY_ARM64)

#if defined(__APPLE__)
bool feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
#endif

bool has_dotprod() {
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

bool has_i8mm() {
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

bool supported(Level level) {
  switch (level) {
    case Level::portable:
    case Level::neon: return true;  // part of every 64-bit ARM
    case Level::dotprod: return has_dotprod();
    case Level::i8mm: return has_i8mm();
    default: return false;
  }
}

#else

bool supported(Level level) { return level == Level::portable; }

#endif

// Whether the library was built with the kernels of the level.
bool built(Level level) {
  switch (level) {
    case Level::portable: return true;
#if defined(PASTKEY_AVX2)
    case Level::avx2: return true;
#endif
#if defined(PASTKEY_AVX_VNNI)
    case Level::avx_vnni: return true;
#endif
#if defined(PASTKEY_AVX512)
    case Level::avx512: return true;
#endif
#if defined(PASTKEY_AMX)
    case Level::amx: return true;
#endif
#if defined(PASTKEY_NEON)
    case Level::neon: return true;
#endif
#if defined(PASTKEY_DOTPROD)
    case Level::dotprod: return true;
#endif
#if defined(PASTKEY_I8MM)
    case Level::i8mm: return true;
#endif
    default: return false;
  }
}

Level choose() {
  const char* forced = std::getenv("PASTKEY_KERNELS");
  for (int i = kLevels - 1; i >= 0; i--) {
    const Level level = static_cast<Level>(i);
    if (forced && *forced && std::strcmp(forced, kNames[i]) != 0) continue;
    if (built(level) && supported(level)) return level;
    if (forced && *forced) refuse("PASTKEY_KERNELS is %s, which this machine or this build does not support", forced);
  }
  refuse("PASTKEY_KERNELS is %s, expected portable, avx2, avx_vnni, avx512, amx, neon, dotprod or i8mm", forced);
}

}  // namespace

Level level() {
  static const Level chosen = choose();
  return chosen;
}

const char* to_string(Level level) { return kNames[static_cast<int>(level)]; }

}  // namespace pastkey
