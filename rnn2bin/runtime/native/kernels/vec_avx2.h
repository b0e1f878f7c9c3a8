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

#define LIST_ALL(values, n, offset, index, value) list_plain(values, n, offset, index, value)
#define PUT_UNITS(to, first, bits) put_units_plain(to, first, bits)
#define POSITIVE(x, y) positive_avx2(x, y)
