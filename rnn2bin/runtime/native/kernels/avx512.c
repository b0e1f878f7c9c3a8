#define NAME(x) r2b_avx512_##x
#define ISA "avx512"
#define VECTORS "vec_avx512.h"
#include "body.h"
