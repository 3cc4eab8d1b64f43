// ATTEND for some query tokens of one sequence and the query heads of one KV head. Included inside each instruction set's namespace.
// Online softmax over blocks of 64 tokens (or a page, if larger) that start at multiples of 64: the blocks that a row sees depend on its position only,
// and a block that is masked for a row leaves it as it is, so a row's bits do not depend on the rows that it is computed with.

constexpr float MASKED = -__builtin_inff();
constexpr int64_t KEYS = 16;  // keys that are transposed together: a page of the usual size

// Tokens of a block that lie in one page: where their keys and values lie, and the keys one block further on (null: no row sees those).
struct Run {
  int64_t token, count;
  const char *keys, *values, *next_keys;
};

struct AttendBlock {
  int64_t rows, group, dim, padded_dim, tokens, padded_tokens;  // rows = query tokens x heads of the group
  float *q, *keys, *scores, *sums, *peak, *total, *tail;  // [dim / MAX_TILE][rows][PACKED_LD], [dim][KEYS], [rows][padded_tokens], [rows][padded_dim], [rows], [rows], [tokens][W]
  int64_t t0, t1, num_runs;  // of the block at hand: tokens [t0, t1) are seen by some row
  Run runs[64];
};

static AttendBlock attend_layout(const AttendArgs& a, int64_t queries) {
  AttendBlock b;
  b.group = a.heads / a.kv.kv_heads;
  b.rows = queries * b.group;
  b.dim = a.kv.head_dim;
  b.padded_dim = round_up(b.dim, 16);
  b.tokens = a.kv.page_size >= 64 ? a.kv.page_size : 64 / a.kv.page_size * a.kv.page_size;
  b.padded_tokens = round_up(b.tokens, KEYS);
  const int64_t sizes[] = {(b.dim + MAX_TILE - 1) / MAX_TILE * b.rows * PACKED_LD, b.dim * KEYS, b.rows * b.padded_tokens, b.rows * b.padded_dim, round_up(b.rows, 16),
                           round_up(b.rows, 16), b.tokens * W};
  float** parts[] = {&b.q, &b.keys, &b.scores, &b.sums, &b.peak, &b.total, &b.tail};
  int64_t floats = 0;
  for (int64_t size : sizes) floats += size;
  float* next = (float*)thread_scratch(floats * sizeof(float));
  for (int i = 0; i < 7; i++) {
    *parts[i] = next;
    next += sizes[i];
  }
  return b;
}

// Tokens from `last` on are seen by no row.
static void find_runs(const KvArgs& kv, const Sequence& s, int64_t head, int64_t base, int64_t last, AttendBlock& b) {
  b.num_runs = 0;
  for (int64_t t = b.t0, count; t < b.t1; t += count) {
    const int64_t page = (base + t) / kv.page_size, offset = base + t - page * kv.page_size, left = kv.page_size - offset;
    auto at = [&](int64_t index, int64_t which) { return kv_row(kv, s.pages[index], offset, which, head); };
    count = left < b.t1 - t ? left : b.t1 - t;
    b.runs[b.num_runs++] = {t, count, at(page, 0), at(page, 1), base + t + b.tokens < last ? at(page + b.tokens / kv.page_size, 0) : nullptr};
  }
}

// Dims [d, d + 2 W) (bf16: two to a word) or [d, d + W) of W keys, as rows of a strip.
template <int D>
TP_INLINE void load_dims(const char* const* keys, int64_t d, float* out) {
  vf r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    const auto* key = (const typename Element<D>::T*)keys[i] + d;
    r[i] = D == BF16 ? load((const float*)key) : Element<D>::load_vector(key);
  }
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    if (D == BF16) {
      store(out + (d + 2 * i) * KEYS, (vf)((vu)r[i] << 16));
      store(out + (d + 2 * i + 1) * KEYS, (vf)((vu)r[i] & 0xffff0000u));
    } else {
      store(out + (d + i) * KEYS, r[i]);
    }
  }
}

// The keys of tokens [t, t + KEYS) to the columns of [dim][KEYS]. Tokens outside [t0, t1) repeat a key: their scores are masked for every row.
template <int D>
static void load_keys(int64_t t, const AttendBlock& b) {
  const char* keys[KEYS];
  const int64_t begin = t > b.t0 ? t : b.t0, end = t + KEYS < b.t1 ? t + KEYS : b.t1;
  for (int64_t r = 0; r < b.num_runs; r++) {
    const Run& run = b.runs[r];
    const int64_t first = run.token > begin ? run.token : begin, stop = run.token + run.count < end ? run.token + run.count : end;
    for (int64_t i = first; i < stop; i++) keys[i - t] = run.keys + (i - run.token) * b.dim * (int64_t)sizeof(typename Element<D>::T);
  }
  for (int64_t i = 0; i < KEYS; i++)
    if (t + i < begin || t + i >= end) keys[i] = keys[begin - t];
  constexpr int64_t width = D == BF16 ? 2 * W : W;
  int64_t d = 0;
  for (; d + width <= b.dim; d += width)
    for (int64_t i = 0; i < KEYS; i += W) load_dims<D>(keys + i, d, b.keys + i);
  for (; d < b.dim; d++)
    for (int64_t i = 0; i < KEYS; i++) b.keys[d * KEYS + i] = Element<D>::get(((const typename Element<D>::T*)keys[i])[d]);
}

// Scores of MR rows from `row` on against the loaded keys, those of tokens from t on. Meanwhile KEYS values are prefetched.
template <int MR>
static void score_rows(int64_t row, int64_t t, const char* values, int64_t value_bytes, const AttendBlock& b) {
  using S = Sums<FP32, MR, KEYS / W>;
  S s;
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int n = 0; n < KEYS / W; n++) s.c[m][n] = zero();
  for (int64_t d = 0; d < b.dim; d += MAX_TILE) {
    const int64_t k = b.dim - d < MAX_TILE ? b.dim - d : MAX_TILE;
    const Ahead ahead = values ? Ahead{values + KEYS * d * value_bytes / b.dim, 2 * KEYS * value_bytes / b.dim} : Ahead{nullptr, 0};
    S::steps(s, b.q + (d / MAX_TILE * b.rows + row) * PACKED_LD, PACKED_LD, b.keys + d * KEYS, KEYS, k, ahead);
  }
  S::write(s, b.scores + row * b.padded_tokens + t, b.padded_tokens);
}

// scores = q @ keys for the tokens of the block.
template <int D>
static void score_block(const AttendBlock& b) {
  using Fn = void (*)(int64_t, int64_t, const char*, int64_t, const AttendBlock&);
  static const Fn table[] = {score_rows<1>, score_rows<2>, score_rows<3>, score_rows<4>, score_rows<5>, score_rows<6>,
#if TP_ISA == 2
                             score_rows<7>, score_rows<8>, score_rows<9>, score_rows<10>, score_rows<11>, score_rows<12>,
#endif
  };
  const int64_t value_bytes = b.dim * sizeof(typename Element<D>::T);
  for (int64_t t = b.t0 / KEYS * KEYS, r = 0; t < b.t1; t += KEYS) {
    load_keys<D>(t, b);
    while (r + 1 < b.num_runs && b.runs[r + 1].token <= t) r++;
    const char* values = b.runs[r].values + (t > b.runs[r].token ? t - b.runs[r].token : 0) * value_bytes;
    for (int64_t row = 0, count; row < b.rows; row += count) {
      count = rows_at_once(b.rows - row);
      table[count - 1](row, t, row ? nullptr : values, value_bytes, b);
    }
  }
}

// Scores to probabilities in place, for one row that sees tokens [lo, hi) of the block; rescales the row's sums.
static void softmax_row(const AttendArgs& a, AttendBlock& b, int64_t row, int64_t lo, int64_t hi) {
  float *s = b.scores + row * b.padded_tokens, *sums = b.sums + row * b.padded_dim, peaks[16];
  const int64_t padded = b.padded_tokens;
  for (int64_t t = 0; t < padded; t += W) {
    vf v = load(s + t) * splat(a.scale);
    if (a.softcap != 0.0f) v = splat(a.softcap) * vtanh(v / splat(a.softcap));
    store(s + t, v);
  }
  for (int64_t t = 0; t < lo; t++) s[t] = MASKED;
  for (int64_t t = hi; t < padded; t++) s[t] = MASKED;
  vf top = splat(MASKED);
  for (int64_t t = 0; t < padded; t += W) top = vmax(load(s + t), top);
  store(peaks, top);
  float peak = b.peak[row];
  for (int i = 0; i < W; i++) peak = peaks[i] > peak ? peaks[i] : peak;
  float parts[16] = {};  // sixteen lanes on every instruction set
  for (int64_t t = 0; t < padded; t += 16)
    for (int j = 0; j < 16; j += W) {
      const vf v = load(s + t + j), p = v == splat(MASKED) ? zero() : vexp(v - splat(peak));
      store(s + t + j, p);
      store(parts + j, load(parts + j) + p);
    }
  for (int half = 8; half; half /= 2)
    for (int j = 0; j < half; j++) parts[j] += parts[j + half];
  const float before = b.peak[row];
  if (before != peak) {
    float lanes[16];
    store(lanes, vexp(splat(before - peak)));
    const float shrink = before == MASKED ? 0.0f : lanes[0];
    b.total[row] *= shrink;
    for (int64_t d = 0; d < b.padded_dim; d += W) store(sums + d, load(sums + d) * splat(shrink));
  }
  b.total[row] += parts[0];
  b.peak[row] = peak;
}

// sums [MR][dim] += probabilities @ values, run by run; meanwhile the next block's keys are prefetched.
template <int D, int MR, int NV>
TP_INLINE void value_columns(int64_t row, int64_t column, const AttendBlock& b) {
  using S = Sums<D, MR, NV>;
  using T = typename Element<D>::T;
  constexpr int64_t bytes = NV * W * sizeof(T);
  float* sums = b.sums + row * b.padded_dim + column;
  S s;
  S::read(s, sums, b.padded_dim);
  for (int64_t r = 0; r < b.num_runs; r++) {
    const Run& run = b.runs[r];
    const Ahead ahead = row == 0 && run.next_keys ? Ahead{run.next_keys + column * run.count * (int64_t)sizeof(T), 2 * bytes} : Ahead{nullptr, 0};
    S::steps(s, b.scores + row * b.padded_tokens + run.token, b.padded_tokens, (const T*)run.values + column, b.dim, run.count, ahead);
  }
  S::write(s, sums, b.padded_dim);
}

template <int D, int MR>
static void value_rows(int64_t row, const AttendBlock& b) {
  constexpr int NV = vectors_of(MR);
  int64_t column = 0;
  for (; column + NV * W <= b.dim; column += NV * W) value_columns<D, MR, NV>(row, column, b);
  for (; NV > 2 && column + 2 * W <= b.dim; column += 2 * W) value_columns<D, MR, 2>(row, column, b);
  if (column + W <= b.dim) {
    value_columns<D, MR, 1>(row, column, b);
    column += W;
  }
  if (column == b.dim) return;
  using S = Sums<FP32, MR, 1>;  // the last columns, of a head size that is no multiple of W, from a converted copy
  S s;
  S::read(s, b.sums + row * b.padded_dim + column, b.padded_dim);
  S::steps(s, b.scores + row * b.padded_tokens + b.t0, b.padded_tokens, b.tail + b.t0 * W, W, b.t1 - b.t0, {nullptr, 0});
  S::write(s, b.sums + row * b.padded_dim + column, b.padded_dim);
}

template <int D>
static void convert_tail(const AttendBlock& b) {
  const int64_t column = b.dim / W * W;
  for (int64_t r = 0; r < b.num_runs; r++)
    for (int64_t i = 0; i < b.runs[r].count; i++) {
      const auto* value = (const typename Element<D>::T*)b.runs[r].values + i * b.dim;
      for (int64_t j = 0; j < W; j++) b.tail[(b.runs[r].token + i) * W + j] = column + j < b.dim ? Element<D>::get(value[column + j]) : 0.0f;
    }
}

template <int D>
static void add_values(const AttendBlock& b) {
  using Fn = void (*)(int64_t, const AttendBlock&);
  static const Fn table[] = {value_rows<D, 1>, value_rows<D, 2>, value_rows<D, 3>, value_rows<D, 4>, value_rows<D, 5>, value_rows<D, 6>,
#if TP_ISA == 2
                             value_rows<D, 7>, value_rows<D, 8>, value_rows<D, 9>, value_rows<D, 10>, value_rows<D, 11>, value_rows<D, 12>,
#endif
  };
  if (b.dim % W) convert_tail<D>(b);
  for (int64_t row = 0, count; row < b.rows; row += count) {
    count = rows_at_once(b.rows - row);
    table[count - 1](row, b);
  }
}

// All tokens that some row sees, block by block.
template <int D>
static void attend_tokens(const AttendArgs& a, const Sequence& s, int64_t kv_head, int64_t query0, int64_t query1, AttendBlock& b) {
  const int64_t context = s.kv_len - s.len, last = context + query1, first = a.window && context + query0 + 1 > a.window ? context + query0 + 1 - a.window : 0;
  for (int64_t base = first / b.tokens * b.tokens; base < last; base += b.tokens) {
    b.t0 = first > base ? first - base : 0;
    b.t1 = last - base < b.tokens ? last - base : b.tokens;
    find_runs(a.kv, s, kv_head, base, last, b);
    score_block<D>(b);
    for (int64_t r = 0; r < b.rows; r++) {
      const int64_t position = context + query0 + r / b.group, start = a.window && position + 1 > a.window ? position + 1 - a.window : 0;
      const int64_t lo = start > base ? start - base : 0, hi = position + 1 - base;
      softmax_row(a, b, r, lo < b.tokens ? lo : b.tokens, hi < 0 ? 0 : hi < b.tokens ? hi : b.tokens);
    }
    add_values<D>(b);
  }
}

static void attend_block(const AttendArgs& a, const Sequence& s, int64_t kv_head, int64_t query0, int64_t query1) {
  AttendBlock b = attend_layout(a, query1 - query0);
  const int64_t first_head = kv_head * b.group;
  for (int64_t r = 0; r < b.rows; r++) {
    const float* q = a.qkv + (s.row + query0 + r / b.group) * a.ld + (first_head + r % b.group) * b.dim;
    for (int64_t d = 0, tile = 0; d < b.dim; d += MAX_TILE, tile++) pack_rows(q + d, 0, 1, b.dim - d < MAX_TILE ? b.dim - d : MAX_TILE, b.q + (tile * b.rows + r) * PACKED_LD);
    b.peak[r] = MASKED;
    b.total[r] = 0.0f;
  }
  __builtin_memset(b.sums, 0, b.rows * b.padded_dim * sizeof(float));
  if (a.kv.dtype == BF16) attend_tokens<BF16>(a, s, kv_head, query0, query1, b);
  else if (a.kv.dtype == FP16) attend_tokens<FP16>(a, s, kv_head, query0, query1, b);
  else attend_tokens<FP32>(a, s, kv_head, query0, query1, b);
  for (int64_t r = 0; r < b.rows; r++) {
    float* out = a.dst + (s.row + query0 + r / b.group) * a.dst_ld + (first_head + r % b.group) * b.dim;
    if (a.kv.dtype == BF16) reorder<true>(b.sums + r * b.padded_dim, b.dim);
    for (int64_t d = 0; d < b.dim; d++) out[d] = b.sums[r * b.padded_dim + d] / b.total[r];
  }
}
