// Which instruction sets this machine has, and which one the kernels use. Whether tiles are faster than vectors is measured above: hardware/isa.py.
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>

#include "interp.h"

namespace tp {

#if defined(__x86_64__)
static Kernels with_tiles(Kernels base, const TileKernels& tiles) {
  base.linear_panels = tiles.linear_panels;
  base.linear_in_block = tiles.linear_in_block;
  base.split_row = tiles.split_row;
  return base;
}

// The processor has tiles of bf16, the system saves them, and this process may use them (Linux asks to be asked, since they enlarge every signal's frame).
static bool tiles_usable() {
  constexpr unsigned TILE = 1u << 24, BF16_TILES = 1u << 22, XCR0_TILES = 3u << 17;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & TILE) == 0 || (d & BF16_TILES) == 0) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & 1u << 27) == 0) return false;  // OSXSAVE: xgetbv may be asked
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & XCR0_TILES) == XCR0_TILES && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

int best_isa() {
#if defined(__x86_64__)
  static const int best = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!wide || !__builtin_cpu_supports("avx512vnni")) return wide ? 2 : 1;
    return tiles_usable() ? ISA_AMX : ISA_AVX512_VNNI;
  }();
  return best;
#else
  return 0;
#endif
}

const Kernels* kernels_of(int level) {
#if defined(__x86_64__)
  static const Kernels amx = with_tiles(kAvx512Vnni, kAmx), emulated = with_tiles(kAvx2, kAmxEmulated);
  if (level == ISA_AMX_EMULATED && best_isa() >= 1) return &emulated;
  static const Kernels* const tables[] = {&kPortable, &kAvx2, &kAvx512, &kAvx512Vnni, &amx};
#else
  static const Kernels* const tables[] = {&kPortable};
#endif
  return level >= 0 && level <= best_isa() ? tables[level] : nullptr;
}

static std::atomic<const Kernels*> g_kernels{nullptr};
static std::atomic<int> g_isa{0};

int set_isa(int level) {
  const Kernels* found = kernels_of(level);
  if (!found) return -1;
  g_isa = level;
  g_kernels = found;
  return level;
}

const Kernels& kernels() {
  if (!g_kernels.load(std::memory_order_relaxed)) set_isa(std::min(best_isa(), ISA_AVX512_VNNI));
  return *g_kernels.load(std::memory_order_relaxed);
}

int isa() {
  kernels();
  return g_isa;
}

}  // namespace tp
