/* What one instruction set offers. The bodies are in kernels/, compiled once for each. */
#ifndef RNN2BIN_KERNELS_H
#define RNN2BIN_KERNELS_H

#include "internal.h"

/* Active columns, ascending: the input's first, then the recurrent ones. SLACK more places can be written. */
typedef struct {
  int32_t *index;
  float *value;
  int inputs, total;
} columns;

/* What screening works on: the columns it reads with their digits, and of a GRU what it keeps from step to step. */
typedef struct {
  int32_t *index;
  int8_t *high, *low;  /* (columns): digits of each, */
  int16_t *word;       /* or what they make together */
  int32_t *sums;       /* [tiles][2 blocks][2 digits][64], or of each row */
  int32_t *before;     /* (columns): the values whose products are in `sums` */
} screen_row;

/* One sequence's step of one cell. */
typedef struct {
  columns active;    /* the input's are listed already; the kernel adds the recurrent ones */
  int gates_from;    /* columns before this one are in `gates_base` already */
  const float *gates_base, *candidate_base; /* (gate_rows), (candidate_rows): the input's share so far, or zeros */
  float *h, *c, *r;  /* the state, updated; h alone is never NULL */
  float *read;       /* (R): what others read of h, before the step and after it */
  float *products;   /* (gate_rows): written */
  float *pre;        /* (G, width): written where `writes_pre` */
  screen_row screen; /* where the cell is screened */
} step_row;

/* Scratch of one thread, and what it counted. */
typedef struct {
  float *gates;     /* (G, width) */
  float *candidate; /* (H) */
  float *recurrent; /* (H) */
  float *spare;     /* (longest product) */
  float *wide;      /* (width) */
  uint16_t *open;   /* (2, H / GROUP): bits of units */
  int32_t *groups;  /* (H / GROUP) */
  int32_t *wanted;  /* (G * H) */
  float *dense;     /* (columns): what the active ones are a list of */
  columns active;
  const float *zeros;
  r2b_counters *counters;
} scratch;

/* One row of a product: out = init + W[:, active] * values, over the active columns `from` to `to`. */
typedef struct {
  columns *active;
  int from, to;
  const float *init;
  float *out;
} product_row;

/* Which gates can be screened in integers. */
typedef enum { SCREENS_NONE, SCREENS_GRIDS, SCREENS_ALL } screened;

typedef struct kernels {
  const char *name;
  int (*list)(const float *values, int n, int offset, int32_t *index, float *value); /* non-zero values; how many */
  void (*product)(const matrix *m, const product_row *rows, int count, r2b_counters *counters);
  void (*step[STEPS])(const cell *cell, step_row *rows, product_row *products, int count, scratch *work);
  void (*activate)(activation kind, float *y, int n);
  uint64_t (*read)(const uint64_t *memory, uint64_t words);
  screened screens;
} kernels;

const kernels *kernels_choose(void);

#endif
