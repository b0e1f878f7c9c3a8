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
static inline V v_add(V a, V b) { return (V){vaddq_f32(a.a, b.a), vaddq_f32(a.b, b.b)}; }
static inline V v_div(V a, V b) { return (V){vdivq_f32(a.a, b.a), vdivq_f32(a.b, b.b)}; }
static inline V v_min(V bound, V x) { return (V){vminq_f32(bound.a, x.a), vminq_f32(bound.b, x.b)}; }
static inline V v_max(V bound, V x) { return (V){vmaxq_f32(bound.a, x.a), vmaxq_f32(bound.b, x.b)}; }

typedef struct {
  uint32x4_t a, b;
} M;
static inline M v_positive(V x) { return (M){vcgtq_f32(x.a, vdupq_n_f32(0.0f)), vcgtq_f32(x.b, vdupq_n_f32(0.0f))}; }
static inline bool v_any(M m) { return vmaxvq_u32(vorrq_u32(m.a, m.b)) != 0; }
static inline bool v_every(M m) { return vminvq_u32(vandq_u32(m.a, m.b)) != 0; }
static inline V v_choose(M m, V yes, V no) { return (V){vbslq_f32(m.a, yes.a, no.a), vbslq_f32(m.b, yes.b, no.b)}; }
static inline V v_keep(M m, V x) { return v_choose(m, x, v_all(0.0f)); }

#define PICK(table, size, index, n, to) ((void)(size), pick_plain(table, index, n, to))
#define LIST_ALL(values, n, offset, index, value) list_plain(values, n, offset, index, value)
#define PUT_UNITS(to, first, bits) put_units_plain(to, first, bits)
#define POSITIVE(x, y) positive_plain(x, y)
