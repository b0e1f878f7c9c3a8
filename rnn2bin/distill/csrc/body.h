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
#define DRAWN 64 /* places whose noise is drawn together */

typedef float vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));

#if defined(__AVX512BF16__)
#include <immintrin.h>
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif

static inline uint32_t bf16_bits(float x) {
  union { float f; uint32_t u; } v = {x};
  uint32_t rounded = (v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16;
  return x == x ? rounded : 0x7fc0u;
}
static inline uint16_t to_bf16(float x) { return (uint16_t)bf16_bits(x); }

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

/* Operands of a product, packed: panels of NR columns; in bfloat16 two steps of k stand side by side. */
size_t NAME(packed_bytes)(int k, int n, int precision) {
  size_t columns = up((size_t)n, NR), depth = up((size_t)k, 2);
  return columns * depth * (precision == R2B_BFLOAT16 ? 2 : 4);
}

/* One strip of `wide` lanes, of which `used` are there, for k steps; lanes step_n apart, k step_k apart. */
static inline __attribute__((always_inline)) void strip_f32(const float *source, size_t step_k, size_t step_n, size_t k, size_t used, size_t wide,
                                                            float *to) {
  for (size_t kk = 0; kk < k; kk++, to += wide)
    for (size_t j = 0; j < used; j++) to[j] = source[kk * step_k + j * step_n];
}

static inline __attribute__((always_inline)) void strip_bf16(const float *source, size_t step_k, size_t step_n, size_t k, size_t used, size_t wide,
                                                             uint32_t *to) {
  for (size_t kk = 0; kk + 1 < k; kk += 2, to += wide)
    for (size_t j = 0; j < used; j++) {
      const float *from = source + kk * step_k + j * step_n;
      to[j] = bf16_bits(from[0]) | bf16_bits(from[step_k]) << 16;
    }
  for (size_t j = 0; k % 2 && j < used; j++) to[j] = to_bf16(source[(k - 1) * step_k + j * step_n]);
}

/* As above; whole strips whose lanes lie side by side are the case that counts, and the compiler sees it. */
static inline __attribute__((always_inline)) void strip(const float *source, size_t step_k, size_t step_n, size_t k, size_t used, size_t wide,
                                                        int precision, void *to) {
  if (used < wide) memset(to, 0, up(k, 2) * wide * (precision == R2B_BFLOAT16 ? 2 : 4));
  if (precision == R2B_BFLOAT16) {
    if (used == wide && step_n == 1)
      strip_bf16(source, step_k, 1, k, wide, wide, to);
    else
      strip_bf16(source, step_k, step_n, k, used, wide, to);
  } else {
    if (used == wide && step_n == 1)
      strip_f32(source, step_k, 1, k, wide, wide, to);
    else
      strip_f32(source, step_k, step_n, k, used, wide, to);
    if (k % 2) memset((float *)to + k * wide, 0, wide * 4);
  }
}

/* Element (k, n) of the operand is source[k * step_k + n * step_n]. */
void NAME(pack)(const float *source, size_t step_k, size_t step_n, int k, int n, int precision, void *packed) {
  size_t depth = up((size_t)k, 2), size = precision == R2B_BFLOAT16 ? 2 : 4;
  for (size_t start = 0; start < (size_t)n; start += NR) {
    size_t columns = (size_t)n - start < NR ? (size_t)n - start : NR;
    strip(source + start * step_n, step_k, step_n, (size_t)k, columns, NR, precision, (char *)packed + start * depth * size);
  }
}

/* MR rows of `a` (r apart by step_r, k by step_k) times a panel of which nv vectors are wanted. */
static inline __attribute__((always_inline)) void block_f32(const float *a, size_t step_r, size_t step_k, const float *b, size_t depth, int nv,
                                                            float *out, size_t ldo, int add) {
  vec acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 3
    for (int v = 0; v < nv; v++) acc[r][v] = (vec){0};
  for (size_t k = 0; k < depth; k++, b += NR) {
    vec right[NV];
#pragma GCC unroll 3
    for (int v = 0; v < nv; v++) right[v] = *(const vec *)(b + v * VL);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++) {
      float x = a[(size_t)r * step_r + k * step_k];
#pragma GCC unroll 3
      for (int v = 0; v < nv; v++) acc[r][v] += right[v] * x;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 3
    for (int v = 0; v < nv; v++) {
      vec *to = (vec *)(out + (size_t)r * ldo + v * VL);
      if (add) acc[r][v] += *to;
      *to = acc[r][v];
    }
}

#if HAS_BF16
/* As above; step_k between pairs. */
static inline __attribute__((always_inline)) void block_bf16(const uint16_t *a, size_t step_r, size_t step_k, const uint16_t *b, size_t depth, int nv,
                                                             float *out, size_t ldo, int add) {
  __m512 acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 3
    for (int v = 0; v < nv; v++) acc[r][v] = _mm512_setzero_ps();
  for (size_t k = 0; k < depth / 2; k++, b += NR * 2) {
    __m512bh right[NV];
#pragma GCC unroll 3
    for (int v = 0; v < nv; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + v * 2 * VL);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++) {
      int32_t pair;
      memcpy(&pair, a + (size_t)r * step_r + k * step_k, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 3
      for (int v = 0; v < nv; v++) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 3
    for (int v = 0; v < nv; v++) {
      float *to = out + (size_t)r * ldo + v * VL;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), acc[r][v]) : acc[r][v]);
    }
}
#endif

/* A panel's last vectors are not computed where nobody wants them: `columns` up to NR. `packed_rows`: a is packed as panels of MR rows. */
static inline __attribute__((always_inline)) void block(const void *a, size_t lda, int packed_rows, const void *panel, size_t depth, int columns,
                                                        float *out, size_t ldo, int precision, int add) {
  int nv = (columns + VL - 1) / VL;
#if HAS_BF16
  if (precision == R2B_BFLOAT16) {
    size_t step_r = packed_rows ? 2 : lda, step_k = packed_rows ? 2 * MR : 2;
    if (nv >= 3)
      block_bf16(a, step_r, step_k, panel, depth, 3, out, ldo, add);
    else if (nv == 2)
      block_bf16(a, step_r, step_k, panel, depth, 2, out, ldo, add);
    else
      block_bf16(a, step_r, step_k, panel, depth, 1, out, ldo, add);
    return;
  }
#endif
  (void)precision;
  size_t step_r = packed_rows ? 1 : lda, step_k = packed_rows ? MR : 1;
  if (nv >= 3)
    block_f32(a, step_r, step_k, panel, depth, 3, out, ldo, add);
  else if (nv == 2)
    block_f32(a, step_r, step_k, panel, depth, 2, out, ldo, add);
  else
    block_f32(a, step_r, step_k, panel, depth, 1, out, ldo, add);
}

/* out (rows, n) = a (rows, depth) * packed; rows a multiple of MR, out's rows ldo apart with room for whole panels. */
static void step_product(const void *a, size_t lda, const void *packed, size_t depth, int n, size_t rows, float *out, size_t ldo, int precision) {
  size_t size = precision == R2B_BFLOAT16 ? 2 : 4;
  for (size_t at = 0; at < (size_t)n; at += NR)
    for (size_t r = 0; r < rows; r += MR)
      block((const char *)a + r * lda * size, lda, 0, (const char *)packed + at * depth * size, depth, n - (int)at, out + r * ldo + at, ldo, precision, 0);
}

/* Rows of a step's operand stand this far apart: not a power of two, whose lines would share one set of the cache. */
static inline size_t apart(size_t depth) { return up(depth, 32) + 32; }

enum { ROWS_A_TURN = 8 * MR, COLUMNS_A_TURN = 8 * NR, AHEAD = 16 };

typedef float strip_floats __attribute__((vector_size(MR * 4), aligned(4), may_alias));
typedef uint32_t strip_bits __attribute__((vector_size(MR * 4), aligned(4), may_alias));

/* `bf16_bits` of MR numbers; written out, since the compiler takes a loop so short apart. */
static inline strip_bits strip_bf16_bits(const float *source) {
  strip_floats x = *(const strip_floats *)source;
  strip_bits u = (strip_bits)x, number = (strip_bits)(x == x), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (rounded & number) | (0x7fc0u & ~number);
}

/* The rows of one turn, MR to a strip, from a matrix that stands on its side: along its lines, since its columns would fight for one set of the
 * cache. */
static void turn_rows(const float *source, size_t step_k, size_t k, int precision, void *to) {
  static const float nothing[ROWS_A_TURN];
  size_t even = up(k, 2);
  for (size_t kk = 0; kk < even; kk += 2, source += 2 * step_k) {
    const float *next = kk + 1 < k ? source + step_k : nothing, *soon = kk + AHEAD < k ? source + AHEAD * step_k : source;
    for (size_t r = 0; r < ROWS_A_TURN; r += MR) {
      __builtin_prefetch(soon + r); /* lines a page apart: nothing else would fetch them */
      __builtin_prefetch(soon + (kk + AHEAD + 1 < k ? step_k : 0) + r);
      if (precision == R2B_BFLOAT16) {
        *(strip_bits *)((uint32_t *)to + (r * even + kk * MR) / 2) = strip_bf16_bits(source + r) | strip_bf16_bits(next + r) << 16;
      } else {
        memcpy((float *)to + r * even + kk * MR, source + r, MR * 4);
        memcpy((float *)to + r * even + (kk + 1) * MR, next + r, MR * 4);
      }
    }
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

/* Rows first … first + count of a product of whole matrices: blocks of k so that a panel stays in the first cache, its turn's panels in the second. */
int NAME(product)(const r2b_product *p, int first, int count) {
  size_t size = p->precision == R2B_BFLOAT16 ? 2 : 4, deep = p->precision == R2B_BFLOAT16 ? 384 : 192, M = (size_t)count, N = (size_t)p->n, K = (size_t)p->k;
  size_t lying = p->a_k == 1 && p->a_row != 1, lda = apart(deep); /* rows of a that lie in memory as they are read need not be turned */
  char *left = calloc(ROWS_A_TURN * lda, size), *right = malloc(COLUMNS_A_TURN * deep * size);
  if (!left || !right) {
    free(left), free(right);
    return -1;
  }
  const float *a = p->a + (size_t)first * p->a_row;
  float *out = p->out + (size_t)first * p->out_row, tile[MR * NR];
  for (size_t k = 0; k < K; k += deep)
    for (size_t n = 0; n < N; n += COLUMNS_A_TURN) {
      size_t depth = K - k < deep ? K - k : deep, even = up(depth, 2), columns = N - n < COLUMNS_A_TURN ? N - n : COLUMNS_A_TURN;
      int add = p->add || k;
      NAME(pack)(p->b + k * p->b_k + n * p->b_n, p->b_k, p->b_n, (int)depth, (int)columns, p->precision, right);
      for (size_t m = 0; m < M; m += ROWS_A_TURN) {
        size_t rows = M - m < ROWS_A_TURN ? M - m : ROWS_A_TURN;
        const float *source = a + m * p->a_row + k * p->a_k;
        int whole = p->a_row == 1 && rows == ROWS_A_TURN;
        if (whole) turn_rows(source, p->a_k, depth, p->precision, left);
        for (size_t r = 0; !whole && r < rows; r += lying ? 1 : MR) {
          if (lying)
            operand(source + r * p->a_row, left + r * lda * size, (int)depth, even, p->precision);
          else
            strip(source + r * p->a_row, p->a_k, p->a_row, depth, rows - r < MR ? rows - r : MR, MR, p->precision, left + r * even * size);
        }
        for (size_t j = 0; j < columns; j += NR)
          for (size_t r = 0; r < rows; r += MR) {
            float *to = out + (m + r) * p->out_row + n + j;
            size_t wide = columns - j < NR ? columns - j : NR, high = rows - r < MR ? rows - r : MR;
            const char *rows_of_a = left + r * (lying ? lda : even) * size;
            if (high == MR && wide % VL == 0) {
              block(rows_of_a, lda, !lying, right + j * even * size, even, (int)wide, to, p->out_row, p->precision, add);
              continue;
            }
            block(rows_of_a, lda, !lying, right + j * even * size, even, (int)wide, tile, NR, p->precision, 0);
            for (size_t y = 0; y < high; y++)
              for (size_t x = 0; x < wide; x++) to[y * p->out_row + x] = (add ? to[y * p->out_row + x] : 0.0f) + tile[y * NR + x];
          }
      }
    }
  free(left), free(right);
  return 0;
}

/* log(u / (1 - u)): from the exponents, and from the mantissas m and n as the series of 2 artanh((m - n) / (m + n)), at most 1/3; error 2e-7. */
static inline float logit_(float u) {
  union { float f; uint32_t u; } m = {u}, n = {1.0f - u};
  float exponent = (float)((int32_t)(m.u >> 23) - (int32_t)(n.u >> 23));
  m.u = (m.u & 0x7fffffu) | 0x3f800000u, n.u = (n.u & 0x7fffffu) | 0x3f800000u;
  float y = (m.f - n.f) / (m.f + n.f), z = y * y, p = 2.0f / 11.0f;
  p = p * z + 2.0f / 9.0f;
  p = p * z + 2.0f / 7.0f;
  p = p * z + 2.0f / 5.0f;
  p = p * z + 2.0f / 3.0f;
  p = p * z + 2.0f;
  return exponent * 0.69314718f + y * p;
}

/* Logistic noise (W) of one row and gate: Philox 4x32-7 (Salmon et al. 2011) under the window's seed, counted by place, so that the backward
 * pass draws what the forward pass drew. A uniform number below the share is uniform again once divided by it; elsewhere there is no noise. */
static void noise_row(uint64_t seed, float share, size_t at, uint32_t gate, float *restrict noise, size_t width) {
  uint32_t low = (uint32_t)at, high = (uint32_t)((uint64_t)at >> 32);
  uint32_t bits[4][DRAWN];
  size_t quarter = (width + 3) / 4;
  float scale = 1.0f / share;
  for (size_t start = 0; start < quarter; start += DRAWN) {
    for (uint32_t j = 0; j < DRAWN; j++) {
      uint32_t c0 = (uint32_t)start + j, c1 = gate, c2 = low, c3 = high, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 7
      for (int round = 0; round < 7; round++) {
        uint64_t x = (uint64_t)c0 * 0xd2511f53u, y = (uint64_t)c2 * 0xcd9e8d57u;
        c0 = (uint32_t)(y >> 32) ^ c1 ^ k0, c1 = (uint32_t)y, c2 = (uint32_t)(x >> 32) ^ c3 ^ k1, c3 = (uint32_t)x;
        k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
      }
      bits[0][j] = c0, bits[1][j] = c1, bits[2][j] = c2, bits[3][j] = c3;
    }
    for (size_t part = 0; part < 4; part++) {
      size_t first = part * quarter + start, end = part * quarter + (quarter < start + DRAWN ? quarter : start + DRAWN);
      const uint32_t *drawn = bits[part];
      if (end > width) end = width;
      for (size_t j = first; j < end; j++) {
        float u = ((float)(int32_t)(drawn[j - first] >> 8) + 0.5f) * 0x1p-24f;
        u = u < share ? u * scale : 0.5f;
        u = u < 1e-6f ? 1e-6f : u;
        noise[j] = logit_(u > 1.0f - 1e-6f ? 1.0f - 1e-6f : u);
      }
    }
  }
}

/* The noise a window draws under this seed: rows first … first + count of noise (rows, gates, width). */
int NAME(noise)(uint64_t seed, float share, float *noise, int gates, int width, int first, int count) {
  for (size_t at = (size_t)first; at < (size_t)first + (size_t)count; at++)
    for (size_t g = 0; g < (size_t)gates; g++)
      noise_row(seed, share, at, (uint32_t)g, noise + (at * (size_t)gates + g) * (size_t)width, (size_t)width);
  return 0;
}

enum { BY_SAMPLE = 3 }; /* a soft sample's derivative follows from its value */

/* One gate of one row, all copies: its level, and where `through` is wanted the sample and what a level's gradient is multiplied by on its way to
 * pre. The flags are constants where this is called, so that each loop is free of branches. */
static inline __attribute__((always_inline)) void gate_of(int bit, int by, int noisy, int back, r2b_mode m, int H, int copies, const float *product,
                                                          const float *bias, const float *noise, const float *lo, const float *hi, float *value,
                                                          float *sample, float *through) {
  float slope = m.slope, scale = m.scale, sharpness = m.sharpness, steep = scale * sharpness;
  for (int k = 0; k < copies * H; k += H) {
    const float *restrict p = product, *restrict b = bias + k, *restrict e = noise + k, *restrict l = lo + k, *restrict h = hi + k;
    float *restrict v = value + k, *restrict s = sample + k, *restrict d = through + k;
    for (int j = 0; j < H; j++) {
      float pre = p[j] + b[j], a = scale * pre + (noisy ? e[j] : 0.0f);
      float one = bit ? (a > 0.0f ? 1.0f : 0.0f) : sigmoid_(a * sharpness);
      v[j] = h[j] * one + l[j] * (1.0f - one); /* exactly lo at 0 and hi at 1 */
      if (!back) continue;
      float slant = 1.0f;
      if (by == BY_SAMPLE) {
        slant = one * (1.0f - one) * steep;
      } else if (by == R2B_BY_SIGMOID) {
        float y = noisy ? sigmoid_(a * sharpness) : sigmoid_(slope * pre);
        slant = y * (1.0f - y) * (noisy ? steep : slope);
      } else if (by == R2B_BY_WINDOW) {
        slant = fabsf(pre) * slope < 1.0f ? slope * 0.5f : 0.0f;
      }
      s[j] = one;
      d[j] = slant * (h[j] - l[j]);
    }
  }
}

/* `noise` has room for the gate's noise, W. */
static inline __attribute__((always_inline)) void gate(const r2b_window *w, int back, int g, size_t at, const float *product, float *noise, float *value,
                                                       float *sample, float *through) {
  r2b_mode m = w->modes[g];
  int H = w->hidden, copies = w->copies, W = H * copies, bit = m.sample == R2B_BIT, noisy = w->noisy && m.noisy;
  const float *bias = w->gates_bias + g * W, *lo = w->lo + g * W, *hi = w->hi + g * W;
  if (noisy) noise_row(w->seed, w->share, at, (uint32_t)g, noise, (size_t)W);
#define GATE(bit, by, noisy) gate_of(bit, by, noisy, back, m, H, copies, product, bias, noise, lo, hi, value, sample, through)
  if (!bit && noisy)
    GATE(0, BY_SAMPLE, 1);
  else if (!bit)
    GATE(0, BY_SAMPLE, 0);
  else if (noisy)
    GATE(1, R2B_BY_SIGMOID, 1);
  else if (m.by == R2B_BY_SIGMOID)
    GATE(1, R2B_BY_SIGMOID, 0);
  else if (m.by == R2B_BY_WINDOW)
    GATE(1, R2B_BY_WINDOW, 0);
  else
    GATE(1, R2B_BY_IDENTITY, 0);
#undef GATE
}

static inline void add(const float *x, const float *product, float *sum, int n) {
  for (int j = 0; j < n; j++) sum[j] = x[j] + product[j];
}

/* What others read of a state (W): the mean over copies (H). */
static inline void fold(const float *restrict h, float *restrict mean, int hidden, int copies) {
  float share = 1.0f / (float)copies;
  for (int j = 0; j < hidden; j++) mean[j] = h[j] * share;
  for (int k = 1; k < copies; k++)
    for (int j = 0; j < hidden; j++) mean[j] += h[k * hidden + j] * share;
}

static inline void gru_copy(int H, const float *restrict x, const float *restrict u, const float *restrict r, const float *restrict z,
                            const float *restrict before, float *restrict n, float *restrict h) {
  for (int j = 0; j < H; j++) {
    float value = tanh_(x[j] + r[j] * u[j]);
    n[j] = value;
    h[j] = z[j] * before[j] + (1.0f - z[j]) * value;
  }
}

/* h += o c, one copy's share of the mean that others read. */
static inline void opened(int H, const float *restrict o, const float *restrict c, float share, float *restrict h) {
  for (int j = 0; j < H; j++) h[j] += o[j] * c[j] * share;
}

/* values (G + 1, W): a level for each gate, then room for a gate's noise. */
static void gate_values(const r2b_window *w, int gates, size_t at, const float *products, float *values) {
  int H = w->hidden, W = H * w->copies;
  for (int g = 0; g < gates; g++) gate(w, 0, g, at, products + g * H, values + gates * W, values + g * W, values, values);
}

/* products (G*H): of every unit's row, or of those that units share, whose sums (G*R) are left in `few`. */
static void gate_products(const r2b_window *w, int gates, const float *x, const float *product, float *restrict few, float *restrict products) {
  int H = w->hidden, R = w->rows, shared = w->row != NULL, whole = w->x_rows == R;
  if (!shared) {
    add(x, product, products, gates * H);
    return;
  }
  for (int j = 0; j < gates * R; j++) few[j] = product[j] + (whole ? x[j] : 0.0f);
  for (int g = 0; g < gates; g++) {
    const int32_t *restrict row = w->row + g * H;
    const float *restrict scale = w->row_scale + g * H, *restrict from = few + g * R;
    float *restrict to = products + g * H;
    for (int j = 0; j < H; j++) to[j] = scale[j] * from[row[j]];
    if (!whole) add(x + g * H, to, to, H);
  }
}

/* x and product: the candidate's parts. h: what is read (H), with an output gate; else null. */
static void gru_row(const r2b_window *w, int gates, size_t at, const float *x, const float *product, const float *before, const float *products,
                    float *candidate, float *inner, float *c, float *h, float *values) {
  int H = w->hidden, W = H * w->copies;
  float *asked = values + (gates + 1) * W; /* W_n x + b */
  gate_values(w, gates, at, products, values);
  add(w->bias_hh, product, inner, H);
  add(w->bias, x, asked, H);
  if (h) memset(h, 0, (size_t)H * 4);
  for (int k = 0; k < w->copies; k++) {
    gru_copy(H, asked, inner, values + k * H, values + W + k * H, before + k * H, candidate + k * H, c + k * H);
    if (h) opened(H, values + 2 * W + k * H, c + k * H, 1.0f / (float)w->copies, h);
  }
}

static inline void lstm_copy(int H, const float *restrict g, const float *restrict i, const float *restrict f, const float *restrict o, float share,
                             const float *restrict before, float *restrict c, float *restrict h) {
  for (int j = 0; j < H; j++) {
    float now = f[j] * before[j] + i[j] * g[j];
    c[j] = now;
    h[j] += o[j] * tanh_(now) * share;
  }
}

static inline void lstm_candidate(int H, const float *restrict x, const float *restrict product, const float *restrict bias, float *restrict g) {
  for (int j = 0; j < H; j++) g[j] = tanh_(x[j] + product[j] + bias[j]);
}

/* x and product: the candidate's parts. */
static void lstm_row(const r2b_window *w, size_t at, const float *x, const float *product, const float *before, const float *products,
                     float *candidate, float *c, float *h, float *values) {
  int H = w->hidden, W = H * w->copies;
  gate_values(w, 3, at, products, values);
  lstm_candidate(H, x, product, w->bias, candidate);
  memset(h, 0, (size_t)H * 4);
  for (int k = 0; k < w->copies; k++)
    lstm_copy(H, candidate, values + k * H, values + W + k * H, values + 2 * W + k * H, 1.0f / (float)w->copies, before + k * H, c + k * H, h);
}

/* Rows first … first + count through the whole window. */
int NAME(forward)(const r2b_window *w, const void *packed, int first, int count) {
  size_t H = (size_t)w->hidden, W = H * (size_t)w->copies, lstm = w->cell == R2B_LSTM, split = w->cell != R2B_GRU, gates = split ? 3 : 2;
  size_t B = (size_t)w->batch, state = split ? H : W, candidates = lstm ? H : W; /* widths of h and of the candidate */
  size_t few = gates * (size_t)w->rows, M = few + H, X = gates * (size_t)w->x_rows + H;
  size_t depth = up(H, 2), lda = apart(depth), rows = up((size_t)count, MR), width = up(M, NR), size = w->precision == R2B_BFLOAT16 ? 2 : 4;
  void *a = calloc(rows * lda, size);
  float *out = malloc(rows * width * 4), *spare = malloc((6 * W + 4 * H + few) * 4);
  if (!a || !out || !spare) {
    free(a), free(out), free(spare);
    return -1;
  }
  float *values = spare, *n_spare = spare + 4 * W + H, *u_spare = n_spare + W, *mean = u_spare + H, *few_spare = mean + H;
  for (int t = 0; t < w->steps; t++) {
    for (size_t r = 0; r < (size_t)count; r++) {
      size_t b = (size_t)first + r;
      const float *before = t ? w->h + ((size_t)(t - 1) * B + b) * state : w->h0 + b * state;
      if (state > H) {
        float *folded = w->h_before ? w->h_before + ((size_t)t * B + b) * H : mean;
        fold(before, folded, (int)H, w->copies);
        before = folded;
      }
      operand(before, (char *)a + r * lda * size, (int)H, depth, w->precision);
    }
    step_product(a, lda, packed, depth, (int)M, rows, out, width, w->precision);
    for (size_t r = 0; r < (size_t)count; r++) {
      size_t b = (size_t)first + r, at = (size_t)t * B + b;
      const float *x = w->x_pre + at * X, *product = out + r * width;
      float *products = w->products + at * gates * H;
      gate_products(w, (int)gates, x, product, w->row_products ? w->row_products + at * few : few_spare, products);
      x += X - H, product += M - H;
      float *candidate = w->candidate ? w->candidate + at * candidates : n_spare;
      if (lstm) {
        const float *c_before = t ? w->c + (at - B) * W : w->c0 + b * W;
        lstm_row(w, at, x, product, c_before, products, candidate, w->c + at * W, w->h + at * H, values);
      } else {
        float *c = split ? w->c : w->h;
        const float *before = t ? c + (at - B) * W : (split ? w->c0 : w->h0) + b * W;
        gru_row(w, (int)gates, at, x, product, before, products, candidate, w->inner ? w->inner + at * H : u_spare,
                c + at * W, split ? w->h + at * H : NULL, values);
      }
    }
  }
  free(a), free(out), free(spare);
  return 0;
}

/* One gate's share of the backward pass: what its value received (W) -> the gradient of its product (H), and the sums for bias and levels (W). */
static inline void gate_back(const float *received, const float *sample, const float *through, float *restrict grad, float *d_bias, float *d_lo,
                             float *d_hi, int H, int copies) {
  memset(grad, 0, (size_t)H * 4);
  for (int k = 0; k < copies * H; k += H) {
    const float *restrict from = received + k, *restrict s = sample + k, *restrict slant = through + k;
    float *restrict bias = d_bias + k, *restrict lo = d_lo + k, *restrict hi = d_hi + k;
    for (int j = 0; j < H; j++) {
      float d = from[j] * slant[j], up = from[j] * s[j];
      hi[j] += up;
      lo[j] += from[j] - up;
      bias[j] += d;
      grad[j] += d;
    }
  }
}

static inline void add_to(float *restrict sum, const float *restrict x, size_t n) {
  for (size_t j = 0; j < n; j++) sum[j] += x[j];
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

static inline void opened_back(int H, const float *restrict o, const float *restrict c, const float *restrict dh, float share, float *restrict dc,
                               float *restrict do_) {
  for (int j = 0; j < H; j++) {
    float dm = dh[j] * share;
    do_[j] = dm * c[j];
    dc[j] += dm * o[j];
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

/* The gradient of every unit's product (G*H) -> that of the shared rows' (G*R); d_scale (G*H) is added to. */
static void rows_back(const r2b_window *w, int gates, const float *grad, const float *few, float *restrict grad_few, float *restrict d_scale) {
  int H = w->hidden, R = w->rows;
  memset(grad_few, 0, (size_t)(gates * R) * 4);
  for (int g = 0; g < gates; g++) {
    const int32_t *restrict row = w->row + g * H;
    const float *restrict scale = w->row_scale + g * H, *restrict from = few + g * R, *restrict d = grad + g * H;
    for (int j = 0; j < H; j++) d_scale[g * H + j] += d[j] * from[row[j]];
    for (int j = 0; j < H; j++) grad_few[g * R + row[j]] += d[j] * scale[j];
  }
}

/* Rows first … first + count from the window's end to its start; sums (3, G, W) for the gates' bias, lo and hi, (2, H) for the candidate's
 * biases and (G, H) for the scales of shared rows are added to. */
int NAME(backward)(const r2b_window *w, const void *packed, int first, int count, float *sums) {
  size_t H = (size_t)w->hidden, W = H * (size_t)w->copies, lstm = w->cell == R2B_LSTM, split = w->cell != R2B_GRU, gates = split ? 3 : 2;
  size_t B = (size_t)w->batch, few = gates * (size_t)w->rows, K = few + H, X = gates * (size_t)w->x_rows + H, state = split ? H : W;
  size_t depth = up(K, 2), lda = apart(depth), rows = up((size_t)count, MR), width = up(H, NR), size = w->precision == R2B_BFLOAT16 ? 2 : 4;
  void *a = calloc(rows * lda, size);
  float *out = malloc(rows * width * 4), *dh = calloc(rows * state, 4), *dc = calloc(rows * W, 4), *spare = malloc(((4 * gates + 1) * W + K + gates * H) * 4);
  if (!a || !out || !dh || !dc || !spare) {
    free(a), free(out), free(dh), free(dc), free(spare);
    return -1;
  }
  float *sample = spare, *through = spare + gates * W, *value = spare + 2 * gates * W, *received = spare + 3 * gates * W;
  float *noise = spare + 4 * gates * W, *back = noise + W, *grad_spare = back + K; /* back (K): the gradient of the recurrent product */
  float *d_bias = sums, *d_lo = sums + gates * W, *d_hi = sums + 2 * gates * W, *d_candidate = sums + 3 * gates * W, *d_scale = d_candidate + 2 * H;
  float share = 1.0f / (float)w->copies;
  for (int t = w->steps - 1; t >= 0; t--) {
    for (size_t r = 0; r < (size_t)count; r++) {
      size_t b = (size_t)first + r, at = (size_t)t * B + b;
      float *d = dh + r * state, *grad_x = w->grad_x + at * X, *grad_n = grad_x + X - H, *dc_row = dc + r * W;
      float *grad = (size_t)w->x_rows == H ? grad_x : grad_spare; /* of every unit's product */
      if (w->grad_h) add_to(d, w->grad_h + at * state, state);
      for (size_t g = 0; g < gates; g++)
        gate(w, 1, (int)g, at, w->products + (at * gates + g) * H, noise, value + g * W, sample + g * W, through + g * W);
      memset(grad_n, 0, H * 4);
      if (lstm) {
        const float *before = t ? w->c + (at - B) * W : w->c0 + b * W;
        if (w->grad_c) add_to(dc_row, w->grad_c + at * W, W);
        for (size_t k = 0; k < (size_t)w->copies; k++)
          lstm_copy_back((int)H, w->candidate + at * H, value + k * H, value + W + k * H, value + 2 * W + k * H, w->c + at * W + k * H, before + k * H,
                         d, share, dc_row + k * H, received + k * H, received + W + k * H, received + 2 * W + k * H, grad_n);
        memset(d, 0, H * 4);
      } else {
        const float *c = split ? w->c : w->h, *before = t ? c + (at - B) * W : (split ? w->c0 : w->h0) + b * W;
        float *inner = w->grad_inner + at * H, *d_memory = split ? dc_row : d;
        memset(inner, 0, H * 4);
        if (split && w->grad_c) add_to(dc_row, w->grad_c + at * W, W);
        for (size_t k = 0; k < (size_t)w->copies; k++) {
          if (split) opened_back((int)H, value + 2 * W + k * H, c + at * W + k * H, d, share, dc_row + k * H, received + 2 * W + k * H);
          gru_copy_back((int)H, w->inner + at * H, w->candidate + at * W + k * H, value + k * H, value + W + k * H, before + k * H, d_memory + k * H,
                        received + k * H, received + W + k * H, grad_n, inner);
        }
        if (split) memset(d, 0, H * 4);
        add_to(d_candidate + H, inner, H);
      }
      add_to(d_candidate, grad_n, H);
      for (size_t g = 0; g < gates; g++)
        gate_back(received + g * W, sample + g * W, through + g * W, grad + g * H, d_bias + g * W, d_lo + g * W, d_hi + g * W, (int)H, w->copies);
      if (w->grad_gates) add_to(grad, w->grad_gates + at * gates * H, gates * H);
      const float *read = grad;
      if (w->row) {
        float *grad_few = w->grad_rows + at * few;
        rows_back(w, (int)gates, grad, w->row_products + at * few, grad_few, d_scale);
        if (grad != grad_x) memcpy(grad_x, grad_few, few * 4);
      }
      if (w->row || !lstm) {
        memcpy(back, w->row ? w->grad_rows + at * few : grad, few * 4);
        memcpy(back + few, lstm ? grad_n : w->grad_inner + at * H, H * 4);
        read = back;
      }
      operand(read, (char *)a + r * lda * size, (int)K, depth, w->precision);
    }
    step_product(a, lda, packed, depth, (int)H, rows, out, width, w->precision);
    for (size_t r = 0; r < (size_t)count; r++)
      for (size_t k = 0; k < state / H; k++)
        for (size_t j = 0; j < H; j++) dh[r * state + k * H + j] += out[r * width + j] * (split ? 1.0f : share);
  }
  memcpy(w->grad_h0 + (size_t)first * state, dh, (size_t)count * state * 4);
  if (split) memcpy(w->grad_c0 + (size_t)first * W, dc, (size_t)count * W * 4);
  free(a), free(out), free(dh), free(dc), free(spare);
  return 0;
}

#include "count.h"

const isa_kernels NAME(kernels) = {NAME(packed_bytes), NAME(pack),       NAME(forward),    NAME(backward), NAME(product),
                                   NAME(noise),        NAME(count),      NAME(count_back), HAS_BF16,       MR};
