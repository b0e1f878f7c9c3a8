/* Products with fp16 weights: of each row one float32 accumulator, over ascending columns. So a column of zero can be left out, an input's
 * share added in advance, and rows be taken in any company: no bit changes. */

/* `nv` times eight rows of a tile whose columns are `stride` apart. */
INLINE void strip(const uint16_t *tile, size_t stride, const product_row *row, int at, const int nv) {
  V sum[ACCUMULATORS];
  const int32_t *index = row->active->index;
  const float *value = row->active->value;
  for (int v = 0; v < nv; v++) sum[v] = v_load(row->init + at + 8 * v);
  for (int k = row->from; k < row->to; k++) {
    const uint16_t *column = tile + (size_t)index[k] * stride, *next = tile + (size_t)index[k + AHEAD] * stride;
    V x = v_all(value[k]);
    for (int v = 0; v < nv; v += 4) __builtin_prefetch(next + 8 * v);
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

/* Tiles outside, sequences inside: a tile is fetched once for all of them. */
static void product(const matrix *m, const product_row *rows, int count, r2b_counters *counters) {
  for (int row = 0; row < m->rows;) {
    int height = tile_rows(m->rows - row, TALL), piece = height < 8 * ACCUMULATORS ? height : 8 * ACCUMULATORS;
    const uint16_t *tile = m->weights + (size_t)row * (size_t)m->cols;
    for (int at = 0; at < height; at += piece)
      for (int b = 0; b < count; b++) one_strip(tile + at, (size_t)height, &rows[b], row + at, piece);
    row += height;
  }
  for (int b = 0; b < count; b++) {
    counters->weights += (uint64_t)m->wanted * (uint64_t)(rows[b].to - rows[b].from);
    counters->bytes += 2u * (uint64_t)m->rows * (uint64_t)(rows[b].to - rows[b].from);
  }
}

/* `count` groups of eight rows at once. */
INLINE void group_strip(const matrix *m, const int32_t *groups, const product_row *row, const int count) {
  V sum[8];
  const uint16_t *weights[8];
  for (int g = 0; g < count; g++) {
    sum[g] = v_load(row->init + GROUP * groups[g]);
    weights[g] = m->weights + (size_t)groups[g] * (size_t)m->cols * GROUP;
  }
  for (int k = row->from; k < row->to; k++) {
    V x = v_all(row->active->value[k]);
    size_t at = (size_t)row->active->index[k] * GROUP;
    for (int g = 0; g < count; g++) sum[g] = v_fma(v_half(weights[g] + at), x, sum[g]);
  }
  for (int g = 0; g < count; g++) v_store(row->out + GROUP * groups[g], sum[g]);
}

/* The rows of some groups of a matrix in groups; `units`: how many rows in them are wanted. */
static void group_product(const matrix *m, const int32_t *groups, int count, int units, const product_row *row, r2b_counters *counters) {
  int g = 0;
#if !defined(R2B_NARROW)
  for (; count - g >= 8; g += 8) group_strip(m, groups + g, row, 8);
  for (; count - g >= 4; g += 4) group_strip(m, groups + g, row, 4);
#endif
  for (; count - g >= 2; g += 2) group_strip(m, groups + g, row, 2);
  if (g < count) group_strip(m, groups + g, row, 1);
  counters->weights += (uint64_t)units * (uint64_t)(row->to - row->from);
  counters->bytes += 2u * GROUP * (uint64_t)count * (uint64_t)(row->to - row->from);
}

/* The input's share of all candidate rows. */
static void candidate_inputs(const cell *cell, const product_row *row, scratch *work) {
  int count = cell->candidate_rows / GROUP;
  for (int g = 0; g < count; g++) work->groups[g] = g;
  group_product(&cell->candidate, work->groups, count, cell->layer->hidden, row, work->counters);
}
