// LINEAR and LINEAR_IN with quantised weights, one panel or column block at a time, and EMBED's column of a panel. Included inside each instruction set's namespace.

using QuantRows = void (*)(const QuantTile&, int64_t columns);
template <int KIND>
static QuantRows quant_rows_of(int64_t rows) {
  static const QuantRows table[] = {quant_rows<KIND, 1>, quant_rows<KIND, 2>, quant_rows<KIND, 3>, quant_rows<KIND, 4>,
#if TP_ISA == 2
                                    quant_rows<KIND, 5>, quant_rows<KIND, 6>,
#endif
  };
  return table[rows - 1];
}
static QuantRows quant_rows_any(int dtype, int code_bytes, int64_t rows) {
  if (dtype == Q8_0) return quant_rows_of<BYTES>(rows);
  if (dtype == Q6_K) return quant_rows_of<SIX_BITS>(rows);
  return code_bytes == 1 ? quant_rows_of<NIBBLES_FAST>(rows) : quant_rows_of<NIBBLES>(rows);
}

constexpr int64_t QUANT_TILE = 256;       // inputs whose weights stay in the first-level cache while rows pass by
constexpr int64_t QUANT_AHEAD_BYTES = 6144;

// y[rows, columns] += x @ columns [column, column + columns) of a panel of w columns. `tile` inputs at a time, a multiple of the format's block.
static void quant_gemm(int dtype, const Rounded& x, int64_t rows, const char* panel, int64_t w, int64_t k, int64_t column, int64_t columns, float* y, int64_t ldy,
                       int64_t tile) {
  const QuantFormat format = quant_format(dtype);
  const int64_t blocks = (rows + QUANT_MR - 1) / QUANT_MR, stride = format.block_bytes * w, record = rounded_record_bytes(x.code_bytes);
  const int64_t ahead = (QUANT_AHEAD_BYTES + stride - 1) / stride * stride, per_block = dtype == Q6_K ? 16 : format.block / format.group;
  const int64_t repeat = dtype == Q6_K ? 1 : format.group / 32;  // groups of 32 that share one pair of scales
  float scales[QUANT_TILE / 16 * 2 * SCALE_LD];
  for (int64_t k0 = 0; k0 < k; k0 += tile) {
    const int64_t kb = k - k0 < tile ? k - k0 : tile;
    const char* block = panel + k0 / format.block * stride;
    for (int64_t c0 = 0; c0 < columns; c0 += SCALE_LD) {
      const int64_t count = columns - c0 < SCALE_LD ? columns - c0 : SCALE_LD;
      float* out = scales;
      for (int64_t b = 0; b < kb / format.block; b++, out += per_block * repeat * 2 * SCALE_LD) {
        __builtin_prefetch(block + b * stride + 2 * (column + c0) + ahead, 0, 2);
        expand_scales(dtype, block + b * stride, w, column + c0, count, out);
        for (int64_t r = 1; r < repeat; r++) __builtin_memcpy(out + r * 2 * SCALE_LD, out, 2 * SCALE_LD * sizeof *out);
      }
      QuantTile t = {block + format.header * w + 4 * (column + c0), block + (format.header + 128) * w + 4 * (column + c0), 4 * w, stride, format.block / 32, kb / 32, scales,
                     nullptr, x.ld, nullptr, ldy, ahead};
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t m = rows * b / blocks, mr = rows * (b + 1) / blocks - m;
        t.x = x.rows + m * x.ld + k0 / 32 * record;
        t.y = y + m * ldy + c0;
        quant_rows_any(dtype, x.code_bytes, mr)(t, count);
        t.ahead = 0;
      }
    }
  }
}

static Rounded rows_from(const Rounded& x, int64_t row) { return {x.rows + row * x.ld, x.ld, x.code_bytes}; }

static void quant_panel(const LinearArgs& a, const Rounded& x, int64_t panel, int64_t row0, int64_t row1) {
  const int64_t first = panel * a.unit_rows, outputs = a.rows - first < a.unit_rows ? a.rows - first : a.unit_rows;
  const int64_t pair = a.epilogue == ACT_MUL ? 2 : 1, columns = outputs * pair, ldy = round_up(columns, STRIP), rows = row1 - row0;
  float* y = (float*)thread_scratch(rows * ldy * sizeof(float));
  __builtin_memset(y, 0, rows * ldy * sizeof(float));
  quant_gemm(a.dtype, rows_from(x, row0), rows, (const char*)a.w + weight_bytes(a.dtype, first * pair * a.width), columns, a.width, 0, columns, y, ldy, QUANT_TILE);
  for (int64_t m = 0; m < rows; m++) epilogue_row(a, y + m * ldy, first, outputs, a.dst + (row0 + m) * a.dst_ld + first);
}

// Accumulating continues the chain, as linear_in_block does.
static void quant_in_block(const LinearInArgs& a, const Rounded& x, int64_t column0, int64_t column1, int64_t row0, int64_t row1) {
  const int64_t columns = column1 - column0, ldy = round_up(columns, STRIP), rows = row1 - row0;
  float* y = (float*)thread_scratch(rows * ldy * sizeof(float));
  __builtin_memset(y, 0, rows * ldy * sizeof(float));
  float* dst = a.dst + row0 * a.dst_ld + column0;
  for (int64_t m = 0; a.accumulate && m < rows; m++) __builtin_memcpy(y + m * ldy, dst + m * a.dst_ld, columns * sizeof(float));
  const int64_t tile = rows <= 2 * QUANT_MR ? quant_format(a.dtype).block : QUANT_TILE;  // few rows: read on along the block's rows instead of jumping down
  quant_gemm(a.dtype, rows_from(x, row0), rows, (const char*)a.w, a.width, a.rows, column0, columns, y, ldy, tile);
  for (int64_t m = 0; m < rows; m++) __builtin_memcpy(dst + m * a.dst_ld, y + m * ldy, columns * sizeof(float));
}

// Code i of a column's block, given the column's first word of codes (and of upper bits), `word` bytes between words.
static int code_at(int dtype, const char* codes, const char* upper, int64_t word, int64_t i) {
  if (dtype == Q8_0) return (int8_t)codes[i / 4 * word + i % 4];
  const int low = (uint8_t)codes[i / 8 * word + i % 4] >> (i / 4 % 2 * 4) & 15;
  return dtype == Q6_K ? low | ((uint8_t)upper[i / 16 * word + i % 4] >> (i / 4 % 4 * 2) & 3) << 4 : low;
}

// One column of a panel of w columns: k weights, rounded as the packages that write these files round them.
static void quant_column(int dtype, const char* panel, int64_t w, int64_t column, int64_t k, float* dst) {
  const QuantFormat format = quant_format(dtype);
  float scales[16 * 2 * SCALE_LD];
  for (int64_t b = 0; b < k / format.block; b++, panel += format.block_bytes * w) {
    expand_scales(dtype, panel, w, column, 1, scales);
    const char *codes = panel + format.header * w + 4 * column, *upper = codes + 128 * w;
    for (int64_t i = 0; i < format.block; i++) {
      const float* pair = scales + i / format.group * 2 * SCALE_LD;
      const float value = (float)code_at(dtype, codes, upper, 4 * w, i) * pair[0];
      *dst++ = dtype == Q8_0 ? value : value + pair[SCALE_LD];
    }
  }
}
