/* Eight floats: Armv8-A. */
#include <arm_neon.h>

typedef struct {
  float32x4_t a, b;
} V;
enum { LANES = 8 };

static inline V v_load(const float *p) { return (V){vld1q_f32(p), vld1q_f32(p + 4)}; }
static inline void v_store(float *p, V x) {
  vst1q_f32(p, x.a);
  vst1q_f32(p + 4, x.b);
}
static inline V v_all(float x) { return (V){vdupq_n_f32(x), vdupq_n_f32(x)}; }
static inline V v_half(const uint16_t *p) {
  float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(p));
  return (V){vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
}
static inline V v_byte(const int8_t *p) {
  int16x8_t wide = vmovl_s8(vld1_s8(p));
  return (V){vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
}
static inline V v_mul(V a, V b) { return (V){vmulq_f32(a.a, b.a), vmulq_f32(a.b, b.b)}; }
static inline V v_fma(V a, V b, V c) { return (V){vfmaq_f32(c.a, a.a, b.a), vfmaq_f32(c.b, a.b, b.b)}; }

#define LIST_ALL(values, n, offset, index, value) list_plain(values, n, offset, index, value)
#define PUT_UNITS(to, first, bits) put_units_plain(to, first, bits)
#define POSITIVE(x, y) positive_plain(x, y)
