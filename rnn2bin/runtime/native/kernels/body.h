/* All of one instruction set: vectors, then what is made of them. NAME is the only thing that differs. */
#include <math.h>
#include <string.h>

#include "../kernels.h"

#define INLINE static inline __attribute__((always_inline))

#include "plain.h"
#include VECTORS

#include "list.h"
#include "elementwise.h"
#include "product.h"
#include "gate.h"
#include "candidate.h"
#include "blocks.h"
#if defined(SCREEN)
#include "screen.h"
#endif
#include "lstm.h"
#include "lstm_kinds.h"
#include "gru.h"
#include "rnn.h"
#include "memory.h"
#include "highway.h"
#include "feedback.h"

static uint64_t read_all(const uint64_t *memory, uint64_t words) {
  uint64_t sum[32] = {0}, all = 0;
  for (uint64_t k = 0; k + 32 <= words; k += 32)
    for (int j = 0; j < 32; j++) sum[j] += memory[k + (uint64_t)j];
  for (int j = 0; j < 32; j++) all += sum[j];
  return all;
}

const kernels NAME(kernels) = {
    .name = ISA,
    .list = list,
    .product = whole_product,
    .step = {lstm, gru, lstm_kinds, rnn, memory, highway, feedback},
    .activate = activate,
    .read = read_all,
#if defined(SCREEN)
    .screens = SCREENED,
#endif
};
