/* What cells whose matrices are blocks are made of: a block's product, pre-activations of every copy, multipliers of them. */

/* The columns of a block that `values` (n) fill: in work's list, behind the block's own inputs. */
static columns list_state(const block *b, const float *values, int n, scratch *work) {
  columns found = work->active;
  found.inputs = 0;
  found.total = list(values, n, b->inputs, found.index, found.value);
  return found;
}

static void block_part(const block *b, columns *active, int to, const uint16_t *open, float *out, scratch *work) {
  product_row one = {.active = active, .from = 0, .to = to, .init = out, .out = out};
  if (open)
    chosen_product(&b->all, &b->by_row, b->rows, open, &one, work);
  else
    whole_product(&b->all, &one, 1, work->counters);
}

/* out (padded rows) = W [x, state] of a block: all rows, or those of the open units, in others something finite. `state` NULL: it reads none. */
static void block_product(const cell *cell, const block *b, step_row *row, columns *state, const uint16_t *open, float *out, scratch *work) {
  const float *init = cell->table && b->table_at >= 0 ? row->gates_base + b->table_at : work->zeros;
  memcpy(out, init, (size_t)b->all.rows * sizeof *out);
  if (b->inputs) block_part(b, &row->active, row->active.inputs, open, out, work);
  if (state) block_part(b, state, state->total, open, out, work);
}

/* read (H): the mean over copies of values (width). */
static void fold_copies(const layer_config *layer, const float *values, float *read) {
  memcpy(read, values, (size_t)layer->hidden * sizeof *read);
  for (int k = layer->hidden; k < layer->width; k += layer->hidden)
    for (int j = 0; j < layer->hidden; j++) read[j] += values[k + j];
  for (int j = 0; layer->copies > 1 && j < layer->hidden; j++) read[j] /= (float)layer->copies;
}

/* pre (width) of gate `g`, product (H): a threshold for each copy. */
static void thresholds(const cell *cell, int g, const float *product, float *pre) {
  int hidden = cell->layer->hidden, width = cell->layer->width;
  const float *bias = cell->gate_bias + g * width;
  for (int k = 0; k < width; k += hidden)
    for (int j = 0; j < hidden; j++) pre[k + j] = product[j] + bias[k + j];
}

/* open (H / GROUP): units of which any copy of gate `g` has the bit `wanted`; all where it is soft. */
static void any_copy(const cell *cell, int g, const float *pre, bool wanted, uint16_t *open, const scratch *work) {
  int hidden = cell->layer->hidden, width = cell->layer->width;
  for (int i = 0; i < groups_in(cell); i++) {
    unsigned bits = cell->binary[g] ? 0 : 0xffffu;
    for (int k = 0; cell->binary[g] && k < width; k += hidden)
      bits |= positive(pre + k + GROUP * i, work->zeros) ^ (wanted ? 0u : 0xffffu);
    open[i] = (uint16_t)(bits & real_units(hidden, i));
  }
}

/* Multipliers (width) of gate `g`. */
static void multipliers(const cell *cell, int g, const float *pre, float *out) {
  int width = cell->layer->width;
  if (!cell->binary[g]) {
    for (int j = 0; j < width; j++) out[j] = sigmoid_of(bounded(pre[j], cell->layer->clip));
    return;
  }
  const float *lo = cell->lo + g * width, *hi = cell->hi + g * width;
  for (int j = 0; j < width; j++) out[j] = pre[j] > 0.0f ? hi[j] : lo[j];
}

/* Both: the multipliers, and in work->open the units of which any copy is open. */
static void decide(const cell *cell, int g, const float *pre, float *out, scratch *work) {
  any_copy(cell, g, pre, true, work->open, work);
  multipliers(cell, g, pre, out);
}
