/* Products with fp16 weights: of each row one float32 accumulator, over ascending columns. So a column of zero can be left out, and the
 * input's share be added in advance: no bit changes. */

/* `nv` times eight rows of a tile whose columns are `stride` apart. */
INLINE void strip(const uint16_t *tile, size_t stride, const product_row *row, int at, const int nv) {
  V sum[ACCUMULATORS];
  const int32_t *index = row->active->index;
  const float *value = row->active->value;
  for (int v = 0; v < nv; v++) sum[v] = v_load(row->init + at + 8 * v);
  for (int k = row->from; k < row->to; k++) {
    const uint16_t *column = tile + (size_t)index[k] * stride;
    uintptr_t next = (uintptr_t)tile + (size_t)index[k + AHEAD] * stride * sizeof *tile;
    V x = v_all(value[k]);
    for (int v = 0; v < nv; v += 4) __builtin_prefetch((const void *)(next + 16 * (size_t)v));
    for (int v = 0; v < nv; v++) sum[v] = v_fma(v_half(column + 8 * v), x, sum[v]);
  }
  for (int v = 0; v < nv; v++) v_store(row->out + at + 8 * v, sum[v]);
}

static void one_strip(const uint16_t *tile, size_t stride, const product_row *row, int at, int rows) {
  switch (rows) {
#if defined(R2B_WIDE)
    case 128: strip(tile, stride, row, at, 16); return;
#endif
#if !defined(R2B_NARROW)
    case 64: strip(tile, stride, row, at, 8); return;
    case 32: strip(tile, stride, row, at, 4); return;
#endif
    default: strip(tile, stride, row, at, 2); return;
  }
}

/* What is fetched in advance at the end of a tile is the beginning of the next: as columns, its first ones stand behind the last of this. */
static void look_ahead(const product_row *row, int cols) {
  int32_t *index = row->active->index;
  for (int k = 0; k < AHEAD; k++) index[row->to + k] = row->from + k < row->to ? cols + index[row->from + k] : 0;
}

/* Tiles outside, sequences inside: a tile is fetched once for all of them. */
static void product(const matrix *m, const product_row *rows, int count, r2b_counters *counters) {
  for (int b = 0; b < count; b++) look_ahead(&rows[b], m->cols);
  for (int row = 0; row < m->rows;) {
    int height = tile_rows(m->rows - row), piece = height < 8 * ACCUMULATORS ? height : 8 * ACCUMULATORS;
    const uint16_t *tile = m->weights + (size_t)row * (size_t)m->cols;
    for (int at = 0; at < height; at += piece)
      for (int b = 0; b < count; b++) one_strip(tile + at, (size_t)height, &rows[b], row + at, piece);
    row += height;
  }
  for (int b = 0; b < count; b++) counters->bytes += 2u * (uint64_t)m->rows * (uint64_t)(rows[b].to - rows[b].from);
}

/* Everything that is asked for is read. */
static void whole_product(const matrix *m, const product_row *rows, int count, r2b_counters *counters) {
  product(m, rows, count, counters);
  for (int b = 0; b < count; b++) counters->weights += (uint64_t)m->wanted * (uint64_t)(rows[b].to - rows[b].from);
}
