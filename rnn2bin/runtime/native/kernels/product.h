/* Products: of each row one float32 sum, over ascending columns. So a column of zero can be left out, and the input's share be added in
 * advance: no bit changes. Where weights are bytes, sums are taken in units of the row's grid; that is a power of two, so the bits are
 * those of the same weights in fp16. */

enum { AT_ONCE = 4, SHORT = 64, VECTORS_A_LINE = LINE / LANES };

/* `n` active columns of `rows` rows of a tile whose columns are `stride` apart: out = from + columns * values. Sums wait in `out`, which
 * stays in the first cache; each is loaded once for all n. The next ones' lines are fetched while these are added. */
INLINE void add_columns(const uint8_t *tile, size_t stride, const columns *active, int at, const float *from, float *out, int rows, const int n,
                        const int size) {
  const uint8_t *column[AT_ONCE];
  uintptr_t next[AT_ONCE]; /* where the tile ends, beyond it */
  V x[AT_ONCE];
  for (int j = 0; j < n; j++) {
    column[j] = tile + (size_t)active->index[at + j] * stride;
    next[j] = (uintptr_t)tile + (size_t)active->index[at + n + j] * stride;
    x[j] = v_all(active->value[at + j]);
  }
  for (int r = 0; r < rows; r += LINE) {
    V sum[VECTORS_A_LINE];
    for (int v = 0; v < VECTORS_A_LINE; v++) sum[v] = v_load(from + r + LANES * v);
    size_t byte = (size_t)size * (size_t)r;
    for (int j = 0; j < n; j++) {
      if (size == 2 || byte % 64 == 0) __builtin_prefetch((const void *)(next[j] + byte));
      for (int v = 0; v < VECTORS_A_LINE; v++) sum[v] = v_fma(v_weights(column[j] + byte + size * LANES * v, size), x[j], sum[v]);
    }
    for (int v = 0; v < VECTORS_A_LINE; v++) v_store(out + r + LANES * v, sum[v]);
  }
}

static void add_rest(const uint8_t *tile, size_t stride, const columns *active, int at, const float *from, float *out, int rows, int n,
                     int size) {
  switch (4 * size + n) {
    case 11: add_columns(tile, stride, active, at, from, out, rows, 3, 2); return;
    case 10: add_columns(tile, stride, active, at, from, out, rows, 2, 2); return;
    case 9: add_columns(tile, stride, active, at, from, out, rows, 1, 2); return;
    case 7: add_columns(tile, stride, active, at, from, out, rows, 3, 1); return;
    case 6: add_columns(tile, stride, active, at, from, out, rows, 2, 1); return;
    default: add_columns(tile, stride, active, at, from, out, rows, 1, 1); return;
  }
}

/* The same for all active columns of few rows, whose sums stay in registers: of a low tile a column is a line or two, and there is little to
 * do between loading sums and storing them. */
INLINE void add_low(const uint8_t *tile, size_t stride, const product_row *row, const float *from, float *out, const int rows, const int size) {
  enum { AT_MOST = SHORT / LANES };
  V sum[AT_MOST];
  const int32_t *index = row->active->index;
  for (int v = 0; v < rows / LANES; v++) sum[v] = v_load(from + LANES * v);
  for (int k = row->from; k < row->to; k++) {
    const uint8_t *column = tile + (size_t)index[k] * stride;
    V x = v_all(row->active->value[k]);
    __builtin_prefetch((const void *)((uintptr_t)tile + (size_t)index[k + AHEAD / 2] * stride));
    for (int v = 0; v < rows / LANES; v++) sum[v] = v_fma(v_weights(column + size * LANES * v, size), x, sum[v]);
  }
  for (int v = 0; v < rows / LANES; v++) v_store(out + LANES * v, sum[v]);
}

INLINE void add_all(const uint8_t *tile, size_t stride, const product_row *row, const float *from, float *out, int rows, const int size) {
  if (rows == SHORT) {
    add_low(tile, stride, row, from, out, SHORT, size);
    return;
  }
  if (rows == LINE) {
    add_low(tile, stride, row, from, out, LINE, size);
    return;
  }
  int k = row->from;
  for (; k + AT_ONCE <= row->to; k += AT_ONCE, from = out) add_columns(tile, stride, row->active, k, from, out, rows, AT_ONCE, size);
  if (k < row->to) add_rest(tile, stride, row->active, k, from, out, rows, row->to - k, size);
}

static void multiply(const float *x, const float *y, float *out, int rows) {
  for (int r = 0; r < rows; r += LANES) v_store(out + r, v_mul(v_load(x + r), v_load(y + r)));
}

/* `rows` rows of a tile from the matrix' row `at` on. */
static void strip(const matrix *m, const uint8_t *tile, size_t stride, const product_row *row, int at, int rows) {
  const float *from = row->init + at;
  float *out = row->out + at;
  if (row->from == row->to) {
    if (from != out) memcpy(out, from, (size_t)rows * sizeof *out);
  } else if (m->grid.scale) {
    multiply(from, m->grid.inverse + at, out, rows);
    add_all(tile, stride, row, out, out, rows, 1);
    multiply(out, m->grid.scale + at, out, rows);
  } else {
    add_all(tile, stride, row, from, out, rows, 2);
  }
}

/* What is fetched in advance at the end of a tile is the beginning of the next: as columns, its first ones stand behind the last of this. */
static void look_ahead(const product_row *row, int cols) {
  int32_t *index = row->active->index;
  for (int k = 0; k < AHEAD; k++) index[row->to + k] = row->from + k < row->to ? cols + index[row->from + k] : 0;
}

/* Tiles outside, sequences inside: of several a low piece of a tile at a time, which stays in the second cache for all of them. */
static void product(const matrix *m, const product_row *rows, int count, r2b_counters *counters) {
  for (int b = 0; b < count; b++) look_ahead(&rows[b], m->cols);
  size_t size = (size_t)weight_size(&m->grid);
  for (int row = 0; row < m->rows;) {
    int height = tile_rows(m->rows - row), piece = count > 1 && height > SHARED ? SHARED : height;
    const uint8_t *tile = (const uint8_t *)m->weights + size * (size_t)row * (size_t)m->cols;
    for (int at = 0; at < height; at += piece)
      for (int b = 0; b < count; b++) strip(m, tile + size * (size_t)at, size * (size_t)height, &rows[b], row + at, piece);
    row += height;
  }
  for (int b = 0; b < count; b++) counters->bytes += size * (uint64_t)m->rows * (uint64_t)(rows[b].to - rows[b].from);
}

/* Everything that is asked for is read. */
static void whole_product(const matrix *m, const product_row *rows, int count, r2b_counters *counters) {
  product(m, rows, count, counters);
  for (int b = 0; b < count; b++) counters->weights += (uint64_t)m->wanted * (uint64_t)(rows[b].to - rows[b].from);
}
