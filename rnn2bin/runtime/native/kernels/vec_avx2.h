/* Eight floats: AVX2 with FMA and F16C. */
#include <immintrin.h>

typedef __m256 V;
enum { LANES = 8 };

static inline V v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, V x) { _mm256_storeu_ps(p, x); }
static inline V v_all(float x) { return _mm256_set1_ps(x); }
static inline V v_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)); }
static inline V v_byte(const int8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p))); }
static inline V v_mul(V a, V b) { return _mm256_mul_ps(a, b); }
static inline V v_fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V v_add(V a, V b) { return _mm256_add_ps(a, b); }
static inline V v_div(V a, V b) { return _mm256_div_ps(a, b); }
static inline V v_min(V bound, V x) { return _mm256_min_ps(bound, x); }
static inline V v_max(V bound, V x) { return _mm256_max_ps(bound, x); }

typedef __m256 M;
static inline M v_positive(V x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ); }
static inline bool v_any(M m) { return _mm256_movemask_ps(m) != 0; }
static inline bool v_every(M m) { return _mm256_movemask_ps(m) == 0xff; }
static inline V v_keep(M m, V x) { return _mm256_and_ps(m, x); }
static inline V v_choose(M m, V yes, V no) { return _mm256_blendv_ps(no, yes, m); }

static inline unsigned positive_avx2(const float *x, const float *y) {
  __m256 low = _mm256_cmp_ps(_mm256_add_ps(v_load(x), v_load(y)), _mm256_setzero_ps(), _CMP_GT_OQ);
  __m256 high = _mm256_cmp_ps(_mm256_add_ps(v_load(x + 8), v_load(y + 8)), _mm256_setzero_ps(), _CMP_GT_OQ);
  return (unsigned)_mm256_movemask_ps(low) | (unsigned)_mm256_movemask_ps(high) << 8;
}

/* For eight bits, the places of those that are set, a byte each, in order. */
#define PLACE(m, j) ((uint64_t)((m) >> (j) & 1 ? (j) : 0) << (8 * __builtin_popcount((m) & ((1u << (j)) - 1))))
#define PLACES(m) (PLACE(m, 0) | PLACE(m, 1) | PLACE(m, 2) | PLACE(m, 3) | PLACE(m, 4) | PLACE(m, 5) | PLACE(m, 6) | PLACE(m, 7))
#define PLACES_4(m) PLACES(m), PLACES(m + 1u), PLACES(m + 2u), PLACES(m + 3u)
#define PLACES_16(m) PLACES_4(m), PLACES_4(m + 4u), PLACES_4(m + 8u), PLACES_4(m + 12u)
#define PLACES_64(m) PLACES_16(m), PLACES_16(m + 16u), PLACES_16(m + 32u), PLACES_16(m + 48u)
static const uint64_t places[256] = {PLACES_64(0u), PLACES_64(64u), PLACES_64(128u), PLACES_64(192u)};

static inline __m256i places_of(unsigned bits) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)&places[bits])); }

static inline int list_avx2(const float *values, int n, int offset, int32_t *index, float *value) {
  int found = 0, j = 0;
  for (; j + 8 <= n; j += 8) {
    V x = v_load(values + j);
    unsigned active = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ));
    __m256i at = places_of(active);
    v_store(value + found, _mm256_permutevar8x32_ps(x, at));
    _mm256_storeu_si256((__m256i *)(void *)(index + found), _mm256_add_epi32(at, _mm256_set1_epi32(offset + j)));
    found += __builtin_popcount(active);
  }
  return found + list_plain(values + j, n - j, offset + j, index + found, value + found);
}

static inline void put_units_avx2(int32_t *to, int first, unsigned bits) {
  unsigned low = bits & 0xffu, high = bits >> 8 & 0xffu;
  _mm256_storeu_si256((__m256i *)(void *)to, _mm256_add_epi32(places_of(low), _mm256_set1_epi32(first)));
  _mm256_storeu_si256((__m256i *)(void *)(to + __builtin_popcount(low)), _mm256_add_epi32(places_of(high), _mm256_set1_epi32(first + 8)));
}

/* Of a table that four registers hold: shuffles, where a gather is a load for each. */
static inline void pick_32(const float *table, const int32_t *index, int n, float *to) {
  V a = v_load(table), b = v_load(table + 8), c = v_load(table + 16), d = v_load(table + 24);
  for (int j = 0; j < n; j += 8) {
    __m256i at = _mm256_loadu_si256((const __m256i *)(const void *)(index + j));
    V eight = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)), sixteen = _mm256_castsi256_ps(_mm256_slli_epi32(at, 27));
    V low = _mm256_blendv_ps(_mm256_permutevar8x32_ps(a, at), _mm256_permutevar8x32_ps(b, at), eight);
    V high = _mm256_blendv_ps(_mm256_permutevar8x32_ps(c, at), _mm256_permutevar8x32_ps(d, at), eight);
    v_store(to + j, _mm256_blendv_ps(low, high, sixteen));
  }
}

#define PICK(table, size, index, n, to) ((size) <= 32 ? pick_32(table, index, n, to) : pick_plain(table, index, n, to))
#define LIST_ALL(values, n, offset, index, value) list_avx2(values, n, offset, index, value)
#define PUT_UNITS(to, first, bits) put_units_avx2(to, first, bits)
#define POSITIVE(x, y) positive_avx2(x, y)
