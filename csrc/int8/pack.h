// Between the file's rows and the engine's panels; both ways, exact.

#pragma once

#include "engine.h"

namespace vitapack {

// rows (n, bytes) of u8, `bytes` a multiple of 4 after zero padding to `padded`, to panels
// (n/64, padded/4, 64, 4): int8 weights unchanged, those of fewer bits byte by byte.
void pack_rows(const std::uint8_t* rows, std::int64_t n, std::int64_t bytes, std::int64_t padded,
               std::uint8_t* panels, int threads);
void unpack_rows(const std::uint8_t* panels, std::int64_t n, std::int64_t bytes,
                 std::int64_t padded, std::uint8_t* rows, int threads);
// group (n, count) to (n/64, count, 64).
void pack_group(const std::uint8_t* group, std::int64_t n, std::int64_t count, std::uint8_t* out);
void unpack_group(const std::uint8_t* packed, std::int64_t n, std::int64_t count,
                  std::uint8_t* group);
// start[n] = -128 * sum_k w[n, k], from a linear whose panels and groups are set.
void find_start(const Kernels& run, const Linear& w, std::int32_t* start, int threads);

}  // namespace vitapack
