/* All of one instruction set: vectors, then what is made of them. NAME is the only thing that differs. */
#include <math.h>
#include <string.h>

#include "../kernels.h"

#define INLINE static inline __attribute__((always_inline))

#include VECTORS

#include "list.h"
#include "elementwise.h"
#include "product.h"
#include "gate.h"
#include "candidate.h"
#if defined(R2B_VNNI)
#include "screen.h"
#endif
#include "lstm.h"
#include "gru.h"

const kernels NAME(kernels) = {
    .name = ISA,
    .list = list,
    .product = whole_product,
    .step = {lstm, gru, gru},
    .activate = activate,
#if defined(R2B_VNNI)
    .screens = 1,
#endif
};
