#define NAME(x) r2b_avx512vnni_##x
#define ISA "avx512vnni"
#define VECTORS "vec_avx512.h"
#define SCREEN "screen_dot.h"
#define SCREENED SCREENS_ALL
#include "body.h"
