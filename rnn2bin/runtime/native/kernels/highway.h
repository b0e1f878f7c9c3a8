/* Highway layers, over the input or over the state through several layers a step, as cells/highway.py. */

/* h = t n + (1 - t) carried, of the candidate n (H); `carried` (H) or, where it is h itself, (width). */
static void highway_update(const layer_config *layer, const float *t, const float *n, const float *carried, float *h) {
  for (int k = 0; k < layer->width; k += layer->hidden) {
    const float *from = carried == h ? h + k : carried;
    for (int j = 0; j < layer->hidden; j++) h[k + j] = t[k + j] * n[j] + (1.0f - t[k + j]) * from[j];
  }
}

/* The input as it is (I): of a token, behind its shares of the products. */
static const float *carried_input(const cell *cell, const step_row *row, scratch *work) {
  int wide = cell->layer->input;
  if (cell->table) return row->gates_base + cell->table_stride - padded(wide, LINE);
  memset(work->recurrent, 0, (size_t)wide * sizeof(float));
  for (int k = 0; k < row->active.inputs; k++) work->recurrent[row->active.index[k]] = row->active.value[k];
  return work->recurrent;
}

static void highway_layer(const cell *cell, step_row *row, int at, scratch *work) {
  const layer_config *layer = cell->layer;
  bool memoryless = layer->kind->memoryless;
  const block *gate = &cell->blocks[at], *candidate = &cell->blocks[layer->depth + at];
  float *n = work->candidate, *pre = row->pre + at * layer->width;
  columns state = {0};
  if (!memoryless) state = list_state(gate, row->read, layer->hidden, work);
  block_product(cell, gate, row, memoryless ? NULL : &state, NULL, work->spare, work);
  thresholds(cell, at, work->spare, pre);
  decide(cell, at, pre, work->gates, work);
  block_product(cell, candidate, row, memoryless ? NULL : &state, work->open, n, work);
  for (int j = 0; j < layer->hidden; j++) n[j] = tanh_of(n[j] + cell->bias[at * layer->hidden + j]);
  highway_update(layer, work->gates, n, memoryless ? carried_input(cell, row, work) : row->h, row->h);
  if (row->read != row->h) fold_copies(layer, row->h, row->read);
}

static void highway(const cell *cell, step_row *rows, product_row *products, int count, scratch *work) {
  (void)products;
  for (int b = 0; b < count; b++)
    for (int at = 0; at < cell->layer->depth; at++) highway_layer(cell, &rows[b], at, work);
}
