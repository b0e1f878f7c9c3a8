/* Memories that are written, forgotten and read selectively, as cells/memory.py: bits of a variant say what reads what. */

enum { WRITE, FORGET, READ }; /* gates i, f, o; the candidate's block is behind them */

/* view (width): what is looked at of the memory. */
static void memory_view(const layer_config *layer, const float *s, float *view) {
  memcpy(view, s, (size_t)layer->width * sizeof *view);
  if (!(layer->kind->variant & BARE)) activate(ACT_TANH, view, layer->width);
}

/* read (H): the mean over copies of o * view. */
static void memory_read(const layer_config *layer, const float *o, const float *view, float *read) {
  for (int j = 0; j < layer->hidden; j++) read[j] = o[j] * view[j];
  for (int k = layer->hidden; k < layer->width; k += layer->hidden)
    for (int j = 0; j < layer->hidden; j++) read[j] += o[k + j] * view[k + j];
  for (int j = 0; layer->copies > 1 && j < layer->hidden; j++) read[j] /= (float)layer->copies;
}

/* Gates `from` to before `to`, of what they look at (H). */
static void memory_gates(const cell *cell, step_row *row, const float *seen, int from, int to, scratch *work) {
  int width = cell->layer->width;
  columns state = list_state(&cell->blocks[from], seen, cell->layer->hidden, work);
  for (int g = from; g < to; g++) {
    block_product(cell, &cell->blocks[g], row, &state, NULL, work->spare, work);
    thresholds(cell, g, work->spare, row->pre + g * width);
    multipliers(cell, g, row->pre + g * width, work->gates + g * width);
  }
}

static void normalize_memory(float *s, int n) {
  double mean = 0.0, square = 0.0;
  for (int j = 0; j < n; j++) mean += s[j];
  mean /= n;
  for (int j = 0; j < n; j++) square += (s[j] - mean) * (s[j] - mean);
  float scale = sqrtf((float)(square / n) + 1.0f);
  for (int j = 0; j < n; j++) s[j] /= scale;
}

static void memory_write(const cell *cell, step_row *row, const float *read, float *s, scratch *work) {
  const layer_config *layer = cell->layer;
  const block *candidate = &cell->blocks[READ + 1];
  float *n = work->candidate, *i = work->gates, *f = i + layer->width;
  any_copy(cell, WRITE, row->pre, true, work->open, work);
  columns state = list_state(candidate, read, layer->hidden, work);
  block_product(cell, candidate, row, &state, work->open, n, work);
  for (int j = 0; j < layer->hidden; j++) n[j] = tanh_of(n[j] + cell->bias[j]);
  for (int k = 0; k < layer->width; k += layer->hidden)
    for (int j = 0; j < layer->hidden; j++) s[k + j] = f[k + j] * s[k + j] + i[k + j] * n[j];
  if (layer->kind->variant & NORMALIZED) normalize_memory(s, layer->width);
}

static void memory_finish(const cell *cell, step_row *row, scratch *work) {
  const layer_config *layer = cell->layer;
  int variant = layer->kind->variant;
  bool late = variant & READS_LATE;
  float *s = variant & BARE ? row->h : row->c, *o = work->gates + READ * layer->width, *view = work->wide;
  float *read = !late ? work->recurrent : variant & OUTPUT_READ ? row->h : row->r, *seen = work->candidate;
  memory_view(layer, s, view);
  fold_copies(layer, view, seen);
  memory_gates(cell, row, late && variant & GATES_READ ? read : seen, READ, READ + 1, work);
  if (!late) memory_read(layer, o, view, read);
  memory_gates(cell, row, variant & GATES_READ ? read : seen, WRITE, READ, work);
  memory_write(cell, row, read, s, work);
  if (variant & BARE) {
    if (row->read != row->h) fold_copies(layer, row->h, row->read);
    return;
  }
  memory_view(layer, s, view);
  if (late) memory_read(layer, o, view, read); /* of pseudo_13 and pseudo_123 that is h */
  if (!late && variant & OUTPUT_READ) memory_read(layer, o, view, row->h);
  if (!(variant & OUTPUT_READ)) fold_copies(layer, view, row->h);
}

static void memory(const cell *cell, step_row *rows, product_row *products, int count, scratch *work) {
  (void)products;
  for (int b = 0; b < count; b++) memory_finish(cell, &rows[b], work);
}
