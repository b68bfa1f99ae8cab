// AMX's int8 tiles, included by tiles.h. Registers of 16 rows of 64 bytes: 16 rows of A and 64
// inputs; of B, 64 inputs (16 steps of a panel) of 16 channels, rows 256 bytes apart; 16 x 16 sums.

constexpr int kTile = 16;

struct alignas(64) TileConfig {  // 8 registers of 16 rows of 64 bytes
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

// The tile registers, set up for a call and released at its end: oneDNN, and so torch, uses the
// same ones on the same threads in other shapes. (A tile that relied on an earlier set-up was
// an illegal instruction.) Takes 0.1 us, so it is done once per call, not per tile.
struct Tiles {
  Tiles() { _tile_loadconfig(&kTileConfig); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// GCC's tile loads declare no memory: makes the compiler write their inputs first.
inline void written() { __asm__ volatile("" ::: "memory"); }

// acc (16, 64) = start (64) + A (16 rows) * panel; `steps` is a multiple of 16.
inline void tile_i8(const std::uint8_t* a, std::int64_t stride, const std::int8_t* b,
                    std::int64_t steps, const std::int32_t* start, std::int32_t* acc,
                    std::int64_t acc_stride) {
  written();
  _tile_loadd(0, start, 0);  // the same row 16 times
  _tile_loadd(1, start + 16, 0);
  _tile_loadd(2, start + 32, 0);
  _tile_loadd(3, start + 48, 0);
  for (std::int64_t i = 0; i < steps; i += 16, a += 64, b += 16 * 256) {
    _tile_loadd(4, a, stride);
    _tile_loadd(5, b, 256);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(6, b + 64, 256);
    _tile_dpbusd(1, 4, 6);
    _tile_loadd(7, b + 128, 256);
    _tile_dpbusd(2, 4, 7);
    _tile_loadd(5, b + 192, 256);
    _tile_dpbusd(3, 4, 5);
  }
  const std::int64_t row = acc_stride * 4;
  _tile_stored(0, acc, row);
  _tile_stored(1, acc + 16, row);
  _tile_stored(2, acc + 32, row);
  _tile_stored(3, acc + 48, row);
}

constexpr int kSquare = 32;

// acc (32, 32) = start (32) + A (32 rows) * half a panel: every register loaded serves two
// products, 4 loads for 4 instead of 5. meanwhile() is called once per 64 inputs, during the 64
// cycles of their products, so its work costs little.
template <class F>
inline void square_i8(const std::uint8_t* a, std::int64_t stride, const std::int8_t* b,
                      std::int64_t steps, const std::int32_t* start, std::int32_t* acc,
                      F&& meanwhile) {
  const std::uint8_t* low = a + 16 * stride;
  written();
  _tile_loadd(0, start, 0);
  _tile_loadd(1, start + 16, 0);
  _tile_loadd(2, start, 0);
  _tile_loadd(3, start + 16, 0);
  for (std::int64_t i = 0; i < steps; i += 16, a += 64, low += 64, b += 16 * 256) {
    _tile_loadd(6, b, 256);
    _tile_loadd(4, a, stride);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, b + 64, 256);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, low, stride);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
    meanwhile();
  }
  constexpr std::int64_t row = kSquare * 4;
  _tile_stored(0, acc, row);
  _tile_stored(1, acc + 16, row);
  _tile_stored(2, acc + 16 * kSquare, row);
  _tile_stored(3, acc + 16 * kSquare + 16, row);
}

inline double peak(std::int64_t loops) {  // on registers alone
  const Tiles tiles;
  const std::int64_t turns = loops / 10 + 1;  // takes as long as so many turns of the AVX-512 loop
  for (std::int64_t i = 0; i < turns; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  return double(turns) * 4 * 16 * 16 * 64 * 2;
}
