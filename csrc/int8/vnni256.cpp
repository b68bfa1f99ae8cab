// The row kernels with 256-bit VNNI in AVX-512's encoding: the same source as AVX-VNNI's, so that it
// can be tested on servers, and for chips that slow down with 512 bits.

#include "engine.h"

#include <cmath>
#include <cstring>

#include "scalar.h"

#if defined(VITAPACK_X86)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512vnni,avx2,fma,f16c")
#endif

#define VP_NAME "avx512vl-vnni"
#define VP_LEVEL 256
#define VP_VNNI 1
#define VP_DOT(sum, a, b) _mm256_dpbusd_epi32(sum, a, b)
#define VP_BF16 false
#define VP_STEPS(dim) (((dim) + 3) / 4)
#define VP_TABLE kernels_vnni256
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace vitapack {
const Kernels* kernels_vnni256() { return nullptr; }
}  // namespace vitapack
#endif
