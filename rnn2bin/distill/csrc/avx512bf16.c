#define NAME(x) r2b_avx512bf16_##x
#include "body.h"
