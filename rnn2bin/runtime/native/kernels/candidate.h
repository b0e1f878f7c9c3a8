/* Rows of candidates that open gates ask for, over active columns. Where a weight lies among 32 in a cache line, a choice of rows and of
 * columns at once saves less than the better of both: so there are two layouts, and the smaller share decides. */

enum { ROWS_AT_ONCE = LANES / 2, VECTORS_A_STRIP = STRIP / LANES };

/* `count` rows over all columns: sixteen sums a row, over ascending columns, added up in one order. A column of zero changes no bit. */
INLINE void row_strip(const row_matrix *m, const int32_t *wanted, const float *dense, const float *init, float *out, const int count) {
  V sum[ROWS_AT_ONCE][VECTORS_A_STRIP];
  const uint16_t *row[ROWS_AT_ONCE];
  for (int r = 0; r < count; r++) {
    row[r] = m->weights + (size_t)wanted[r] * (size_t)m->stride;
    for (int v = 0; v < VECTORS_A_STRIP; v++) sum[r][v] = v_all(0.0f);
  }
  for (int j = 0; j < m->stride; j += STRIP)
    for (int v = 0; v < VECTORS_A_STRIP; v++) {
      V x = v_load(dense + j + LANES * v);
      for (int r = 0; r < count; r++) sum[r][v] = v_fma(v_half(row[r] + j + LANES * v), x, sum[r][v]);
    }
  for (int r = 0; r < count; r++) {
    float x[STRIP];
    for (int v = 0; v < VECTORS_A_STRIP; v++) v_store(x + LANES * v, sum[r][v]);
    for (int half = STRIP / 2; half; half /= 2)
      for (int k = 0; k < half; k++) x[k] += x[k + half];
    out[wanted[r]] = init[wanted[r]] + x[0];
  }
}

static void by_row(const row_matrix *m, int count, const product_row *row, scratch *work) {
  int r = 0;
  memset(work->dense, 0, (size_t)m->stride * sizeof(float));
  for (int k = row->from; k < row->to; k++) work->dense[row->active->index[k]] = row->active->value[k];
  for (; count - r >= ROWS_AT_ONCE; r += ROWS_AT_ONCE) row_strip(m, work->wanted + r, work->dense, row->init, row->out, ROWS_AT_ONCE);
  for (; r < count; r++) row_strip(m, work->wanted + r, work->dense, row->init, row->out, 1);
  work->counters->bytes += 2u * (uint64_t)m->stride * (uint64_t)count;
}

/* out = init + W * active in the rows of the open units; in others it may be anything finite. */
static void candidate_product(const cell *cell, const uint16_t *open, const product_row *row, scratch *work) {
  int active = row->to - row->from, hidden = cell->layer->hidden;
  int units = open_units(open, groups_in(cell), work->wanted);
  work->counters->weights += (uint64_t)units * (uint64_t)active;
  if ((int64_t)units * cell->candidate_by_row.stride <= (int64_t)active * hidden)
    by_row(&cell->candidate_by_row, units, row, work);
  else
    product(&cell->candidate, row, 1, work->counters);
}
