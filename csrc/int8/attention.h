// int8 attention with an online softmax, once per instruction set (included by kernels.h).
//
// q, k and v are quantized per token and head. With int8 scores S = (q8 . k8) sq sk and values
// v = v8 sv, softmax(S) v needs sum_j p_j sv_j v8_j. The scale sv_j goes into the exponent:
// p'_j = 2^(S_j + log2 sv_j - m) is rounded to 8 bits, so rounding is relative to the largest
// CONTRIBUTION of a step of 256 keys, not to the largest probability, and a token with a small v
// but a large p ("attention sink") takes no range from others. The denominator
// sum_j p_j = sum_j p'_j / sv_j is summed in float from values that are not rounded.

// 2^(x - shift) of 64 floats x <= shift + 8, to 64 bytes in the order of key_group, and the sum of
// weight * 2^(x - shift). Two vectors of 16 at a time, in stages, to interleave other work.
#if VP_LEVEL == 512
// With y = w + f, w in sixteenths and |f| <= 1/32, 2^y is 2^w times a line in f. As a multiple of
// c + f, with c = 23/16 near the best 1 / ln 2, it takes one multiplication, which delays dot
// products, and one look-up in a register; it is exact to 1.6e-4, less than 8 bits resolve, and the
// denominator sums the same numbers.
constexpr float kTangent = 1.4375f;
constexpr float kSixteenths = 786432.0f;  // 1.5 * 2^19: adding it rounds to sixteenths, whose
                                          // number is in the sum's low bits
alignas(64) constexpr float kPower[16] = {
    1.02751736f, 1.07300944f, 1.12051563f, 1.17012509f, 1.22193095f, 1.27603046f,
    1.33252515f, 0.69576054f, 0.72656449f, 0.75873225f, 0.79232420f, 0.82740339f,
    0.86403566f, 0.90228979f, 0.94223757f, 0.98395399f};

struct Powers {
  F y[2], t[2];
  __m512i words[2];
  void begin(const float* x, F shift) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      y[i] = load(x + 16 * i) - shift;
      t[i] = y[i] + all(kSixteenths);
    }
  }
  template <int pair> void end(const float* weight, F& total) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const F power = {
          _mm512_permutexvar_ps(_mm512_castps_si512(t[i].v), _mm512_load_ps(kPower))};
      const F whole = t[i] - all(kSixteenths + kTangent);
      t[i] = times_power((y[i] - whole) * power, whole);  // which takes the floor of `whole`
      total = fma(t[i], load(weight + 16 * i), total);
    }
    words[pair] = _mm512_packs_epi32(_mm512_cvtps_epi32(t[0].v), _mm512_cvtps_epi32(t[1].v));
  }
  void give(std::uint8_t* p) { store_words(p, _mm512_packus_epi16(words[0], words[1])); }
};
#else
constexpr float kTangent = 0;

struct Powers {
  F r[4];
  const float* from;
  F by;
  void begin(const float* x, F shift) { from = x, by = shift; }
  template <int pair> void end(const float* weight, F& total) {
    for (int i = 0; i < 2; ++i) {
      r[2 * pair + i] = power_of_two<4>(load(from + 16 * i) - by);
      total = fma(r[2 * pair + i], load(weight + 16 * i), total);
    }
  }
  void give(std::uint8_t* p) {
    for (int i = 0; i < 4; ++i) store_bytes(p + 16 * i, r[i]);
  }
};
#endif

// The row's largest score less this is subtracted from scores: log2(255), so that its largest
// contribution becomes 255, and the tangent's offset.
constexpr float kRaise = 7.99435344f + kTangent;

constexpr int kRowsAtOnce = kTile % 6 ? 4 : 6;  // of a tile: as many as registers hold

// Scores of a tile's rows from their int32 sums (rows kKeys apart), in place, and the rows' largest.
inline void scores(std::int32_t* sums, const float* q_scale, const float* k_scale,
                   const float* v_log, std::int64_t keys, float* top) {
  for (int first = 0; first < kTile; first += kRowsAtOnce) {
    F highest[kRowsAtOnce];
#pragma GCC unroll 6
    for (int r = 0; r < kRowsAtOnce; ++r) highest[r] = all(-3e38f);
    for (std::int64_t i = 0; i < keys; i += 16) {
      const F k = load(k_scale + i), v = load(v_log + i);
#pragma GCC unroll 6
      for (int r = 0; r < kRowsAtOnce; ++r) {
        std::int32_t* at = sums + (first + r) * kKeys + i;
        const F s = fma(from_int(at) * k, all(q_scale[first + r]), v);
        highest[r] = max(s, highest[r]);
        store(reinterpret_cast<float*>(at), s);
      }
    }
    reduce_rows<false, kRowsAtOnce>(highest, top + first);
  }
}

// Contributions of rows as u8, relative to the largest score `top` of each in this step, and the sums
// of the probabilities, relative to it too.
template <int rows>
inline void powers(const float* s, const float* top, const float* weight, std::int64_t keys,
                   std::uint8_t* p, float* total) {
  F sum_of[rows];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) sum_of[r] = all(0.0f);
  for (std::int64_t i = 0; i < keys; i += kPanel)
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const F shift = all(top[r] - kRaise);
      Powers one;
      one.begin(s + r * kKeys + i, shift);
      one.end<0>(weight + i, sum_of[r]);
      one.begin(s + r * kKeys + i + 32, shift);
      one.end<1>(weight + i + 32, sum_of[r]);
      one.give(p + r * kKeys + i);
    }
  reduce_rows<true, rows>(sum_of, total);
}

// A tile whose contributions p are still to be multiplied with v.
struct Pending {
  const std::uint8_t* p = nullptr;  // (tile, kKeys)
  const std::int8_t* v = nullptr;
  std::int64_t keys = 0, row = 0, count = 0;
  alignas(64) float keep[16];  // factors of the rows' old output
  alignas(64) float add[16];   // and of the product
};

#ifdef VP_AMX
#include "amx_attention.h"
#elif VP_LEVEL == 512
// c (6 rows x 32 columns) += a (6 rows, `stride` bytes apart) * b for step `step` of 4.
template <int step, int stride> inline void dots(__m512i (&c)[12], const std::uint8_t* a, const std::int8_t* b) {
#define VP_PAIR(row, low, high)                                         \
  "vpbroadcastd %c[at]+" #row "*%c[s](%[a]), %%zmm29\n\t"               \
  "vpdpbusd %%zmm30, %%zmm29, %" #low "\n\tvpdpbusd %%zmm31, %%zmm29, %" #high "\n\t"
  asm volatile(
      "vmovdqu64 %c[from](%[b]), %%zmm30\n\tvmovdqu64 %c[from]+64(%[b]), %%zmm31\n\t"
      VP_PAIR(0, 0, 1) VP_PAIR(1, 2, 3) VP_PAIR(2, 4, 5) VP_PAIR(3, 6, 7) VP_PAIR(4, 8, 9)
      VP_PAIR(5, 10, 11)
      : "+v"(c[0]), "+v"(c[1]), "+v"(c[2]), "+v"(c[3]), "+v"(c[4]), "+v"(c[5]), "+v"(c[6]),
        "+v"(c[7]), "+v"(c[8]), "+v"(c[9]), "+v"(c[10]), "+v"(c[11])
      : [a] "r"(a), [b] "r"(b), [at] "i"(4 * step), [from] "i"(256 * step), [s] "i"(stride)
      : "xmm29", "xmm30", "xmm31");
#undef VP_PAIR
}

// The sums of q and k as tile_i8 makes them and their `scores`, 32 keys at a time: the scores come
// out of registers, while the dot products of the next keys begin. q (6 rows, 64), k as in Heads.
inline void products_and_scores(const std::uint8_t* q, const std::int8_t* k,
                                const std::int32_t* start, const float* q_scale,
                                const float* k_scale, const float* v_log, std::int64_t keys,
                                float* s, float* top) {
  F highest[6];
#pragma GCC unroll 6
  for (int r = 0; r < 6; ++r) highest[r] = all(-3e38f);
  for (std::int64_t key = 0; key < keys; key += 32) {
    const std::int8_t* b = k + key / kPanel * (kPanel * 64) + key % kPanel * 4;
    __m512i c[12];
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) c[i] = _mm512_loadu_si512(start + key + 16 * (i % 2));
#define VP_FOUR(i) \
  dots<i, 64>(c, q, b), dots<i + 1, 64>(c, q, b), dots<i + 2, 64>(c, q, b), dots<i + 3, 64>(c, q, b)
    VP_FOUR(0), VP_FOUR(4), VP_FOUR(8), VP_FOUR(12);
#undef VP_FOUR
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const std::int64_t at = key + 16 * i;
      const F scale = load(k_scale + at), v = load(v_log + at);
#pragma GCC unroll 6
      for (int r = 0; r < 6; ++r) {
        const F score = fma(F{_mm512_cvtepi32_ps(c[2 * r + i])} * scale, all(q_scale[r]), v);
        highest[r] = max(score, highest[r]);
        store(s + r * kKeys + at, score);
      }
    }
  }
  reduce_rows<false, 6>(highest, top);
}

// The products of one tile and the powers of the next, interleaved: dot products keep the units
// that multiply busy, rounding, subtracting and packing those that add. `product` (6, 64).
inline void values_and_powers(const Pending& before, std::int32_t* product, const float* s,
                              const float* top, const float* weight, std::int64_t keys,
                              std::uint8_t* p, float* total) {
  F sum_of[6];
  for (int half = 0; half < 2; ++half) {
    __m512i c[12];
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) c[i] = _mm512_setzero_si512();
    F part[3] = {all(0.0f), all(0.0f), all(0.0f)};
    for (std::int64_t key = 0; key < keys; key += kPanel) {
      const std::uint8_t* a = before.p + key;
      const std::int8_t* b = before.v + key * kPanel + 128 * half;
      const float* x = s + 3 * half * kKeys + key;
      std::uint8_t* to = p + 3 * half * kKeys + key;
#define VP_ROW(r)                                            \
  {                                                          \
    Powers one;                                              \
    const F shift = all(top[3 * half + r] - kRaise);         \
    dots<5 * r, kKeys>(c, a, b);                             \
    one.begin(x + r * kKeys, shift);                         \
    dots<5 * r + 1, kKeys>(c, a, b);                         \
    one.end<0>(weight + key, part[r]);                       \
    dots<5 * r + 2, kKeys>(c, a, b);                         \
    one.begin(x + r * kKeys + 32, shift);                    \
    dots<5 * r + 3, kKeys>(c, a, b);                         \
    one.end<1>(weight + key + 32, part[r]);                  \
    dots<5 * r + 4, kKeys>(c, a, b);                         \
    one.give(to + r * kKeys);                                \
  }
      VP_ROW(0) VP_ROW(1) VP_ROW(2)
#undef VP_ROW
      dots<15, kKeys>(c, a, b);
    }
#pragma GCC unroll 6
    for (int r = 0; r < 6; ++r) {
      store_words(product + r * kPanel + 32 * half, c[2 * r]);
      store_words(product + r * kPanel + 32 * half + 16, c[2 * r + 1]);
    }
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) sum_of[3 * half + r] = part[r];
  }
  reduce_rows<true, 6>(sum_of, total);
}
constexpr bool kInterleaved = true;
#else
inline void products_and_scores(const std::uint8_t*, const std::int8_t*, const std::int32_t*,
                                const float*, const float*, const float*, std::int64_t, float*,
                                float*) {}
inline void values_and_powers(const Pending&, std::int32_t*, const float*, const float*,
                              const float*, std::int64_t, std::uint8_t*, float*) {}
constexpr bool kInterleaved = false;
#endif

// The rows' output, d of 64 values, with the product of a tile.
inline void add_values(const Pending& tile, const std::int32_t* product, std::int64_t stride,
                       float* o) {
  for (std::int64_t i = 0; i < tile.count; ++i) {
    float* to = o + (tile.row + i) * stride;
    const F keep = all(tile.keep[i]), add = all(tile.add[i]);
    for (int c = 0; c < kPanel; c += 16)
      store(to + c, fma(load(to + c), keep, from_int(product + i * kPanel + c) * add));
  }
}

// Multiplies a tile's contributions with v, 64 values at a time from `done` on.
inline void multiply_values(const Pending& tile, std::int64_t done, std::int64_t parts,
                            std::int64_t keys, std::int32_t* product, std::int64_t stride,
                            float* o) {
  alignas(64) static const std::int32_t nothing[kPanel] = {};
  for (std::int64_t d = tile.count ? done : parts; d < parts; ++d) {
    tile_i8(tile.p, kKeys, tile.v + d * kPanel * keys, tile.keys / 4, nothing, product, kPanel);
    add_values(tile, product, stride, o + d * kPanel);
  }
}

void attend(const Heads& h, std::int64_t head, std::int64_t row, std::int64_t rows, float* out,
            std::int64_t stride, float* work) {
  const std::int64_t dp = h.dp, parts = dp / kPanel;
  const std::uint8_t* q = h.q + (head * h.rows + row) * dp;
  const float* q_scale = h.q_scale + head * h.rows + row;
  float* o = work;  // (rows, dp)
  float* m = o + (kQueries + kMaxTile) * dp;
  float* l = m + kQueries + kMaxTile;
  std::int32_t* sums = reinterpret_cast<std::int32_t*>(l + kQueries + kMaxTile);  // (tile, kKeys)
  float* s = reinterpret_cast<float*>(sums);  // scores, in the same place
  std::int32_t* product = sums + kMaxTile * kKeys;                                  // (tile, 64)
  std::uint8_t* p = reinterpret_cast<std::uint8_t*>(product + kMaxTile * kPanel);   // (tile, kKeys)
  std::uint8_t* other_p = p + kMaxTile * kKeys;
  static_assert(kMaxTile == 16, "the state of a tile's rows is one vector");
  alignas(64) float top[16] = {}, total[16] = {};
  [[maybe_unused]] const Tiles tiles;
  for (std::int64_t r = 0; r < rows; ++r) m[r] = -3e38f, l[r] = 0;
  std::memset(o, 0, std::size_t(rows * dp) * 4);
  Pending before;
  std::int64_t keys = 0;
  for (std::int64_t key = 0; key < h.keys; key += keys) {
    const std::int64_t at = head * h.keys + key, end = key < h.first ? h.first : h.keys;
    keys = end - key < kKeys ? end - key : kKeys;
    const std::int8_t* k = h.k + at * dp;
    for (std::int64_t r = 0; r < rows; r += kTile) {
      if (kInterleaved && dp == 64) {
        products_and_scores(q + r * dp, k, h.k_start + at, q_scale + r, h.k_scale + at,
                            h.v_log + at, keys, s, top);
      } else {
        for (std::int64_t j = 0; j < keys; j += kPanel)
          tile_i8(q + r * dp, dp, k + j * dp, VP_STEPS(h.dim), h.k_start + at + j, sums + j, kKeys);
        scores(sums, q_scale + r, h.k_scale + at, h.v_log + at, keys, top);
      }
      std::int64_t done = 0;  // 64s of values of the previous tile that are multiplied
      if (kInterleaved && before.count && before.keys == keys) {
        values_and_powers(before, product, s, top, h.v_inverse + at, keys, p, total);
        add_values(before, product, dp, o);
        done = 1;
      } else {
        for (int i = 0; i < kTile; i += kRowsAtOnce)
          powers<kRowsAtOnce>(s + i * kKeys, top + i, h.v_inverse + at, keys, p + i * kKeys,
                              total + i);
      }
      multiply_values(before, done, parts, h.keys, product, dp, o);
      // All rows of the tile at once: the factors of the old and the new sums.
      const F old_top = load(m + r), new_top = load(top), larger = max(old_top, new_top);
      const F keep = power_of_two<6>(old_top - larger), add = power_of_two<6>(new_top - larger);
      before.p = p;
      before.v = h.v + head * h.keys * dp + key * kPanel;
      before.keys = keys;
      before.row = r;
      before.count = rows - r < kTile ? rows - r : kTile;
      store(before.keep, keep);
      store(before.add, add);
      store_part(l + r, fma(load(l + r), keep, load(total) * add), before.count);
      store_part(m + r, larger, before.count);
      std::uint8_t* free_p = other_p;
      other_p = p;
      p = free_p;
    }
  }
  multiply_values(before, 0, parts, h.keys, product, dp, o);
  for (std::int64_t r = 0; r < rows; ++r) {
    const F by = all(1.0f / l[r]);
    for (std::int64_t d = 0; d < h.dim; d += 16) {
      const std::int64_t n = h.dim - d < 16 ? h.dim - d : 16;
      const F value = load(o + r * dp + d) * by;
      n == 16 ? store(out + r * stride + d, value) : store_part(out + r * stride + d, value, n);
    }
  }
}
