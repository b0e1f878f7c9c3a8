/* Reads a safetensors file: an 8-byte length, a JSON header, the data. Mapped read-only; every field is checked before it is used. */
#ifndef RNN2BIN_SAFETENSORS_H
#define RNN2BIN_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

enum { MOST_DIMENSIONS = 8 }; /* of weights around the layers; those read here have one or two */

typedef struct {
  const char *name; /* not terminated */
  size_t name_length;
  int dimensions;
  int64_t shape[MOST_DIMENSIONS];
  size_t begin, end; /* bytes within the data */
  int used;
} tensor;

typedef struct {
  void *map;
  size_t size;
  const uint8_t *data;
  tensor *tensors; /* by where they begin */
  size_t count;
} tensor_file;

/* 0, or -1 with the reason in r2b_last_error(). All tensors are fp16 ("F16"), finite, and cover the data without gap or overlap. */
int tensors_open(const char *path, tensor_file *file);
void tensors_close(tensor_file *file);
tensor *tensors_find(const tensor_file *file, const char *name);

#endif
