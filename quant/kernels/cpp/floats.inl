// f32 rows between the products: norm, activation, softmax.

// e^x to 2e-7 relative: x = n ln 2 + r, a polynomial in r (Cephes), 2^n put into the exponent.
INLINE vf exponential(vf x) {
  x = larger(splat(-87.3f), smaller(splat(88.3f), x));  // in this order a NaN stays one
  const vi n = rounded(x * 1.44269504088896341f);
  const vf whole = to_float(n);
  const vf r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (vf)((vi)p + (n << 23));
}

// gate[i] = silu(scale * gate[i]) * (scale * up[i])
static void silu_multiply(float* gate, const float* up, int64_t count, float scale) {
  auto one = [scale](vf g, vf u) __attribute__((always_inline)) {
    g *= scale;
    return g / (1.0f + exponential(-g)) * (u * scale);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(gate + i, one(load<vf>(gate + i), load<vf>(up + i)));
  if (i < count) {
    float g[kLanes] = {}, u[kLanes] = {};
    const size_t rest = size_t(count - i) * 4;
    __builtin_memcpy(g, gate + i, rest);
    __builtin_memcpy(u, up + i, rest);
    store(g, one(load<vf>(g), load<vf>(u)));
    __builtin_memcpy(gate + i, g, rest);
  }
}

static float dot(const float* a, const float* b, int64_t count) {
  vf acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int u = 0; u < 4; ++u) acc[u] += load<vf>(a + i + u * kLanes) * load<vf>(b + i + u * kLanes);
  for (; i + kLanes <= count; i += kLanes) acc[0] += load<vf>(a + i) * load<vf>(b + i);
  float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

// y = x / sqrt(mean(x^2) + eps) * weight; a null weight is all ones. x and y may be the same row.
static void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* y) {
  const float factor = 1.0f / __builtin_sqrtf(dot(x, x, count) / float(count) + eps);
  if (weight)
    for (int64_t i = 0; i < count; ++i) y[i] = x[i] * factor * weight[i];
  else
    for (int64_t i = 0; i < count; ++i) y[i] = x[i] * factor;
}

static void blend(float* y, const float* x, int64_t count, float of_y, float of_x) {
  for (int64_t i = 0; i < count; ++i) y[i] = y[i] * of_y + x[i] * of_x;
}

// y += factor * x
static void add_scaled(float* y, const float* x, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) y[i] += factor * x[i];
}
