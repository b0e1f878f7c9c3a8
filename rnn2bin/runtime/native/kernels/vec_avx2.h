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

#define LIST_ALL(values, n, offset, index, value) list_avx2(values, n, offset, index, value)
#define PUT_UNITS(to, first, bits) put_units_avx2(to, first, bits)
#define POSITIVE(x, y) positive_avx2(x, y)
