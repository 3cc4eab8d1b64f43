// y[M, N] += x[M, K] @ w[K, N], w of a stored type. Included inside each instruction set's namespace.
// Every output is one chain of fused multiply-adds in ascending k. Tiles of k are cut for the caches only: partial sums are stored and reloaded in fp32,
// which is exact, so a row's bits depend neither on the other rows nor on the tiles.

// Panels of weights, each [k][columns] with rows `ld` elements apart; panels lie `stride` elements apart: one after the other (ld = columns)
// or side by side (stride = columns).
struct Panels {
  const void* data;
  int64_t count, columns, ld, stride;
};

constexpr int MAX_MR = TP_ISA == 2 ? 12 : 6;  // rows of x that share one load of weights
constexpr int MAX_TILE = 128;                 // k rows of a tile
constexpr int PACKED_LD = MAX_TILE + 16;      // not a multiple of 4 KiB: rows do not fall into one cache set
constexpr int PLACE_ROWS = 3;                 // up to here panels that lie side by side are used in place; beyond, a tile of them is copied together
constexpr int PLACE_TILE = 16;                // k rows of such a tile: they lie pages apart and share few sets of the caches
constexpr int64_t TILE_BYTES = 16 * 1024;     // of one panel's tile: it stays in the first-level cache while the rows pass by
constexpr int vectors_of(int mr) { return TP_ISA == 2 ? (mr <= 6 ? 4 : 2) : mr == 1 ? 8 : mr <= 3 ? 4 : 2; }

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
#pragma GCC unroll 4
    for (int n = 0; n + 1 < NV; n += 2) {
      vf b0, b1;
      load_pair<D>(w + n * W, b0, b1);
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) accumulate(s.c[m][n], s.c[m][n + 1], x + m * ldx, b0, b1);
    }
    if (NV % 2 == 0) return;
    const vf b = Element<D>::load_vector(w + (NV - 1) * W);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) s.c[m][NV - 1] = fma(splat(x[m * ldx]), b, s.c[m][NV - 1]);
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

// Where the next tile lies, and from which of its bytes on this panel prefetches: rows of `row_bytes` that lie `stride` bytes apart. No data: nothing.
struct Next {
  const char* data;
  int64_t row_bytes, stride, from;

  Ahead ahead(int64_t offset, int64_t step) const {
    const int64_t row = (from + offset) / row_bytes;
    return data ? Ahead{data + row * stride + (from + offset - row * row_bytes), step} : Ahead{nullptr, 0};
  }
};

// All columns of one panel's tile; each call of the micro-kernel prefetches as many bytes of the next tile as it reads of this one.
template <int D, int MR>
static void tile_rows(const float* x, const typename Element<D>::T* w, int64_t ldw, int64_t columns, int64_t k, float* y, int64_t ldy, const Next& next) {
  constexpr int NV = vectors_of(MR), size = sizeof *w;
  int64_t n = 0;
  for (; n + NV * W <= columns; n += NV * W) micro<D, MR, NV>(x, w + n, ldw, k, y + n, ldy, next.ahead(n * k * size, 2 * NV * W * size));
  for (; n + W <= columns; n += W) micro<D, MR, 1>(x, w + n, ldw, k, y + n, ldy, next.ahead(n * k * size, 2 * W * size));
  if (n == columns) return;
  float last[MAX_TILE * W];  // a panel that is no multiple of W wide
  for (int64_t i = 0; i < k; i++)
    for (int64_t j = 0; j < W; j++) last[i * W + j] = n + j < columns ? Element<D>::get(w[i * ldw + n + j]) : 0.0f;
  micro<FP32, MR, 1>(x, last, W, k, y + n, ldy, {nullptr, 0});
}

template <int D>
static void tile_any_rows(const float* x, int64_t rows, const typename Element<D>::T* w, int64_t ldw, int64_t columns, int64_t k, float* y, int64_t ldy, const Next& next) {
  using Fn = void (*)(const float*, const typename Element<D>::T*, int64_t, int64_t, int64_t, float*, int64_t, const Next&);
  static const Fn table[] = {tile_rows<D, 1>, tile_rows<D, 2>, tile_rows<D, 3>, tile_rows<D, 4>, tile_rows<D, 5>, tile_rows<D, 6>,
#if TP_ISA == 2
                             tile_rows<D, 7>, tile_rows<D, 8>, tile_rows<D, 9>, tile_rows<D, 10>, tile_rows<D, 11>, tile_rows<D, 12>,
#endif
  };
  const int64_t blocks = (rows + MAX_MR - 1) / MAX_MR;
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t m = rows * b / blocks, mr = rows * (b + 1) / blocks - m;
    table[mr - 1](x + m * PACKED_LD, w, ldw, columns, k, y + m * ldy, ldy, b ? Next{nullptr, 1, 0, 0} : next);
  }
}

// A tile of panels that lie side by side, copied to panels that follow each other.
template <class T>
static void copy_tile(const T* w, const Panels& p, int64_t k, T* out) {
  for (int64_t i = 0; i < k; i++)
    for (int64_t panel = 0; panel < p.count; panel++) __builtin_memcpy(out + (panel * k + i) * p.columns, w + i * p.ld + panel * p.columns, p.columns * sizeof(T));
}

static int64_t padded(int64_t columns) { return round_up(columns, W); }
static bool in_place(const Panels& p, int64_t rows) { return p.ld == p.columns || rows <= PLACE_ROWS; }
static int64_t tile_of(const Panels& p, int64_t rows, int64_t element_bytes) {
  if (p.ld != p.columns && in_place(p, rows)) return PLACE_TILE;
  const int64_t k = TILE_BYTES / (p.columns * element_bytes);
  return k < 16 ? 16 : k > MAX_TILE ? MAX_TILE : k & ~(int64_t)1;
}
// Floats of scratch that `gemm` needs.
static int64_t gemm_scratch(const Panels& p, int64_t rows, int64_t element_bytes) {
  const int64_t copied = in_place(p, rows) ? 0 : p.count * tile_of(p, rows, element_bytes) * p.columns * element_bytes / (int64_t)sizeof(float);
  return rows * PACKED_LD + copied + 16;
}

// y holds the panels side by side, each in padded(columns) columns. Tiles of all panels are used in turn: as many streams from memory as there are panels.
template <int D>
static void gemm(const float* x, int64_t ldx, int64_t rows, const Panels& p, int64_t k, float* y, int64_t ldy, float* scratch) {
  using T = typename Element<D>::T;
  constexpr int64_t size = sizeof(T);
  const int64_t tile = tile_of(p, rows, size), width = p.count * p.columns;
  T* copy = (T*)(scratch + rows * PACKED_LD);
  for (int64_t k0 = 0; k0 < k; k0 += tile) {
    const T* w = (const T*)p.data + k0 * p.ld;
    const int64_t kb = k - k0 < tile ? k - k0 : tile;
    pack_rows(x + k0, ldx, rows, kb, scratch);
    if (!in_place(p, rows)) copy_tile(w, p, kb, copy);
    for (int64_t panel = 0; panel < p.count; panel++) {
      Next next = {nullptr, 1, 0, 0};
      if (k0 + tile < k) {
        const T* after = w + tile * p.ld;
        if (p.ld == p.columns) next = {(const char*)(after + panel * p.stride), p.columns * size, p.columns * size, 0};
        else next = {(const char*)after, width * size, p.ld * size, panel * kb * p.columns * size};
      }
      float* to = y + panel * padded(p.columns);
      if (in_place(p, rows)) tile_any_rows<D>(scratch, rows, w + panel * p.stride, p.ld, p.columns, kb, to, ldy, next);
      else tile_any_rows<D>(scratch, rows, copy + panel * kb * p.columns, p.columns, p.columns, kb, to, ldy, next);
    }
  }
}

TP_INLINE void gemm_any(int dtype, const float* x, int64_t ldx, int64_t rows, const Panels& p, int64_t k, float* y, int64_t ldy, float* scratch) {
  if (dtype == BF16) return gemm<BF16>(x, ldx, rows, p, k, y, ldy, scratch);
  if (dtype == FP16) return gemm<FP16>(x, ldx, rows, p, k, y, ldy, scratch);
  gemm<FP32>(x, ldx, rows, p, k, y, ldy, scratch);
}
