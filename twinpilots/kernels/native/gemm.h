// y[M, N] += x[M, K] @ w[K, N], w of a stored type. Included inside each instruction set's namespace.
// Every output is one chain of fused multiply-adds in ascending k. Tiles of k are cut for the caches only: partial sums are stored and reloaded in fp32,
// which is exact, so a row's bits depend neither on the other rows nor on the tiles.

// Some panels of weights, each [k][columns] with rows `ld` elements apart; panels lie `stride` elements apart.
struct Panels {
  const void* data;
  int64_t count, columns, ld, stride;
};

constexpr int MAX_MR = TP_ISA == 2 ? 12 : 6;  // rows of x that share one load of weights
constexpr int STRIP = 2 * W;                  // columns of a converted strip
constexpr int DIRECT_ROWS = 12;               // up to here a tile is used in its stored type; beyond, it is converted to fp32 once
constexpr int MAX_TILE = 128;                 // k rows of a tile
constexpr int PACKED_LD = MAX_TILE + 16;      // not a multiple of 4 KiB: rows do not fall into one cache set
constexpr int CONVERTED_FLOATS = 32 * 1024;   // of a converted tile: 128 KiB stay in a second-level cache beside x and y
constexpr int MAX_STRIP = 32;                 // over all instruction sets
constexpr int direct_vectors(int mr) { return TP_ISA == 2 ? (mr <= 6 ? 4 : 2) : mr == 1 ? 8 : mr <= 3 ? 4 : 2; }

// What is read next, and how many bytes of it to prefetch per two k.
struct Ahead {
  const char* data;
  int64_t step;
};

// MR rows times NV vectors of sums, in registers. An even number of vectors is kept in the order in which bf16 comes (`load_pair`).
template <int D, int MR, int NV>
struct Sums {
  using T = typename Element<D>::T;
  vf c[MR][NV];

  TP_INLINE void read(Sums& s, const float* y, int64_t ldy) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) s.c[m][n] = load(y + m * ldy + n * W);
#pragma GCC unroll 4
      for (int n = 0; D == BF16 && n + 1 < NV; n += 2) unweave(s.c[m][n], s.c[m][n + 1]);
    }
  }
  TP_INLINE void write(Sums& s, float* y, int64_t ldy) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
#pragma GCC unroll 4
      for (int n = 0; D == BF16 && n + 1 < NV; n += 2) weave(s.c[m][n], s.c[m][n + 1]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) store(y + m * ldy + n * W, s.c[m][n]);
    }
  }
  TP_INLINE void step(Sums& s, const float* x, int64_t ldx, const T* w) {  // one k
    vf b[NV];
#pragma GCC unroll 4
    for (int n = 0; n + 1 < NV; n += 2) load_pair<D>(w + n * W, b[n], b[n + 1]);
    if (NV == 1) b[0] = Element<D>::load_vector(w);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      const vf a = splat(x[m * ldx]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) s.c[m][n] = fma(a, b[n], s.c[m][n]);
    }
  }
  TP_INLINE void steps(Sums& s, const float* x, int64_t ldx, const T* w, int64_t ldw, int64_t k, Ahead ahead) {
    const char* until = ahead.data;
    int64_t i = 0;
    for (; i + 2 <= k; i += 2, w += 2 * ldw) {
      for (until += ahead.step; ahead.data < until; ahead.data += 64) __builtin_prefetch(ahead.data, 0, 2);
      step(s, x + i, ldx, w);
      step(s, x + i + 1, ldx, w + ldw);
    }
    if (i < k) step(s, x + i, ldx, w);
  }
};

// x is packed: its rows lie PACKED_LD apart.
template <int D, int MR, int NV>
static void micro(const float* x, const typename Element<D>::T* w, int64_t ldw, int64_t k, float* y, int64_t ldy, Ahead ahead) {
  using S = Sums<D, MR, NV>;
  S s;
  S::read(s, y, ldy);
  S::steps(s, x, PACKED_LD, w, ldw, k, ahead);
  S::write(s, y, ldy);
}

static void pack_rows(const float* x, int64_t ldx, int64_t rows, int64_t k, float* out) {
  for (int64_t m = 0; m < rows; m++, x += ldx, out += PACKED_LD) __builtin_memcpy(out, x, k * sizeof *x);
}

// All columns of a panel's tile. `next` is its next tile, or null: each call of the micro-kernel prefetches as many of its bytes as it reads.
template <int D, int MR>
static void direct_rows(const float* x, const Panels& p, const typename Element<D>::T* w, int64_t k, float* y, int64_t ldy, const typename Element<D>::T* next) {
  constexpr int NV = direct_vectors(MR), size = sizeof *w;
  const int64_t row_bytes = p.columns * size;
  int64_t n = 0;
  auto ahead = [&](int vectors) {
    const int64_t at = n * k * size, row = at / row_bytes;
    return next ? Ahead{(const char*)(next + row * p.ld) + (at - row * row_bytes), 2 * vectors * W * size} : Ahead{nullptr, 0};
  };
  for (; n + NV * W <= p.columns; n += NV * W) micro<D, MR, NV>(x, w + n, p.ld, k, y + n, ldy, ahead(NV));
  for (; n < p.columns; n += W) micro<D, MR, 1>(x, w + n, p.ld, k, y + n, ldy, ahead(1));
}

template <int D>
using DirectFn = void (*)(const float*, const Panels&, const typename Element<D>::T*, int64_t, float*, int64_t, const typename Element<D>::T*);
template <int D>
static const DirectFn<D> direct_table[] = {
    direct_rows<D, 1>, direct_rows<D, 2>, direct_rows<D, 3>, direct_rows<D, 4>, direct_rows<D, 5>, direct_rows<D, 6>,
#if TP_ISA == 2
    direct_rows<D, 7>, direct_rows<D, 8>, direct_rows<D, 9>, direct_rows<D, 10>, direct_rows<D, 11>, direct_rows<D, 12>,
#endif
};

// Few rows: tiles of `tile` k rows are used where they lie, those of all panels in turn: as many streams from memory as there are panels.
// `columns` is a multiple of W; y holds the panels' columns side by side.
template <int D>
static void gemm_direct(const float* x, int64_t ldx, int64_t rows, const Panels& p, int64_t k, float* y, int64_t ldy, int64_t tile, float* packed) {
  const auto* data = (const typename Element<D>::T*)p.data;
  const int64_t blocks = (rows + MAX_MR - 1) / MAX_MR;
  for (int64_t k0 = 0; k0 < k; k0 += tile) {
    const int64_t kb = k - k0 < tile ? k - k0 : tile;
    pack_rows(x + k0, ldx, rows, kb, packed);
    for (int64_t panel = 0; panel < p.count; panel++) {
      const auto *w = data + panel * p.stride + k0 * p.ld, *next = k0 + tile < k ? w + tile * p.ld : nullptr;
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t m = rows * b / blocks, mr = rows * (b + 1) / blocks - m;
        direct_table<D>[mr - 1](packed + m * PACKED_LD, p, w, kb, y + m * ldy + panel * p.columns, ldy, b ? nullptr : next);
      }
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
        store(out, Element<D>::load_vector(row));
        store(out + W, Element<D>::load_vector(row + W));
      } else {
        for (int j = 0; j < STRIP; j++) out[j] = n + j < columns ? Element<D>::get(row[j]) : 0.0f;
      }
    }
}

using StripFn = void (*)(const float*, const float*, int64_t, int64_t, float*, int64_t, Ahead);
static const StripFn strip_table[] = {
    micro<FP32, 1, 2>, micro<FP32, 2, 2>, micro<FP32, 3, 2>, micro<FP32, 4, 2>, micro<FP32, 5, 2>, micro<FP32, 6, 2>,
#if TP_ISA == 2
    micro<FP32, 7, 2>, micro<FP32, 8, 2>, micro<FP32, 9, 2>, micro<FP32, 10, 2>, micro<FP32, 11, 2>, micro<FP32, 12, 2>,
#endif
};

// Many rows, or columns that are no multiple of W: a tile is converted once; a strip of it stays in the first-level cache while the rows pass by.
// y holds the panels side by side, each in round_up(columns, STRIP) columns.
template <int D>
static void gemm_converted(const float* x, int64_t ldx, int64_t rows, const Panels& p, int64_t k, float* y, int64_t ldy, int64_t tile, float* packed) {
  using T = typename Element<D>::T;
  const int64_t blocks = (rows + MAX_MR - 1) / MAX_MR, padded = round_up(p.columns, STRIP);
  float* strips = packed + rows * PACKED_LD;
  for (int64_t k0 = 0; k0 < k; k0 += tile) {
    const int64_t kb = k - k0 < tile ? k - k0 : tile;
    pack_rows(x + k0, ldx, rows, kb, packed);
    for (int64_t panel = 0; panel < p.count; panel++) {
      const T *w = (const T*)p.data + panel * p.stride + k0 * p.ld, *next = k0 + tile < k ? w + tile * p.ld : nullptr;
      convert_tile<D>(w, p.ld, kb, p.columns, strips);
      for (int64_t n = 0; n < p.columns; n += STRIP) {
        const int64_t at = n * kb, row = at / p.columns;
        const Ahead ahead = next ? Ahead{(const char*)(next + row * p.ld + (at - row * p.columns)), 2 * STRIP * (int64_t)sizeof(T)} : Ahead{nullptr, 0};
        for (int64_t b = 0; b < blocks; b++) {
          const int64_t m = rows * b / blocks, mr = rows * (b + 1) / blocks - m;
          strip_table[mr - 1](packed + m * PACKED_LD, strips + n * kb, STRIP, kb, y + m * ldy + panel * padded + n, ldy, b ? Ahead{nullptr, 0} : ahead);
        }
      }
    }
  }
}

// Whether y holds a panel in `columns` columns (few rows), or in as many as fill whole strips.
static bool is_direct(int64_t rows, int64_t columns) { return rows <= DIRECT_ROWS && columns % W == 0; }
static int64_t gemm_columns(int64_t rows, int64_t columns) { return is_direct(rows, columns) ? columns : round_up(columns, STRIP); }
static int64_t converted_tile(int64_t columns) {
  const int64_t rows = CONVERTED_FLOATS / round_up(columns, STRIP);
  return rows < 8 ? 8 : rows > MAX_TILE ? MAX_TILE : rows;
}
// Floats of scratch that `gemm` needs.
static int64_t gemm_scratch(int64_t rows, int64_t columns) {
  return rows * PACKED_LD + (is_direct(rows, columns) ? 0 : converted_tile(columns) * round_up(columns, STRIP));
}

// y has count * gemm_columns columns. `tile`: k rows per tile when there are few rows.
template <int D>
static void gemm(const float* x, int64_t ldx, int64_t rows, const Panels& p, int64_t k, float* y, int64_t ldy, int64_t tile, float* scratch) {
  if (is_direct(rows, p.columns)) return gemm_direct<D>(x, ldx, rows, p, k, y, ldy, tile, scratch);
  gemm_converted<D>(x, ldx, rows, p, k, y, ldy, converted_tile(p.columns), scratch);
}

TP_INLINE void gemm_any(int dtype, const float* x, int64_t ldx, int64_t rows, const Panels& p, int64_t k, float* y, int64_t ldy, int64_t tile, float* scratch) {
  if (dtype == BF16) return gemm<BF16>(x, ldx, rows, p, k, y, ldy, tile, scratch);
  if (dtype == FP16) return gemm<FP16>(x, ldx, rows, p, k, y, ldy, tile, scratch);
  gemm<FP32>(x, ldx, rows, p, k, y, ldy, tile, scratch);
}
