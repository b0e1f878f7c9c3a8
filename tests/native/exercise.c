/* Runs a packed directory in every way the interface offers, from several threads at once over one model, and checks that the ways agree.
 * Built plain, with sanitizers, and with malloc wrapped (-DCOUNT_ALLOCATIONS -Wl,--wrap=...): then no step may allocate. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rnn2bin.h"

enum { STEPS = 40, THREADS = 4, ROUNDS = 2 };

#if defined(COUNT_ALLOCATIONS)
static long allocations;
void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t m);
void *__real_realloc(void *p, size_t n);
void *__real_aligned_alloc(size_t a, size_t n);
void *__wrap_malloc(size_t n) { return allocations++, __real_malloc(n); }
void *__wrap_calloc(size_t n, size_t m) { return allocations++, __real_calloc(n, m); }
void *__wrap_realloc(void *p, size_t n) { return allocations++, __real_realloc(p, n); }
void *__wrap_aligned_alloc(size_t a, size_t n) { return allocations++, __real_aligned_alloc(a, n); }
#endif

static const r2b_model *model;
static r2b_info info;

static int64_t layer = -1; /* the layer of a graph that is run; -1: the whole network */

static r2b_state *new_state(int64_t batch, int64_t steps) {
  return layer < 0 ? r2b_new_state(model, batch, steps) : r2b_new_layer_state(model, layer, batch, steps);
}

static void *inputs(int64_t steps, int64_t batch, unsigned seed) {
  int64_t count = steps * batch * (info.tokens ? 1 : info.input_size);
  void *x = calloc((size_t)count, 8);
  for (int64_t k = 0; k < count; k++) {
    seed = seed * 1664525u + 1013904223u;
    if (info.tokens)
      ((int64_t *)x)[k] = (int64_t)((seed >> 8) % (unsigned)info.input_size);
    else
      ((float *)x)[k] = (float)(seed >> 8) / (1 << 23) - 1.0f;
  }
  return x;
}

static int differs(const char *what) {
  fprintf(stderr, "%s: %s\n", what, r2b_last_error());
  return 1;
}

/* A call on the whole against one step at a time: the last output must be the same to the bit. */
static int stream_against_call(unsigned seed) {
  int64_t width = info.tokens ? 8 : 4 * info.input_size, outputs = info.output_size, last = info.per_sequence ? 0 : STEPS - 1;
  char *x = inputs(STEPS, 1, seed);
  float *whole = calloc((size_t)(STEPS * outputs), 4), *step = calloc((size_t)outputs, 4);
  r2b_state *a = new_state(1, STEPS), *b = new_state(1, 1);
  int failed = r2b_run(a, x, STEPS, NULL, whole);
#if defined(COUNT_ALLOCATIONS)
  long before = allocations;
#endif
  for (int t = 0; t < STEPS && !failed; t++) failed = r2b_step(b, x + t * width, step);
#if defined(COUNT_ALLOCATIONS)
  if (allocations != before) failed = differs("a step allocated");
#endif
  if (!failed && memcmp(step, whole + last * outputs, (size_t)outputs * 4)) failed = differs("a stream and a call differ");
  r2b_free_state(a), r2b_free_state(b), free(x), free(whole), free(step);
  return failed;
}

/* A batch with lengths, states out and in again, a decoder where there is one. */
static int batch_and_states(unsigned seed) {
  enum { BATCH = 5 };
  int64_t lengths[BATCH] = {STEPS, 0, 1, STEPS / 2, STEPS - 1}, written;
  void *x = inputs(STEPS, BATCH, seed);
  float *y = calloc((size_t)(STEPS * BATCH * info.output_size), 4);
  int64_t *tokens = calloc((size_t)(info.max_length * BATCH + 1), 8);
  r2b_state *s = new_state(BATCH, STEPS);
  int failed = r2b_run(s, x, STEPS, lengths, y);
  for (int64_t k = layer < 0 ? 0 : layer; k < (layer < 0 ? info.layers : layer + 1) && !failed; k++)
    for (int64_t which = 0; which < 3; which++) {
      int64_t size = r2b_state_size(model, k, 0, which);
      float *values = calloc((size_t)(BATCH * size + 1), 4);
      if (size) failed |= r2b_get_state(s, k, 0, which, values) || r2b_set_state(s, k, 0, which, values);
      free(values);
    }
  if (!failed && info.decoder) failed = r2b_generate(s, tokens, &written) || written < 1 || written > info.max_length;
  lengths[0] = STEPS + 1;
  if (!failed && !r2b_run(s, x, STEPS, lengths, y)) failed = differs("a length beyond the end was taken");
  r2b_reset(s);
  r2b_free_state(s), free(x), free(y), free(tokens);
  return failed;
}

static void *thread(void *given) {
  unsigned seed = *(unsigned *)given;
  long failed = 0;
  for (int k = 0; k < ROUNDS && !failed; k++)
    failed = (info.streams && stream_against_call(seed + (unsigned)k)) || batch_and_states(seed);
  return (void *)failed;
}

/* From several threads at once. */
static int all_ways(void) {
  int failed = 0;
#if defined(COUNT_ALLOCATIONS)
  unsigned seed = 1;
  failed = thread(&seed) != NULL;
#else
  pthread_t threads[THREADS];
  unsigned seeds[THREADS];
  for (int k = 0; k < THREADS; k++) seeds[k] = (unsigned)k, pthread_create(&threads[k], NULL, thread, &seeds[k]);
  for (int k = 0; k < THREADS; k++) {
    void *result;
    pthread_join(threads[k], &result);
    failed |= result != NULL;
  }
#endif
  return failed;
}

int main(int count, char **words) {
  if (count < 2) return 2;
  r2b_model *opened = r2b_open(words[1], count < 3 || !strcmp(words[2], "auto") ? R2B_AUTO : strcmp(words[2], "int8") ? R2B_FP16 : R2B_INT8);
  if (!opened) return fprintf(stderr, "%s\n", r2b_last_error()), 3;
  model = opened;
  r2b_describe(model, &info);
  int failed = 0;
  if (!info.graph) failed = all_ways();
  for (int64_t k = 0, layers = info.layers; info.graph && k < layers; k++) {
    layer = k;
    r2b_info whole = info;
    failed |= r2b_describe_layer(model, k, &info) || all_ways();
    info = whole;
  }
  r2b_close(opened);
  return failed;
}
