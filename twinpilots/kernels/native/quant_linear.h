// LINEAR and LINEAR_IN with quantised weights, one panel or column block at a time, and EMBED's column of a panel. Included inside each instruction set's namespace.

constexpr int QUANT_DIRECT_ROWS = 4, QUANT_MR = TP_ISA == 2 ? 8 : 6, QUANT_NV = 2, PIECE_MR = QUANT_MR;  // QUANT_NV * W divides SCALE_LD
constexpr int64_t QUANT_AHEAD_BYTES = 8192;  // hide the latency of memory
constexpr int64_t PIECE_ROWS = TP_ISA == 2 ? 32 : INT64_MAX;  // up to here unpacking codes again for every few rows costs less than storing them unpacked
constexpr int64_t WIDE_PANEL = 512;           // columns beyond which a piece's rows lie so far apart that they share few sets of the caches

// Vectors of columns that MR rows take at a time: as many sums as there are registers for.
constexpr int direct_vectors(int mr) { return TP_ISA == 2 ? (mr <= 4 ? 4 : 2) : mr == 1 ? 8 : mr == 2 ? 4 : 2; }

template <int KIND, int MR, int NV, bool TAIL>
static void quant_direct_columns(const QuantPanel& p, int64_t first, int64_t columns, const char* block, const char* x, int64_t k, float* y, int64_t ldy, const Soon& soon) {
  if (!columns) return;
  const QuantPanel part = {p.dtype, p.format, p.data, p.w, p.column + first, columns};
  quant_direct<KIND, MR, NV, TAIL>(part, block, x, k, y + first, ldy, Soon{soon.block, soon.w, soon.column + first, soon.stride});
}

// MR rows times all columns of the panel, k inputs of one tile from `block` on.
template <int KIND, int MR>
static void quant_direct_rows(const QuantPanel& p, const char* block, const char* x, int64_t k, float* y, int64_t ldy, const Soon& soon) {
  constexpr int NV = direct_vectors(MR);
  const int64_t main = p.columns / (NV * W) * (NV * W), most = p.columns / W * W;
  quant_direct_columns<KIND, MR, NV, false>(p, 0, main, block, x, k, y, ldy, soon);
  if (NV > 1) quant_direct_columns<KIND, MR, 1, false>(p, main, most - main, block, x, k, y, ldy, soon);
  quant_direct_columns<KIND, MR, 1, true>(p, most, p.columns - most, block, x, k, y, ldy, soon);
}

using DirectFn = void (*)(const QuantPanel&, const char*, const char*, int64_t, float*, int64_t, const Soon&);
template <int KIND>
static const DirectFn few_table[QUANT_DIRECT_ROWS] = {quant_direct_rows<KIND, 1>, quant_direct_rows<KIND, 2>, quant_direct_rows<KIND, 3>, quant_direct_rows<KIND, 4>};
template <int KIND>
static const DirectFn piece_table[PIECE_MR] = {quant_direct_rows<KIND, 1>, quant_direct_rows<KIND, 2>, quant_direct_rows<KIND, 3>,
                                               quant_direct_rows<KIND, 4>, quant_direct_rows<KIND, 5>, quant_direct_rows<KIND, 6>,
#if TP_ISA == 2
                                               quant_direct_rows<KIND, 7>, quant_direct_rows<KIND, 8>,
#endif
};

// Up to QUANT_DIRECT_ROWS rows take all columns in the order in which they lie: reading them is all the work.
template <int KIND>
static void quant_few_rows(const QuantPanel& p, const Rounded& x, int64_t row, int64_t rows, int64_t k, float* y, int64_t ldy) {
  const int64_t bytes = p.format.block_bytes * p.columns, ahead = (QUANT_AHEAD_BYTES + bytes - 1) / bytes * p.stride();  // of a block: those of its columns that are read
  for (int64_t k0 = 0; k0 < k; k0 += ROUNDED_TILE) {
    const char* block = p.data + k0 / p.format.block * p.stride();
    few_table<KIND>[rows - 1](p, block, x.at(row, k0), k - k0 < ROUNDED_TILE ? k - k0 : ROUNDED_TILE, y, ldy, Soon{block + ahead, p.w, p.column, p.stride()});
  }
}

// A piece of SCALE_LD columns and one tile at a time stays in the caches while rows pass by, and the piece after it is prefetched.
template <int KIND>
static void quant_pieces(const QuantPanel& p, const Rounded& x, int64_t row, int64_t rows, int64_t k, float* y, int64_t ldy) {
  const int64_t blocks = (rows + PIECE_MR - 1) / PIECE_MR, tile_bytes = ROUNDED_TILE / p.format.block * p.stride();
  const char* block = p.data;
  for (int64_t k0 = 0; k0 < k; k0 += ROUNDED_TILE, block += tile_bytes) {
    const int64_t kb = k - k0 < ROUNDED_TILE ? k - k0 : ROUNDED_TILE;
    for (int64_t c = 0; c < p.columns; c += SCALE_LD) {
      const int64_t columns = p.columns - c < SCALE_LD ? p.columns - c : SCALE_LD;
      const QuantPanel part = {p.dtype, p.format, block, p.w, p.column + c, columns};
      const bool last = c + columns == p.columns;
      const Soon next = {last ? block + tile_bytes : block, p.w, last ? p.column : part.column + columns, p.stride()};
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t m = rows * b / blocks, mr = rows * (b + 1) / blocks - m;
        piece_table<KIND>[mr - 1](part, block, x.at(row + m, k0), kb, y + m * ldy + c, ldy, b ? Soon{block, p.w, part.column, p.stride()} : next);
      }
    }
  }
}

// ---- many rows, codes unpacked once

using ExpandedFn = void (*)(const ExpandedTile&, const char*, int64_t, float*, int64_t);
template <int KIND>
static const ExpandedFn expanded_table[] = {
    quant_expanded<KIND, 1, QUANT_NV>, quant_expanded<KIND, 2, QUANT_NV>, quant_expanded<KIND, 3, QUANT_NV>,
    quant_expanded<KIND, 4, QUANT_NV>, quant_expanded<KIND, 5, QUANT_NV>, quant_expanded<KIND, 6, QUANT_NV>,
#if TP_ISA == 2
    quant_expanded<KIND, 7, QUANT_NV>, quant_expanded<KIND, 8, QUANT_NV>,
#endif
};

// The expanded tile stays in the first-level cache while rows pass by: 128 inputs take 16 KiB (256 where a block is as large).
template <int KIND>
static void quant_expanded_rows(const QuantPanel& p, const Rounded& x, int64_t row, int64_t rows, int64_t k, float* y, int64_t ldy) {
  using C = Codes<KIND>;
  alignas(64) char codes[ROUNDED_TILE / 32 * C::words * C::steps * SCALE_LD * 4];
  alignas(64) float scales[ROUNDED_TILE / 32 * C::parts * 2 * SCALE_LD];
  const int64_t tile = p.format.block > 128 ? p.format.block : 128, blocks = (rows + QUANT_MR - 1) / QUANT_MR;
  for (int64_t k0 = 0; k0 < k; k0 += tile) {
    const int64_t kb = k - k0 < tile ? k - k0 : tile;
    const char* block = p.data + k0 / p.format.block * p.stride();
    for (int64_t c = 0; c < p.columns; c += SCALE_LD) {
      const int64_t columns = p.columns - c < SCALE_LD ? p.columns - c : SCALE_LD, at = p.column + c;
      const QuantPanel part = {p.dtype, p.format, p.data, p.w, at, columns};
      expand_tile<KIND>(part, block, kb / 32, codes, scales);
      const char* next = block + kb / p.format.block * p.stride() + 2 * at;
      ExpandedTile t = {codes, scales, kb / 32, round_up(columns, QUANT_NV * W), next, p.format.header * p.w + 2 * at, 4 * p.w, p.format.block / 32, p.stride()};
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t m = rows * b / blocks, mr = rows * (b + 1) / blocks - m;
        expanded_table<KIND>[mr - 1](t, x.at(row + m, k0), x.row_bytes(), y + m * ldy + c, ldy);
      }
    }
  }
}

// y[rows, columns] += x[row .. row + rows) @ the panel's columns; y has room for round_up(columns, QUANT_NV * W).
template <int KIND>
static void quant_gemm(const QuantPanel& p, const Rounded& x, int64_t row, int64_t rows, int64_t k, float* y, int64_t ldy) {
  // With 16 registers sums leave no room for codes that are loaded once for all rows: unpacking them again costs no more, unless that is dear. With 32
  // registers storing unpacked codes pays from some rows on.
  constexpr bool dear = has_k_scales(KIND) || KIND == FIVE_BITS || KIND == SIX_BITS;
  if (rows <= QUANT_DIRECT_ROWS) return quant_few_rows<KIND>(p, x, row, rows, k, y, ldy);
  if constexpr (!dear)
    if (rows <= PIECE_ROWS && (KIND != BYTES || p.w <= WIDE_PANEL)) return quant_pieces<KIND>(p, x, row, rows, k, y, ldy);
  quant_expanded_rows<KIND>(p, x, row, rows, k, y, ldy);
}

static void quant_gemm_any(const QuantPanel& p, const Rounded& x, int64_t row, int64_t rows, int64_t k, float* y, int64_t ldy) {
  if (p.dtype == Q8_0) return quant_gemm<BYTES>(p, x, row, rows, k, y, ldy);
  if (p.dtype == Q6_K) return quant_gemm<SIX_BITS>(p, x, row, rows, k, y, ldy);
  if (p.dtype == Q5_0 || p.dtype == Q5_1) return quant_gemm<FIVE_BITS>(p, x, row, rows, k, y, ldy);
  if (p.dtype == Q5_K) return quant_gemm<K_FIVE_BITS>(p, x, row, rows, k, y, ldy);
  if (p.dtype == Q4_K) return x.code_bytes == 1 ? quant_gemm<K_NIBBLES_FAST>(p, x, row, rows, k, y, ldy) : quant_gemm<K_NIBBLES>(p, x, row, rows, k, y, ldy);
  if (x.code_bytes == 1) return quant_gemm<NIBBLES_FAST>(p, x, row, rows, k, y, ldy);
  quant_gemm<NIBBLES>(p, x, row, rows, k, y, ldy);
}

static void quant_panel(const LinearArgs& a, const Rounded& x, int64_t panel, int64_t row0, int64_t row1) {
  const int64_t first = panel * a.unit_rows, outputs = a.rows - first < a.unit_rows ? a.rows - first : a.unit_rows;
  const int64_t pair = a.epilogue == ACT_MUL ? 2 : 1, columns = outputs * pair, ldy = round_up(columns, QUANT_NV * W), rows = row1 - row0;
  float* y = (float*)thread_scratch(rows * ldy * sizeof(float));
  __builtin_memset(y, 0, rows * ldy * sizeof(float));
  const QuantPanel p = {a.dtype, quant_format(a.dtype), (const char*)a.w + weight_bytes(a.dtype, first * pair * a.width), columns, 0, columns};
  quant_gemm_any(p, x, row0, rows, a.width, y, ldy);
  for (int64_t m = 0; m < rows; m++) epilogue_row(a, y + m * ldy, first, outputs, a.dst + (row0 + m) * a.dst_ld + first);
}

// Accumulating continues the chain, as linear_in_block does.
static void quant_in_block(const LinearInArgs& a, const Rounded& x, int64_t column0, int64_t column1, int64_t row0, int64_t row1) {
  const int64_t columns = column1 - column0, ldy = round_up(columns, 64) + 16, rows = row1 - row0;
  float* y = (float*)thread_scratch(rows * ldy * sizeof(float));
  __builtin_memset(y, 0, rows * ldy * sizeof(float));
  float* dst = a.dst + row0 * a.dst_ld + column0;
  for (int64_t m = 0; a.accumulate && m < rows; m++) __builtin_memcpy(y + m * ldy, dst + m * a.dst_ld, columns * sizeof(float));
  const QuantPanel p = {a.dtype, quant_format(a.dtype), (const char*)a.w, a.width, column0, columns};
  quant_gemm_any(p, x, row0, rows, a.rows, y, ldy);
  for (int64_t m = 0; m < rows; m++) __builtin_memcpy(dst + m * a.dst_ld, y + m * ldy, columns * sizeof(float));
}

// ---- one column

// Code i of a column's block, given the column's first word of codes (and of upper bits), `word` bytes between words.
static int code_at(int dtype, const char* codes, const char* upper, int64_t word, int64_t i) {
  if (dtype == Q8_0) return (int8_t)codes[i / 4 * word + i % 4];
  const int low = (uint8_t)codes[i / 8 * word + i % 4] >> (i / 4 % 2 * 4) & 15;
  if (dtype >= Q5_0 && dtype <= Q5_K) return low | ((uint8_t)upper[i / 32 * word + i % 4] >> (i / 4 % 8) & 1) << 4;
  return dtype == Q6_K ? low | ((uint8_t)upper[i / 16 * word + i % 4] >> (i / 4 % 4 * 2) & 3) << 4 : low;
}

static ScalePair column_scales(int dtype, const char* block, int64_t w, int64_t column, int64_t g) {
  if (dtype == Q8_0) return scales_of<BYTES>(dtype, block, w, column, g, 1);
  if (dtype == Q6_K) return scales_of<SIX_BITS>(dtype, block, w, column, g, 1);
  if (dtype == Q4_K || dtype == Q5_K) return scales_of<K_NIBBLES>(dtype, block, w, column, g, 1);
  return scales_of<NIBBLES>(dtype, block, w, column, g, 1);
}

// One column of a panel of w columns: k weights, rounded as the packages that write these files round them.
static void quant_column(int dtype, const char* panel, int64_t w, int64_t column, int64_t k, float* dst) {
  const QuantFormat format = quant_format(dtype);
  const int64_t group = dtype == Q6_K ? 16 : 32;
  for (int64_t b = 0; b < k / format.block; b++, panel += format.block_bytes * w) {
    const char *codes = panel + format.header * w + 4 * column, *upper = codes + format.block / 2 * w;
    for (int64_t i = 0; i < format.block; i++) {
      const ScalePair pair = column_scales(dtype, panel, w, column, i / group);
      const float value = (float)code_at(dtype, codes, upper, 4 * w, i) * pair.scale[0];
      *dst++ = dtype == Q8_0 ? value : value + pair.offset[0];
    }
  }
}
