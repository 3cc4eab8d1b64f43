// The same bf16 linears over tiles in plain C++, exactly as the processor's manual writes TDPBF16PS down: what machines without AMX test tiles.h with.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "kernels.h"

#pragma GCC target("avx2,fma,f16c")

#define TP_ISA 1
namespace tp {
namespace amx_emulated {
#include "vector.h"
#include "epilogue.h"

struct Tiles {
  static thread_local uint32_t tile[8][16][16];
  static thread_local int64_t rows;

  static float flushed(float f) { return (float_bits(f) & 0x7f800000) ? f : 0.0f * f; }  // denormals are zeros
  static void configure(int64_t configured) {
    rows = configured;
    std::memset(tile, 0, sizeof tile);
  }
  static void release() { rows = 0; }
  template <int T>
  static void load(const void* from, int64_t stride) {
    std::memset(tile[T], 0, sizeof tile[T]);
    for (int64_t m = 0; m < (T == 7 ? 16 : rows); m++) std::memcpy(tile[T][m], (const char*)from + m * stride, 64);
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    for (int64_t m = 0; m < (T == 7 ? 16 : rows); m++) std::memcpy((char*)to + m * stride, tile[T][m], 64);
  }
  template <int C, int A, int B>
  static void dot() {
    for (int64_t m = 0; m < rows; m++) {
      float even[16] = {}, odd[16] = {};
      for (int k = 0; k < 16; k++) {
        const float a0 = flushed(bits_float(tile[A][m][k] << 16)), a1 = flushed(bits_float(tile[A][m][k] & 0xffff0000u));
        for (int n = 0; n < 16; n++) even[n] = flushed(__builtin_fmaf(a0, flushed(bits_float(tile[B][k][n] << 16)), even[n]));
        for (int n = 0; n < 16; n++) odd[n] = flushed(__builtin_fmaf(a1, flushed(bits_float(tile[B][k][n] & 0xffff0000u)), odd[n]));
      }
      for (int n = 0; n < 16; n++) tile[C][m][n] = float_bits(flushed(flushed(bits_float(tile[C][m][n])) + flushed(even[n] + odd[n])));
    }
  }
};
thread_local uint32_t Tiles::tile[8][16][16];
thread_local int64_t Tiles::rows;
#include "tiles.h"

static void linear_panels(const LinearArgs& a, int64_t panel0, int64_t panel1, int64_t row0, int64_t row1) {
  (a.split ? tile_panels : kAvx2.linear_panels)(a, panel0, panel1, row0, row1);
}
static void linear_in_block(const LinearInArgs& a, int64_t column0, int64_t column1, int64_t row0, int64_t row1) {
  (a.split ? tile_in_block : kAvx2.linear_in_block)(a, column0, column1, row0, row1);
}
}  // namespace amx_emulated

const TileKernels kAmxEmulated = {amx_emulated::linear_panels, amx_emulated::linear_in_block, amx_emulated::split_row};
}  // namespace tp
#endif
