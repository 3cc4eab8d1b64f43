// LINEAR and LINEAR_IN, one panel or column block at a time. Included inside each instruction set's namespace.

constexpr Direct PANEL = {64, 64};  // contiguous: 8 KiB of a 64-column 16-bit panel ahead
constexpr Direct BLOCK = {16, 32};  // a column block's rows lie pages apart and share few sets of the first-level cache: prefetches go to the second

TP_INLINE vf bias_vector(const float* bias, int64_t c, int64_t left) {
  if (!bias) return zero();
  return left >= W ? load(bias + c) : load_n(bias + c, left);
}

// One row of sums y (of a panel of `columns` outputs; ACT_MUL: gate columns, then up columns) to dst.
static void epilogue_row(const LinearArgs& a, const float* y, int64_t first, int64_t columns, float* dst) {
  for (int64_t c = 0; c < columns; c += W) {
    const int64_t left = columns - c;
    vf v = left >= W ? load(y + c) : load_n(y + c, left);
    if (a.bias) v = v + bias_vector(a.bias + first, c, left);
    if (a.epilogue == ACT || a.epilogue == ACT_MUL) v = activate(a.activation, v);
    if (a.epilogue == ACT_MUL) {
      vf up = left >= W ? load(y + columns + c) : load_n(y + columns + c, left);
      if (a.bias2) up = up + bias_vector(a.bias2 + first, c, left);
      v = v * up;
    }
    if (a.epilogue == SOFTCAP) v = splat(a.softcap) * vtanh(v / splat(a.softcap));
    if (left >= W) {
      store(dst + c, v);
    } else {
      store_n(dst + c, v, left);
    }
  }
}

static void linear_panel(const LinearArgs& a, int64_t panel, int64_t row0, int64_t row1) {
  const int64_t first = panel * a.unit_rows, outputs = a.rows - first < a.unit_rows ? a.rows - first : a.unit_rows;
  const int64_t pair = a.epilogue == ACT_MUL ? 2 : 1, columns = outputs * pair, ldy = round_up(columns, STRIP), rows = row1 - row0;
  float* y = (float*)thread_scratch((rows * ldy + gemm_scratch(columns)) * sizeof(float));
  __builtin_memset(y, 0, rows * ldy * sizeof(float));
  const char* w = (const char*)a.w + first * pair * a.width * dtype_bytes(a.dtype);
  gemm_any(a.dtype, a.src + row0 * a.src_ld, a.src_ld, rows, w, columns, a.width, columns, y, ldy, PANEL, y + rows * ldy);
  for (int64_t m = 0; m < rows; m++) epilogue_row(a, y + m * ldy, first, outputs, a.dst + (row0 + m) * a.dst_ld + first);
}

// Accumulating continues the chain of the value that is there: two calls over two halves of K give the bits of one call over K.
static void linear_in_block(const LinearInArgs& a, int64_t column0, int64_t column1, int64_t row0, int64_t row1) {
  const int64_t columns = column1 - column0, ldy = round_up(columns, STRIP), rows = row1 - row0;
  float* y = (float*)thread_scratch((rows * ldy + gemm_scratch(columns)) * sizeof(float));
  __builtin_memset(y, 0, rows * ldy * sizeof(float));
  float* dst = a.dst + row0 * a.dst_ld + column0;
  for (int64_t m = 0; a.accumulate && m < rows; m++) __builtin_memcpy(y + m * ldy, dst + m * a.dst_ld, columns * sizeof(float));
  const char* w = (const char*)a.w + column0 * dtype_bytes(a.dtype);
  gemm_any(a.dtype, a.src + row0 * a.src_ld, a.src_ld, rows, w, a.width, a.rows, columns, y, ldy, BLOCK, y + rows * ldy);
  for (int64_t m = 0; m < rows; m++) __builtin_memcpy(dst + m * a.dst_ld, y + m * ldy, columns * sizeof(float));
}
