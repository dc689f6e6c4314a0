// What the CUDA half of the torch layer shares: device guard, stream, errors. Needs no CUDA header and no CUDA build of
// torch: the library loads under CPU builds too, which lack the stream function.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common.h"
#include "edm2/cuda_error.h"
#include "edm2/traffic.h"

// Declared in torch's header for CUDA builds only. The stable API has streams from torch 2.13.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace edm2::torch_ops {

/// Raises unless `got` is on the same GPU as `x`: a tensor elsewhere can come beside one on a GPU.
inline void check_same_gpu(const View& x, const View& got, const char* op, const char* argument) {
  const auto name = [](const Tensor& t) {
    return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : std::string("another kind of device");
  };
  EDM2_CHECK(x.tensor.device() == got.tensor.device(), op, argument, "expected a tensor on ", name(x.tensor),
             ", got one on ", name(got.tensor));
}

/// A gradient: on the GPU of the tensor it belongs to, brought to its format, then checked against it.
inline View gradient_on_gpu(const Tensor& grad, const View& of, const char* op, const char* argument) {
  check_same_gpu(of, View(grad), op, argument);
  return gradient(grad, of, op, argument);
}

/// The type for CUDA kernels, which have no fp64.
inline DType cuda_dtype_of(const View& view, const char* op, const char* argument) {
  const DType dtype = dtype_of(view.scalar_type, op, argument);
  EDM2_CHECK(dtype != DType::kFloat64, op, argument, "expected float32, float16 or bfloat16 on a GPU, got Double");
  return dtype;
}

/// Calls launch(stream), which returns a cudaError_t, with x's GPU current and the stream that is current there. For a
/// meta tensor, its launches are counted.
template <class Launch>
void run_cuda(const View& x, const char* op, Launch launch) {
  if (is_meta(x.tensor)) {
    const int error = launch(cuda::counting_stream());
    STD_TORCH_CHECK(error == 0, op, ": error ", error, " before the launch");
    return;
  }
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": this torch is built without CUDA");
  const int32_t device = x.tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = launch(static_cast<CUstream_st*>(stream));
  STD_TORCH_CHECK(error == 0, op, ": ", cuda::error_string(error), " (CUDA error ", error, ")");
}

/// An uninitialised fp32 tensor on x's GPU for what a kernel keeps between its launches.
inline Tensor workspace(const View& x, int64_t floats) {
  if (is_meta(x.tensor)) cuda::tally.workspace += 4 * floats;
  return empty(x, &floats, 1, Format::kContiguous, ScalarType::Float);
}

}  // namespace edm2::torch_ops
