// The row kernels: all hot code, compiled once per instruction set.
//
// A file named after the set (avx512.cpp) switches it on for all functions that follow, defines
//   VP_NAME   the name under which users know it       VP_LEVEL  512, 256 or 0: see vec.h
//   VP_VNNI   whether VP_DOT exists (level 256)        VP_TABLE  the name of its table
//   VP_BF16   whether it multiplies bf16               VP_STEPS  steps of a tile over so many inputs
//   VP_AMX    if its int8 tiles are AMX's (level 512)
// and includes this file. Everything is in an unnamed namespace and uses no templates of the
// standard library: a std function compiled here for AVX-512 could otherwise be the copy that the
// linker picks for the whole program.

namespace vitapack {
namespace {

#include "vec.h"
#include "tiles.h"

constexpr float kInt8Max = 127.0f;

// x / by with `inverse` 1 / by, rounded as a division is (Markstein 1990) but three times as fast: the
// product is off by an ulp at most, its remainder is exact.
inline F divided(F x, F by, F inverse) {
  const F about = x * inverse;
  return fma(fma(all(0.0f) - by, about, x), inverse, about);
}

// Makes u8 of k floats: round-half-even(x / sx) + 128 with sx = peak / 127, as reference.py does.
// `check` is 0, or NaN if a value is NaN or infinite: then sx is NaN, and so are the scaled values.
inline float quantize_row(const float* x, std::int64_t k, float peak, float check,
                          std::uint8_t* out) {
  if (!(check == 0.0f)) {
    std::memset(out, 128, std::size_t(k));
    return check - check;
  }
  const float sx = peak / kInt8Max;
  // Dividing, not multiplying by 127 / peak: that would be infinite for denormal peaks.
  const F by = all(sx > 0 ? sx : 1.0f), zero = all(128.0f), top = all(kInt8Max);
  const F bottom = all(-kInt8Max);
  std::int64_t i = 0;
  if (VP_LEVEL && sx > 1e-30f && sx < 1e30f) {  // beyond, inverse or remainder may leave the normal
    // Added to 1.5 * 2^23, a number is rounded half to even, and its low byte is the result.
    const F inverse = all(1.0f / sx), zero_there = all(12582912.0f + 128.0f);
    for (; i + 16 <= k; i += 16)
      store_low_bytes(out + i, divided(load(x + i), by, inverse) + zero_there);
  }
  for (; i + 16 <= k; i += 16)
    store_bytes(out + i, max(bottom, min(top, round(load(x + i) / by))) + zero);
  if (i < k) {
    std::uint8_t lane[16];
    store_bytes(lane, max(bottom, min(top, round(load_part(x + i, k - i) / by))) + zero);
    std::memcpy(out + i, lane, std::size_t(k - i));
  }
  return sx;
}

struct Peak {
  F top = all(0.0f), check = all(0.0f);
  void add(F x) {
    top = max(top, abs(x));
    check = fma(x, all(0.0f), check);  // NaN and infinity times 0 are NaN
  }
};

inline void peak_of(const float* x, std::int64_t k, Peak& peak) {
  std::int64_t i = 0;
  Peak other[3];  // four chains: one would wait four cycles for every step
  for (; i + 64 <= k; i += 64) {
    peak.add(load(x + i));
    for (int j = 0; j < 3; ++j) other[j].add(load(x + i + 16 * (j + 1)));
  }
  for (const Peak& one : other) {
    peak.top = max(peak.top, one.top);
    peak.check = peak.check + one.check;
  }
  for (; i + 16 <= k; i += 16) peak.add(load(x + i));
  if (i < k) peak.add(load_part(x + i, k - i));
}

void quantize(const void* x, Type type, std::int64_t x_stride, std::int64_t rows, std::int64_t k,
              std::uint8_t* out, std::int64_t stride, float* sx) {
  constexpr std::int64_t kChunk = 4096;  // other types are widened so many at a time
  float piece[kChunk];
  for (std::int64_t r = 0; r < rows; ++r, out += stride) {
    const auto widened = [&](std::int64_t at) -> const float* {
      if (type == Type::f32) return static_cast<const float*>(x) + r * x_stride + at;
      for (std::int64_t i = 0; i < kChunk && at + i < k; i += 16) {
        const std::int64_t n = k - at - i < 16 ? k - at - i : 16;
        store_part(piece + i, load_any(x, type, r * x_stride + at + i, n), n);
      }
      return piece;
    };
    const std::int64_t whole = type == Type::f32 ? k : kChunk;
    Peak peak;
    const float* from = nullptr;
    for (std::int64_t at = 0; at < k; at += whole) {
      from = widened(at);
      peak_of(from, k - at < whole ? k - at : whole, peak);
    }
    const float top = largest(peak.top), check = sum(peak.check);
    sx[r] = 0;
    for (std::int64_t at = 0; at < k; at += whole) {
      if (k > whole) from = widened(at);
      sx[r] = quantize_row(from, k - at < whole ? k - at : whole, top, check, out + at);
    }
  }
}

void quantize_pair(const float* a, std::int64_t a_stride, std::int64_t ka, const float* b,
                   std::int64_t b_stride, std::int64_t kb, std::int64_t rows, std::uint8_t* out,
                   std::int64_t stride, float* sx) {
  for (std::int64_t r = 0; r < rows; ++r, a += a_stride, b += b_stride, out += stride) {
    Peak peak;
    peak_of(a, ka, peak);
    peak_of(b, kb, peak);
    const float top = largest(peak.top), check = sum(peak.check);
    sx[r] = quantize_row(a, ka, top, check, out);
    quantize_row(b, kb, top, check, out + ka);
  }
}

// A row's LayerNorm without affine (variance of the deviations), then the modulation.
inline Peak norm_row(const float* x, const float* shift, const float* scale, float epsilon,
                     std::int64_t k, float* out) {
  const std::int64_t whole = k / 16 * 16, rest = k - whole;
  F total = all(0.0f), second = total;  // two chains, see peak_of
  std::int64_t even = 0;
  for (; even + 32 <= whole; even += 32) {
    total = total + load(x + even);
    second = second + load(x + even + 16);
  }
  if (even < whole) total = total + load(x + even);
  total = total + second;
  if (rest) total = total + load_part(x + whole, rest);
  const float mean = sum(total) / float(k);
  const F middle = all(mean);
  F square = all(0.0f);
  second = square;
  for (std::int64_t i = 0; i < whole; i += 32) {
    const F d = load(x + i) - middle;
    square = fma(d, d, square);
    if (i + 16 == whole) break;
    const F e = load(x + i + 16) - middle;
    second = fma(e, e, second);
  }
  float squares = sum(square + second);
  for (std::int64_t i = whole; i < k; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const F by = all(1.0f / std::sqrt(squares / float(k) + epsilon)), one = all(1.0f);
  Peak peak;
  for (std::int64_t i = 0; i < k; i += 16) {
    const std::int64_t n = k - i < 16 ? k - i : 16;
    const F d = (n == 16 ? load(x + i) : load_part(x + i, n)) - middle;
    const F s = n == 16 ? load(scale + i) : load_part(scale + i, n);
    const F b = n == 16 ? load(shift + i) : load_part(shift + i, n);
    const F y = fma(one + s, d * by, b);
    n == 16 ? store(out + i, y) : store_part(out + i, y, n);
    if (n == 16) peak.add(y);
  }
  if (rest) peak.add(load_part(out + whole, rest));
  return peak;
}

void norm(const float* x, std::int64_t x_stride, const float* shift, const float* scale,
          float epsilon, std::int64_t rows, std::int64_t k, float* out, std::int64_t stride) {
  for (std::int64_t r = 0; r < rows; ++r)
    norm_row(x + r * x_stride, shift, scale, epsilon, k, out + r * stride);
}

void norm_quantize(const float* x, std::int64_t x_stride, const float* shift, const float* scale,
                   std::int64_t rows, std::int64_t k, float* work, std::uint8_t* out,
                   std::int64_t stride, float* sx) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const Peak peak = norm_row(x + r * x_stride, shift, scale, 1e-6f, k, work);
    sx[r] = quantize_row(work, k, largest(peak.top), sum(peak.check), out + r * stride);
  }
}

// One row of a finished tile: 64 channels, `n` of them real, `values` already scaled and biased.
inline void finish(F values, std::int64_t row, std::int64_t column, std::int64_t n,
                   const Epilogue& e) {
  if (e.gelu) values = gelu_tanh(values);
  const std::int64_t at = row * e.stride + column;
  if (e.gate) {
    float* out = static_cast<float*>(e.out) + at;
    const F before = n == 16 ? load(out) : load_part(out, n);
    const F gate = n == 16 ? load(e.gate + column) : load_part(e.gate + column, n);
    values = fma(gate, values, before);
  }
  store_any(e.out, e.type, at, values, n);
}

inline void finish_tile(const std::int32_t* acc, const Linear& w, std::int64_t panel,
                        const float* sx, std::int64_t row, std::int64_t rows, const Epilogue& e) {
  const std::int64_t base = panel * kPanel;
  for (int c = 0; c < kPanel && base + c < w.n; c += 16) {
    const F scale = load(w.scale + base + c);
    const F bias = w.bias ? load(w.bias + base + c) : all(0.0f);
    const std::int64_t n = w.n - base - c < 16 ? w.n - base - c : 16;
    for (std::int64_t r = 0; r < rows; ++r)
      finish(fma(from_int(acc + r * kPanel + c) * all(sx[row + r]), scale, bias), row + r, base + c,
             n, e);
  }
}

#ifdef VP_AMX
#include "amx_linear.h"
#else
// Prefetches a tile's target while it multiplies: rows are pages apart, which hardware cannot
// predict.
inline void fetch_rows(const Epilogue& e, std::int64_t row, std::int64_t rows,
                       std::int64_t column) {
#if VP_LEVEL
  const float* to = static_cast<const float*>(e.out) + row * e.stride + column;
  for (std::int64_t r = row; r < rows && r < row + kTile; ++r, to += e.stride)
    for (int c = 0; c < kPanel; c += 16)
      _mm_prefetch(reinterpret_cast<const char*>(to + c), _MM_HINT_T0);
#endif
}

void linear(const Linear& w, std::int64_t first, std::int64_t last, const std::uint8_t* a,
            std::int64_t stride, const float* sx, std::int64_t rows, const Epilogue& e,
            std::int8_t* work) {
  alignas(64) std::int32_t acc[kTile * kPanel];
  const std::int64_t bytes = w.panel_bytes(), tiles = (rows + kTile - 1) / kTile;
  const std::int64_t pace = bytes / (tiles * w.kp / 8) + 1;
  for (std::int64_t p = first; p < last; ++p) {
    const std::int8_t* panel = panel_i8(w, p, work);
    Ahead ahead{w.panels + (p + 1 < last ? p + 1 : p) * bytes, pace};
    for (std::int64_t r = 0; r < rows; r += kTile) {
      if (e.gate) fetch_rows(e, r, rows, p * kPanel);
      tile_i8(a + r * stride, stride, panel, w.kp / 4, w.start + p * kPanel, acc, kPanel, ahead);
      ahead.next = static_cast<const std::uint8_t*>(ahead.next) + pace * (w.kp / 8);
      finish_tile(acc, w, p, sx, r, rows - r < kTile ? rows - r : kTile, e);
    }
  }
}
#endif

void widen(const void* x, Type type, std::int64_t x_stride, std::int64_t rows, std::int64_t k,
           bool bf16, void* out, std::int64_t stride) {
  const std::int64_t kp = round_up(k, kBlock);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t i = 0; i < kp; i += 16) {
      const std::int64_t n = i >= k ? 0 : k - i < 16 ? k - i : 16;
      const F values = n ? load_any(x, type, r * x_stride + i, n) : all(0.0f);
      store_any(out, bf16 ? Type::bf16 : Type::f32, r * stride + i, values, 16);
    }
}

// A panel of s8 as (kp/2, 64, 2) bf16 or (kp, 64) float32: small integers, exact in both.
inline void widen_panel(const std::int8_t* panel, std::int64_t kp, bool bf16, void* out) {
  float* full = static_cast<float*>(out);
  std::uint32_t* pairs = static_cast<std::uint32_t*>(out);
  for (std::int64_t step = 0; step < kp / 4; ++step, panel += 256) {
    for (int n = 0; n < kPanel; n += 16) {
      const Bytes four = load_four(panel + 4 * n);
      if (bf16) {
        store_pairs(pairs + 2 * step * kPanel + n, byte_of<0>(four), byte_of<1>(four));
        store_pairs(pairs + (2 * step + 1) * kPanel + n, byte_of<2>(four), byte_of<3>(four));
      } else {
        float* to = full + 4 * step * kPanel + n;
        store(to, byte_of<0>(four));
        store(to + kPanel, byte_of<1>(four));
        store(to + 2 * kPanel, byte_of<2>(four));
        store(to + 3 * kPanel, byte_of<3>(four));
      }
    }
  }
}

// acc (kFloatTile, 64) in float32: a sum per 128 inputs and the sum of those, since one chain's error
// grows with K (beyond twice torch's at 600 inputs).
inline void tile_f32_by_parts(const char* a, std::int64_t stride, const char* panel, std::int64_t k,
                              float* acc) {
  constexpr std::int64_t kPart = 128;
  alignas(64) float part[kFloatTile * kPanel];
  tile_f32(a, stride, panel, k < kPart ? k : kPart, acc, kPanel);
  for (std::int64_t done = kPart; done < k; done += kPart) {
    const std::int64_t left = k - done;
    tile_f32(a + 4 * done, stride, panel + 4 * kPanel * done, left < kPart ? left : kPart, part,
             kPanel);
    for (int i = 0; i < kFloatTile * kPanel; i += 16) store(acc + i, load(acc + i) + load(part + i));
  }
}

// Channels [base, n) of a layer, at most a panel: scale and bias of a float tile.
struct Channels {
  std::int64_t base, n;
  const float* scale;  // null: 1
  const float* bias;   // null: 0
};

inline void finish_wide(const float* acc, const Channels& to, std::int64_t row, std::int64_t rows,
                        const Epilogue& e) {
  for (std::int64_t c = to.base; c < to.n && c < to.base + kPanel; c += 16, acc += 16) {
    const std::int64_t n = to.n - c < 16 ? to.n - c : 16;
    const F scale = to.scale ? load_part(to.scale + c, n) : all(1.0f);
    const F bias = to.bias ? load_part(to.bias + c, n) : all(0.0f);
    for (std::int64_t r = 0; r < rows; ++r)
      finish(fma(load(acc + r * kPanel), scale, bias), row + r, c, n, e);
  }
}

// Rows of float32, or of bf16, times a panel of either.
inline void multiply_wide(const void* a, std::int64_t stride, bool bf16, std::int64_t rows,
                          const void* panel, std::int64_t k, const Channels& to,
                          const Epilogue& e) {
  alignas(64) float acc[kFloatTile * kPanel];
  const std::int64_t step = stride * (bf16 ? 2 : 4);
  const char* from = static_cast<const char*>(a);
  for (std::int64_t r = 0; r < rows; r += kFloatTile, from += kFloatTile * step) {
    if (bf16)
      tile_bf16(from, step, static_cast<const char*>(panel), k / 2, acc, kPanel);
    else
      tile_f32_by_parts(from, step, static_cast<const char*>(panel), k, acc);
    finish_wide(acc, to, r, rows - r < kFloatTile ? rows - r : kFloatTile, e);
  }
}

void linear_wide(const Linear& w, std::int64_t first, std::int64_t last, const void* a,
                 std::int64_t stride, bool bf16, std::int64_t rows, const Epilogue& e, void* work) {
  const std::int64_t bytes = bf16 ? 2 : 4;
  // The s8 panel of a 4-bit weight takes the end of the scratch, behind the widened one.
  std::int8_t* expanded = static_cast<std::int8_t*>(work) + kPanel * w.kp * bytes;
  for (std::int64_t p = first; p < last; ++p) {
    widen_panel(panel_i8(w, p, expanded), w.kp, bf16, work);
    multiply_wide(a, stride, bf16, rows, work, w.kp, {p * kPanel, w.n, w.scale, w.bias}, e);
  }
}

// A panel of rows as (k, 64) float32, zeros beyond the last row.
inline void turn_panel(const Dense& w, std::int64_t panel, float* out) {
  const std::int64_t base = panel * kPanel, n = w.n - base < kPanel ? w.n - base : kPanel;
  if (n < kPanel) std::memset(out, 0, std::size_t(w.k * kPanel) * sizeof(float));
  for (std::int64_t i = 0; i < w.k; i += 16) {
    const std::int64_t inputs = w.k - i < 16 ? w.k - i : 16;
    alignas(64) float lanes[kPanel][16];
    for (std::int64_t c = 0; c < n; ++c)
      store(lanes[c], load_any(w.weight, w.type, (base + c) * w.k + i, inputs));
    for (std::int64_t j = 0; j < inputs; ++j)
      for (std::int64_t c = 0; c < n; ++c) out[(i + j) * kPanel + c] = lanes[c][j];
  }
}

void linear_dense(const Dense& w, const float* a, std::int64_t stride, std::int64_t rows,
                  const Epilogue& e, float* work) {
  for (std::int64_t p = 0; p < w.panel_count(); ++p) {
    turn_panel(w, p, work);
    multiply_wide(a, stride, false, rows, work, w.k, {p * kPanel, w.n, nullptr, w.bias}, e);
  }
}

#include "heads.h"
#include "attention.h"

void tile(const std::uint8_t* a, std::int64_t stride, const std::int8_t* panel, std::int64_t steps,
          const std::int32_t* start, std::int32_t* acc, std::int64_t acc_stride) {
  [[maybe_unused]] const Tiles tiles;
  tile_i8(a, stride, panel, steps, start, acc, acc_stride);
}

double peak_loop(std::int64_t loops) { return peak(loops); }

void tile_wide(const char* a, const char* panel, std::int64_t k, bool bf16, float* acc) {
  bf16 ? tile_bf16(a, k * 2, panel, k / 2, acc, kPanel) : tile_f32(a, k * 4, panel, k, acc, kPanel);
}

const Kernels table = {VP_NAME,       kTile,  VP_BF16,     quantize,     quantize_pair, norm,
                       norm_quantize, linear, linear_wide, linear_dense, widen,         split_head,
                       attend,      panel_i8, tile,        tile_wide,    peak_loop};

}  // namespace

const Kernels* VP_TABLE() { return &table; }

}  // namespace vitapack
