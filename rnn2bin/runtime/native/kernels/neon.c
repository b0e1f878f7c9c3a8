#define NAME(x) r2b_neon_##x
#define ISA "neon"
#define VECTORS "vec_neon.h"
#include "body.h"
