#define NAME(x) r2b_avx512wide_##x
#define ISA "avx512wide"
#define VECTORS "vec_avx512.h"
#define R2B_VNNI
#define R2B_SIXTEEN
#include "body.h"
