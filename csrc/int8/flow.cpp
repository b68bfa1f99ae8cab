// The blocks of TRELLIS' flow transformer (runtime/networks/flow.py is the readable form), fused for CPUs
// in the phases of blocks.h.
//
// The condition's keys and values do not depend on the tokens, so cross-attention acts on tokens
// alone too: it is part of the chain that 192 rows run through, a head's queries after the other,
// and only its keys and values (2.9 MB at 1374 tokens) are kept. They are computed in the phase of
// q, k and v.

#include "flow.h"

namespace vitapack {
namespace {

// q and k are divided by their length, which the readable form keeps above 1e-12.
constexpr float kLeastSquare = 1e-24f;

}  // namespace

FlowPlan::FlowPlan(std::int64_t batch, std::int64_t tokens, std::int64_t hidden, std::int64_t heads,
                   std::int64_t mlp, int threads, std::int64_t inputs,
                   std::int64_t condition_channels)
    : BlockPlan(batch, tokens, hidden, heads, mlp, threads,
                std::max({hidden, mlp, condition_channels}), std::max({3 * hidden, mlp, inputs})),
      condition_channels_(condition_channels), condition_(batch * heads, 0, 0, hidden / heads),
      ones_(std::size_t(round_up(hidden, kPanel)) * 4) {
  operands_.heads.epsilon = kLeastSquare;
  std::fill_n(ones_.as<float>(), hidden, 1.0f);
}

void FlowPlan::expect(std::int64_t condition_tokens) {
  if (condition_tokens == condition_tokens_) return;
  condition_ = HeadBuffers(batch_ * heads_, 0, condition_tokens, hidden_ / heads_);
  condition_tokens_ = condition_tokens;
}

std::size_t FlowPlan::bytes() const {
  return BlockPlan::bytes() + condition_.bytes() + ones_.bytes();
}

// Keys and values of a range of condition tokens.
void FlowPlan::condition_heads(const Kernels& k, const Linear& kv, const float* condition,
                               const Rows& at, RowScratch& own) {
  k.quantize(condition + at.token * condition_channels_, Type::f32, condition_channels_, at.rows,
             condition_channels_, own.a, own.stride, own.sx);
  own.laps.lap(kQuantize);
  project_heads(k, kv, 0, at, own, kCrossKeys,
                [&](std::int64_t h, const float* x, std::int64_t stride) {
                  k.split_head(1 + int(h / heads_), x, stride, at.rows, nullptr, condition_.heads,
                               at.batch * heads_ + h % heads_, at.token, own.row);
                });
}

void FlowPlan::add_cross(const Kernels& k, const Cross& cross, const Rows& at, RowScratch& own) {
  normalize(k, cross.shift, cross.scale, at, own);
  const std::int64_t dim = hidden_ / heads_;
  float* out = attention_at(at.batch, at.token);  // self-attention's is used up
  project_heads(k, *cross.q, 0, at, own, kCrossQuery,
                [&](std::int64_t h, const float* x, std::int64_t stride) {
                  Heads one = condition_.heads.one(at.batch * heads_ + h);
                  one.q = own.q;
                  one.q_scale = own.q_scale;
                  k.split_head(0, x, stride, at.rows, nullptr, one, 0, 0, own.row);
                  own.laps.lap(kSplit);
                  for (std::int64_t row = 0; row < at.rows; row += kQueries)
                    k.attend(one, 0, row, std::min<std::int64_t>(kQueries, at.rows - row),
                             out + row * hidden_ + h * dim, hidden_, own.attend);
                  own.laps.lap(kCrossAttend);
                });
  add_attention(k, *cross.proj, ones_.as<float>(), at, own);
}

void FlowPlan::block(const Kernels& k, const Stream& s, const Cross& cross, const float* given,
                     std::int64_t stride, bool constant) {
  const auto fronts = row_blocks({s, {0, constant ? 0 : condition_tokens_}});
  phase(std::int64_t(fronts.size()), [&](std::int64_t unit, RowScratch& own) {
    const Rows& at = fronts[unit];
    if (at.span == 0)
      front(k, s, at, own);
    else
      condition_heads(k, *cross.kv, given + at.batch * stride, at, own);
  });
  attend(k);
  const auto blocks = row_blocks({s});
  phase(std::int64_t(blocks.size()), [&](std::int64_t unit, RowScratch& own) {
    const Rows& at = blocks[unit];
    const float* modulation = s.modulation + at.batch * s.modulation_stride;
    add_attention(k, *s.proj, modulation + 2 * hidden_, at, own);
    if (constant) {
      const float* value = given + at.batch * stride;
      for (std::int64_t r = 0; r < at.rows; ++r) {
        float* z = tokens_at(at.batch, at.token + r);
        for (std::int64_t i = 0; i < hidden_; ++i) z[i] += value[i];
      }
    } else {
      add_cross(k, cross, at, own);
    }
    add_mlp(k, s, at, own);
  });
}

}  // namespace vitapack
