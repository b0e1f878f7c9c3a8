/* Weights of `size` bytes: fp16, or whole numbers. */
INLINE V v_weights(const uint8_t *p, const int size) {
  return size == 2 ? v_half((const uint16_t *)(const void *)p) : v_byte((const int8_t *)p);
}

/* By the instruction set's own way, or plain.h's. */
static int list(const float *values, int n, int offset, int32_t *index, float *value) { return LIST_ALL(values, n, offset, index, value); }
/* to (n) = table[index], of `size` values: as many as 32 of the table may be read, and beyond `n` whole vectors of the index read, of `to`
 * written. */
static inline void pick(const float *table, int size, const int32_t *index, int n, float *to) { PICK(table, size, index, n, to); }
static inline void put_units(int32_t *to, int first, unsigned bits) { PUT_UNITS(to, first, bits); }
static inline unsigned positive(const float *x, const float *y) { return POSITIVE(x, y); }
