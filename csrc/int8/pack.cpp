#include "pack.h"

#include <cstring>
#include <vector>

namespace vitapack {

void pack_rows(const std::uint8_t* rows, std::int64_t n, std::int64_t bytes, std::int64_t padded,
               std::uint8_t* panels, int threads) {
  parallel(threads, round_up(n, kPanel) / kPanel, [&](std::int64_t panel, int) {
    std::uint8_t* out = panels + panel * kPanel * padded;
    const std::int64_t first = panel * kPanel, real = n - first < kPanel ? n - first : kPanel;
    if (real < kPanel || bytes < padded) std::memset(out, 0, std::size_t(kPanel * padded));
    const std::int64_t whole = bytes / 4 * 4;
    // 16 rows at a time: 64 input streams are more than the prefetchers follow.
    for (std::int64_t r0 = 0; r0 < real; r0 += 16)
      for (std::int64_t k = 0; k < whole; k += 4)
        for (std::int64_t r = r0; r < r0 + 16 && r < real; ++r)
          std::memcpy(out + k * kPanel + r * 4, rows + (first + r) * bytes + k, 4);
    for (std::int64_t k = whole; k < bytes; ++k)
      for (std::int64_t r = 0; r < real; ++r)
        out[whole * kPanel + r * 4 + k - whole] = rows[(first + r) * bytes + k];
  });
}

void unpack_rows(const std::uint8_t* panels, std::int64_t n, std::int64_t bytes,
                 std::int64_t padded, std::uint8_t* rows, int threads) {
  parallel(threads, n, [&](std::int64_t row, int) {
    const std::uint8_t* from = panels + row / kPanel * kPanel * padded + row % kPanel * 4;
    std::uint8_t* to = rows + row * bytes;
    for (std::int64_t k = 0; k < bytes; ++k) to[k] = from[k / 4 * 256 + k % 4];
  });
}

void pack_group(const std::uint8_t* group, std::int64_t n, std::int64_t count, std::uint8_t* out) {
  std::memset(out, 0, std::size_t(round_up(n, kPanel) * count));
  for (std::int64_t row = 0; row < n; ++row)
    for (std::int64_t g = 0; g < count; ++g)
      out[(row / kPanel * count + g) * kPanel + row % kPanel] = group[row * count + g];
}

void unpack_group(const std::uint8_t* packed, std::int64_t n, std::int64_t count,
                  std::uint8_t* group) {
  for (std::int64_t row = 0; row < n; ++row)
    for (std::int64_t g = 0; g < count; ++g)
      group[row * count + g] = packed[(row / kPanel * count + g) * kPanel + row % kPanel];
}

void find_start(const Kernels& run, const Linear& w, std::int32_t* start, int threads) {
  parallel(threads, w.panel_count(), [&](std::int64_t panel, int) {
    std::vector<std::int8_t> work(std::size_t(kPanel * w.kp));
    std::int32_t sums[kPanel] = {};
    const std::int8_t* from = run.panel_i8(w, panel, work.data());
    for (std::int64_t step = 0; step < w.kp / 4; ++step, from += 256)
      for (int n = 0; n < kPanel; ++n)
        sums[n] += from[4 * n] + from[4 * n + 1] + from[4 * n + 2] + from[4 * n + 3];
    for (int n = 0; n < kPanel; ++n)
      start[panel * kPanel + n] = std::int32_t(-128u * std::uint32_t(sums[n]));
  });
}

}  // namespace vitapack
