// LINEAR and LINEAR_IN, one panel or column block at a time. Included inside each instruction set's namespace.

// y[rows][count * padded(columns)] = src @ panels, started from 0 or (accumulate) from dst; y is of the thread's scratch.
static float* panel_sums(int dtype, const float* src, int64_t src_ld, int64_t rows, const Panels& p, int64_t k, const float* start, int64_t start_ld) {
  const int64_t ldy = p.count * padded(p.columns), sums = round_up(rows * ldy, 16);
  float* y = (float*)thread_scratch((sums + gemm_scratch(p, rows, dtype_bytes(dtype))) * sizeof(float));
  __builtin_memset(y, 0, rows * ldy * sizeof(float));
  for (int64_t m = 0; start && m < rows; m++) __builtin_memcpy(y + m * ldy, start + m * start_ld, p.count * p.columns * sizeof(float));
  for (int64_t i = 0; start && dtype == BF16 && i < rows * p.count; i++) reorder<false>(y + i * padded(p.columns), p.columns);
  gemm_any(dtype, src, src_ld, rows, p, k, y, ldy, y + sums);
  for (int64_t i = 0; dtype == BF16 && i < rows * p.count; i++) reorder<true>(y + i * padded(p.columns), p.columns);
  return y;
}

// Panels [panel0, panel1), all as wide as the first.
static void equal_panels(const LinearArgs& a, int64_t panel0, int64_t panel1, int64_t row0, int64_t row1) {
  const int64_t first = panel0 * a.unit_rows, outputs = a.rows - first < a.unit_rows ? a.rows - first : a.unit_rows, count = panel1 - panel0;
  const int64_t pair = a.epilogue == ACT_MUL ? 2 : 1, columns = outputs * pair, ldy = count * padded(columns);
  const Panels panels = {(const char*)a.w + first * pair * a.width * dtype_bytes(a.dtype), count, columns, columns, columns * a.width};
  const float* y = panel_sums(a.dtype, a.src + row0 * a.src_ld, a.src_ld, row1 - row0, panels, a.width, nullptr, 0);
  for (int64_t row = row0; row < row1; row++, y += ldy)
    for (int64_t p = 0; p < count; p++) epilogue_row(a, y + p * padded(columns), first + p * outputs, outputs, a.dst + row * a.dst_ld + first + p * outputs);
}

static void linear_panels(const LinearArgs& a, int64_t panel0, int64_t panel1, int64_t row0, int64_t row1) {
  const int64_t whole = a.rows / a.unit_rows, cut = panel1 < whole ? panel1 : whole;
  if (panel0 < cut) equal_panels(a, panel0, cut, row0, row1);
  if (cut < panel1) equal_panels(a, cut, panel1, row0, row1);  // the last one, narrower
}

constexpr int64_t PANEL = 64;  // columns of a [k][n] matrix that are taken as one panel; few rows take all of a block

// Accumulating continues the chain of the value that is there: two calls over two halves of K give the bits of one call over K.
static void linear_in_block(const LinearInArgs& a, int64_t column0, int64_t column1, int64_t row0, int64_t row1) {
  const int64_t left = column1 - column0, columns = left < PANEL || few(row1 - row0, left) ? left : PANEL, count = left / columns;
  float* dst = a.dst + row0 * a.dst_ld + column0;
  const Panels panels = {(const char*)a.w + column0 * dtype_bytes(a.dtype), count, columns, a.width, columns};
  const float* y = panel_sums(a.dtype, a.src + row0 * a.src_ld, a.src_ld, row1 - row0, panels, a.rows, a.accumulate ? dst : nullptr, a.dst_ld);
  for (int64_t row = row0; row < row1; row++, dst += a.dst_ld, y += count * padded(columns)) __builtin_memcpy(dst, y, count * columns * sizeof(float));
  if (left > count * columns) linear_in_block(a, column0 + count * columns, column1, row0, row1);
}
