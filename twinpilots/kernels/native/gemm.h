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
constexpr bool IN_PLACE = TP_ISA == 2;        // panels that lie side by side are used where they lie: a vector is a whole cache line or half of one
constexpr int64_t COPY_BYTES = 128 * 1024;    // of the copied tile of panels that lie side by side
constexpr int64_t TILE_BYTES = 16 * 1024;     // of one panel's tile: it stays in the first-level cache while the rows pass by
constexpr int vectors_of(int mr) { return TP_ISA == 2 ? (mr <= 6 ? 4 : 2) : mr == 1 ? 8 : mr <= 3 ? 4 : 2; }

// What is read next, and how many bytes of it to prefetch per two k.
struct Ahead {
  const char* data;
  int64_t step;
};

// MR rows times NV vectors of sums, in registers. While bf16 is multiplied, sums lie in memory in the order in which its pairs of vectors come.
template <int D, int MR, int NV>
struct Sums {
  using T = typename Element<D>::T;
  vf c[MR][NV];

  TP_INLINE void read(Sums& s, const float* y, int64_t ldy) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) s.c[m][n] = load(y + m * ldy + n * W);
  }
  TP_INLINE void write(const Sums& s, float* y, int64_t ldy) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) store(y + m * ldy + n * W, s.c[m][n]);
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

// Where the next tile lies, and from which of its bytes on to prefetch: rows of `row_bytes` that lie `stride` bytes apart. No data: nothing.
struct Next {
  const char* data;
  int64_t row_bytes, stride, from;
};
constexpr Next NOTHING = {nullptr, 0, 0, 0};

// x is packed: its rows lie PACKED_LD apart. As many bytes of the next tile are prefetched as of this one are read.
template <int D, int MR, int NV>
static void micro(const float* x, const typename Element<D>::T* w, int64_t ldw, int64_t k, float* y, int64_t ldy, const Next& next) {
  using S = Sums<D, MR, NV>;
  constexpr int64_t bytes = NV * W * sizeof(typename Element<D>::T);  // of one k
  S s;
  S::read(s, y, ldy);
  if (!next.data) S::steps(s, x, PACKED_LD, w, ldw, k, {nullptr, 0});
  for (int64_t i = 0, at = next.from; next.data && i < k;) {
    const int64_t row = at / next.row_bytes, column = at - row * next.row_bytes, left = (next.row_bytes - column + bytes - 1) / bytes, kb = left < k - i ? left : k - i;
    S::steps(s, x + i, PACKED_LD, w + i * ldw, ldw, kb, {next.data + row * next.stride + column, 2 * bytes});
    i += kb;
    at += kb * bytes;
  }
  S::write(s, y, ldy);
}

// From the columns' order to the order of the pairs (`weave`: back), for as many columns of sums as are multiplied in pairs.
template <bool WEAVE>
static void reorder(float* y, int64_t columns) {
  for (int64_t n = 0; n + 2 * W <= columns; n += 2 * W) {
    vf a = load(y + n), b = load(y + n + W);
    if (WEAVE) weave(a, b);
    else unweave(a, b);
    store(y + n, a);
    store(y + n + W, b);
  }
}

static void pack_rows(const float* x, int64_t ldx, int64_t rows, int64_t k, float* out) {
  for (int64_t m = 0; m < rows; m++, x += ldx, out += PACKED_LD) __builtin_memcpy(out, x, k * sizeof *x);
}

// How many of `rows` go together: as even as possible, because few rows make too few independent chains.
TP_INLINE int64_t rows_at_once(int64_t rows) { return rows / ((rows + MAX_MR - 1) / MAX_MR); }

// All columns of one panel's tile.
template <int D, int MR>
static void tile_rows(const float* x, const typename Element<D>::T* w, int64_t ldw, int64_t columns, int64_t k, float* y, int64_t ldy, const Next& next) {
  constexpr int NV = vectors_of(MR), size = sizeof *w;
  int64_t n = 0;
  for (; n + NV * W <= columns; n += NV * W) micro<D, MR, NV>(x, w + n, ldw, k, y + n, ldy, Next{next.data, next.row_bytes, next.stride, next.from + n * k * size});
  for (; NV > 2 && n + 2 * W <= columns; n += 2 * W) micro<D, MR, 2>(x, w + n, ldw, k, y + n, ldy, Next{next.data, next.row_bytes, next.stride, next.from + n * k * size});
  if (n + W <= columns) {
    micro<D, MR, 1>(x, w + n, ldw, k, y + n, ldy, Next{next.data, next.row_bytes, next.stride, next.from + n * k * size});
    n += W;
  }
  if (n == columns) return;
  float last[MAX_TILE * W];  // a panel that is no multiple of W wide
  for (int64_t i = 0; i < k; i++)
    for (int64_t j = 0; j < W; j++) last[i * W + j] = n + j < columns ? Element<D>::get(w[i * ldw + n + j]) : 0.0f;
  micro<FP32, MR, 1>(x, last, W, k, y + n, ldy, NOTHING);
}

template <int D>
static void tile_any_rows(const float* x, int64_t rows, const typename Element<D>::T* w, int64_t ldw, int64_t columns, int64_t k, float* y, int64_t ldy, const Next& next) {
  using Fn = void (*)(const float*, const typename Element<D>::T*, int64_t, int64_t, int64_t, float*, int64_t, const Next&);
  static const Fn table[] = {tile_rows<D, 1>, tile_rows<D, 2>, tile_rows<D, 3>, tile_rows<D, 4>, tile_rows<D, 5>, tile_rows<D, 6>,
#if TP_ISA == 2
                             tile_rows<D, 7>, tile_rows<D, 8>, tile_rows<D, 9>, tile_rows<D, 10>, tile_rows<D, 11>, tile_rows<D, 12>,
#endif
  };
  for (int64_t m = 0, mr; m < rows; m += mr) {
    mr = rows_at_once(rows - m);
    table[mr - 1](x + m * PACKED_LD, w, ldw, columns, k, y + m * ldy, ldy, m ? NOTHING : next);
  }
}

// Rows [k0, k1) of a tile of panels that lie side by side, copied to panels that follow each other.
template <class T>
static void copy_rows(const T* w, const Panels& p, int64_t tile, int64_t k0, int64_t k1, T* out) {
  constexpr int64_t step = sizeof(vf) / sizeof(T);
  for (int64_t k = k0; k < k1; k++)
    for (int64_t panel = 0; panel < p.count; panel++) {
      const T* from = w + k * p.ld + panel * p.columns;
      T* to = out + (panel * tile + k) * p.columns;
      int64_t i = 0;
      for (; i + step <= p.columns; i += step) store((float*)(to + i), load((const float*)(from + i)));
      for (; i < p.columns; i++) to[i] = from[i];
    }
}

static int64_t padded(int64_t columns) { return round_up(columns, W); }
static bool side_by_side(const Panels& p) { return p.ld != p.columns; }
static bool copied(const Panels& p) { return side_by_side(p) && !IN_PLACE; }
static int64_t tile_of(const Panels& p, int64_t element_bytes) {
  const int64_t one = TILE_BYTES / (p.columns * element_bytes), all = COPY_BYTES / (p.count * p.columns * element_bytes), k = copied(p) && all < one ? all : one;
  return k < 16 ? 16 : k > MAX_TILE ? MAX_TILE : k & ~(int64_t)1;
}
// Floats of scratch that `gemm` needs.
static int64_t gemm_scratch(const Panels& p, int64_t rows, int64_t element_bytes) {
  const int64_t copies = copied(p) ? 2 * p.count * tile_of(p, element_bytes) * p.columns * element_bytes : 0;
  return rows * PACKED_LD + copies / (int64_t)sizeof(float) + 16;
}

// ---- few rows

static bool few(int64_t rows, int64_t columns) { return rows <= FEW_ROWS && columns % W == 0; }

// How weights are walked: k rows per tile, and how many k rows further on they are prefetched (past the end: what the next chunk starts with).
struct Walk {
  int64_t tile, ahead;
};
constexpr int64_t AHEAD_BYTES = 12 * 1024;  // that hide the latency of memory
constexpr int64_t AHEAD_ROWS = 16;          // of wide rows: they may lie 4 KiB apart, and then all fall into one set of the first-level cache, which holds 8

static Walk walk_of(int64_t row_bytes) {
  const int64_t rows = AHEAD_BYTES / row_bytes, ahead = rows < AHEAD_ROWS ? AHEAD_ROWS : rows;
  return {ahead / 2, ahead};
}

template <int D, int MR, int NV>
static void few_columns(const float* x, int64_t ldx, const typename Element<D>::T* w, int64_t ldw, int64_t k, int64_t ahead, float* y, int64_t ldy) {
  constexpr int bytes = NV * W * sizeof *w;  // of one k
  Sums<D, MR, NV> s;
  s.read(s, y, ldy);
  for (int64_t i = 0; i < k; i++, w += ldw) {
#pragma GCC unroll 8
    for (int line = 0; line < bytes; line += 64) __builtin_prefetch((const char*)(w + ahead) + line, 0, 2);
    s.step(s, x + i, ldx, w);
  }
  s.write(s, y, ldy);
}

template <int D, int MR>
static void few_rows(const float* x, int64_t ldx, const typename Element<D>::T* w, int64_t ldw, int64_t columns, int64_t k, float* y, int64_t ldy) {
  constexpr int NV = vectors_of(MR);
  const Walk walk = walk_of(columns * sizeof *w);
  const int64_t ahead = walk.ahead * ldw;
  for (int64_t k0 = 0; k0 < k; k0 += walk.tile, x += walk.tile, w += walk.tile * ldw) {
    const int64_t kb = k - k0 < walk.tile ? k - k0 : walk.tile;
    int64_t n = 0;
    for (; n + NV * W <= columns; n += NV * W) few_columns<D, MR, NV>(x, ldx, w + n, ldw, kb, ahead, y + n, ldy);
    for (; NV > 2 && n + 2 * W <= columns; n += 2 * W) few_columns<D, MR, 2>(x, ldx, w + n, ldw, kb, ahead, y + n, ldy);
    if (n < columns) few_columns<D, MR, 1>(x, ldx, w + n, ldw, kb, ahead, y + n, ldy);
  }
}

// Several panels that follow each other, row by row side by side: each is a stream of its own, and no instruction prefetches. Two cores of a Zen 4 read 31 GB/s
// with prefetches into the second-level cache, which take the few buffers for misses of the first one, and 48 to 54 GB/s by the processor's own prefetching.
template <int D, int MR, int NV, int STREAMS>
static void few_streams(const float* x, int64_t ldx, const typename Element<D>::T* w, int64_t stride, int64_t k, float* y, int64_t ldy) {
  constexpr int columns = NV * W;
  Sums<D, MR, NV> s[STREAMS];
#pragma GCC unroll 4
  for (int p = 0; p < STREAMS; p++) s[p].read(s[p], y + p * columns, ldy);
  for (int64_t i = 0; i < k; i++, w += columns)
#pragma GCC unroll 4
    for (int p = 0; p < STREAMS; p++) s[p].step(s[p], x + i, ldx, w + p * stride);
#pragma GCC unroll 4
  for (int p = 0; p < STREAMS; p++) s[p].write(s[p], y + p * columns, ldy);
}

// How many panels of NV vectors MR rows take at a time, as far as their sums fit the registers; 0: not even one.
constexpr int streams_of(int mr, int nv) { return TP_ISA < 2 ? 0 : mr == 1 ? 16 / nv : mr <= 3 ? 8 / nv : 0; }

// As many panels as are taken in streams; the number of them.
template <int D, int MR, int NV>
static int64_t stream_panels(const float* x, int64_t ldx, const Panels& p, int64_t k, float* y, int64_t ldy) {
  constexpr int most = streams_of(MR, NV);
  if constexpr (most == 0) return 0;
  else {
    const auto* w = (const typename Element<D>::T*)p.data;
    int64_t panel = 0;
    for (; panel + most <= p.count; panel += most) few_streams<D, MR, NV, most>(x, ldx, w + panel * p.stride, p.stride, k, y + panel * p.columns, ldy);
    if (most > 2 && panel + 2 <= p.count) {
      few_streams<D, MR, NV, 2>(x, ldx, w + panel * p.stride, p.stride, k, y + panel * p.columns, ldy);
      panel += 2;
    }
    if (panel < p.count) few_streams<D, MR, NV, 1>(x, ldx, w + panel++ * p.stride, p.stride, k, y + (p.count - 1) * p.columns, ldy);
    return p.count;
  }
}

// Up to FEW_ROWS rows, panels of a multiple of W columns: reading the weights is all the work, so nothing is packed or copied. Each panel is read to its end.
template <int D, int MR>
static void few_panels(const float* x, int64_t ldx, const Panels& p, int64_t k, float* y, int64_t ldy) {
  if (!side_by_side(p) && p.columns == 4 * W && stream_panels<D, MR, 4>(x, ldx, p, k, y, ldy)) return;
  if (!side_by_side(p) && p.columns == 8 * W && stream_panels<D, MR, 8>(x, ldx, p, k, y, ldy)) return;
  for (int64_t panel = 0; panel < p.count; panel++)
    few_rows<D, MR>(x, ldx, (const typename Element<D>::T*)p.data + panel * p.stride, p.ld, p.columns, k, y + panel * p.columns, ldy);
}

template <int D>
static void gemm_few(const float* x, int64_t ldx, int64_t rows, const Panels& p, int64_t k, float* y, int64_t ldy) {
  using Fn = void (*)(const float*, int64_t, const Panels&, int64_t, float*, int64_t);
  static const Fn table[FEW_ROWS] = {few_panels<D, 1>, few_panels<D, 2>, few_panels<D, 3>, few_panels<D, 4>};
  table[rows - 1](x, ldx, p, k, y, ldy);
}

// ---- any number of rows

// y holds the panels side by side, each in padded(columns) columns. Panels that follow each other are used where they lie, a tile of each in turn: as many
// streams from memory as there are panels. So are panels that lie side by side with AVX-512; without it their rows would share few sets of the caches: while a
// tile is used, the next one is prefetched and copied, a few whole rows after each panel.
template <int D>
static void gemm(const float* x, int64_t ldx, int64_t rows, const Panels& p, int64_t k, float* y, int64_t ldy, float* scratch) {
  using T = typename Element<D>::T;
  constexpr int64_t size = sizeof(T);
  if (few(rows, p.columns)) return gemm_few<D>(x, ldx, rows, p, k, y, ldy);
  const int64_t tile = tile_of(p, size), panel_bytes = tile * p.columns * size, width = p.count * p.columns;
  const bool copies = copied(p);
  T *now = (T*)(scratch + rows * PACKED_LD), *then = now + tile * width;
  if (copies) copy_rows((const T*)p.data, p, tile, 0, k < tile ? k : tile, now);
  for (int64_t k0 = 0; k0 < k; k0 += tile) {
    const T *w = (const T*)p.data + k0 * p.ld, *after = w + tile * p.ld;
    const int64_t kb = k - k0 < tile ? k - k0 : tile, left = k - k0 - kb, kn = left < tile ? left : tile;
    pack_rows(x + k0, ldx, rows, kb, scratch);
    for (int64_t panel = 0; panel < p.count; panel++) {
      float* to = y + panel * padded(p.columns);
      if (copies) {
        const Next next = {kn ? (const char*)after : nullptr, width * size, p.ld * size, (panel + 1) * panel_bytes};
        tile_any_rows<D>(scratch, rows, now + panel * tile * p.columns, p.columns, p.columns, kb, to, ldy, next);
        copy_rows(after, p, tile, kn * panel / p.count, kn * (panel + 1) / p.count, then);
      } else {
        // after a panel's last tile: the first one of the panel that the next group starts with, in case this thread gets it
        const T* follows = kn ? after + panel * p.stride : (const T*)p.data + (panel + p.count) * p.stride;
        Next next = {side_by_side(p) ? nullptr : (const char*)follows, panel_bytes, 0, 0};
        if (kn && side_by_side(p)) next = {(const char*)after, width * size, p.ld * size, panel * panel_bytes};
        tile_any_rows<D>(scratch, rows, w + panel * p.stride, p.ld, p.columns, kb, to, ldy, next);
      }
    }
    T* swap = now;
    now = then;
    then = swap;
  }
}

TP_INLINE void gemm_any(int dtype, const float* x, int64_t ldx, int64_t rows, const Panels& p, int64_t k, float* y, int64_t ldy, float* scratch) {
  if (dtype == BF16) return gemm<BF16>(x, ldx, rows, p, k, y, ldy, scratch);
  if (dtype == FP16) return gemm<FP16>(x, ldx, rows, p, k, y, ldy, scratch);
  gemm<FP32>(x, ldx, rows, p, k, y, ldy, scratch);
}
