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

/* One gate's vectors over the copies of units, from the first at hand on. */
typedef struct {
  const float *bias, *lo, *hi;
} thresholds_of;

INLINE thresholds_of gate_at(const cell *cell, int g) {
  int at = g * cell->layer->width;
  return (thresholds_of){cell->gate_bias + at, cell->lo + at, cell->hi + at};
}

/* c and h of the units from `first` to `last`, one by one. */
static void lstm_single_units(const cell *cell, const float *products, const float *g, float *c, float *h, int first, int last) {
  const layer_config *layer = cell->layer;
  thresholds_of i = gate_at(cell, 0), f = gate_at(cell, 1), o = gate_at(cell, 2);
  for (int j = first; j < last; j++) {
    float sum = 0.0f;
    for (int k = j; k < layer->width; k += layer->hidden) {
      bool in = products[j] + i.bias[k] > 0.0f, keep = products[layer->hidden + j] + f.bias[k] > 0.0f;
      bool out = products[2 * layer->hidden + j] + o.bias[k] > 0.0f;
      c[k] = (keep ? f.hi[k] : f.lo[k]) * c[k] + (in ? i.hi[k] * g[j] : 0.0f);
      sum += out ? o.hi[k] * tanh_of(c[k]) : 0.0f;
    }
    h[j] = sum / (float)layer->copies;
  }
}

/* Where all gates are decisions: multipliers, c and h (H) of a few units at a time while they are in registers. What lets nothing in or out is
 * exactly 0 (kinds.GateSpec), and where no unit at hand is shown there is no tanh. */
static void lstm_units(const cell *cell, const float *products, const float *g, float *c, float *h) {
  const layer_config *layer = cell->layer;
  int hidden = layer->hidden, j = 0;
  thresholds_of i = gate_at(cell, 0), f = gate_at(cell, 1), o = gate_at(cell, 2);
  for (; j + LANES <= hidden; j += LANES) {
    V in = v_load(products + j), keep = v_load(products + hidden + j), out = v_load(products + 2 * hidden + j);
    V candidate = v_load(g + j), sum = v_all(0.0f);
    for (int k = j; k < layer->width; k += hidden) {
      V let_in = v_keep(v_positive(v_add(in, v_load(i.bias + k))), v_load(i.hi + k));
      V kept = v_choose(v_positive(v_add(keep, v_load(f.bias + k))), v_load(f.hi + k), v_load(f.lo + k));
      M shown = v_positive(v_add(out, v_load(o.bias + k)));
      V memory = v_fma(kept, v_load(c + k), v_mul(let_in, candidate));
      v_store(c + k, memory);
      if (v_any(shown)) sum = v_fma(v_keep(shown, v_load(o.hi + k)), v_tanh(memory), sum);
    }
    v_store(h + j, v_div(sum, v_all((float)layer->copies)));
  }
  lstm_single_units(cell, products, g, c, h, j, hidden);
}

static void lstm_project(const cell *cell, const float *h, step_row *row, scratch *work) {
  columns *active = &work->active;
  active->total = list(h, cell->layer->hidden, 0, active->index, active->value);
  product_row one = {.active = active, .from = 0, .to = active->total, .init = work->zeros, .out = work->spare};
  whole_product(&cell->projection, &one, 1, work->counters);
  memcpy(row->read, work->spare, (size_t)cell->layer->recurrent * sizeof(float));
}

/* Candidates of the units that let something in, tanh and all; others' are what an earlier step left: finite. */
static float *lstm_candidate(const cell *cell, step_row *row, scratch *work) {
  float *g = work->candidate;
  any_open(cell, 0, row->products, work->open);
  int count = open_groups(work->open, groups_in(cell), work->groups);
  product_row one = {&row->active, 0, row->active.total, row->candidate_base, g};
  candidate_product(cell, work->open, &one, work);
  for (int k = 0; k < count; k++)
    for (int j = GROUP * work->groups[k], end = j + GROUP; j < end; j++) g[j] = tanh_of(g[j] + cell->bias[j]);
  return g;
}

/* Where a gate is soft, pass by pass. */
static void lstm_soft_units(const cell *cell, step_row *row, const float *g, float *h, scratch *work) {
  const layer_config *layer = cell->layer;
  int hidden = layer->hidden, width = layer->width;
  float *i = work->gates, *f = i + width, *o = f + width, *c = row->c;
  gate(cell, 0, row->products, i);
  gate(cell, 1, row->products, f);
  gate(cell, 2, row->products, o);
  for (int k = 0; k < width; k += hidden) /* where i is 0, so is what g is multiplied by */
    for (int j = 0; j < hidden; j++) c[k + j] = f[k + j] * c[k + j] + i[k + j] * g[j];
  lstm_read(cell, row->products, o, c, h, work);
}

static void lstm_finish(const cell *cell, step_row *row, scratch *work) {
  const float *g = lstm_candidate(cell, row, work);
  float *h = cell->layer->projection ? work->recurrent : row->read;
  if (cell->binary[0] && cell->binary[1] && cell->binary[2])
    lstm_units(cell, row->products, g, row->c, h);
  else
    lstm_soft_units(cell, row, g, h, work);
  if (cell->layer->projection) lstm_project(cell, h, row, work);
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
  int hidden = cell->layer->hidden, rows = rows_of_gate(cell->layer, cell->layer->shared);
  for (int g = 0; g < cell->layer->gates; g++) pick(shared + g * rows, rows, cell->row + g * hidden, hidden, picked + g * hidden);
  for (int j = 0; j < count; j += LANES) v_store(out + j, v_fma(v_load(cell->row_scale + j), v_load(picked + j), v_load(base + j)));
}

/* Pre-activations of all gates, less their biases; where they are screened, numbers of the same sign to each threshold. */
static void gate_products(const cell *cell, step_row *rows, product_row *products, int count, scratch *work) {
  for (int b = 0; b < count; b++) {
    columns *a = &rows[b].active;
    a->total = a->inputs + list(rows[b].read, cell->layer->recurrent, cell->inputs, a->index + a->inputs, a->value + a->inputs);
    products[b] = (product_row){a, rows[b].gates_from, a->total, rows[b].gates_base, rows[b].products};
  }
#if defined(SCREEN)
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
