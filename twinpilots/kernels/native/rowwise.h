// EMBED, NORM, ADD and ROPE_APPEND, one row at a time. Included inside each instruction set's namespace.

// Sums over a row are kept in eight double lanes, added in a fixed order: the same bits on every instruction set.
TP_INLINE double fold8(const double* s) { return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])); }

static double sum_row(const float* x, int64_t n) {
  double s[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; j++) s[j] += x[i + j];
  for (int j = 0; i < n; i++, j++) s[j] += x[i];
  return fold8(s);
}
static double square_row(const float* x, int64_t n, float mean) {
  double s[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; j++) {
      const double d = x[i + j] - mean;
      s[j] += d * d;
    }
  for (int j = 0; i < n; i++, j++) {
    const double d = x[i] - mean;
    s[j] += d * d;
  }
  return fold8(s);
}

static void norm_row(float* dst, const float* src, const float* gain, const float* bias, int64_t width, int kind, float eps) {
  const float mean = kind == LAYER ? (float)(sum_row(src, width) / width) : 0.0f;
  const float inverse = (float)(1.0 / __builtin_sqrt(square_row(src, width, mean) / width + eps));
  for (int64_t i = 0; i < width; i++) {
    float v = (src[i] - mean) * inverse;
    if (gain) v *= gain[i];
    if (bias) v += bias[i];
    dst[i] = v;
  }
}

static void add_row(float* x, const float* p, const float* q, const float* bias, const float* gain, const float* gain_bias, int64_t width, int kind, float eps) {
  float* t = (float*)thread_scratch(width * sizeof(float));
  __builtin_memset(t, 0, width * sizeof(float));
  for (int64_t i = 0; p && i < width; i++) t[i] = p[i];
  for (int64_t i = 0; q && i < width; i++) t[i] += q[i];
  for (int64_t i = 0; bias && i < width; i++) t[i] += bias[i];
  if (gain) norm_row(t, t, gain, gain_bias, width, kind, eps);
  for (int64_t i = 0; i < width; i++) x[i] += t[i];
}

template <int D>
static void gather(float* dst, const void* table_, int64_t first, int64_t stride, int64_t width) {
  const auto* table = (const typename Element<D>::T*)table_ + first;
  for (int64_t i = 0; i < width; i++) dst[i] = Element<D>::get(table[i * stride]);
}
static void gather_any(int dtype, float* dst, const void* table, int64_t first, int64_t stride, int64_t width) {
  if (dtype == BF16) return gather<BF16>(dst, table, first, stride, width);
  if (dtype == FP16) return gather<FP16>(dst, table, first, stride, width);
  gather<FP32>(dst, table, first, stride, width);
}

static void embed_row(float* dst, const EmbedArgs& a, int64_t token, int64_t position) {
  if (a.layout == 0) {
    gather_any(a.dtype, dst, a.table, token * a.width, 1, a.width);
  } else {
    const int64_t first = token / a.unit_rows * a.unit_rows, outputs = a.vocab - first < a.unit_rows ? a.vocab - first : a.unit_rows;
    if (is_quantized(a.dtype)) {
      quant_column(a.dtype, (const char*)a.table + weight_bytes(a.dtype, first * a.width), outputs, token - first, a.width, dst);
    } else {
      gather_any(a.dtype, dst, a.table, first * a.width + token - first, outputs, a.width);
    }
  }
  for (int64_t i = 0; i < a.width; i++) dst[i] *= a.scale;
  if (!a.pos_table) return;
  float* t = (float*)thread_scratch(a.width * sizeof(float));
  gather_any(a.pos_dtype, t, a.pos_table, position * a.width, 1, a.width);
  for (int64_t i = 0; i < a.width; i++) dst[i] += t[i];
}

TP_INLINE char* kv_row(const KvArgs& kv, int64_t page, int64_t offset, int64_t which, int64_t head) {
  return kv.base + page * kv.page_stride + kv.row_at(which * kv.kv_heads + head, offset);
}

// Rotate-half on the first rotary_dim dims; products are rounded before they are added, as the reference does.
static void rotate(float* x, const float* cos, const float* sin, int64_t rotary_dim) {
  const int64_t half = rotary_dim / 2;
  for (int64_t i = 0; i < half; i++) {
    const float lo = x[i], hi = x[i + half];
    x[i] = lo * cos[i] - hi * sin[i];
    x[i + half] = hi * cos[i] + lo * sin[i];
  }
}

template <int D>
static void put_row(char* dst_, const float* src, int64_t n) {
  auto* dst = (typename Element<D>::T*)dst_;
  for (int64_t i = 0; i < n; i++) dst[i] = Element<D>::put(src[i]);
}
// Codes and the scale that brings them back: largest magnitude / 127; not a number where the row holds something that is not finite.
static float put_codes(int8_t* dst, const float* src, int64_t n) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
  float top = 0.0f;
  for (int64_t i = 0; i < n; i++) {
    const float x = __builtin_fabsf(src[i]);
    top = x > top || x != x ? x : top;
  }
  const float scale = top / 127.0f;
  const bool finite = scale <= 3.4028235e38f, any = finite && scale > 0.0f;
  for (int64_t i = 0; i < n; i++) {
    const float code = any ? (src[i] / scale + magic) - magic : 0.0f;
    dst[i] = (int8_t)(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code);  // a scale below the normal numbers is coarse
  }
  return finite ? scale : bits_float(0x7fc00000);
}
static void put_kv(const KvArgs& kv, int64_t page, int64_t offset, int64_t which, int64_t head, const float* src) {
  char* dst = kv_row(kv, page, offset, which, head);
  if (kv.dtype == INT8) {
    const float scale = put_codes((int8_t*)dst, src, kv.head_dim);
    __builtin_memcpy(kv.base + page * kv.page_stride + kv.scale_at(which * kv.kv_heads + head, offset), &scale, sizeof scale);
  } else if (kv.dtype == BF16) {
    put_row<BF16>(dst, src, kv.head_dim);
  } else if (kv.dtype == FP16) {
    put_row<FP16>(dst, src, kv.head_dim);
  } else {
    put_row<FP32>(dst, src, kv.head_dim);
  }
}

// Only the q columns are rewritten; k goes to its page through scratch, v straight.
static void rope_row(const RopeArgs& a, int64_t row, int64_t rope_row, int64_t slot) {
  const int64_t dim = a.kv.head_dim, page = slot / a.kv.page_size, offset = slot % a.kv.page_size, half = a.rotary_dim / 2;
  float* q = a.qkv + row * a.ld;
  const float *k = q + a.heads * dim, *v = k + a.kv.kv_heads * dim;
  const float *cos = a.cos ? a.cos + rope_row * half : nullptr, *sin = a.cos ? a.sin + rope_row * half : nullptr;
  for (int64_t h = 0; h < a.heads; h++, q += dim) {
    if (a.q_gain) norm_row(q, q, a.q_gain, nullptr, dim, RMS, a.eps);
    if (cos) rotate(q, cos, sin, a.rotary_dim);
  }
  float* t = (float*)thread_scratch(dim * sizeof(float));
  for (int64_t h = 0; h < a.kv.kv_heads; h++, k += dim, v += dim) {
    __builtin_memcpy(t, k, dim * sizeof(float));
    if (a.k_gain) norm_row(t, t, a.k_gain, nullptr, dim, RMS, a.eps);
    if (cos) rotate(t, cos, sin, a.rotary_dim);
    put_kv(a.kv, page, offset, 0, h, t);
    put_kv(a.kv, page, offset, 1, h, v);
  }
}

// A row of logits is as long as the vocabulary, and comes from the caches: four chains of comparisons, then a look for where the best one lies.
static int64_t argmax_row(const float* x, int64_t n) {
  constexpr int CHAINS = 4;
  const vf lowest = splat(-__builtin_inff());
  vf best[CHAINS] = {lowest, lowest, lowest, lowest};
  vi odd = {};
  int64_t i = 0;
  for (; i + CHAINS * W <= n; i += CHAINS * W)
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; c++) {
      const vf v = load(x + i + c * W);
      best[c] = v > best[c] ? v : best[c];
      odd |= v != v;
    }
  float top = -__builtin_inff();
  bool bad = false;
  for (int c = 0; c < CHAINS; c++)
    for (int j = 0; j < W; j++) top = best[c][j] > top ? best[c][j] : top;
  for (int j = 0; j < W; j++) bad |= odd[j] != 0;
  for (; i < n; i++) {
    top = x[i] > top ? x[i] : top;
    bad |= x[i] != x[i];
  }
  if (bad || top - top != 0.0f) return -1;
  constexpr int64_t PIECE = 256;
  for (int64_t first = 0;; first += PIECE) {
    const int64_t last = first + PIECE < n ? first + PIECE : n;
    int here = 0;
    for (int64_t k = first; k < last; k++) here |= x[k] == top;
    for (int64_t k = first; here && k < last; k++)
      if (x[k] == top) return k;
  }
}
