// The int8 engine for CPUs: types shared by its files. blocks.h explains its purpose.
//
// One weight layout serves every instruction set: panels of 64 output channels, within a panel
// steps of 4 inputs, within a step 64 x 4 bytes. One step of one channel is the 32 bits that
// vpdpbusd multiplies at once. 4-bit weights keep their nibbles in the same order (a step holds
// inputs k..k+3 in the low and k+32..k+35 in the high nibbles) and expand into a scratch panel.
//
// Activations are u8 (the int8 value + 128), weights s8: vpdpbusd takes unsigned times signed.
// The surplus 128 * sum_k w[n, k] depends on the channel alone, so accumulators START at its
// negative and end as the exact s8 x s8 product.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define VITAPACK_X86 1
#endif

namespace vitapack {

constexpr int kPanel = 64;      // output channels of a panel
constexpr int kBlock = 64;      // inputs are padded to whole blocks
constexpr int kMaxTile = 16;    // rows of the largest tile (AMX); 6 for AVX-512
constexpr int kKeys = 256;      // keys of one step of the online softmax, at most
constexpr int kQueries = 96;    // queries processed together: their sums are 24 KB
constexpr int kRowBlock = 192;  // rows that run through a chain of layers together, see blocks.h

inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// A packed weight (N, K). All arrays but the panels are padded to whole panels with zeros.
struct Linear {
  std::int64_t n = 0, k = 0, kp = 0;     // kp: k rounded up to 64
  int bits = 8;
  std::int64_t group_size = 0;           // 4 bits: 32, 64 or 128; 8: 0, there are no groups
  const std::uint8_t* panels = nullptr;  // 8 bits: (N/64, kp/4, 64, 4) s8; 4 bits: half of it
  const std::uint8_t* group = nullptr;   // 4 bits: (N/64, groups, 64): s - 1 and z
  const float* scale = nullptr;          // (N)
  const float* bias = nullptr;           // (N) or null
  const std::int32_t* start = nullptr;   // (N): -128 * sum_k w[n, k]

  std::int64_t panel_count() const { return round_up(n, kPanel) / kPanel; }
  std::int64_t groups() const { return group_size ? (kp + group_size - 1) / group_size : 0; }
  std::int64_t panel_bytes() const { return bits * kPanel * kp / 8; }
};

enum class Type { f32, bf16, f16 };

inline std::size_t size_of(Type t) { return t == Type::f32 ? 4 : 2; }

// A linear that is kept in float: weight (N, K) as torch holds it, row after row.
struct Dense {
  std::int64_t n = 0, k = 0;
  const void* weight = nullptr;
  Type type = Type::f32;
  const float* bias = nullptr;  // (N) or null

  std::int64_t panel_count() const { return round_up(n, kPanel) / kPanel; }
};

// The epilogue applied to acc * sx[row] * scale[channel] + bias[channel].
struct Epilogue {
  void* out = nullptr;
  std::int64_t stride = 0;      // of out, in elements
  Type type = Type::f32;
  bool gelu = false;            // tanh form
  const float* gate = nullptr;  // (N): out (float) += gate * value instead of out = value
};

// Rows of q, k and v of one (batch, head), quantized for attention; see heads.h.
struct Heads {
  std::int64_t dim = 0;         // of a head
  std::int64_t dp = 0;          // dim rounded up to 64
  std::int64_t rows = 0;        // queries + room for a whole tile
  std::int64_t keys = 0;        // tokens rounded up to 64, and up to 63 after the first ones
  std::int64_t first = 0;       // keys before this one are a step of attention by themselves
  float epsilon = 1e-6f;        // of the RMSNorm of q and k
  // Per (batch, head), one after another:
  std::uint8_t* q = nullptr;    // (rows, dp) u8
  float* q_scale = nullptr;     // (rows), log2(e) / sqrt(dim) included
  std::int8_t* k = nullptr;     // (keys/64, dp/4, 64, 4)
  std::int32_t* k_start = nullptr;  // (keys): -128 * sum_d k
  float* k_scale = nullptr;     // (keys), 0 beyond the tokens
  std::int8_t* v = nullptr;     // (dp/64, keys/4, 64, 4): contracted over keys, see key_group
  float* v_log = nullptr;       // (keys): log2 of v's scale, -1e30 beyond the tokens
  float* v_inverse = nullptr;   // (keys): 1 / v's scale, 0 beyond the tokens

  // One (batch, head), as the only one.
  Heads one(std::int64_t head) const {
    Heads h = *this;
    h.q += head * rows * dp, h.q_scale += head * rows;
    h.k += head * keys * dp, h.k_start += head * keys, h.k_scale += head * keys;
    h.v += head * keys * dp, h.v_log += head * keys, h.v_inverse += head * keys;
    return h;
  }
};

// Everything that differs between instruction sets. A function works for one thread.
struct Kernels {
  const char* name;
  int tile;          // rows of a GEMM tile: A must have room for whole tiles
  bool bf16;         // dot products of bf16 in hardware
  // x (rows, k) of a type to u8 (rows, stride) and sx (rows): reference.py quantize_activations.
  void (*quantize)(const void* x, Type type, std::int64_t x_stride, std::int64_t rows,
                   std::int64_t k, std::uint8_t* out, std::int64_t stride, float* sx);
  // The same for the rows [a | b], float32: a's ka columns and b's kb share one scale.
  void (*quantize_pair)(const float* a, std::int64_t a_stride, std::int64_t ka, const float* b,
                        std::int64_t b_stride, std::int64_t kb, std::int64_t rows,
                        std::uint8_t* out, std::int64_t stride, float* sx);
  // (1 + scale) * LayerNorm(x) + shift, float32.
  void (*norm)(const float* x, std::int64_t x_stride, const float* shift, const float* scale,
               float epsilon, std::int64_t rows, std::int64_t k, float* out, std::int64_t stride);
  // The same with epsilon 1e-6, quantized. `work`: k floats.
  void (*norm_quantize)(const float* x, std::int64_t x_stride, const float* shift,
                        const float* scale, std::int64_t rows, std::int64_t k, float* work,
                        std::uint8_t* out, std::int64_t stride, float* sx);
  // Panels [first, last) of a linear on quantized rows. `work`: 64 * kp bytes.
  void (*linear)(const Linear& w, std::int64_t first, std::int64_t last, const std::uint8_t* a,
                 std::int64_t stride, const float* sx, std::int64_t rows, const Epilogue& e,
                 std::int8_t* work);
  // Weight-only: rows of float32 (or of bf16 where `bf16`), computed in that precision.
  // `work`: 64 * kp * 4 bytes.
  void (*linear_wide)(const Linear& w, std::int64_t first, std::int64_t last, const void* a,
                      std::int64_t stride, bool bf16, std::int64_t rows, const Epilogue& e,
                      void* work);
  // A linear on rows of float32, in float32. `work`: 64 * k floats.
  void (*linear_dense)(const Dense& w, const float* a, std::int64_t stride, std::int64_t rows,
                       const Epilogue& e, float* work);
  // Rows of any type to float32, or rounded to bf16; both (rows, stride) padded with zeros to kp.
  void (*widen)(const void* x, Type type, std::int64_t x_stride, std::int64_t rows, std::int64_t k,
                bool bf16, void* out, std::int64_t stride);
  // Rows of part 0 (q), 1 (k) or 2 (v) of a head, (rows, dim) float32, to the operands of attention
  // as tokens token.. of `head` (of batch x heads). `norm`: an RMSNorm weight (dim) or null.
  // `work`: 4 * dp floats.
  void (*split_head)(int part, const float* x, std::int64_t stride, std::int64_t rows,
                     const float* norm, const Heads& to, std::int64_t head, std::int64_t token,
                     float* work);
  // Rows [row, row + rows) of one head, rows <= kQueries; out (rows, stride) float32.
  void (*attend)(const Heads& h, std::int64_t head, std::int64_t row, std::int64_t rows, float* out,
                 std::int64_t stride, float* work);
  // A panel as s8 (kp/4, 64, 4): in place, or expanded to `work`, 64 * kp bytes.
  const std::int8_t* (*panel_i8)(const Linear& w, std::int64_t panel, std::int8_t* work);
  // A single int8 tile: acc (tile, 64) = start + a * panel; used to measure the peak.
  void (*tile_i8)(const std::uint8_t* a, std::int64_t stride, const std::int8_t* panel,
                  std::int64_t steps, const std::int32_t* start, std::int32_t* acc,
                  std::int64_t acc_stride);
  // A tile of linear_wide: acc (tile, 64) = a (tile, k) * panel; timed by bf16_pays.
  void (*tile_wide)(const char* a, const char* panel, std::int64_t k, bool bf16, float* acc);
  double (*peak)(std::int64_t loops);  // operations done by register-only dot products
};

// Floats of `work` that attend needs.
constexpr std::int64_t attend_work(std::int64_t dp) {
  return (kQueries + kMaxTile) * (dp + 2) + 2 * kMaxTile * kKeys + kMaxTile * kPanel;
}

const Kernels* kernels_avx512();   // null if the compiler or the system lacks it
const Kernels* kernels_vnni256();
const Kernels* kernels_avxvnni();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();
const Kernels* kernels_amx();

// dispatch.cpp
const Kernels& kernels_for(const std::string& name);
std::vector<std::string> instruction_sets();
bool bf16_pays(const Kernels& k);

// pool.cpp: job(context, unit, thread) for every unit, thread < threads. The same results for
// any number of threads, as long as units are independent. Never throws once it runs. Callers at
// the same time have threads of their own.
void parallel_for(int threads, std::int64_t units, void (*job)(void*, std::int64_t, int),
                  void* context);

template <class F> void parallel(int threads, std::int64_t units, F&& f) {
  parallel_for(
      threads, units,
      [](void* context, std::int64_t unit, int thread) {
        (*static_cast<F*>(context))(unit, thread);
      },
      &f);
}

// Zeroed memory in whole cache lines, in huge pages if the system provides them.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <class T> T* as(std::size_t offset_bytes = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + offset_bytes);
  }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Uninitialised memory for one call, in whole cache lines. It is kept for later calls: as many buffers
// as there were concurrent callers, each of the size of its largest call.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T> T* as() const { return static_cast<T*>(data_); }

 private:
  void* place_ = nullptr;  // whose buffer it is; null: its own
  Buffer own_;
  void* data_ = nullptr;
};

}  // namespace vitapack
