#define NAME(x) r2b_scalar_##x
#define ISA "scalar"
#define VECTORS "vec_scalar.h"
#include "body.h"
