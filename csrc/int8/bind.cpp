// vitapack._C's int8 functions. Arrays are passed as addresses: vitapack.kernels.linear.cpu checks
// shapes, types and lifetimes; call these functions only through it.

#include <algorithm>
#include <memory>
#include <stdexcept>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dit.h"
#include "engine.h"
#include "flow.h"
#include "pack.h"

namespace py = pybind11;

namespace {

using namespace vitapack;
using Address = std::uintptr_t;

const Kernels* chosen = nullptr;

const Kernels& kernels() {
  if (!chosen) chosen = &kernels_for("");
  return *chosen;
}

template <class T> T* at(Address address) { return reinterpret_cast<T*>(address); }

Type type_of(const std::string& name) {
  if (name == "f32") return Type::f32;
  if (name == "bf16") return Type::bf16;
  if (name == "f16") return Type::f16;
  throw std::invalid_argument("type " + name + ": f32, bf16 or f16");
}

// Blocks of rows times ranges of panels, enough for every thread.
struct Grid {
  std::int64_t rows, block, blocks, panels, range, ranges;
  Grid(std::int64_t m, std::int64_t panel_count, int threads, int tile)
      : rows(m), panels(panel_count) {
    block = std::min<std::int64_t>(kRowBlock, round_up(std::max<std::int64_t>(m, 1), tile));
    blocks = (m + block - 1) / block;
    const std::int64_t wanted = 4 * std::int64_t(threads);
    const std::int64_t split = std::max<std::int64_t>(1, wanted / std::max<std::int64_t>(blocks, 1));
    range = std::max<std::int64_t>(1, (panels + split - 1) / split);
    ranges = (panels + range - 1) / range;
  }
};

void run_linear(const Linear& w, Address x, const std::string& x_type, std::int64_t x_stride,
                std::int64_t m, Address out, const std::string& out_type, std::int64_t out_stride,
                bool gelu, int threads) {
  const Kernels& k = kernels();
  const Type from = type_of(x_type);
  Epilogue e;
  e.out = at<void>(out);
  e.stride = out_stride;
  e.type = type_of(out_type);
  e.gelu = gelu;
  py::gil_scoped_release release;
  if (m == 0 || w.n == 0) return;
  const std::int64_t stride = w.kp + 64, size = std::int64_t(size_of(from));
  // Every thread quantizes the rows that it multiplies, which stay in its L2. Few rows: as many
  // blocks as threads, each of all channels. If that is less than two tiles each, or if all
  // rows of a layer of less than 8 bits fit into L2, so that a panel is expanded once, the channels
  // are divided instead, which costs a phase of its own for the quantization.
  const std::int64_t tiles = (m + k.tile - 1) / k.tile, most = kRowBlock / k.tile;
  const std::int64_t rounds = (tiles + threads * most - 1) / (threads * most);
  const std::int64_t blocks = std::min<std::int64_t>(tiles, rounds * threads);
  const std::int64_t block = (tiles + blocks - 1) / blocks * k.tile;
  const bool expanded_once = w.bits < 8 && threads > 1 && m * w.kp <= 1 << 20;
  const bool by_rows = (tiles >= 2 * threads && !expanded_once) || w.panel_count() == 1;
  const std::int64_t rows = (by_rows ? block : m) + kMaxTile, copies = by_rows ? threads : 1;
  const std::int64_t a_bytes = round_up(rows * stride, 64), sx_bytes = round_up(rows * 4, 64);
  const std::int64_t panel_bytes = kPanel * w.kp;
  const Scratch scratch(std::size_t(copies * (a_bytes + sx_bytes) + threads * panel_bytes));
  auto* base = scratch.as<std::uint8_t>();
  auto* panels = reinterpret_cast<std::int8_t*>(base + copies * (a_bytes + sx_bytes));
  const auto quantize = [&](std::int64_t row, std::int64_t count, std::uint8_t* a, float* sx) {
    k.quantize(at<const char>(x) + row * x_stride * size, from, x_stride, count, w.k, a, stride, sx);
  };
  if (by_rows) {
    parallel(threads, (m + block - 1) / block, [&](std::int64_t unit, int thread) {
      const std::int64_t row = unit * block, count = std::min(block, m - row);
      std::uint8_t* a = base + thread * (a_bytes + sx_bytes);
      float* sx = reinterpret_cast<float*>(a + a_bytes);
      quantize(row, count, a, sx);
      Epilogue own = e;
      own.out = static_cast<char*>(e.out) + row * e.stride * std::int64_t(size_of(e.type));
      k.linear(w, 0, w.panel_count(), a, stride, sx, count, own, panels + thread * panel_bytes);
    });
    return;
  }
  const Grid grid(m, w.panel_count(), threads, k.tile);
  auto* sx = reinterpret_cast<float*>(base + a_bytes);
  parallel(threads, tiles, [&](std::int64_t unit, int) {
    const std::int64_t row = unit * k.tile;
    quantize(row, std::min<std::int64_t>(k.tile, m - row), base + row * stride, sx + row);
  });
  parallel(threads, grid.ranges, [&](std::int64_t unit, int thread) {
    const std::int64_t p = unit * grid.range;
    k.linear(w, p, std::min(p + grid.range, grid.panels), base, stride, sx, m, e,
             panels + thread * panel_bytes);
  });
}

void run_linear_wide(const Linear& w, Address x, const std::string& x_type, std::int64_t x_stride,
                     std::int64_t m, Address out, const std::string& out_type,
                     std::int64_t out_stride, bool bf16, int threads) {
  const Kernels& k = kernels();
  if (bf16 && !k.bf16) throw std::invalid_argument("this instruction set has no bf16 products");
  const Type from = type_of(x_type);
  Epilogue e;
  e.out = at<void>(out);
  e.stride = out_stride;
  e.type = type_of(out_type);
  py::gil_scoped_release release;
  if (m == 0 || w.n == 0) return;
  const Grid grid(m, w.panel_count(), threads, k.tile);
  const std::int64_t stride = w.kp + 32, padded = m + kMaxTile, bytes = bf16 ? 2 : 4;
  const std::int64_t panel_bytes = kPanel * w.kp * (bytes + 1);
  const std::int64_t a_bytes = round_up(padded * stride * bytes, 64);
  const Scratch scratch(std::size_t(a_bytes + panel_bytes * threads));
  auto* a = scratch.as<char>();
  char* panels = a + a_bytes;
  constexpr std::int64_t kPart = 32;
  parallel(threads, (m + kPart - 1) / kPart, [&](std::int64_t unit, int) {
    const std::int64_t r = unit * kPart, rows = std::min(kPart, m - r);
    const char* rows_of_x = at<const char>(x) + r * x_stride * std::int64_t(size_of(from));
    k.widen(rows_of_x, from, x_stride, rows, w.k, bf16, a + r * stride * bytes, stride);
  });
  parallel(threads, grid.blocks * grid.ranges, [&](std::int64_t unit, int thread) {
    const std::int64_t r = unit / grid.ranges * grid.block, p = unit % grid.ranges * grid.range;
    Epilogue own = e;
    own.out = static_cast<char*>(e.out) + r * e.stride * std::int64_t(size_of(e.type));
    k.linear_wide(w, p, std::min(p + grid.range, grid.panels), a + r * stride * bytes, stride, bf16,
                  std::min(grid.block, m - r), own, panels + thread * panel_bytes);
  });
}

// xq (m, k) s8 and sx (m) of rows; with shift and scale (k) of the modulated LayerNorm of rows.
void run_quantize(Address x, const std::string& x_type, std::int64_t x_stride, std::int64_t m,
                  std::int64_t k, Address shift, Address scale, Address xq, Address sx) {
  const Type from = type_of(x_type);
  const Kernels& run = kernels();
  auto* out = at<std::uint8_t>(xq);
  py::gil_scoped_release release;
  if (shift) {
    Buffer work(std::size_t(round_up(k, 16)) * 4);
    run.norm_quantize(at<const float>(x), x_stride, at<const float>(shift), at<const float>(scale),
                      m, k, work.as<float>(), out, k, at<float>(sx));
  } else {
    run.quantize(at<const void>(x), from, x_stride, m, k, out, k, at<float>(sx));
  }
  for (std::int64_t i = 0; i < m * k; ++i) out[i] ^= 128;
}

// The exact int32 product of xq (m, k) s8 with a linear: out (m, n).
void run_accumulate(const Linear& w, Address xq, std::int64_t m, Address out) {
  const Kernels& run = kernels();
  py::gil_scoped_release release;
  Buffer a(std::size_t((m + kMaxTile) * w.kp)), panel(std::size_t(kPanel * w.kp));
  std::vector<std::int32_t> acc(kMaxTile * kPanel);
  for (std::int64_t r = 0; r < m; ++r)
    for (std::int64_t i = 0; i < w.k; ++i)
      a.as<std::uint8_t>()[r * w.kp + i] = at<const std::uint8_t>(xq)[r * w.k + i] ^ 128;
  for (std::int64_t p = 0; p < w.panel_count(); ++p) {
    const std::int8_t* from = run.panel_i8(w, p, panel.as<std::int8_t>());
    for (std::int64_t r = 0; r < m; r += run.tile) {
      run.tile_i8(a.as<std::uint8_t>() + r * w.kp, w.kp, from, w.kp / 4, w.start + p * kPanel,
                  acc.data(), kPanel);
      for (std::int64_t i = r; i < std::min(m, r + run.tile); ++i)
        for (std::int64_t n = 0; n < std::min<std::int64_t>(kPanel, w.n - p * kPanel); ++n)
          at<std::int32_t>(out)[i * w.n + p * kPanel + n] = acc[(i - r) * kPanel + n];
    }
  }
}

// Attention operands that are reused by calls of the same shape.
struct Attention {
  HeadBuffers operands;
  std::int64_t batch, tokens, heads;
  std::vector<RowScratch> own;
  Attention(std::int64_t b, std::int64_t n, std::int64_t h, std::int64_t dim, int threads)
      : operands(b * h, n, n, dim), batch(b), tokens(n), heads(h) {
    for (int t = 0; t < threads; ++t) own.emplace_back(64, 64, dim);
  }
  // qkv (batch, tokens, 3, heads, dim) float32 to out (batch, tokens, heads * dim) float32.
  void run(Address qkv, Address out, Address query_norm, Address key_norm) {
    const Kernels& k = kernels();
    const Heads& to = operands.heads;
    const int threads = int(own.size());
    const std::int64_t width = heads * to.dim, blocks = (tokens + kQueries - 1) / kQueries;
    py::gil_scoped_release release;
    parallel(threads, batch * blocks, [&](std::int64_t unit, int thread) {
      const std::int64_t b = unit / blocks, row = unit % blocks * kQueries;
      const float* rows_of = at<const float>(qkv) + (b * tokens + row) * 3 * width;
      const float* norms[3] = {at<const float>(query_norm), at<const float>(key_norm), nullptr};
      for (std::int64_t h = 0; h < 3 * heads; ++h)
        k.split_head(int(h / heads), rows_of + h * to.dim, 3 * width,
                     std::min<std::int64_t>(kQueries, tokens - row), norms[h / heads], to,
                     b * heads + h % heads, row, own[thread].row);
    });
    parallel(threads, batch * heads * blocks, [&](std::int64_t unit, int thread) {
      const std::int64_t head = unit / blocks, row = unit % blocks * kQueries;
      k.attend(to, head, row, std::min<std::int64_t>(kQueries, tokens - row),
               at<float>(out) + (head / heads * tokens + row) * width + head % heads * to.dim,
               width, own[thread].attend);
    });
  }
};

Stream stream_of(const py::dict& d) {
  Stream s;
  s.token = d["token"].cast<std::int64_t>();
  s.tokens = d["tokens"].cast<std::int64_t>();
  s.modulation = at<const float>(d["modulation"].cast<Address>());
  s.modulation_stride = d["modulation_stride"].cast<std::int64_t>();
  s.qkv = d["qkv"].cast<const Linear*>();
  s.query_norm = at<const float>(d["query_norm"].cast<Address>());
  s.key_norm = at<const float>(d["key_norm"].cast<Address>());
  s.norm_stride = d["norm_stride"].cast<std::int64_t>();
  if (d.contains("proj")) {
    s.proj = d["proj"].cast<const Linear*>();
    s.up = d["up"].cast<const Linear*>();
    s.down = d["down"].cast<const Linear*>();
  }
  return s;
}

Dense dense_of(const py::dict& d) {
  Dense w;
  w.n = d["n"].cast<std::int64_t>();
  w.k = d["k"].cast<std::int64_t>();
  w.weight = at<const void>(d["weight"].cast<Address>());
  w.type = type_of(d["type"].cast<std::string>());
  w.bias = at<const float>(d["bias"].cast<Address>());
  return w;
}

}  // namespace

void bind_int8(py::module_& m) {
  m.def("int8_sets", &instruction_sets, "Instruction sets of this CPU, best first.");
  m.def("int8_use", [](const std::string& name) { chosen = &kernels_for(name); },
        "Chooses an instruction set for all that follows; '' is the best.");
  m.def("int8_set", [] { return std::string(kernels().name); });
  m.def("int8_has_bf16", [] { return kernels().bf16; });
  m.def("int8_bf16_pays", [] { return bf16_pays(kernels()); });
  m.def("int8_peak", [](std::int64_t loops, int threads) {
    const Kernels& k = kernels();
    std::vector<double> done(std::size_t(threads), 0.0);
    py::gil_scoped_release release;
    parallel(threads, threads, [&](std::int64_t unit, int) { done[std::size_t(unit)] = k.peak(loops); });
    double total = 0;
    for (double d : done) total += d;
    return total;
  }, "Runs register-only dot products on every thread; returns the operations done.");

  py::class_<Linear>(m, "Int8Linear")
      .def(py::init([](std::int64_t n, std::int64_t k, int bits, std::int64_t group_size,
                       Address panels, Address group, Address scale, Address bias, Address start) {
             auto w = std::make_unique<Linear>();
             w->n = n;
             w->k = k;
             w->kp = round_up(k, kBlock);
             w->bits = bits;
             w->group_size = group_size;
             w->panels = at<const std::uint8_t>(panels);
             w->group = at<const std::uint8_t>(group);
             w->scale = at<const float>(scale);
             w->bias = at<const float>(bias);
             w->start = at<const std::int32_t>(start);
             return w;
           }));
  m.def("int8_pack_rows", [](Address rows, std::int64_t n, std::int64_t bytes, std::int64_t padded,
                             Address panels, int threads) {
    py::gil_scoped_release release;
    pack_rows(at<const std::uint8_t>(rows), n, bytes, padded, at<std::uint8_t>(panels), threads);
  });
  m.def("int8_unpack_rows", [](Address panels, std::int64_t n, std::int64_t bytes,
                               std::int64_t padded, Address rows, int threads) {
    py::gil_scoped_release release;
    unpack_rows(at<const std::uint8_t>(panels), n, bytes, padded, at<std::uint8_t>(rows), threads);
  });
  m.def("int8_pack_group", [](Address group, std::int64_t n, std::int64_t count, Address out) {
    pack_group(at<const std::uint8_t>(group), n, count, at<std::uint8_t>(out));
  });
  m.def("int8_unpack_group", [](Address packed, std::int64_t n, std::int64_t count, Address out) {
    unpack_group(at<const std::uint8_t>(packed), n, count, at<std::uint8_t>(out));
  });
  m.def("int8_find_start", [](const Linear& w, Address start, int threads) {
    py::gil_scoped_release release;
    find_start(kernels(), w, at<std::int32_t>(start), threads);
  });
  m.def("int8_linear", &run_linear);
  m.def("int8_linear_wide", &run_linear_wide);
  m.def("int8_quantize", &run_quantize);
  m.def("int8_accumulate", &run_accumulate);

  py::class_<Attention>(m, "Int8Attention")
      .def(py::init<std::int64_t, std::int64_t, std::int64_t, std::int64_t, int>())
      .def("run", &Attention::run);

  py::class_<BlockPlan>(m, "BlockPlan")
      .def("bytes", &BlockPlan::bytes)
      .def("seconds", [](const BlockPlan& p) {
             const auto spent = p.seconds();
             py::dict found;
             for (int i = 0; i < kOperations; ++i)
               if (spent[i] > 0) found[kOperationNames[i]] = spent[i];
             return found;
           }, "Seconds of all threads together, by operation, since the plan was made.")
      .def("phase_seconds", &BlockPlan::phase_seconds)
      .def("enter", [](BlockPlan& p, const py::dict& linear, std::int64_t token,
                        std::int64_t tokens, Address x, const std::string& type,
                        std::int64_t stride, std::int64_t batch_stride) {
        const Dense w = dense_of(linear);
        const Type from = type_of(type);
        const Kernels& k = kernels();
        py::gil_scoped_release release;
        p.enter(k, w, {token, tokens}, at<const char>(x), from, stride, batch_stride);
      })
      .def("leave", [](BlockPlan& p, const py::dict& linear, std::int64_t token,
                        std::int64_t tokens, Address shift, Address scale, std::int64_t stride,
                        float epsilon, Address out, const std::string& type) {
        const Dense w = dense_of(linear);
        const Type to = type_of(type);
        const Kernels& k = kernels();
        py::gil_scoped_release release;
        p.leave(k, w, {token, tokens}, at<const float>(shift), at<const float>(scale), stride,
                epsilon, at<char>(out), to);
      })
      .def("tokens", [](BlockPlan& p) { return Address(p.tokens_at(0, 0)); },
           "Address of the residual stream, (batch, tokens, hidden) float32.");

  using Size = std::int64_t;
  py::class_<DitPlan, BlockPlan>(m, "DitPlan")
      .def(py::init<Size, Size, Size, Size, Size, int, Size, Size, float>())
      .def("double_block", [](DitPlan& p, const std::vector<py::dict>& streams) {
        std::vector<Stream> all;
        for (const auto& d : streams) all.push_back(stream_of(d));
        const Kernels& k = kernels();
        py::gil_scoped_release release;
        p.double_block(k, all);
      })
      .def("single_block", [](DitPlan& p, const py::dict& all, const Linear& linear2,
                               std::int64_t first) {
        const Stream s = stream_of(all);
        const Kernels& k = kernels();
        py::gil_scoped_release release;
        p.single_block(k, s, *s.qkv, linear2, first);
      });

  py::class_<FlowPlan, BlockPlan>(m, "FlowPlan")
      .def(py::init<Size, Size, Size, Size, Size, int, Size, Size>())
      .def("expect", &FlowPlan::expect)
      .def("block", [](FlowPlan& p, const py::dict& stream, const py::dict& d, Address given,
                       Size stride, bool constant) {
        const Stream s = stream_of(stream);
        Cross cross;
        cross.shift = at<const float>(d["shift"].cast<Address>());
        cross.scale = at<const float>(d["scale"].cast<Address>());
        cross.q = d["q"].cast<const Linear*>();
        cross.kv = d["kv"].cast<const Linear*>();
        cross.proj = d["proj"].cast<const Linear*>();
        const Kernels& k = kernels();
        py::gil_scoped_release release;
        p.block(k, s, cross, at<const float>(given), stride, constant);
      });
}
