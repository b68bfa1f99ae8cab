// q, k and v of a head to the operands of attention (`Heads`), once per instruction set (included by
// kernels.h): RMSNorm of q and k, 8 bits per token, and the order that the tiles read.

// A token whose v is 0 still counts in the denominator: any small scale suffices.
constexpr float kLeastScale = 1e-30f;

// The sum of 16, added in the order of split_four: a row's numbers must not depend on the rows
// processed with it, which vary with the number of threads.
inline float row_sum(F x) {
#if VP_LEVEL == 512
  const F rows[4] = {x, x, x, x};
  float sums[4];
  reduce_rows<true, 4>(rows, sums);
  return sums[0];
#else
  return sum(x);
#endif
}

// RMSNorm of `dim` floats.
inline void rms_norm(const float* x, std::int64_t dim, const float* weight, float epsilon,
                     float* out) {
  float squares = 0;
  F square = all(0.0f);
  std::int64_t i = 0;
  for (; i + 16 <= dim; i += 16) square = fma(load(x + i), load(x + i), square);
  for (std::int64_t j = i; j < dim; ++j) squares += x[j] * x[j];
  squares += row_sum(square);
  const float by = 1.0f / std::sqrt(squares / float(dim) + epsilon);
  for (i = 0; i + 16 <= dim; i += 16) store(out + i, load(x + i) * all(by) * load(weight + i));
  for (; i < dim; ++i) out[i] = x[i] * by * weight[i];
}

// Quantizes `dim` floats to u8 (value + 128); returns the scale, NaN for NaN or infinity.
// Multiplies by 127 / peak if that is finite: bit-equality with the reference is not needed here.
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
// transposes the 4 x 4 groups: v is laid out so that nothing has to be reordered.
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

// One row of a part (0: q, 1: k) of a head; `work`: dim floats and dp bytes.
inline void split_row(int part, const float* x, const float* norm, const Heads& to,
                      std::int64_t head, std::int64_t t, float* work) {
  const std::int64_t dim = to.dim, dp = to.dp, at = head * to.keys + t;
  std::uint8_t* bytes = reinterpret_cast<std::uint8_t*>(work + dim);
  if (norm) rms_norm(x, dim, norm, to.epsilon, work), x = work;
  if (part == 0) {
    const std::int64_t row = head * to.rows + t;
    to.q_scale[row] = 1.44269504f / std::sqrt(float(dim)) * quantize_head(x, dim, to.q + row * dp);
    return;
  }
  to.k_scale[at] = quantize_head(x, dim, bytes);
  std::int32_t total = 0;
  for (std::int64_t i = 0; i < dim; ++i) bytes[i] ^= 128;  // u8 + 128 back to s8
  for (std::int64_t i = 0; i < dim; ++i) total += std::int8_t(bytes[i]);
  for (std::int64_t i = dim; i < (dim + 3) / 4 * 4; ++i) bytes[i] = 0;
  to.k_start[at] = -128 * total;
  std::int8_t* column = to.k + (head * to.keys + t / kPanel * kPanel) * dp + t % kPanel * 4;
  for (std::int64_t i = 0; i < dim; i += 4) std::memcpy(column + i * kPanel, bytes + i, 4);
}

// v of up to 4 tokens of one group; `work`: 4 * dim bytes.
inline void split_values(const float* x, std::int64_t stride, std::int64_t count, const Heads& to,
                         std::int64_t head, std::int64_t t, float* work) {
  std::uint8_t* bytes = reinterpret_cast<std::uint8_t*>(work);
  for (std::int64_t i = 0; i < count; ++i) {
    float scale = quantize_head(x + i * stride, to.dim, bytes + i * to.dim);
    if (scale < kLeastScale) scale = kLeastScale;  // false for NaN
    to.v_log[head * to.keys + t + i] = std::log2(scale);
    to.v_inverse[head * to.keys + t + i] = 1.0f / scale;
  }
  store_values(bytes, to.dim, t, count, to.keys, to.v + head * to.keys * to.dp);
}

#if VP_LEVEL == 512
// Lane l of c[j], 16 bytes each, to `to` + (4 l + j) * stride.
template <int lane> inline void store_lane(const __m512i (&c)[4], std::int8_t* to,
                                           std::int64_t stride) {
  for (int j = 0; j < 4; ++j)
    _mm_storeu_si128((__m128i*)(to + (4 * lane + j) * stride), _mm512_extracti32x4_epi32(c[j], lane));
}

// The same as split_row and split_values for four tokens t.. of one group and heads of 64: sums and
// maxima of the four rows are found together, and bytes move 16 at a time. Returns false and does
// nothing if a row is 0 or not finite.
inline bool split_four(int part, const float* x, std::int64_t stride, const float* norm,
                       const Heads& to, std::int64_t head, std::int64_t t) {
  F v[4][4], sums[4];
  alignas(16) float top[4], check[4];
  for (int r = 0; r < 4; ++r)
    for (int i = 0; i < 4; ++i) v[r][i] = load(x + r * stride + 16 * i);
  if (norm) {
    for (int r = 0; r < 4; ++r) {
      sums[r] = v[r][0] * v[r][0];
      for (int i = 1; i < 4; ++i) sums[r] = fma(v[r][i], v[r][i], sums[r]);
    }
    reduce_rows<true, 4>(sums, top);
    for (int r = 0; r < 4; ++r) {
      const F by = all(1.0f / std::sqrt(top[r] / 64.0f + to.epsilon));
      for (int i = 0; i < 4; ++i) v[r][i] = v[r][i] * by * load(norm + 16 * i);
    }
  }
  for (int r = 0; r < 4; ++r)
    sums[r] = max(max(abs(v[r][0]), abs(v[r][1])), max(abs(v[r][2]), abs(v[r][3])));
  reduce_rows<false, 4>(sums, top);
  for (int r = 0; r < 4; ++r) {
    sums[r] = v[r][0] * all(0.0f);
    for (int i = 1; i < 4; ++i) sums[r] = fma(v[r][i], all(0.0f), sums[r]);
  }
  reduce_rows<true, 4>(sums, check);
  for (int r = 0; r < 4; ++r)
    if (!(check[r] == 0.0f) || top[r] < 1e-30f) return false;

  alignas(64) std::int8_t bytes[4][64];
  const int zero = part == 0 ? 128 : 0;
  for (int r = 0; r < 4; ++r) {
    const F by = all(kInt8Max / top[r]);
    sums[r] = all(0.0f);
    for (int i = 0; i < 4; ++i) {
      const F whole = round(v[r][i] * by);
      sums[r] = sums[r] + whole;
      _mm_store_si128((__m128i*)(bytes[r] + 16 * i),
                      _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(whole.v),
                                                            _mm512_set1_epi32(zero))));
    }
  }
  __m512i row[4], c[4];
  for (int r = 0; r < 4; ++r) row[r] = _mm512_load_si512(bytes[r]);
  const std::int64_t at = head * to.keys + t;
  if (part == 0) {
    const std::int64_t first = head * to.rows + t;
    for (int r = 0; r < 4; ++r) {
      _mm512_storeu_si512(to.q + (first + r) * 64, row[r]);
      to.q_scale[first + r] = 1.44269504f / 8.0f * (top[r] / kInt8Max);
    }
  } else if (part == 1) {
    reduce_rows<true, 4>(sums, check);
    for (int r = 0; r < 4; ++r) {
      to.k_scale[at + r] = top[r] / kInt8Max;
      to.k_start[at + r] = -128 * std::int32_t(check[r]);
    }
    const __m512i a = _mm512_unpacklo_epi32(row[0], row[1]), b = _mm512_unpackhi_epi32(row[0], row[1]);
    const __m512i d = _mm512_unpacklo_epi32(row[2], row[3]), e = _mm512_unpackhi_epi32(row[2], row[3]);
    c[0] = _mm512_unpacklo_epi64(a, d), c[1] = _mm512_unpackhi_epi64(a, d);
    c[2] = _mm512_unpacklo_epi64(b, e), c[3] = _mm512_unpackhi_epi64(b, e);
    std::int8_t* column = to.k + (head * to.keys + t / kPanel * kPanel) * 64 + t % kPanel * 4;
    store_lane<0>(c, column, 256), store_lane<1>(c, column, 256);
    store_lane<2>(c, column, 256), store_lane<3>(c, column, 256);
  } else {
    for (int r = 0; r < 4; ++r) {
      to.v_log[at + r] = std::log2(top[r] / kInt8Max);
      to.v_inverse[at + r] = 1.0f / (top[r] / kInt8Max);
    }
    const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i d = _mm512_unpacklo_epi8(row[2], row[3]), e = _mm512_unpackhi_epi8(row[2], row[3]);
    c[0] = _mm512_unpacklo_epi16(a, d), c[1] = _mm512_unpackhi_epi16(a, d);
    c[2] = _mm512_unpacklo_epi16(b, e), c[3] = _mm512_unpackhi_epi16(b, e);
    std::int8_t* group = to.v + head * to.keys * 64 + key_group(t) * 256;
    store_lane<0>(c, group, 16), store_lane<1>(c, group, 16);
    store_lane<2>(c, group, 16), store_lane<3>(c, group, 16);
  }
  return true;
}
#else
inline bool split_four(int, const float*, std::int64_t, const float*, const Heads&, std::int64_t,
                       std::int64_t) {
  return false;
}
#endif

void split_head(int part, const float* x, std::int64_t stride, std::int64_t rows, const float* norm,
                const Heads& to, std::int64_t head, std::int64_t token, float* work) {
  for (std::int64_t r = 0; r < rows;) {
    const std::int64_t t = token + r, room = 4 - t % 4;
    const std::int64_t count = rows - r < room ? rows - r : room;
    const float* from = x + r * stride;
    r += count;
    if (count == 4 && to.dim == 64 && split_four(part, from, stride, norm, to, head, t)) continue;
    if (part == 2) {
      split_values(from, stride, count, to, head, t, work);
      continue;
    }
    for (std::int64_t i = 0; i < count; ++i)
      split_row(part, from + i * stride, norm, to, head, t + i, work);
  }
}
