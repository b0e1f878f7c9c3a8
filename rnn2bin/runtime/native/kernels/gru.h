/* GRU in both reset forms, and with an output gate, as cells/gru.py. Units that keep their state (z = 1) are not touched at all. */

/* update: units of which a copy is overwritten; reads: those of which an overwritten copy reads its recurrent row too; bits of groups. */
static void gru_open(const cell *cell, const float *products, uint16_t *update, uint16_t *reads) {
  const layer_config *layer = cell->layer;
  for (int i = 0; i < groups_in(cell); i++) {
    unsigned overwritten = 0, read = 0;
    for (int k = 0; k < layer->width; k += layer->hidden) {
      unsigned now = ~group_bits(cell, 1, k, products, i, 0);
      overwritten |= now;
      read |= now & group_bits(cell, 0, k, products, i, 0xffffu);
    }
    update[i] = (uint16_t)(overwritten & real_units(layer->hidden, i));
    reads[i] = (uint16_t)(read & real_units(layer->hidden, i));
  }
}

/* n and the new memory of one group of units. `inner` (H) is multiplied by r: the recurrent product, or zeros where r came before it. */
INLINE void gru_update(const cell *cell, const float *r, const float *z, const float *n, const float *inner, float *memory, int first, int count) {
  const layer_config *layer = cell->layer;
  for (int k = 0; k < layer->width; k += layer->hidden) {
    for (int j = 0; j < count; j++) {
      int at = k + first + j;
      float candidate = tanh_of(bounded(n[first + j] + cell->bias[first + j] + r[at] * inner[first + j], layer->clip));
      memory[at] = z[at] * memory[at] + (1.0f - z[at]) * candidate;
    }
  }
}

/* What others read of one group: the mean over copies, each behind its output gate where there is one (o not NULL). */
INLINE void gru_outputs(const layer_config *layer, const float *o, const float *memory, float *read, int first, int count) {
  float sum[GROUP] = {0};
  for (int k = 0; k < layer->width; k += layer->hidden)
    for (int j = 0; j < count; j++) sum[j] += o ? o[k + first + j] * memory[k + first + j] : memory[k + first + j];
  for (int j = 0; j < count; j++) read[first + j] = sum[j] / (float)layer->copies;
}

/* Without an output gate only what was updated changes; behind one every open unit is read anew, and closed ones are 0. */
static void gru_read(const cell *cell, const step_row *row, const float *o, int updated, scratch *work) {
  const layer_config *layer = cell->layer;
  const float *memory = o ? row->c : row->h;
  if (o) {
    any_open(cell, 2, row->products, work->open);
    updated = open_groups(work->open, groups_in(cell), work->groups);
    memset(row->read, 0, (size_t)layer->hidden * sizeof *row->read);
  }
  for (int g = 0; g < updated; g++) {
    int first = GROUP * work->groups[g];
    if (first + GROUP <= layer->hidden)
      gru_outputs(layer, o, memory, row->read, first, GROUP);
    else
      gru_outputs(layer, o, memory, row->read, first, layer->hidden - first);
  }
}

/* The recurrent half of the candidate, after the product: rows of closed reset gates stay what they were, and are multiplied by 0. */
static const float *reset_after(const cell *cell, step_row *row, const uint16_t *reads, scratch *work) {
  float *inner = work->recurrent;
  product_row one = {&row->active, row->active.inputs, row->active.total, cell->bias_hh, inner};
  candidate_product(cell, reads, &one, work);
  return inner;
}

/* r times h before the product: its active columns, as offsets behind the input's. */
static void reset_before(const cell *cell, const step_row *row, const float *r, scratch *work) {
  const layer_config *layer = cell->layer;
  float *read = work->spare;
  for (int j = 0; j < layer->hidden; j++) read[j] = 0.0f;
  for (int k = 0; k < layer->width; k += layer->hidden)
    for (int j = 0; j < layer->hidden; j++) read[j] += r[k + j] * row->h[k + j];
  for (int j = 0; j < layer->hidden; j++) read[j] /= (float)layer->copies;
  work->active.total = list(read, layer->hidden, cell->inputs, work->active.index, work->active.value);
}

/* c (memory) and what others read of the units from `first` to `last`, one by one; as gru_units. */
static void gru_single_units(const cell *cell, const float *products, const float *n, const float *inner, float *memory, float *read, int first,
                             int last) {
  const layer_config *layer = cell->layer;
  thresholds_of r = gate_at(cell, 0), z = gate_at(cell, 1), o = layer->has_cell ? gate_at(cell, 2) : r;
  for (int j = first; j < last; j++) {
    float sum = 0.0f;
    for (int k = j; k < layer->width; k += layer->hidden) {
      bool reset = products[j] + r.bias[k] > 0.0f, keep = products[layer->hidden + j] + z.bias[k] > 0.0f;
      bool out = !layer->has_cell || products[2 * layer->hidden + j] + o.bias[k] > 0.0f;
      if (!keep) {
        float candidate = tanh_of(bounded(n[j] + cell->bias[j] + (reset ? r.hi[k] * inner[j] : 0.0f), layer->clip));
        memory[k] = z.lo[k] * memory[k] + (1.0f - z.lo[k]) * candidate;
      }
      sum += !layer->has_cell ? memory[k] : out ? o.hi[k] * memory[k] : 0.0f;
    }
    read[j] = sum / (float)layer->copies;
  }
}

/* Where all gates are decisions and r comes after its product: memory and what others read (H) of a few units at a time while they are in
 * registers. What is kept is kept to the bit, and where every unit at hand keeps there is no tanh. */
INLINE void gru_units(const cell *cell, const float *products, const float *n, const float *inner, float *memory, float *read, const bool shown) {
  const layer_config *layer = cell->layer;
  int hidden = layer->hidden, j = 0;
  thresholds_of r = gate_at(cell, 0), z = gate_at(cell, 1), o = shown ? gate_at(cell, 2) : r;
  V most = v_all(layer->clip), least = v_all(-layer->clip), copies = v_all((float)layer->copies);
  for (; j + LANES <= hidden; j += LANES) {
    V reset = v_load(products + j), keep = v_load(products + hidden + j), out = shown ? v_load(products + 2 * hidden + j) : reset;
    V input = v_add(v_load(n + j), v_load(cell->bias + j)), own = v_load(inner + j), sum = v_all(0.0f);
    for (int k = j; k < layer->width; k += hidden) {
      M kept = v_positive(v_add(keep, v_load(z.bias + k)));
      V now = v_load(memory + k);
      if (!v_every(kept)) {
        V factor = v_keep(v_positive(v_add(reset, v_load(r.bias + k))), v_load(r.hi + k)), lo = v_load(z.lo + k);
        V candidate = v_tanh(v_max(least, v_min(most, v_fma(factor, own, input))));
        now = v_choose(kept, now, v_fma(lo, now, v_mul(v_fma(lo, v_all(-1.0f), v_all(1.0f)), candidate)));
        v_store(memory + k, now);
      }
      sum = shown ? v_fma(v_keep(v_positive(v_add(out, v_load(o.bias + k))), v_load(o.hi + k)), now, sum) : v_add(sum, now);
    }
    v_store(read + j, v_div(sum, copies));
  }
  gru_single_units(cell, products, n, inner, memory, read, j, hidden);
}

/* Where a gate is soft, or r comes before its product: pass by pass. */
static void gru_by_passes(const cell *cell, step_row *row, const float *inner, const uint16_t *update, scratch *work) {
  const layer_config *layer = cell->layer;
  float *r = work->gates, *z = r + layer->width, *o = layer->has_cell ? z + layer->width : NULL, *n = work->candidate;
  gate(cell, 1, row->products, z);
  if (o) gate(cell, 2, row->products, o);
  int count = open_groups(update, groups_in(cell), work->groups);
  for (int g = 0; g < count; g++) {
    int first = GROUP * work->groups[g];
    if (first + GROUP <= layer->hidden)
      gru_update(cell, r, z, n, inner, o ? row->c : row->h, first, GROUP);
    else
      gru_update(cell, r, z, n, inner, o ? row->c : row->h, first, layer->hidden - first);
  }
  gru_read(cell, row, o, count, work);
}

static void gru_finish(const cell *cell, step_row *row, scratch *work) {
  const layer_config *layer = cell->layer;
  uint16_t *update = work->open, *reads = work->open + groups_in(cell);
  float *n = work->candidate;
  bool after = layer->kind->reset_after, decided = cell->binary[0] && cell->binary[1] && (!layer->has_cell || cell->binary[2]);
  const float *inner = work->zeros;
  if (!(after && decided)) gate(cell, 0, row->products, work->gates);
  gru_open(cell, row->products, update, reads);
  if (after)
    inner = reset_after(cell, row, reads, work);
  else
    reset_before(cell, row, work->gates, work);
  product_row input = {&row->active, 0, row->active.inputs, row->candidate_base, n};
  candidate_product(cell, update, &input, work);
  if (!after) {
    product_row recurrent = {&work->active, 0, work->active.total, n, n};
    candidate_product(cell, update, &recurrent, work);
  }
  if (!(after && decided))
    gru_by_passes(cell, row, inner, update, work);
  else if (layer->has_cell)
    gru_units(cell, row->products, n, inner, row->c, row->read, true);
  else
    gru_units(cell, row->products, n, inner, row->h, row->read, false);
}

static void gru(const cell *cell, step_row *rows, product_row *products, int count, scratch *work) {
  gate_products(cell, rows, products, count, work);
  for (int b = 0; b < count; b++) gru_finish(cell, &rows[b], work);
}
