#include "blocks.h"

#include <cmath>

namespace vitapack {
namespace {

constexpr std::int64_t kLine = 64;
constexpr std::int64_t kRows = kRowBlock + kMaxTile;

// Divides one allocation; without a base it only counts bytes.
struct Carver {
  std::size_t used = 0;
  template <class T> std::size_t take(std::int64_t count) {
    const std::size_t at = used;
    used += std::size_t(round_up(count * std::int64_t(sizeof(T)), kLine));
    return at;
  }
};

}  // namespace

RowScratch::RowScratch(std::int64_t widest_input, std::int64_t widest_float,
                       std::int64_t head_dim) {
  // One more cache line per row: rows 4096 bytes apart would all map to one set of L1.
  stride = round_up(widest_input, kBlock) + kLine;
  wide_stride = round_up(widest_float, kPanel) + 16;
  const std::int64_t dp = round_up(head_dim, kBlock);
  Carver carve;
  const auto at_a = carve.take<std::uint8_t>(
      std::max(kRows * stride, kPanel * wide_stride * std::int64_t(sizeof(float))));
  const auto at_sx = carve.take<float>(kRows);
  const auto at_wide = carve.take<float>(kRowBlock * wide_stride);
  const auto at_row = carve.take<float>(std::max(stride, 4 * dp));
  const auto at_panel = carve.take<std::int8_t>(kPanel * stride);
  const auto at_attend = carve.take<float>(attend_work(dp));
  const auto at_q = carve.take<std::uint8_t>(kRows * dp);
  const auto at_q_scale = carve.take<float>(kRows);
  buffer_ = Buffer(carve.used);
  a = buffer_.as<std::uint8_t>(at_a);
  sx = buffer_.as<float>(at_sx);
  wide = buffer_.as<float>(at_wide);
  row = buffer_.as<float>(at_row);
  panel = buffer_.as<std::int8_t>(at_panel);
  attend = buffer_.as<float>(at_attend);
  q = buffer_.as<std::uint8_t>(at_q);
  q_scale = buffer_.as<float>(at_q_scale);
}

HeadBuffers::HeadBuffers(std::int64_t batch_heads, std::int64_t queries, std::int64_t tokens,
                         std::int64_t dim, std::int64_t repeated) {
  heads.dim = dim;
  heads.dp = round_up(dim, kBlock);
  heads.rows = queries ? queries + kMaxTile : 0;
  heads.first = round_up(repeated, kPanel);
  heads.keys = heads.first + round_up(tokens - repeated, kPanel);
  const std::int64_t rows = batch_heads * heads.rows, keys = batch_heads * heads.keys;
  Carver carve;
  const auto at_q = carve.take<std::uint8_t>(rows * heads.dp);
  const auto at_q_scale = carve.take<float>(rows);
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
  // Keys beyond the tokens never win and add nothing; they are not written again.
  std::fill(heads.v_log, heads.v_log + keys, -1e30f);
}

BlockPlan::BlockPlan(std::int64_t batch, std::int64_t tokens, std::int64_t hidden,
                     std::int64_t heads, std::int64_t mlp, int threads, std::int64_t widest_input,
                     std::int64_t widest_float, std::int64_t repeated, float times)
    : batch_(batch), tokens_(tokens), hidden_(hidden), heads_(heads), mlp_(mlp),
      repeated_(times == 1 ? 0 : repeated), times_log_(std::log2(times)), threads_(threads),
      z_(std::size_t(batch * tokens * hidden) * 4),
      attention_(std::size_t(batch * tokens * hidden) * 4),
      operands_(batch * heads, tokens, tokens, hidden / heads, repeated_) {
  for (int t = 0; t < threads; ++t)
    scratch_.emplace_back(widest_input, widest_float, hidden / heads);
}

std::size_t BlockPlan::bytes() const {
  std::size_t total = z_.bytes() + attention_.bytes() + operands_.bytes();
  for (const auto& own : scratch_) total += own.bytes();
  return total;
}

std::array<double, kOperations> BlockPlan::seconds() const {
  std::array<double, kOperations> total{};
  for (const auto& own : scratch_)
    for (int i = 0; i < kOperations; ++i) total[i] += own.laps.seconds[i];
  return total;
}

std::vector<BlockPlan::Rows> BlockPlan::row_blocks(const std::vector<Span>& spans,
                                                     std::int64_t largest) const {
  std::int64_t total = 0;
  for (const Span& s : spans) total += batch_ * s.tokens;
  // Blocks of up to 192, or fewer rows if threads would have nothing to do; a span's blocks
  // are equal but for whole tiles, so that all threads finish together.
  const std::int64_t share = (total + 4 * threads_ - 1) / (4 * threads_);
  const std::int64_t most = std::min(largest, std::max<std::int64_t>(share, 12));
  std::vector<Rows> found;
  for (int s = 0; s < int(spans.size()); ++s) {
    if (spans[s].tokens == 0) continue;
    const std::int64_t count = (spans[s].tokens + most - 1) / most;
    const std::int64_t equal = (spans[s].tokens + count - 1) / count;
    const std::int64_t block = std::min(largest, round_up(equal, 6));
    for (std::int64_t b = 0; b < batch_; ++b)
      for (std::int64_t t = 0; t < spans[s].tokens; t += block)
        found.push_back({s, b, spans[s].token + t, std::min(block, spans[s].tokens - t)});
  }
  return found;
}

void BlockPlan::enter(const Kernels& k, const Dense& w, const Span& to, const char* x, Type type,
                      std::int64_t stride, std::int64_t batch_stride) {
  const std::int64_t size = std::int64_t(size_of(type)), wide = round_up(w.k, kBlock) + 16;
  // As many rows as fit, so that weights are turned seldom: whole tiles, of 4, 6 or 16.
  const std::int64_t fit = kRowBlock * scratch_[0].wide_stride / wide;
  const auto blocks = row_blocks({to}, fit / 48 * 48);
  phase(std::int64_t(blocks.size()), [&](std::int64_t unit, RowScratch& own) {
    const Rows& at = blocks[unit];
    const std::int64_t row = at.batch * batch_stride + (at.token - to.token) * stride;
    k.widen(x + row * size, type, stride, at.rows, w.k, false, own.wide, wide);
    Epilogue e;
    e.out = tokens_at(at.batch, at.token);
    e.stride = hidden_;
    k.linear_dense(w, own.wide, wide, at.rows, e, reinterpret_cast<float*>(own.a));
    own.laps.lap(kEnds);
  });
}

void BlockPlan::leave(const Kernels& k, const Dense& w, const Span& from, const float* shift,
                      const float* scale, std::int64_t stride, float epsilon, char* out,
                      Type type) {
  const auto blocks = row_blocks({from});
  const std::int64_t size = std::int64_t(size_of(type)), wide = round_up(hidden_, kBlock) + 16;
  phase(std::int64_t(blocks.size()), [&](std::int64_t unit, RowScratch& own) {
    const Rows& at = blocks[unit];
    const std::int64_t modulation = at.batch * stride;
    k.norm(tokens_at(at.batch, at.token), hidden_, shift + modulation, scale + modulation, epsilon,
           at.rows, hidden_, own.wide, wide);
    Epilogue e;
    e.out = out + (at.batch * from.tokens + at.token - from.token) * w.n * size;
    e.stride = w.n;
    e.type = type;
    k.linear_dense(w, own.wide, wide, at.rows, e, reinterpret_cast<float*>(own.a));
    own.laps.lap(kEnds);
  });
}

void BlockPlan::normalize(const Kernels& k, const float* shift, const float* scale, const Rows& at,
                          RowScratch& own) {
  k.norm_quantize(tokens_at(at.batch, at.token), hidden_, shift, scale, at.rows, hidden_, own.row,
                  own.a, own.stride, own.sx);
  own.laps.lap(kNorm);
}

void BlockPlan::front(const Kernels& k, const Stream& s, const Rows& at, RowScratch& own,
                      bool queries) {
  const float* modulation = s.modulation + at.batch * s.modulation_stride;
  normalize(k, modulation, modulation + hidden_, at, own);
  Linear qkv = *s.qkv;
  qkv.n = 3 * hidden_;
  const float* norms[3] = {s.query_norm, s.key_norm, nullptr};
  const std::int64_t begin =
      queries || hidden_ / heads_ % kPanel != 0 ? 0 : hidden_ / kPanel;
  project_heads(k, qkv, begin, at, own, kQkv,
                [&](std::int64_t h, const float* x, std::int64_t stride) {
                  const std::int64_t part = h / heads_, head = h % heads_;
                  const float* norm = norms[part] ? norms[part] + head * s.norm_stride : nullptr;
                  split(k, int(part), at.batch * heads_ + head, x, stride, at, norm, own.row);
                });
}

// Rows of q, k or v of a head to attention's operands. Keys after the repeated ones start at a panel.
void BlockPlan::split(const Kernels& k, int part, std::int64_t head, const float* x,
                      std::int64_t stride, const Rows& at, const float* norm, float* work) {
  const std::int64_t before = std::clamp(repeated_ - at.token, std::int64_t(0), at.rows);
  const std::int64_t skipped = part ? operands_.heads.first - repeated_ : 0;
  if (before) k.split_head(part, x, stride, before, norm, operands_.heads, head, at.token, work);
  if (before < at.rows)
    k.split_head(part, x + before * stride, stride, at.rows - before, norm, operands_.heads, head,
                 at.token + before + skipped, work);
}

void BlockPlan::attend(const Kernels& k, std::int64_t first) {
  const std::int64_t dim = hidden_ / heads_;
  // n equal terms of a softmax equal one whose exponent is log2 n larger. Its contribution may be n
  // times any other, which 8 bits would round to 0 in a common step.
  for (std::int64_t head = 0; head < batch_ * heads_; ++head)
    for (std::int64_t t = 0; t < repeated_; ++t)
      operands_.heads.v_log[head * operands_.heads.keys + t] += times_log_;
  const std::int64_t blocks = (tokens_ - first + kQueries - 1) / kQueries;
  phase(batch_ * heads_ * blocks, [&](std::int64_t unit, RowScratch& own) {
    const std::int64_t head = unit / blocks, row = first + unit % blocks * kQueries;
    const std::int64_t rows = std::min<std::int64_t>(kQueries, tokens_ - row);
    float* out = attention_at(head / heads_, row) + head % heads_ * dim;
    k.attend(operands_.heads, head, row, rows, out, hidden_, own.attend);
    own.laps.lap(kAttend);
  });
}

void BlockPlan::widen(const Kernels& k, const Linear& up, const Rows& at, RowScratch& own) {
  Epilogue e;
  e.out = own.wide;
  e.stride = own.wide_stride;
  e.gelu = true;
  k.linear(up, 0, up.panel_count(), own.a, own.stride, own.sx, at.rows, e, own.panel);
  own.laps.lap(kUp);
}

void BlockPlan::add(const Kernels& k, const Linear& w, const float* gate, const Rows& at,
                    RowScratch& own, Operation what) {
  Epilogue e;
  e.out = tokens_at(at.batch, at.token);
  e.stride = hidden_;
  e.gate = gate;
  k.linear(w, 0, w.panel_count(), own.a, own.stride, own.sx, at.rows, e, own.panel);
  own.laps.lap(what);
}

void BlockPlan::add_attention(const Kernels& k, const Linear& proj, const float* gate,
                              const Rows& at, RowScratch& own) {
  k.quantize(attention_at(at.batch, at.token), Type::f32, hidden_, at.rows, hidden_, own.a,
             own.stride, own.sx);
  own.laps.lap(kQuantize);
  add(k, proj, gate, at, own, kProject);
}

void BlockPlan::add_mlp(const Kernels& k, const Stream& s, const Rows& at, RowScratch& own) {
  const float* modulation = s.modulation + at.batch * s.modulation_stride + 3 * hidden_;
  normalize(k, modulation, modulation + hidden_, at, own);
  widen(k, *s.up, at, own);
  k.quantize(own.wide, Type::f32, own.wide_stride, at.rows, mlp_, own.a, own.stride, own.sx);
  own.laps.lap(kQuantize);
  add(k, *s.down, modulation + 2 * hidden_, at, own, kDown);
}

}  // namespace vitapack
