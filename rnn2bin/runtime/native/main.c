/* Example: runs one sequence through a packed directory.
 *
 *     ./rnn2bin-run DIRECTORY [FILE]
 *
 * FILE (or standard input) holds numbers in text: a token a step, or I floats a step. Each output is written as one line; an
 * encoder–decoder writes the tokens it generates. RNN2BIN_COMPUTE=fp16|int8 says how gates are read (rnn2bin.h). Of a graph one layer runs, the
 * one that RNN2BIN_LAYER=0.. says: what stands around the layers is not run here. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rnn2bin.h"

static int complain(const char *what) {
  fprintf(stderr, "rnn2bin-run: %s\n", what);
  return 1;
}

typedef struct {
  void *values; /* int64_t tokens, or floats */
  int64_t count;
} numbers;

/* All numbers of a stream. */
static int read_all(FILE *from, int tokens, numbers *found) {
  size_t room = 1024, size = tokens ? sizeof(int64_t) : sizeof(float);
  *found = (numbers){.values = malloc(room * size)};
  for (; found->values; found->count++) {
    if ((size_t)found->count == room) {
      void *grown = realloc(found->values, (room *= 2) * size);
      if (!grown) break;
      found->values = grown;
    }
    long long token;
    int read = tokens ? fscanf(from, "%lld", &token) : fscanf(from, "%f", (float *)found->values + found->count);
    if (read == EOF) return 0;
    if (read != 1) return complain("the input is not numbers");
    if (tokens) ((int64_t *)found->values)[found->count] = token;
  }
  return complain("out of memory");
}

static void write_line(const float *y, int64_t count) {
  for (int64_t j = 0; j < count; j++) printf(j ? " %.9g" : "%.9g", (double)y[j]);
  putchar('\n');
}

static int write_tokens(r2b_state *state, const r2b_info *info) {
  int64_t steps, *tokens = malloc((size_t)info->max_length * sizeof *tokens);
  if (!tokens || r2b_generate(state, tokens, &steps)) return free(tokens), complain(tokens ? r2b_last_error() : "out of memory");
  for (int64_t k = 0; k < steps; k++) printf(k ? " %lld" : "%lld", (long long)tokens[k]);
  putchar('\n');
  free(tokens);
  return 0;
}

/* What runs: the network, or a layer of a graph, -1 for none. */
static int describe(const r2b_model *model, r2b_info *info, int64_t *layer) {
  const char *wanted = getenv("RNN2BIN_LAYER");
  char *end;
  *layer = -1;
  r2b_describe(model, info);
  if (!info->graph) return 0;
  if (!wanted)
    return complain("the network is a graph: only Python runs what stands around its layers; RNN2BIN_LAYER=0 (1, …) runs a layer alone, on what it reads");
  *layer = strtoll(wanted, &end, 10);
  return *wanted && !*end && !r2b_describe_layer(model, *layer, info) ? 0 : complain("RNN2BIN_LAYER: there is no such layer");
}

static int run(const r2b_model *model, const r2b_info *info, int64_t layer, const numbers *x, int64_t steps) {
  int64_t lines = info->per_sequence ? 1 : steps;
  r2b_state *state = layer < 0 ? r2b_new_state(model, 1, steps) : r2b_new_layer_state(model, layer, 1, steps);
  float *y = malloc((size_t)(lines * info->output_size) * sizeof *y);
  int failed = !state || !y || r2b_run(state, x->values, steps, NULL, y);
  if (failed)
    complain(y ? r2b_last_error() : "out of memory");
  else if (info->decoder)
    failed = write_tokens(state, info);
  else
    for (int64_t t = 0; t < lines; t++) write_line(y + t * info->output_size, info->output_size);
  free(y);
  r2b_free_state(state);
  return failed;
}

int main(int count, char **words) {
  const char *compute = getenv("RNN2BIN_COMPUTE");
  if (count < 2 || count > 3) return complain("usage: rnn2bin-run DIRECTORY [FILE]");
  r2b_model *model = r2b_open(words[1], !compute ? R2B_AUTO : strcmp(compute, "int8") ? R2B_FP16 : R2B_INT8);
  if (!model) return complain(r2b_last_error());
  r2b_info info;
  int64_t layer;
  if (describe(model, &info, &layer)) return r2b_close(model), 1;
  FILE *from = count == 3 ? fopen(words[2], "r") : stdin;
  numbers x = {0};
  int failed = from ? read_all(from, info.tokens, &x) : complain("the input file cannot be read");
  int64_t width = info.tokens ? 1 : info.input_size;
  if (!failed && (x.count == 0 || x.count % width)) failed = complain("the input is not a whole number of steps");
  if (!failed) failed = run(model, &info, layer, &x, x.count / width);
  if (from && from != stdin) fclose(from);
  free(x.values);
  r2b_close(model);
  return failed;
}
