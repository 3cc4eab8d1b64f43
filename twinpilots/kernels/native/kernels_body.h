// Everything that is compiled once per instruction set. The including file sets TP_ISA, opens a namespace and names the table.
#include "vector.h"
#include "gemm.h"
#include "linear.h"
#include "rowwise.h"
#include "attend.h"

static double read_sum(const void* data, int64_t bytes) {
  vf s[4] = {};
  const float* p = (const float*)data;
  for (int64_t i = 0; i + 4 * W <= bytes / 4; i += 4 * W) {
    __builtin_prefetch((const char*)(p + i) + 4096);
    for (int j = 0; j < 4; j++) s[j] = s[j] + load(p + i + j * W);
  }
  return (double)((s[0] + s[1]) + (s[2] + s[3]))[0];
}

static double fma_burn(int64_t rounds) {
  vf c[12], a = splat(0.999f), b = splat(1e-3f);
#pragma GCC unroll 12
  for (int j = 0; j < 12; j++) c[j] = splat((float)j);
  for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; j++) c[j] = fma(c[j], a, b);
    __asm__ volatile("" ::: "memory");
  }
  vf total = zero();
  for (int j = 0; j < 12; j++) total = total + c[j];
  volatile float sink = total[0];
  (void)sink;
  return 2.0 * 12 * W * (double)rounds;
}
