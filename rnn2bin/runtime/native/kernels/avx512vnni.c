#define NAME(x) r2b_avx512vnni_##x
#define ISA "avx512vnni"
#define VECTORS "vec_avx512.h"
#define R2B_VNNI
#include "body.h"
