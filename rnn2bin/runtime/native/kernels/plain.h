/* Lists without branches, in plain C: what an instruction set has that finds no better way. */

/* The values of n that are not zero, with their places, `offset` added -> how many. */
static inline int list_plain(const float *values, int n, int offset, int32_t *index, float *value) {
  int found = 0;
  for (int j = 0; j < n; j++) {
    index[found] = offset + j;
    value[found] = values[j];
    found += values[j] != 0.0f;
  }
  return found;
}

/* The numbers of set bits, `first` added; up to a GROUP of places are written. */
static inline void put_units_plain(int32_t *to, int first, unsigned bits) {
  int count = 0;
  for (int j = 0; j < GROUP; j++) {
    to[count & (GROUP - 1)] = first + j;
    count += bits >> j & 1;
  }
}

/* 1[x + y > 0] of a GROUP. */
static inline unsigned positive_plain(const float *x, const float *y) {
  unsigned bits = 0;
  for (int j = 0; j < GROUP; j++) bits |= (unsigned)(x[j] + y[j] > 0.0f) << j;
  return bits;
}

/* to (n) = table[index]. */
static inline void pick_plain(const float *table, const int32_t *index, int n, float *to) {
  for (int j = 0; j < n; j++) to[j] = table[index[j]];
}
