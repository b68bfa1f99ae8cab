// The row kernels with 512-bit registers and VNNI (Ice Lake, Zen 4 and later; bf16 if available).

#include "engine.h"

#include <cmath>
#include <cstring>

#include "scalar.h"

#if defined(VITAPACK_X86) && !defined(_WIN32)
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif

#define VP_NAME "avx512-vnni"
#define VP_LEVEL 512
#define VP_BF16 true
#define VP_STEPS(dim) (((dim) + 3) / 4)
#define VP_TABLE kernels_avx512
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace vitapack {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace vitapack
#endif
