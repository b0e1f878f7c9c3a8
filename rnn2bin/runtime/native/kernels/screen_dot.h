/* Screening with dot products of bytes (VNNI): planes of bytes in a layout of their own (model.c), values in two digits. */

enum { DIGIT = 128 };

/* Lists and bounds cost little beside what bytes save. */
static int fewest_columns(int copies) { return (void)copies, 0; }

/* What is summed up over the values, a lane for each of sixteen. */
typedef struct {
  __m512 error, two, one;
} norms;

/* Sixteen values in units of a step, at most LARGEST of them; their norms are added. */
INLINE __m512i round_values(norms *sums, __m512 x, float step) {
  __m512 most = _mm512_set1_ps(LARGEST), inside = _mm512_mul_ps(x, _mm512_set1_ps(1.0f / step));
  inside = _mm512_max_ps(_mm512_min_ps(inside, most), _mm512_sub_ps(_mm512_setzero_ps(), most));
  __m512i units = _mm512_cvtps_epi32(inside);
  __m512 left = _mm512_fnmadd_ps(_mm512_set1_ps(step), _mm512_cvtepi32_ps(units), x);
  sums->error = _mm512_fmadd_ps(left, left, sums->error);
  sums->two = _mm512_fmadd_ps(x, x, sums->two);
  sums->one = _mm512_add_ps(sums->one, _mm512_abs_ps(x));
  return units;
}

static void put_norms(quantized *q, const norms *sums) {
  q->error = sqrtf(_mm512_reduce_add_ps(sums->error));
  q->two = sqrtf(_mm512_reduce_add_ps(sums->two));
  q->one = _mm512_reduce_add_ps(sums->one);
}

/* Sixteen columns' digits to place `at`; their sums go on in `sum`. */
INLINE void put_digits(const screen_row *to, int at, __m512i units, __m512i sum[2]) {
  __m512i high = _mm512_srai_epi32(_mm512_add_epi32(units, _mm512_set1_epi32(DIGIT / 2)), 7);
  __m512i low = _mm512_sub_epi32(units, _mm512_slli_epi32(high, 7));
  _mm_storeu_si128((__m128i *)(void *)(to->high + at), _mm512_cvtepi32_epi8(high));
  _mm_storeu_si128((__m128i *)(void *)(to->low + at), _mm512_cvtepi32_epi8(low));
  sum[0] = _mm512_add_epi32(sum[0], high), sum[1] = _mm512_add_epi32(sum[1], low);
}

/* `count` columns stand in the list, zeros behind them: whole fours, and what is fetched in advance. */
static void end_list(const screen_row *to, quantized *q, int count, const __m512i sum[2]) {
  q->count = padded(count, 4);
  for (int k = count; k < q->count; k++) to->high[k] = to->low[k] = 0, to->index[k] = 0;
  for (int k = 0; k < AHEAD; k++) to->index[q->count + k] = k < q->count ? to->index[k] : 0;
  q->sum[0] = _mm512_reduce_add_epi32(sum[0]), q->sum[1] = _mm512_reduce_add_epi32(sum[1]);
}

INLINE __mmask16 first_of(int count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }

/* The active columns as they are. */
static quantized quantize_active(const screen_row *to, const columns *active, int from) {
  int count = active->total - from;
  const float *value = active->value + from;
  const int32_t *index = active->index + from;
  quantized q = {.terms = count};
  norms sums = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  __m512 largest = _mm512_setzero_ps();
  for (int k = 0; k < count; k += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_maskz_loadu_ps(first_of(count - k), value + k)));
  float most = _mm512_reduce_max_ps(largest);
  q.step = most > 1e-30f ? most / LARGEST : 1.0f; /* tiny values round to zero: all of them is error */
  for (int k = 0; k < count; k += 16) {
    put_digits(to, k, round_values(&sums, _mm512_maskz_loadu_ps(first_of(count - k), value + k), q.step), sum);
    _mm512_storeu_si512(to->index + k, _mm512_maskz_loadu_epi32(first_of(count - k), index + k));
  }
  put_norms(&q, &sums);
  end_list(to, &q, count, sum);
  return q;
}

/* What changed since the step before: values are in [-1, 1], what is beyond is error. `dense` is readable to whole sixteens. */
static quantized quantize_changed(const screen_row *to, const float *dense, int cols, int terms) {
  quantized q = {.terms = terms, .step = 1.0f / LARGEST};
  norms sums = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, column = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int count = 0;
  for (int j = 0; j < cols; j += 16) {
    __m512i units = round_values(&sums, _mm512_maskz_loadu_ps(first_of(cols - j), dense + j), q.step);
    __m512i changed = _mm512_sub_epi32(units, _mm512_loadu_si512(to->before + j));
    __mmask16 active = _mm512_test_epi32_mask(changed, changed);
    _mm512_storeu_si512(to->before + j, units);
    put_digits(to, count, _mm512_maskz_compress_epi32(active, changed), sum);
    _mm512_storeu_si512(to->index + count, _mm512_maskz_compress_epi32(active, _mm512_add_epi32(column, _mm512_set1_epi32(j))));
    count += __builtin_popcount(_cvtmask16_u32(active) & 0xffffu);
  }
  put_norms(&q, &sums);
  end_list(to, &q, count, sum);
  return q;
}

/* Four active columns of a block of 64 rows -> four vectors of four columns' bytes a row, in the order of rows (model.c lays them out so). */
INLINE void interleave(const uint8_t *const column[4], int at, __m512i out[4]) {
  __m512i a = _mm512_loadu_si512(column[0] + at), b = _mm512_loadu_si512(column[1] + at), c = _mm512_loadu_si512(column[2] + at),
          d = _mm512_loadu_si512(column[3] + at);
  __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d), AB = _mm512_unpackhi_epi8(a, b), CD = _mm512_unpackhi_epi8(c, d);
  out[0] = _mm512_unpacklo_epi16(ab, cd);
  out[1] = _mm512_unpackhi_epi16(ab, cd);
  out[2] = _mm512_unpacklo_epi16(AB, CD);
  out[3] = _mm512_unpackhi_epi16(AB, CD);
}

typedef __m512i block_sums[2][4]; /* [2 digits][4 vectors of 16 rows] */

/* 128 bytes of the listed columns times their digits -> sums of two blocks. `ahead` lines of the columns to come are fetched. */
INLINE void add_digits(const uint8_t *tile, size_t stride, const screen_row *row, int count, const int ahead, block_sums sum[2]) {
  __m512i bytes[4];
  for (int k = 0; k < count; k += 4) {
    const uint8_t *column[4];
    int32_t digits[2];
    memcpy(digits, row->high + k, sizeof *digits);
    memcpy(digits + 1, row->low + k, sizeof *digits);
    __m512i high = _mm512_set1_epi32(digits[0]), low = _mm512_set1_epi32(digits[1]);
    for (int c = 0; c < 4; c++) {
      uintptr_t next = (uintptr_t)tile + (size_t)row->index[k + c + AHEAD] * stride;
      for (int line = 0; line < ahead; line++) __builtin_prefetch((const void *)(next + 64 * (size_t)line));
      column[c] = tile + (size_t)row->index[k + c] * stride;
    }
    for (int b = 0; b < 2; b++) {
      interleave(column, 64 * b, bytes);
      for (int v = 0; v < 4; v++) {
        sum[b][0][v] = _mm512_dpbusd_epi32(sum[b][0][v], bytes[v], high);
        sum[b][1][v] = _mm512_dpbusd_epi32(sum[b][1][v], bytes[v], low);
      }
    }
  }
}

INLINE __m512 both_digits(block_sums sum, int v) {
  return _mm512_fmadd_ps(_mm512_set1_ps(128.0f), _mm512_cvtepi32_ps(sum[0][v]), _mm512_cvtepi32_ps(sum[1][v]));
}

/* Integer sums of a block of rows in the high plane, and in the low one where there is one -> estimates of their products. */
INLINE void estimate(const screen *s, int row, block_sums high, block_sums low, const float *base, float unit, float *product) {
  for (int v = 0; v < 4; v++) {
    int at = row + 16 * v;
    __m512 sum = _mm512_mul_ps(_mm512_set1_ps(256.0f), both_digits(high, v));
    if (low) sum = _mm512_add_ps(sum, both_digits(low, v));
    __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(s->scale + at), _mm512_set1_ps(unit));
    _mm512_storeu_ps(product + at, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(base + at)));
  }
}

/* Estimates of all rows -> bytes read. Where sums are kept, `row->sums` [tiles][2 blocks][2 digits][64] go on. */
static uint64_t integer_product(const cell *cell, const screen_row *row, const quantized *q, const float *base, float *product) {
  const screen *s = &cell->screen;
  const byte_matrix *m = &s->bytes;
  float unit = q->step;
  for (int t = 0; t < m->tiles; t++) {
    __m512i *sums = (__m512i *)(void *)(row->sums + (size_t)t * 256);
    block_sums sum[2];
    const uint8_t *tile = m->bytes + byte_tile(m, t);
    size_t stride = byte_stride(m, t);
    for (int v = 0; v < 16; v++) sum[v / 8][v / 4 % 2][v % 4] = s->keeps ? _mm512_loadu_si512(sums + v) : _mm512_setzero_si512();
    if (t % BYTE_TILES)
      add_digits(tile, stride, row, q->count, 0, sum);
    else if (stride == 128 * BYTE_TILES)
      add_digits(tile, stride, row, q->count, 2 * BYTE_TILES, sum);
    else
      add_digits(tile, stride, row, q->count, 2, sum);
    for (int v = 0; v < 16; v++) /* bytes are stored with 128 added */
      sum[v / 8][v / 4 % 2][v % 4] = _mm512_sub_epi32(sum[v / 8][v / 4 % 2][v % 4], _mm512_set1_epi32(128 * q->sum[v / 4 % 2]));
    for (int v = 0; s->keeps && v < 16; v++) _mm512_storeu_si512(sums + v, sum[v / 8][v / 4 % 2][v % 4]);
    if (s->planes == 2) {
      estimate(s, 64 * t, sum[0], sum[1], base, unit, product);
    } else {
      estimate(s, 128 * t, sum[0], NULL, base, unit, product);
      estimate(s, 128 * t + 64, sum[1], NULL, base, unit, product);
    }
  }
  return 128u * (uint64_t)m->tiles * (uint64_t)q->count;
}

/* Bits of 16 rows from `r` on of which a threshold lies within the margin of the estimate. NaN is doubtful. */
INLINE unsigned doubts(const screen *s, const bounds *with, const float *bias, int copies, int hidden, int r, const float *base, const float *product) {
  __m512 sign = _mm512_set1_ps(-0.0f), x = _mm512_loadu_ps(product + r);
  __m512 margin = _mm512_mul_ps(_mm512_set1_ps(with->kappa), _mm512_andnot_ps(sign, _mm512_loadu_ps(base + r)));
  margin = _mm512_fmadd_ps(_mm512_set1_ps(with->n), _mm512_loadu_ps(s->norm + r), margin);
  margin = _mm512_fmadd_ps(_mm512_set1_ps(with->a), _mm512_loadu_ps(with->coarse + r), margin);
  __mmask16 sure = 0xffff;
  for (int k = 0; k < copies; k++) {
    __m512 distance = _mm512_andnot_ps(sign, _mm512_add_ps(x, _mm512_loadu_ps(bias + (size_t)k * (size_t)hidden)));
    sure = _mm512_mask_cmp_ps_mask(sure, distance, margin, _CMP_GT_OQ);
  }
  return ~_cvtmask16_u32(sure) & 0xffffu;
}

