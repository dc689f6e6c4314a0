// What every bridge header shares. Plain C++ only: these headers are read by g++, nvcc and the CUDA emulation alike.
#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t is a pointer to it; declared here so that no CUDA header is needed

namespace edm2 {

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

/// A dense activation tensor [batch, channels, pixels], where pixels is the product of the spatial sizes.
/// Element (n, c, p) lies at (n * channels + c) * pixels + p, or, channels_last (NHWC), at (n * pixels + p) * channels
/// + c.
struct Activation {
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  bool channels_last;
};

}  // namespace edm2
