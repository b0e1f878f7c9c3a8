#include "json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_DEPTH = 32, MOST_NAMES = 4096 }; /* names of an object are compared with each other */

typedef struct {
  const char *at, *begin, *end;
  json *nodes;
  size_t used, capacity;
  json_document *document;
} reader;

static bool wrong(reader *r, const char *what) {
  if (!r->document->error[0])
    snprintf(r->document->error, sizeof r->document->error, "%s at byte %zu", what, (size_t)(r->at - r->begin));
  return false;
}

static void skip_space(reader *r) {
  while (r->at < r->end && (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r')) r->at++;
}

static bool take(reader *r, char wanted) {
  if (r->at == r->end || *r->at != wanted) return false;
  r->at++;
  return true;
}

static json *new_node(reader *r, json_kind kind) {
  if (r->used == r->capacity) return wrong(r, "too many values"), NULL;
  json *node = &r->nodes[r->used++];
  *node = (json){.kind = kind, .text = r->at};
  return node;
}

static bool is_digit(const reader *r) { return r->at < r->end && *r->at >= '0' && *r->at <= '9'; }

static bool digits(reader *r) {
  if (!is_digit(r)) return wrong(r, "a digit is missing");
  while (is_digit(r)) r->at++;
  return true;
}

static json *read_number(reader *r) {
  json *node = new_node(r, JSON_NUMBER);
  if (!node) return NULL;
  take(r, '-');
  if (!take(r, '0') && !digits(r)) return NULL;
  if (take(r, '.') && !digits(r)) return NULL;
  if (take(r, 'e') || take(r, 'E')) {
    if (!take(r, '+')) take(r, '-');
    if (!digits(r)) return NULL;
  }
  node->length = (size_t)(r->at - node->text);
  return node;
}

static bool is_hex(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }

static bool read_escape(reader *r) {
  if (r->at == r->end) return wrong(r, "the text ends in an escape");
  char c = *r->at++;
  if (c != 'u') return memchr("\"\\/bfnrt", c, 8) ? true : wrong(r, "an unknown escape");
  for (int k = 0; k < 4; k++, r->at++)
    if (r->at == r->end || !is_hex(*r->at)) return wrong(r, "a bad \\u escape");
  return true;
}

static json *read_string(reader *r) {
  r->at++; /* the opening quote */
  json *node = new_node(r, JSON_STRING);
  if (!node) return NULL;
  for (;;) {
    if (r->at == r->end) return wrong(r, "the text ends in a string"), NULL;
    char c = *r->at;
    if ((unsigned char)c < 0x20) return wrong(r, "a control character in a string"), NULL;
    r->at++;
    if (c == '"') break;
    if (c == '\\' && !read_escape(r)) return NULL;
  }
  node->length = (size_t)(r->at - 1 - node->text);
  return node;
}

static json *read_word(reader *r, const char *word, json_kind kind) {
  size_t length = strlen(word);
  if ((size_t)(r->end - r->at) < length || memcmp(r->at, word, length)) return wrong(r, "not JSON"), NULL;
  json *node = new_node(r, kind);
  if (node) r->at += length;
  return node;
}

static json *read_value(reader *r, int depth);

static bool same_text(const json *a, const json *b) { return a->length == b->length && !memcmp(a->text, b->text, a->length); }

/* A member's name and colon; names are compared as they are written. */
static json *read_key(reader *r, const json *object) {
  skip_space(r);
  if (r->at == r->end || *r->at != '"') return wrong(r, "a name is missing"), NULL;
  if (object->count == MOST_NAMES) return wrong(r, "an object with too many names"), NULL;
  json *key = read_string(r);
  if (!key) return NULL;
  for (const json *one = object->child; one; one = one->next)
    if (same_text(one->key, key)) return wrong(r, "a name stands twice"), NULL;
  skip_space(r);
  return take(r, ':') ? key : (wrong(r, "a colon is missing"), NULL);
}

static json *read_children(reader *r, json_kind kind, int depth) {
  char close = kind == JSON_OBJECT ? '}' : ']';
  json *node = new_node(r, kind), *last = NULL;
  if (!node) return NULL;
  if (depth == MOST_DEPTH) return wrong(r, "nested too deeply"), NULL;
  r->at++;
  skip_space(r);
  if (take(r, close)) return node;
  do {
    json *key = kind == JSON_OBJECT ? read_key(r, node) : NULL;
    if (kind == JSON_OBJECT && !key) return NULL;
    json *child = read_value(r, depth + 1);
    if (!child) return NULL;
    child->key = key;
    if (last)
      last->next = child;
    else
      node->child = child;
    last = child;
    node->count++;
    skip_space(r);
  } while (take(r, ','));
  return take(r, close) ? node : (wrong(r, "a comma or a closing bracket is missing"), NULL);
}

static json *read_value(reader *r, int depth) {
  skip_space(r);
  if (r->at == r->end) return wrong(r, "the text ends early"), NULL;
  switch (*r->at) {
    case '{': return read_children(r, JSON_OBJECT, depth);
    case '[': return read_children(r, JSON_ARRAY, depth);
    case '"': return read_string(r);
    case 't': return read_word(r, "true", JSON_TRUE);
    case 'f': return read_word(r, "false", JSON_FALSE);
    case 'n': return read_word(r, "null", JSON_NULL);
    case 'N': return read_word(r, "NaN", JSON_NOT_FINITE);
    case 'I': return read_word(r, "Infinity", JSON_NOT_FINITE);
    default:
      if (r->end - r->at < 2 || memcmp(r->at, "-I", 2)) return read_number(r);
      r->at++;
      return read_word(r, "Infinity", JSON_NOT_FINITE);
  }
}

/* An upper bound of the values in a text: each but the first follows one of these. */
static size_t most_values(const char *text, size_t length) {
  size_t count = 1;
  for (size_t k = 0; k < length; k++) count += text[k] == '{' || text[k] == '[' || text[k] == ',' || text[k] == ':';
  return count;
}

int json_parse(const char *text, size_t length, json_document *document) {
  *document = (json_document){0};
  reader r = {.at = text, .begin = text, .end = text + length, .capacity = most_values(text, length), .document = document};
  r.nodes = document->nodes = malloc(r.capacity * sizeof(json));
  if (!r.nodes) return wrong(&r, "out of memory"), -1;
  document->root = read_value(&r, 0);
  skip_space(&r);
  if (document->root && r.at != r.end) wrong(&r, "something follows the value");
  if (!document->error[0]) return 0;
  json_free(document);
  return -1;
}

void json_free(json_document *document) {
  free(document->nodes);
  document->nodes = document->root = NULL;
}

const json *json_get(const json *object, const char *name) {
  if (!object || object->kind != JSON_OBJECT) return NULL;
  size_t length = strlen(name);
  for (const json *one = object->child; one; one = one->next)
    if (one->key->length == length && !memcmp(one->key->text, name, length)) return one;
  return NULL;
}

bool json_is(const json *string, const char *value) {
  return string && string->kind == JSON_STRING && string->length == strlen(value) && !memcmp(string->text, value, string->length);
}

bool json_integer(const json *number, int64_t *value) {
  if (!number || number->kind != JSON_NUMBER) return false;
  bool negative = number->text[0] == '-';
  int64_t found = 0;
  for (size_t k = negative; k < number->length; k++) {
    int digit = number->text[k] - '0';
    if (digit < 0 || digit > 9 || found > (INT64_MAX - digit) / 10) return false;
    found = 10 * found + digit;
  }
  *value = negative ? -found : found;
  return true;
}

/* By hand: strtod reads another decimal point where a program has set its locale. */
bool json_real(const json *number, double *value) {
  if (!number || number->kind != JSON_NUMBER) return false;
  const char *at = number->text, *end = at + number->length;
  bool negative = at < end && *at == '-', fraction = false;
  double digits = 0.0;
  long scale = 0, exponent = 0;
  for (at += negative; at < end && *at != 'e' && *at != 'E'; at++) {
    if (*at == '.') {
      fraction = true;
      continue;
    }
    digits = 10.0 * digits + (*at - '0');
    scale -= fraction;
  }
  if (at < end) {
    bool down = *++at == '-';
    for (at += down || *at == '+'; at < end && exponent < 10000; at++) exponent = 10 * exponent + (*at - '0');
    scale += down ? -exponent : exponent;
  }
  double power = pow(10.0, (double)(scale < 0 ? -scale : scale));
  *value = digits == 0.0 ? 0.0 : scale < 0 ? digits / power : digits * power;
  if (negative) *value = -*value;
  return true;
}
