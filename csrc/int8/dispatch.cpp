// Instruction sets that this processor supports, best first.

#include "engine.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

namespace vitapack {
namespace {

#ifdef VITAPACK_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

// Cascade Lake and Ice Lake have VNNI but no bf16 products.
const Kernels* with_bf16_if_here(const Kernels* kernels) {
  if (!kernels || __builtin_cpu_supports("avx512bf16")) return kernels;
  static const Kernels without = [&] {
    Kernels copy = *kernels;
    copy.bf16 = false;
    return copy;
  }();
  return &without;
}

bool has_avx2() {  // every processor with AVX2 has F16C; the system must save the registers too
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 11
bool has_avxvnni() { return false; }
#else
bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
#endif
#endif

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
  const auto add = [&](const Kernels* kernels) {
    if (kernels) found.push_back(kernels);
  };
#ifdef VITAPACK_X86
  // Processors with AMX multiply bf16 with AVX-512 too; a virtual machine could hide that.
  if (has_avx512() && __builtin_cpu_supports("avx512bf16")) add(kernels_amx());
  if (has_avx512()) add(with_bf16_if_here(kernels_avx512()));
  if (has_avxvnni()) add(kernels_avxvnni());
  if (has_avx512()) add(kernels_vnni256());
  if (has_avx2()) add(kernels_avx2());
#endif
  add(kernels_portable());
  return found;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.push_back(kernels->name);
  return names;
}

const Kernels& kernels_for(const std::string& name) {
  const auto found = available();
  std::string known;
  for (const Kernels* kernels : found) {
    if (name.empty() || name == kernels->name) return *kernels;
    known += (known.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("no instruction set '" + name + "' here: choose one of " + known);
}

// Whether bf16 products are faster than float32's, which are exact. The instruction alone does not
// tell: Zen 4 takes half the time with it, Emerald Rapids more than twice. Timed once for half a
// millisecond; a ratio that far from 1 survives a noisy machine.
bool bf16_pays(const Kernels& k) {
  if (!k.bf16) return false;
  constexpr std::int64_t kInputs = 256;
  const Buffer buffer(std::size_t(kMaxTile + kPanel) * kInputs * 4 + kMaxTile * kPanel * 4);
  const char* panel = buffer.as<char>(std::size_t(kMaxTile) * kInputs * 4);
  auto* acc = buffer.as<float>(std::size_t(kMaxTile + kPanel) * kInputs * 4);
  double best[2] = {1.0, 1.0};
  for (int turn = 0; turn < 16; ++turn)
    for (const bool bf16 : {false, true}) {
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < 8; ++i) k.tile_wide(buffer.as<char>(), panel, kInputs, bf16, acc);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      best[bf16] = std::min(best[bf16], took.count());
    }
  return best[true] < best[false];
}

}  // namespace vitapack
