// The row kernels in plain C++: any processor, and the reference of the others.

#include "engine.h"

#include <cmath>
#include <cstring>

#include "scalar.h"

#define VP_NAME "portable"
#define VP_LEVEL 0
#define VP_BF16 false
#define VP_STEPS(dim) (((dim) + 3) / 4)
#define VP_TABLE kernels_portable
#include "kernels.h"
