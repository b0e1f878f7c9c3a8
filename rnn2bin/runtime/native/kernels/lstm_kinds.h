/* The LSTMs with peepholes or with one decision for i and f, as cells/lstm_peephole.py and cells/lstm_coupled.py, and all that are clipped. A
 * peephole adds another number for each copy of a unit, so pre-activations are made of all copies. */

/* pre (width) of gate `g`: each copy sees its own cell. */
static void kinds_pre(const cell *cell, int g, const float *products, const float *c, float *pre) {
  int hidden = cell->layer->hidden, width = cell->layer->width;
  const float *product = products + g * hidden, *bias = cell->gate_bias + g * width;
  for (int k = 0; k < width; k += hidden)
    for (int j = 0; j < hidden; j++) pre[k + j] = product[j] + bias[k + j];
  if (!cell->peephole) return;
  const float *peephole = cell->peephole + g * hidden;
  for (int k = 0; k < width; k += hidden)
    for (int j = 0; j < hidden; j++) pre[k + j] += peephole[j] * c[k + j];
}

/* Multipliers (width) of gate `g`, and open (H / GROUP): bits of the units of which any copy is. */
static void kinds_gate(const cell *cell, int g, const float *pre, float *out, scratch *work) {
  const layer_config *layer = cell->layer;
  int hidden = layer->hidden, width = layer->width;
  for (int i = 0; i < groups_in(cell); i++) {
    unsigned bits = cell->binary[g] ? 0 : 0xffffu;
    for (int k = 0; cell->binary[g] && k < width; k += hidden) bits |= positive(pre + k + GROUP * i, work->zeros);
    work->open[i] = (uint16_t)(bits & real_units(hidden, i));
  }
  if (!cell->binary[g]) {
    for (int j = 0; j < width; j++) out[j] = sigmoid_of(bounded(pre[j], layer->clip));
    return;
  }
  const float *lo = cell->lo + g * width, *hi = cell->hi + g * width;
  for (int j = 0; j < width; j++) out[j] = pre[j] > 0.0f ? hi[j] : lo[j];
}

/* c of what is kept and what is let in. */
static void kinds_cell(const cell *cell, step_row *row, const float *i, const float *f, scratch *work) {
  const layer_config *layer = cell->layer;
  float *g = work->candidate, *c = row->c;
  int count = open_groups(work->open, groups_in(cell), work->groups);
  product_row one = {&row->active, 0, row->active.total, row->candidate_base, g};
  candidate_product(cell, work->open, &one, work);
  for (int k = 0; k < count; k++)
    for (int j = GROUP * work->groups[k], end = j + GROUP; j < end; j++) g[j] = tanh_of(bounded(g[j] + cell->bias[j], layer->clip));
  for (int k = 0; k < layer->width; k += layer->hidden) /* where i is 0, g is finite and multiplied by 0, as in lstm.h */
    for (int j = 0; j < layer->hidden; j++) c[k + j] = bounded(f[k + j] * c[k + j] + i[k + j] * g[j], layer->cell_clip);
}

/* h (H): closed output gates need no tanh. */
static void kinds_read(const cell *cell, const float *o, const float *c, float *h, scratch *work) {
  const layer_config *layer = cell->layer;
  int hidden = layer->hidden, count = open_groups(work->open, groups_in(cell), work->groups);
  memset(h, 0, (size_t)hidden * sizeof *h);
  for (int g = 0; g < count; g++) {
    int first = work->groups[g] * GROUP;
    if (first + GROUP <= hidden)
      lstm_outputs(layer, o, c, h, first, GROUP);
    else
      lstm_outputs(layer, o, c, h, first, hidden - first);
  }
}

static void kinds_finish(const cell *cell, step_row *row, scratch *work) {
  const layer_config *layer = cell->layer;
  int width = layer->width, last = layer->gates - 1;
  float *i = work->gates, *f = i + width, *o = f + width, *c = row->c, *pre = row->pre;
  for (int g = 0; g < last; g++) kinds_pre(cell, g, row->products, c, pre + g * width);
  if (!layer->coupled) kinds_gate(cell, 1, pre + width, f, work);
  kinds_gate(cell, 0, pre, i, work);
  for (int j = 0; layer->coupled && j < width; j++) f[j] = 1.0f - i[j];
  kinds_cell(cell, row, i, f, work);
  kinds_pre(cell, last, row->products, c, pre + last * width);
  kinds_gate(cell, last, pre + last * width, o, work);
  float *h = layer->projection ? work->recurrent : row->read;
  kinds_read(cell, o, c, h, work);
  if (!layer->projection) return;
  lstm_project(cell, h, row, work);
  for (int j = 0; j < layer->recurrent; j++) row->read[j] = bounded(row->read[j], layer->proj_clip);
}

static void lstm_kinds(const cell *cell, step_row *rows, product_row *products, int count, scratch *work) {
  gate_products(cell, rows, products, count, work);
  for (int b = 0; b < count; b++) kinds_finish(cell, &rows[b], work);
}
