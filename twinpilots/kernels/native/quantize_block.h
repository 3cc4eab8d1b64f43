// Blocks of 32 weights to Q8_0 and Q4_1: the fast twin of kernels/quant_format.py, which says what is computed; every block has the same bits there and here, on
// every instruction set: steps are elementwise, and sums go by halves. Included inside each instruction set's namespace.

constexpr int QUANT_BLOCK = 32, PARTS = QUANT_BLOCK / W;
constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to an integer

struct Block {
  vf part[PARTS];
};
template <class F>
TP_INLINE Block each(F&& fn) {
  Block out;
#pragma GCC unroll 8
  for (int i = 0; i < PARTS; i++) out.part[i] = fn(i);
  return out;
}
// All of a block joined by a commutative function, halves first; the result in every lane.
template <class F>
TP_INLINE float joined(Block t, F&& join) {
#pragma GCC unroll 4
  for (int half = PARTS / 2; half > 0; half /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < half; i++) t.part[i] = join(t.part[i], t.part[i + half]);
  return fold_lanes(t.part[0], join)[0];
}
TP_INLINE float sum_of(const Block& t) {
  return joined(t, [](vf a, vf b) { return a + b; });
}
TP_INLINE vf least(vf a, vf b) { return a < b ? a : b; }
TP_INLINE vf magnitude(vf v) { return (vf)((vu)v & 0x7fffffffu); }
TP_INLINE vf rounded(vf v) { return (v + splat(ROUND)) - splat(ROUND); }

TP_INLINE float half_of(float f) {
  f = f < -65504.0f ? -65504.0f : f;
  return from_fp16(to_fp16(f > 65504.0f ? 65504.0f : f));
}
TP_INLINE float inverse_of(float d) { return d != 0 ? 1.0f / d : 0.0f; }

TP_INLINE Block codes_of(const Block& x, float d, float m) {
  const vf inverse = splat(inverse_of(d)), offset = splat(m), top = splat(15.0f);
  return each([&](int i) {
    const vf at = (x.part[i] - offset) * inverse, low = at > zero() ? at : zero();
    return rounded(low < top ? low : top);
  });
}

struct Best {
  float error = __builtin_inff(), d = 0, m = 0;
};
// Keeps (d, m), rounded to 16 bits, if the block's codes miss it by less than those kept so far. Returns the codes.
TP_INLINE Block offer(Best& best, const Block& x, float d, float m) {
  const float d16 = half_of(d), m16 = half_of(m);
  const Block q = codes_of(x, d16, m16);
  const float found = sum_of(each([&](int i) {
    const vf off = (q.part[i] * splat(d16) + splat(m16)) - x.part[i];
    return off * off;
  }));
  const bool better = found < best.error;
  best = {better ? found : best.error, better ? d16 : best.d, better ? m16 : best.m};
  return q;
}

// d and m that fit x best in the mean square, for codes q; as they were when all codes are equal.
TP_INLINE void least_squares(const Block& x, float sum_x, const Block& q, float& d, float& m) {
  const float sum_q = sum_of(q), sum_qq = sum_of(each([&](int i) { return q.part[i] * q.part[i]; })), sum_qx = sum_of(each([&](int i) { return q.part[i] * x.part[i]; }));
  const float determinant = 32.0f * sum_qq - sum_q * sum_q;
  if (!(determinant > 0)) return;
  d = (32.0f * sum_qx - sum_q * sum_x) / determinant;
  m = (sum_x - d * sum_q) / 32.0f;
}

// Grids of 1 to 15 steps on which all weights lie already (weights that were quantised before), each at every place of the sixteen codes. All grids are tried
// side by side, a lane each, and most blocks are told by their first weights.
static void offer_grids(Best& best, const Block& x, float low, float width) {
  constexpr float CLOSE = 2e-3f;
  float weights[QUANT_BLOCK], steps[16], worst[16];
  for (int i = 0; i < PARTS; i++) store(weights + i * W, x.part[i]);
  for (int i = 0; i < 16; i++) steps[i] = (float)(i + 1), worst[i] = 0;
  for (int first = 0; first < QUANT_BLOCK; first += 8) {
    vf closest = splat(1.0f);
    for (int g = 0; g < 16; g += W) {
      const vf d = splat(width) / load(steps + g), inverse = d > splat(1e-30f) ? splat(1.0f) / d : zero();
      vf off = load(worst + g);
      for (int i = first; i < first + 8; i++) {
        const vf at = (splat(weights[i]) - splat(low)) * inverse, missed = magnitude(at - rounded(at));
        off = missed > off ? missed : off;
      }
      store(worst + g, off);
      closest = least(closest, off);
    }
    if (!(fold_lanes(closest, least)[0] < CLOSE)) return;
  }
  for (int count = 1; count < 16; count++) {
    if (!(best.error > 0) || !(worst[count - 1] < CLOSE)) continue;
    const float d = width / (float)count;
    for (int first = 0; first < 16 - count; first++) offer(best, x, d, low - (float)first * d);
  }
}

constexpr float SHRINK[][2] = {{0, 0}, {0.02f, 0.02f}, {0.04f, 0.04f}, {0.06f, 0.06f}, {0.09f, 0.09f}, {0.06f, 0}, {0, 0.06f}, {0.12f, 0.03f}, {0.03f, 0.12f}};

static void quantize_q4_1(const float* weights, char* out) {
  const Block x = each([&](int i) { return load(weights + i * W) + zero(); });  // one zero: no block depends on the order of a minimum
  const float low = joined(x, least), high = joined(x, vmax), width = high - low, sum_x = sum_of(x);
  Best best;
  for (const auto& cut : SHRINK) {
    float m = low + cut[0] * width, d = ((high - cut[1] * width) - m) / 15.0f;
    least_squares(x, sum_x, offer(best, x, d, m), d, m);
    offer(best, x, d, m);
  }
  offer_grids(best, x, low, width);
  float q[QUANT_BLOCK];
  const Block codes = codes_of(x, best.d, best.m);
  for (int i = 0; i < PARTS; i++) store(q + i * W, codes.part[i]);
  const uint16_t scales[2] = {to_fp16(best.d), to_fp16(best.m)};
  __builtin_memcpy(out, scales, 4);
  for (int i = 0; i < 16; i++) out[4 + i] = (char)((int)q[i] | (int)q[i + 16] << 4);
}

static void quantize_q8_0(const float* x, char* out) {
  const uint16_t d = to_fp16(joined(each([&](int i) { return magnitude(load(x + i * W)); }), vmax) / 127.0f);
  const vf inverse = splat(inverse_of(from_fp16(d))), top = splat(127.0f);
  __builtin_memcpy(out, &d, 2);
  for (int i = 0; i < QUANT_BLOCK; i += W) {
    const vf at = load(x + i) * inverse, low = at > -top ? at : -top;
    float q[W];
    store(q, rounded(low < top ? low : top));
    for (int j = 0; j < W; j++) out[2 + i + j] = (char)(int)q[j];
  }
}

static void quantize_blocks(int dtype, const float* weights, int64_t blocks, char* out) {
  const int64_t bytes = dtype == Q8_0 ? 34 : 20;
  for (int64_t b = 0; b < blocks; b++) (dtype == Q8_0 ? quantize_q8_0 : quantize_q4_1)(weights + b * QUANT_BLOCK, out + b * bytes);
}
