// A DiT's blocks on quantized rows; see int8_dit.cpp.

#pragma once

#include <array>
#include <chrono>
#include <vector>

#include "int8_engine.h"

namespace vitapack {

// Where a thread's time goes, for `benchmarks.cpu --parts breakdown`. Two reads of the clock (50 ns)
// around calls of 30 us and more: always on.
enum Operation { kNorm, kQkv, kSplit, kAttend, kQuantize, kProject, kUp, kDown, kLinear2, kOperations };
constexpr const char* kOperationNames[kOperations] = {
    "layer norm, modulation, quantization", "linear qkv", "q and k norm, quantization of heads",
    "attention", "quantization", "linear proj", "linear up, GELU", "linear down", "linear2"};

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

// What one thread needs for a block of rows.
class RowScratch {
 public:
  RowScratch(std::int64_t widest_input, std::int64_t widest_output, std::int64_t head_dim);
  std::int64_t stride = 0;       // of a
  std::int64_t wide_stride = 0;  // of wide
  std::uint8_t* a = nullptr;     // (kRowBlock + kMaxTile, stride): quantized rows
  float* sx = nullptr;           // (kRowBlock + kMaxTile)
  float* wide = nullptr;         // (kRowBlock, wide_stride): a layer's float output
  float* row = nullptr;          // (widest)
  std::int8_t* panel = nullptr;  // an expanded 4-bit panel
  float* attend = nullptr;
  Laps laps;
  std::size_t bytes() const { return buffer_.bytes(); }

 private:
  Buffer buffer_;
};

// The operands of attention for batch x heads.
class HeadBuffers {
 public:
  // The first `repeated` tokens' keys get steps of their own in attention.
  HeadBuffers(std::int64_t batch_heads, std::int64_t tokens, std::int64_t dim,
              std::int64_t repeated = 0);
  Heads heads;
  std::size_t bytes() const { return buffer_.bytes(); }

 private:
  Buffer buffer_;
};

// One token stream of a block. Modulation is (batch or 1, chunks * hidden) float32.
struct Stream {
  std::int64_t token = 0, tokens = 0;  // where in the joint sequence
  const float* modulation = nullptr;
  std::int64_t modulation_stride = 0;  // 0: the same row for every batch entry
  const Linear* qkv = nullptr;
  const float* query_norm = nullptr;
  const float* key_norm = nullptr;
  const Linear* proj = nullptr;
  const Linear* up = nullptr;
  const Linear* down = nullptr;
};

// All memory of a forward pass beyond the weights, for one shape.
class DitPlan {
 public:
  // Each of the first `repeated` tokens stands for `times` equal ones: as a key of attention it has
  // `times` its weight.
  DitPlan(std::int64_t batch, std::int64_t tokens, std::int64_t hidden, std::int64_t heads,
          std::int64_t mlp, int threads, std::int64_t repeated, float times);
  void double_block(const Kernels& k, const std::vector<Stream>& streams);
  // Tokens before `first` give only their keys and values: nothing reads them after the last block.
  void single_block(const Kernels& k, const Stream& all, const Linear& linear1,
                    const Linear& linear2, std::int64_t first = 0);
  std::size_t bytes() const;
  // Seconds of all threads together by operation since the plan was made, and of the phases as a
  // whole (wall), which waiting for one another makes longer.
  std::array<double, kOperations> seconds() const;
  double phase_seconds() const { return phases_; }
  float* tokens_at(std::int64_t batch, std::int64_t token) const {
    return z_.as<float>() + (batch * tokens_ + token) * hidden_;
  }
  std::int64_t batch() const { return batch_; }
  std::int64_t tokens() const { return tokens_; }
  std::int64_t hidden() const { return hidden_; }

 private:
  struct Rows {
    int stream;
    std::int64_t batch, token, rows;
  };
  std::vector<Rows> row_blocks(const std::vector<Stream>& streams) const;
  void front(const Kernels& k, const Stream& s, const Rows& at, RowScratch& own,
             bool queries = true);
  void split(const Kernels& k, int part, std::int64_t head, const float* x, std::int64_t stride,
             const Rows& at, const float* norm, float* work);
  void attend(const Kernels& k, std::int64_t first = 0);
  template <class F> void phase(std::int64_t units, F&& work);

  std::int64_t batch_, tokens_, hidden_, heads_, mlp_, repeated_;
  float times_log_;
  int threads_;
  Buffer z_;          // (batch, tokens, hidden) float32: the residual stream
  Buffer attention_;  // (batch, tokens, hidden) float32
  HeadBuffers operands_;
  std::vector<RowScratch> scratch_;
  double phases_ = 0;
};

// Rows [from, n) of a linear, starting at the whole panel before `from`: its first
// from % 64 channels belong to the part before.
Linear rows_from(const Linear& w, std::int64_t from);

}  // namespace vitapack
