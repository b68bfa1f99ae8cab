// The blocks of the canonical DiT (runtime/dit.py is the readable form), fused for CPUs.
//
// Everything but attention acts on tokens alone, so a block of 192 rows runs through ALL of
// it before the next one starts: attention's output is quantized, projected, gated into the
// residual, normalized, modulated, quantized, and passes both linears of the MLP while it lies in
// L2 and L3. A network is then a sequence of two kinds of parallel phases, rows and attention, and no
// activation but the residual stream, attention's operands and its output ever has M rows.
// Weights are read once per 192 rows instead: 8 MB of the MLP in 3.4 ms or more, out of L3.
//
// The single block's linear1 is q, k, v and the MLP's first layer in one. Its two parts are
// computed apart, the MLP's after attention: the LayerNorm is done twice (1 % of the block),
// and 31 MB of activations at 3764 tokens are never written.

#include "int8_dit.h"

#include <algorithm>
#include <cmath>

namespace vitapack {
namespace {

constexpr std::int64_t kLine = 64;
constexpr std::int64_t kRows = kRowBlock + kMaxTile;

// Hands out pieces of one allocation; with no base it only counts.
struct Carver {
  std::size_t used = 0;
  template <class T> std::size_t take(std::int64_t count) {
    const std::size_t at = used;
    used += std::size_t(round_up(count * std::int64_t(sizeof(T)), kLine));
    return at;
  }
};

}  // namespace

RowScratch::RowScratch(std::int64_t widest_input, std::int64_t widest_output,
                       std::int64_t head_dim) {
  // One more cache line a row: rows 4096 bytes apart would all fall into one set of L1.
  stride = round_up(widest_input, kBlock) + kLine;
  wide_stride = round_up(widest_output, kPanel) + 16;
  Carver carve;
  const auto at_a = carve.take<std::uint8_t>(kRows * stride);
  const auto at_sx = carve.take<float>(kRows);
  const auto at_wide = carve.take<float>(kRowBlock * wide_stride);
  const auto at_row = carve.take<float>(std::max(stride, 4 * round_up(head_dim, kBlock)));
  const auto at_panel = carve.take<std::int8_t>(kPanel * stride);
  const auto at_attend = carve.take<float>(attend_work(round_up(head_dim, kBlock)));
  buffer_ = Buffer(carve.used);
  a = buffer_.as<std::uint8_t>(at_a);
  sx = buffer_.as<float>(at_sx);
  wide = buffer_.as<float>(at_wide);
  row = buffer_.as<float>(at_row);
  panel = buffer_.as<std::int8_t>(at_panel);
  attend = buffer_.as<float>(at_attend);
}

HeadBuffers::HeadBuffers(std::int64_t batch_heads, std::int64_t tokens, std::int64_t dim,
                         std::int64_t repeated) {
  heads.tokens = tokens;
  heads.dim = dim;
  heads.dp = round_up(dim, kBlock);
  heads.rows = tokens + kMaxTile;
  heads.first = round_up(repeated, kPanel);
  heads.keys = heads.first + round_up(tokens - repeated, kPanel);
  const std::int64_t queries = batch_heads * heads.rows, keys = batch_heads * heads.keys;
  Carver carve;
  const auto at_q = carve.take<std::uint8_t>(queries * heads.dp);
  const auto at_q_scale = carve.take<float>(queries);
  const auto at_k = carve.take<std::int8_t>(keys * heads.dp);
  const auto at_k_start = carve.take<std::int32_t>(keys);
  const auto at_k_scale = carve.take<float>(keys);
  const auto at_v = carve.take<std::int8_t>(keys * heads.dp);
  const auto at_v_log = carve.take<float>(keys);
  const auto at_v_inverse = carve.take<float>(keys);
  buffer_ = Buffer(carve.used);
  heads.q = buffer_.as<std::uint8_t>(at_q);
  heads.q_scale = buffer_.as<float>(at_q_scale);
  heads.k = buffer_.as<std::int8_t>(at_k);
  heads.k_start = buffer_.as<std::int32_t>(at_k_start);
  heads.k_scale = buffer_.as<float>(at_k_scale);
  heads.v = buffer_.as<std::int8_t>(at_v);
  heads.v_log = buffer_.as<float>(at_v_log);
  heads.v_inverse = buffer_.as<float>(at_v_inverse);
  // Keys beyond the tokens never win and add nothing; no one writes them later.
  std::fill(heads.v_log, heads.v_log + keys, -1e30f);
}

Linear rows_from(const Linear& w, std::int64_t from) {
  const std::int64_t panel = from / kPanel, skipped = panel * kPanel;
  Linear part = w;
  part.n = w.n - skipped;
  part.panels += panel * kPanel * w.kp / (w.bits == 4 ? 2 : 1);
  if (w.bits == 4) part.group += panel * w.groups() * kPanel;
  part.scale += skipped;
  if (w.bias) part.bias += skipped;
  part.start += skipped;
  return part;
}

DitPlan::DitPlan(std::int64_t batch, std::int64_t tokens, std::int64_t hidden, std::int64_t heads,
                 std::int64_t mlp, int threads, std::int64_t repeated, float times)
    : batch_(batch), tokens_(tokens), hidden_(hidden), heads_(heads), mlp_(mlp),
      repeated_(times == 1 ? 0 : repeated), times_log_(std::log2(times)), threads_(threads),
      z_(std::size_t(batch * tokens * hidden) * 4),
      attention_(std::size_t(batch * tokens * hidden) * 4),
      operands_(batch * heads, tokens, hidden / heads, repeated_) {
  for (int t = 0; t < threads; ++t)
    scratch_.emplace_back(hidden + mlp, std::max(3 * hidden, mlp + kPanel), hidden / heads);
}

std::size_t DitPlan::bytes() const {
  std::size_t total = z_.bytes() + attention_.bytes() + operands_.bytes();
  for (const auto& own : scratch_) total += own.bytes();
  return total;
}

std::array<double, kOperations> DitPlan::seconds() const {
  std::array<double, kOperations> total{};
  for (const auto& own : scratch_)
    for (int i = 0; i < kOperations; ++i) total[i] += own.laps.seconds[i];
  return total;
}

// A parallel phase: work(unit, own scratch) for every unit.
template <class F> void DitPlan::phase(std::int64_t units, F&& work) {
  const auto begin = std::chrono::steady_clock::now();
  parallel(threads_, units, [&](std::int64_t unit, int thread) {
    scratch_[thread].laps.start();
    work(unit, scratch_[thread]);
  });
  phases_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

std::vector<DitPlan::Rows> DitPlan::row_blocks(const std::vector<Stream>& streams) const {
  std::int64_t total = 0;
  for (const Stream& s : streams) total += batch_ * s.tokens;
  // Blocks of up to 192, or fewer rows where threads would have nothing to do; a stream's blocks
  // are equal but for whole tiles, so that all threads finish together.
  const std::int64_t share = (total + 4 * threads_ - 1) / (4 * threads_);
  const std::int64_t most = std::min<std::int64_t>(kRowBlock, std::max<std::int64_t>(share, 12));
  std::vector<Rows> found;
  for (int s = 0; s < int(streams.size()); ++s) {
    if (streams[s].tokens == 0) continue;
    const std::int64_t count = (streams[s].tokens + most - 1) / most;
    const std::int64_t equal = (streams[s].tokens + count - 1) / count;
    const std::int64_t block = std::min<std::int64_t>(kRowBlock, round_up(equal, 6));
    for (std::int64_t b = 0; b < batch_; ++b)
      for (std::int64_t t = 0; t < streams[s].tokens; t += block)
        found.push_back({s, b, streams[s].token + t, std::min(block, streams[s].tokens - t)});
  }
  return found;
}

namespace {

// A linear on the rows that lie quantized in a thread's scratch.
void linear(const Kernels& k, const Linear& w, RowScratch& own, std::int64_t rows,
            const Epilogue& e, Operation what) {
  k.linear(w, 0, w.panel_count(), own.a, own.stride, own.sx, rows, e, own.panel);
  own.laps.lap(what);
}

}  // namespace

// Modulated norm, then q, k and v in the form that attention takes.
void DitPlan::front(const Kernels& k, const Stream& s, const Rows& at, RowScratch& own,
                    bool queries) {
  const float* modulation = s.modulation + at.batch * s.modulation_stride;
  k.norm_quantize(tokens_at(at.batch, at.token), hidden_, modulation, modulation + hidden_, at.rows,
                  hidden_, own.row, own.a, own.stride, own.sx);
  own.laps.lap(kNorm);
  Linear qkv = *s.qkv;
  qkv.n = 3 * hidden_;
  const std::int64_t dim = hidden_ / heads_;
  const float* norms[3] = {s.query_norm, s.key_norm, nullptr};
  // Some whole heads at a time, so that their rows stay in L2: one where a head is a panel.
  const std::int64_t step = dim % kPanel == 0 ? dim / kPanel : qkv.panel_count();
  const std::int64_t begin = queries || dim % kPanel != 0 ? 0 : hidden_ / kPanel;
  for (std::int64_t panel = begin; panel < qkv.panel_count(); panel += step) {
    const std::int64_t first = panel * kPanel / dim;
    const std::int64_t last = std::min((panel + step) * kPanel / dim, 3 * heads_);
    Epilogue e;
    e.stride = step * kPanel + 16;
    e.out = own.wide - panel * kPanel;
    k.linear(qkv, panel, panel + step, own.a, own.stride, own.sx, at.rows, e, own.panel);
    own.laps.lap(kQkv);
    for (std::int64_t h = first; h < last; ++h)
      split(k, int(h / heads_), at.batch * heads_ + h % heads_, own.wide + (h - first) * dim,
            e.stride, at, norms[h / heads_], own.row);
    own.laps.lap(kSplit);
  }
}

// Rows of a part of a head to attention's operands. Keys after the repeated ones start at a panel.
void DitPlan::split(const Kernels& k, int part, std::int64_t head, const float* x,
                    std::int64_t stride, const Rows& at, const float* norm, float* work) {
  const std::int64_t before = std::clamp(repeated_ - at.token, std::int64_t(0), at.rows);
  const std::int64_t skipped = part ? operands_.heads.first - repeated_ : 0;
  if (before) k.split_head(part, x, stride, before, norm, operands_.heads, head, at.token, work);
  if (before < at.rows)
    k.split_head(part, x + before * stride, stride, at.rows - before, norm, operands_.heads, head,
                 at.token + before + skipped, work);
}

void DitPlan::attend(const Kernels& k, std::int64_t first) {
  const std::int64_t dim = hidden_ / heads_;
  // n equal terms of a softmax are one whose exponent is log2 n larger. Its contribution may be n
  // times all others', which 8 bits would round to nothing in a step together.
  for (std::int64_t head = 0; head < batch_ * heads_; ++head)
    for (std::int64_t t = 0; t < repeated_; ++t)
      operands_.heads.v_log[head * operands_.heads.keys + t] += times_log_;
  const std::int64_t blocks = (tokens_ - first + kQueries - 1) / kQueries;
  phase(batch_ * heads_ * blocks, [&](std::int64_t unit, RowScratch& own) {
    const std::int64_t head = unit / blocks, row = first + unit % blocks * kQueries;
    const std::int64_t rows = std::min<std::int64_t>(kQueries, tokens_ - row);
    float* out = attention_.as<float>() + (head / heads_ * tokens_ + row) * hidden_ +
                 head % heads_ * dim;
    k.attend(operands_.heads, head, row, rows, out, hidden_, own.attend);
    own.laps.lap(kAttend);
  });
}

void DitPlan::double_block(const Kernels& k, const std::vector<Stream>& streams) {
  const auto blocks = row_blocks(streams);
  phase(std::int64_t(blocks.size()), [&](std::int64_t unit, RowScratch& own) {
    front(k, streams[blocks[unit].stream], blocks[unit], own);
  });
  attend(k);
  phase(std::int64_t(blocks.size()), [&](std::int64_t unit, RowScratch& own) {
    const Rows& at = blocks[unit];
    const Stream& s = streams[at.stream];
    // shift1, scale1, gate1, shift2, scale2, gate2
    const float* modulation = s.modulation + at.batch * s.modulation_stride;
    float* z = tokens_at(at.batch, at.token);
    const float* attention =
        attention_.as<float>() + (at.batch * tokens_ + at.token) * hidden_;
    Epilogue residual;
    residual.out = z;
    residual.stride = hidden_;
    residual.gate = modulation + 2 * hidden_;
    k.quantize(attention, Type::f32, hidden_, at.rows, hidden_, own.a, own.stride, own.sx);
    own.laps.lap(kQuantize);
    linear(k, *s.proj, own, at.rows, residual, kProject);
    k.norm_quantize(z, hidden_, modulation + 3 * hidden_, modulation + 4 * hidden_, at.rows,
                    hidden_, own.row, own.a, own.stride, own.sx);
    own.laps.lap(kNorm);
    Epilogue up;
    up.out = own.wide;
    up.stride = own.wide_stride;
    up.gelu = true;
    linear(k, *s.up, own, at.rows, up, kUp);
    k.quantize(own.wide, Type::f32, own.wide_stride, at.rows, mlp_, own.a, own.stride, own.sx);
    own.laps.lap(kQuantize);
    residual.gate = modulation + 5 * hidden_;
    linear(k, *s.down, own, at.rows, residual, kDown);
  });
}

void DitPlan::single_block(const Kernels& k, const Stream& all, const Linear& linear1,
                           const Linear& linear2, std::int64_t first) {
  Stream before = all, read = all;
  before.tokens = first;
  read.token = first;
  read.tokens = tokens_ - first;
  const auto fronts = row_blocks({before, read});
  phase(std::int64_t(fronts.size()), [&](std::int64_t unit, RowScratch& own) {
    front(k, all, fronts[unit], own, fronts[unit].stream == 1);
  });
  attend(k, first);
  const auto blocks = row_blocks({read});
  const Linear up = rows_from(linear1, 3 * hidden_);
  const std::int64_t skip = 3 * hidden_ % kPanel;
  phase(std::int64_t(blocks.size()), [&](std::int64_t unit, RowScratch& own) {
    const Rows& at = blocks[unit];
    const float* modulation = all.modulation + at.batch * all.modulation_stride;
    float* z = tokens_at(at.batch, at.token);
    const float* attention =
        attention_.as<float>() + (at.batch * tokens_ + at.token) * hidden_;
    k.norm_quantize(z, hidden_, modulation, modulation + hidden_, at.rows, hidden_, own.row, own.a,
                    own.stride, own.sx);
    own.laps.lap(kNorm);
    Epilogue gelu;
    gelu.out = own.wide;
    gelu.stride = own.wide_stride;
    gelu.gelu = true;
    linear(k, up, own, at.rows, gelu, kUp);
    k.quantize_pair(attention, hidden_, hidden_, own.wide + skip, own.wide_stride, mlp_, at.rows,
                    own.a, own.stride, own.sx);
    own.laps.lap(kQuantize);
    Epilogue residual;
    residual.out = z;
    residual.stride = hidden_;
    residual.gate = modulation + 2 * hidden_;
    linear(k, linear2, own, at.rows, residual, kLinear2);
  });
}

}  // namespace vitapack
