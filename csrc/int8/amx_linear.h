// A linear with AMX, included by kernels.h: squares of 32 rows x 32 channels, each scaled and
// stored while the next one multiplies. On a core of Emerald Rapids 1450 GOP/s at 1024 inputs and
// 1960 at 4096; tiles of 16 x 64, finished when they are done, reach 950 and 1525, AVX-512 556 and
// 582.

// Sums of a square, finished some vectors of 16 at a time.
struct Square {
  const Linear& w;
  const float* sx;
  const Epilogue& e;
  const std::int32_t* acc = nullptr;
  std::int64_t row = 0, column = 0;   // its first
  std::int64_t done = 0, vectors = 0;  // two a row

  void finish_some(std::int64_t count) {
    const std::int64_t end = vectors - done < count ? vectors : done + count;
    for (; done < end; ++done) {
      const std::int64_t r = done / 2, c = done % 2 * 16, left = w.n - column - c;
      if (left <= 0) continue;
      const F scale = load(w.scale + column + c);
      const F bias = w.bias ? load(w.bias + column + c) : all(0.0f);
      finish(fma(from_int(acc + r * kSquare + c) * all(sx[row + r]), scale, bias), row + r,
             column + c, left < 16 ? left : 16, e);
    }
  }
};

void linear(const Linear& w, std::int64_t first, std::int64_t last, const std::uint8_t* a,
            std::int64_t stride, const float* sx, std::int64_t rows, const Epilogue& e,
            std::int8_t* work) {
  alignas(64) std::int32_t squares[2][kSquare * kSquare];
  alignas(64) std::int32_t acc[kTile * kPanel];
  const Tiles tiles;
  const std::int64_t bytes = w.panel_bytes(), steps = w.kp / 4;
  // A last tile of up to 16 rows is not a square. Squares fetch the next panel into L2.
  const std::int64_t squared = (rows + kTile - 1) / kTile / 2 * kSquare;
  const std::int64_t pace = squared ? bytes / (squared / kSquare * 2 * w.kp) + 1 : 0;
  const std::int64_t vectors = 2 * kSquare, some = (vectors * 16 + steps - 1) / steps;
  int turn = 0;
  Square before{w, sx, e};
  for (std::int64_t p = first; p < last; ++p) {
    const std::int8_t* panel = panel_i8(w, p, work);
    const auto* next = reinterpret_cast<const char*>(w.panels + (p + 1 < last ? p + 1 : p) * bytes);
    for (std::int64_t r = 0; r < squared; r += kSquare)
      for (int half = 0; half < 2; ++half) {
        std::int32_t* to = squares[turn ^= 1];
        square_i8(a + r * stride, stride, panel + half * kSquare * 4, steps,
                  w.start + p * kPanel + half * kSquare, to, [&] {
                    before.finish_some(some);
                    for (std::int64_t i = 0; i < pace; ++i, next += 64)
                      _mm_prefetch(next, _MM_HINT_T1);
                  });
        before.finish_some(vectors);
        before.acc = to;
        before.row = r;
        before.column = p * kPanel + half * kSquare;
        before.done = 0;
        before.vectors = 2 * (rows - r < kSquare ? rows - r : kSquare);
      }
    if (squared < rows) {
      tile_i8(a + squared * stride, stride, panel, steps, w.start + p * kPanel, acc, kPanel);
      finish_tile(acc, w, p, sx, squared, rows - squared, e);
    }
  }
  before.finish_some(vectors);
}
