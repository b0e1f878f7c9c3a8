/* A strict reader of JSON (RFC 8259): no duplicate keys, no trailing anything, bounded depth. The text must outlive the tree. NaN and
 * Infinity are taken as Python writes them (a graph's constants), and are no numbers. */
#ifndef RNN2BIN_JSON_H
#define RNN2BIN_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_NOT_FINITE, JSON_STRING, JSON_ARRAY, JSON_OBJECT } json_kind;

typedef struct json {
  json_kind kind;
  const char *text; /* a string without its quotes, escapes as written; a number as written */
  size_t length;
  int64_t count;          /* children */
  const struct json *key; /* of a member: its name */
  struct json *child, *next;
} json;

typedef struct {
  json *nodes; /* one allocation; json_free releases it */
  json *root;
  char error[96];
} json_document;

/* 0, or -1 with `error` filled: what and at which byte. */
int json_parse(const char *text, size_t length, json_document *document);
void json_free(json_document *document);

const json *json_get(const json *object, const char *name); /* NULL: no such member, or no object */
bool json_is(const json *string, const char *value);        /* a string, and equal */
bool json_integer(const json *number, int64_t *value);      /* a whole number without exponent that fits */
bool json_real(const json *number, double *value);          /* any number; what is too large is infinite */

#endif
