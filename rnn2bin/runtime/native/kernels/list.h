/* Lists of active columns: which values are not zero, without branches. */

static inline int list_plain(const float *values, int n, int offset, int32_t *index, float *value) {
  int found = 0;
  for (int j = 0; j < n; j++) {
    index[found] = offset + j;
    value[found] = values[j];
    found += values[j] != 0.0f;
  }
  return found;
}

static int list(const float *values, int n, int offset, int32_t *index, float *value) { return LIST_ALL(values, n, offset, index, value); }
