// GEMM tiles: a few rows of A times a panel of 64 channels, once per instruction set (amx_tiles.h
// has AMX's int8 tiles).
//
// Included by kernels.h; see there for the macros. All tiles read A row by row, 4 bytes (4 u8,
// 2 bf16 or 1 float) a step, and the panel in steps of 256 bytes. The integer tiles are exact:
// int32 sums that wrap modulo 2^32, and the true result fits for every K up to 133,144.

// The prefetch of a tile into L2, `pace` bytes per 8 inputs: without it the first tile on each panel
// waits for the last-level cache, 6 to 12 % of a linear on Emerald Rapids.
struct Ahead {
  const void* next = nullptr;
  std::int64_t pace = 0;
};

#if VP_LEVEL == 512
// 24 accumulators, 4 panel registers, 2 for A. In assembly because gcc 12 spills accumulators of
// the same loop written with intrinsics (838 instead of 1565 GOP/s on Zen 5).
constexpr int kFloatTile = 6;

#define VP_DOTS(op, r0, r1, r2, r3, a)      \
  op " %%zmm24, " a ", %%zmm" #r0 "\n\t"    \
  op " %%zmm25, " a ", %%zmm" #r1 "\n\t"    \
  op " %%zmm26, " a ", %%zmm" #r2 "\n\t"    \
  op " %%zmm27, " a ", %%zmm" #r3 "\n\t"
#define VP_STEP(op, offset)                                                                  \
  "vmovdqu64 " #offset "*64(%[b]), %%zmm24\n\tvmovdqu64 64+" #offset "*64(%[b]), %%zmm25\n\t" \
  "vmovdqu64 128+" #offset "*64(%[b]), %%zmm26\n\t"                                           \
  "vmovdqu64 192+" #offset "*64(%[b]), %%zmm27\n\t"                                           \
  "vpbroadcastd " #offset "(%[a0]), %%zmm28\n\t"                                              \
  "vpbroadcastd " #offset "(%[a0],%[s]), %%zmm29\n\t"                                         \
  VP_DOTS(op, 0, 1, 2, 3, "%%zmm28")                                                          \
  "vpbroadcastd " #offset "(%[a0],%[s],2), %%zmm28\n\t"                                       \
  VP_DOTS(op, 4, 5, 6, 7, "%%zmm29")                                                          \
  "vpbroadcastd " #offset "(%[a3]), %%zmm29\n\t"                                              \
  VP_DOTS(op, 8, 9, 10, 11, "%%zmm28")                                                        \
  "vpbroadcastd " #offset "(%[a3],%[s]), %%zmm28\n\t"                                         \
  VP_DOTS(op, 12, 13, 14, 15, "%%zmm29")                                                      \
  "vpbroadcastd " #offset "(%[a3],%[s],2), %%zmm29\n\t"                                       \
  VP_DOTS(op, 16, 17, 18, 19, "%%zmm28")                                                      \
  VP_DOTS(op, 20, 21, 22, 23, "%%zmm29")
#define VP_COPY(r0, r1, r2, r3)                                                       \
  "vmovdqa64 %%zmm0, %%zmm" #r0 "\n\tvmovdqa64 %%zmm1, %%zmm" #r1 "\n\t"              \
  "vmovdqa64 %%zmm2, %%zmm" #r2 "\n\tvmovdqa64 %%zmm3, %%zmm" #r3 "\n\t"
#define VP_SAVE(r0, r1, r2, r3)                                                       \
  "vmovdqu64 %%zmm" #r0 ", (%[acc])\n\tvmovdqu64 %%zmm" #r1 ", 64(%[acc])\n\t"        \
  "vmovdqu64 %%zmm" #r2 ", 128(%[acc])\n\tvmovdqu64 %%zmm" #r3 ", 192(%[acc])\n\t"    \
  "add %[row], %[acc]\n\t"
// Offsets count in units of 4 bytes of A and 64 * 4 of the panel: two steps a turn.
#define VP_TILE(op)                                                                        \
  asm volatile(                                                                            \
      "vmovdqu64 (%[start]), %%zmm0\n\tvmovdqu64 64(%[start]), %%zmm1\n\t"                 \
      "vmovdqu64 128(%[start]), %%zmm2\n\tvmovdqu64 192(%[start]), %%zmm3\n\t"             \
      VP_COPY(4, 5, 6, 7) VP_COPY(8, 9, 10, 11) VP_COPY(12, 13, 14, 15)                    \
      VP_COPY(16, 17, 18, 19) VP_COPY(20, 21, 22, 23)                                      \
      "test %[pairs], %[pairs]\n\tjz 2f\n\t"                                               \
      ".p2align 5\n"                                                                       \
      "1:\n\t"                                                                             \
      "prefetcht1 (%[next])\n\tadd %[pace], %[next]\n\t"                                   \
      VP_STEP(op, 0) VP_STEP(op, 4)                                                        \
      "add $8, %[a0]\n\tadd $8, %[a3]\n\tadd $512, %[b]\n\t"                               \
      "dec %[pairs]\n\tjnz 1b\n"                                                           \
      "2:\n\t"                                                                             \
      "test $1, %[odd]\n\tjz 3f\n\t"                                                       \
      VP_STEP(op, 0)                                                                       \
      "3:\n\t"                                                                             \
      VP_SAVE(0, 1, 2, 3) VP_SAVE(4, 5, 6, 7) VP_SAVE(8, 9, 10, 11)                        \
      VP_SAVE(12, 13, 14, 15) VP_SAVE(16, 17, 18, 19) VP_SAVE(20, 21, 22, 23)              \
      : [a0] "+r"(a0), [a3] "+r"(a3), [b] "+r"(b), [pairs] "+r"(pairs), [acc] "+r"(acc),   \
        [next] "+r"(ahead.next)                                                            \
      : [s] "r"(stride), [start] "r"(start), [row] "r"(acc_stride * 4), [odd] "r"(steps),  \
        [pace] "r"(ahead.pace)                                                             \
      : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",    \
        "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16",     \
        "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25",   \
        "xmm26", "xmm27", "xmm28", "xmm29")

#ifdef VP_AMX
#include "amx_tiles.h"
#else
constexpr int kTile = 6;

// acc (6, 64) = start (64) + A (6 rows, `stride` bytes apart) * panel.
inline void tile_i8(const std::uint8_t* a0, std::int64_t stride, const std::int8_t* b,
                    std::int64_t steps, const std::int32_t* start, std::int32_t* acc,
                    std::int64_t acc_stride, Ahead ahead = {}) {
  if (!ahead.next) ahead.next = b;  // a prefetch from no page walks the page tables every time
  const std::uint8_t* a3 = a0 + 3 * stride;
  std::int64_t pairs = steps / 2;
  VP_TILE("vpdpbusd");
}
#endif

inline void tile_bf16(const char* a0, std::int64_t stride, const char* b, std::int64_t steps,
                      float* acc, std::int64_t acc_stride) {
  alignas(64) static const float start[kPanel] = {};
  Ahead ahead{b, 0};
  const char* a3 = a0 + 3 * stride;
  std::int64_t pairs = steps / 2;
  VP_TILE("vdpbf16ps");
}

inline void tile_f32(const char* a0, std::int64_t stride, const char* b, std::int64_t steps,
                     float* acc, std::int64_t acc_stride) {
  alignas(64) static const float start[kPanel] = {};
  Ahead ahead{b, 0};
  const char* a3 = a0 + 3 * stride;
  std::int64_t pairs = steps / 2;
  VP_TILE("vfmadd231ps");
}

#undef VP_TILE
#undef VP_SAVE
#undef VP_COPY
#undef VP_STEP
#undef VP_DOTS

#ifndef VP_AMX
inline double peak(std::int64_t loops) {
  std::int64_t left = loops;
  asm volatile(
      "1:\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm0\n\tvpdpbusd %%zmm30, %%zmm31, %%zmm1\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm2\n\tvpdpbusd %%zmm30, %%zmm31, %%zmm3\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm4\n\tvpdpbusd %%zmm30, %%zmm31, %%zmm5\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm6\n\tvpdpbusd %%zmm30, %%zmm31, %%zmm7\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm8\n\tvpdpbusd %%zmm30, %%zmm31, %%zmm9\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm10\n\tvpdpbusd %%zmm30, %%zmm31, %%zmm11\n\t"
      "dec %0\n\tjnz 1b"
      : "+r"(left)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
        "xmm10", "xmm11");
  return double(loops) * 12 * 128;
}
#endif

#elif VP_LEVEL == 256 && VP_VNNI
// 6 rows x 16 channels in registers: 12 accumulators, since two dots start in a cycle and each takes
// five (with 8 a core of Emerald Rapids is at 79 % of its peak).
constexpr int kTile = 6;

inline void tile_i8(const std::uint8_t* a, std::int64_t stride, const std::int8_t* panel,
                    std::int64_t steps, const std::int32_t* start, std::int32_t* acc,
                    std::int64_t acc_stride, Ahead ahead = {}) {
  const char* next = static_cast<const char*>(ahead.next ? ahead.next : panel);
  for (int column = 0; column < kPanel; column += 16) {
    __m256i sums[kTile][2];
    for (int r = 0; r < kTile; ++r)
      for (int c = 0; c < 2; ++c)
        sums[r][c] = _mm256_loadu_si256((const __m256i*)(start + column + 8 * c));
    const std::int8_t* b = panel + column * 4;
    for (std::int64_t i = 0; i < steps; ++i, b += 256, next += ahead.pace / 8) {
      _mm_prefetch(next, _MM_HINT_T1);
      const __m256i b0 = _mm256_loadu_si256((const __m256i*)b);
      const __m256i b1 = _mm256_loadu_si256((const __m256i*)(b + 32));
      for (int r = 0; r < kTile; ++r) {
        std::int32_t four;
        std::memcpy(&four, a + r * stride + 4 * i, 4);
        const __m256i row = _mm256_set1_epi32(four);
        sums[r][0] = VP_DOT(sums[r][0], row, b0);
        sums[r][1] = VP_DOT(sums[r][1], row, b1);
      }
    }
    for (int r = 0; r < kTile; ++r)
      for (int c = 0; c < 2; ++c)
        _mm256_storeu_si256((__m256i*)(acc + r * acc_stride + column + 8 * c), sums[r][c]);
  }
}

#elif VP_LEVEL == 256
// Without VNNI: vpmaddubsw saturates on u8 x s8 pairs, so both sides are widened to 16 bits for
// vpmaddwd, which is exact; the rows once a tile, since widening takes the one port that shuffles.
// A register holds 4 channels x 2 partial sums.
constexpr int kTile = 4;
constexpr std::int64_t kWide = 128;  // steps of 4 inputs that are widened together: 4 KB of rows

inline void tile_i8(const std::uint8_t* a, std::int64_t stride, const std::int8_t* panel,
                    std::int64_t steps, const std::int32_t* start, std::int32_t* acc,
                    std::int64_t acc_stride, Ahead = {}) {
  alignas(32) std::int64_t wide[kTile][kWide];
  for (std::int64_t done = 0; done == 0 || done < steps; done += kWide) {
    const std::int64_t count = steps - done < kWide ? steps - done : kWide;
    for (int r = 0; r < kTile; ++r)
      for (std::int64_t i = 0; i < count; ++i) {
        std::int32_t four;
        std::memcpy(&four, a + r * stride + 4 * (done + i), 4);
        wide[r][i] = _mm_cvtsi128_si64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(four)));
      }
    for (int column = 0; column < kPanel; column += 8) {
      __m256i sums[kTile][2];
      for (int r = 0; r < kTile; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
      const std::int8_t* b = panel + done * 256 + column * 4;
      for (std::int64_t i = 0; i < count; ++i, b += 256) {
        const __m256i b0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)b));
        const __m256i b1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(b + 16)));
        for (int r = 0; r < kTile; ++r) {
          const __m256i row = _mm256_set1_epi64x(wide[r][i]);
          sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(row, b0));
          sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(row, b1));
        }
      }
      for (int r = 0; r < kTile; ++r) {
        __m256i* to = (__m256i*)(acc + r * acc_stride + column);
        const __m256i first = _mm256_loadu_si256(done ? to : (const __m256i*)(start + column));
        // hadd leaves channels 0 1 4 5 2 3 6 7.
        const __m256i both =
            _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[r][0], sums[r][1]), 0xd8);
        _mm256_storeu_si256(to, _mm256_add_epi32(first, both));
      }
    }
  }
}

#else
constexpr int kTile = 4;

inline void tile_i8(const std::uint8_t* a, std::int64_t stride, const std::int8_t* panel,
                    std::int64_t steps, const std::int32_t* start, std::int32_t* acc,
                    std::int64_t acc_stride, Ahead = {}) {
  for (int r = 0; r < kTile; ++r, a += stride, acc += acc_stride) {
    std::uint32_t sums[kPanel];  // unsigned: the start may wrap around, the true sum does not
    for (int n = 0; n < kPanel; ++n) sums[n] = std::uint32_t(start[n]);
    const std::int8_t* b = panel;
    for (std::int64_t i = 0; i < steps; ++i, b += 256) {
      const int a0 = a[4 * i], a1 = a[4 * i + 1], a2 = a[4 * i + 2], a3 = a[4 * i + 3];
      for (int n = 0; n < kPanel; ++n)
        sums[n] += std::uint32_t(a0 * b[4 * n] + a1 * b[4 * n + 1] + a2 * b[4 * n + 2] +
                                 a3 * b[4 * n + 3]);
    }
    for (int n = 0; n < kPanel; ++n) acc[n] = std::int32_t(sums[n]);
  }
}

inline void tile_f32(const char* a, std::int64_t stride, const char* panel, std::int64_t steps,
                     float* acc, std::int64_t acc_stride) {
  for (int r = 0; r < kTile; ++r, a += stride, acc += acc_stride) {
    const float* row = reinterpret_cast<const float*>(a);
    const float* b = reinterpret_cast<const float*>(panel);
    float sums[kPanel] = {};
    for (std::int64_t i = 0; i < steps; ++i, b += kPanel)
      for (int n = 0; n < kPanel; ++n) sums[n] += row[i] * b[n];
    std::memcpy(acc, sums, sizeof sums);
  }
}
#endif

#if VP_LEVEL == 256
inline void tile_f32(const char* a, std::int64_t stride, const char* panel, std::int64_t steps,
                     float* acc, std::int64_t acc_stride) {
  for (int column = 0; column < kPanel; column += 16) {
    F sums[kTile];
    for (int r = 0; r < kTile; ++r) sums[r] = all(0.0f);
    const float* b = reinterpret_cast<const float*>(panel) + column;
    for (std::int64_t i = 0; i < steps; ++i, b += kPanel) {
      const F channels = load(b);
      for (int r = 0; r < kTile; ++r) {
        const float* row = reinterpret_cast<const float*>(a + r * stride);
        sums[r] = fma(all(row[i]), channels, sums[r]);
      }
    }
    for (int r = 0; r < kTile; ++r) store(acc + r * acc_stride + column, sums[r]);
  }
}
#endif

#if VP_LEVEL != 512
constexpr int kFloatTile = kTile;

// No bf16 arithmetic: never called, the table says so.
inline void tile_bf16(const char*, std::int64_t, const char*, std::int64_t, float*, std::int64_t) {}

inline double peak(std::int64_t loops) {  // the tile itself, on data in L1
  constexpr int kInputs = 256;
  alignas(64) static std::uint8_t a[kTile * kInputs];
  alignas(64) static std::int8_t b[kPanel * kInputs];
  alignas(64) static const std::int32_t start[kPanel] = {};
  alignas(64) std::int32_t acc[kTile * kPanel];
  const std::int64_t tiles = loops / 64 + 1;  // takes as long as so many of the loops above
  for (std::int64_t i = 0; i < tiles; ++i) {
    tile_i8(a, kInputs, b, kInputs / 4, start, acc, kPanel);
    [[maybe_unused]] volatile std::int32_t seen = acc[i % (kTile * kPanel)];  // else it is removed
  }
  return double(tiles) * kTile * kPanel * kInputs * 2;
}
#endif

#ifndef VP_AMX
struct Tiles {  // no registers to set up
  Tiles() {}
};
#endif

// A panel of 4-bit weights to (kp/4, 64, 4) s8: s * (q - z) = s * q - s * z, exact because
// s * q <= 240 fits a byte, so that one 16-bit product holds two of them.
inline void expand_panel(const Linear& w, std::int64_t panel, std::int8_t* out) {
  const std::uint8_t* codes = w.panels + panel * kPanel * w.kp / 2;
  const std::uint8_t* groups = w.group + panel * w.groups() * kPanel;
  // Per half block of 32 inputs: s twice per 32 bits, s * z four times.
  alignas(64) std::uint32_t times[2][kPanel], minus[2][kPanel];
  std::int64_t known[2] = {-1, -1};
  for (std::int64_t block = 0; block < w.kp / kBlock; ++block) {
    for (int half = 0; half < 2; ++half) {
      const std::int64_t g = (block * kBlock + half * 32) / w.group_size;
      if (g == known[half]) continue;
      known[half] = g;
      for (int n = 0; n < kPanel; ++n) {
        const std::uint32_t byte = groups[g * kPanel + n], s = (byte >> 4) + 1;
        times[half][n] = s * 0x10001u;
        minus[half][n] = s * (byte & 15) * 0x1010101u;
      }
    }
    for (int step = 0; step < 8; ++step) {
      const std::uint8_t* from = codes + (block * 8 + step) * 256;
      std::int8_t* low = out + (block * 16 + step) * 256;
      std::int8_t* high = low + 8 * 256;
#if VP_LEVEL == 512
      const __m512i nibble = _mm512_set1_epi8(15);
      for (int i = 0; i < 4; ++i) {
        const __m512i both = _mm512_loadu_si512(from + 64 * i);
        const __m512i a = _mm512_and_si512(both, nibble);
        const __m512i b = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        _mm512_storeu_si512(low + 64 * i,
                            _mm512_sub_epi8(_mm512_mullo_epi16(a, _mm512_load_si512(times[0] + 16 * i)),
                                            _mm512_load_si512(minus[0] + 16 * i)));
        _mm512_storeu_si512(high + 64 * i,
                            _mm512_sub_epi8(_mm512_mullo_epi16(b, _mm512_load_si512(times[1] + 16 * i)),
                                            _mm512_load_si512(minus[1] + 16 * i)));
      }
#elif VP_LEVEL == 256
      const __m256i nibble = _mm256_set1_epi8(15);
      for (int i = 0; i < 8; ++i) {
        const __m256i both = _mm256_loadu_si256((const __m256i*)(from + 32 * i));
        const __m256i a = _mm256_and_si256(both, nibble);
        const __m256i b = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        const auto at = [i](const std::uint32_t* p) {
          return _mm256_load_si256((const __m256i*)(p + 8 * i));
        };
        _mm256_storeu_si256((__m256i*)(low + 32 * i),
                            _mm256_sub_epi8(_mm256_mullo_epi16(a, at(times[0])), at(minus[0])));
        _mm256_storeu_si256((__m256i*)(high + 32 * i),
                            _mm256_sub_epi8(_mm256_mullo_epi16(b, at(times[1])), at(minus[1])));
      }
#else
      for (int n = 0; n < kPanel; ++n)
        for (int i = 0; i < 4; ++i) {
          const int byte = from[4 * n + i];
          low[4 * n + i] =
              std::int8_t((byte & 15) * int(times[0][n] & 31) - int(minus[0][n] & 255));
          high[4 * n + i] =
              std::int8_t((byte >> 4) * int(times[1][n] & 31) - int(minus[1][n] & 255));
        }
#endif
    }
  }
}

// A panel as s8 (kp/4, 64, 4): in place, or expanded to `work`, 64 * kp bytes.
inline const std::int8_t* panel_i8(const Linear& w, std::int64_t panel, std::int8_t* work) {
  if (w.bits == 8) return reinterpret_cast<const std::int8_t*>(w.panels) + panel * w.panel_bytes();
  expand_panel(w, panel, work);
  return work;
}
