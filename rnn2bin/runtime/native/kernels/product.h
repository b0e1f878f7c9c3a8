/* Products with fp16 weights: of each row one float32 sum, over ascending columns. So a column of zero can be left out, and the input's
 * share be added in advance: no bit changes. */

enum { AT_ONCE = 4, VECTORS_A_LINE = LINE / LANES };

/* `n` active columns of `rows` rows of a tile whose columns are `stride` apart: out = from + columns * values. Sums wait in `out`, which
 * stays in the first cache; each is loaded once for all n. The next ones' lines are fetched while these are added. */
INLINE void add_columns(const uint16_t *tile, size_t stride, const columns *active, int at, const float *from, float *out, int rows, const int n) {
  const uint16_t *column[AT_ONCE];
  uintptr_t next[AT_ONCE]; /* where the tile ends, beyond it */
  V x[AT_ONCE];
  for (int j = 0; j < n; j++) {
    column[j] = tile + (size_t)active->index[at + j] * stride;
    next[j] = (uintptr_t)tile + (size_t)active->index[at + n + j] * stride * sizeof *tile;
    x[j] = v_all(active->value[at + j]);
  }
  for (int r = 0; r < rows; r += LINE) {
    V sum[VECTORS_A_LINE];
    for (int v = 0; v < VECTORS_A_LINE; v++) sum[v] = v_load(from + r + LANES * v);
    for (int j = 0; j < n; j++) {
      __builtin_prefetch((const void *)(next[j] + sizeof *tile * (size_t)r));
      for (int v = 0; v < VECTORS_A_LINE; v++) sum[v] = v_fma(v_half(column[j] + r + LANES * v), x[j], sum[v]);
    }
    for (int v = 0; v < VECTORS_A_LINE; v++) v_store(out + r + LANES * v, sum[v]);
  }
}

static void add_rest(const uint16_t *tile, size_t stride, const columns *active, int at, const float *from, float *out, int rows, int n) {
  switch (n) {
    case 3: add_columns(tile, stride, active, at, from, out, rows, 3); return;
    case 2: add_columns(tile, stride, active, at, from, out, rows, 2); return;
    default: add_columns(tile, stride, active, at, from, out, rows, 1); return;
  }
}

/* `rows` rows of a tile from its row `at` on. */
static void strip(const uint16_t *tile, size_t stride, const product_row *row, int at, int rows) {
  const float *from = row->init + at;
  float *out = row->out + at;
  int k = row->from;
  if (k == row->to && from != out) memcpy(out, from, (size_t)rows * sizeof *out);
  for (; k + AT_ONCE <= row->to; k += AT_ONCE, from = out) add_columns(tile, stride, row->active, k, from, out, rows, AT_ONCE);
  if (k < row->to) add_rest(tile, stride, row->active, k, from, out, rows, row->to - k);
}

/* What is fetched in advance at the end of a tile is the beginning of the next: as columns, its first ones stand behind the last of this. */
static void look_ahead(const product_row *row, int cols) {
  int32_t *index = row->active->index;
  for (int k = 0; k < AHEAD; k++) index[row->to + k] = row->from + k < row->to ? cols + index[row->from + k] : 0;
}

/* Tiles outside, sequences inside: of several a low piece of a tile at a time, which stays in the second cache for all of them. */
static void product(const matrix *m, const product_row *rows, int count, r2b_counters *counters) {
  for (int b = 0; b < count; b++) look_ahead(&rows[b], m->cols);
  for (int row = 0; row < m->rows;) {
    int height = tile_rows(m->rows - row), piece = count > 1 && height > SHARED ? SHARED : height;
    const uint16_t *tile = m->weights + (size_t)row * (size_t)m->cols;
    for (int at = 0; at < height; at += piece)
      for (int b = 0; b < count; b++) strip(tile + at, (size_t)height, &rows[b], row + at, piece);
    row += height;
  }
  for (int b = 0; b < count; b++) counters->bytes += 2u * (uint64_t)m->rows * (uint64_t)(rows[b].to - rows[b].from);
}

/* Everything that is asked for is read. */
static void whole_product(const matrix *m, const product_row *rows, int count, r2b_counters *counters) {
  product(m, rows, count, counters);
  for (int b = 0; b < count; b++) counters->weights += (uint64_t)m->wanted * (uint64_t)(rows[b].to - rows[b].from);
}
