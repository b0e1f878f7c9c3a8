/* The LSTMs with peepholes, diagonal or full, or with one decision for i and f, as cells/lstm_peephole.py and cells/lstm_coupled.py, and all that are clipped. A
 * peephole adds another number for each copy of a unit, so pre-activations are made of all copies. */

/* What gates see of all cells, the mean of each unit's copies: the product of block `which`. */
static const float *kinds_see(const cell *cell, int which, step_row *row, scratch *work) {
  fold_copies(cell->layer, row->c, work->recurrent);
  columns seen = list_state(&cell->blocks[which], work->recurrent, cell->layer->hidden, work);
  block_product(cell, &cell->blocks[which], row, &seen, NULL, work->spare, work);
  return work->spare;
}

/* pre (width) of gate `g`: each copy sees its own cell, or `seen` (H), the same for all. */
static void kinds_pre(const cell *cell, int g, const float *products, const float *c, const float *seen, float *pre) {
  int hidden = cell->layer->hidden, width = cell->layer->width;
  thresholds(cell, g, products + g * hidden, pre);
  for (int k = 0; seen && k < width; k += hidden)
    for (int j = 0; j < hidden; j++) pre[k + j] += seen[j];
  const float *peephole = cell->peephole ? cell->peephole + g * hidden : NULL;
  for (int k = 0; peephole && k < width; k += hidden)
    for (int j = 0; j < hidden; j++) pre[k + j] += peephole[j] * c[k + j];
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
  bool full = layer->kind->peepholes == PEEPHOLES_FULL;
  const float *seen = full ? kinds_see(cell, 0, row, work) : NULL;
  for (int g = 0; g < last; g++) kinds_pre(cell, g, row->products, c, full ? seen + g * layer->hidden : NULL, pre + g * width);
  if (!layer->coupled) decide(cell, 1, pre + width, f, work);
  decide(cell, 0, pre, i, work);
  for (int j = 0; layer->coupled && j < width; j++) f[j] = 1.0f - i[j];
  kinds_cell(cell, row, i, f, work);
  kinds_pre(cell, last, row->products, c, full ? kinds_see(cell, 1, row, work) : NULL, pre + last * width);
  decide(cell, last, pre + last * width, o, work);
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
