/* Signs of binary gates from integers, with a bound that holds: the bits are those of the fp16 product.
 *
 * Weights of a row are scale * (256 high + low) in two planes of bytes, values step * (128 high + low) in two digits; sums of their products
 * are exact in int32. What the rounding of weights and values and the float32 sums of the fp16 product can amount to is bounded by norms
 * (Cauchy–Schwarz, or half a unit times the 1-norm). A row whose distance to every threshold is larger is certain; the others are read in
 * 16 bits, and where even the order of float32 additions could matter, by the fp16 product itself.
 *
 * An LSTM reads the columns that are active now in the high plane, where few rows are expected in doubt, else in 16 bits. A GRU keeps its
 * sums and adds only columns that have changed, in both planes: integers do not drift.
 *
 * How values become digits and sums are made is the instruction set's: screen_dot.h, screen_madd.h. */

enum { LARGEST = 8128 }; /* of a value in units: the difference of two has two digits of eight bits, and one word of sixteen */

/* What the bound needs to know of the values. */
typedef struct {
  float step;         /* of one unit */
  float one, two;     /* 1- and 2-norm */
  float error;        /* 2-norm of what rounding left */
  int terms;          /* of the fp16 product */
  int count;          /* columns listed, padded to as many as are taken at once */
  int32_t sum[2];     /* of each digit, where there are digits */
} quantized;

/* What a step multiplies and bounds all rows with. */
typedef struct {
  const float *coarse;   /* a row's error: the largest of a weight, or the 2-norm of all */
  float a, n, kappa;     /* margin = a * coarse + n * norm + kappa * |base| */
} bounds;

#include SCREEN

/* The smaller of two rigorous bounds, by what they come to over all rows. */
static bounds bound_of(const screen *s, const quantized *q) {
  bool likely = s->error_in_all * q->two < s->half_in_all * q->one;
  float kappa = (1.1f * (float)q->terms + 40.0f) * 0x1p-24f;
  return (bounds){
      .coarse = likely ? s->error : s->half,
      .a = 1.01f * (likely ? q->two : q->one),
      .n = 1.01f * (q->error + kappa * q->two),
      .kappa = 1.01f * kappa,
  };
}

/* Whether screening is expected to read less than 16 bits of all: rows in doubt are read in full. A row's products are taken to be spread by
 * its norm and that of the values; a threshold then lies within the margin in so many rows. It chooses the way, not the bits. */
static bool is_worth(const cell *cell, const quantized *q, const bounds *with) {
  const screen *s = &cell->screen;
  if (s->keeps) return true;
  if (q->count < fewest_columns(cell->layer->copies)) return false;
  float cols = (float)s->bytes.cols, coarse = with->coarse == s->half ? s->half_in_all : s->error_in_all;
  float doubtful = 0.8f * (float)cell->layer->copies * (with->a * coarse + with->n * s->norm_in_all) * sqrtf(cols);
  return 2.0f * cols * doubtful < (float)q->count * s->norm_in_all * q->two;
}

/* The rows in doubt -> how many. */
static int doubtful_rows(const cell *cell, const bounds *with, const float *base, const float *product, int32_t *rows) {
  const layer_config *layer = cell->layer;
  int hidden = layer->hidden, count = 0;
  for (int g = 0; g < layer->gates; g++)
    for (int i = 0; i < groups_in(cell); i++) {
      const float *bias = cell->gate_bias + g * layer->width + GROUP * i;
      int r = g * hidden + GROUP * i;
      unsigned bits = doubts(&cell->screen, with, bias, layer->copies, hidden, r, base, product) & real_units(hidden, i);
      if (!bits) continue;
      put_units(rows + count, r, bits);
      count += __builtin_popcount(bits);
    }
  return count;
}

/* Whether the order of the float32 additions could decide a bit of row `r`. */
static int is_close(const cell *cell, int r, float product, float loose) {
  const layer_config *layer = cell->layer;
  const float *bias = cell->gate_bias + r / layer->hidden * layer->width + r % layer->hidden;
  for (int k = 0; k < layer->width; k += layer->hidden)
    if (!(fabsf(product + bias[k]) > loose)) return 1;
  return 0;
}

INLINE float weight_at(const row_matrix *m, int row, int col) {
  size_t at = (size_t)row * (size_t)m->stride + (size_t)col;
  return m->grid.scale ? m->grid.scale[row] * (float)((const int8_t *)m->weights)[at] : _cvtsh_ss(((const uint16_t *)m->weights)[at]);
}

/* `wide` rows whose order of additions matters, as the fp16 product adds them: one accumulator, ascending columns. */
INLINE void add_in_order(const row_matrix *m, const int32_t *rows, const product_row *one, const int wide) {
  float sum[8];
  for (int r = 0; r < wide; r++) sum[r] = one->init[rows[r]];
  for (int k = one->from; k < one->to; k++)
    for (int r = 0; r < wide; r++) sum[r] = fmaf(weight_at(m, rows[r], one->active->index[k]), one->active->value[k], sum[r]);
  for (int r = 0; r < wide; r++) one->out[rows[r]] = sum[r];
}

/* Each addition waits for the one before: rows are taken side by side, as many as there are. */
static void in_order(const cell *cell, const int32_t *rows, int count, const product_row *one) {
  const row_matrix *m = &cell->gates_by_row;
  for (; count >= 8; count -= 8, rows += 8) add_in_order(m, rows, one, 8);
  if (count & 4) add_in_order(m, rows, one, 4), rows += 4;
  if (count & 2) add_in_order(m, rows, one, 2), rows += 2;
  if (count & 1) add_in_order(m, rows, one, 1);
}

/* Reads doubtful rows in 16 bits. Where that is most of them the fp16 product is quicker. */
static void settle(const cell *cell, int doubtful, const bounds *with, const quantized *q, const product_row *one, scratch *work) {
  int rows = cell->layer->gates * cell->layer->hidden, active = one->to - one->from, close = 0;
  if ((int64_t)doubtful * cell->gates_by_row.stride > (int64_t)active * rows) {
    product(&cell->gates, one, 1, work->counters);
    return;
  }
  by_row(&cell->gates_by_row, doubtful, one, work);
  for (int k = 0; k < doubtful; k++) {
    int r = work->wanted[k];
    work->wanted[close] = r;
    close += is_close(cell, r, one->out[r], with->kappa * (cell->screen.norm[r] * q->two + fabsf(one->init[r])));
  }
  in_order(cell, work->wanted, close, one);
}

/* The gates' products of one row of a batch, good for signs to each threshold. */
static void screen_gates(const cell *cell, step_row *row, product_row *one, scratch *work) {
  const screen *s = &cell->screen;
  const screen_row *room = &row->screen;
  int rows = cell->layer->gates * cell->layer->hidden, cols = s->bytes.cols;
  quantized q;
  if (s->keeps) {
    memset(work->dense, 0, (size_t)cell->inputs * sizeof(float));
    for (int k = 0; k < row->active.inputs; k++) work->dense[row->active.index[k]] = row->active.value[k];
    memcpy(work->dense + cell->inputs, row->read, (size_t)(cols - cell->inputs) * sizeof(float));
    q = quantize_changed(room, work->dense, cols, row->active.total);
  } else {
    q = quantize_active(room, &row->active, row->gates_from);
  }
  bounds with = bound_of(s, &q);
  if (!is_worth(cell, &q, &with)) {
    whole_product(&cell->gates, one, 1, work->counters);
    return;
  }
  uint64_t bytes = integer_product(cell, room, &q, row->gates_base, row->products);
  int found = doubtful_rows(cell, &with, row->gates_base, row->products, work->wanted);
  r2b_counters *counters = work->counters;
  counters->weights += (uint64_t)rows * (uint64_t)q.count;
  counters->bytes += bytes;
  counters->rows += (uint64_t)rows, counters->uncertain += (uint64_t)found;
  if (found) settle(cell, found, &with, &q, one, work);
}
