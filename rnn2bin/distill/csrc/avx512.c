#define NAME(x) r2b_avx512_##x
#include "body.h"
