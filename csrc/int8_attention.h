// int8 attention with an online softmax, once per instruction set (included by int8_kernels.h).
//
// q, k and v are quantized per token and head. With int8 scores S = (q8 . k8) sq sk and values
// v = v8 sv, softmax(S) v needs sum_j p_j sv_j v8_j. The scale sv_j goes into the exponent:
// p'_j = 2^(S_j + log2 sv_j - m) is what is rounded to 8 bits, so that rounding is relative to the
// largest CONTRIBUTION of a step of 256 keys, not to the largest probability, and a token with a
// small v but a large p ("attention sink") takes no range from others. The denominator
// sum_j p_j = sum_j p'_j / sv_j is summed in float from values that are not rounded.

// A token whose v is 0 still counts in the denominator: any small scale will do.
constexpr float kLeastScale = 1e-30f;

// RMSNorm (eps 1e-6) of `dim` floats.
inline void rms_norm(const float* x, std::int64_t dim, const float* weight, float* out) {
  float squares = 0;
  F square = all(0.0f);
  std::int64_t i = 0;
  for (; i + 16 <= dim; i += 16) square = fma(load(x + i), load(x + i), square);
  for (std::int64_t j = i; j < dim; ++j) squares += x[j] * x[j];
  squares += sum(square);
  const float by = 1.0f / std::sqrt(squares / float(dim) + 1e-6f);
  for (i = 0; i + 16 <= dim; i += 16) store(out + i, load(x + i) * all(by) * load(weight + i));
  for (; i < dim; ++i) out[i] = x[i] * by * weight[i];
}

// Quantizes `dim` floats to u8 (value + 128); returns the scale, NaN for NaN or infinity. Times
// 127 / peak where that is finite: nothing here has to agree with the reference to the bit.
inline float quantize_head(const float* x, std::int64_t dim, std::uint8_t* out) {
  Peak peak;
  peak_of(x, dim, peak);
  const float top = largest(peak.top), check = sum(peak.check);
  if (!(check == 0.0f) || top < 1e-30f || dim % 16) return quantize_row(x, dim, top, check, out);
  const F by = all(kInt8Max / top), zero = all(128.0f);
  for (std::int64_t i = 0; i < dim; i += 16) store_bytes(out + i, round(load(x + i) * by) + zero);
  return top / kInt8Max;
}

// Where the group of 4 keys t / 4 lies among the 16 groups of its 64 keys in v. With 512 bits the
// probabilities of 64 keys are narrowed by two rounds of packing within 128-bit lanes, which
// transposes the 4 x 4 groups: v is laid out so that nothing has to put them right.
inline std::int64_t key_group(std::int64_t t) {
  const std::int64_t group = t / 4 % 16;
  return t / kPanel * 16 + (VP_LEVEL == 512 ? group % 4 * 4 + group / 4 : group);
}

// Values of up to 4 tokens of one group, u8 with `dim` a token, to their places in v.
inline void store_values(const std::uint8_t* bytes, std::int64_t dim, std::int64_t token,
                         std::int64_t count, std::int64_t keys, std::int8_t* v) {
  for (std::int64_t d = 0; d < dim; d += kPanel) {
    std::int8_t* row = v + d * keys + key_group(token) * 256 + token % 4;
    const std::int64_t n = dim - d < kPanel ? dim - d : kPanel;
    const std::uint8_t* from = bytes + d;
    if (count == 4) {
      std::uint32_t lane[kPanel];
      for (std::int64_t i = 0; i < n; ++i)
        lane[i] = (std::uint32_t(from[i]) | std::uint32_t(from[dim + i]) << 8 |
                   std::uint32_t(from[2 * dim + i]) << 16 | std::uint32_t(from[3 * dim + i]) << 24) ^
                  0x80808080u;
      std::memcpy(row, lane, std::size_t(n) * 4);
    } else {
      for (std::int64_t t = 0; t < count; ++t)
        for (std::int64_t i = 0; i < n; ++i) row[4 * i + t] = std::int8_t(from[t * dim + i] ^ 128);
    }
  }
}

void split_heads(const float* qkv, std::int64_t stride, std::int64_t rows, std::int64_t heads,
                 const float* query_norm, const float* key_norm, const Heads& to,
                 std::int64_t first_head, std::int64_t token, float* work) {
  const std::int64_t dim = to.dim, dp = to.dp;
  const float score = 1.44269504f / std::sqrt(float(dim));
  std::uint8_t* bytes = reinterpret_cast<std::uint8_t*>(work + dim);
  for (std::int64_t h = 0; h < heads; ++h) {
    const std::int64_t head = first_head + h;
    std::uint8_t* q = to.q + head * to.rows * dp;
    std::int8_t* k = to.k + head * to.keys * dp;
    std::int8_t* v = to.v + head * to.keys * dp;
    for (std::int64_t r = 0; r < rows; ++r) {
      const float* from = qkv + r * stride + h * dim;
      const std::int64_t t = token + r, at = head * to.keys + t;

      const float* values = from;
      if (query_norm) rms_norm(from, dim, query_norm, work), values = work;
      to.q_scale[head * to.rows + t] = score * quantize_head(values, dim, q + t * dp);

      values = from + heads * dim;
      if (key_norm) rms_norm(values, dim, key_norm, work), values = work;
      to.k_scale[at] = quantize_head(values, dim, bytes);
      std::int32_t total = 0;
      for (std::int64_t i = 0; i < dim; ++i) bytes[i] ^= 128;  // u8 + 128 back to s8
      for (std::int64_t i = 0; i < dim; ++i) total += std::int8_t(bytes[i]);
      for (std::int64_t i = dim; i < (dim + 3) / 4 * 4; ++i) bytes[i] = 0;
      to.k_start[at] = -128 * total;
      std::int8_t* column = k + t / kPanel * (kPanel * dp) + t % kPanel * 4;
      for (std::int64_t i = 0; i < dim; i += 4) std::memcpy(column + i * kPanel, bytes + i, 4);
    }
    for (std::int64_t r = 0; r < rows;) {
      const std::int64_t t = token + r, room = 4 - t % 4;
      const std::int64_t count = rows - r < room ? rows - r : room;
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t at = head * to.keys + t + i;
        const float* values = qkv + (r + i) * stride + (2 * heads + h) * dim;
        float scale = quantize_head(values, dim, bytes + i * dim);
        if (scale < kLeastScale) scale = kLeastScale;  // false for NaN
        to.v_log[at] = std::log2(scale);
        to.v_inverse[at] = 1.0f / scale;
      }
      store_values(bytes, dim, t, count, to.keys, v);
      r += count;
    }
  }
}

// 2^x of 64 floats x <= 8 to 64 bytes in the order of key_group; adds weight * 2^x to `total`.
inline void powers_to_bytes(const F* x, F shift, const float* weight, F& total, std::uint8_t* p) {
#if VP_LEVEL == 512
  // Adding 1.5 * 2^23 rounds to a whole number, which ends up in the sum's low bits. Degree 3 is
  // exact to 8e-5; half a step of 8 bits is 2e-3.
  const __m512 magic = _mm512_set1_ps(12582912.0f);
  __m512i whole[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const F y = max(all(-126.0f), x[i] - shift);
    const __m512 t = _mm512_add_ps(y.v, magic);
    const F f = y - F{_mm512_sub_ps(t, magic)};
    F r = fma(f, all(5.51716611e-2f), all(2.42611140e-1f));
    r = fma(f, r, all(6.93260968e-1f));
    r = fma(f, r, all(9.99928057e-1f));
    r.v = _mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_castps_si512(r.v), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
    total = fma(r, load(weight + 16 * i), total);
    whole[i] = _mm512_cvtps_epi32(r.v);
  }
  const __m512i low = _mm512_packs_epi32(whole[0], whole[1]);
  const __m512i high = _mm512_packs_epi32(whole[2], whole[3]);
  _mm512_storeu_si512(p, _mm512_packus_epi16(low, high));
#else
  for (int i = 0; i < 4; ++i) {
    const F r = power_of_two<4>(x[i] - shift);
    total = fma(r, load(weight + 16 * i), total);
    store_bytes(p + 16 * i, r);
  }
#endif
}

// One row of a step of 64 * panels keys: scores from their int32 sums, then contributions as u8
// relative to the largest score `top` of the step. Returns the sum of the probabilities, relative
// to it too.
template <int panels>
inline float softmax_row(const std::int32_t* sums, float q_scale, const float* k_scale,
                         const float* v_log, const float* v_inverse, float& top, std::uint8_t* p) {
  F s[4 * panels];
  F highest = all(-3e38f);
  const F scale = all(q_scale);
#pragma GCC unroll 16
  for (int i = 0; i < 4 * panels; ++i) {
    s[i] = fma(from_int(sums + 16 * i) * load(k_scale + 16 * i), scale, load(v_log + 16 * i));
    highest = max(s[i], highest);
  }
  top = largest(highest);
  const F shift = all(top - 7.99435344f);  // log2(255): the largest contribution becomes 255
  F total = all(0.0f);
#pragma GCC unroll 4
  for (int i = 0; i < panels; ++i)
    powers_to_bytes(s + 4 * i, shift, v_inverse + 64 * i, total, p + 64 * i);
  return sum(total);
}

using SoftmaxRow = float (*)(const std::int32_t*, float, const float*, const float*, const float*,
                             float&, std::uint8_t*);

void attend(const Heads& h, std::int64_t head, std::int64_t row, std::int64_t rows, float* out,
            std::int64_t stride, float* work) {
  const std::int64_t dp = h.dp, parts = dp / kPanel;
  const std::uint8_t* q = h.q + (head * h.rows + row) * dp;
  const float* q_scale = h.q_scale + head * h.rows + row;
  float* o = work;  // (rows, dp)
  float* m = o + (kQueries + kMaxTile) * dp;
  float* l = m + kQueries + kMaxTile;
  std::int32_t* sums = reinterpret_cast<std::int32_t*>(l + kQueries + kMaxTile);  // (tile, kKeys)
  std::int32_t* product = sums + kMaxTile * kKeys;                                  // (tile, 64)
  std::uint8_t* p = reinterpret_cast<std::uint8_t*>(product + kMaxTile * kPanel);   // (tile, kKeys)
  alignas(64) static const std::int32_t nothing[kPanel] = {};
  static_assert(kMaxTile == 16, "the state of a tile's rows is one vector");
  alignas(64) float alpha[16], beta[16], top[16] = {}, total[16] = {};
  for (std::int64_t r = 0; r < rows; ++r) m[r] = -3e38f, l[r] = 0;
  std::memset(o, 0, std::size_t(rows * dp) * 4);
  static_assert(kKeys == 4 * kPanel, "a step has up to 4 panels");
  constexpr SoftmaxRow rows_of[4] = {softmax_row<1>, softmax_row<2>, softmax_row<3>,
                                     softmax_row<4>};
  for (std::int64_t key = 0; key < h.keys; key += kKeys) {
    const std::int64_t at = head * h.keys + key;
    const std::int64_t keys = h.keys - key < kKeys ? h.keys - key : kKeys;
    const SoftmaxRow softmax = rows_of[keys / kPanel - 1];
    const std::int8_t* k = h.k + at * dp;
    for (std::int64_t r = 0; r < rows; r += kTile) {
      const std::int64_t count = rows - r < kTile ? rows - r : kTile;
      for (std::int64_t j = 0; j < keys; j += kPanel)
        tile_i8(q + r * dp, dp, k + j * dp, VP_STEPS(h.dim), h.k_start + at + j, sums + j, kKeys);
      for (std::int64_t i = 0; i < count; ++i)
        total[i] = softmax(sums + i * kKeys, q_scale[r + i], h.k_scale + at, h.v_log + at,
                               h.v_inverse + at, top[i], p + i * kKeys);
      // All rows of the tile at once: by what the old and the new sums are multiplied.
      const F old_top = load(m + r), new_top = load(top), larger = max(old_top, new_top);
      const F keep = power_of_two<6>(old_top - larger), add = power_of_two<6>(new_top - larger);
      store(alpha, keep);
      store(beta, add);
      store_part(l + r, fma(load(l + r), keep, load(total) * add), count);
      store_part(m + r, larger, count);
      for (std::int64_t d = 0; d < parts; ++d) {
        const std::int8_t* v = h.v + head * h.keys * dp + d * kPanel * h.keys + key * kPanel;
        tile_i8(p, kKeys, v, keys / 4, nothing, product, kPanel);
        for (std::int64_t i = 0; i < count; ++i) {
          float* to = o + (r + i) * dp + d * kPanel;
          const F keep = all(alpha[i]), add = all(beta[i]);
          for (int c = 0; c < kPanel; c += 16)
            store(to + c, fma(load(to + c), keep, from_int(product + i * kPanel + c) * add));
        }
      }
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const F by = all(1.0f / l[r]);
    for (std::int64_t d = 0; d < h.dim; d += 16) {
      const std::int64_t n = h.dim - d < 16 ? h.dim - d : 16;
      const F value = load(o + r * dp + d) * by;
      n == 16 ? store(out + r * stride + d, value) : store_part(out + r * stride + d, value, n);
    }
  }
}
