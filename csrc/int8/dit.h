// A DiT's blocks on quantized rows; see dit.cpp.

#pragma once

#include "blocks.h"

namespace vitapack {

class DitPlan : public BlockPlan {
 public:
  DitPlan(std::int64_t batch, std::int64_t tokens, std::int64_t hidden, std::int64_t heads,
          std::int64_t mlp, int threads, std::int64_t inputs, std::int64_t repeated, float times);
  void double_block(const Kernels& k, const std::vector<Stream>& streams);
  // Tokens before `first` give only their keys and values: nothing reads them after the last block.
  void single_block(const Kernels& k, const Stream& all, const Linear& linear1,
                    const Linear& linear2, std::int64_t first = 0);
};

}  // namespace vitapack
