// Which of the CPU kernel sets (one per instruction set) is in use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace edm2::cpu {

/// One row of the kernel table.
struct KernelInfo {
  const char* name;    // kernel, e.g. "pixel_norm_backward"
  const char* dtypes;  // storage types it takes
};

/// Instruction sets this library holds kernels for and this machine can run, slowest first.
std::vector<std::string> supported_isas();

/// The set in use: the fastest supported one, or what EDM2EXT_CPU_ISA names. Read once, at the first call.
/// Throws std::runtime_error if EDM2EXT_CPU_ISA names an unknown or unsupported set.
const char* isa_in_use();

/// Instructions by which this machine multiplies bfloat16 fastest: "amx_bf16", "avx512_bf16" or "".
const char* bf16_instructions();

/// Whether the set in use multiplies bfloat16: by AVX-512 BF16, which processors with AMX have as well.
bool multiplies_bf16();

/// Every CPU kernel of the library.
const std::vector<KernelInfo>& kernel_table();

}  // namespace edm2::cpu
