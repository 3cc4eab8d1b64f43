// Quantised weights times rounded activations: the pieces. Included inside each instruction set's namespace; docs/execution.md has the formats.
// A group of 32 inputs is an exact integer dot product, then one fixed chain: y = fma(scale, row's scale * dot, y); y = fma(offset, row's sum, y).
// So a row's bits depend neither on the instruction set, the other rows, nor on how the matrix is cut.

typedef uint8_t vu8 __attribute__((vector_size(W)));
typedef uint16_t vu16 __attribute__((vector_size(W * 4)));
typedef int16_t vi16 __attribute__((vector_size(W * 4)));

TP_INLINE vi load_words(const char* p) {
  vi v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
TP_INLINE vi load_words_n(const char* p, int64_t n) {  // the first n < W lanes; the others are 0
  int32_t t[W] = {};
  __builtin_memcpy(t, p, n * 4);
  return load_words((const char*)t);
}
TP_INLINE vi splat_word(const char* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return vi{} + word;
}
TP_INLINE float get_float(const char* p) {
  float f;
  __builtin_memcpy(&f, p, 4);
  return f;
}

#if TP_ISA == 0
TP_INLINE vf fused(vf a, vf b, vf c) {
  vf r;
  for (int i = 0; i < W; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}
TP_INLINE vi add_pairs(vi sum, vi a, vi b) { return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16); }
TP_INLINE vi add_bytes(vi sum, vi a, vi b) {
  for (int j = 0; j < 4; j++) sum += (a >> 8 * j & 255) * (b << (24 - 8 * j) >> 24);
  return sum;
}
TP_INLINE vi finish_bytes(vi sum) { return sum; }
#elif TP_ISA == 1
TP_INLINE vf fused(vf a, vf b, vf c) { return fma(a, b, c); }
// sum + the products of signed 16-bit pairs
TP_INLINE vi add_pairs(vi sum, vi a, vi b) { return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
// The same for four products of unsigned codes below 16 and signed bytes. Eight such steps fit 16-bit sums: 8 * 2 * 15 * 127 < 2^15.
TP_INLINE vi add_bytes(vi sum, vi a, vi b) { return (vi)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)a, (__m256i)b)); }
TP_INLINE vi finish_bytes(vi sum) { return (vi)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
#else
TP_INLINE vf fused(vf a, vf b, vf c) { return fma(a, b, c); }
#if TP_VNNI
TP_INLINE vi add_pairs(vi sum, vi a, vi b) { return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
TP_INLINE vi add_bytes(vi sum, vi a, vi b) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
TP_INLINE vi finish_bytes(vi sum) { return sum; }
#else
TP_INLINE vi add_pairs(vi sum, vi a, vi b) { return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
TP_INLINE vi add_bytes(vi sum, vi a, vi b) { return (vi)_mm512_add_epi16((__m512i)sum, _mm512_maddubs_epi16((__m512i)a, (__m512i)b)); }
TP_INLINE vi finish_bytes(vi sum) { return (vi)_mm512_madd_epi16((__m512i)sum, _mm512_set1_epi16(1)); }
#endif
#endif

// ---- activations: a row is a sequence of records, one per 32 inputs: RoundedHead, then the codes (bytes in order; or 16-bit, four inputs as 0, 2, 1, 3)

static void round_group(const float* x, float limit, RoundedHead& head, int32_t* q) {
  uint32_t largest = 0;
  for (int i = 0; i < 32; i++) {
    const uint32_t magnitude = float_bits(x[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float top = bits_float(largest);
  if (largest >= 0x7f800000 || top < 1e-30f) {  // not finite: poisons the outputs, as it would in floating point
    const float value = largest >= 0x7f800000 ? bits_float(0x7fc00000) : 0.0f;
    head = {value, value, value, value};
    __builtin_memset(q, 0, 32 * sizeof *q);
    return;
  }
  const float inverse = limit / top, magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  int32_t sums[2] = {};
  for (int i = 0; i < 32; i++) q[i] = (int32_t)(float_bits(x[i] * inverse + magic) - float_bits(magic));
  for (int i = 0; i < 16; i++) {
    sums[0] += q[i];
    sums[1] += q[i + 16];
  }
  const float scale = top / limit;
  head = {scale, scale * (float)(sums[0] + sums[1]), scale * (float)sums[0], scale * (float)sums[1]};
}

static void round_row(const float* x, int64_t width, int bits, int code_bytes, char* out) {
  const int64_t record = rounded_record_bytes(code_bytes);
  for (int64_t k = 0; k < width; k += 32, out += record) {
    RoundedHead head;
    int32_t q[32];
    round_group(x + k, bits == 8 ? 127.0f : 32767.0f, head, q);
    __builtin_memcpy(out, &head, sizeof head);
    int8_t bytes[32];
    int16_t words[32];
    if (code_bytes == 1) {
      for (int i = 0; i < 32; i++) bytes[i] = (int8_t)q[i];
      __builtin_memcpy(out + sizeof head, bytes, sizeof bytes);
    } else {
      for (int i = 0; i < 32; i += 4)
        for (int j = 0; j < 4; j++) words[i + (j & 1) * 2 + j / 2] = (int16_t)q[i + j];
      __builtin_memcpy(out + sizeof head, words, sizeof words);
    }
  }
}

// ---- scales: of `columns` columns of a panel block (w columns in all), one (scale, offset) pair of rows of SCALE_LD floats per group

constexpr int SCALE_LD = 64;  // columns that are worked on at a time


TP_INLINE vf load_halves(const char* p, int64_t left) {
  uint16_t t[W] = {};
  if (left >= W) {
    __builtin_memcpy(t, p, sizeof t);
    return load_fp16(t);
  }
  __builtin_memcpy(t, p, left * 2);
  return load_fp16(t);
}
TP_INLINE vi load_small(const char* p, int64_t left) {  // unsigned bytes
  vu8 b = {};
  if (left >= W) {
    __builtin_memcpy(&b, p, sizeof b);
  } else {
    __builtin_memcpy(&b, p, left);
  }
  return __builtin_convertvector(b, vi);
}
TP_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

// q4_k: group g's 6-bit scale and min of ggml's twelve bytes
TP_INLINE void scales_q4_k(const char* packed, int64_t w, int g, int64_t left, vf d, vf dmin, float* out) {
  vi scale, min;
  if (g < 4) {
    scale = load_small(packed + g * w, left) & 63;
    min = load_small(packed + (g + 4) * w, left) & 63;
  } else {
    const vi both = load_small(packed + (g + 4) * w, left);
    scale = (both & 15) | (load_small(packed + (g - 4) * w, left) >> 6 << 4);
    min = both >> 4 | (load_small(packed + g * w, left) >> 6 << 4);
  }
  store(out, d * to_float(scale));
  store(out + SCALE_LD, -(dmin * to_float(min)));
}

// Products of an 11-bit f16 and a small integer or another f16 are exact in fp32: nothing is rounded here.
static void expand_scales(int dtype, const char* block, int64_t w, int64_t column, int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; c += W, out += W) {
    const int64_t at = column + c, left = columns - c;
    const vf d = load_halves(block + 2 * at, left);
    if (dtype == Q6_K) {
      for (int g = 0; g < 16; g++) {
        const vf scale = d * to_float(load_small(block + (2 + g) * w + at, left) << 24 >> 24);
        store(out + g * 2 * SCALE_LD, scale);
        store(out + (g * 2 + 1) * SCALE_LD, splat(-32.0f) * scale);
      }
    } else if (dtype == Q4_K) {
      const vf dmin = load_halves(block + 2 * (w + at), left);
      for (int g = 0; g < 8; g++) scales_q4_k(block + 4 * w + at, w, g, left, d, dmin, out + g * 2 * SCALE_LD);
    } else {
      store(out, d);
      if (dtype == Q8_0) continue;
      const vf second = dtype == Q4_0 ? splat(-8.0f) : load_halves(block + 2 * (w + at), left);
      store(out + SCALE_LD, dtype == Q4_1 ? second : dtype == Q4_0 ? second * d : -(d * second));
    }
  }
}

// ---- the inner loop

enum QuantKind { BYTES, NIBBLES, NIBBLES_FAST, SIX_BITS };  // how codes lie and what they are multiplied by: 16-bit activations but for the fast kind

// Step t of a word of codes: 16-bit pairs in the activations' order, or (fast) bytes. `upper`: the upper bits of six-bit codes, low nibbles' first.
template <int KIND>
TP_INLINE vi codes_of(vi v, vi upper, int t) {
  if (KIND == BYTES) return (vi)(t == 0 ? (vi16)v << 8 >> 8 : (vi16)v >> 8);
  if (KIND == NIBBLES_FAST) return (t == 0 ? v : v >> 4) & 0x0f0f0f0f;
  if (KIND == NIBBLES && t == 3) return (vi)((vu16)v >> 12);
  const vi four = (t == 0 ? v : t == 1 ? v >> 8 : t == 2 ? v >> 4 : v >> 12) & 0x000f000f;
  if (KIND == NIBBLES) return four;
  return four | ((t == 0 ? upper << 4 : t == 1 ? upper >> 4 : t == 2 ? upper << 2 : upper >> 6) & 0x00300030);
}

// The part of a panel that one call of the inner loop works on: `groups` groups of 32 inputs, from the start of a block on.
struct QuantTile {
  const char* codes;    // of the first group and column
  const char* upper;    // the same for the upper bits of six-bit codes
  int64_t word;         // bytes between a column's words: 4 * w
  int64_t block;        // bytes between blocks
  int64_t block_groups, groups;
  const float* scales;  // expand_scales' rows of the first group and column
  const char* x;        // records of the first row and group
  int64_t ldx;          // bytes
  float* y;
  int64_t ldy;
  int64_t ahead;        // bytes to the codes that are prefetched meanwhile; 0: none
};

// One column block of NV vectors (TAIL: of one vector with `left` < W columns) times MR rows.
template <int KIND, int MR, int NV, bool TAIL>
static void quant_micro(const QuantTile& t, int64_t column, int64_t left) {
  constexpr int words = KIND == BYTES ? 8 : 4, steps = KIND == BYTES || KIND == NIBBLES_FAST ? 2 : 4;
  constexpr int code = KIND == NIBBLES_FAST ? 1 : 2, record = sizeof(RoundedHead) + 32 * code, parts = KIND == SIX_BITS ? 2 : 1;
  constexpr int step_bytes = 4, word_bytes = steps * step_bytes;
  const float* scales = t.scales + column;
  const char *x = t.x, *block = t.codes + 4 * column, *upper_block = t.upper + 4 * column;
  float* y = t.y + column;
  for (int64_t g = 0, in_block = 0; g < t.groups; g++, x += record) {
    const char *w = block + in_block * words * t.word, *up = upper_block + in_block * 2 * t.word;
#pragma GCC unroll 2
    for (int part = 0; part < parts; part++, scales += 2 * SCALE_LD) {
      vi acc[MR][NV] = {};
#pragma GCC unroll 8
      for (int i = part * words / parts; i < (part + 1) * words / parts; i++) {
        vi v[NV], upper[NV] = {};
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) {
          const char* p = w + i * t.word + n * W * 4;
          if (n * W % 16 == 0) __builtin_prefetch(p + t.ahead, 0, 2);
          v[n] = TAIL ? load_words_n(p, left) : load_words(p);
          if (KIND == SIX_BITS) upper[n] = (TAIL ? load_words_n(up + part * t.word, left) : load_words(up + part * t.word + n * W * 4)) >> 4 * (i & 1);
        }
#pragma GCC unroll 4
        for (int s = 0; s < steps; s++) {
          vi codes[NV];
#pragma GCC unroll 4
          for (int n = 0; n < NV; n++) codes[n] = codes_of<KIND>(v[n], upper[n], s);
#pragma GCC unroll 8
          for (int m = 0; m < MR; m++) {
            const vi b = splat_word(x + m * t.ldx + sizeof(RoundedHead) + i * word_bytes + s * step_bytes);
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) acc[m][n] = KIND == NIBBLES_FAST ? add_bytes(acc[m][n], codes[n], b) : add_pairs(acc[m][n], codes[n], b);
          }
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        const char* head = x + m * t.ldx;
        const vf scale = splat(get_float(head)), sum = splat(get_float(head + (parts == 1 ? 4 : 8 + 4 * part)));
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) {
          float* out = y + m * t.ldy + n * W;
          const vf dot = to_float(KIND == NIBBLES_FAST ? finish_bytes(acc[m][n]) : acc[m][n]);
          vf value = fused(load(scales + n * W), scale * dot, load(out));
          if (KIND != BYTES) value = fused(load(scales + SCALE_LD + n * W), sum, value);
          store(out, value);
        }
      }
    }
    if (++in_block == t.block_groups) {
      in_block = 0;
      block += t.block;
      upper_block += t.block;
    }
  }
}

#if TP_ISA == 2
constexpr int QUANT_MR = 6, QUANT_NV = 2;
#else
constexpr int QUANT_MR = 4, QUANT_NV = 2;
#endif
constexpr int quant_vectors(int mr) { return mr == 1 ? 4 : QUANT_NV; }

template <int KIND, int MR>
static void quant_rows(const QuantTile& t, int64_t columns) {
  constexpr int NV = quant_vectors(MR);
  int64_t c = 0;
  for (; c + NV * W <= columns; c += NV * W) quant_micro<KIND, MR, NV, false>(t, c, 0);
  for (; c + W <= columns; c += W) quant_micro<KIND, MR, 1, false>(t, c, 0);
  if (c < columns) quant_micro<KIND, MR, 1, true>(t, c, columns - c);
}
