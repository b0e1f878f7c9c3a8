/* Rows of candidates that open gates ask for, over active columns. Where a weight lies among 32 in a cache line, a choice of rows and of
 * columns at once saves less than the better of both: so there are two layouts, and the smaller share decides. */

enum { ROWS_AT_ONCE = LANES / 2, VECTORS_A_STRIP = STRIP / LANES };

INLINE const uint8_t *row_of(const row_matrix *m, int row, const int size) {
  return (const uint8_t *)m->weights + (size_t)size * (size_t)row * (size_t)m->stride;
}

/* `count` rows over all columns: sixteen sums a row, over ascending columns, added up in one order. A column of zero changes no bit. With
 * `ahead`, lines of the next rows are fetched while these are added. */
INLINE void row_strip(const row_matrix *m, const int32_t *wanted, const float *dense, const float *init, float *out, const int count,
                      const int size, bool ahead) {
  V sum[ROWS_AT_ONCE][VECTORS_A_STRIP];
  const uint8_t *row[ROWS_AT_ONCE];
  for (int r = 0; r < count; r++) {
    row[r] = row_of(m, wanted[r], size);
    for (int v = 0; v < VECTORS_A_STRIP; v++) sum[r][v] = v_all(0.0f);
  }
  for (int j = 0; j < m->stride; j += STRIP) {
    for (int r = 0; ahead && size * j % 64 == 0 && r < count; r++) __builtin_prefetch(row_of(m, wanted[r + count], size) + size * j);
    for (int v = 0; v < VECTORS_A_STRIP; v++) {
      V x = v_load(dense + j + LANES * v);
      for (int r = 0; r < count; r++) sum[r][v] = v_fma(v_weights(row[r] + size * (j + LANES * v), size), x, sum[r][v]);
    }
  }
  for (int r = 0; r < count; r++) {
    float x[STRIP];
    for (int v = 0; v < VECTORS_A_STRIP; v++) v_store(x + LANES * v, sum[r][v]);
    for (int half = STRIP / 2; half; half /= 2)
      for (int k = 0; k < half; k++) x[k] += x[k + half];
    out[wanted[r]] = init[wanted[r]] + (size == 1 ? m->grid.scale[wanted[r]] : 1.0f) * x[0];
  }
}

INLINE void row_strips(const row_matrix *m, int count, const product_row *row, const scratch *work, const int size) {
  int r = 0;
  for (; count - r >= ROWS_AT_ONCE; r += ROWS_AT_ONCE) {
    bool ahead = count - r >= 2 * ROWS_AT_ONCE;
    row_strip(m, work->wanted + r, work->dense, row->init, row->out, ROWS_AT_ONCE, size, ahead);
  }
  for (; r < count; r++) row_strip(m, work->wanted + r, work->dense, row->init, row->out, 1, size, false);
}

static void by_row(const row_matrix *m, int count, const product_row *row, scratch *work) {
  memset(work->dense, 0, (size_t)m->stride * sizeof(float));
  for (int k = row->from; k < row->to; k++) work->dense[row->active->index[k]] = row->active->value[k];
  if (m->grid.scale)
    row_strips(m, count, row, work, 1);
  else
    row_strips(m, count, row, work, 2);
  work->counters->bytes += (uint64_t)weight_size(&m->grid) * (uint64_t)m->stride * (uint64_t)count;
}

/* out = init + W * active in the rows of the open units, of `hidden`; in others it may be anything finite. */
static void chosen_product(const matrix *all, const row_matrix *rows, int hidden, const uint16_t *open, const product_row *row, scratch *work) {
  int active = row->to - row->from;
  int units = open_units(open, padded(hidden, GROUP) / GROUP, work->wanted);
  work->counters->weights += (uint64_t)units * (uint64_t)active;
  if ((int64_t)units * rows->stride <= (int64_t)active * hidden)
    by_row(rows, units, row, work);
  else
    product(all, row, 1, work->counters);
}

static void candidate_product(const cell *cell, const uint16_t *open, const product_row *row, scratch *work) {
  chosen_product(&cell->candidate, &cell->candidate_by_row, cell->layer->hidden, open, row, work);
}
