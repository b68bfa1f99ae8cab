// Attention's products with AMX, included by attention.h, for heads of 64: sums are turned into
// scores, and scores into contributions, while the next products run. On a core of Emerald Rapids
// 480 GOP/s instead of 395 in sequence; AVX-512 has 355. The limits are the vector operations and
// 84 KB of operands that pass through 48 KB of L1: half as many keys per step would give 600, but
// other roundings than the other instruction sets.

// The sums of q and k and their `scores`, 64 keys at a time. q (16 rows, 64), k as in Heads.
inline void products_and_scores(const std::uint8_t* q, const std::int8_t* k,
                                const std::int32_t* start, const float* q_scale,
                                const float* k_scale, const float* v_log, std::int64_t keys,
                                float* s, float* top) {
  std::int32_t* sums = reinterpret_cast<std::int32_t*>(s);
  F highest[kTile];
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) highest[r] = all(-3e38f);
  tile_i8(q, 64, k, 16, start, sums, kKeys);
  for (std::int64_t key = 0; key < keys; key += kPanel) {
    const std::int64_t next = key + kPanel;
    if (next < keys) tile_i8(q, 64, k + next * 64, 16, start + next, sums + next, kKeys);
#pragma GCC unroll 4
    for (int first = 0; first < kTile; first += 4)
#pragma GCC unroll 4
      for (int c = 0; c < kPanel; c += 16) {
        const F scale = load(k_scale + key + c), v = load(v_log + key + c);
#pragma GCC unroll 4
        for (int r = first; r < first + 4; ++r) {
          std::int32_t* at = sums + r * kKeys + key + c;
          const F score = fma(from_int(at) * scale, all(q_scale[r]), v);
          highest[r] = max(score, highest[r]);
          store(reinterpret_cast<float*>(at), score);
        }
      }
  }
  for (int first = 0; first < kTile; first += 4)
    reduce_rows<false, 4>(highest + first, top + first);
}

// The products of one tile and the powers of the next. `product` (16, 64).
inline void values_and_powers(const Pending& before, std::int32_t* product, const float* s,
                              const float* top, const float* weight, std::int64_t keys,
                              std::uint8_t* p, float* total) {
  written();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int first = 0; first < kTile; first += 4) {
    const std::int64_t key = first / 4 * kPanel;
    if (key < keys) {
      const std::int8_t* b = before.v + key * kPanel;
      _tile_loadd(4, before.p + key, kKeys);
      _tile_loadd(5, b, 256);
      _tile_dpbusd(0, 4, 5);
      _tile_loadd(6, b + 64, 256);
      _tile_dpbusd(1, 4, 6);
      _tile_loadd(7, b + 128, 256);
      _tile_dpbusd(2, 4, 7);
      _tile_loadd(5, b + 192, 256);
      _tile_dpbusd(3, 4, 5);
    }
    powers<4>(s + first * kKeys, top + first, weight, keys, p + first * kKeys,
                      total + first);
  }
  _tile_stored(0, product, kPanel * 4);
  _tile_stored(1, product + 16, kPanel * 4);
  _tile_stored(2, product + 32, kPanel * 4);
  _tile_stored(3, product + 48, kPanel * 4);
}

constexpr bool kInterleaved = true;
