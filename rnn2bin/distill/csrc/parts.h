/* What one instruction set's kernels offer to the dispatcher. */
#ifndef RNN2BIN_PARTS_H
#define RNN2BIN_PARTS_H

#include <stddef.h>

#include "window.h"

typedef struct {
  size_t (*packed_bytes)(int k, int n, int precision);
  void (*pack)(const float *source, size_t step_k, size_t step_n, int k, int n, int precision, void *packed);
  int (*forward)(const r2b_window *window, const void *packed, int first, int count);
  int (*backward)(const r2b_window *window, const void *packed, int first, int count, float *sums);
  int (*product)(const r2b_product *product, int first, int count);
  int (*noise)(uint64_t seed, float share, float *noise, int gates, int width, int first, int count);
  int (*count)(const r2b_count *count, int first, int rows);
  int (*count_back)(const r2b_count *count, int first, int units);
  int bfloat16, block; /* whether bfloat16 products are there; rows of a block */
} isa_kernels;

#endif
