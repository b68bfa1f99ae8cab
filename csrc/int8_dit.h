// A DiT's blocks on quantized rows; see int8_dit.cpp.

#pragma once

#include <vector>

#include "int8_engine.h"

namespace vitapack {

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
  std::size_t bytes() const { return buffer_.bytes(); }

 private:
  Buffer buffer_;
};

// The operands of attention for batch x heads.
class HeadBuffers {
 public:
  HeadBuffers(std::int64_t batch_heads, std::int64_t tokens, std::int64_t dim);
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
  DitPlan(std::int64_t batch, std::int64_t tokens, std::int64_t hidden, std::int64_t heads,
          std::int64_t mlp, int threads);
  void double_block(const Kernels& k, const std::vector<Stream>& streams);
  void single_block(const Kernels& k, const Stream& all, const Linear& linear1,
                    const Linear& linear2);
  std::size_t bytes() const;
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
  void front(const Kernels& k, const Stream& s, const Rows& at, RowScratch& own);
  void attend(const Kernels& k);

  std::int64_t batch_, tokens_, hidden_, heads_, mlp_;
  int threads_;
  Buffer z_;          // (batch, tokens, hidden) float32: the residual stream
  Buffer attention_;  // (batch, tokens, hidden) float32
  HeadBuffers operands_;
  std::vector<RowScratch> scratch_;
};

// Rows [from, n) of a linear, starting at the whole panel before `from`: its first
// from % 64 channels belong to the part before.
Linear rows_from(const Linear& w, std::int64_t from);

}  // namespace vitapack
