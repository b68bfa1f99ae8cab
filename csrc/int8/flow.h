// A flow transformer's blocks on quantized rows; see flow.cpp.

#pragma once

#include "blocks.h"

namespace vitapack {

// Cross-attention of a block: (1 + scale) * LayerNorm + shift, then to the condition's tokens.
struct Cross {
  const float* shift = nullptr;
  const float* scale = nullptr;
  const Linear* q = nullptr;
  const Linear* kv = nullptr;
  const Linear* proj = nullptr;
};

class FlowPlan : public BlockPlan {
 public:
  FlowPlan(std::int64_t batch, std::int64_t tokens, std::int64_t hidden, std::int64_t heads,
           std::int64_t mlp, int threads, std::int64_t inputs, std::int64_t condition_channels);
  // Allocates memory for so many condition tokens, if their number has changed.
  void expect(std::int64_t condition_tokens);
  // given (batch or 1, condition tokens, condition channels) float32, or if `constant`
  // (batch or 1, hidden): the constant that cross-attention adds to every token. `stride` floats
  // from one batch entry to the next.
  void block(const Kernels& k, const Stream& s, const Cross& cross, const float* given,
             std::int64_t stride, bool constant);
  std::size_t bytes() const override;

 private:
  void condition_heads(const Kernels& k, const Linear& kv, const float* condition, const Rows& at,
                       RowScratch& own);
  void add_cross(const Kernels& k, const Cross& cross, const Rows& at, RowScratch& own);

  std::int64_t condition_tokens_ = 0, condition_channels_;
  HeadBuffers condition_;  // only keys and values
  Buffer ones_;            // (hidden): cross-attention has no gate
};

}  // namespace vitapack
