// The arithmetic, one table of functions per instruction set. Every function is single-threaded and works on a part of an instruction;
// interp.cpp cuts instructions into parts. Knows nothing of queues, waits or addresses.
#pragma once
#include <cstddef>
#include <cstdint>

#include "abi.h"

namespace tp {

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
};

struct EmbedArgs {
  const void* table;
  int layout, dtype;
  int64_t width, unit_rows, vocab;
  const void* pos_table;  // may be null
  int pos_dtype;
  float scale;
};

struct KvArgs {
  char* base;
  int64_t page_stride, page_size, kv_heads, head_dim;
  int dtype;
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

struct Kernels {
  void (*linear_panels)(const LinearArgs&, int64_t panel0, int64_t panel1, int64_t row0, int64_t row1);
  void (*linear_in_block)(const LinearInArgs&, int64_t column0, int64_t column1, int64_t row0, int64_t row1);
  void (*norm_row)(float* dst, const float* src, const float* gain, const float* bias, int64_t width, int kind, float eps);
  void (*add_row)(float* x, const float* p, const float* q, const float* bias, const float* gain, const float* gain_bias, int64_t width, int kind, float eps);
  void (*embed_row)(float* dst, const EmbedArgs&, int64_t token, int64_t position);
  void (*rope_row)(const RopeArgs&, int64_t row, int64_t rope_row, int64_t slot);
  void (*attend_block)(const AttendArgs&, const Sequence&, int64_t kv_head, int64_t query0, int64_t query1);
  double (*read_sum)(const void* data, int64_t bytes);
  double (*fma_burn)(int64_t rounds);  // returns the floating-point operations done
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// Memory of the calling thread, at least `bytes` large, 64-byte aligned; grows, never shrinks. A later call invalidates an earlier one's contents.
char* thread_scratch(size_t bytes);

inline int64_t dtype_bytes(int dtype) { return dtype == FP32 ? 4 : 2; }
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr int64_t ATTEND_ROWS = 64;  // query rows (tokens x heads of one KV head) that share a converted block of K and V

}  // namespace tp
