// The blocks of the canonical DiT (runtime/networks/dit.py is the readable form), fused for CPUs in the phases
// of blocks.h.
//
// A row's scale is known once all its channels are, so quantizing for the next linear reads the 192
// rows again, mostly out of L2: 2.5 % of a forward. Seeking the largest values in the
// epilogue of the GELU instead was built and dropped: quantization fell by 0.3 % of a forward, and
// the linear took 2.5 % more.
//
// The single block's linear1 is q, k, v and the MLP's first layer in one. The two are computed
// separately, the MLP's after attention: the LayerNorm is done twice (1 % of the block),
// and 31 MB of activations at 3764 tokens are never written.

#include "dit.h"

namespace vitapack {
namespace {

// Rows [from, n) of a linear, starting at the whole panel before `from`: its first
// from % 64 channels belong to the rows before.
Linear rows_from(const Linear& w, std::int64_t from) {
  const std::int64_t panel = from / kPanel, skipped = panel * kPanel;
  Linear part = w;
  part.n = w.n - skipped;
  part.panels += panel * w.panel_bytes();
  part.group += panel * w.groups() * kPanel;
  part.scale += skipped;
  if (w.bias) part.bias += skipped;
  part.start += skipped;
  return part;
}

}  // namespace

DitPlan::DitPlan(std::int64_t batch, std::int64_t tokens, std::int64_t hidden, std::int64_t heads,
                 std::int64_t mlp, int threads, std::int64_t inputs, std::int64_t repeated,
                 float times)
    : BlockPlan(batch, tokens, hidden, heads, mlp, threads, hidden + mlp,
                std::max({3 * hidden, mlp + kPanel, inputs}), repeated, times) {}

void DitPlan::double_block(const Kernels& k, const std::vector<Stream>& streams) {
  const auto blocks = row_blocks({streams.begin(), streams.end()});
  phase(std::int64_t(blocks.size()), [&](std::int64_t unit, RowScratch& own) {
    front(k, streams[blocks[unit].span], blocks[unit], own);
  });
  attend(k);
  phase(std::int64_t(blocks.size()), [&](std::int64_t unit, RowScratch& own) {
    const Rows& at = blocks[unit];
    const Stream& s = streams[at.span];
    const float* modulation = s.modulation + at.batch * s.modulation_stride;
    add_attention(k, *s.proj, modulation + 2 * hidden_, at, own);
    add_mlp(k, s, at, own);
  });
}

void DitPlan::single_block(const Kernels& k, const Stream& all, const Linear& linear1,
                           const Linear& linear2, std::int64_t first) {
  const Span before = {0, first}, read = {first, tokens_ - first};
  const auto fronts = row_blocks({before, read});
  phase(std::int64_t(fronts.size()), [&](std::int64_t unit, RowScratch& own) {
    front(k, all, fronts[unit], own, fronts[unit].span == 1);
  });
  attend(k, first);
  const auto blocks = row_blocks({read});
  const Linear up = rows_from(linear1, 3 * hidden_);
  const std::int64_t skip = 3 * hidden_ % kPanel;
  phase(std::int64_t(blocks.size()), [&](std::int64_t unit, RowScratch& own) {
    const Rows& at = blocks[unit];
    const float* modulation = all.modulation + at.batch * all.modulation_stride;
    normalize(k, modulation, modulation + hidden_, at, own);
    widen(k, up, at, own);
    k.quantize_pair(attention_at(at.batch, at.token), hidden_, hidden_, own.wide + skip,
                    own.wide_stride, mlp_, at.rows, own.a, own.stride, own.sx);
    own.laps.lap(kQuantize);
    add(k, linear2, modulation + 2 * hidden_, at, own, kLinear2);
  });
}

}  // namespace vitapack
