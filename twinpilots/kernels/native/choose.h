// What a draw computes over a whole vocabulary. Included inside each instruction set's namespace. runtime/choice.py says the same in numpy, to the last bit: every
// step is one rounded operation, in one order.

// p[i] = exp((x[i] - best) / temperature), 0 where the exponent is below `floor` or no number of any size is left.
static void exp_row(const float* x, int64_t n, float best, float temperature, float floor, double* p) {
  constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, which then is in the low bits
  for (int64_t i = 0; i < n; i++) {
    const float s = (x[i] - best) / temperature;
    const double d = s > -700.0f ? (double)s : -700.0;
    const double t = d * 1.4426950408889634 + MAGIC, k = t - MAGIC;
    const double r = (d - k * 0.693145751953125) - k * 1.42860682030941723212e-6;
    double e = 1.0 / 479001600.0;
    e = e * r + 1.0 / 39916800.0;
    e = e * r + 1.0 / 3628800.0;
    e = e * r + 1.0 / 362880.0;
    e = e * r + 1.0 / 40320.0;
    e = e * r + 1.0 / 5040.0;
    e = e * r + 1.0 / 720.0;
    e = e * r + 1.0 / 120.0;
    e = e * r + 1.0 / 24.0;
    e = e * r + 1.0 / 6.0;
    e = e * r + 0.5;
    e = e * r + 1.0;
    e = e * r + 1.0;
    int64_t bits;
    __builtin_memcpy(&bits, &t, sizeof bits);
    bits = (int64_t)((uint64_t)(bits + 1023) << 52);
    double scale;
    __builtin_memcpy(&scale, &bits, sizeof scale);
    const double v = e * scale;
    p[i] = s >= floor && s > -700.0f ? v : 0.0;
  }
}

// Sums of 64 numbers each, in eight lanes folded in a fixed order; n is a multiple of 64.
static void sum_blocks(const double* p, int64_t n, double* sums) {
  for (int64_t b = 0; b < n / 64; b++, p += 64) {
    double s[8];
    for (int j = 0; j < 8; j++) s[j] = p[j];
    for (int i = 8; i < 64; i += 8)
      for (int j = 0; j < 8; j++) s[j] += p[i + j];
    sums[b] = fold8(s);
  }
}
