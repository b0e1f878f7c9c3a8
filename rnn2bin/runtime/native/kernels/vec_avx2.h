/* Eight floats: AVX2 with FMA and F16C. */
#include <immintrin.h>

typedef __m256 V;
enum { ACCUMULATORS = 8 };

static inline V v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, V x) { _mm256_storeu_ps(p, x); }
static inline V v_all(float x) { return _mm256_set1_ps(x); }
static inline V v_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)); }
static inline V v_fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }

#define LIST_ALL(values, n, offset, index, value) list_plain(values, n, offset, index, value)
