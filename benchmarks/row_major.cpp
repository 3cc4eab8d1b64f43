// The contender of benchmarks/weight_layout.py: y[rows][N] = x[rows][K] @ w[N][K]^T for bf16 weights as checkpoints store them, outputs [n0, n1).
// A sum runs along k in W lanes, which are added at the end of each tile. Compiled with -march=native on the machine that is measured; never shipped.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int W = 16, MOST_ROWS = 6;  // 4 x 6 sums, 4 weights and one activation fit 32 registers
#else
constexpr int W = 8, MOST_ROWS = 2;
#endif
constexpr int64_t OUTPUTS = 4;
constexpr int64_t AHEAD_BYTES = 4096;
constexpr int64_t BLOCK_ROWS = 96, TILE_INPUTS = 2048, TILE_LD = TILE_INPUTS + 16;  // packed rows do not fall into one set of the caches
typedef float vf __attribute__((vector_size(W * 4)));

static inline vf widened(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#endif
}
static inline vf loaded(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  __asm__("" : "+v"(v));  // kept in a register: the compiler, left alone, loads it again for every use
  return v;
}
static inline float total(vf v) {
  float lanes[W];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// A row alone: one stream from memory, in four chains.
static void one_row(const float* x, const uint16_t* w, int64_t k, float* y, int64_t outputs) {
  for (int64_t n = 0; n < outputs; n++, w += k) {
    vf sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= k; i += 4 * W) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        __builtin_prefetch((const char*)(w + i + j * W) + AHEAD_BYTES);
        sums[j] += loaded(x + i + j * W) * widened(w + i + j * W);
      }
    }
    for (; i < k; i += W) sums[0] += loaded(x + i) * widened(w + i);
    y[n] = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

template <int M>
static void block(const float* x, const uint16_t* w, int64_t ldw, int64_t k, float* y, int64_t ldy) {
  vf sums[M][OUTPUTS] = {};
  for (int64_t i = 0; i < k; i += W) {
    vf b[OUTPUTS];
#pragma GCC unroll 4
    for (int n = 0; n < OUTPUTS; n++) {
      __builtin_prefetch((const char*)(w + n * ldw + i) + AHEAD_BYTES / OUTPUTS);
      b[n] = widened(w + n * ldw + i);
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) {
      const vf a = loaded(x + m * TILE_LD + i);
#pragma GCC unroll 4
      for (int n = 0; n < OUTPUTS; n++) sums[m][n] += a * b[n];
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < OUTPUTS; n++) y[m * ldy + n] += total(sums[m][n]);
}

// K is a multiple of W, [n0, n1) one of OUTPUTS.
extern "C" void row_major_linear(const float* x, int64_t rows, const uint16_t* w, int64_t inputs, int64_t outputs, int64_t n0, int64_t n1, float* y) {
  using Fn = void (*)(const float*, const uint16_t*, int64_t, int64_t, float*, int64_t);
  static const Fn table[] = {block<1>, block<2>,
#if defined(__AVX512F__)
                             block<3>, block<4>, block<5>, block<6>,
#endif
  };
  if (rows == 1) return one_row(x, w + n0 * inputs, inputs, y + n0, n1 - n0);
  static thread_local std::vector<float> packed(BLOCK_ROWS * TILE_LD);
  for (int64_t m = 0; m < rows; m++) std::memset(y + m * outputs + n0, 0, (size_t)(n1 - n0) * sizeof(float));
  for (int64_t m0 = 0; m0 < rows; m0 += BLOCK_ROWS)
    for (int64_t k0 = 0; k0 < inputs; k0 += TILE_INPUTS) {
      const int64_t count = std::min(rows - m0, BLOCK_ROWS), k = std::min(TILE_INPUTS, inputs - k0);
      for (int64_t m = 0; m < count; m++) std::memcpy(&packed[(size_t)(m * TILE_LD)], x + (m0 + m) * inputs + k0, (size_t)k * sizeof(float));
      for (int64_t n = n0; n < n1; n += OUTPUTS)
        for (int64_t m = 0, at_once; m < count; m += at_once) {
          const int64_t left = count - m, calls = (left + MOST_ROWS - 1) / MOST_ROWS;
          at_once = (left + calls - 1) / calls;
          table[at_once - 1](&packed[(size_t)(m * TILE_LD)], w + n * inputs + k0, inputs, k, y + (m0 + m) * outputs + n, outputs);
        }
    }
}
