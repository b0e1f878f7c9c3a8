#define NAME(x) r2b_avx2_##x
#include "body.h"
