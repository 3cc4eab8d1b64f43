// What follows a linear's sums: bias, activation, gate times up, soft cap. Included inside each instruction set's namespace, after vector.h.

TP_INLINE vf bias_vector(const float* bias, int64_t c, int64_t left) {
  if (!bias) return zero();
  return left >= W ? load(bias + c) : load_n(bias + c, left);
}

// One row of sums y (of a panel of `columns` outputs; ACT_MUL: gate columns, then up columns) to dst.
static void epilogue_row(const LinearArgs& a, const float* y, int64_t first, int64_t columns, float* dst) {
  for (int64_t c = 0; c < columns; c += W) {
    const int64_t left = columns - c;
    vf v = left >= W ? load(y + c) : load_n(y + c, left);
    if (a.bias) v = v + bias_vector(a.bias + first, c, left);
    if (a.epilogue == ACT || a.epilogue == ACT_MUL) v = activate(a.activation, v);
    if (a.epilogue == ACT_MUL) {
      vf up = left >= W ? load(y + columns + c) : load_n(y + columns + c, left);
      if (a.bias2) up = up + bias_vector(a.bias2 + first, c, left);
      v = v * up;
    }
    if (a.epilogue == SOFTCAP) v = splat(a.softcap) * vtanh(v / splat(a.softcap));
    if (left >= W) {
      store(dst + c, v);
    } else {
      store_n(dst + c, v, left);
    }
  }
}
