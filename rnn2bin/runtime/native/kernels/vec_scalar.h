/* Eight floats in plain C. */
typedef struct {
  float x[8];
} V;
enum { LANES = 8 };

static inline V v_load(const float *p) {
  V v;
  memcpy(v.x, p, sizeof v.x);
  return v;
}
static inline void v_store(float *p, V v) { memcpy(p, v.x, sizeof v.x); }
static inline V v_all(float x) {
  V v;
  for (int k = 0; k < 8; k++) v.x[k] = x;
  return v;
}
/* fp16's bits three places to the right of float's are the same number times 2^-112, subnormals included. */
static inline V v_half(const uint16_t *p) {
  V v;
  for (int k = 0; k < 8; k++) {
    uint32_t bits = (uint32_t)(p[k] & 0x7fff) << 13;
    float x;
    memcpy(&x, &bits, sizeof x);
    x *= 0x1p112f;
    memcpy(&bits, &x, sizeof x);
    bits |= (uint32_t)(p[k] & 0x8000) << 16;
    memcpy(&v.x[k], &bits, sizeof x);
  }
  return v;
}
static inline V v_byte(const int8_t *p) {
  V v;
  for (int k = 0; k < 8; k++) v.x[k] = (float)p[k];
  return v;
}
static inline V v_mul(V a, V b) {
  for (int k = 0; k < 8; k++) a.x[k] *= b.x[k];
  return a;
}
static inline V v_fma(V a, V b, V c) {
  for (int k = 0; k < 8; k++) c.x[k] += a.x[k] * b.x[k];
  return c;
}
static inline V v_add(V a, V b) {
  for (int k = 0; k < 8; k++) a.x[k] += b.x[k];
  return a;
}
static inline V v_div(V a, V b) {
  for (int k = 0; k < 8; k++) a.x[k] /= b.x[k];
  return a;
}
static inline V v_min(V bound, V x) {
  for (int k = 0; k < 8; k++) x.x[k] = bound.x[k] < x.x[k] ? bound.x[k] : x.x[k];
  return x;
}
static inline V v_max(V bound, V x) {
  for (int k = 0; k < 8; k++) x.x[k] = bound.x[k] > x.x[k] ? bound.x[k] : x.x[k];
  return x;
}

typedef unsigned M; /* a bit each */
static inline M v_positive(V x) {
  M bits = 0;
  for (int k = 0; k < 8; k++) bits |= (M)(x.x[k] > 0.0f) << k;
  return bits;
}
static inline bool v_any(M m) { return m != 0; }
static inline bool v_every(M m) { return m == 0xffu; }
static inline V v_choose(M m, V yes, V no) {
  for (int k = 0; k < 8; k++) no.x[k] = m >> k & 1 ? yes.x[k] : no.x[k];
  return no;
}
static inline V v_keep(M m, V x) { return v_choose(m, x, v_all(0.0f)); }

#define PICK(table, size, index, n, to) ((void)(size), pick_plain(table, index, n, to))
#define LIST_ALL(values, n, offset, index, value) list_plain(values, n, offset, index, value)
#define PUT_UNITS(to, first, bits) put_units_plain(to, first, bits)
#define POSITIVE(x, y) positive_plain(x, y)
