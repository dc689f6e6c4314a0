// The CUDA half of the torch layer on CPU tensors: registered as torch.ops.edm2_emulated, launching emulated kernels.
// What it asks of a CUDA build of torch is answered here.
#include "torch/cuda_support.h"

#include "emulator.h"

#undef STABLE_TORCH_LIBRARY
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY(library, m)                                                                               \
  static void define_schemas(torch::stable::detail::StableLibrary&);                                                   \
  static const torch::stable::detail::StableTorchLibraryInit schemas(                                                  \
      torch::stable::detail::StableLibrary::Kind::DEF, &define_schemas, "edm2_emulated", nullptr, __FILE__, __LINE__); \
  static void define_schemas(torch::stable::detail::StableLibrary& m)
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(edm2_emulated, CPU, m, C10_UID)
#define EDM2_CUDA_TOOLKIT 0
#define EDM2_CUDA_ARCHITECTURES ""

#include "torch/accumulate_snapshots_cuda.cpp"
#include "torch/adam_step_cuda.cpp"
#include "torch/cosine_attention_cuda.cpp"
#include "torch/denoising_loss_cuda.cpp"
#include "torch/ema_update_cuda.cpp"
#include "torch/library.cpp"
#include "torch/mp_cat_cuda.cpp"
#include "torch/mp_conv2d_cuda.cpp"
#include "torch/mp_fourier_cuda.cpp"
#include "torch/mp_silu_cuda.cpp"
#include "torch/mp_sum_cuda.cpp"
#include "torch/normalize_weight_cuda.cpp"
#include "torch/pixel_norm_cuda.cpp"
#include "torch/precondition_cuda.cpp"
#include "torch/resample_cuda.cpp"
#include "torch/resample_down_pixel_norm_cuda.cpp"
#include "torch/sampler_step_cuda.cpp"

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
}

namespace edm2::cuda {
const char* error_string(int) { return emulation_message(); }
}  // namespace edm2::cuda
