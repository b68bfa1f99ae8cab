// Which instruction sets this processor has, best first.

#include "int8_engine.h"

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
  if (has_avx512()) add(with_bf16_if_here(kernels_avx512()));
  if (has_avxvnni()) add(kernels_avxvnni());
  if (has_avx512()) add(kernels_vnni256());
  if (has_avx2()) add(kernels_avx2());
#endif
  add(kernels_portable());
  // Last: it has never run, so it is taken only by those who ask for it.
  add(kernels_amx());
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

}  // namespace vitapack
