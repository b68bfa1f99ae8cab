// Single numbers: conversions that the row kernels of narrow instruction sets need.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

inline int whole_number(float a) { return a >= -1e9f && a <= 1e9f ? int(std::nearbyint(a)) : 0; }

inline std::uint32_t bits_of(float a) {
  std::uint32_t u;
  std::memcpy(&u, &a, 4);
  return u;
}

inline float float_of_bits(std::uint32_t u) {
  float a;
  std::memcpy(&a, &u, 4);
  return a;
}

inline std::uint16_t bf16_of(float a) {
  const std::uint32_t u = bits_of(a);
  if (a != a) return 0x7fc0;
  return std::uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float float_of_bf16(std::uint16_t h) { return float_of_bits(std::uint32_t(h) << 16); }

inline float float_of_f16(std::uint16_t h) {
  const std::uint32_t sign = std::uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31;
  const std::uint32_t fraction = h & 0x3ff;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000 | (fraction << 13));
  if (exponent != 0) return float_of_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
  return float_of_bits(sign | bits_of(float(fraction) * 5.9604644775390625e-8f));
}

inline std::uint16_t f16_of(float a) {
  const std::uint32_t u = bits_of(a), sign = (u >> 16) & 0x8000, size = u & 0x7fffffff;
  if (size > 0x7f800000) return std::uint16_t(sign | 0x7e00);
  if (size >= 0x477ff000) return std::uint16_t(sign | 0x7c00);  // rounds to infinity
  if (size < 0x38800000)  // denormal: the sum is rounded at 2^-24
    return std::uint16_t(sign | (bits_of(float_of_bits(size) + 0.5f) - 0x3f000000));
  return std::uint16_t(sign | ((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13));
}

}  // namespace
