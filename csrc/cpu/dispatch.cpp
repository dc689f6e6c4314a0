// Chooses the kernel set at run time and forwards edm2::cpu::* to it.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "edm2/cpu.h"
#include "kernels.h"

namespace edm2::cpu {
namespace {

struct KernelSet {
  const char* isa;
  bool (*supported)();
#define EDM2_MEMBER(name, Params, dtypes) void (*name)(const Params&, int64_t, int64_t);
  EDM2_CPU_KERNELS(EDM2_MEMBER)
};

#define EDM2_PORTABLE(name, Params, dtypes) &portable::name,
#define EDM2_AVX2(name, Params, dtypes) &avx2::name,
#define EDM2_AVX512(name, Params, dtypes) &avx512::name,

constexpr KernelSet kKernelSets[] = {
    {"portable", [] { return true; }, EDM2_CPU_KERNELS(EDM2_PORTABLE)},
#if defined(EDM2_CPU_X86_SETS)
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     EDM2_CPU_KERNELS(EDM2_AVX2)},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     },
     EDM2_CPU_KERNELS(EDM2_AVX512)},
#endif
};

const KernelSet& choose() {
  const char* wanted = std::getenv("EDM2EXT_CPU_ISA");
  const KernelSet* chosen = nullptr;
  std::string known;
  for (const KernelSet& set : kKernelSets) {
    known += (known.empty() ? "" : ", ") + std::string(set.isa);
    if (wanted != nullptr && *wanted != '\0' && std::string(wanted) != set.isa) continue;
    if (set.supported()) {
      chosen = &set;
    } else if (wanted != nullptr && *wanted != '\0') {
      throw std::runtime_error("EDM2EXT_CPU_ISA: this machine does not support " + std::string(wanted));
    }
  }
  if (chosen == nullptr) {
    throw std::runtime_error("EDM2EXT_CPU_ISA: expected one of " + known + ", got " + std::string(wanted));
  }
  return *chosen;
}

const KernelSet& kernels() {
  static const KernelSet& set = choose();
  return set;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const KernelSet& set : kKernelSets) {
    if (set.supported()) names.emplace_back(set.isa);
  }
  return names;
}

const char* bf16_instructions() {
#if defined(EDM2_CPU_X86_SETS)
  if (__builtin_cpu_supports("amx-bf16")) return "amx_bf16";
  if (__builtin_cpu_supports("avx512bf16")) return "avx512_bf16";
#endif
  return "";
}

bool multiplies_bf16() {
  static const bool does = std::string(isa_in_use()) == "avx512" && *bf16_instructions() != '\0';
  return does;
}

const char* isa_in_use() { return kernels().isa; }

const std::vector<KernelInfo>& kernel_table() {
#define EDM2_INFO(name, Params, dtypes) {#name, dtypes},
  static const std::vector<KernelInfo> table = {EDM2_CPU_KERNELS(EDM2_INFO)};
  return table;
}

#define EDM2_FORWARD(name, Params, dtypes) \
  void name(const Params& params, int64_t begin, int64_t end) { kernels().name(params, begin, end); }
EDM2_CPU_KERNELS(EDM2_FORWARD)

}  // namespace edm2::cpu
