/* Chooses the instruction set when a model is opened. */
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"

extern const kernels r2b_scalar_kernels;
#if defined(__x86_64__)
extern const kernels r2b_avx2_kernels, r2b_avx512_kernels, r2b_avx512vnni_kernels, r2b_avx512wide_kernels;
#elif defined(__aarch64__)
extern const kernels r2b_neon_kernels;
#endif

enum { MOST_SETS = 5 };

#if defined(__x86_64__)
/* Not every compiler's __builtin_cpu_supports knows this one. */
static int has_f16c(void) {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

/* Whether vectors of 64 bytes are as quick as they look: not where they are done in halves (AMD before family 26). */
static int is_wide(void) {
  unsigned a, b, c, d;
  if (__builtin_cpu_is("intel")) return 1;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  return (a >> 8 & 15) + (a >> 20 & 255) >= 26;
}
#endif

/* What this processor has, slowest first. */
static int available(const kernels **sets) {
  int count = 0;
  sets[count++] = &r2b_scalar_kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    sets[count++] = &r2b_avx2_kernels;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      sets[count++] = &r2b_avx512_kernels;
      if (__builtin_cpu_supports("avx512vnni")) sets[count++] = &r2b_avx512vnni_kernels;
      if (__builtin_cpu_supports("avx512vnni") && is_wide()) sets[count++] = &r2b_avx512wide_kernels;
    }
  }
#elif defined(__aarch64__)
  sets[count++] = &r2b_neon_kernels;
#endif
  return count;
}

/* RNN2BIN_ISA names a set to use instead of the best; what the processor lacks is not used. */
const kernels *kernels_choose(void) {
  const kernels *sets[MOST_SETS];
  int count = available(sets);
  const char *wanted = getenv("RNN2BIN_ISA");
  for (int k = 0; wanted && k < count; k++)
    if (!strcmp(wanted, sets[k]->name)) return sets[k];
  return sets[count - 1];
}

const char *r2b_isa(void) { return kernels_choose()->name; }

uint64_t r2b_read(const void *memory, uint64_t bytes, uint64_t times) {
  const kernels *with = kernels_choose();
  uint64_t sum = 0;
  for (uint64_t k = 0; k < times; k++) sum += with->read(memory, bytes / 8);
  return sum;
}
