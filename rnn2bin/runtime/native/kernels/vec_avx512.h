/* AVX-512. Eight floats at a time where the processor converts fp16 faster so (Zen 4: 39 against 28 Gweights/s from L1), sixteen where its
 * paths are that wide (R2B_SIXTEEN; Zen 5: 50 against 34). */
#include <immintrin.h>

#if defined(R2B_SIXTEEN)
typedef __m512 V;
enum { LANES = 16 };

static inline V v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, V x) { _mm512_storeu_ps(p, x); }
static inline V v_all(float x) { return _mm512_set1_ps(x); }
static inline V v_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p)); }
static inline V v_byte(const int8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p))); }
static inline V v_mul(V a, V b) { return _mm512_mul_ps(a, b); }
static inline V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V v_add(V a, V b) { return _mm512_add_ps(a, b); }
static inline V v_div(V a, V b) { return _mm512_div_ps(a, b); }
static inline V v_min(V bound, V x) { return _mm512_min_ps(bound, x); }
static inline V v_max(V bound, V x) { return _mm512_max_ps(bound, x); }

typedef __mmask16 M;
static inline M v_positive(V x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ); }
static inline bool v_any(M m) { return (_cvtmask16_u32(m) & 0xffffu) != 0; }
static inline bool v_every(M m) { return (_cvtmask16_u32(m) & 0xffffu) == 0xffffu; }
static inline V v_keep(M m, V x) { return _mm512_maskz_mov_ps(m, x); }
static inline V v_choose(M m, V yes, V no) { return _mm512_mask_blend_ps(m, no, yes); }
#else
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

typedef __mmask8 M;
static inline M v_positive(V x) { return _mm256_cmp_ps_mask(x, _mm256_setzero_ps(), _CMP_GT_OQ); }
static inline bool v_any(M m) { return (_cvtmask8_u32(m) & 0xffu) != 0; }
static inline bool v_every(M m) { return (_cvtmask8_u32(m) & 0xffu) == 0xffu; }
static inline V v_keep(M m, V x) { return _mm256_maskz_mov_ps(m, x); }
static inline V v_choose(M m, V yes, V no) { return _mm256_mask_blend_ps(m, no, yes); }
#endif

/* Compressed in registers and stored whole: a compressing store is microcode on Zen 4. */
static inline int list_wide(const float *values, int n, int offset, int32_t *index, float *value) {
  int found = 0;
  __m512i at = _mm512_add_epi32(_mm512_set1_epi32(offset), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int j = 0; j < n; j += 16) {
    __mmask16 inside = n - j >= 16 ? 0xffff : (__mmask16)((1u << (n - j)) - 1);
    __m512 x = _mm512_maskz_loadu_ps(inside, values + j);
    __mmask16 active = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    _mm512_storeu_ps(value + found, _mm512_maskz_compress_ps(active, x));
    _mm512_storeu_si512(index + found, _mm512_maskz_compress_epi32(active, at));
    /* The mask to its 16 bits again: gcc 12 under -fsanitize=thread spills two bytes of it and counts four. */
    found += __builtin_popcount(_cvtmask16_u32(active) & 0xffffu);
    at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
  }
  return found;
}

static inline void put_units_wide(int32_t *to, int first, unsigned bits) {
  __m512i at = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(_cvtu32_mask16(bits), at));
}

static inline unsigned positive_wide(const float *x, const float *y) {
  __m512 sum = _mm512_add_ps(_mm512_loadu_ps(x), _mm512_loadu_ps(y));
  return _cvtmask16_u32(_mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_GT_OQ)) & 0xffffu;
}

#define PICK(table, size, index, n, to) ((void)(size), pick_plain(table, index, n, to))
#define LIST_ALL(values, n, offset, index, value) list_wide(values, n, offset, index, value)
#define PUT_UNITS(to, first, bits) put_units_wide(to, first, bits)
#define POSITIVE(x, y) positive_wide(x, y)
