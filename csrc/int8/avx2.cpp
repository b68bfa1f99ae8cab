// The row kernels with 256-bit registers, exact without VNNI (Haswell, Zen 1 and later).

#include "engine.h"

#include <cmath>
#include <cstring>

#include "scalar.h"

#ifdef VITAPACK_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define VP_NAME "avx2"
#define VP_LEVEL 256
#define VP_VNNI 0
#define VP_BF16 false
#define VP_STEPS(dim) (((dim) + 3) / 4)
#define VP_TABLE kernels_avx2
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace vitapack {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace vitapack
#endif
