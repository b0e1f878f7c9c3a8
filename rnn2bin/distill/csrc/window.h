/* Training kernels: a window of a gated layer, forward and backward, step by step for many sequences side by side.
 *
 * Plain C11, knows no Python. All arrays are dense and row-major, time first; shapes stand beside the fields: T steps, B rows (sequences),
 * H hidden, n copies of every unit, W = n*H, G gates (LSTM 3: i,f,o; GRU 2: r,z; with an output gate 3: r,z,o). R rows of weights a gate: H, or fewer
 * that units share; a product is M = G*R + H wide, the candidate's part last.
 * Rows never meet, so each thread walks through time with its own rows and nobody waits.
 */
#ifndef RNN2BIN_WINDOW_H
#define RNN2BIN_WINDOW_H

#include <stddef.h>
#include <stdint.h>

enum { R2B_LSTM = 0, R2B_GRU = 1, R2B_GRU_OUTPUT = 2 };
enum { R2B_FLOAT32 = 0, R2B_BFLOAT16 = 1 };
/* How a gate's sample follows from a = scale * pre + noise: soft is sigmoid(a * sharpness), a bit is 1[a > 0]. */
enum { R2B_SOFT = 0, R2B_BIT = 1 };
/* What stands for a sample's derivative: that of sigmoid(sharpness * a), a box where |pre| < 1/slope, or 1. */
enum { R2B_BY_SIGMOID = 0, R2B_BY_WINDOW = 1, R2B_BY_IDENTITY = 2 };

typedef struct {
  int32_t sample, by;
  float scale, sharpness; /* of the sample */
  float slope;            /* of the derivative of a bit without noise: sigmoid(slope * pre), or the box */
  int32_t noisy;          /* the sample sees the window's noise, and so does a bit's derivative */
} r2b_mode;

typedef struct {
  uint64_t seed; /* of the noise */
  float share;   /* of the gates' samples that get noise */
  int32_t noisy; /* whether noise is drawn */
  int32_t cell, precision, threads;
  int32_t steps, batch, hidden, copies;
  int32_t rows;            /* R */
  int32_t x_rows;          /* of x_pre: R, or H where every unit has an input of its own; X = G*x_rows + H */
  r2b_mode modes[3];
  const float *weight;     /* (M, H) recurrent */
  const int32_t *row;      /* (G*H) which row of its gate a unit reads, each below R; null where R = H */
  const float *row_scale;  /* (G*H) what that row's product is multiplied by; null with it */
  const float *gates_bias; /* (G, W) */
  const float *bias;       /* (H) the candidate's */
  const float *bias_hh;    /* GRU: (H) of the recurrent candidate; else null */
  const float *lo, *hi;   /* (G, W) */
  const float *x_pre;     /* (T, B, X) input products, without a bias */
  const float *h0, *c0;   /* as wide as h and c */
  float *h, *c;           /* (T, B, H) the mean over copies, and (T, B, W); GRU without an output gate: (T, B, W), and null */
  float *products;        /* (T, B, G, H) the gates' products, input included: pre-activations but for gates_bias */
  float *row_products;    /* (T, B, G*R) where units share rows: their products, and may be null where no backward follows; else null */
  float *candidate;       /* LSTM: (T, B, H) g; GRU: (T, B, W) n; may be null where no backward follows */
  float *inner;           /* GRU: (T, B, H) U_n h + b; may be null where no backward follows */
  float *h_before;        /* GRU of many copies: (T, B, H) the mean each step reads of the state before it; may be null where no backward follows */
  /* backward */
  const float *grad_h, *grad_c, *grad_gates; /* as wide as h, c and products; each may be null */
  float *grad_x;                           /* (T, B, X) */
  float *grad_rows;                        /* (T, B, G*R) of `row_products`; null where every unit has a row: the gates' have the gradient of x_pre */
  float *grad_inner;                       /* GRU: (T, B, H) of `inner` */
  float *grad_h0, *grad_c0;                /* as h0 and c0 */
  float *grad_gates_bias, *grad_bias, *grad_bias_hh; /* as the biases, added to; the last null for the LSTM */
  float *grad_row_scale;                   /* (G*H), added to; null with row_scale */
  float *grad_lo, *grad_hi;                /* (G, W), added to; may be null */
} r2b_window;

/* out (m, n) = or, with `add`, += the sum over k of a(m, k) b(k, n); operands in the precision, sums in float32. */
typedef struct {
  const float *a, *b;
  float *out;
  size_t a_row, a_k, b_k, b_n, out_row; /* how far apart, in elements; out's columns lie side by side */
  int32_t m, n, k, precision, add, threads;
} r2b_product;

/* Units whose `closed_gate` is 0 and whose `open_gate` is 1 in one of their copies; N rows (of steps and sequences). */
typedef struct {
  const float *products;      /* (N, G, H) */
  const float *closed, *open; /* (n, H) thresholds of the two gates */
  int32_t *best;              /* (N, H) the copy that counts: written, and read again by the backward pass */
  float *count;               /* (N) */
  const float *grad;          /* (N) backward: what follows is added to */
  float *grad_products, *grad_closed, *grad_open;
  float least; /* an open gate is above 0: what tells 0 from it */
  int32_t closed_gate, open_gate, rows, gates, hidden, copies, threads;
} r2b_count;

#define R2B_API __attribute__((visibility("default")))

/* Each returns 0, or -1 where memory ran out. */
R2B_API int r2b_forward(const r2b_window *window);
R2B_API int r2b_backward(const r2b_window *window);
R2B_API int r2b_multiply(const r2b_product *product);
/* noise (rows, gates, width): what a window of so many steps and rows draws under this seed. */
R2B_API int r2b_noise(uint64_t seed, float share, float *noise, int32_t rows, int32_t gates, int32_t width, int32_t threads);
/* table (any, width): row index[n] += rows (count, width)[n]; every index is within the table. */
R2B_API int r2b_add_rows(const float *rows, const int64_t *index, float *table, int32_t count, int32_t width, int32_t threads);
/* The count, or with `grad` its gradient. */
R2B_API int r2b_count_units(const r2b_count *units);
/* Whether this processor multiplies bfloat16 natively, and the name of the instruction set in use. */
R2B_API int r2b_has_bfloat16(void);
R2B_API const char *r2b_isa(void);

#endif
