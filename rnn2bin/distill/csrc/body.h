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

/* e^x by 2^k * 2^f with a polynomial of degree 6 on |f| <= 1/2: relative error below 3e-7. NaN stays NaN. */
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

static inline void gru_row(const r2b_window *w, const float *restrict x, const float *restrict product, const float *restrict noise,
                           const float *restrict before, float *restrict pre, float *restrict candidate, float *restrict inner, float *restrict h,
                           float *restrict bits) {
  int H = w->hidden;
  for (int j = 0; j < 2 * H; j++) pre[j] = x[j] + product[j];
  samples(w->modes[0], pre, noise, bits, H);
  samples(w->modes[1], pre + H, noise ? noise + H : NULL, bits + H, H);
  const float *restrict lo = w->lo, *restrict hi = w->hi;
  for (int j = 0; j < H; j++) {
    float r = hi[j] * bits[j] + lo[j] * (1.0f - bits[j]);
    float z = hi[H + j] * bits[H + j] + lo[H + j] * (1.0f - bits[H + j]);
    float u = product[2 * H + j] + w->bias[j];
    float n = tanh_(x[2 * H + j] + r * u);
    inner[j] = u;
    candidate[j] = n;
    h[j] = z * before[j] + (1.0f - z) * n;
  }
}

static inline void lstm_row(const r2b_window *w, const float *restrict x, const float *restrict product, const float *restrict noise,
                            const float *restrict c_before, float *restrict pre, float *restrict candidate, float *restrict c, float *restrict h,
                            float *restrict bits) {
  int H = w->hidden;
  for (int j = 0; j < 3 * H; j++) pre[j] = x[j] + product[j];
  for (int k = 0; k < 3; k++) samples(w->modes[k], pre + k * H, noise ? noise + k * H : NULL, bits + k * H, H);
  const float *restrict lo = w->lo, *restrict hi = w->hi;
  for (int j = 0; j < H; j++) {
    float i = hi[j] * bits[j] + lo[j] * (1.0f - bits[j]);
    float f = hi[H + j] * bits[H + j] + lo[H + j] * (1.0f - bits[H + j]);
    float o = hi[2 * H + j] * bits[2 * H + j] + lo[2 * H + j] * (1.0f - bits[2 * H + j]);
    float g = tanh_(x[3 * H + j] + product[3 * H + j]);
    float now = f * c_before[j] + i * g;
    candidate[j] = g;
    c[j] = now;
    h[j] = o * tanh_(now);
  }
}

/* Rows first … first + count through the whole window. */
int NAME(forward)(const r2b_window *w, const void *packed, int first, int count) {
  size_t H = (size_t)w->hidden, gates = w->cell == R2B_LSTM ? 3 : 2, blocks = gates + 1, B = (size_t)w->batch;
  size_t depth = up(H, 2), rows = up((size_t)count, MR), width = up(blocks * H, NR), size = w->precision == R2B_BFLOAT16 ? 2 : 4;
  void *a = calloc(rows * depth, size);
  float *out = malloc(rows * width * 4), *spare = malloc(7 * H * 4);
  if (!a || !out || !spare) {
    free(a), free(out), free(spare);
    return -1;
  }
  float *bits = spare, *n_spare = spare + 3 * H, *u_spare = spare + 4 * H;
  for (int t = 0; t < w->steps; t++) {
    for (size_t r = 0; r < (size_t)count; r++) {
      size_t b = (size_t)first + r;
      const float *before = t ? w->h + ((size_t)(t - 1) * B + b) * H : w->h0 + b * H;
      void *row = (char *)a + r * depth * size;
      operand(before, row, (int)H, depth, w->precision);
      if (w->h_before) memcpy(w->h_before + ((size_t)t * B + b) * H, row, H * 2);
    }
    product(a, depth, packed, depth, (int)(blocks * H), rows, out, width, w->precision);
    for (size_t r = 0; r < (size_t)count; r++) {
      size_t b = (size_t)first + r, at = (size_t)t * B + b;
      const float *x = w->x_pre + at * blocks * H, *noise = w->noise ? w->noise + at * gates * H : NULL;
      float *candidate = w->candidate ? w->candidate + at * H : n_spare;
      if (w->cell == R2B_LSTM) {
        const float *c_before = t ? w->c + (at - B) * H : w->c0 + b * H;
        lstm_row(w, x, out + r * width, noise, c_before, w->pre + at * gates * H, candidate, w->c + at * H, w->h + at * H, bits);
      } else {
        const float *before = t ? w->h + (at - B) * H : w->h0 + b * H;
        float *inner = w->inner ? w->inner + at * H : u_spare;
        gru_row(w, x, out + r * width, noise, before, w->pre + at * gates * H, candidate, inner, w->h + at * H, bits);
      }
    }
  }
  free(a), free(out), free(spare);
  return 0;
}

typedef struct {
  const float *pre, *noise, *candidate, *inner, *h_before, *c_before, *c, *grad_pre;
  float *grad_x, *dh, *dc, *bits, *through, *product, *d_lo, *d_hi;
} row_;

static inline void gru_row_back(const r2b_window *w, row_ q) {
  int H = w->hidden;
  const float *restrict lo = w->lo, *restrict hi = w->hi, *restrict n = q.candidate, *restrict u = q.inner, *restrict before = q.h_before;
  const float *restrict bits = q.bits, *restrict through = q.through;
  float *restrict grad = q.grad_x, *restrict dh = q.dh, *restrict product = q.product, *restrict d_lo = q.d_lo, *restrict d_hi = q.d_hi;
  for (int j = 0; j < H; j++) {
    float vr = bits[j], vz = bits[H + j];
    float r = hi[j] * vr + lo[j] * (1.0f - vr), z = hi[H + j] * vz + lo[H + j] * (1.0f - vz);
    float dn = dh[j] * (1.0f - z) * (1.0f - n[j] * n[j]);
    float dr = dn * u[j], dz = dh[j] * (before[j] - n[j]);
    d_hi[j] += dr * vr;
    d_lo[j] += dr * (1.0f - vr);
    d_hi[H + j] += dz * vz;
    d_lo[H + j] += dz * (1.0f - vz);
    float gr = dr * through[j] * (hi[j] - lo[j]), gz = dz * through[H + j] * (hi[H + j] - lo[H + j]);
    grad[j] = gr;
    grad[H + j] = gz;
    grad[2 * H + j] = dn;
    product[2 * H + j] = dn * r;
    dh[j] = dh[j] * z;
  }
  if (q.grad_pre)
    for (int j = 0; j < 2 * H; j++) grad[j] += q.grad_pre[j];
  memcpy(product, grad, (size_t)(2 * H) * 4);
}

static inline void lstm_row_back(const r2b_window *w, row_ q) {
  int H = w->hidden;
  const float *restrict lo = w->lo, *restrict hi = w->hi, *restrict g = q.candidate, *restrict c = q.c, *restrict c_before = q.c_before;
  const float *restrict bits = q.bits, *restrict through = q.through;
  float *restrict grad = q.grad_x, *restrict dh = q.dh, *restrict dc = q.dc, *restrict d_lo = q.d_lo, *restrict d_hi = q.d_hi;
  for (int j = 0; j < H; j++) {
    float vi = bits[j], vf = bits[H + j], vo = bits[2 * H + j];
    float i = hi[j] * vi + lo[j] * (1.0f - vi), f = hi[H + j] * vf + lo[H + j] * (1.0f - vf), o = hi[2 * H + j] * vo + lo[2 * H + j] * (1.0f - vo);
    float tc = tanh_(c[j]), d = dc[j] + dh[j] * o * (1.0f - tc * tc);
    float di = d * g[j], df = d * c_before[j], do_ = dh[j] * tc;
    d_hi[j] += di * vi;
    d_lo[j] += di * (1.0f - vi);
    d_hi[H + j] += df * vf;
    d_lo[H + j] += df * (1.0f - vf);
    d_hi[2 * H + j] += do_ * vo;
    d_lo[2 * H + j] += do_ * (1.0f - vo);
    grad[j] = di * through[j] * (hi[j] - lo[j]);
    grad[H + j] = df * through[H + j] * (hi[H + j] - lo[H + j]);
    grad[2 * H + j] = do_ * through[2 * H + j] * (hi[2 * H + j] - lo[2 * H + j]);
    grad[3 * H + j] = d * i * (1.0f - g[j] * g[j]);
    dc[j] = d * f;
    dh[j] = 0.0f;
  }
  if (q.grad_pre)
    for (int j = 0; j < 3 * H; j++) grad[j] += q.grad_pre[j];
}

/* Rows first … first + count from the window's end to its start; d_levels (2, G, H) is added to. */
int NAME(backward)(const r2b_window *w, const void *packed, int first, int count, float *d_levels) {
  size_t H = (size_t)w->hidden, gates = w->cell == R2B_LSTM ? 3 : 2, blocks = gates + 1, B = (size_t)w->batch, K = blocks * H;
  size_t depth = up(K, 2), rows = up((size_t)count, MR), width = up(H, NR), size = w->precision == R2B_BFLOAT16 ? 2 : 4;
  void *a = calloc(rows * depth, size);
  float *out = malloc(rows * width * 4), *dh = calloc(rows * H, 4), *dc = calloc(rows * H, 4), *spare = malloc((2 * gates + blocks) * H * 4);
  if (!a || !out || !dh || !dc || !spare) {
    free(a), free(out), free(dh), free(dc), free(spare);
    return -1;
  }
  for (int t = w->steps - 1; t >= 0; t--) {
    for (size_t r = 0; r < (size_t)count; r++) {
      size_t b = (size_t)first + r, at = (size_t)t * B + b;
      row_ q = {.pre = w->pre + at * gates * H,
                .noise = w->noise ? w->noise + at * gates * H : NULL,
                .candidate = w->candidate + at * H,
                .inner = w->inner ? w->inner + at * H : NULL,
                .h_before = t ? w->h + (at - B) * H : w->h0 + b * H,
                .grad_pre = w->grad_pre ? w->grad_pre + at * gates * H : NULL,
                .grad_x = w->grad_x + at * K,
                .dh = dh + r * H,
                .dc = dc + r * H,
                .bits = spare,
                .through = spare + gates * H,
                .product = spare + 2 * gates * H,
                .d_lo = d_levels,
                .d_hi = d_levels + gates * H};
      if (w->grad_h)
        for (size_t j = 0; j < H; j++) q.dh[j] += w->grad_h[at * H + j];
      for (size_t k = 0; k < gates; k++) {
        const float *noise = q.noise ? q.noise + k * H : NULL;
        samples(w->modes[k], q.pre + k * H, noise, q.bits + k * H, (int)H);
        derivatives(w->modes[k], q.pre + k * H, noise, q.bits + k * H, q.through + k * H, (int)H);
      }
      if (w->cell == R2B_LSTM) {
        if (w->grad_c)
          for (size_t j = 0; j < H; j++) q.dc[j] += w->grad_c[at * H + j];
        q.c = w->c + at * H;
        q.c_before = t ? w->c + (at - B) * H : w->c0 + b * H;
        lstm_row_back(w, q);
        q.product = q.grad_x;
      } else {
        gru_row_back(w, q);
      }
      void *row = (char *)a + r * depth * size;
      operand(q.product, row, (int)K, depth, w->precision);
      if (w->grad_product) memcpy((char *)w->grad_product + at * K * size, row, K * size);
    }
    product(a, depth, packed, depth, (int)H, rows, out, width, w->precision);
    for (size_t r = 0; r < (size_t)count; r++)
      for (size_t j = 0; j < H; j++) dh[r * H + j] += out[r * width + j];
  }
  memcpy(w->grad_h0 + (size_t)first * H, dh, (size_t)count * H * 4);
  if (w->cell == R2B_LSTM) memcpy(w->grad_c0 + (size_t)first * H, dc, (size_t)count * H * 4);
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
