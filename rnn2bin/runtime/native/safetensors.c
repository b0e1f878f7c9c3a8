#define _POSIX_C_SOURCE 200809L
#include "safetensors.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "json.h"

enum { MOST_HEADER = 1 << 20, PREFIX = 8 };

#define NAME_OF(t) (int)((t)->name_length < 80 ? (t)->name_length : 80), (t)->name

static int map_file(const char *path, tensor_file *file) {
  int descriptor = open(path, O_RDONLY | O_CLOEXEC);
  struct stat status;
  if (descriptor < 0 || fstat(descriptor, &status) || !S_ISREG(status.st_mode)) {
    if (descriptor >= 0) close(descriptor);
    return fail("%s: no such file", path);
  }
  file->size = (size_t)status.st_size;
  if (file->size > PREFIX) file->map = mmap(NULL, file->size, PROT_READ, MAP_PRIVATE, descriptor, 0);
  close(descriptor);
  if (file->size <= PREFIX) return fail("%s: %zu bytes are no safetensors file", path, file->size);
  if (file->map == MAP_FAILED) return file->map = NULL, fail("%s: cannot be mapped", path);
  return 0;
}

static uint64_t little_endian(const uint8_t *bytes) {
  uint64_t value = 0;
  for (int k = 7; k >= 0; k--) value = value << 8 | bytes[k];
  return value;
}

static int read_shape(const char *path, const json *shape, tensor *t, uint64_t *elements) {
  if (!shape || shape->kind != JSON_ARRAY || shape->count > MOST_DIMENSIONS)
    return fail("%s: %.*s: wanted a shape of at most %d sizes", path, NAME_OF(t), MOST_DIMENSIONS);
  *elements = 1;
  for (const json *size = shape->child; size; size = size->next) {
    int64_t value;
    if (!json_integer(size, &value) || value < 0 || value > INT32_MAX || (value && *elements > INT64_MAX / 2 / (uint64_t)value))
      return fail("%s: %.*s: a size is out of range", path, NAME_OF(t));
    t->shape[t->dimensions++] = value;
    *elements *= (uint64_t)value;
  }
  return 0;
}

static int read_tensor(const char *path, const json *entry, size_t available, tensor *t) {
  const json *offsets = json_get(entry, "data_offsets");
  int64_t begin, end;
  uint64_t elements = 0;
  t->name = entry->key->text;
  t->name_length = entry->key->length;
  if (!json_is(json_get(entry, "dtype"), "F16")) return fail("%s: %.*s: its dtype is not F16", path, NAME_OF(t));
  if (read_shape(path, json_get(entry, "shape"), t, &elements)) return -1;
  if (!offsets || offsets->kind != JSON_ARRAY || offsets->count != 2 || !json_integer(offsets->child, &begin) ||
      !json_integer(offsets->child->next, &end))
    return fail("%s: %.*s: wanted data_offsets [begin, end]", path, NAME_OF(t));
  if (begin < 0 || end < begin || (uint64_t)end > available)
    return fail("%s: %.*s: offsets %lld to %lld lie outside the file's %zu bytes of data; is it truncated?", path, NAME_OF(t),
                (long long)begin, (long long)end, available);
  if ((uint64_t)(end - begin) != 2 * elements) return fail("%s: %.*s: its offsets and its shape do not agree", path, NAME_OF(t));
  t->begin = (size_t)begin;
  t->end = (size_t)end;
  return 0;
}

static int by_begin(const void *a, const void *b) {
  const tensor *x = a, *y = b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  return x->end < y->end ? -1 : x->end > y->end;
}

static int check_cover(const char *path, const tensor_file *file, size_t available) {
  size_t at = 0;
  for (size_t k = 0; k < file->count; k++) {
    const tensor *t = &file->tensors[k];
    if (t->begin != at) return fail("%s: %.*s %s", path, NAME_OF(t), t->begin < at ? "overlaps another tensor" : "leaves a gap before it");
    at = t->end;
  }
  if (at != available) return fail("%s: %zu bytes of data belong to no tensor", path, available - at);
  return 0;
}

/* A skipped column is one that would have added weight * 0: no infinity may stand there. */
static int check_finite(const char *path, const tensor_file *file) {
  for (size_t k = 0; k < file->count; k++) {
    const tensor *t = &file->tensors[k];
    unsigned bad = 0;
    for (const uint8_t *byte = file->data + t->begin + 1; byte < file->data + t->end; byte += 2) bad |= (*byte & 0x7c) == 0x7c;
    if (bad) return fail("%s: %.*s is not finite", path, NAME_OF(t));
  }
  return 0;
}

static int read_header(const char *path, const json *root, size_t available, tensor_file *file) {
  if (root->kind != JSON_OBJECT) return fail("%s: its header is no object", path);
  file->tensors = calloc((size_t)root->count + 1, sizeof(tensor));
  if (!file->tensors) return fail("out of memory");
  for (const json *entry = root->child; entry; entry = entry->next) {
    if (json_is(entry->key, "__metadata__")) continue;
    if (read_tensor(path, entry, available, &file->tensors[file->count++])) return -1;
  }
  qsort(file->tensors, file->count, sizeof(tensor), by_begin);
  if (check_cover(path, file, available)) return -1;
  return check_finite(path, file);
}

int tensors_open(const char *path, tensor_file *file) {
  *file = (tensor_file){0};
  if (map_file(path, file)) return -1;
  const uint8_t *bytes = file->map;
  uint64_t header = little_endian(bytes);
  json_document document;
  if (header > MOST_HEADER || header > file->size - PREFIX) {
    tensors_close(file);
    return fail("%s: its header of %llu bytes is too long for the file; is it truncated?", path, (unsigned long long)header);
  }
  file->data = bytes + PREFIX + header;
  if (json_parse((const char *)bytes + PREFIX, (size_t)header, &document)) {
    tensors_close(file);
    return fail("%s: its header is not readable JSON: %s", path, document.error);
  }
  int failed = read_header(path, document.root, file->size - PREFIX - (size_t)header, file);
  json_free(&document); /* names point into the mapped file */
  if (failed) tensors_close(file);
  return failed;
}

void tensors_close(tensor_file *file) {
  if (file->map) munmap(file->map, file->size);
  free(file->tensors);
  *file = (tensor_file){0};
}

tensor *tensors_find(const tensor_file *file, const char *name) {
  size_t length = strlen(name);
  for (size_t k = 0; k < file->count; k++)
    if (file->tensors[k].name_length == length && !memcmp(file->tensors[k].name, name, length)) return &file->tensors[k];
  return NULL;
}
