// ATTEND for some query tokens of one sequence and the query heads of one KV head, over KV in a float format. Included inside each instruction set's namespace.
// Online softmax over blocks of 64 tokens that start at multiples of 64. What a row's numbers are made of depends on its position only: a score is W chains of
// fused multiply-adds over the dims, added as a tree; a sum of values is one chain in ascending tokens; a block that is masked for a row leaves it as it is.
// So a row's bits do not depend on the rows that it is computed with.
//
// A block is read as four quarters, side by side: that many streams from memory at once. While a block's keys are multiplied its values are
// prefetched, and while its values are added the next block's keys are: both come a phase ahead, into the second-level cache.

constexpr float MASKED = -__builtin_inff();
constexpr int64_t BLOCK = 64, QUARTERS = 4, QUARTER = BLOCK / QUARTERS;
constexpr int64_t PAIR = 2 * W;    // dims that are loaded together
constexpr int64_t SCORE_ROWS = 4;  // rows that share one load of keys

struct AttendBlock {
  int64_t rows, group, dim, padded_dim;                   // rows = query tokens x heads of the group
  float *q, *scores, *sums, *peak, *total;                // [rows][padded_dim], [rows][BLOCK], [rows][padded_dim], [rows], [rows]
  float *lanes, *copy;                                    // [SCORE_ROWS][BLOCK][W]; [2][BLOCK][padded_dim] or null
  int64_t t0, t1, row_bytes;                              // of the block at hand: tokens [t0, t1) are seen by some row; bytes from one token to the next
  const char *keys[QUARTERS], *values[QUARTERS], *next_keys[QUARTERS];  // of each quarter; next: of the block behind it, null where no row sees it
};

// Whether keys and values are used where they lie: in whole pairs of vectors, and a quarter never crosses pages. Else a block is copied to fp32 first.
static bool used_in_place(const KvArgs& kv) { return kv.head_dim % PAIR == 0 && kv.page_size % QUARTER == 0; }

// Parts of the thread's memory, in floats.
struct Part {
  float** at;
  int64_t floats;
};
template <int N>
static int64_t floats_of(const Part (&parts)[N]) {
  int64_t floats = 0;
  for (const Part& part : parts) floats += part.floats;
  return round_up(floats, 16);
}
template <int N>
static void place(const Part (&parts)[N], float* next) {
  for (const Part& part : parts) {
    *part.at = next;
    next += part.floats;
  }
}

static AttendBlock attend_sizes(const AttendArgs& a, int64_t queries) {
  AttendBlock b;
  b.group = a.heads / a.kv.kv_heads;
  b.rows = queries * b.group;
  b.dim = a.kv.head_dim;
  b.padded_dim = round_up(b.dim, PAIR);
  return b;
}

static AttendBlock attend_layout(const AttendArgs& a, int64_t queries) {
  AttendBlock b = attend_sizes(a, queries);
  const int64_t copied = used_in_place(a.kv) ? 0 : 2 * BLOCK * b.padded_dim, rows = round_up(b.rows, 16);
  const Part parts[] = {{&b.q, b.rows * b.padded_dim}, {&b.scores, b.rows * BLOCK}, {&b.sums, b.rows * b.padded_dim}, {&b.peak, rows}, {&b.total, rows},
                        {&b.lanes, SCORE_ROWS * BLOCK * W}, {&b.copy, copied}};
  place(parts, (float*)thread_scratch(floats_of(parts) * sizeof(float)));
  if (!copied) b.copy = nullptr;
  return b;
}

static char* token_row(const KvArgs& kv, const Sequence& s, int64_t token, int64_t which, int64_t head) {
  return kv_row(kv, s.pages[token / kv.page_size], token % kv.page_size, which, head);
}

// Where a block lies. A quarter that no row sees is never read for its values, and its scores are masked: it gets a neighbour's place.
static void find_quarters(const KvArgs& kv, const Sequence& s, int64_t head, int64_t base, int64_t last, AttendBlock& b) {
  b.row_bytes = kv.row_bytes();
  const int64_t first = b.t0 / QUARTER;
  for (int64_t i = 0; i < QUARTERS; i++) {
    const int64_t t = i * QUARTER < b.t1 && i >= first ? i * QUARTER : first * QUARTER, next = base + BLOCK + i * QUARTER;
    b.keys[i] = token_row(kv, s, base + t, 0, head);
    b.values[i] = token_row(kv, s, base + t, 1, head);
    b.next_keys[i] = next < last ? token_row(kv, s, next, 0, head) : nullptr;
  }
}

template <int D>
static void to_floats(const char* from, int64_t n, float* out) {
  const auto* p = (const typename Element<D>::T*)from;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, Element<D>::load_vector(p + i));
  for (; i < n; i++) out[i] = Element<D>::get(p[i]);
}

// The tokens that some row sees, as fp32 rows of whole pairs.
template <int D>
static void copy_block(const KvArgs& kv, const Sequence& s, int64_t head, int64_t base, AttendBlock& b) {
  b.row_bytes = b.padded_dim * (int64_t)sizeof(float);
  for (int64_t which = 0; which < 2; which++)
    for (int64_t t = b.t0; t < b.t1; t++) {
      float* out = b.copy + (which * BLOCK + t) * b.padded_dim;
      to_floats<D>(token_row(kv, s, base + t, which, head), b.dim, out);
      for (int64_t d = b.dim; d < b.padded_dim; d++) out[d] = 0.0f;
    }
  for (int64_t i = 0; i < QUARTERS; i++) {
    b.keys[i] = (const char*)(b.copy + i * QUARTER * b.padded_dim);
    b.values[i] = b.keys[i] + BLOCK * b.row_bytes;
    b.next_keys[i] = nullptr;
  }
}

TP_INLINE void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

// Rows [from, to) of a block, counted through its quarters in turn.
TP_INLINE void prefetch_rows(const char* const* quarters, uint64_t from, uint64_t to, int64_t row_bytes) {
  for (uint64_t i = from; i < to; i++)
    if (quarters[i % QUARTERS]) prefetch_row(quarters[i % QUARTERS] + (int64_t)(i / QUARTERS) * row_bytes, row_bytes);
}

// ---- scores

constexpr float LOG2_E = 1.44269504f;
static float query_scale(const AttendArgs& a) { return a.softcap != 0.0f ? a.scale / a.softcap : a.scale * LOG2_E; }

constexpr int score_keys(int rows) { return TP_ISA == 2 || rows < 3 ? 4 : 2; }  // keys that share one load of rows: as many chains as registers hold

// Half 0 or 1 of PAIR elements, in the order of `load_pair`.
template <int D>
TP_INLINE vf load_half(const typename Element<D>::T* p, int half) {
  if (D != BF16) return Element<D>::load_vector(p + half * W);
  const vu v = (vu)load((const float*)p);
  return half ? (vf)(v & 0xffff0000u) : (vf)(v << 16);
}

// The lanes of keys . q, those of row m and key n at lanes + (m * BLOCK + tokens[n]) * W.
template <int D, int MR, int NK>
TP_INLINE void dots(const float* q, int64_t ldq, const char* const* keys, int64_t dim, const int64_t* tokens, float* lanes) {
  vf c[NK][MR];
#pragma GCC unroll 4
  for (int n = 0; n < NK; n++)
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++) c[n][m] = zero();
  for (int64_t d = 0; d < dim; d += PAIR) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      vf x[MR];
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) x[m] = kept(load(q + m * ldq + d + half * W));
#pragma GCC unroll 4
      for (int n = 0; n < NK; n++) {
        const vf key = load_half<D>((const typename Element<D>::T*)keys[n] + d, half);
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) c[n][m] = fma(key, x[m], c[n][m]);
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < NK; n++)
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++) store(lanes + (m * BLOCK + tokens[n]) * W, c[n][m]);
}

// Scores of MR rows from `row` on. The first rows prefetch the values of the tokens that they score.
template <int D, int MR>
static void score_rows(int64_t row, const AttendBlock& b) {
  constexpr int NK = score_keys(MR);
  const bool whole = b.t0 == 0 && b.t1 == BLOCK;  // tokens of all quarters in turn; else four neighbours, so that few are scored for nothing
  const float* q = b.q + row * b.padded_dim;
  const int64_t first = whole ? 0 : b.t0 / 4, last = whole ? QUARTER : (b.t1 + 3) / 4;
  for (int64_t g = first; g < last; g++) {
    int64_t tokens[4];
    const char* keys[4];
    for (int64_t j = 0; j < 4; j++) {
      const uint64_t t = (uint64_t)(tokens[j] = whole ? j * QUARTER + g : 4 * g + j);
      const int64_t offset = (int64_t)(t % QUARTER) * b.row_bytes;
      keys[j] = b.keys[t / QUARTER] + offset;
      if (row == 0 && !b.copy) prefetch_row(b.values[t / QUARTER] + offset, b.row_bytes);
    }
#pragma GCC unroll 2
    for (int j = 0; j < 4; j += NK) dots<D, MR, NK>(q, b.padded_dim, keys + j, b.padded_dim, tokens + j, b.lanes);
  }
  for (int64_t m = 0; m < MR; m++)  // apart from the multiplications, which leave the ports that shuffle little time
    for (int64_t t = first * 4; t < last * 4; t += 4) add_lanes(b.lanes + (m * BLOCK + t) * W, b.scores + (row + m) * BLOCK + t);
}

template <int D>
static void score_block(const AttendBlock& b) {
  using Fn = void (*)(int64_t, const AttendBlock&);
  static const Fn table[SCORE_ROWS] = {score_rows<D, 1>, score_rows<D, 2>, score_rows<D, 3>, score_rows<D, 4>};
  for (int64_t row = 0, count; row < b.rows; row += count) {
    const int64_t left = b.rows - row;
    count = left / ((left + SCORE_ROWS - 1) / SCORE_ROWS);  // as even as possible
    table[count - 1](row, b);
  }
}

// 2^x for x <= 0, relative error below 2e-7; 0 where that is too small for a normal number, as for masked scores. A NaN stays one.
TP_INLINE vf probability(vf x) {
  const vf magic = splat(12582912.0f), whole = x + magic, r = x - (whole - magic);  // 1.5 * 2^23: adding it rounds to an integer
  vf p = splat(1.326472731e-3f);
  p = fma(p, r, splat(9.671512991e-3f));
  p = fma(p, r, splat(5.550733581e-2f));
  p = fma(p, r, splat(2.402224243e-1f));
  p = fma(p, r, splat(6.931470037e-1f));
  p = fma(p, r, splat(1.0f));
  return x < splat(-125.0f) ? zero() : p * (vf)(((vu)whole << 23) + 0x3f800000u);  // unsigned: what is thrown away may wrap around
}

// Scores, in units of log 2 as `query_scale` makes them, to probabilities in place, for one row that sees tokens [lo, hi) of the block; rescales the row's sums.
static void softmax_row(const AttendArgs& a, AttendBlock& b, int64_t row, int64_t lo, int64_t hi) {
  constexpr int N = BLOCK / W, PARTS = 16 / W;  // sixteen lanes of sums on every instruction set
  float* s = b.scores + row * BLOCK;
  vf v[N], top = splat(MASKED), parts[PARTS] = {};
  for (int i = 0; i < N; i++) {
    v[i] = load(s + i * W);
    if (a.softcap != 0.0f) v[i] = splat(a.softcap * LOG2_E) * vtanh(v[i]);
  }
  if (lo > 0 || hi < BLOCK) {
    for (int i = 0; i < N; i++) store(s + i * W, v[i]);
    for (int64_t t = 0; t < BLOCK; t++)
      if (t < lo || t >= hi) s[t] = MASKED;
    for (int i = 0; i < N; i++) v[i] = load(s + i * W);
  }
  for (int i = 0; i < N; i++) top = vmax(v[i], top);
  const vf before = splat(b.peak[row]), peak = vmax(fold_lanes(top, vmax), before);
  const vf from = peak == splat(MASKED) ? zero() : peak;  // nothing seen yet: every probability is 0
  for (int i = 0; i < N; i++) {
    const vf p = probability(v[i] - from);
    store(s + i * W, p);
    parts[i % PARTS] = parts[i % PARTS] + p;
  }
  for (int half = PARTS / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] = parts[i] + parts[i + half];
  const vf added = fold_lanes(parts[0], [](vf x, vf y) { return x + y; });
  if (before[0] != peak[0]) {
    const vf shrink = probability(before - from);
    float* sums = b.sums + row * b.padded_dim;
    b.total[row] *= shrink[0];
    for (int64_t d = 0; d < b.padded_dim; d += W) store(sums + d, load(sums + d) * shrink);
  }
  b.total[row] += added[0];
  b.peak[row] = peak[0];
}

// ---- values

// sums [MR][dim] += probabilities @ values; the first rows prefetch the share [from, to) of the next block's keys.
template <int D, int MR, int NV>
TP_INLINE void value_columns(int64_t row, int64_t column, int64_t from, int64_t to, const AttendBlock& b) {
  using S = Sums<D, MR, NV>;
  using T = typename Element<D>::T;
  float* sums = b.sums + row * b.padded_dim + column;
  S s;
  S::read(s, sums, b.padded_dim);
  for (int64_t i = b.t0 / QUARTER; i * QUARTER < b.t1; i++) {
    const int64_t first = b.t0 > i * QUARTER ? b.t0 : i * QUARTER, end = b.t1 < (i + 1) * QUARTER ? b.t1 : (i + 1) * QUARTER;
    if (row == 0) prefetch_rows(b.next_keys, from + (to - from) * i / QUARTERS, from + (to - from) * (i + 1) / QUARTERS, b.row_bytes);
    const char* v = b.values[i] + (first - i * QUARTER) * b.row_bytes + column * (int64_t)sizeof(T);
    const float* p = b.scores + row * BLOCK;
    for (int64_t t = first; t < end; t++, v += b.row_bytes) S::step(s, p + t, BLOCK, (const T*)v);
  }
  S::write(s, sums, b.padded_dim);
}

template <int D, int MR>
static void value_rows(int64_t row, const AttendBlock& b) {
  constexpr int NV = vectors_of(MR);
  const int64_t dim = b.padded_dim;
  auto share = [&](int64_t column) { return BLOCK * column / dim; };
  int64_t column = 0;
  for (; column + NV * W <= dim; column += NV * W) value_columns<D, MR, NV>(row, column, share(column), share(column + NV * W), b);
  for (; column < dim; column += PAIR) value_columns<D, MR, 2>(row, column, share(column), share(column + PAIR), b);
}

template <int D>
static void add_values(const AttendBlock& b) {
  using Fn = void (*)(int64_t, const AttendBlock&);
  static const Fn table[] = {value_rows<D, 1>, value_rows<D, 2>, value_rows<D, 3>, value_rows<D, 4>, value_rows<D, 5>, value_rows<D, 6>,
#if TP_ISA == 2
                             value_rows<D, 7>, value_rows<D, 8>, value_rows<D, 9>, value_rows<D, 10>, value_rows<D, 11>, value_rows<D, 12>,
#endif
  };
  for (int64_t row = 0, count; row < b.rows; row += count) {
    count = rows_at_once(b.rows - row);
    table[count - 1](row, b);
  }
}

// ---- a chunk

static const float* query_of(const AttendArgs& a, const Sequence& s, const AttendBlock& b, int64_t kv_head, int64_t query0, int64_t row) {
  return a.qkv + (s.row + query0 + row / b.group) * a.ld + (kv_head * b.group + row % b.group) * b.dim;
}

static void clear_rows(AttendBlock& b) {
  for (int64_t r = 0; r < b.rows; r++) {
    b.peak[r] = MASKED;
    b.total[r] = 0.0f;
  }
  __builtin_memset(b.sums, 0, b.rows * b.padded_dim * sizeof(float));
}

// A block begins at token `base`; some row sees its tokens [t0, t1). `last`: the end of all tokens that are seen.
struct BlockSpan {
  int64_t base, t0, t1, last;
  bool is_first;
};

// All tokens that some row sees, block by block.
template <class F>
static void each_block(const AttendArgs& a, const Sequence& s, int64_t query0, int64_t query1, F&& attend) {
  const int64_t context = s.kv_len - s.len, last = context + query1, first = a.window && context + query0 + 1 > a.window ? context + query0 + 1 - a.window : 0;
  for (int64_t base = first / BLOCK * BLOCK; base < last; base += BLOCK)
    attend(BlockSpan{base, first > base ? first - base : 0, last - base < BLOCK ? last - base : BLOCK, last, base == first / BLOCK * BLOCK});
}

static void softmax_block(const AttendArgs& a, const Sequence& s, int64_t query0, int64_t base, AttendBlock& b) {
  for (int64_t r = 0; r < b.rows; r++) {
    const int64_t position = s.kv_len - s.len + query0 + r / b.group, start = a.window && position + 1 > a.window ? position + 1 - a.window : 0;
    const int64_t lo = start > base ? start - base : 0, hi = position + 1 - base;
    softmax_row(a, b, r, lo < BLOCK ? lo : BLOCK, hi < 0 ? 0 : hi < BLOCK ? hi : BLOCK);
  }
}

static void finish_rows(const AttendArgs& a, const Sequence& s, const AttendBlock& b, int64_t kv_head, int64_t query0) {
  for (int64_t r = 0; r < b.rows; r++) {
    float* out = a.dst + (s.row + query0 + r / b.group) * a.dst_ld + (kv_head * b.group + r % b.group) * b.dim;
    for (int64_t d = 0; d < b.dim; d++) out[d] = b.sums[r * b.padded_dim + d] / b.total[r];
  }
}

template <int D>
static void attend_tokens(const AttendArgs& a, const Sequence& s, int64_t kv_head, int64_t query0, int64_t query1, AttendBlock& b) {
  clear_rows(b);
  each_block(a, s, query0, query1, [&](const BlockSpan& span) {
    b.t0 = span.t0;
    b.t1 = span.t1;
    if (b.copy) {
      copy_block<D>(a.kv, s, kv_head, span.base, b);
      score_block<FP32>(b);
    } else {
      find_quarters(a.kv, s, kv_head, span.base, span.last, b);
      if (span.is_first) prefetch_rows(b.keys, 0, BLOCK, b.row_bytes);
      score_block<D>(b);
    }
    softmax_block(a, s, query0, span.base, b);
    if (b.copy) add_values<FP32>(b);
    else add_values<D>(b);
  });
}

static void attend_floats(const AttendArgs& a, const Sequence& s, int64_t kv_head, int64_t query0, int64_t query1) {
  AttendBlock b = attend_layout(a, query1 - query0);
  const bool woven = a.kv.dtype == BF16 && !b.copy;
  const float scale = query_scale(a);
  for (int64_t r = 0; r < b.rows; r++) {
    float* q = b.q + r * b.padded_dim;
    const float* from = query_of(a, s, b, kv_head, query0, r);
    for (int64_t d = 0; d < b.dim; d++) q[d] = from[d] * scale;
    for (int64_t d = b.dim; d < b.padded_dim; d++) q[d] = 0.0f;
    if (woven) reorder<false>(q, b.dim);
  }
  if (a.kv.dtype == BF16) attend_tokens<BF16>(a, s, kv_head, query0, query1, b);
  else if (a.kv.dtype == FP16) attend_tokens<FP16>(a, s, kv_head, query0, query1, b);
  else attend_tokens<FP32>(a, s, kv_head, query0, query1, b);
  for (int64_t r = 0; woven && r < b.rows; r++) reorder<true>(b.sums + r * b.padded_dim, b.dim);
  finish_rows(a, s, b, kv_head, query0);
}
