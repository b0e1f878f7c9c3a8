/* Screening with products of words, two columns at a time (AVX2): weights that are on a grid, where they lie for the float product too, so
 * that there is one layout for both; values in one word each. Sums fit 32 bits up to MOST_ADDED columns (model.c). */

typedef struct {
  V error, two, one;
} norms;

/* Below so many columns lists and bounds take longer than products save; a copy is one more threshold for each row. */
static int fewest_columns(int copies) { return 32 + 6 * copies; }

static float total(V x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

INLINE V v_size(V x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

/* Lanes of eight that lie below `count`. */
INLINE __m256i first_of(int count) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }

/* Eight values in units of a step, at most LARGEST of them; their norms are added. What is no number becomes LARGEST, whatever its error: units
 * stay such that what is kept of them can be taken back. */
INLINE __m256i round_values(norms *sums, V x, float step) {
  V most = v_all(LARGEST), least = v_all(-LARGEST);
  __m256i units = _mm256_cvtps_epi32(v_max(least, _mm256_min_ps(v_mul(x, v_all(1.0f / step)), most)));
  V left = _mm256_fnmadd_ps(v_all(step), _mm256_cvtepi32_ps(units), x);
  sums->error = v_fma(left, left, sums->error);
  sums->two = v_fma(x, x, sums->two);
  sums->one = v_add(sums->one, v_size(x));
  return units;
}

static void put_norms(quantized *q, const norms *sums) {
  q->error = sqrtf(total(sums->error));
  q->two = sqrtf(total(sums->two));
  q->one = total(sums->one);
}

INLINE void put_words(int16_t *to, __m256i units) {
  _mm_storeu_si128((__m128i *)(void *)to, _mm_packs_epi32(_mm256_castsi256_si128(units), _mm256_extracti128_si256(units, 1)));
}

/* `count` columns stand in the list, a zero behind an odd one, and what is fetched in advance. */
static void end_list(const screen_row *to, quantized *q, int count) {
  q->count = padded(count, 2);
  if (q->count > count) to->word[count] = 0, to->index[count] = 0;
  for (int k = 0; k < AHEAD; k++) to->index[q->count + k] = k < q->count ? to->index[k] : 0;
}

/* The active columns as they are. */
static quantized quantize_active(const screen_row *to, const columns *active, int from) {
  int count = active->total - from;
  const float *value = active->value + from;
  const int32_t *index = active->index + from;
  quantized q = {.terms = count};
  norms sums = {v_all(0.0f), v_all(0.0f), v_all(0.0f)};
  V largest = v_all(0.0f);
  for (int k = 0; k < count; k += LANES) largest = _mm256_max_ps(largest, v_size(_mm256_maskload_ps(value + k, first_of(count - k))));
  float most = 0.0f, lane[LANES];
  v_store(lane, largest);
  for (int k = 0; k < LANES; k++) most = lane[k] > most ? lane[k] : most;
  q.step = most > 1e-30f ? most / LARGEST : 1.0f; /* tiny values round to zero: all of them is error */
  for (int k = 0; k < count; k += LANES) {
    put_words(to->word + k, round_values(&sums, _mm256_maskload_ps(value + k, first_of(count - k)), q.step));
    _mm256_storeu_si256((__m256i *)(void *)(to->index + k), _mm256_maskload_epi32(index + k, first_of(count - k)));
  }
  put_norms(&q, &sums);
  end_list(to, &q, count);
  return q;
}

/* What changed since the step before: values are in [-1, 1], what is beyond is error. */
static quantized quantize_changed(const screen_row *to, const float *dense, int cols, int terms) {
  quantized q = {.terms = terms, .step = 1.0f / LARGEST};
  norms sums = {v_all(0.0f), v_all(0.0f), v_all(0.0f)};
  int count = 0;
  for (int j = 0; j < cols; j += LANES) {
    __m256i *before = (__m256i *)(void *)(to->before + j);
    __m256i units = round_values(&sums, _mm256_maskload_ps(dense + j, first_of(cols - j)), q.step);
    __m256i changed = _mm256_sub_epi32(units, _mm256_loadu_si256(before));
    unsigned same = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(changed, _mm256_setzero_si256())));
    __m256i at = places_of(~same & 0xffu);
    _mm256_storeu_si256(before, units);
    put_words(to->word + count, _mm256_permutevar8x32_epi32(changed, at));
    _mm256_storeu_si256((__m256i *)(void *)(to->index + count), _mm256_add_epi32(at, _mm256_set1_epi32(j)));
    count += __builtin_popcount(~same & 0xffu);
  }
  put_norms(&q, &sums);
  end_list(to, &q, count);
  return q;
}

/* `rows` rows of a tile over the listed columns from `k` to `end`, two at a time: sixteen rows of both are a register of two words each,
 * [0..3, 8..11] and [4..7, 12..15], whose sums are two vectors of `sums`. What these rows will be of the columns to come is fetched. */
INLINE void add_words(const int8_t *tile, size_t stride, const screen_row *row, int k, int end, const int rows, int32_t *sums) {
  __m256i sum[SHORT / 8];
  for (int v = 0; v < rows / 8; v++) sum[v] = _mm256_load_si256((const __m256i *)(const void *)(sums + 8 * v));
  for (; k < end; k += 2) {
    int32_t words;
    memcpy(&words, row->word + k, sizeof words);
    __m256i x = _mm256_set1_epi32(words);
    const int8_t *column[2];
    for (int c = 0; c < 2; c++) {
      column[c] = tile + (size_t)row->index[k + c] * stride;
      __builtin_prefetch((const void *)((uintptr_t)tile + (size_t)row->index[k + c + AHEAD] * stride));
    }
    for (int v = 0; v < rows / 16; v++) {
      __m256i first = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(column[0] + 16 * v)));
      __m256i second = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(column[1] + 16 * v)));
      sum[2 * v] = _mm256_add_epi32(sum[2 * v], _mm256_madd_epi16(_mm256_unpacklo_epi16(first, second), x));
      sum[2 * v + 1] = _mm256_add_epi32(sum[2 * v + 1], _mm256_madd_epi16(_mm256_unpackhi_epi16(first, second), x));
    }
  }
  for (int v = 0; v < rows / 8; v++) _mm256_store_si256((__m256i *)(void *)(sums + 8 * v), sum[v]);
}

/* A tile over all listed columns, AHEAD of them at a time: lines that are a tile's height apart would drive each other out of the first cache
 * before it is their rows' turn. */
static void add_tile(const int8_t *tile, int height, const screen_row *row, int count, int32_t *sums) {
  for (int k = 0; k < count; k += AHEAD) {
    int end = count - k < AHEAD ? count : k + AHEAD;
    if (height == LINE) add_words(tile, LINE, row, k, end, LINE, sums);
    for (int r = 0; r + SHORT <= height; r += SHORT) add_words(tile + r, (size_t)height, row, k, end, SHORT, sums + r);
  }
}

/* Sums of sixteen rows from `row` on -> estimates of their products. */
INLINE void estimate(const float *scale, const float *base, float unit, const int32_t *sums, int row, float *product) {
  __m256i low = _mm256_load_si256((const __m256i *)(const void *)(sums + row)), high = _mm256_load_si256((const __m256i *)(const void *)(sums + row + 8));
  V sum[2] = {_mm256_cvtepi32_ps(_mm256_permute2x128_si256(low, high, 0x20)), _mm256_cvtepi32_ps(_mm256_permute2x128_si256(low, high, 0x31))};
  for (int v = 0; v < 2; v++) {
    int at = row + LANES * v;
    v_store(product + at, v_fma(sum[v], v_mul(v_load(scale + at), v_all(unit)), v_load(base + at)));
  }
}

/* Estimates of all rows -> bytes read. Where sums are kept, `row->sums` go on. */
static uint64_t integer_product(const cell *cell, const screen_row *row, const quantized *q, const float *base, float *product) {
  const matrix *m = &cell->gates;
  if (!cell->screen.keeps) memset(row->sums, 0, (size_t)m->rows * sizeof *row->sums);
  for (int at = 0; at < m->rows;) {
    int height = tile_rows(m->rows - at);
    add_tile((const int8_t *)m->weights + (size_t)at * (size_t)m->cols, height, row, q->count, row->sums + at);
    at += height;
  }
  for (int r = 0; r < m->rows; r += 16) estimate(m->grid.scale, base, q->step, row->sums, r, product);
  return (uint64_t)m->rows * (uint64_t)q->count;
}

/* How far eight rows' estimates may be from the float product. */
INLINE V margin_of(const screen *s, const bounds *with, const float *base, int r) {
  V margin = v_mul(v_all(with->kappa), v_size(v_load(base + r)));
  margin = v_fma(v_all(with->n), v_load(s->norm + r), margin);
  return v_fma(v_all(with->a), v_load(with->coarse + r), margin);
}

/* Bits of a GROUP of rows from `r` on of which a threshold lies within the margin of the estimate. NaN is doubtful. */
INLINE unsigned doubts(const screen *s, const bounds *with, const float *bias, int copies, int hidden, int r, const float *base, const float *product) {
  V low = v_load(product + r), high = v_load(product + r + LANES), near_low = v_all(INFINITY), near_high = near_low;
  for (const float *end = bias + (size_t)copies * (size_t)hidden; bias < end; bias += hidden) {
    near_low = v_min(near_low, v_size(v_add(low, v_load(bias))));
    near_high = v_min(near_high, v_size(v_add(high, v_load(bias + LANES))));
  }
  unsigned sure = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(near_low, margin_of(s, with, base, r), _CMP_GT_OQ));
  return ~(sure | (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(near_high, margin_of(s, with, base, r + LANES), _CMP_GT_OQ)) << LANES) & 0xffffu;
}
