// Everything that is compiled once per instruction set. The including file sets TP_ISA, opens a namespace and names the table.
#include "vector.h"
#include "gemm.h"
#include "epilogue.h"
#include "linear.h"
#include "quant.h"
#include "quant_linear.h"
#include "rowwise.h"
#include "choose.h"
#include "attend.h"
#include "quantize_block.h"
#include "attend_int8.h"

// Four streams at once: one alone leaves memory channels idle. With AVX-512 they come as fast as loads ask for them, and a prefetch only costs a buffer for misses;
// without it each is prefetched a page ahead.
static double read_sum(const void* data, int64_t bytes) {
  constexpr int64_t STREAMS = 4, LINE = 64 / sizeof(float);
  const int64_t stride = bytes / (int64_t)sizeof(float) / STREAMS / LINE * LINE;
  const float* p = (const float*)data;
  vf s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
  for (int64_t i = 0; i < stride; i += LINE) {
    for (int64_t j = 0; TP_ISA < 2 && j < STREAMS; j++) __builtin_prefetch((const char*)(p + j * stride + i) + 4096);
    for (int64_t k = 0; k < LINE; k += W) {
      s0 = s0 + load(p + i + k);
      s1 = s1 + load(p + stride + i + k);
      s2 = s2 + load(p + 2 * stride + i + k);
      s3 = s3 + load(p + 3 * stride + i + k);
    }
  }
  return (double)((s0 + s1) + (s2 + s3))[0];
}

// Twelve independent chains hide the latency of two units. Nothing may be reassociated, so the compiler must run every step.
static double fma_burn(int64_t rounds) {
  const vf a = splat(0.999f), b = splat(1e-3f);
  vf c[12];
#pragma GCC unroll 12
  for (int j = 0; j < 12; j++) c[j] = splat((float)j);
  for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; j++) c[j] = fma(c[j], a, b);
  }
  vf total = zero();
  for (int j = 0; j < 12; j++) total = total + c[j];
  volatile float sink = total[0];
  (void)sink;
  return 2.0 * 12 * W * (double)rounds;
}
