// ATTEND for some query tokens of one sequence and the query heads of one KV head. Included inside each instruction set's namespace.
// Online softmax over blocks of 64 tokens (or a page, if larger) that start at multiples of 64: the blocks that a row sees depend on its position only,
// and a block that is masked for a row leaves it as it is, so a row's bits do not depend on the rows that it is computed with.

constexpr float MASKED = -__builtin_inff();

struct AttendBlock {
  int64_t rows, group, dim, padded_dim, tokens, padded_tokens;  // rows = query tokens x heads of the group
  float *q, *keys, *scores, *sums, *peak, *total, *gemm;        // [rows][dim], [dim][padded_tokens], [rows][padded_tokens], [rows][padded_dim], [rows], [rows]
};

static AttendBlock attend_layout(const AttendArgs& a, int64_t queries) {
  AttendBlock b;
  b.group = a.heads / a.kv.kv_heads;
  b.rows = queries * b.group;
  b.dim = a.kv.head_dim;
  b.padded_dim = round_up(b.dim, MAX_STRIP);
  b.tokens = a.kv.page_size >= 64 ? a.kv.page_size : 64 / a.kv.page_size * a.kv.page_size;
  b.padded_tokens = round_up(b.tokens, MAX_STRIP);
  const int64_t scratch = gemm_scratch(b.dim) > gemm_scratch(b.padded_tokens) ? gemm_scratch(b.dim) : gemm_scratch(b.padded_tokens);
  const int64_t sizes[] = {round_up(b.rows * b.dim, 16), b.dim * b.padded_tokens, b.rows * b.padded_tokens, b.rows * b.padded_dim, round_up(b.rows, 16), round_up(b.rows, 16),
                           scratch};
  float** parts[] = {&b.q, &b.keys, &b.scores, &b.sums, &b.peak, &b.total, &b.gemm};
  int64_t floats = 0;
  for (int64_t size : sizes) floats += size;
  float* next = (float*)thread_scratch(floats * sizeof(float));
  for (int i = 0; i < 7; i++) {
    *parts[i] = next;
    next += sizes[i];
  }
  return b;
}

#if defined(__x86_64__)
TP_INLINE void transpose4(const float* src, int64_t src_ld, float* dst, int64_t dst_ld) {
  __m128 r0 = _mm_loadu_ps(src), r1 = _mm_loadu_ps(src + src_ld), r2 = _mm_loadu_ps(src + 2 * src_ld), r3 = _mm_loadu_ps(src + 3 * src_ld);
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  _mm_storeu_ps(dst, r0);
  _mm_storeu_ps(dst + dst_ld, r1);
  _mm_storeu_ps(dst + 2 * dst_ld, r2);
  _mm_storeu_ps(dst + 3 * dst_ld, r3);
}
#else
TP_INLINE void transpose4(const float* src, int64_t src_ld, float* dst, int64_t dst_ld) {
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) dst[j * dst_ld + i] = src[i * src_ld + j];
}
#endif

// The value that follows this key, and the key of the next block.
TP_INLINE void prefetch_token(const KvArgs& kv, const Sequence& s, int64_t head, int64_t token, int64_t block) {
  const int64_t bytes = kv.head_dim * dtype_bytes(kv.dtype), next = token + block;
  const char* value = kv_row(kv, s.pages[token / kv.page_size], token % kv.page_size, 1, head);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(value + i);
  if (next >= s.kv_len) return;
  const char* key = kv_row(kv, s.pages[next / kv.page_size], next % kv.page_size, 0, head);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(key + i);
}

// Keys of tokens [t0, t1) of the block that starts at `base`, converted and transposed to [dim][padded_tokens]. Other columns keep
// what they held: a column's score is masked for every row that does not see its token.
template <int D>
static void load_keys(const KvArgs& kv, const Sequence& s, int64_t head, int64_t base, int64_t t0, int64_t t1, AttendBlock& b) {
  const int64_t dim = b.dim, ld = b.padded_tokens;
  float* staged = b.gemm;  // 4 rows; free until the product
  for (int64_t t = t0 / 4 * 4; t < t1; t += 4) {
    for (int64_t i = 0; i < 4; i++) {
      float* out = staged + i * dim;
      if (t + i < t0 || t + i >= t1) {
        __builtin_memset(out, 0, dim * sizeof(float));
        continue;
      }
      const int64_t token = base + t + i;
      const auto* key = (const typename Element<D>::T*)kv_row(kv, s.pages[token / kv.page_size], token % kv.page_size, 0, head);
      prefetch_token(kv, s, head, token, b.tokens);
      int64_t d = 0;
      for (; d + W <= dim; d += W) store(out + d, Element<D>::load_vector(key + d));
      for (; d < dim; d++) out[d] = Element<D>::get(key[d]);
    }
    int64_t d = 0;
    for (; d + 4 <= dim; d += 4) transpose4(staged + d, dim, b.keys + d * ld + t, ld);
    for (; d < dim; d++)
      for (int64_t i = 0; i < 4; i++) b.keys[d * ld + t + i] = staged[i * dim + d];
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

// sums += probabilities @ values, page by page: the chain goes on from page to page in ascending tokens.
static void add_values(const KvArgs& kv, const Sequence& s, int64_t head, int64_t base, int64_t t0, int64_t t1, AttendBlock& b) {
  for (int64_t t = t0; t < t1;) {
    const int64_t token = base + t, offset = token % kv.page_size, count = kv.page_size - offset < t1 - t ? kv.page_size - offset : t1 - t;
    const char* values = kv_row(kv, s.pages[token / kv.page_size], offset, 1, head);
    gemm_any(kv.dtype, b.scores + t, b.padded_tokens, b.rows, values, b.dim, count, b.dim, b.sums, b.padded_dim, {count, 0}, b.gemm);
    t += count;
  }
}

static void attend_block(const AttendArgs& a, const Sequence& s, int64_t kv_head, int64_t query0, int64_t query1) {
  AttendBlock b = attend_layout(a, query1 - query0);
  const int64_t first_head = kv_head * b.group, context = s.kv_len - s.len;
  for (int64_t r = 0; r < b.rows; r++) {
    __builtin_memcpy(b.q + r * b.dim, a.qkv + (s.row + query0 + r / b.group) * a.ld + (first_head + r % b.group) * b.dim, b.dim * sizeof(float));
    b.peak[r] = MASKED;
    b.total[r] = 0.0f;
  }
  __builtin_memset(b.sums, 0, b.rows * b.padded_dim * sizeof(float));
  const int64_t last = context + query1;  // tokens [first, last) are seen by some row
  const int64_t first = a.window && context + query0 + 1 > a.window ? context + query0 + 1 - a.window : 0;
  for (int64_t base = first / b.tokens * b.tokens; base < last; base += b.tokens) {
    const int64_t t0 = first > base ? first - base : 0, t1 = last - base < b.tokens ? last - base : b.tokens;
    if (a.kv.dtype == BF16) load_keys<BF16>(a.kv, s, kv_head, base, t0, t1, b);
    else if (a.kv.dtype == FP16) load_keys<FP16>(a.kv, s, kv_head, base, t0, t1, b);
    else load_keys<FP32>(a.kv, s, kv_head, base, t0, t1, b);
    __builtin_memset(b.scores, 0, b.rows * b.padded_tokens * sizeof(float));
    gemm<FP32>(b.q, b.dim, b.rows, b.keys, b.padded_tokens, b.dim, b.padded_tokens, b.scores, b.padded_tokens, {b.dim, 0}, b.gemm);
    for (int64_t r = 0; r < b.rows; r++) {
      const int64_t position = context + query0 + r / b.group, start = a.window && position + 1 > a.window ? position + 1 - a.window : 0;
      const int64_t lo = start > base ? start - base : 0, hi = position + 1 - base;
      softmax_row(a, b, r, lo < b.tokens ? lo : b.tokens, hi < 0 ? 0 : hi < b.tokens ? hi : b.tokens);
    }
    add_values(a.kv, s, kv_head, base, t0, t1, b);
  }
  for (int64_t r = 0; r < b.rows; r++) {
    float* out = a.dst + (s.row + query0 + r / b.group) * a.dst_ld + (first_head + r % b.group) * b.dim;
    for (int64_t d = 0; d < b.dim; d++) out[d] = b.sums[r * b.padded_dim + d] / b.total[r];
  }
}
