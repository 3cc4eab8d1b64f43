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

// The sum is in a register now: left alone, the compiler reorders integer sums, gathers products first and spills them.
TP_INLINE void pin(vi& v) {
#if TP_ISA >= 1
  __asm__("" : "+v"(v));
#endif
  (void)v;
}

#if TP_ISA == 1
// As `accumulate`: left alone, the compiler copies sums and hoists broadcasts.
#define TP_STEP(NAME, MULTIPLY, ADD)                                                                                                                        \
  TP_INLINE void NAME(vi& c, vi a, const char* x) {                                                                                                         \
    vi t;                                                                                                                                                   \
    __asm__("vpbroadcastd %2, %1\n\t" MULTIPLY " %1, %3, %1\n\t" ADD " %1, %0, %0" : "+v"(c), "=&v"(t) : "m"(*(const int32_t*)x), "v"(a));                 \
  }                                                                                                                                                         \
  TP_INLINE void NAME(vi& c0, vi& c1, vi a0, vi a1, const char* x) {                                                                                        \
    vi t, u;                                                                                                                                                \
    __asm__("vpbroadcastd %4, %2\n\t" MULTIPLY " %2, %5, %3\n\t" MULTIPLY " %2, %6, %2\n\t" ADD " %3, %0, %0\n\t" ADD " %2, %1, %1"                        \
            : "+v"(c0), "+v"(c1), "=&v"(t), "=&v"(u)                                                                                                        \
            : "m"(*(const int32_t*)x), "v"(a0), "v"(a1));                                                                                                   \
  }
TP_STEP(step_pairs, "vpmaddwd", "vpaddd")
TP_STEP(step_bytes, "vpmaddubsw", "vpaddw")
#undef TP_STEP
#endif

// ---- activations: a row is a sequence of records, one per 32 inputs: RoundedHead, then the codes (bytes in order; or 16-bit, four inputs as 0, 2, 1, 3)

TP_INLINE int32_t sum_lanes(vi v) {
  int32_t total = 0;
  for (int i = 0; i < W; i++) total += v[i];
  return total;
}

// The codes of 32 activations; |code| <= limit.
static RoundedHead round_group(const float* x, float limit, int32_t* q) {
  vi largest = {}, halves[2] = {};
  for (int i = 0; i < 32; i += W) {
    const vi magnitude = (vi)load(x + i) & 0x7fffffff;  // floats order as their bits do; a NaN is above infinity
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t top_bits = 0;
  for (int i = 0; i < W; i++) top_bits = largest[i] > top_bits ? largest[i] : top_bits;
  const float top = bits_float((uint32_t)top_bits);
  if (top_bits >= 0x7f800000 || top < 1e-30f) {  // not finite: poisons the outputs, as it would in floating point
    const float value = top_bits >= 0x7f800000 ? bits_float(0x7fc00000) : 0.0f;
    __builtin_memset(q, 0, 32 * sizeof *q);
    return {value, value, value, value};
  }
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vf inverse = splat(limit / top);
  for (int i = 0; i < 32; i += W) {
    const vi codes = (vi)(load(x + i) * inverse + splat(magic)) - (int32_t)float_bits(magic);
    halves[i / 16] += codes;
    __builtin_memcpy(q + i, &codes, sizeof codes);
  }
  const int32_t low = sum_lanes(halves[0]), high = sum_lanes(halves[1]);
  const float scale = top / limit;
  return {scale, scale * (float)(low + high), scale * (float)low, scale * (float)high};
}

static void round_row(const float* x, int64_t width, int bits, const Rounded& to, int64_t row) {
  for (int64_t k = 0; k < width; k += 32) {
    char* out = const_cast<char*>(to.at(row, k));
    int32_t q[32];
    const RoundedHead head = round_group(x + k, bits == 8 ? 127.0f : 32767.0f, q);
    __builtin_memcpy(out, &head, sizeof head);
    if (to.code_bytes == 1) {
      int8_t codes[32];
      for (int i = 0; i < 32; i++) codes[i] = (int8_t)q[i];
      __builtin_memcpy(out + sizeof head, codes, sizeof codes);
    } else {
      uint64_t four[16], codes[8];
      __builtin_memcpy(four, q, sizeof four);
      for (int i = 0; i < 8; i++) codes[i] = (four[2 * i] & 0x0000ffff0000ffff) | (four[2 * i + 1] & 0x0000ffff0000ffff) << 16;
      __builtin_memcpy(out + sizeof head, codes, sizeof codes);
    }
  }
}

// ---- scales

constexpr int SCALE_LD = 64;  // columns that are worked on at a time when there are many rows

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
#if TP_ISA == 2
  return (vi)_mm512_cvtepu8_epi32((__m128i)b);
#elif TP_ISA == 1
  return (vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)b));
#else
  return __builtin_convertvector(b, vi);
#endif
}
TP_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

struct ScalePair {
  vf scale, offset;  // a weight is scale * code + offset
};

// Group g's 6-bit scale and min of ggml's twelve bytes.
TP_INLINE ScalePair scales_k(const char* packed, int64_t w, int64_t g, int64_t left, vf d, vf dmin) {
  const vi third = load_small(packed + (g + 4) * w, left);
  if (g < 4) return {d * to_float(load_small(packed + g * w, left) & 63), -(dmin * to_float(third & 63))};
  const vi scale = (third & 15) | (load_small(packed + (g - 4) * w, left) >> 6 << 4), min = third >> 4 | (load_small(packed + g * w, left) >> 6 << 4);
  return {d * to_float(scale), -(dmin * to_float(min))};
}

// ---- codes

// How codes and scales lie, and what they are multiplied by: 16 bits, or 8
enum QuantKind { BYTES, NIBBLES, NIBBLES_FAST, K_NIBBLES, K_NIBBLES_FAST, FIVE_BITS, K_FIVE_BITS, SIX_BITS };
constexpr bool has_five_bits(int kind) { return kind == FIVE_BITS || kind == K_FIVE_BITS; }
constexpr bool has_k_scales(int kind) { return kind == K_NIBBLES || kind == K_NIBBLES_FAST || kind == K_FIVE_BITS; }

template <int KIND>
struct Codes {
  static constexpr bool fast = KIND == NIBBLES_FAST || KIND == K_NIBBLES_FAST;
  static constexpr int words = KIND == BYTES ? 8 : 4;                           // 32-bit lanes of a column's group of 32
  static constexpr int steps = KIND == BYTES || fast ? 2 : 4;   // integer products per lane
  static constexpr int parts = KIND == SIX_BITS ? 2 : 1;                        // groups of 16 have scales of their own
  static constexpr int record = sizeof(RoundedHead) + 32 * (fast ? 1 : 2);
  static constexpr int row = ROUNDED_TILE / 32 * record;                        // bytes of a row's tile

  // Step s of a lane: 16-bit pairs in the activations' order, or (fast) bytes. `upper`: the upper bits of five- and six-bit codes, low nibbles' first.
  TP_INLINE vi of(vi v, vi upper, int s) {
    if (KIND == BYTES) return (vi)(s == 0 ? (vi16)v << 8 >> 8 : (vi16)v >> 8);
    if (fast) return (s == 0 ? v : v >> 4) & 0x0f0f0f0f;
    if (KIND != SIX_BITS && !has_five_bits(KIND) && s == 3) return (vi)((vu16)v >> 12);
    const vi four = (s == 0 ? v : s == 1 ? v >> 8 : s == 2 ? v >> 4 : v >> 12) & 0x000f000f;
    if (has_five_bits(KIND)) return four | ((s == 0 ? upper << 4 : s == 1 ? upper >> 4 : s == 2 ? upper << 3 : upper >> 5) & 0x00100010);
    if (KIND != SIX_BITS) return four;
    return four | ((s == 0 ? upper << 4 : s == 1 ? upper >> 4 : s == 2 ? upper << 2 : upper >> 6) & 0x00300030);
  }
  // sums += codes times the activations at x, in each of NV vectors
  template <int NV>
  TP_INLINE void multiply(vi (&sums)[NV], const vi (&codes)[NV], const char* x) {
#if TP_ISA == 1
    if constexpr (NV == 1) return fast ? step_bytes(sums[0], codes[0], x) : step_pairs(sums[0], codes[0], x);
    if constexpr (NV == 2) return fast ? step_bytes(sums[0], sums[1], codes[0], codes[1], x) : step_pairs(sums[0], sums[1], codes[0], codes[1], x);
#endif
    const vi b = splat_word(x);
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) {
      sums[n] = fast ? add_bytes(sums[n], codes[n], b) : add_pairs(sums[n], codes[n], b);
      pin(sums[n]);
    }
  }
  TP_INLINE vf dot(vi sum) { return to_float(fast ? finish_bytes(sum) : sum); }
};

// Of W columns (`left` of them there) from column `at` on, group g (of 32; of 16 in q6_k) of a block. Products of an 11-bit f16 and a small integer or
// another f16 are exact in fp32: nothing is rounded here.
template <int KIND>
TP_INLINE ScalePair scales_of(int dtype, const char* block, int64_t w, int64_t at, int64_t g, int64_t left) {
  const vf d = load_halves(block + 2 * at, left);
  if (KIND == BYTES) return {d, zero()};
  if (KIND == SIX_BITS) {
    const vf scale = d * to_float(load_small(block + (2 + g) * w + at, left) << 24 >> 24);
    return {scale, splat(-32.0f) * scale};
  }
  if (!has_k_scales(KIND) && (dtype == Q4_0 || dtype == Q5_0)) return {d, splat(dtype == Q4_0 ? -8.0f : -16.0f) * d};
  const vf second = load_halves(block + 2 * (w + at), left);
  if (has_k_scales(KIND)) return scales_k(block + 4 * w + at, w, g, left, d, second);
  return {d, dtype == Q4_1 || dtype == Q5_1 ? second : -(d * second)};
}

// A panel of w columns in a quantised format, and the columns [column, column + columns) of it that are asked for.
struct QuantPanel {
  int dtype;
  QuantFormat format;
  const char* data;
  int64_t w, column, columns;

  int64_t stride() const { return format.block_bytes * w; }
};

template <int KIND>
TP_INLINE vi load_upper(const char* upper, int64_t word, int64_t g, int i, int n, bool tail, int64_t left) {
  if (KIND != SIX_BITS && !has_five_bits(KIND)) return vi{};
  const char* p = upper + (KIND == SIX_BITS ? 2 * g + i / 2 : g) * word + n * W * 4;
  return (tail ? load_words_n(p, left) : load_words(p)) >> (KIND == SIX_BITS ? 4 * (i & 1) : 2 * i);
}

// ---- codes unpacked where they are used, scales too

constexpr int UNROLL = TP_ISA == 1 ? 4 : 1;  // rows of words

// The scales of `columns` columns from `at` on, of a block that is needed soon.
template <int KIND>
TP_INLINE void prefetch_header(const char* block, int64_t w, int64_t at, int64_t columns, int64_t header) {
  constexpr bool halves = KIND == BYTES || KIND == NIBBLES || KIND == NIBBLES_FAST || KIND == FIVE_BITS;
  const int64_t floats = KIND == SIX_BITS ? 1 : halves ? header / 2 : 2;
  for (int64_t i = 0; i < floats; i++)
    for (int64_t byte = 0; byte < 2 * columns; byte += 64) __builtin_prefetch(block + 2 * (i * w + at) + byte, 0, 2);
  for (int64_t i = 2 * floats; i < header; i++) __builtin_prefetch(block + i * w + at, 0, 2);
}

// A group's integer sums of MR rows and NV vectors of columns become part of y.
template <int KIND, int MR, int NV>
TP_INLINE void add_group(vi (&acc)[MR][NV], const ScalePair* pairs, const char* in, int part, float* y, int64_t ldy) {
  using C = Codes<KIND>;
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++) {
    const char* head = in + m * C::row;
    const vf scale = splat(get_float(head)), sum = splat(get_float(head + (C::parts == 1 ? 4 : 8 + 4 * part)));
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) {
      float* out = y + m * ldy + n * W;
      vf value = fused(pairs[n].scale, scale * C::dot(acc[m][n]), load(out));
      if (KIND != BYTES) value = fused(pairs[n].offset, sum, value);
      store(out, value);
    }
  }
}

// Blocks that are needed soon: the same columns, from `column` on, of a panel of w columns, `stride` bytes from block to block. They are prefetched meanwhile.
struct Soon {
  const char* block;
  int64_t w, column, stride;
};

// MR rows, NV vectors of columns at a time, k inputs of one tile of the activations; TAIL: one vector of `columns` < W.
template <int KIND, int MR, int NV, bool TAIL>
static __attribute__((noinline)) void quant_direct(const QuantPanel& p, const char* block, const char* x, int64_t k, float* y, int64_t ldy, const Soon& soon) {
  using C = Codes<KIND>;
  const int64_t word = 4 * p.w, groups = p.format.block / 32, left = TAIL ? p.columns : W, columns = p.columns, w = p.w, header = p.format.header, stride = p.stride();
  const int64_t soon_w = soon.w, soon_word = 4 * soon_w, soon_stride = soon.stride;
  const char* soon_block = soon.block;
  const int dtype = p.dtype;
  for (int64_t k0 = 0; k0 < k; k0 += p.format.block, block += stride, soon_block += soon_stride, x += groups * C::record) {
    for (int64_t c = 0; c < columns; c += NV * W) {
      const int64_t at = p.column + c, soon_at = soon.column + c;
      const char *codes = block + header * w + 4 * at, *upper = codes + p.format.block / 2 * w, *in = x, *soon_codes = soon_block + header * soon_w + 4 * soon_at;
      if (c % 32 == 0) prefetch_header<KIND>(soon_block, soon_w, soon_at, NV * W, header);
      for (int64_t g = 0; g < groups; g++, in += C::record) {
#pragma GCC unroll 2
        for (int part = 0; part < C::parts; part++) {
          vi acc[MR][NV] = {};
#pragma GCC unroll UNROLL
          for (int i = part * C::words / C::parts; i < (part + 1) * C::words / C::parts; i++, codes += word, soon_codes += soon_word) {
            vi v[NV], high[NV];
#pragma GCC unroll 8
            for (int n = 0; n < NV; n++) {
              if (n * W % 16 == 0) __builtin_prefetch(soon_codes + n * W * 4, 0, 2);
              v[n] = TAIL ? load_words_n(codes + n * W * 4, left) : load_words(codes + n * W * 4);
              high[n] = load_upper<KIND>(upper, word, g, i, n, TAIL, left);
            }
#pragma GCC unroll 4
            for (int s = 0; s < C::steps; s++) {
              vi unpacked[NV];
#pragma GCC unroll 8
              for (int n = 0; n < NV; n++) {
                unpacked[n] = C::of(v[n], high[n], s);
                if (MR > 1) pin(unpacked[n]);
              }
#pragma GCC unroll 8
              for (int m = 0; m < MR; m++) C::multiply(acc[m], unpacked, in + m * C::row + sizeof(RoundedHead) + (i * C::steps + s) * 4);
            }
          }
          ScalePair pairs[NV];
#pragma GCC unroll 8
          for (int n = 0; n < NV; n++) pairs[n] = scales_of<KIND>(dtype, block, w, at + n * W, g * C::parts + part, left);
          add_group<KIND>(acc, pairs, in, part, y + c, ldy);
        }
      }
    }
  }
}

// ---- many rows: a tile's codes and scales are unpacked once

// Of the panel's (at most SCALE_LD) columns, `groups` groups of 32 from `block` on; columns that do not exist are 0. Per group words * steps rows of codes
// and parts pairs of rows of scales and offsets, each SCALE_LD wide.
template <int KIND>
static void expand_tile(const QuantPanel& p, const char* block, int64_t groups, char* codes, float* scales) {
  using C = Codes<KIND>;
  const int64_t word = 4 * p.w, per_block = p.format.block / 32, whole = p.columns / W * W, left = p.columns - whole;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t in_block = g % per_block;
    if (g && in_block == 0) block += p.stride();
    const char *from = block + p.format.header * p.w + 4 * p.column, *upper = from + p.format.block / 2 * p.w;
    for (int i = 0; i < C::words; i++, codes += C::steps * SCALE_LD * 4) {
      const char* source = from + (in_block * C::words + i) * word;
      for (int64_t c = 0; c < SCALE_LD; c += W) {
        const bool there = c < whole, tail = c == whole && left;
        const vi v = there ? load_words(source + 4 * c) : tail ? load_words_n(source + 4 * c, left) : vi{};
        const vi high = there || tail ? load_upper<KIND>(upper + 4 * c, word, in_block, i, 0, tail, left) : vi{};
#pragma GCC unroll 4
        for (int s = 0; s < C::steps; s++) {
          const vi unpacked = C::of(v, high, s);
          __builtin_memcpy(codes + (s * SCALE_LD + c) * 4, &unpacked, sizeof unpacked);
        }
      }
    }
    for (int part = 0; part < C::parts; part++, scales += 2 * SCALE_LD)
      for (int64_t c = 0; c < SCALE_LD; c += W) {
        const ScalePair pair = c < p.columns ? scales_of<KIND>(p.dtype, block, p.w, p.column + c, in_block * C::parts + part, p.columns - c) : ScalePair{zero(), zero()};
        store(scales + c, pair.scale);
        store(scales + SCALE_LD + c, pair.offset);
      }
  }
}

// An expanded tile, and where the codes that are needed next lie: they are prefetched meanwhile.
struct ExpandedTile {
  const char* codes;
  const float* scales;
  int64_t groups, columns;  // columns: those that are computed
  const char* next;         // header of the next tile's first block, at the first column's scale
  int64_t header, word, block_groups, block;  // bytes from there to the first column's codes, and as in the panel
};

// MR rows times the tile, NV vectors of columns at a time.
template <int KIND, int MR, int NV>
static __attribute__((noinline)) void quant_expanded(const ExpandedTile& t, const char* x, int64_t ldx, float* y, int64_t ldy) {
  using C = Codes<KIND>;
  constexpr int words = C::words / C::parts, lines = NV * W * 4 / 64;
  const int64_t word = t.word, columns = t.columns, groups = t.groups, header = t.header, per_block = t.block_groups;
  for (int64_t c = 0; c < columns; c += NV * W) {
    const char *in = x, *code = t.codes + 4 * c, *next = t.next + 2 * c, *next_codes = t.next + header + 4 * c;
    const float* pairs = t.scales + c;
    for (int64_t g = 0, in_block = 0; g < groups; g++, in += C::record) {
      __builtin_prefetch(next, 0, 2);
      for (int part = 0; part < C::parts; part++, pairs += 2 * SCALE_LD) {
        const char* values = in + sizeof(RoundedHead) + part * words * C::steps * 4;
        vi acc[MR][NV] = {};
#pragma GCC unroll 1
        for (int i = 0; i < words; i++, next_codes += word)
#pragma GCC unroll 4
          for (int s = 0; s < C::steps; s++, code += SCALE_LD * 4, values += 4) {
            if (s < lines) __builtin_prefetch(next_codes + 64 * s, 0, 2);
            vi v[NV];
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) {
              v[n] = load_words(code + n * W * 4);
              pin(v[n]);
            }
#pragma GCC unroll 8
            for (int m = 0; m < MR; m++) {
              C::multiply(acc[m], v, values + m * ldx);
            }
          }
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) {
          const char* head = in + m * ldx;
          const vf scale = splat(get_float(head)), sum = splat(get_float(head + (C::parts == 1 ? 4 : 8 + 4 * part)));
#pragma GCC unroll 4
          for (int n = 0; n < NV; n++) {
            float* out = y + m * ldy + c + n * W;
            vf value = fused(load(pairs + n * W), scale * C::dot(acc[m][n]), load(out));
            if (KIND != BYTES) value = fused(load(pairs + SCALE_LD + n * W), sum, value);
            store(out, value);
          }
        }
      }
      if (++in_block == per_block) {
        in_block = 0;
        next += t.block;
        next_codes = next + header + 2 * c;
      }
    }
  }
}
