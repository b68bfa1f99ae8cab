// The row kernels with AVX-VNNI (Alder Lake and later, Zen 5): 256 bits, no AVX-512 needed.

#include "engine.h"

#include <cmath>
#include <cstring>

#include "scalar.h"

#if defined(VITAPACK_X86) && (defined(__clang__) || __GNUC__ >= 11)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avxvnni,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,avxvnni,fma,f16c")
#endif

#define VP_NAME "avx-vnni"
#define VP_LEVEL 256
#define VP_VNNI 1
#define VP_DOT(sum, a, b) _mm256_dpbusd_avx_epi32(sum, a, b)
#define VP_BF16 false
#define VP_STEPS(dim) (((dim) + 3) / 4)
#define VP_TABLE kernels_avxvnni
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace vitapack {
const Kernels* kernels_avxvnni() { return nullptr; }
}  // namespace vitapack
#endif
