/* The kernels' one body, compiled once for every instruction set: the including file names it with NAME(x) and the flags set VL. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "parts.h"

#if defined(__AVX512F__)
#define VL 16
#define MR 8
#elif defined(__AVX2__)
#define VL 8
#define MR 4
#else
#define VL 4
#define MR 4
#endif
#define NV 3
#define NR (NV * VL)

typedef float vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));

#if defined(__AVX512BF16__)
#include <immintrin.h>
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif

static inline uint16_t to_bf16(float x) {
  union { float f; uint32_t u; } v = {x};
  if (x != x) return 0x7fc0;
  return (uint16_t)((v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16);
}

/* e^x by 2^k * 2^f with a polynomial of degree 6 on |f| <= 1/2. Relative error 1e-7 for |x| < 1 and 4e-6 at the ends, where x * log2(e) is
 * rounded; sigmoid and tanh from it are within 2e-7. NaN stays NaN. */
static inline float exp_(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  float y = x * 1.44269504f;
  float k = (y + 12582912.0f) - 12582912.0f;
  float f = y - k;
  float p = 1.53533e-4f;
  p = p * f + 1.33989e-3f;
  p = p * f + 9.61844e-3f;
  p = p * f + 5.550327e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  union { uint32_t u; float f; } scale = {(uint32_t)((int32_t)k + 127) << 23};
  return p * scale.f;
}
static inline float sigmoid_(float x) { return 1.0f / (1.0f + exp_(-x)); }
static inline float tanh_(float x) { return 2.0f / (1.0f + exp_(-2.0f * x)) - 1.0f; }

static inline size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* Operands of the product, packed: panels of NR columns; in bfloat16 two steps of k stand side by side. */
size_t NAME(packed_bytes)(int k, int n, int precision) {
  size_t columns = up((size_t)n, NR), depth = up((size_t)k, 2);
  return columns * depth * (precision == R2B_BFLOAT16 ? 2 : 4);
}

/* Element (k, n) of the operand is source[k * step_k + n * step_n]. */
void NAME(pack)(const float *source, size_t step_k, size_t step_n, int k, int n, int precision, void *packed) {
  size_t depth = up((size_t)k, 2);
  memset(packed, 0, NAME(packed_bytes)(k, n, precision));
  for (size_t start = 0; start < (size_t)n; start += NR) {
    size_t columns = (size_t)n - start < NR ? (size_t)n - start : NR;
    for (size_t kk = 0; kk < (size_t)k; kk++) {
      const float *from = source + kk * step_k + start * step_n;
      if (precision == R2B_BFLOAT16) {
        uint16_t *to = (uint16_t *)packed + start * depth + (kk / 2) * NR * 2 + kk % 2;
        for (size_t j = 0; j < columns; j++) to[2 * j] = to_bf16(from[j * step_n]);
      } else {
        float *to = (float *)packed + start * depth + kk * NR;
        for (size_t j = 0; j < columns; j++) to[j] = from[j * step_n];
      }
    }
  }
}

static inline void block_f32(const float *a, size_t lda, const float *b, size_t depth, float *out, size_t ldo) {
  vec acc[MR][NV];
  for (int r = 0; r < MR; r++)
    for (int v = 0; v < NV; v++) acc[r][v] = (vec){0};
  for (size_t k = 0; k < depth; k++, b += NR) {
    vec b0 = *(const vec *)b, b1 = *(const vec *)(b + VL), b2 = *(const vec *)(b + 2 * VL);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++) {
      float x = a[(size_t)r * lda + k];
      acc[r][0] += b0 * x;
      acc[r][1] += b1 * x;
      acc[r][2] += b2 * x;
    }
  }
  for (int r = 0; r < MR; r++)
    for (int v = 0; v < NV; v++) *(vec *)(out + (size_t)r * ldo + v * VL) = acc[r][v];
}

#if HAS_BF16
static inline void block_bf16(const uint16_t *a, size_t lda, const uint16_t *b, size_t depth, float *out, size_t ldo) {
  __m512 acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; r++)
    for (int v = 0; v < NV; v++) acc[r][v] = _mm512_setzero_ps();
  for (size_t k = 0; k < depth; k += 2, b += NR * 2) {
    __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 2 * VL),
             b2 = (__m512bh)_mm512_loadu_si512(b + 4 * VL);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++) {
      int32_t pair;
      memcpy(&pair, a + (size_t)r * lda + k, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], x, b0);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], x, b1);
      acc[r][2] = _mm512_dpbf16_ps(acc[r][2], x, b2);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; r++)
    for (int v = 0; v < NV; v++) _mm512_storeu_ps(out + (size_t)r * ldo + v * VL, acc[r][v]);
}
#endif

/* out (rows, n) = a (rows, depth) * packed; rows a multiple of MR, out's rows ldo apart with room for whole panels. */
static void product(const void *a, size_t lda, const void *packed, size_t depth, int n, size_t rows, float *out, size_t ldo, int precision) {
  for (size_t panel = 0; panel * NR < (size_t)n; panel++)
    for (size_t r = 0; r < rows; r += MR) {
#if HAS_BF16
      if (precision == R2B_BFLOAT16) {
        block_bf16((const uint16_t *)a + r * lda, lda, (const uint16_t *)packed + panel * NR * depth, depth, out + r * ldo + panel * NR, ldo);
        continue;
      }
#endif
      (void)precision;
      block_f32((const float *)a + r * lda, lda, (const float *)packed + panel * NR * depth, depth, out + r * ldo + panel * NR, ldo);
    }
}

static inline float sample_(r2b_mode m, float pre, float noise) {
  float a = m.scale * pre + noise;
  return m.sample == R2B_BIT ? (a > 0.0f ? 1.0f : 0.0f) : sigmoid_(a * m.sharpness);
}

/* A gate of one row: samples (H) from pre and noise (or null). */
static inline void samples(r2b_mode m, const float *restrict pre, const float *restrict noise, float *restrict value, int hidden) {
  if (m.sample == R2B_BIT && !noise) {
    for (int j = 0; j < hidden; j++) value[j] = m.scale * pre[j] > 0.0f ? 1.0f : 0.0f;
  } else if (noise) {
    for (int j = 0; j < hidden; j++) value[j] = sample_(m, pre[j], noise[j]);
  } else {
    for (int j = 0; j < hidden; j++) value[j] = sample_(m, pre[j], 0.0f);
  }
}

/* Derivatives of the samples, by the mode. */
static inline void derivatives(r2b_mode m, const float *restrict pre, const float *restrict noise, const float *restrict value, float *restrict d,
                               int hidden) {
  if (m.sample == R2B_SOFT) {
    float k = m.scale * m.sharpness;
    for (int j = 0; j < hidden; j++) d[j] = value[j] * (1.0f - value[j]) * k;
  } else if (m.noisy && noise) {
    float k = m.scale * m.sharpness;
    for (int j = 0; j < hidden; j++) {
      float y = sigmoid_((m.scale * pre[j] + noise[j]) * m.sharpness);
      d[j] = y * (1.0f - y) * k;
    }
  } else if (m.by == R2B_BY_SIGMOID) {
    for (int j = 0; j < hidden; j++) {
      float y = sigmoid_(m.slope * pre[j]);
      d[j] = y * (1.0f - y) * m.slope;
    }
  } else if (m.by == R2B_BY_WINDOW) {
    for (int j = 0; j < hidden; j++) d[j] = fabsf(pre[j]) * m.slope < 1.0f ? m.slope * 0.5f : 0.0f;
  } else {
    for (int j = 0; j < hidden; j++) d[j] = 1.0f;
  }
}

/* One row of an operand from float32, zeros up to the depth. */
static inline void operand(const float *restrict source, void *restrict to, int n, size_t depth, int precision) {
  if (precision == R2B_BFLOAT16) {
    uint16_t *row = to;
    for (int j = 0; j < n; j++) row[j] = to_bf16(source[j]);
    for (size_t j = (size_t)n; j < depth; j++) row[j] = 0;
  } else {
    memcpy(to, source, (size_t)n * 4);
    memset((float *)to + n, 0, (depth - (size_t)n) * 4);
  }
}

/* pre (W) of one gate: a product a unit, a bias a copy. */
static inline void thresholds(const float *restrict product, const float *restrict bias, float *restrict pre, int hidden, int copies) {
  for (int k = 0; k < copies; k++)
    for (int j = 0; j < hidden; j++) pre[k * hidden + j] = product[j] + bias[k * hidden + j];
}

static inline void add(const float *restrict x, const float *restrict product, float *restrict sum, int n) {
  for (int j = 0; j < n; j++) sum[j] = x[j] + product[j];
}

/* What others read of a state (W): the mean over copies (H). */
static inline void fold(const float *restrict h, float *restrict mean, int hidden, int copies) {
  float share = 1.0f / (float)copies;
  for (int j = 0; j < hidden; j++) mean[j] = h[j] * share;
  for (int k = 1; k < copies; k++)
    for (int j = 0; j < hidden; j++) mean[j] += h[k * hidden + j] * share;
}

/* levels (W) of a gate from its samples: exactly lo at 0 and hi at 1. */
static inline void levels(const float *restrict lo, const float *restrict hi, const float *restrict sample, float *restrict value, int width) {
  for (int j = 0; j < width; j++) value[j] = hi[j] * sample[j] + lo[j] * (1.0f - sample[j]);
}

static inline void gru_copy(int H, const float *restrict x, const float *restrict u, const float *restrict r, const float *restrict z,
                            const float *restrict before, float *restrict n, float *restrict h) {
  for (int j = 0; j < H; j++) {
    float value = tanh_(x[j] + r[j] * u[j]);
    n[j] = value;
    h[j] = z[j] * before[j] + (1.0f - z[j]) * value;
  }
}

/* values (5 W): a level for each gate, then room for a gate's pre-activations and samples. */
static void gate_values(const r2b_window *w, int gates, const float *products, const float *noise, float *values) {
  int H = w->hidden, W = H * w->copies;
  float *pre = values + gates * W, *sample = values + (gates + 1) * W;
  for (int g = 0; g < gates; g++) {
    thresholds(products + g * H, w->gates_bias + g * W, pre, H, w->copies);
    samples(w->modes[g], pre, noise ? noise + g * W : NULL, sample, W);
    levels(w->lo + g * W, w->hi + g * W, sample, values + g * W, W);
  }
}

static void gru_row(const r2b_window *w, const float *x, const float *product, const float *noise, const float *before, float *products,
                    float *candidate, float *inner, float *h, float *values) {
  int H = w->hidden, W = H * w->copies;
  add(x, product, products, 2 * H);
  gate_values(w, 2, products, noise, values);
  for (int j = 0; j < H; j++) inner[j] = product[2 * H + j] + w->bias[j];
  for (int k = 0; k < w->copies; k++) gru_copy(H, x + 2 * H, inner, values + k * H, values + W + k * H, before + k * H, candidate + k * H, h + k * H);
}

static inline void lstm_copy(int H, const float *restrict g, const float *restrict i, const float *restrict f, const float *restrict o, float share,
                             const float *restrict before, float *restrict c, float *restrict h) {
  for (int j = 0; j < H; j++) {
    float now = f[j] * before[j] + i[j] * g[j];
    c[j] = now;
    h[j] += o[j] * tanh_(now) * share;
  }
}

static void lstm_row(const r2b_window *w, const float *x, const float *product, const float *noise, const float *before, float *products,
                     float *candidate, float *c, float *h, float *values) {
  int H = w->hidden, W = H * w->copies;
  add(x, product, products, 3 * H);
  gate_values(w, 3, products, noise, values);
  for (int j = 0; j < H; j++) candidate[j] = tanh_(x[3 * H + j] + product[3 * H + j]);
  memset(h, 0, (size_t)H * 4);
  for (int k = 0; k < w->copies; k++)
    lstm_copy(H, candidate, values + k * H, values + W + k * H, values + 2 * W + k * H, 1.0f / (float)w->copies, before + k * H, c + k * H, h);
}

/* Rows first … first + count through the whole window. */
int NAME(forward)(const r2b_window *w, const void *packed, int first, int count) {
  size_t H = (size_t)w->hidden, W = H * (size_t)w->copies, lstm = w->cell == R2B_LSTM, gates = lstm ? 3 : 2, blocks = gates + 1;
  size_t B = (size_t)w->batch, state = lstm ? H : W, candidates = lstm ? H : W; /* widths of h and of the candidate */
  size_t depth = up(H, 2), rows = up((size_t)count, MR), width = up(blocks * H, NR), size = w->precision == R2B_BFLOAT16 ? 2 : 4;
  void *a = calloc(rows * depth, size);
  float *out = malloc(rows * width * 4), *spare = malloc((6 * W + 2 * H) * 4);
  if (!a || !out || !spare) {
    free(a), free(out), free(spare);
    return -1;
  }
  float *values = spare, *n_spare = spare + 5 * W, *u_spare = spare + 6 * W, *mean = spare + 6 * W + H;
  for (int t = 0; t < w->steps; t++) {
    for (size_t r = 0; r < (size_t)count; r++) {
      size_t b = (size_t)first + r;
      const float *before = t ? w->h + ((size_t)(t - 1) * B + b) * state : w->h0 + b * state;
      void *row = (char *)a + r * depth * size;
      if (state > H) {
        fold(before, mean, (int)H, w->copies);
        before = mean;
      }
      operand(before, row, (int)H, depth, w->precision);
      if (w->h_before) memcpy(w->h_before + ((size_t)t * B + b) * H, row, H * 2);
    }
    product(a, depth, packed, depth, (int)(blocks * H), rows, out, width, w->precision);
    for (size_t r = 0; r < (size_t)count; r++) {
      size_t b = (size_t)first + r, at = (size_t)t * B + b;
      const float *x = w->x_pre + at * blocks * H, *noise = w->noise ? w->noise + at * gates * W : NULL;
      float *candidate = w->candidate ? w->candidate + at * candidates : n_spare;
      if (lstm) {
        const float *c_before = t ? w->c + (at - B) * W : w->c0 + b * W;
        lstm_row(w, x, out + r * width, noise, c_before, w->products + at * gates * H, candidate, w->c + at * W, w->h + at * H, values);
      } else {
        const float *before = t ? w->h + (at - B) * W : w->h0 + b * W;
        gru_row(w, x, out + r * width, noise, before, w->products + at * gates * H, candidate, w->inner ? w->inner + at * H : u_spare, w->h + at * W,
                values);
      }
    }
  }
  free(a), free(out), free(spare);
  return 0;
}

/* One gate's share of the backward pass: what its value received (received, W) -> the gradient of pre (W), and the sums for levels and bias. */
static inline void gate_back(const float *restrict received, const float *restrict sample, const float *restrict through, const float *restrict lo,
                             const float *restrict hi, float *restrict d_pre, float *restrict d_bias, float *restrict d_lo, float *restrict d_hi,
                             int width) {
  for (int j = 0; j < width; j++) {
    float d = received[j] * through[j] * (hi[j] - lo[j]);
    d_hi[j] += received[j] * sample[j];
    d_lo[j] += received[j] * (1.0f - sample[j]);
    d_pre[j] = d;
    d_bias[j] += d;
  }
}

/* The sum over copies (W -> H). */
static inline void gather(const float *restrict x, float *restrict sum, int hidden, int copies) {
  for (int j = 0; j < hidden; j++) sum[j] = x[j];
  for (int k = 1; k < copies; k++)
    for (int j = 0; j < hidden; j++) sum[j] += x[k * hidden + j];
}

static inline void gru_copy_back(int H, const float *restrict u, const float *restrict n, const float *restrict r, const float *restrict z,
                                 const float *restrict before, float *restrict dh, float *restrict dr, float *restrict dz, float *restrict dn_sum,
                                 float *restrict dnr_sum) {
  for (int j = 0; j < H; j++) {
    float dn = dh[j] * (1.0f - z[j]) * (1.0f - n[j] * n[j]);
    dr[j] = dn * u[j];
    dz[j] = dh[j] * (before[j] - n[j]);
    dn_sum[j] += dn;
    dnr_sum[j] += dn * r[j];
    dh[j] *= z[j];
  }
}

static inline void lstm_copy_back(int H, const float *restrict g, const float *restrict i, const float *restrict f, const float *restrict o,
                                  const float *restrict c, const float *restrict before, const float *restrict dh, float share, float *restrict dc,
                                  float *restrict di, float *restrict df, float *restrict do_, float *restrict dg_sum) {
  for (int j = 0; j < H; j++) {
    float tc = tanh_(c[j]), dm = dh[j] * share, d = dc[j] + dm * o[j] * (1.0f - tc * tc);
    di[j] = d * g[j];
    df[j] = d * before[j];
    do_[j] = dm * tc;
    dg_sum[j] += d * i[j] * (1.0f - g[j] * g[j]);
    dc[j] = d * f[j];
  }
}

/* Rows first … first + count from the window's end to its start; d_levels (3, G, W), for bias, lo and hi, is added to. */
int NAME(backward)(const r2b_window *w, const void *packed, int first, int count, float *d_levels) {
  size_t H = (size_t)w->hidden, W = H * (size_t)w->copies, lstm = w->cell == R2B_LSTM, gates = lstm ? 3 : 2, blocks = gates + 1;
  size_t B = (size_t)w->batch, K = blocks * H, state = lstm ? H : W;
  size_t depth = up(K, 2), rows = up((size_t)count, MR), width = up(H, NR), size = w->precision == R2B_BFLOAT16 ? 2 : 4;
  void *a = calloc(rows * depth, size);
  float *out = malloc(rows * width * 4), *dh = calloc(rows * state, 4), *dc = calloc(rows * W, 4), *spare = malloc(((4 * gates + 2) * W + K) * 4);
  if (!a || !out || !dh || !dc || !spare) {
    free(a), free(out), free(dh), free(dc), free(spare);
    return -1;
  }
  float *sample = spare, *through = spare + gates * W, *value = spare + 2 * gates * W, *received = spare + 3 * gates * W;
  float *pre = spare + 4 * gates * W, *d_pre = pre + W;
  float *back = d_pre + W; /* (K): the gradient of the recurrent product */
  float share = 1.0f / (float)w->copies;
  for (int t = w->steps - 1; t >= 0; t--) {
    for (size_t r = 0; r < (size_t)count; r++) {
      size_t b = (size_t)first + r, at = (size_t)t * B + b;
      const float *noise = w->noise ? w->noise + at * gates * W : NULL;
      float *d = dh + r * state, *grad = w->grad_x + at * K, *dc_row = dc + r * W;
      if (w->grad_h)
        for (size_t j = 0; j < state; j++) d[j] += w->grad_h[at * state + j];
      for (size_t g = 0; g < gates; g++) {
        const float *gate_noise = noise ? noise + g * W : NULL;
        thresholds(w->products + (at * gates + g) * H, w->gates_bias + g * W, pre, (int)H, w->copies);
        samples(w->modes[g], pre, gate_noise, sample + g * W, (int)W);
        derivatives(w->modes[g], pre, gate_noise, sample + g * W, through + g * W, (int)W);
        levels(w->lo + g * W, w->hi + g * W, sample + g * W, value + g * W, (int)W);
      }
      memset(grad + gates * H, 0, H * 4);
      memset(back + gates * H, 0, H * 4);
      if (lstm) {
        const float *before = t ? w->c + (at - B) * W : w->c0 + b * W;
        if (w->grad_c)
          for (size_t j = 0; j < W; j++) dc_row[j] += w->grad_c[at * W + j];
        for (size_t k = 0; k < (size_t)w->copies; k++)
          lstm_copy_back((int)H, w->candidate + at * H, value + k * H, value + W + k * H, value + 2 * W + k * H, w->c + at * W + k * H, before + k * H,
                         d, share, dc_row + k * H, received + k * H, received + W + k * H, received + 2 * W + k * H, grad + 3 * H);
        memcpy(back + 3 * H, grad + 3 * H, H * 4);
        memset(d, 0, H * 4);
      } else {
        const float *before = t ? w->h + (at - B) * W : w->h0 + b * W;
        for (size_t k = 0; k < (size_t)w->copies; k++)
          gru_copy_back((int)H, w->inner + at * H, w->candidate + at * W + k * H, value + k * H, value + W + k * H, before + k * H, d + k * H,
                        received + k * H, received + W + k * H, grad + 2 * H, back + 2 * H);
      }
      for (size_t g = 0; g < gates; g++) {
        gate_back(received + g * W, sample + g * W, through + g * W, w->lo + g * W, w->hi + g * W, d_pre, d_levels + g * W,
                  d_levels + (gates + g) * W, d_levels + (2 * gates + g) * W, (int)W);
        gather(d_pre, grad + g * H, (int)H, w->copies);
      }
      if (w->grad_gates)
        for (size_t j = 0; j < gates * H; j++) grad[j] += w->grad_gates[at * gates * H + j];
      memcpy(back, grad, gates * H * 4);
      void *row = (char *)a + r * depth * size;
      operand(back, row, (int)K, depth, w->precision);
      if (w->grad_product) memcpy((char *)w->grad_product + at * K * size, row, K * size);
    }
    product(a, depth, packed, depth, (int)H, rows, out, width, w->precision);
    for (size_t r = 0; r < (size_t)count; r++)
      for (size_t k = 0; k < state / H; k++)
        for (size_t j = 0; j < H; j++) dh[r * state + k * H + j] += out[r * width + j] * (lstm ? 1.0f : share);
  }
  memcpy(w->grad_h0 + (size_t)first * state, dh, (size_t)count * state * 4);
  if (lstm) memcpy(w->grad_c0 + (size_t)first * W, dc, (size_t)count * W * 4);
  free(a), free(out), free(dh), free(dc), free(spare);
  return 0;
}

/* Rows first … first + count of y = x * packed + bias, in stretches that stay in the cache. */
int NAME(linear)(const float *x, const void *packed, const float *bias, float *y, int k, int n, int first, int count) {
  size_t depth = up((size_t)k, 2), width = up((size_t)n, NR), stretch = 8 * MR;
  uint16_t *a = calloc(stretch * depth, 2);
  float *out = malloc(stretch * width * 4);
  if (!a || !out) {
    free(a), free(out);
    return -1;
  }
  for (size_t at = 0; at < (size_t)count; at += stretch) {
    size_t rows = (size_t)count - at < stretch ? (size_t)count - at : stretch, row0 = (size_t)first + at;
    for (size_t r = 0; r < rows; r++) operand(x + (row0 + r) * (size_t)k, a + r * depth, k, depth, R2B_BFLOAT16);
    product(a, depth, packed, depth, n, up(rows, MR), out, width, R2B_BFLOAT16);
    for (size_t r = 0; r < rows; r++) {
      float *to = y + (row0 + r) * (size_t)n;
      const float *from = out + r * width;
      if (bias)
        for (int j = 0; j < n; j++) to[j] = from[j] + bias[j];
      else
        memcpy(to, from, (size_t)n * 4);
    }
  }
  free(a), free(out);
  return 0;
}

const isa_kernels NAME(kernels) = {NAME(packed_bytes), NAME(pack), NAME(forward), NAME(backward), NAME(linear), HAS_BF16, MR};
