/* Elementwise functions as plain loops: compilers turn them into vectors. Errors are those of float arithmetic, a few units in the last
 * place (tests/test_runtime_native.py holds the bound). */

INLINE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}

/* e^x = 2^n e^r with |r| <= ln 2 / 2; the polynomial is Cephes' expf (Moshier). NaN stays NaN. */
INLINE float exp_of(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the whole part stands in the lowest bits */
  float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r += n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits_to_float((float_to_bits(shifted) - 0x4b400000u + 127u) << 23);
}

INLINE float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

/* tanh is x P(x^2) / Q(x^2), the smallest largest relative error (2e-7, 5e-7 with float32's own) up to where it rounds to 1; found by
 * linear programming (scripts/fit_tanh.py). NaN stays NaN. */
static const float TANH_MOST = 0x1.f9f09ep+2f;
static const float TANH_P[5] = {0x1.fffffap-1f, 0x1.047d5ap-3f, 0x1.625ae2p-9f, 0x1.e4530ap-18f, -0x1.ad014ep-28f};
static const float TANH_Q[4] = {1.0f, 0x1.d79396p-2f, 0x1.76df20p-6f, 0x1.9e896ep-13f};

INLINE float tanh_of(float x) {
  x = x > TANH_MOST ? TANH_MOST : x;
  x = x < -TANH_MOST ? -TANH_MOST : x;
  float s = x * x, p = TANH_P[4], q = TANH_Q[3];
  for (int k = 3; k >= 0; k--) p = p * s + TANH_P[k];
  for (int k = 2; k >= 0; k--) q = q * s + TANH_Q[k];
  return x * p / q;
}

/* The same of a vector; of v_min and v_max a NaN in the second stays. */
INLINE V v_tanh(V x) {
  x = v_max(v_all(-TANH_MOST), v_min(v_all(TANH_MOST), x));
  V s = v_mul(x, x), p = v_all(TANH_P[4]), q = v_all(TANH_Q[3]);
  for (int k = 3; k >= 0; k--) p = v_fma(p, s, v_all(TANH_P[k]));
  for (int k = 2; k >= 0; k--) q = v_fma(q, s, v_all(TANH_Q[k]));
  return v_div(v_mul(x, p), q);
}

/* x in [-most, most]; NaN stays NaN. */
INLINE float bounded(float x, float most) { return x > most ? most : x < -most ? -most : x; }

static void normalize(float *y, int n) {
  float sum = 0.0f;
  for (int j = 0; j < n; j++) sum += y[j] * y[j];
  float length = sqrtf(sum) > 1e-12f ? sqrtf(sum) : 1e-12f;
  for (int j = 0; j < n; j++) y[j] /= length;
}

static void softmax(float *y, int n, int logarithm) {
  float most = y[0], sum = 0.0f;
  for (int j = 1; j < n; j++) most = y[j] > most ? y[j] : most;
  for (int j = 0; j < n; j++) sum += exp_of(y[j] - most);
  float shift = most + logf(sum);
  for (int j = 0; j < n; j++) y[j] = logarithm ? y[j] - shift : exp_of(y[j] - most) / sum;
}

static void activate(activation kind, float *y, int n) {
  if (kind == ACT_RELU || kind == ACT_RELU_L2)
    for (int j = 0; j < n; j++) y[j] = y[j] < 0.0f ? 0.0f : y[j];
  if (kind == ACT_TANH)
    for (int j = 0; j < n; j++) y[j] = tanh_of(y[j]);
  if (kind == ACT_SIGMOID)
    for (int j = 0; j < n; j++) y[j] = sigmoid_of(y[j]);
  if (kind == ACT_SOFTMAX || kind == ACT_LOG_SOFTMAX) softmax(y, n, kind == ACT_LOG_SOFTMAX);
  if (kind == ACT_L2 || kind == ACT_RELU_L2) normalize(y, n);
}
