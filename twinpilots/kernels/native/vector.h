// One vector of W floats on top of GCC's vector extensions. Included inside each instruction set's namespace, after its target pragma; TP_ISA is 0, 1 or 2.
// Only `fma` may differ between instruction sets (the portable one rounds the product where the machine has no FMA).

#define TP_INLINE static inline __attribute__((always_inline))

#if TP_ISA == 2
constexpr int W = 16;
#elif TP_ISA == 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

#if TP_ISA == 2
constexpr vi EVEN = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30},
             LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, ZIP = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#elif TP_ISA == 1
constexpr vi EVEN = {0, 2, 4, 6, 8, 10, 12, 14}, LANE = {0, 1, 2, 3, 4, 5, 6, 7}, ZIP = {0, 8, 1, 9, 2, 10, 3, 11};
#else
constexpr vi EVEN = {0, 2, 4, 6}, LANE = {0, 1, 2, 3}, ZIP = {0, 4, 1, 5};
#endif

TP_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
TP_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
TP_INLINE vf zero() { return vf{}; }

#if TP_ISA == 2
TP_INLINE vf splat(float x) { return (vf)_mm512_set1_ps(x); }
TP_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
TP_INLINE vf load_bf16(const uint16_t* p) {
  return (vf)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
TP_INLINE vf load_fp16(const uint16_t* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
#elif TP_ISA == 1
TP_INLINE vf splat(float x) { return (vf)_mm256_set1_ps(x); }
TP_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
TP_INLINE vf load_bf16(const uint16_t* p) {
  return (vf)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
TP_INLINE vf load_fp16(const uint16_t* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
#endif

TP_INLINE float bits_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
TP_INLINE uint32_t float_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

TP_INLINE float from_bf16(uint16_t h) { return bits_float((uint32_t)h << 16); }
TP_INLINE float from_fp16(uint16_t h) {
#if TP_ISA >= 1
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
#else
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13 | (magnitude > 0x7c00 ? 0x400000 : 0));
  // subnormals and normals alike: the bits, read as a tiny float, scaled by 2^112 exactly
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * bits_float(0x77800000)));
#endif
}

TP_INLINE uint16_t to_bf16(float f) {  // nearest, ties to even; NaN stays NaN
  const uint32_t u = float_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
TP_INLINE uint16_t to_fp16(float f) {  // nearest, ties to even
#if TP_ISA >= 1
  return (uint16_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(f), _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t u = float_bits(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                                   // below 2^-14: a subnormal; adding 0.5 puts its last bit at the float's last bit
    return (uint16_t)(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000));
  }
  return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
#endif
}

#if TP_ISA == 0
TP_INLINE vf splat(float x) { return vf{x, x, x, x}; }
TP_INLINE vf fma(vf a, vf b, vf c) {
#ifdef __FP_FAST_FMAF
  vf r;
  for (int i = 0; i < W; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}
TP_INLINE vf load_bf16(const uint16_t* p) { return vf{from_bf16(p[0]), from_bf16(p[1]), from_bf16(p[2]), from_bf16(p[3])}; }
TP_INLINE vf load_fp16(const uint16_t* p) { return vf{from_fp16(p[0]), from_fp16(p[1]), from_fp16(p[2]), from_fp16(p[3])}; }
#endif

// c0 += *a * b0, c1 += *a * b1. Written out because the compiler, left alone, hoists loads of `a` until it has to spill sums.
TP_INLINE void accumulate(vf& c0, vf& c1, const float* a, vf b0, vf b1) {
#if TP_ISA >= 1
  vf t;
  __asm__("vbroadcastss %3, %2\n\tvfmadd231ps %4, %2, %0\n\tvfmadd231ps %5, %2, %1" : "+v"(c0), "+v"(c1), "=&v"(t) : "m"(*a), "v"(b0), "v"(b1));
#else
  c0 = fma(splat(*a), b0, c0);
  c1 = fma(splat(*a), b1, c1);
#endif
}

// A loaded vector that stays in its register: the compiler, left alone, loads it again for every use.
TP_INLINE vf kept(vf v) {
#if TP_ISA >= 1
  __asm__("" : "+v"(v));
#endif
  return v;
}

// ---- elements of a stored type D (Dtype)
template <int D>
struct Element {
  using T = uint16_t;
  TP_INLINE vf load_vector(const T* p) { return D == BF16 ? load_bf16(p) : load_fp16(p); }
  TP_INLINE float get(T h) { return D == BF16 ? from_bf16(h) : from_fp16(h); }
  TP_INLINE T put(float f) { return D == BF16 ? to_bf16(f) : to_fp16(f); }
};
template <>
struct Element<FP32> {
  using T = float;
  TP_INLINE vf load_vector(const T* p) { return load(p); }
  TP_INLINE float get(T f) { return f; }
  TP_INLINE T put(float f) { return f; }
};

// Two vectors of 2 W consecutive elements. bf16 comes woven (even elements, then odd ones): a shift and a mask of one load; `unweave` brings sums into
// that order, `weave` back. Lanes are independent, so the order changes no bit.
template <int D>
TP_INLINE void load_pair(const typename Element<D>::T* p, vf& a, vf& b) {
  if (D == BF16) {
    vu v;
    __builtin_memcpy(&v, p, sizeof v);
    a = (vf)(v << 16);
    b = (vf)(v & 0xffff0000u);
  } else {
    a = Element<D>::load_vector(p);
    b = Element<D>::load_vector(p + W);
  }
}
TP_INLINE void unweave(vf& a, vf& b) {
  const vf even = __builtin_shuffle(a, b, EVEN), odd = __builtin_shuffle(a, b, EVEN + 1);
  a = even;
  b = odd;
}
TP_INLINE void weave(vf& a, vf& b) {
  const vf low = __builtin_shuffle(a, b, ZIP), high = __builtin_shuffle(a, b, ZIP + W / 2);
  a = low;
  b = high;
}

// One stage of a transposition: lanes of `a` whose bit `stride` is set against lanes of `b` whose bit is not.
template <int STRIDE>
TP_INLINE void exchange(vf& a, vf& b) {
  constexpr vi lane = LANE, upper = (lane & STRIDE) != 0;
  const vf low = __builtin_shuffle(a, b, (lane & ~upper) | ((lane + W - STRIDE) & upper));
  const vf high = __builtin_shuffle(a, b, ((lane + STRIDE) & ~upper) | ((lane + W) & upper));
  a = low;
  b = high;
}
// Four rows: their 4 x 4 blocks are transposed, by shuffles that stay within groups of four lanes (one instruction each).
TP_INLINE void transpose_blocks(vf* r) {
  constexpr vi group = LANE & ~3, odd = (LANE & 1) != 0, late = (LANE & 2) != 0;
  constexpr vi zip = group + ((LANE & 3) >> 1) + (odd & W), pair = group + (LANE & 1) + (late & W);
  const vf a = __builtin_shuffle(r[0], r[1], zip), b = __builtin_shuffle(r[0], r[1], zip + 2);
  const vf c = __builtin_shuffle(r[2], r[3], zip), d = __builtin_shuffle(r[2], r[3], zip + 2);
  r[0] = __builtin_shuffle(a, c, pair);
  r[1] = __builtin_shuffle(a, c, pair + 2);
  r[2] = __builtin_shuffle(b, d, pair);
  r[3] = __builtin_shuffle(b, d, pair + 2);
}
// A W x W block of 32-bit words, in registers: rows become columns.
TP_INLINE void transpose(vf (&r)[W]) {
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) transpose_blocks(r + i);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (W > 4 && !(i & 4)) exchange<4 % W>(r[i], r[i + 4]);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (W > 8 && !(i & 8)) exchange<8 % W>(r[i], r[i + 8]);
}

// out[i] = the lanes of vector i added, for four vectors one behind the other: halves of sixteen lanes, then neighbours, pairs of neighbours, and groups of four.
#if TP_ISA >= 1
TP_INLINE __m256 eight_lanes(const float* v) { return W == 16 ? _mm256_add_ps(_mm256_loadu_ps(v), _mm256_loadu_ps(v + 8)) : _mm256_loadu_ps(v); }
TP_INLINE __m256 add_neighbours(__m256 a, __m256 b) { return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd)); }
TP_INLINE void add_lanes(const float* v, float* out) {
  const __m256 a = add_neighbours(eight_lanes(v), eight_lanes(v + W)), b = add_neighbours(eight_lanes(v + 2 * W), eight_lanes(v + 3 * W)), c = add_neighbours(a, b);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1)));
}
#else
TP_INLINE vf add_neighbours(vf a, vf b) { return __builtin_shuffle(a, b, EVEN) + __builtin_shuffle(a, b, EVEN + 1); }
TP_INLINE void add_lanes(const float* v, float* out) {
  store(out, add_neighbours(add_neighbours(load(v), load(v + W)), add_neighbours(load(v + 2 * W), load(v + 3 * W))));
}
#endif

// The first n < W floats of a row; the other lanes are 0.
TP_INLINE vf load_n(const float* p, int64_t n) {
  float t[W] = {};
  for (int64_t i = 0; i < n; i++) t[i] = p[i];
  return load(t);
}
TP_INLINE void store_n(float* p, vf v, int64_t n) {
  float t[W];
  store(t, v);
  for (int64_t i = 0; i < n; i++) p[i] = t[i];
}

// ---- functions of a vector
TP_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

// All lanes joined by a commutative function, halves first; the result in every lane.
template <class F>
TP_INLINE vf fold_lanes(vf v, F&& join) {
  if (W > 8) v = join(v, (vf)__builtin_shuffle(v, LANE ^ (8 % W)));
  if (W > 4) v = join(v, (vf)__builtin_shuffle(v, LANE ^ (4 % W)));
  v = join(v, (vf)__builtin_shuffle(v, LANE ^ 2));
  return join(v, (vf)__builtin_shuffle(v, LANE ^ 1));
}

TP_INLINE vf vexp(vf x) {  // Cephes expf; relative error below 2e-7 in [-87.3, 88.3], clamped outside
  x = x < splat(-87.3f) ? splat(-87.3f) : x;  // written so that NaN passes through
  x = x > splat(88.3f) ? splat(88.3f) : x;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (fma(x, splat(1.44269504088896341f), magic)) - magic;
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  const vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  return p * (vf)exponent;
}
TP_INLINE vf sigmoid_times(vf x, vf u) { return x / (splat(1.0f) + vexp(-u)); }  // x * sigmoid(u)

TP_INLINE vf vtanh(vf x) {  // Cephes tanhf: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel
  const vf a = x < zero() ? -x : x, z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const vf near = fma(p * z, x, x);
  const vf far = splat(1.0f) - splat(2.0f) / (vexp(a + a) + splat(1.0f));
  return a < splat(0.625f) ? near : (x < zero() ? -far : far);
}

TP_INLINE vf verf_gelu(vf x) {  // x * Phi(x), lane by lane: no model of size uses it
  float t[W];
  store(t, x);
  for (int i = 0; i < W; i++) t[i] = 0.5f * t[i] * (1.0f + __builtin_erff(t[i] * 0.70710678118654752f));
  return load(t);
}

TP_INLINE vf activate(int activation, vf x) {
  switch (activation) {
    case SILU:
      return sigmoid_times(x, x);
    case GELU:
      return verf_gelu(x);
    case GELU_TANH: {  // 0.5 x (1 + tanh u) = x sigmoid(2u): no cancellation for negative u
      const vf u = splat(0.79788456080286536f) * fma(splat(0.044715f) * x, x * x, x);
      return sigmoid_times(x, u + u);
    }
    default:
      return x < zero() ? zero() : x;
  }
}
