// Shared by the networks' blocks (dit.cpp, flow.cpp): memory, phases, and the steps of rows through
// attention and MLP.
//
// Everything but self-attention acts on tokens alone, so a block of 192 rows runs through ALL of
// it before the next one starts: attention's output is quantized, projected, gated into the
// residual, normalized, modulated, quantized, and passes both linears of the MLP while it lies in
// L2 and L3. A network is then a sequence of two kinds of parallel phases, rows and attention, and no
// activation but the residual stream, attention's operands and its output ever has M rows.
// Weights are read once per 192 rows instead: 8 MB of the MLP in 3.4 ms or more, out of L3.

#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <vector>

#include "engine.h"

namespace vitapack {

// A thread's time by operation, for `benchmarks.cpu --parts breakdown`. Two reads of the clock (50 ns)
// around calls of 30 us and more: always on.
enum Operation {
  kNorm, kQkv, kSplit, kAttend, kQuantize, kProject, kUp, kDown, kLinear2, kCrossQuery, kCrossKeys,
  kCrossAttend, kEnds, kOperations
};
constexpr const char* kOperationNames[kOperations] = {
    "layer norm, modulation, quantization", "linear qkv", "q and k norm, quantization of heads",
    "attention", "quantization", "linear proj", "linear up, GELU", "linear down", "linear2",
    "linear q of cross-attention", "linear k and v of the condition", "cross-attention",
    "first and last linears"};

class Laps {
 public:
  void start() { last_ = std::chrono::steady_clock::now(); }
  void lap(Operation what) {
    const auto now = std::chrono::steady_clock::now();
    seconds[what] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }
  std::array<double, kOperations> seconds{};

 private:
  std::chrono::steady_clock::time_point last_;
};

// Scratch of one thread for a block of rows.
class RowScratch {
 public:
  RowScratch(std::int64_t widest_input, std::int64_t widest_float, std::int64_t head_dim);
  std::int64_t stride = 0;       // of a
  std::int64_t wide_stride = 0;  // of wide
  std::uint8_t* a = nullptr;     // (kRowBlock + kMaxTile, stride): quantized rows; or a float panel
  float* sx = nullptr;           // (kRowBlock + kMaxTile)
  float* wide = nullptr;         // (kRowBlock, wide_stride): a layer's float output, or input
  float* row = nullptr;          // (widest)
  std::int8_t* panel = nullptr;  // an expanded 4-bit panel
  float* attend = nullptr;
  std::uint8_t* q = nullptr;  // one head's queries, if they are used at once: as in Heads
  float* q_scale = nullptr;
  Laps laps;
  std::size_t bytes() const { return buffer_.bytes(); }

 private:
  Buffer buffer_;
};

// The operands of attention for batch x heads: room for `queries` and `tokens` keys of each.
class HeadBuffers {
 public:
  // The first `repeated` tokens' keys get steps of their own in attention.
  HeadBuffers(std::int64_t batch_heads, std::int64_t queries, std::int64_t tokens, std::int64_t dim,
              std::int64_t repeated = 0);
  Heads heads;
  std::size_t bytes() const { return buffer_.bytes(); }

 private:
  Buffer buffer_;
};

// Tokens that share one set of weights.
struct Span {
  std::int64_t token = 0, tokens = 0;  // position in the joint sequence
};

// One token stream of a block. Modulation is (batch or 1, chunks * hidden) float32: shift, scale
// and gate of attention, then of the MLP.
struct Stream : Span {
  const float* modulation = nullptr;
  std::int64_t modulation_stride = 0;  // 0: the same row for every batch entry
  const Linear* qkv = nullptr;
  const float* query_norm = nullptr;
  const float* key_norm = nullptr;
  std::int64_t norm_stride = 0;  // from head to head; 0: all heads have the same norms
  const Linear* proj = nullptr;
  const Linear* up = nullptr;
  const Linear* down = nullptr;
};

// All memory of a forward pass except the weights, for one shape.
class BlockPlan {
 public:
  virtual ~BlockPlan() = default;
  virtual std::size_t bytes() const;
  // The tokens of a span = a linear of x (batch, tokens, k) of any type, with `stride` elements
  // from row to row and `batch_stride` from one batch entry to the next.
  void enter(const Kernels& k, const Dense& w, const Span& to, const char* x, Type type,
             std::int64_t stride, std::int64_t batch_stride);
  // out (batch, tokens, n) of any type = a linear of (1 + scale) * LayerNorm + shift of a span's
  // tokens, with `stride` floats from one batch entry's shift and scale to the next.
  void leave(const Kernels& k, const Dense& w, const Span& from, const float* shift,
             const float* scale, std::int64_t stride, float epsilon, char* out, Type type);
  // Since the plan was made: seconds per operation summed over all threads, and wall seconds of the
  // phases, waiting included.
  std::array<double, kOperations> seconds() const;
  double phase_seconds() const { return phases_; }
  // The residual stream.
  float* tokens_at(std::int64_t batch, std::int64_t token) const {
    return z_.as<float>() + (batch * tokens_ + token) * hidden_;
  }

 protected:
  struct Rows {
    int span;
    std::int64_t batch, token, rows;
  };

  // `widest` quantized and float rows of the network's linears. Each of the first `repeated` tokens
  // counts as `times` equal ones: as a key of attention it has `times` its weight.
  BlockPlan(std::int64_t batch, std::int64_t tokens, std::int64_t hidden, std::int64_t heads,
            std::int64_t mlp, int threads, std::int64_t widest_input, std::int64_t widest_float,
            std::int64_t repeated = 0, float times = 1);
  float* attention_at(std::int64_t batch, std::int64_t token) const {
    return attention_.as<float>() + (batch * tokens_ + token) * hidden_;
  }
  std::vector<Rows> row_blocks(const std::vector<Span>& spans,
                               std::int64_t largest = kRowBlock) const;

  // Steps of a block of rows. Those that end in `own.a` leave quantized rows for the next linear.

  // Modulated norm, then q, k and v as operands of attention.
  void front(const Kernels& k, const Stream& s, const Rows& at, RowScratch& own,
             bool queries = true);
  // (1 + scale) * LayerNorm + shift of the residual stream to own.a.
  void normalize(const Kernels& k, const float* shift, const float* scale, const Rows& at,
                 RowScratch& own);
  // A linear of own.a to own.wide.
  void widen(const Kernels& k, const Linear& up, const Rows& at, RowScratch& own);
  // The residual stream += gate * a linear of own.a.
  void add(const Kernels& k, const Linear& w, const float* gate, const Rows& at, RowScratch& own,
           Operation what);
  // The same of attention's output.
  void add_attention(const Kernels& k, const Linear& proj, const float* gate, const Rows& at,
                     RowScratch& own);
  // The residual stream += gate * the MLP of its modulated norm.
  void add_mlp(const Kernels& k, const Stream& s, const Rows& at, RowScratch& own);
  // use(head, x, stride) for the rows (rows, dim) of each head that a linear of own.a gives, from
  // panel `begin` on: some whole heads at a time, so that their rows stay in L2.
  template <class F>
  void project_heads(const Kernels& k, const Linear& w, std::int64_t begin, const Rows& at,
                     RowScratch& own, Operation what, F&& use) {
    const std::int64_t dim = hidden_ / heads_;  // one head at a time if it is whole panels
    const std::int64_t step = dim % kPanel == 0 ? dim / kPanel : w.panel_count();
    for (std::int64_t panel = begin; panel < w.panel_count(); panel += step) {
      const std::int64_t first = panel * kPanel / dim;
      const std::int64_t last = std::min((panel + step) * kPanel, w.n) / dim;
      Epilogue e;
      e.stride = step * kPanel + 16;
      e.out = own.wide - panel * kPanel;
      k.linear(w, panel, panel + step, own.a, own.stride, own.sx, at.rows, e, own.panel);
      own.laps.lap(what);
      for (std::int64_t h = first; h < last; ++h) use(h, own.wide + (h - first) * dim, e.stride);
      own.laps.lap(kSplit);
    }
  }

  // A phase: self-attention of the tokens from `first` on to all.
  void attend(const Kernels& k, std::int64_t first = 0);
  // A parallel phase: work(unit, own scratch) for every unit.
  template <class F> void phase(std::int64_t units, F&& work) {
    const auto begin = std::chrono::steady_clock::now();
    parallel(threads_, units, [&](std::int64_t unit, int thread) {
      scratch_[thread].laps.start();
      work(unit, scratch_[thread]);
    });
    phases_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

  std::int64_t batch_, tokens_, hidden_, heads_, mlp_, repeated_;
  float times_log_;
  int threads_;
  Buffer z_;          // (batch, tokens, hidden) float32: the residual stream
  Buffer attention_;  // (batch, tokens, hidden) float32
  HeadBuffers operands_;
  std::vector<RowScratch> scratch_;
  double phases_ = 0;

 private:
  void split(const Kernels& k, int part, std::int64_t head, const float* x, std::int64_t stride,
             const Rows& at, const float* norm, float* work);
};

}  // namespace vitapack
