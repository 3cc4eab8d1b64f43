// The arithmetic, one table of functions per instruction set. Every function is single-threaded and works on a part of an instruction;
// interp.cpp cuts instructions into parts. Knows nothing of queues, waits or addresses.
#pragma once
#include <cstddef>
#include <cstdint>

#include "abi.h"

namespace tp {

constexpr int FEW_ROWS = 4;  // of a linear whose weights are not quantised: up to here reading them is all the work

struct LinearArgs {
  float* dst;
  int64_t dst_ld;
  const float* src;
  int64_t src_ld;
  const void* w;
  int dtype;
  int64_t rows, width, unit_rows;  // outputs (of one half for ACT_MUL), K, outputs per panel
  int epilogue, activation;
  const float *bias, *bias2;  // may be null
  float softcap;
  const uint16_t* split;  // the rows from split_row0 on, split by Kernels::split_row; null where that is null or the weights are not bf16
  int64_t split_row0;
};

struct LinearInArgs {
  float* dst;
  int64_t dst_ld;
  const float* src;
  int64_t src_ld;
  const void* w;
  int dtype;
  int64_t rows, width;  // K, outputs
  bool accumulate;
  const uint16_t* split;  // as LinearArgs
  int64_t split_row0;
};

struct EmbedArgs {
  const void* table;
  int layout, dtype;
  int64_t width, unit_rows, vocab;
  const void* pos_table;  // may be null
  int pos_dtype;
  float scale;
};

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t dtype_bytes(int dtype) { return dtype == FP32 ? 4 : dtype == INT8 ? 1 : 2; }

// Pages of KV, all of one layer and tier: docs/execution.md has their layout.
struct KvArgs {
  char* base;
  int64_t page_stride, page_size, kv_heads, head_dim;
  int dtype;

  int64_t row_bytes() const { return head_dim * dtype_bytes(dtype); }
  int64_t scales_offset() const { return round_up(2 * kv_heads * page_size * row_bytes(), sizeof(float)); }  // int8 only
  int64_t page_bytes() const { return dtype == INT8 ? round_up(scales_offset() + 2 * kv_heads * page_size * (int64_t)sizeof(float), 64) : 2 * kv_heads * page_size * row_bytes(); }
  // Where a token's row of one head begins, and its scale; `line`: of the keys' heads, then of the values' heads.
  int64_t row_at(int64_t line, int64_t offset) const { return (line * page_size + offset) * row_bytes(); }
  int64_t scale_at(int64_t line, int64_t offset) const { return scales_offset() + (line * page_size + offset) * (int64_t)sizeof(float); }
};

struct RopeArgs {
  float* qkv;
  int64_t ld;
  const float *q_gain, *k_gain, *cos, *sin;  // may be null
  int64_t rotary_dim, heads;
  KvArgs kv;
  float eps;
};

struct AttendArgs {
  float* dst;
  int64_t dst_ld;
  const float* qkv;
  int64_t ld, heads, window;
  KvArgs kv;
  float scale, softcap;
};

// One sequence's part in a pass: its first token row, its query tokens, its KV tokens after the pass, its pages.
struct Sequence {
  int64_t row, len, kv_len;
  const int32_t* pages;
};

// Activations of a linear with quantised weights: per row and group of 32 a head (32 inputs' scale; sums of the rounded inputs: all, the first 16, the others), then codes.
struct RoundedHead {
  float scale, sum, sum_low, sum_high;
};
constexpr int64_t ROUNDED_TILE = 256;  // inputs; a tile of all rows lies together, so that a block of rows streams from memory while a panel passes by
struct Rounded {
  const char* data;  // null: weights that are not quantised
  int64_t first, rows;
  int code_bytes;  // of one rounded activation: 1 or 2

  int64_t record_bytes() const { return (int64_t)sizeof(RoundedHead) + 32 * code_bytes; }
  int64_t row_bytes() const { return ROUNDED_TILE / 32 * record_bytes(); }  // of one tile
  int64_t bytes(int64_t width) const { return (width + ROUNDED_TILE - 1) / ROUNDED_TILE * rows * row_bytes(); }
  const char* at(int64_t row, int64_t k) const { return data + (k / ROUNDED_TILE * rows + row - first) * row_bytes() + k % ROUNDED_TILE / 32 * record_bytes(); }
};

struct Kernels {
  void (*linear_panels)(const LinearArgs&, int64_t panel0, int64_t panel1, int64_t row0, int64_t row1);
  void (*linear_in_block)(const LinearInArgs&, int64_t column0, int64_t column1, int64_t row0, int64_t row1);
  void (*round_row)(const float* x, int64_t width, int bits, const Rounded& to, int64_t row);
  void (*quant_panel)(const LinearArgs&, const Rounded&, int64_t panel, int64_t row0, int64_t row1);
  void (*quant_in_block)(const LinearInArgs&, const Rounded&, int64_t column0, int64_t column1, int64_t row0, int64_t row1);
  void (*norm_row)(float* dst, const float* src, const float* gain, const float* bias, int64_t width, int kind, float eps);
  void (*add_row)(float* x, const float* p, const float* q, const float* bias, const float* gain, const float* gain_bias, int64_t width, int kind, float eps);
  void (*embed_row)(float* dst, const EmbedArgs&, int64_t token, int64_t position);
  void (*rope_row)(const RopeArgs&, int64_t row, int64_t rope_row, int64_t slot);
  void (*attend_block)(const AttendArgs&, const Sequence&, int64_t kv_head0, int64_t kv_head1, int64_t query0, int64_t query1);
  int64_t (*argmax_row)(const float* x, int64_t n);  // the first of the largest; -1 where that is not finite, or anything is not a number
  void (*exp_row)(const float* x, int64_t n, float best, float temperature, float floor, double* p);
  void (*sum_blocks)(const double* p, int64_t n, double* sums);
  double (*read_sum)(const void* data, int64_t bytes);
  void (*quantize_blocks)(int dtype, const float* weights, int64_t blocks, char* out);  // of 32 weights, to Q8_0 or Q4_1
  double (*fma_burn)(int64_t rounds);  // returns the floating-point operations done
  void (*split_row)(const float* x, int64_t width, uint16_t* split, int64_t row) = nullptr;  // null without tiles: activations of bf16 linears in terms of bf16 (tiles.h)
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vnni;

struct TileKernels {  // what tiles replace in another table
  void (*linear_panels)(const LinearArgs&, int64_t panel0, int64_t panel1, int64_t row0, int64_t row1);
  void (*linear_in_block)(const LinearInArgs&, int64_t column0, int64_t column1, int64_t row0, int64_t row1);
  void (*split_row)(const float* x, int64_t width, uint16_t* split, int64_t row);
};
extern const TileKernels kAmx, kAmxEmulated;  // beside kAvx512Vnni and kAvx2
#endif

// Memory of the calling thread, at least `bytes` large, 64-byte aligned; grows, never shrinks. A later call invalidates an earlier one's contents.
char* thread_scratch(size_t bytes);

// A quantised format (model/weight_format.py). A panel's block of w columns is block_bytes * w bytes, the first header * w of them scales.
struct QuantFormat {
  int64_t block, block_bytes, group, header;
};
inline bool is_quantized(int64_t dtype) { return dtype >= Q8_0 && dtype <= Q6_K; }
inline QuantFormat quant_format(int dtype) {
  switch (dtype) {
    case Q8_0: return {32, 34, 32, 2};
    case Q4_0: return {32, 18, 32, 2};
    case Q4_Z64: return {64, 36, 64, 4};
    case Q4_Z128: return {128, 68, 128, 4};
    case Q4_K: return {256, 144, 32, 16};
    case Q5_0: return {32, 22, 32, 2};
    case Q5_1: return {32, 24, 32, 4};
    case Q5_K: return {256, 176, 32, 16};
    case Q6_K: return {256, 210, 16, 18};
    default: return {32, 20, 32, 4};  // Q4_1, Q4_Z32
  }
}
inline bool has_bytes_or_upper_bits(int64_t dtype) { return dtype == Q8_0 || (dtype >= Q5_0 && dtype <= Q6_K); }  // more than nibbles
inline int64_t weight_bytes(int dtype, int64_t elements) {
  return is_quantized(dtype) ? elements / quant_format(dtype).block * quant_format(dtype).block_bytes : elements * dtype_bytes(dtype);
}

// Activations split for tiles (tiles.h): blocks of 16 rows, of each the 32 inputs of a tile after another, of each the three terms, of each the rows.
constexpr int64_t TILE_ROWS = 16, TILE_INPUTS = 32, TILE_ELEMENTS = TILE_ROWS * TILE_INPUTS, SPLIT_TERMS = 3;
inline int64_t split_block(int64_t width) { return (width + TILE_INPUTS - 1) / TILE_INPUTS * SPLIT_TERMS * TILE_ELEMENTS; }  // elements of 16 rows
inline int64_t split_bytes(int64_t rows, int64_t width) { return (rows + TILE_ROWS - 1) / TILE_ROWS * split_block(width) * 2; }

constexpr int64_t ATTEND_ROWS = 64;  // query rows (tokens x heads of one KV head) that share a converted block of K and V
constexpr int64_t ATTEND_HEADS = 4;  // KV heads that are attended block by block together: their rows in a page are one longer stream from memory

}  // namespace tp
