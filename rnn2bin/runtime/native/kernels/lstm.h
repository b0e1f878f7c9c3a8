/* LSTM, as cells/lstm.py: c = f c + i tanh(candidate), h = mean over copies of o tanh(c), projected where there is a projection. */

/* h (H) of one block of units: closed output gates need no tanh. */
INLINE void lstm_outputs(const layer_config *layer, const float *o, const float *c, float *h, int first, int count) {
  float sum[GROUP] = {0};
  for (int k = 0; k < layer->width; k += layer->hidden)
    for (int j = 0; j < count; j++) sum[j] += o[k + first + j] * tanh_of(c[k + first + j]);
  for (int j = 0; j < count; j++) h[first + j] = sum[j] / (float)layer->copies;
}

static void lstm_read(const cell *cell, const float *products, const float *o, const float *c, float *h, scratch *work) {
  const layer_config *layer = cell->layer;
  int hidden = layer->hidden;
  any_open(cell, 2, products, work->open);
  int count = open_groups(work->open, groups_in(cell), work->groups);
  memset(h, 0, (size_t)hidden * sizeof *h);
  for (int g = 0; g < count; g++) {
    int first = work->groups[g] * GROUP;
    if (first + GROUP <= hidden)
      lstm_outputs(layer, o, c, h, first, GROUP);
    else
      lstm_outputs(layer, o, c, h, first, hidden - first);
  }
}

static void lstm_project(const cell *cell, const float *h, step_row *row, scratch *work) {
  columns *active = &work->active;
  active->total = list(h, cell->layer->hidden, 0, active->index, active->value);
  product_row one = {.active = active, .from = 0, .to = active->total, .init = work->zeros, .out = work->spare};
  whole_product(&cell->projection, &one, 1, work->counters);
  memcpy(row->read, work->spare, (size_t)cell->layer->recurrent * sizeof(float));
}

static void lstm_finish(const cell *cell, step_row *row, scratch *work) {
  const layer_config *layer = cell->layer;
  int hidden = layer->hidden, width = layer->width;
  float *i = work->gates, *f = i + width, *o = f + width, *g = work->candidate, *c = row->c;
  gate(cell, 0, row->products, i);
  gate(cell, 1, row->products, f);
  gate(cell, 2, row->products, o);
  any_open(cell, 0, row->products, work->open);
  int count = open_groups(work->open, groups_in(cell), work->groups);
  product_row one = {&row->active, 0, row->active.total, row->candidate_base, g};
  candidate_product(cell, work->open, &one, work);
  for (int k = 0; k < count; k++)
    for (int j = GROUP * work->groups[k], end = j + GROUP; j < end; j++) g[j] = tanh_of(g[j] + cell->bias[j]);
  for (int k = 0; k < width; k += hidden) /* where i is 0, g is what an earlier step left: finite, and multiplied by 0 */
    for (int j = 0; j < hidden; j++) c[k + j] = f[k + j] * c[k + j] + i[k + j] * g[j];
  float *h = layer->projection ? work->recurrent : row->read;
  lstm_read(cell, row->products, o, c, h, work);
  if (layer->projection) lstm_project(cell, h, row, work);
}

/* Products of rows that units share, one sequence at a time: few rows, which stay in the nearest cache. What the input adds to every unit by
 * itself, from a table or a matrix of its own, joins behind them. */
static void shared_products(const cell *cell, step_row *row, const product_row *one, scratch *work) {
  int count = cell->layer->gates * cell->layer->hidden;
  bool apart = cell->table || cell->gates_in.weights;
  float *out = one->out, *shared = work->spare;
  product_row few = {one->active, apart ? row->active.inputs : one->from, one->to, apart ? work->zeros : one->init, shared};
  whole_product(&cell->gates, &few, 1, work->counters);
  const float *base = one->init;
  if (cell->gates_in.weights && one->from < row->active.inputs) {
    int32_t kept[AHEAD], *behind = one->active->index + row->active.inputs; /* what a product looks at in advance is written there */
    memcpy(kept, behind, sizeof kept);
    product_row own = {one->active, 0, row->active.inputs, work->zeros, out};
    whole_product(&cell->gates_in, &own, 1, work->counters);
    memcpy(behind, kept, sizeof kept);
    base = out;
  }
  if (!apart) base = work->zeros;
  float *picked = work->gates; /* (G, width): nothing is decided yet */
  for (int j = 0; j < count; j++) picked[j] = shared[cell->row[j]];
  for (int j = 0; j < count; j += LANES) v_store(out + j, v_fma(v_load(cell->row_scale + j), v_load(picked + j), v_load(base + j)));
}

/* Pre-activations of all gates, less their biases; where they are screened, numbers of the same sign to each threshold. */
static void gate_products(const cell *cell, step_row *rows, product_row *products, int count, scratch *work) {
  for (int b = 0; b < count; b++) {
    columns *a = &rows[b].active;
    a->total = a->inputs + list(rows[b].read, cell->layer->recurrent, cell->inputs, a->index + a->inputs, a->value + a->inputs);
    products[b] = (product_row){a, rows[b].gates_from, a->total, rows[b].gates_base, rows[b].products};
  }
#if defined(R2B_VNNI)
  for (int b = 0; cell->screen.planes && b < count; b++) screen_gates(cell, &rows[b], &products[b], work);
  if (cell->screen.planes) return;
#endif
  for (int b = 0; cell->row && b < count; b++) shared_products(cell, &rows[b], &products[b], work);
  if (!cell->row) whole_product(&cell->gates, products, count, work->counters);
}

static void lstm(const cell *cell, step_row *rows, product_row *products, int count, scratch *work) {
  gate_products(cell, rows, products, count, work);
  for (int b = 0; b < count; b++) lstm_finish(cell, &rows[b], work);
}
