// Making quantised weights on all threads (quantize_block.h), and packing them: the fast twins of kernels/quant_format.py; every block has the same bits there and here.
#include <algorithm>
#include <cstring>

#include "interp.h"

namespace tp {
namespace {

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

// Nibbles lie behind the upper bits: bit k of 32 is code k's; of Q5_K, bit g of byte k is code 32 g + k's.
void lane_block_five_bits(int dtype, const QuantFormat& format, const uint8_t* in, char* out) {
  constexpr uint32_t ONES = 0x01010101, SPREAD = 0x00204081;  // times SPREAD: bit j of four becomes bit 0 of byte j
  const uint8_t *upper = in + format.header, *nibbles = upper + format.block / 8;
  std::memcpy(out, in, (size_t)format.header);
  out += format.header;
  const int64_t chunk = dtype == Q5_K ? 32 : 16;
  for (int64_t i = 0; i < format.block / 2; i += chunk) pair_nibbles(nibbles + i, chunk, out + i);
  for (int64_t g = 0; g < format.block / 32; g++) {
    uint32_t word = 0;
    for (int t = 0; t < 8; t++) word |= (dtype == Q5_K ? load32(upper + 4 * t) >> g & ONES : (load32(upper) >> 4 * t & 15) * SPREAD & ONES) << t;
    store32(out + format.block / 2 + 4 * g, word);
  }
}

void lane_block(int dtype, const QuantFormat& format, const uint8_t* in, char* out) {
  if (dtype == Q6_K) return lane_block_q6_k(in, out);
  if (dtype >= Q5_0 && dtype <= Q5_K) return lane_block_five_bits(dtype, format, in, out);
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
  panel = scatter<2>(lane, dtype == Q8_0 || dtype == Q4_0 || dtype == Q5_0 || dtype == Q6_K ? 1 : 2, panel, w, column);
  panel = scatter<1>(lane, dtype == Q4_K || dtype == Q5_K ? 12 : dtype == Q6_K ? 16 : 0, panel, w, column);
  scatter<4>(lane, (format.block_bytes - format.header) / 4, panel, w, column);
}

}  // namespace

void quantize(int dtype, const float* weights, int64_t blocks, char* out, Pool* pool) {
  constexpr int64_t piece = 256;
  const int64_t bytes = quant_format(dtype).block_bytes;
  parallel(pool, (blocks + piece - 1) / piece, [&](int64_t chunk) {
    const int64_t first = chunk * piece;
    kernels().quantize_blocks(dtype, weights + first * 32, std::min(piece, blocks - first), out + first * bytes);
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
