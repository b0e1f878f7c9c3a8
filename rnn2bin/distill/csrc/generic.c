#define NAME(x) r2b_generic_##x
#include "body.h"
