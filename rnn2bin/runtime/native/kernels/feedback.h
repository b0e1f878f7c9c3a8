/* Stacks with gated feedback, as cells/feedback.py: a closed global gate leaves a matrix out. */

/* The blocks of one layer, in the order of model.c's plan_stack. */
typedef struct {
  const block *gates_below, *gates_own, *links_below, *links_own, *candidate_below, *feeds; /* gates of a tanh: none */
} feedback_blocks;

static feedback_blocks feedback_layer(const cell *cell, int at) {
  const layer_config *layer = cell->layer;
  int own = layer->unit_gates ? 2 : 0;
  const block *first = cell->blocks + at * (own + 3 + layer->depth);
  return (feedback_blocks){own ? first : NULL, own ? first + 1 : NULL, first + own, first + own + 1, first + own + 2, first + own + 3};
}

/* out += block * values (n). */
static void feedback_add(const block *b, const float *values, int n, const uint16_t *open, float *out, scratch *work) {
  columns state = list_state(b, values, n, work);
  block_part(b, &state, state.total, open, out, work);
}

/* out = W of what is below a layer: the step's input, or `below` (H). */
static void feedback_below(const cell *cell, const block *b, step_row *row, const float *below, const uint16_t *open, float *out, scratch *work) {
  columns state = {0};
  if (below) state = list_state(b, below, cell->layer->hidden, work);
  block_product(cell, b, row, below ? &state : NULL, open, out, work);
}

/* Pre-activations of a layer's global gates, the same for every unit, from `all` (L * H) of the step before. */
static void feedback_links(const cell *cell, step_row *row, int at, const float *below, const float *all, scratch *work) {
  const layer_config *layer = cell->layer;
  feedback_blocks b = feedback_layer(cell, at);
  float *product = work->spare;
  feedback_below(cell, b.links_below, row, below, NULL, product, work);
  feedback_add(b.links_own, all, layer->depth * layer->hidden, NULL, product, work);
  for (int i = 0; i < layer->depth; i++) {
    float *pre = row->pre + (layer->unit_gates + at * layer->depth + i) * layer->width;
    for (int j = 0; j < layer->width; j++) pre[j] = product[i] + cell->link_bias[at * layer->depth + i];
  }
}

/* fed (H): what open global gates let through, in the rows of open units. */
static void feedback_fed(const cell *cell, const step_row *row, int at, const float *all, const uint16_t *open, float *fed, scratch *work) {
  const layer_config *layer = cell->layer;
  feedback_blocks b = feedback_layer(cell, at);
  memset(fed, 0, (size_t)layer->hidden * sizeof *fed);
  for (int i = 0; i < layer->depth; i++) {
    int gate = layer->unit_gates + at * layer->depth + i;
    float pre = row->pre[gate * layer->width], through = cell->binary[gate] ? pre > 0.0f : sigmoid_of(pre);
    if (cell->binary[gate] && through == 0.0f) continue;
    memset(work->spare, 0, (size_t)b.feeds[i].all.rows * sizeof(float));
    feedback_add(&b.feeds[i], all + i * layer->hidden, layer->hidden, open, work->spare, work);
    for (int j = 0; j < layer->hidden; j++) fed[j] += through * work->spare[j];
  }
}

/* Pre-activations and multipliers of a layer's own gates. */
static void feedback_gates(const cell *cell, step_row *row, int at, const float *below, const float *all, scratch *work) {
  const layer_config *layer = cell->layer;
  int each = layer->unit_gates / layer->depth;
  feedback_blocks b = feedback_layer(cell, at);
  feedback_below(cell, b.gates_below, row, below, NULL, work->spare, work);
  feedback_add(b.gates_own, all + at * layer->hidden, layer->hidden, NULL, work->spare, work);
  for (int g = 0; g < each; g++) {
    int gate = at * each + g;
    thresholds(cell, gate, work->spare + g * layer->hidden, row->pre + gate * layer->width);
    multipliers(cell, gate, row->pre + gate * layer->width, work->gates + gate * layer->width);
  }
}

/* update: units that a copy overwrites; reads: those of which such a copy reads its recurrent row too. */
static void feedback_open(const cell *cell, int r, const float *pre, uint16_t *update, uint16_t *reads, const scratch *work) {
  const layer_config *layer = cell->layer;
  const float *of_r = pre + r * layer->width, *of_z = of_r + layer->width;
  for (int i = 0; i < groups_in(cell); i++) {
    unsigned overwritten = 0, read = 0;
    for (int k = 0; k < layer->width; k += layer->hidden) {
      unsigned now = cell->binary[r + 1] ? ~positive(of_z + k + GROUP * i, work->zeros) : 0xffffu;
      overwritten |= now;
      read |= now & (cell->binary[r] ? positive(of_r + k + GROUP * i, work->zeros) : 0xffffu);
    }
    update[i] = (uint16_t)(overwritten & real_units(layer->hidden, i));
    reads[i] = (uint16_t)(read & real_units(layer->hidden, i));
  }
}

static void feedback_tanh(const cell *cell, step_row *row, int at, const float *below, const float *all, float *h, scratch *work) {
  const layer_config *layer = cell->layer;
  float *n = work->candidate, *fed = work->recurrent;
  feedback_fed(cell, row, at, all, NULL, fed, work);
  feedback_below(cell, feedback_layer(cell, at).candidate_below, row, below, NULL, n, work);
  for (int j = 0; j < layer->hidden; j++) h[j] = tanh_of(n[j] + fed[j] + cell->bias[at * layer->hidden + j]);
}

static void feedback_gru(const cell *cell, step_row *row, int at, const float *below, const float *all, float *h, scratch *work) {
  const layer_config *layer = cell->layer;
  const float *r = work->gates + 2 * at * layer->width, *z = r + layer->width, *bias = cell->bias + at * layer->hidden;
  uint16_t *update = work->open, *reads = work->open + groups_in(cell);
  float *n = work->candidate, *fed = work->recurrent;
  feedback_open(cell, 2 * at, row->pre, update, reads, work);
  feedback_fed(cell, row, at, all, reads, fed, work);
  feedback_below(cell, feedback_layer(cell, at).candidate_below, row, below, update, n, work);
  for (int k = 0; k < layer->width; k += layer->hidden)
    for (int j = 0; j < layer->hidden; j++)
      h[k + j] = z[k + j] * h[k + j] + (1.0f - z[k + j]) * tanh_of(n[j] + bias[j] + r[k + j] * fed[j]);
}

static void feedback_lstm(const cell *cell, step_row *row, int at, const float *below, const float *all, float *h, scratch *work) {
  const layer_config *layer = cell->layer;
  int gate = 3 * at, width = layer->width;
  const float *i = work->gates + gate * width, *f = i + width, *o = f + width, *bias = cell->bias + at * layer->hidden;
  float *n = work->candidate, *fed = work->recurrent, *c = row->c + at * width;
  any_copy(cell, gate, row->pre + gate * width, true, work->open, work);
  feedback_fed(cell, row, at, all, work->open, fed, work);
  feedback_below(cell, feedback_layer(cell, at).candidate_below, row, below, work->open, n, work);
  for (int j = 0; j < layer->hidden; j++) n[j] = tanh_of(n[j] + fed[j] + bias[j]);
  memset(h, 0, (size_t)layer->hidden * sizeof *h);
  for (int k = 0; k < width; k += layer->hidden)
    for (int j = 0; j < layer->hidden; j++) {
      c[k + j] = f[k + j] * c[k + j] + i[k + j] * n[j];
      h[j] += o[k + j] == 0.0f ? 0.0f : o[k + j] * tanh_of(c[k + j]);
    }
  for (int j = 0; layer->copies > 1 && j < layer->hidden; j++) h[j] /= (float)layer->copies;
}

static void feedback_finish(const cell *cell, step_row *row, scratch *work) {
  const layer_config *layer = cell->layer;
  int size = layer->state[0] / layer->depth, kind = layer->kind->variant; /* of one layer's h */
  float *all = work->wide, *below = NULL;
  for (int at = 0; at < layer->depth; at++)
    if (kind == FEEDBACK_LSTM)
      memcpy(all + at * layer->hidden, row->h + at * size, (size_t)layer->hidden * sizeof *all);
    else
      fold_copies(layer, row->h + at * size, all + at * layer->hidden);
  for (int at = 0; at < layer->depth; at++) {
    float *h = row->h + at * size;
    feedback_links(cell, row, at, below, all, work);
    if (kind != FEEDBACK_TANH) feedback_gates(cell, row, at, below, all, work);
    if (kind == FEEDBACK_TANH) feedback_tanh(cell, row, at, below, all, h, work);
    if (kind == FEEDBACK_GRU) feedback_gru(cell, row, at, below, all, h, work);
    if (kind == FEEDBACK_LSTM) feedback_lstm(cell, row, at, below, all, h, work);
    below = row->read;
    if (below == h) continue;
    if (kind == FEEDBACK_LSTM)
      memcpy(below, h, (size_t)layer->hidden * sizeof *below);
    else
      fold_copies(layer, h, below);
  }
}

static void feedback(const cell *cell, step_row *rows, product_row *products, int count, scratch *work) {
  (void)products;
  for (int b = 0; b < count; b++) feedback_finish(cell, &rows[b], work);
}
