// LINEAR and LINEAR_IN of bf16 weights by tiles of 16 rows x 64 bytes, whose one product takes 16 rows of 32 activations times 32 inputs of 16 outputs.
// Included inside a namespace that has vector.h, epilogue.h and `Tiles`: the instructions, or their arithmetic in plain C++ (tiles_emulated.h).
//
// A tile multiplies bf16 by bf16, activations are fp32: each is split into three terms of 8 significant bits, which add up to it exactly (less what lies
// below 2^-126, which tiles take for zero). Two terms would be a third less work, and leave 2^-17 of each activation out, twice what an fp32 chain rounds.
//
// Batch-invariant by construction: a row of a product depends on that row alone. An output is, per 32 inputs in ascending order, the sum so far plus the
// product's sum of the first terms, then of the second, then of the third; whatever M, the blocking and the threads. Sums between tiles of k are stored and
// loaded in fp32, which is exact. An accumulating call continues the chain of the call before where that one ended at a multiple of 32 inputs.

typedef uint16_t HalfRow __attribute__((vector_size(32)));
typedef uint32_t PairRow __attribute__((vector_size(64)));
constexpr int64_t TILE_COLUMNS = 16, TILE_PAIRS = TILE_INPUTS / 2;
constexpr int64_t PAIRED_BYTES = 128 * 1024;  // of weights in pairs at a time: they stay in the second-level cache while the rows pass by
constexpr int64_t MOST_INPUTS = 256, MOST_INPUTS_ONE_BLOCK = 64;  // of them; up to 16 rows use each once, so that reading and multiplying should alternate quickly
constexpr int64_t TILE_AHEAD_BYTES = 12 * 1024, TILE_AHEAD_ROWS = 16;

static int64_t tile_columns(int64_t columns) { return (columns + TILE_COLUMNS - 1) / TILE_COLUMNS; }
static int64_t paired_inputs(int64_t columns, int64_t rows) {
  const int64_t fit = PAIRED_BYTES / (tile_columns(columns) * TILE_COLUMNS * 2) & ~(TILE_INPUTS - 1), most = rows <= TILE_ROWS ? MOST_INPUTS_ONE_BLOCK : MOST_INPUTS;
  return fit < TILE_INPUTS ? TILE_INPUTS : fit < most ? fit : most;
}

// Row `row` of x to its place: the upper 16 bits, of what is left the upper 16 bits, and the rest. Infinity and NaN are all in their first term.
static void split_row(const float* x, int64_t width, uint16_t* split, int64_t row) {
  uint16_t* to = split + row / TILE_ROWS * split_block(width) + row % TILE_ROWS * TILE_INPUTS;
  for (int64_t k = 0; k < width; k += TILE_INPUTS, to += SPLIT_TERMS * TILE_ELEMENTS) {
    uint32_t rest[TILE_INPUTS] = {};
    __builtin_memcpy(rest, x + k, sizeof(float) * (width - k < TILE_INPUTS ? width - k : TILE_INPUTS));
    for (int64_t term = 0; term < SPLIT_TERMS; term++)
      for (int64_t i = 0; i < TILE_INPUTS; i++) {
        const uint32_t top = rest[i] & 0xffff0000u;
        to[term * TILE_ELEMENTS + i] = (uint16_t)(top >> 16);
        rest[i] = (top & 0x7f800000u) == 0x7f800000u ? 0 : float_bits(bits_float(rest[i]) - bits_float(top));
      }
  }
}

// `inputs` rows of w from row k on to tiles [column tile][32 inputs][16 pairs of inputs][16 columns][2], zeros beyond both edges. Done once per 16 rows and
// more: two loads, a shift, an or and a store per 32 weights.
static void pair_weights(const uint16_t* w, int64_t ld, int64_t columns, int64_t inputs, uint16_t* out) {
  const int64_t chunks = (inputs + TILE_INPUTS - 1) / TILE_INPUTS, rows = TILE_AHEAD_BYTES / (columns * 2), ahead = (rows < TILE_AHEAD_ROWS ? TILE_AHEAD_ROWS : rows) * ld;
  const auto row_of = [&](int64_t k, int64_t c) {
    HalfRow row = {};
    if (k < inputs && columns - c >= TILE_COLUMNS) {
      if (c % 32 == 0) __builtin_prefetch(w + k * ld + c + ahead, 0, 2);
      __builtin_memcpy(&row, w + k * ld + c, sizeof row);
    } else if (k < inputs) {
      __builtin_memcpy(&row, w + k * ld + c, (columns - c) * 2);
    }
    return __builtin_convertvector(row, PairRow);
  };
  for (int64_t k = 0; k < chunks * TILE_INPUTS; k += 2)
    for (int64_t c = 0; c < columns; c += TILE_COLUMNS) {
      const PairRow pairs = row_of(k, c) | row_of(k + 1, c) << 16;
      __builtin_memcpy(out + (c / TILE_COLUMNS * chunks + k / TILE_INPUTS) * TILE_ELEMENTS + k % TILE_INPUTS / 2 * TILE_INPUTS, &pairs, sizeof pairs);
    }
}

// One block of up to 16 rows times sizeof...(C) column tiles: sums in tiles 0 .., the terms in 4, 5 and 6, weights in 7 (which always has 16 rows).
template <int... C>
static void one_block(std::integer_sequence<int, C...>, const uint16_t* x, const uint16_t* w, int64_t chunks, float* y, int64_t ldy) {
  (Tiles::load<C>(y + C * TILE_COLUMNS, ldy * 4), ...);
  for (int64_t i = 0; i < chunks; i++, x += SPLIT_TERMS * TILE_ELEMENTS, w += TILE_ELEMENTS) {
    Tiles::load<4>(x, 64);
    Tiles::load<5>(x + TILE_ELEMENTS, 64);
    Tiles::load<6>(x + 2 * TILE_ELEMENTS, 64);
    ((Tiles::load<7>(w + C * chunks * TILE_ELEMENTS, 64), Tiles::dot<C, 4, 7>(), Tiles::dot<C, 5, 7>(), Tiles::dot<C, 6, 7>()), ...);
  }
  (Tiles::store<C>(y + C * TILE_COLUMNS, ldy * 4), ...);
}

// Two blocks of 16 rows times two column tiles, so that each tile loaded is used twice: sums in tiles 0 to 3, a term of both blocks in 4 and 5, weights in 6, 7.
static void two_blocks(const uint16_t* x, int64_t block, const uint16_t* w, int64_t chunks, float* y, int64_t ldy) {
  float* y1 = y + TILE_ROWS * ldy;
  Tiles::load<0>(y, ldy * 4), Tiles::load<1>(y + TILE_COLUMNS, ldy * 4), Tiles::load<2>(y1, ldy * 4), Tiles::load<3>(y1 + TILE_COLUMNS, ldy * 4);
  for (int64_t i = 0; i < chunks; i++, w += TILE_ELEMENTS) {
    Tiles::load<6>(w, 64);
    Tiles::load<7>(w + chunks * TILE_ELEMENTS, 64);
    for (int64_t term = 0; term < SPLIT_TERMS; term++, x += TILE_ELEMENTS) {
      Tiles::load<4>(x, 64);
      Tiles::load<5>(x + block, 64);
      Tiles::dot<0, 4, 6>(), Tiles::dot<1, 4, 7>(), Tiles::dot<2, 5, 6>(), Tiles::dot<3, 5, 7>();
    }
  }
  Tiles::store<0>(y, ldy * 4), Tiles::store<1>(y + TILE_COLUMNS, ldy * 4), Tiles::store<2>(y1, ldy * 4), Tiles::store<3>(y1 + TILE_COLUMNS, ldy * 4);
}

// All column tiles for one block of rows; Tiles is configured for as many.
static void block_columns(const uint16_t* x, const uint16_t* w, int64_t tiles, int64_t chunks, float* y, int64_t ldy) {
  int64_t c = 0;
  for (; c + 4 <= tiles; c += 4) one_block(std::make_integer_sequence<int, 4>(), x, w + c * chunks * TILE_ELEMENTS, chunks, y + c * TILE_COLUMNS, ldy);
  for (; c < tiles; c++) one_block(std::make_integer_sequence<int, 1>(), x, w + c * chunks * TILE_ELEMENTS, chunks, y + c * TILE_COLUMNS, ldy);
}

// y[rows][ldy] += split rows x w[k][columns]; columns of y are padded to whole tiles. `x` is a block's first row, `block` elements lie between blocks.
static void tile_gemm(const uint16_t* x, int64_t block, int64_t rows, const uint16_t* w, int64_t ld, int64_t columns, int64_t k, float* y, int64_t ldy, uint16_t* paired) {
  const int64_t tiles = tile_columns(columns), step = paired_inputs(columns, rows), whole = rows / TILE_ROWS, tail = rows % TILE_ROWS;
  for (int64_t k0 = 0; k0 < k; k0 += step, x += step / TILE_INPUTS * SPLIT_TERMS * TILE_ELEMENTS) {
    const int64_t inputs = k - k0 < step ? k - k0 : step, chunks = (inputs + TILE_INPUTS - 1) / TILE_INPUTS;
    pair_weights(w + k0 * ld, ld, columns, inputs, paired);
    int64_t b = 0;
    if (whole) Tiles::configure(TILE_ROWS);
    for (; b + 2 <= whole; b += 2) {
      int64_t c = 0;
      for (; c + 2 <= tiles; c += 2) two_blocks(x + b * block, block, paired + c * chunks * TILE_ELEMENTS, chunks, y + b * TILE_ROWS * ldy + c * TILE_COLUMNS, ldy);
      for (int64_t i = 0; c < tiles && i < 2; i++)
        block_columns(x + (b + i) * block, paired + c * chunks * TILE_ELEMENTS, tiles - c, chunks, y + (b + i) * TILE_ROWS * ldy + c * TILE_COLUMNS, ldy);
    }
    for (; b < whole; b++) block_columns(x + b * block, paired, tiles, chunks, y + b * TILE_ROWS * ldy, ldy);
    if (!tail) continue;
    Tiles::configure(tail);
    block_columns(x + whole * block, paired, tiles, chunks, y + whole * TILE_ROWS * ldy, ldy);
  }
  Tiles::release();
}

// The thread's scratch: sums y[rows][ldy], started from 0 or from `start`, and the weights in pairs.
static float* tile_sums(const uint16_t* split, int64_t first, int64_t rows, const uint16_t* w, int64_t ld, int64_t columns, int64_t k, const float* start, int64_t start_ld) {
  const int64_t ldy = tile_columns(columns) * TILE_COLUMNS;
  float* y = (float*)thread_scratch((rows * ldy) * sizeof(float) + ldy * paired_inputs(columns, rows) * 2);
  __builtin_memset(y, 0, rows * ldy * sizeof(float));
  for (int64_t m = 0; start && m < rows; m++) __builtin_memcpy(y + m * ldy, start + m * start_ld, columns * sizeof(float));
  tile_gemm(split + first / TILE_ROWS * split_block(k), split_block(k), rows, w, ld, columns, k, y, ldy, (uint16_t*)(y + rows * ldy));
  return y;
}

// Rows [row0, row1) start at a multiple of 16 rows from the first split one.
static void tile_panels(const LinearArgs& a, int64_t panel0, int64_t panel1, int64_t row0, int64_t row1) {
  for (int64_t panel = panel0; panel < panel1; panel++) {
    const int64_t first = panel * a.unit_rows, outputs = a.rows - first < a.unit_rows ? a.rows - first : a.unit_rows, pair = a.epilogue == ACT_MUL ? 2 : 1;
    const int64_t columns = outputs * pair, ldy = tile_columns(columns) * TILE_COLUMNS;
    const float* y = tile_sums(a.split, row0 - a.split_row0, row1 - row0, (const uint16_t*)a.w + first * pair * a.width, columns, columns, a.width, nullptr, 0);
    for (int64_t row = row0; row < row1; row++, y += ldy) epilogue_row(a, y, first, outputs, a.dst + row * a.dst_ld + first);
  }
}

static void tile_in_block(const LinearInArgs& a, int64_t column0, int64_t column1, int64_t row0, int64_t row1) {
  const int64_t columns = column1 - column0, ldy = tile_columns(columns) * TILE_COLUMNS;
  float* dst = a.dst + row0 * a.dst_ld + column0;
  const float* y = tile_sums(a.split, row0 - a.split_row0, row1 - row0, (const uint16_t*)a.w + column0, a.width, columns, a.rows, a.accumulate ? dst : nullptr, a.dst_ld);
  for (int64_t row = row0; row < row1; row++, dst += a.dst_ld, y += ldy) __builtin_memcpy(dst, y, columns * sizeof(float));
}
