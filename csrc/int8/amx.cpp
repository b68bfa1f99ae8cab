// The AVX-512 row kernels with AMX tiles for int8 (Sapphire Rapids and later, on Linux), from the same
// panels. Float products stay AVX-512's.

#include "engine.h"

#include <cmath>
#include <cstring>

#include "scalar.h"

#if defined(VITAPACK_X86) && defined(__linux__) && defined(__x86_64__) && \
    (defined(__clang__) || __GNUC__ >= 11)
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8")
#endif

namespace {

// Linux lets a process use the tile registers only after a request (XTILEDATA is state 18).
bool tiles_allowed() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool has_tiles = (d >> 24 & 1) && (d >> 25 & 1);  // AMX-TILE, AMX-INT8
  constexpr long kRequest = 0x1023, kTileData = 18;       // ARCH_REQ_XCOMP_PERM
  return has_tiles && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

#define VP_NAME "amx-int8"
#define VP_LEVEL 512
#define VP_AMX 1
#define VP_BF16 true
#define VP_STEPS(dim) (((dim) + 63) / 64 * 16)
#define VP_TABLE amx_table
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace vitapack {
const Kernels* kernels_amx() {
  static const bool allowed = tiles_allowed();
  return allowed ? amx_table() : nullptr;
}
}  // namespace vitapack
#else
namespace vitapack {
const Kernels* kernels_amx() { return nullptr; }
}  // namespace vitapack
#endif
