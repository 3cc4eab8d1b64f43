// Making and packing quantised weights: the fast twins of kernels/quant_format.py, which says what is computed; every block has the same bits there and here.
#include <algorithm>
#include <cstring>

#include "interp.h"

#define TP_ISA 0
namespace tp {
namespace {
#include "vector.h"

constexpr int N = 32;
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to an integer

float half(float f) { return from_fp16(to_fp16(std::min(std::max(f, -65504.0f), 65504.0f))); }
float inverse_of(float d) { return d != 0 ? 1.0f / d : 0.0f; }

template <int HALF = N / 2>
TP_INLINE float sum32(float* t) {  // by halves
  for (int i = 0; i < HALF; i++) t[i] = t[i] + t[i + HALF];
  if constexpr (HALF > 1) return sum32<HALF / 2>(t);
  return t[0];
}

void codes_of(const float* x, float d, float m, float* q) {
  const float inverse = inverse_of(d);
  for (int i = 0; i < N; i++) {
    const float at = (x[i] - m) * inverse, low = at > 0.0f ? at : 0.0f, value = low < 15.0f ? low : 15.0f;
    q[i] = (value + MAGIC) - MAGIC;
  }
}

struct Best {
  const float* x;
  float error = __builtin_inff(), d = 0, m = 0;

  void offer(float new_d, float new_m, float* q) {
    const float d16 = half(new_d), m16 = half(new_m);
    codes_of(x, d16, m16, q);
    float t[N];
    for (int i = 0; i < N; i++) {
      const float off = (q[i] * d16 + m16) - x[i];
      t[i] = off * off;
    }
    const float found = sum32(t);
    if (found < error) error = found, d = d16, m = m16;
  }
};

void least_squares(const float* x, const float* q, float& d, float& m) {
  float a[N], b[N], c[N], e[N];
  for (int i = 0; i < N; i++) a[i] = q[i], b[i] = x[i], c[i] = q[i] * q[i], e[i] = q[i] * x[i];
  const float sum_q = sum32(a), sum_x = sum32(b), determinant = 32.0f * sum32(c) - sum_q * sum_q;
  if (!(determinant > 0)) return;
  d = (32.0f * sum32(e) - sum_q * sum_x) / determinant;
  m = (sum_x - d * sum_q) / 32.0f;
}

constexpr float SHRINK[][2] = {{0, 0}, {0.02f, 0.02f}, {0.04f, 0.04f}, {0.06f, 0.06f}, {0.09f, 0.09f}, {0.06f, 0}, {0, 0.06f}, {0.12f, 0.03f}, {0.03f, 0.12f}};

void offer_grids(Best& best, float low, float width) {
  for (int steps = 1; steps < 16; steps++) {
    const float d = width / (float)steps, inverse = d > 1e-30f ? 1.0f / d : 0.0f;
    float worst = 0, q[N];
    for (int i = 0; i < N && worst < 2e-3f; i += 8)  // most blocks are told by their first weights
      for (int j = i; j < i + 8; j++) {
        const float at = (best.x[j] - low) * inverse, off = __builtin_fabsf(at - ((at + MAGIC) - MAGIC));
        worst = off > worst ? off : worst;
      }
    if (!(best.error > 0) || !(worst < 2e-3f)) continue;
    for (int first = 0; first < 16 - steps; first++) best.offer(d, low - (float)first * d, q);
  }
}

void quantize_q4_1(const float* weights, char* out) {
  float x[N], q[N];
  for (int i = 0; i < N; i++) x[i] = weights[i] + 0.0f;  // one zero: no block depends on the order of a minimum
  float low = x[0], high = x[0];
  for (int i = 0; i < N; i++) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
  const float width = high - low;
  Best best{x};
  for (const auto& cut : SHRINK) {
    float m = low + cut[0] * width, d = ((high - cut[1] * width) - m) / 15.0f;
    best.offer(d, m, q);
    least_squares(x, q, d, m);
    best.offer(d, m, q);
  }
  offer_grids(best, low, width);
  codes_of(x, best.d, best.m, q);
  const uint16_t scales[2] = {to_fp16(best.d), to_fp16(best.m)};
  std::memcpy(out, scales, 4);
  for (int i = 0; i < 16; i++) out[4 + i] = (char)((int)q[i] | (int)q[i + 16] << 4);
}

void quantize_q8_0(const float* x, char* out) {
  float top = 0;
  for (int i = 0; i < N; i++) top = __builtin_fabsf(x[i]) > top ? __builtin_fabsf(x[i]) : top;
  const uint16_t d = to_fp16(top / 127.0f);
  const float inverse = inverse_of(from_fp16(d));
  std::memcpy(out, &d, 2);
  for (int i = 0; i < N; i++) {
    const float at = x[i] * inverse, low = at > -127.0f ? at : -127.0f, value = low < 127.0f ? low : 127.0f;
    out[2 + i] = (char)(int)((value + MAGIC) - MAGIC);
  }
}

// ---- packing: one column's block, its bytes in the order of a panel's column

uint32_t load32(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}
void store32(char* p, uint32_t word) { std::memcpy(p, &word, 4); }

// `count` bytes with codes k in their low nibbles and count + k in their high ones, to bytes that pair k and k + 4.
void pair_nibbles(const uint8_t* in, int64_t count, char* out) {
  constexpr uint32_t LOW = 0x0f0f0f0f;
  for (int64_t i = 0; i < count; i += 8, out += 4) {
    const uint32_t a = load32(in + i), b = load32(in + i + 4);
    store32(out, (a & LOW) | (b & LOW) << 4);
    store32(out + count / 2, (a >> 4 & LOW) | (b & ~LOW));
  }
}

void lane_block_q6_k(const uint8_t* in, char* out) {
  std::memcpy(out, in + 208, 2);
  std::memcpy(out + 2, in + 192, 16);
  for (int h = 0; h < 2; h++) {
    pair_nibbles(in + 64 * h, 64, out + 18 + 64 * h);
    for (int i = 0; i < 8; i++) {  // 16 codes: bits 2 t of their upper bits' 32-byte rows hold codes 32 t + ..
      uint32_t word = 0;
      for (int t = 0; t < 4; t++) word |= (load32(in + 128 + 32 * h + i % 2 * 16 + 4 * t) >> i / 2 * 2 & 0x03030303) << 2 * t;
      store32(out + 146 + 32 * h + 4 * i, word);
    }
  }
}

void lane_block(int dtype, const QuantFormat& format, const uint8_t* in, char* out) {
  if (dtype == Q6_K) return lane_block_q6_k(in, out);
  if (dtype == Q8_0) {
    std::memcpy(out, in, 34);
    return;
  }
  std::memcpy(out, in, (size_t)format.header);
  const int64_t chunk = dtype == Q4_K ? 32 : format.block / 2;
  for (int64_t i = format.header; i < format.block_bytes; i += chunk) pair_nibbles(in + i, chunk, out + i);
}

template <int SIZE>
char* scatter(const char*& from, int64_t count, char* to, int64_t w, int64_t column) {
  for (int64_t i = 0; i < count; i++, from += SIZE) std::memcpy(to + (i * w + column) * SIZE, from, SIZE);
  return to + count * w * SIZE;
}

void pack_block(int dtype, const QuantFormat& format, const char* lane, char* panel, int64_t w, int64_t column) {
  panel = scatter<2>(lane, dtype == Q8_0 || dtype == Q4_0 || dtype == Q6_K ? 1 : 2, panel, w, column);
  panel = scatter<1>(lane, dtype == Q4_K ? 12 : dtype == Q6_K ? 16 : 0, panel, w, column);
  scatter<4>(lane, (format.block_bytes - format.header) / 4, panel, w, column);
}

}  // namespace

void quantize(int dtype, const float* weights, int64_t blocks, char* out, Pool* pool) {
  constexpr int64_t piece = 256;
  const int64_t bytes = quant_format(dtype).block_bytes;
  parallel(pool, (blocks + piece - 1) / piece, [&](int64_t chunk) {
    for (int64_t b = chunk * piece; b < std::min(blocks, (chunk + 1) * piece); b++) (dtype == Q8_0 ? quantize_q8_0 : quantize_q4_1)(weights + b * N, out + b * bytes);
  });
}

// Rows of row blocks, row_stride bytes apart, to columns [column, column + rows) of a panel of w columns.
void pack_columns(int dtype, const char* row_blocks, int64_t row_stride, int64_t rows, int64_t blocks, char* panel, int64_t w, int64_t column, Pool* pool) {
  const QuantFormat format = quant_format(dtype);
  parallel(pool, blocks, [&](int64_t b) {
    char lane[256];
    for (int64_t r = 0; r < rows; r++) {
      lane_block(dtype, format, (const uint8_t*)row_blocks + r * row_stride + b * format.block_bytes, lane);
      pack_block(dtype, format, lane, panel + b * format.block_bytes * w, w, column + r);
    }
  });
}

}  // namespace tp
