/* Rows of candidates that open gates ask for, over active columns. Where a weight lies among 32 in a cache line, a choice of rows and of
 * columns at once saves less than the better of both: so there are two layouts, and the smaller share decides. */

enum { ROWS_AT_ONCE = 4 };

/* `count` rows over all columns: two accumulators of eight a row, over ascending columns, added up in one order. A column of zero changes no
 * bit. */
INLINE void row_strip(const row_matrix *m, const int32_t *wanted, const float *dense, const float *init, float *out, const int count) {
  V sum[ROWS_AT_ONCE][2];
  const uint16_t *row[ROWS_AT_ONCE];
  for (int r = 0; r < count; r++) {
    row[r] = m->weights + (size_t)wanted[r] * (size_t)m->stride;
    sum[r][0] = sum[r][1] = v_all(0.0f);
  }
  for (int j = 0; j < m->stride; j += STRIP) {
    V low = v_load(dense + j), high = v_load(dense + j + 8);
    for (int r = 0; r < count; r++) {
      sum[r][0] = v_fma(v_half(row[r] + j), low, sum[r][0]);
      sum[r][1] = v_fma(v_half(row[r] + j + 8), high, sum[r][1]);
    }
  }
  for (int r = 0; r < count; r++) {
    float x[16];
    v_store(x, sum[r][0]);
    v_store(x + 8, sum[r][1]);
    for (int half = 8; half; half /= 2)
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
static void candidate_product(const cell *cell, const int32_t *open, const product_row *row, scratch *work) {
  int active = row->to - row->from, hidden = cell->layer->hidden;
  int units = open_units(open, hidden, work->wanted);
  work->counters->weights += (uint64_t)units * (uint64_t)active;
  if ((int64_t)units * cell->candidate_by_row.stride <= (int64_t)active * hidden)
    by_row(&cell->candidate_by_row, units, row, work);
  else
    product(&cell->candidate, row, 1, work->counters);
}
