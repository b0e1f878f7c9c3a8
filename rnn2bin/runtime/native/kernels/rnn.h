/* RNNs of one gate or none, as cells/rnn.py. Units that keep their state are computed by nobody. */

/* h of the candidate n (H): kept where f is 1 and written where it is 0, or added to where it is 1. */
static void rnn_update(const layer_config *layer, const float *f, const float *n, float *h) {
  bool adds = layer->kind->variant == RNN_RESIDUAL;
  for (int k = 0; k < layer->width; k += layer->hidden)
    for (int j = 0; j < layer->hidden; j++) h[k + j] = adds ? h[k + j] + f[k + j] * n[j] : f[k + j] * h[k + j] + (1.0f - f[k + j]) * n[j];
}

static void rnn_finish(const cell *cell, step_row *row, scratch *work) {
  const layer_config *layer = cell->layer;
  bool gated = layer->kind->variant != RNN_VANILLA;
  const block *candidate = &cell->blocks[gated];
  float *n = work->candidate, *f = work->gates;
  columns state = list_state(candidate, row->read, layer->hidden, work);
  if (gated) {
    block_product(cell, &cell->blocks[0], row, &state, NULL, work->spare, work);
    thresholds(cell, 0, work->spare, row->pre);
    any_copy(cell, 0, row->pre, layer->kind->variant == RNN_RESIDUAL, work->open, work);
    multipliers(cell, 0, row->pre, f);
  }
  block_product(cell, candidate, row, &state, gated ? work->open : NULL, n, work);
  for (int j = 0; j < layer->hidden; j++) n[j] += cell->bias[j];
  activate(layer->relu ? ACT_RELU : ACT_TANH, n, layer->hidden);
  if (gated)
    rnn_update(layer, f, n, row->h);
  else
    memcpy(row->h, n, (size_t)layer->hidden * sizeof *n);
  if (row->read != row->h) fold_copies(layer, row->h, row->read);
}

static void rnn(const cell *cell, step_row *rows, product_row *products, int count, scratch *work) {
  (void)products;
  for (int b = 0; b < count; b++) rnn_finish(cell, &rows[b], work);
}
