#define NAME(x) r2b_avx2_##x
#define ISA "avx2"
#define VECTORS "vec_avx2.h"
#define SCREEN "screen_madd.h"
#define SCREENED SCREENS_GRIDS
#include "body.h"
