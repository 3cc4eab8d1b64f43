// ATTEND over int8 KV: exact integer dot products. Included inside each instruction set's namespace, after attend.h, whose blocks and softmax it shares.
// A query is rounded to 16 bits, once; a score is its dot product with a key's codes, times the key's scale and the query's. A block's probabilities, each
// times its value's scale, are rounded to 16 bits of the block's largest; what the block adds to a sum is their dot product with the values' codes, times one
// scale. So a row's bits depend on its position only: neither on the rows that it is computed with nor on the instruction set (where it has fused multiply-adds).

struct Int8Block {
  AttendBlock b;
  int16_t *q, *weights;               // [rows][padded_dim], [rows][BLOCK]
  float *q_scales, *weight_scales;    // [rows]
  float *key_scales, *value_scales;   // [BLOCK]; 0 of tokens that no row sees
};

#if TP_ISA == 2
TP_INLINE __m256i load_codes(const char* p) { return _mm256_loadu_si256((const __m256i*)p); }
TP_INLINE vi widened(const char* p) { return (vi)_mm512_cvtepi8_epi16(load_codes(p)); }
TP_INLINE void widened_pairs(const char* p, const char* q, vi& low, vi& high) {
  const __m256i a = load_codes(p), b = load_codes(q);
  low = (vi)_mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(a, b));
  high = (vi)_mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(a, b));
}
TP_INLINE void in_order(vi& low, vi& high) {  // unpacked were groups of eight, in turn
  constexpr vi first = LANE + (LANE & 8);
  const vi a = __builtin_shuffle(low, high, first), b = __builtin_shuffle(low, high, first + 8);
  low = a;
  high = b;
}
#elif TP_ISA == 1
TP_INLINE __m128i load_codes(const char* p) { return _mm_loadu_si128((const __m128i*)p); }
TP_INLINE vi widened(const char* p) { return (vi)_mm256_cvtepi8_epi16(load_codes(p)); }
TP_INLINE void widened_pairs(const char* p, const char* q, vi& low, vi& high) {
  const __m128i a = load_codes(p), b = load_codes(q);
  low = (vi)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
  high = (vi)_mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
}
TP_INLINE void in_order(vi&, vi&) {}
#else
TP_INLINE vi widened(const char* p) {
  vi v;
  for (int i = 0; i < W; i++) v[i] = (int32_t)((uint32_t)(uint16_t)(int8_t)p[2 * i] | (uint32_t)(uint16_t)(int8_t)p[2 * i + 1] << 16);
  return v;
}
TP_INLINE void widened_pairs(const char* p, const char* q, vi& low, vi& high) {
  char pairs[4 * W];
  for (int i = 0; i < 2 * W; i++) {
    pairs[2 * i] = p[i];
    pairs[2 * i + 1] = q[i];
  }
  low = widened(pairs);
  high = widened(pairs + 2 * W);
}
TP_INLINE void in_order(vi&, vi&) {}
#endif

// ---- a few scores: SCORE_KEYS neighbouring keys times up to SCORE_ROWS rows, as sums of lanes in registers

#if TP_ISA == 2
constexpr int SCORE_KEYS = 4;
TP_INLINE __m512i added(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
// Lanes [m * 4 + n]: the sum of c[n][m].
template <int MR>
TP_INLINE vi add_lanes_of(const vi (&c)[SCORE_KEYS][MR]) {
  __m512i rows[SCORE_ROWS];
#pragma GCC unroll 4
  for (int m = 0; m < SCORE_ROWS; m++) {
    const int r = m < MR ? m : 0;
    const __m512i k0 = (__m512i)c[0][r], k1 = (__m512i)c[1][r], k2 = (__m512i)c[2][r], k3 = (__m512i)c[3][r];
    const __m512i a = added(_mm512_unpacklo_epi32(k0, k1), _mm512_unpackhi_epi32(k0, k1)), b = added(_mm512_unpacklo_epi32(k2, k3), _mm512_unpackhi_epi32(k2, k3));
    rows[m] = added(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));  // in each quarter of the register the four keys
  }
  const __m512i a = added(_mm512_shuffle_i32x4(rows[0], rows[1], 0x88), _mm512_shuffle_i32x4(rows[0], rows[1], 0xdd));
  const __m512i b = added(_mm512_shuffle_i32x4(rows[2], rows[3], 0x88), _mm512_shuffle_i32x4(rows[2], rows[3], 0xdd));
  return (vi)added(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}
TP_INLINE vf repeated(const float* four) { return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(four)); }
template <int MR>
TP_INLINE void store_scores(vf v, float* scores) {
  const __m512 s = (__m512)v;
  _mm_storeu_ps(scores, _mm512_castps512_ps128(s));
  if (MR > 1) _mm_storeu_ps(scores + BLOCK, _mm512_extractf32x4_ps(s, 1));
  if (MR > 2) _mm_storeu_ps(scores + 2 * BLOCK, _mm512_extractf32x4_ps(s, 2));
  if (MR > 3) _mm_storeu_ps(scores + 3 * BLOCK, _mm512_extractf32x4_ps(s, 3));
}
#elif TP_ISA == 1
constexpr int SCORE_KEYS = 2;
TP_INLINE __m256i added(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
// Lanes [m * 2 + n]: the sum of c[n][m].
template <int MR>
TP_INLINE vi add_lanes_of(const vi (&c)[SCORE_KEYS][MR]) {
  __m256i rows[SCORE_ROWS];
#pragma GCC unroll 4
  for (int m = 0; m < SCORE_ROWS; m++) {
    const __m256i k0 = (__m256i)c[0][m < MR ? m : 0], k1 = (__m256i)c[1][m < MR ? m : 0];
    rows[m] = added(_mm256_unpacklo_epi32(k0, k1), _mm256_unpackhi_epi32(k0, k1));  // in each half of the register both keys, twice
  }
  const __m256i a = added(_mm256_unpacklo_epi64(rows[0], rows[1]), _mm256_unpackhi_epi64(rows[0], rows[1]));
  const __m256i b = added(_mm256_unpacklo_epi64(rows[2], rows[3]), _mm256_unpackhi_epi64(rows[2], rows[3]));
  return (vi)added(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}
TP_INLINE vf repeated(const float* two) {
  double both;
  __builtin_memcpy(&both, two, sizeof both);
  return (vf)_mm256_set1_pd(both);
}
template <int MR>
TP_INLINE void store_scores(vf v, float* scores) {
  const __m128 low = _mm256_castps256_ps128((__m256)v), high = _mm256_extractf128_ps((__m256)v, 1);
  _mm_storel_pi((__m64*)scores, low);
  if (MR > 1) _mm_storeh_pi((__m64*)(scores + BLOCK), low);
  if (MR > 2) _mm_storel_pi((__m64*)(scores + 2 * BLOCK), high);
  if (MR > 3) _mm_storeh_pi((__m64*)(scores + 3 * BLOCK), high);
}
#else
constexpr int SCORE_KEYS = 1;
template <int MR>
TP_INLINE vi add_lanes_of(const vi (&c)[SCORE_KEYS][MR]) {
  vi sums = {};
  for (int m = 0; m < MR; m++) sums[m] = sum_lanes(c[0][m]);
  return sums;
}
TP_INLINE vf repeated(const float* one) { return splat(*one); }
template <int MR>
TP_INLINE void store_scores(vf v, float* scores) {
  for (int m = 0; m < MR; m++) scores[m * BLOCK] = v[m];
}
#endif

// One block per KV head.
static void int8_layout(const AttendArgs& a, int64_t queries, int64_t heads, Int8Block* blocks) {
  float* memory = nullptr;
  for (int64_t h = 0; h < heads; h++) {
    Int8Block& x = blocks[h];
    AttendBlock& b = x.b = attend_sizes(a, queries);
    float *q, *weights;
    const int64_t copied = used_in_place(a.kv) ? 0 : 2 * BLOCK * b.padded_dim / 4, rows = round_up(b.rows, 16);
    const Part parts[] = {{&q, b.rows * b.padded_dim / 2}, {&weights, b.rows * BLOCK / 2}, {&b.scores, b.rows * BLOCK}, {&b.sums, b.rows * b.padded_dim},
                          {&b.peak, rows}, {&b.total, rows}, {&x.q_scales, rows}, {&x.weight_scales, rows}, {&x.key_scales, BLOCK}, {&x.value_scales, BLOCK},
                          {&b.copy, copied}};
    const int64_t floats = floats_of(parts);
    if (h == 0) memory = (float*)thread_scratch(heads * floats * sizeof(float));
    place(parts, memory + h * floats);
    if (!copied) b.copy = nullptr;
    x.q = (int16_t*)q;
    x.weights = (int16_t*)weights;
  }
}

// ---- where a block lies

// The scales of its tokens, `which` 0 of keys, 1 of values; those of the next block are prefetched.
static void read_scales(const KvArgs& kv, const Sequence& s, int64_t which, int64_t head, int64_t base, int64_t last, const AttendBlock& b, float* scales) {
  const int64_t line = which * kv.kv_heads + head;
  auto place = [&](int64_t token) { return kv.base + s.pages[token / kv.page_size] * kv.page_stride + kv.scale_at(line, token % kv.page_size); };
  __builtin_memset(scales, 0, BLOCK * sizeof *scales);
  for (int64_t t = b.t0, count; t < b.t1; t += count) {
    const int64_t left = kv.page_size - (base + t) % kv.page_size;
    count = left < b.t1 - t ? left : b.t1 - t;
    __builtin_memcpy(scales + t, place(base + t), count * sizeof *scales);
    if (base + t + BLOCK < last) __builtin_prefetch(place(base + t + BLOCK), 0, 2);
  }
}

// The tokens that some row sees, as rows of whole chunks.
static void copy_codes(const KvArgs& kv, const Sequence& s, int64_t head, int64_t base, AttendBlock& b) {
  char* copy = (char*)b.copy;
  b.row_bytes = b.padded_dim;
  for (int64_t which = 0; which < 2; which++)
    for (int64_t t = b.t0; t < b.t1; t++) {
      char* out = copy + (which * BLOCK + t) * b.row_bytes;
      __builtin_memcpy(out, token_row(kv, s, base + t, which, head), b.dim);
      __builtin_memset(out + b.dim, 0, b.padded_dim - b.dim);
    }
  for (int64_t i = 0; i < QUARTERS; i++) {
    b.keys[i] = copy + i * QUARTER * b.row_bytes;
    b.values[i] = b.keys[i] + BLOCK * b.row_bytes;
    b.next_keys[i] = nullptr;
  }
}

// ---- rounding

constexpr float LARGEST = 32767.0f;

// Codes of 16 bits, so that no dot product with a key's codes overflows; the scale that brings them back.
static float round_query(const float* x, int64_t dim, float factor, int16_t* codes) {
  const float room = 2147480000.0f / (127.0f * (float)dim), limit = room < LARGEST ? __builtin_floorf(room) : LARGEST, magic = 12582912.0f;
  float top = 0.0f;
  for (int64_t d = 0; d < dim; d++) {
    const float magnitude = __builtin_fabsf(x[d] * factor);
    top = magnitude > top || magnitude != magnitude ? magnitude : top;
  }
  if (!(top >= 1e-30f && top <= 3.4028235e38f)) {
    __builtin_memset(codes, 0, dim * sizeof *codes);
    return top < 1e-30f ? 0.0f : bits_float(0x7fc00000);
  }
  const float inverse = limit / top;
  for (int64_t d = 0; d < dim; d++) codes[d] = (int16_t)((x[d] * factor * inverse + magic) - magic);
  return top / limit;
}

// The same for what a row's block adds: probabilities times the values' scales, none of them negative.
static float round_weights(const float* p, const float* scales, int16_t* codes) {
  constexpr int N = BLOCK / W;
  typedef int16_t halves __attribute__((vector_size(W * 2)));
  const float magic = 12582912.0f;
  vf w[N], most = zero(), sum = zero();
  for (int i = 0; i < N; i++) {
    w[i] = load(p + i * W) * load(scales + i * W);
    most = vmax(w[i], most);
    sum = sum + w[i];
  }
  const float top = fold_lanes(most, vmax)[0], total = fold_lanes(sum, [](vf a, vf b) { return a + b; })[0];
  if (!(total <= 3.4028235e38f) || top < 1e-30f) {
    __builtin_memset(codes, 0, BLOCK * sizeof *codes);
    return total <= 3.4028235e38f ? 0.0f : bits_float(0x7fc00000);
  }
  const vf inverse = splat(LARGEST / top);
  for (int i = 0; i < N; i++) {
    const vi whole = (vi)(w[i] * inverse + splat(magic)) - (int32_t)float_bits(magic);
    const halves h = __builtin_convertvector(whole, halves);
    __builtin_memcpy(codes + i * W, &h, sizeof h);
  }
  return top / LARGEST;
}

// ---- scores

// Of MR rows from `row` on. The first rows prefetch the values of as many tokens as they score, of all quarters in turn.
template <int MR>
static void score_codes(int64_t row, const Int8Block& x) {
  constexpr int NK = SCORE_KEYS;
  const AttendBlock& b = x.b;
  const int16_t* q = x.q + row * b.padded_dim;
  vf q_scales;
  for (int i = 0; i < W; i++) q_scales[i] = x.q_scales[row + (i / NK < MR ? i / NK : 0)];
  const int64_t first = b.t0 / NK * NK, last = round_up(b.t1, NK);
  for (int64_t t = first; t < last; t += NK) {
    if (row == 0 && !b.copy) prefetch_rows(b.values, t - first, t - first + NK, b.row_bytes);
    const char* keys = b.keys[(uint64_t)t / QUARTER] + (int64_t)((uint64_t)t % QUARTER) * b.row_bytes;
    vi c[NK][MR] = {};
    for (int64_t d = 0; d < b.padded_dim; d += PAIR) {
      vi key[NK];
#pragma GCC unroll 4
      for (int n = 0; n < NK; n++) key[n] = widened(keys + n * b.row_bytes + d);
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) {
        const vi code = load_words((const char*)(q + m * b.padded_dim + d));
#pragma GCC unroll 4
        for (int n = 0; n < NK; n++) {
          c[n][m] = add_pairs(c[n][m], key[n], code);
          pin(c[n][m]);
        }
      }
    }
    store_scores<MR>(__builtin_convertvector(add_lanes_of<MR>(c), vf) * repeated(x.key_scales + t) * q_scales, b.scores + row * BLOCK + t);
  }
}

static void score_block_int8(const Int8Block& x) {
  using Fn = void (*)(int64_t, const Int8Block&);
  static const Fn table[SCORE_ROWS] = {score_codes<1>, score_codes<2>, score_codes<3>, score_codes<4>};
  for (int64_t row = 0, count; row < x.b.rows; row += count) {
    const int64_t left = x.b.rows - row;
    count = left / ((left + SCORE_ROWS - 1) / SCORE_ROWS);  // as even as possible
    table[count - 1](row, x);
  }
}

// ---- values

constexpr int VALUE_ROWS = TP_ISA == 2 ? 8 : 4;                                    // rows that share one load of values
constexpr int value_chunks(int rows) { return rows <= (TP_ISA == 2 ? 4 : 2) ? 2 : 1; }  // loads that share one of weights: as many sums as registers hold

TP_INLINE void add_weighted(vi& c0, vi& c1, vi low, vi high, const int16_t* weights) {
#if TP_ISA == 1
  step_pairs(c0, c1, low, high, (const char*)weights);
#else
  const vi pair = splat_word((const char*)weights);
  c0 = add_pairs(c0, low, pair);
  c1 = add_pairs(c1, high, pair);
  pin(c0);
  pin(c1);
#endif
}

// sums [MR][NC chunks] += weights @ values, two tokens at a time: one that no row sees has weight 0. Prefetches as `value_columns`.
template <int MR, int NC>
TP_INLINE void code_columns(int64_t row, int64_t column, int64_t from, int64_t to, const Int8Block& x) {
  const AttendBlock& b = x.b;
  vi c[MR][NC][2] = {};
  for (int64_t i = b.t0 / QUARTER; i * QUARTER < b.t1; i++) {
    const int64_t first = b.t0 > i * QUARTER ? b.t0 & ~(int64_t)1 : i * QUARTER, end = b.t1 < (i + 1) * QUARTER ? b.t1 : (i + 1) * QUARTER;
    if (row == 0) prefetch_rows(b.next_keys, from + (to - from) * i / QUARTERS, from + (to - from) * (i + 1) / QUARTERS, b.row_bytes);
    const char* v = b.values[i] + (first - i * QUARTER) * b.row_bytes + column;
    const int16_t* w = x.weights + row * BLOCK + first;
    for (int64_t t = first; t < end; t += 2, v += 2 * b.row_bytes, w += 2) {
#pragma GCC unroll 2
      for (int n = 0; n < NC; n++) {
        vi low, high;
        widened_pairs(v + n * PAIR, v + b.row_bytes + n * PAIR, low, high);
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) add_weighted(c[m][n][0], c[m][n][1], low, high, w + m * BLOCK);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++) {
    const vf scale = splat(x.weight_scales[row + m]);
#pragma GCC unroll 2
    for (int n = 0; n < NC; n++) {
      in_order(c[m][n][0], c[m][n][1]);
      for (int half = 0; half < 2; half++) {
        float* sums = b.sums + (row + m) * b.padded_dim + column + n * PAIR + half * W;
        store(sums, fma(__builtin_convertvector(c[m][n][half], vf), scale, load(sums)));
      }
    }
  }
}

template <int MR>
static void code_rows(int64_t row, const Int8Block& x) {
  constexpr int NC = value_chunks(MR);
  const int64_t dim = x.b.padded_dim;
  auto share = [&](int64_t column) { return BLOCK * column / dim; };
  int64_t column = 0;
  for (; column + NC * PAIR <= dim; column += NC * PAIR) code_columns<MR, NC>(row, column, share(column), share(column + NC * PAIR), x);
  for (; column < dim; column += PAIR) code_columns<MR, 1>(row, column, share(column), share(column + PAIR), x);
}

static void add_values_int8(const Int8Block& x) {
  using Fn = void (*)(int64_t, const Int8Block&);
  static const Fn table[] = {code_rows<1>, code_rows<2>, code_rows<3>, code_rows<4>,
#if TP_ISA == 2
                             code_rows<5>, code_rows<6>, code_rows<7>, code_rows<8>,
#endif
  };
  for (int64_t row = 0, count; row < x.b.rows; row += count) {
    const int64_t left = x.b.rows - row;
    count = left / ((left + VALUE_ROWS - 1) / VALUE_ROWS);
    table[count - 1](row, x);
  }
}

// ---- a chunk

// One head's part of a block. What is read next are the keys of the head behind it, or those of the first head `back` heads before it, a block on.
static void attend_codes(const AttendArgs& a, const Sequence& s, int64_t kv_head, int64_t back, bool ends, int64_t query0, const BlockSpan& span, Int8Block& x) {
  AttendBlock& b = x.b;
  b.t0 = span.t0;
  b.t1 = span.t1;
  if (b.copy) {
    copy_codes(a.kv, s, kv_head, span.base, b);
  } else {
    find_quarters(a.kv, s, kv_head, span.base, span.last, b);
    if (span.is_first && back == 0) prefetch_rows(b.keys, 0, BLOCK, b.row_bytes);
    const int64_t head_bytes = a.kv.page_size * b.row_bytes;
    for (int64_t i = 0; i < QUARTERS; i++)
      if (!ends) b.next_keys[i] = b.keys[i] + head_bytes;
      else if (b.next_keys[i]) b.next_keys[i] -= back * head_bytes;
  }
  read_scales(a.kv, s, 0, kv_head, span.base, span.last, b, x.key_scales);
  read_scales(a.kv, s, 1, kv_head, span.base, span.last, b, x.value_scales);
  score_block_int8(x);
  softmax_block(a, s, query0, span.base, b);
  for (int64_t r = 0; r < b.rows; r++) x.weight_scales[r] = round_weights(b.scores + r * BLOCK, x.value_scales, x.weights + r * BLOCK);
  add_values_int8(x);
}

static void attend_int8(const AttendArgs& a, const Sequence& s, int64_t kv_head0, int64_t kv_head1, int64_t query0, int64_t query1) {
  Int8Block blocks[ATTEND_HEADS];
  const int64_t heads = kv_head1 - kv_head0;
  int8_layout(a, query1 - query0, heads, blocks);
  const float factor = query_scale(a);
  for (int64_t h = 0; h < heads; h++) {
    AttendBlock& b = blocks[h].b;
    clear_rows(b);
    for (int64_t r = 0; r < b.rows; r++) {
      int16_t* q = blocks[h].q + r * b.padded_dim;
      blocks[h].q_scales[r] = round_query(query_of(a, s, b, kv_head0 + h, query0, r), b.dim, factor, q);
      __builtin_memset(q + b.dim, 0, (b.padded_dim - b.dim) * sizeof *q);
    }
  }
  each_block(a, s, query0, query1, [&](const BlockSpan& span) {
    for (int64_t h = 0; h < heads; h++) attend_codes(a, s, kv_head0 + h, h, h + 1 == heads, query0, span, blocks[h]);
  });
  for (int64_t h = 0; h < heads; h++) finish_rows(a, s, blocks[h].b, kv_head0 + h, query0);
}

// Query tokens [query0, query1) of a sequence, and the query heads of KV heads [kv_head0, kv_head1), at most ATTEND_HEADS.
static void attend_block(const AttendArgs& a, const Sequence& s, int64_t kv_head0, int64_t kv_head1, int64_t query0, int64_t query1) {
  if (a.kv.dtype == INT8) return attend_int8(a, s, kv_head0, kv_head1, query0, query1);
  for (int64_t head = kv_head0; head < kv_head1; head++) attend_floats(a, s, head, query0, query1);
}
