// y[M, n] += x[M, K] @ w[K, n], w of a stored type with rows `ldw` apart. Included inside each instruction set's namespace.
// Every output is one chain of fused multiply-adds in ascending k. Tiles of k are cut for the caches only: partial sums are stored and reloaded in fp32,
// which is exact, so a row's bits depend neither on the other rows nor on the tiles.

#if TP_ISA == 2
constexpr int MAX_MR = 12, STRIP_VECTORS = 2;
constexpr int direct_vectors(int mr) { return mr <= 6 ? 4 : 2; }
#else
constexpr int MAX_MR = 6, STRIP_VECTORS = 2;
constexpr int direct_vectors(int mr) { return mr == 1 ? 8 : mr <= 3 ? 4 : 2; }
#endif
constexpr int STRIP = STRIP_VECTORS * W;  // columns of a converted strip
constexpr int DIRECT_ROWS = TP_ISA == 2 ? 12 : 7;  // up to here a tile is used in its stored type; beyond, it is converted to fp32 once
constexpr int DIRECT_MR = MAX_MR;
constexpr int MAX_TILE = 128;             // k rows of a converted tile
constexpr int PACKED_LD = MAX_TILE + 16;  // not a multiple of 4 KiB: rows do not fall into one cache set
constexpr int MAX_STRIP = 32;             // over all instruction sets

// MR rows times NV vectors of columns. LDX: the compile-time row stride of x, or 0. One cache line per 64 weight bytes and k is prefetched from `ahead`.
template <int D, int MR, int NV, int LDX>
static void micro(const float* x, int64_t ldx_, const typename Element<D>::T* w, int64_t ldw, int64_t k, float* y, int64_t ldy, const char* ahead, int64_t ahead_ld) {
  constexpr int lines = (NV * W * (int)sizeof(typename Element<D>::T) + 63) / 64;
  const int64_t ldx = LDX ? LDX : ldx_;
  vf c[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) c[m][n] = load(y + m * ldy + n * W);
  for (int64_t i = 0; i < k; i++) {
#pragma GCC unroll 8
    for (int l = 0; l < lines; l++) __builtin_prefetch(ahead + l * 64, 0, 2);
    ahead += ahead_ld;
    vf b[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) b[n] = Element<D>::load_vector(w + n * W);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      const vf a = splat(x[m * ldx + i]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) c[m][n] = fma(a, b[n], c[m][n]);
    }
    w += ldw;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) store(y + m * ldy + n * W, c[m][n]);
}

template <int D, int MR>
static void direct_rows(const float* x, int64_t ldx, const typename Element<D>::T* w, int64_t ldw, int64_t k, int64_t columns, float* y, int64_t ldy, int64_t ahead) {
  constexpr int NV = direct_vectors(MR);
  int64_t n = 0;
  for (; n + NV * W <= columns; n += NV * W) micro<D, MR, NV, 0>(x, ldx, w + n, ldw, k, y + n, ldy, (const char*)(w + n + ahead), ldw * sizeof *w);
  for (; n < columns; n += W) micro<D, MR, 1, 0>(x, ldx, w + n, ldw, k, y + n, ldy, (const char*)(w + n + ahead), ldw * sizeof *w);
}

// Few rows: the tile is used where it lies; meanwhile the weights `ahead` k rows further on are prefetched. `columns` is a multiple of W.
template <int D>
static void gemm_direct(const float* x, int64_t ldx, int64_t rows, const typename Element<D>::T* w, int64_t ldw, int64_t k, int64_t columns, float* y, int64_t ldy,
                        int64_t tile, int64_t ahead) {
  using Fn = void (*)(const float*, int64_t, const typename Element<D>::T*, int64_t, int64_t, int64_t, float*, int64_t, int64_t);
  static const Fn table[] = {direct_rows<D, 1>, direct_rows<D, 2>, direct_rows<D, 3>, direct_rows<D, 4>, direct_rows<D, 5>, direct_rows<D, 6>,
#if TP_ISA == 2
                             direct_rows<D, 7>, direct_rows<D, 8>, direct_rows<D, 9>, direct_rows<D, 10>, direct_rows<D, 11>, direct_rows<D, 12>,
#endif
  };
  const int64_t blocks = (rows + DIRECT_MR - 1) / DIRECT_MR;
  for (int64_t k0 = 0; k0 < k; k0 += tile) {
    const int64_t kb = k - k0 < tile ? k - k0 : tile;
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t m = rows * b / blocks, mr = rows * (b + 1) / blocks - m;
      table[mr - 1](x + m * ldx + k0, ldx, w + k0 * ldw, ldw, kb, columns, y + m * ldy, ldy, b ? 0 : ahead * ldw);
    }
  }
}

// A tile [k][columns] as fp32 strips [columns / STRIP][k][STRIP]; columns that do not exist become 0.
template <int D>
static void convert_tile(const typename Element<D>::T* w, int64_t ldw, int64_t k, int64_t columns, float* out) {
  for (int64_t n = 0; n < columns; n += STRIP)
    for (int64_t i = 0; i < k; i++, out += STRIP) {
      const auto* row = w + i * ldw + n;
      if (n + STRIP <= columns) {
        for (int v = 0; v < STRIP_VECTORS; v++) store(out + v * W, Element<D>::load_vector(row + v * W));
      } else {
        for (int j = 0; j < STRIP; j++) out[j] = n + j < columns ? Element<D>::get(row[j]) : 0.0f;
      }
    }
}

static void pack_rows(const float* x, int64_t ldx, int64_t rows, int64_t k, float* out) {
  for (int64_t m = 0; m < rows; m++, x += ldx, out += PACKED_LD) __builtin_memcpy(out, x, k * sizeof *x);
}

template <int MR>
static void packed_rows(const float* x, const float* strips, int64_t k, int64_t columns, float* y, int64_t ldy, const char* ahead, int64_t ahead_ld, int64_t element) {
  for (int64_t n = 0; n < columns; n += STRIP, strips += k * STRIP) {
    const char* line = ahead_ld ? ahead + n * element : ahead;
    micro<FP32, MR, STRIP_VECTORS, PACKED_LD>(x, 0, strips, STRIP, k, y + n, ldy, line, ahead_ld);
  }
}

using PackedFn = void (*)(const float*, const float*, int64_t, int64_t, float*, int64_t, const char*, int64_t, int64_t);
static const PackedFn packed_table[] = {
    packed_rows<1>, packed_rows<2>, packed_rows<3>, packed_rows<4>, packed_rows<5>, packed_rows<6>,
#if TP_ISA == 2
    packed_rows<7>, packed_rows<8>, packed_rows<9>, packed_rows<10>, packed_rows<11>, packed_rows<12>,
#endif
};

static int64_t tile_rows(int64_t columns) {  // 64 KiB of converted weights at most
  const int64_t rows = 16384 / round_up(columns, STRIP);
  return rows < 8 ? 8 : rows > MAX_TILE ? MAX_TILE : rows;
}
// Floats of scratch that `gemm` needs for `columns` columns.
static int64_t gemm_scratch(int64_t columns) { return tile_rows(columns) * round_up(columns, STRIP) + (int64_t)MAX_MR * PACKED_LD; }

// Many rows, or columns that are no multiple of W. y has room for round_up(columns, STRIP) columns.
template <int D>
static void gemm_converted(const float* x, int64_t ldx, int64_t rows, const typename Element<D>::T* w, int64_t ldw, int64_t k, int64_t columns, float* y, int64_t ldy,
                           float* scratch) {
  const int64_t tile = tile_rows(columns), blocks = (rows + MAX_MR - 1) / MAX_MR;
  float *strips = scratch, *packed = scratch + tile * round_up(columns, STRIP);
  for (int64_t k0 = 0; k0 < k; k0 += tile) {
    const int64_t kb = k - k0 < tile ? k - k0 : tile;
    convert_tile<D>(w + k0 * ldw, ldw, kb, columns, strips);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t m = rows * b / blocks, mr = rows * (b + 1) / blocks - m;
      pack_rows(x + m * ldx + k0, ldx, mr, kb, packed);
      const bool prefetch = b == 0 && k0 + tile < k;  // the next tile comes in while the first rows are multiplied
      const char* ahead = prefetch ? (const char*)(w + (k0 + tile) * ldw) : (const char*)packed;
      packed_table[mr - 1](packed, strips, kb, columns, y + m * ldy, ldy, ahead, prefetch ? ldw * sizeof *w : 0, sizeof *w);
    }
  }
}

// How a matrix is walked when there are few rows: k rows per tile, and k rows between a weight row and its prefetch.
struct Direct {
  int64_t tile, ahead;
};

template <int D>
static void gemm(const float* x, int64_t ldx, int64_t rows, const void* w_, int64_t ldw, int64_t k, int64_t columns, float* y, int64_t ldy, Direct direct, float* scratch) {
  const auto* w = (const typename Element<D>::T*)w_;
  if (rows <= DIRECT_ROWS && columns % W == 0) return gemm_direct<D>(x, ldx, rows, w, ldw, k, columns, y, ldy, direct.tile, direct.ahead);
  gemm_converted<D>(x, ldx, rows, w, ldw, k, columns, y, ldy, scratch);
}

TP_INLINE void gemm_any(int dtype, const float* x, int64_t ldx, int64_t rows, const void* w, int64_t ldw, int64_t k, int64_t columns, float* y, int64_t ldy,
                        Direct direct, float* scratch) {
  if (dtype == BF16) return gemm<BF16>(x, ldx, rows, w, ldw, k, columns, y, ldy, direct, scratch);
  if (dtype == FP16) return gemm<FP16>(x, ldx, rows, w, ldw, k, columns, y, ldy, direct, scratch);
  gemm<FP32>(x, ldx, rows, w, ldw, k, columns, y, ldy, direct, scratch);
}
