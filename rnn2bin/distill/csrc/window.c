/* Chooses the instruction set once, splits rows over threads, adds up what the threads found. */

#include "window.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "parts.h"

extern const isa_kernels r2b_generic_kernels;
#if defined(__x86_64__)
extern const isa_kernels r2b_avx2_kernels, r2b_avx512_kernels, r2b_avx512bf16_kernels;
#endif

typedef struct {
  const char *name;
  const isa_kernels *kernels;
} choice;

static choice best(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return (choice){"avx512bf16", &r2b_avx512bf16_kernels};
  if (avx512) return (choice){"avx512", &r2b_avx512_kernels};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return (choice){"avx2", &r2b_avx2_kernels};
#endif
  return (choice){"generic", &r2b_generic_kernels};
}

/* RNN2BIN_ISA names an instruction set to use instead of the best one; what the processor lacks is not used. */
static choice chosen(void) {
  const char *wanted = getenv("RNN2BIN_ISA");
  choice found = best();
  if (!wanted) return found;
  if (!strcmp(wanted, "generic")) return (choice){"generic", &r2b_generic_kernels};
#if defined(__x86_64__)
  int rank = !strcmp(found.name, "avx512bf16") ? 3 : !strcmp(found.name, "avx512") ? 2 : !strcmp(found.name, "avx2") ? 1 : 0;
  if (!strcmp(wanted, "avx2") && rank >= 1) return (choice){"avx2", &r2b_avx2_kernels};
  if (!strcmp(wanted, "avx512") && rank >= 2) return (choice){"avx512", &r2b_avx512_kernels};
#endif
  return found;
}

int r2b_has_bfloat16(void) { return chosen().kernels->bfloat16; }
const char *r2b_isa(void) { return chosen().name; }

typedef struct {
  const isa_kernels *kernels;
  const r2b_window *window;
  const void *packed;
  const r2b_product *product;
  const r2b_count *units;
  const float *x; /* rows to add, and to where */
  const int64_t *index;
  float *sums;  /* of a backward pass, or the table that rows are added to */
  float *noise; /* and how it is drawn */
  uint64_t seed;
  float share;
  int rows, gates, width, first, count, failed;
} job;

static void *run_forward(void *given) {
  job *j = given;
  j->failed = j->kernels->forward(j->window, j->packed, j->first, j->count);
  return NULL;
}
static void *run_backward(void *given) {
  job *j = given;
  j->failed = j->kernels->backward(j->window, j->packed, j->first, j->count, j->sums);
  return NULL;
}
static void *run_product(void *given) {
  job *j = given;
  j->failed = j->kernels->product(j->product, j->first, j->count);
  return NULL;
}
static void *run_noise(void *given) {
  job *j = given;
  j->failed = j->kernels->noise(j->seed, j->share, j->noise, j->gates, j->width, j->first, j->count);
  return NULL;
}

static void *run_count(void *given) {
  job *j = given;
  j->failed = (j->units->grad ? j->kernels->count_back : j->kernels->count)(j->units, j->first, j->count);
  return NULL;
}

enum { MOST_THREADS = 64 };

/* `rows` in shares of whole blocks; returns how many shares there are. */
static int shares(int rows, int threads, int block, int *first, int *count) {
  int blocks = (rows + block - 1) / block, used = 0, at = 0;
  if (threads > MOST_THREADS) threads = MOST_THREADS;
  if (threads > blocks) threads = blocks;
  if (threads < 1) threads = 1;
  for (int k = 0; k < threads; k++) {
    int end = (int)((long)blocks * (k + 1) / threads) * block;
    if (end > rows) end = rows;
    if (end == at) continue;
    first[used] = at;
    count[used++] = end - at;
    at = end;
  }
  return used;
}

/* The first job runs here, the others in threads of their own; one that cannot be started runs here too. */
static int run_all(void *(*run)(void *), job *jobs, int n) {
  pthread_t threads[MOST_THREADS];
  int started[MOST_THREADS] = {0}, failed = 0;
  for (int k = 1; k < n; k++) started[k] = pthread_create(&threads[k], NULL, run, &jobs[k]) == 0;
  run(&jobs[0]);
  for (int k = 1; k < n; k++) {
    if (started[k])
      pthread_join(threads[k], NULL);
    else
      run(&jobs[k]);
  }
  for (int k = 0; k < n; k++) failed |= jobs[k].failed;
  return failed ? -1 : 0;
}

static int gates_of(const r2b_window *w) { return w->cell == R2B_GRU ? 2 : 3; }
static int product_width(const r2b_window *w) { return gates_of(w) * w->rows + w->hidden; }

int r2b_forward(const r2b_window *w) {
  const isa_kernels *kernels = chosen().kernels;
  int wide = product_width(w), first[MOST_THREADS], count[MOST_THREADS];
  void *packed = malloc(kernels->packed_bytes(w->hidden, wide, w->precision));
  if (!packed) return -1;
  kernels->pack(w->weight, 1, (size_t)w->hidden, w->hidden, wide, w->precision, packed);
  int n = shares(w->batch, w->threads, kernels->block, first, count);
  job jobs[MOST_THREADS];
  for (int k = 0; k < n; k++)
    jobs[k] = (job){.kernels = kernels, .window = w, .packed = packed, .first = first[k], .count = count[k]};
  int failed = run_all(run_forward, jobs, n);
  free(packed);
  return failed;
}

static void add_to(float *sum, const float *x, size_t n) {
  for (size_t j = 0; sum && j < n; j++) sum[j] += x[j];
}

int r2b_backward(const r2b_window *w) {
  const isa_kernels *kernels = chosen().kernels;
  int gates = gates_of(w), wide = product_width(w), first[MOST_THREADS], count[MOST_THREADS];
  size_t hidden = (size_t)w->hidden, units = (size_t)gates * hidden, third = units * (size_t)w->copies, all = 3 * third + 2 * hidden + units;
  int n = shares(w->batch, w->threads, kernels->block, first, count);
  void *packed = malloc(kernels->packed_bytes(wide, w->hidden, w->precision));
  float *sums = calloc(all * (size_t)n, 4);
  if (!packed || !sums) {
    free(packed), free(sums);
    return -1;
  }
  kernels->pack(w->weight, hidden, 1, wide, w->hidden, w->precision, packed);
  job jobs[MOST_THREADS];
  for (int k = 0; k < n; k++)
    jobs[k] = (job){.kernels = kernels, .window = w, .packed = packed, .first = first[k], .count = count[k], .sums = sums + all * (size_t)k};
  int failed = run_all(run_backward, jobs, n);
  for (int k = 0; k < n; k++) {
    const float *found = sums + all * (size_t)k;
    add_to(w->grad_gates_bias, found, third);
    add_to(w->grad_lo, found + third, third);
    add_to(w->grad_hi, found + 2 * third, third);
    add_to(w->grad_bias, found + 3 * third, hidden);
    add_to(w->grad_bias_hh, found + 3 * third + hidden, hidden);
    add_to(w->grad_row_scale, found + 3 * third + 2 * hidden, units);
  }
  free(packed), free(sums);
  return failed;
}

int r2b_multiply(const r2b_product *p) {
  const isa_kernels *kernels = chosen().kernels;
  int first[MOST_THREADS], count[MOST_THREADS], n = shares(p->m, p->threads, kernels->block, first, count);
  job jobs[MOST_THREADS];
  for (int k = 0; k < n; k++) jobs[k] = (job){.kernels = kernels, .product = p, .first = first[k], .count = count[k]};
  return run_all(run_product, jobs, n);
}

/* Each thread has its own columns, so every sum has one order. */
static void *run_rows(void *given) {
  job *j = given;
  size_t width = (size_t)j->width;
  for (size_t n = 0; n < (size_t)j->rows; n++) {
    const float *restrict from = j->x + n * width + j->first;
    float *restrict to = j->sums + (size_t)j->index[n] * width + j->first;
    for (int k = 0; k < j->count; k++) to[k] += from[k];
  }
  return NULL;
}

int r2b_add_rows(const float *rows, const int64_t *index, float *table, int32_t count, int32_t width, int32_t threads) {
  int at[MOST_THREADS], wide[MOST_THREADS], n = shares(width, threads, 64, at, wide);
  job jobs[MOST_THREADS];
  for (int k = 0; k < n; k++)
    jobs[k] = (job){.x = rows, .index = index, .sums = table, .rows = count, .width = width, .first = at[k], .count = wide[k]};
  return run_all(run_rows, jobs, n);
}

int r2b_noise(uint64_t seed, float share, float *noise, int32_t rows, int32_t gates, int32_t width, int32_t threads) {
  const isa_kernels *kernels = chosen().kernels;
  int first[MOST_THREADS], count[MOST_THREADS], n = shares(rows, threads, kernels->block, first, count);
  job jobs[MOST_THREADS];
  for (int k = 0; k < n; k++)
    jobs[k] = (job){.kernels = kernels, .noise = noise, .seed = seed, .share = share, .gates = gates, .width = width, .first = first[k], .count = count[k]};
  return run_all(run_noise, jobs, n);
}

int r2b_count_units(const r2b_count *units) {
  int first[MOST_THREADS], count[MOST_THREADS], n = shares(units->grad ? units->hidden : units->rows, units->threads, 64, first, count);
  job jobs[MOST_THREADS];
  for (int k = 0; k < n; k++) jobs[k] = (job){.kernels = chosen().kernels, .units = units, .first = first[k], .count = count[k]};
  return run_all(run_count, jobs, n);
}
