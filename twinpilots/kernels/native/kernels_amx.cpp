// bf16 linears by AMX tiles. The instructions are written out, because the compiler's own functions take tile numbers as text and templates give them as values.
#if defined(__x86_64__)
#include <immintrin.h>

#include <utility>

#include "kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#define TP_ISA 2
namespace tp {
namespace amx {
#include "vector.h"
#include "epilogue.h"

// Tiles 0 to 6 have `rows` rows, tile 7 has 16; all are 64 bytes wide.
struct Tiles {
  TP_INLINE void configure(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.rows[i] = i == 7 ? 16 : (uint8_t)rows;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  TP_INLINE void release() { __asm__ volatile("tilerelease"); }
  template <int T>
  TP_INLINE void load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "n"(T) : "memory");
  }
  template <int T>
  TP_INLINE void store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "n"(T) : "memory");
  }
  template <int C, int A, int B>
  TP_INLINE void dot() {  // C += A x B
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(C), "n"(A), "n"(B));
  }
};
#include "tiles.h"

static void linear_panels(const LinearArgs& a, int64_t panel0, int64_t panel1, int64_t row0, int64_t row1) {
  (a.split ? tile_panels : kAvx512Vnni.linear_panels)(a, panel0, panel1, row0, row1);
}
static void linear_in_block(const LinearInArgs& a, int64_t column0, int64_t column1, int64_t row0, int64_t row1) {
  (a.split ? tile_in_block : kAvx512Vnni.linear_in_block)(a, column0, column1, row0, row1);
}
}  // namespace amx

const TileKernels kAmx = {amx::linear_panels, amx::linear_in_block, amx::split_row};
}  // namespace tp
#endif
