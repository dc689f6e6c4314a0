// edm2ext._C: what is not a tensor op. Build facts, the kernel table, and the timing of a CPU kernel without torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <string>
#include <vector>

#include "build_info.h"
#include "edm2/cpu.h"
#include "edm2/mp_silu.h"
#include "edm2/pixel_norm.h"

namespace py = pybind11;

namespace {

/// Facts fixed when the library was built. Neither date nor path: the same sources give the same facts.
py::dict build_info() {
  py::dict info;
  info["version"] = EDM2_VERSION;
  info["torch_version"] = EDM2_TORCH_VERSION;
  info["torch_target_version"] = "2.11";
  info["compiler"] = EDM2_COMPILER;
  info["build_type"] = EDM2_BUILD_TYPE;
  info["cpu_flags"] = EDM2_CPU_FLAGS;
  info["cpu_isas"] = EDM2_CPU_ISAS;
  info["cuda"] = EDM2_CUDA_ENABLED != 0;
  info["cuda_reason"] = EDM2_CUDA_REASON;
  info["cuda_version"] = EDM2_CUDA_VERSION;
  info["cuda_archs"] = EDM2_CUDA_ARCHS;
  info["conv"] = EDM2_CONV_ENABLED != 0;
  info["conv_reason"] = EDM2_CONV_REASON;
  info["conv_wgmma"] = EDM2_WGMMA_ENABLED != 0;
  return info;
}

/// One dict per kernel: name, device, dtypes, and on the CPU the instruction set in use.
py::list kernel_table() {
  py::list table;
  for (const auto& kernel : edm2::cpu::kernel_table()) {
    py::dict row;
    row["name"] = kernel.name;
    row["device"] = "cpu";
    row["dtypes"] = kernel.dtypes;
    row["isa"] = edm2::cpu::isa_in_use();
    table.append(row);
  }
  return table;
}

/// Seconds per call of a CPU kernel over memory of its own, one thread, best of the repeats.
double time_kernel(const std::string& name, int64_t batch, int64_t channels, int64_t pixels, bool channels_last,
                   int repeats) {
  const int64_t numel = batch * channels * pixels;
  const std::vector<float> x(static_cast<size_t>(numel), 0.5f);
  std::vector<float> y(x.size());
  const edm2::Activation shape{batch, channels, pixels, channels_last};
  const auto call = [&] {
    if (name == "mp_silu") {
      edm2::cpu::mp_silu({x.data(), y.data(), numel, edm2::DType::kFloat32}, 0, numel);
    } else if (name == "pixel_norm") {
      edm2::cpu::pixel_norm({x.data(), y.data(), nullptr, shape, edm2::DType::kFloat32, 1e-4}, 0, batch * pixels);
    } else {
      throw py::value_error("time_kernel: name: expected mp_silu or pixel_norm, got " + name);
    }
  };
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    call();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = elapsed.count() < best ? elapsed.count() : best;
  }
  return best;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, kernel table and kernel timing of edm2ext; the ops themselves are in libedm2_ops.so.";
  m.def("build_info", &build_info, "Facts fixed when the library was built.");
  m.def("cpu_isa", &edm2::cpu::isa_in_use,
        "CPU instruction set in use: portable, avx2 or avx512. RuntimeError if EDM2EXT_CPU_ISA asks for one that is "
        "unknown or unsupported.");
  m.def("cpu_bf16", &edm2::cpu::bf16_instructions,
        "Instructions by which this machine multiplies bfloat16 fastest: amx_bf16, avx512_bf16, or none: empty.");
  m.def("supported_cpu_isas", &edm2::cpu::supported_isas, "CPU instruction sets this machine can run, slowest first.");
  m.def("kernel_table", &kernel_table, "Every CPU kernel: name, device, dtypes, isa.");
  m.def("time_kernel", &time_kernel, py::arg("name"), py::arg("batch"), py::arg("channels"), py::arg("pixels"),
        py::arg("channels_last") = false, py::arg("repeats") = 20,
        "Seconds per single-threaded call of a fp32 CPU kernel (mp_silu, pixel_norm) without torch, best of the "
        "repeats.");
}
