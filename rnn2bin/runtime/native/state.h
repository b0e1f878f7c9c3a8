/* What changes: the states of a batch, and the room its calls work in. */
#ifndef RNN2BIN_STATE_H
#define RNN2BIN_STATE_H

#include "kernels.h"

/* One direction of one layer, (B, ·) each. An encoder's and its decoder's are the same. */
typedef struct {
  float *h, *c, *r, *read; /* read is h itself where others read h as it is */
  float *products;
  float *pre; /* (B, G * width), or NULL: see layer_config.wide_pre */
  int h_size, c_size, r_size, read_size, product_size;
  int32_t *sums, *before; /* of a screened GRU: (B, ·) each */
  int sum_size, before_size;
  const cell *of, *ran; /* whose sums they are; what ran last: encoder and decoder share states, not weights */
} cell_state;

struct r2b_state {
  const r2b_model *model;
  int batch, chunk; /* steps that go through all layers together */
  bool logits;
  int first, end; /* the layers that it goes through */
  cell_state cells[MOST_LAYERS][2];
  float *values[2];  /* (chunk, B, widest): what one layer hands to the next */
  float *products;   /* (chunk, B, longest): inputs' shares made in advance, outputs of linear layers */
  float *pooled;     /* (B, widest): what a head over the whole sequence reads */
  float *token_row;  /* (widest): an embedding that is in no table */
  screen_row screen; /* what one row's screening works on */
  columns *active;   /* (chunk, B) */
  step_row *rows;    /* (B) */
  float **outs;      /* (B): where each row's output goes */
  product_row *product_rows; /* (chunk, B) */
  int64_t *tokens;   /* (B) */
  scratch work;
  r2b_counters counters;
  void *arena; /* all of the above in one allocation */
};

#endif
