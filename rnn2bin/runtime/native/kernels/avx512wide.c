#define NAME(x) r2b_avx512wide_##x
#define ISA "avx512wide"
#define VECTORS "vec_avx512.h"
#define SCREEN "screen_dot.h"
#define SCREENED SCREENS_ALL
#define R2B_SIXTEEN
#include "body.h"
