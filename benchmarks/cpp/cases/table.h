// What the files of cases share: the table that they add to, and the activations that kernels are timed with.
#pragma once

#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../cases.h"

// Each of the two programs holds one half of the kernels, and names the other half nowhere.
#ifdef EDM2_BENCH_CUDA
#define GPU(...) __VA_ARGS__
#define CPU(...) nullptr
#define GPU_OR_0(...) __VA_ARGS__
#else
#define GPU(...) nullptr
#define CPU(...) __VA_ARGS__
#define GPU_OR_0(...) 0
#endif

namespace edm2::bench {

inline constexpr double kEps = 1e-4;

/// "fp16"
const char* name_of(DType dtype);

/// An activation tensor [batch, channels, height, width].
struct Image {
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  bool channels_last;
  DType dtype;

  Activation shape() const { return {batch, channels, height * width, channels_last}; }
  int64_t numel() const { return batch * channels * height * width; }
  Buffer in() const { return {numel(), dtype, true}; }
  Buffer out() const { return {numel(), dtype, false}; }
  Buffer vector_in() const { return {batch * channels, dtype, true}; }  // [batch, channels]
  Buffer vector_out() const { return {batch * channels, dtype, false}; }
  /// Work items of the CPU kernels that take pixels (channels_last) or planes.
  int64_t pixels_or_planes() const { return channels_last ? batch * height * width : batch * channels; }
  /// " 256x192x64x64 fp16 nhwc"
  std::string label() const;
};

struct Table {
  Size size;
  std::vector<Case> cases;

  std::vector<DType> dtypes() const;
  /// The activations that every kernel on activations is timed with.
  std::vector<Image> images() const;
  /// Latents: the U-Net's side in the image's dtype and layout, the other in fp32 and contiguous.
  std::vector<Image> noisy_images() const;

  /// `make` builds the parameters from the pointers to the buffers; `launch` is the launcher of the CUDA kernel,
  /// `kernel` the CPU kernel over so many `items`.
  template <class Make, class Params = std::invoke_result_t<Make, const Pointers&>>
  void add(std::string name, std::vector<Buffer> buffers, Make make,
           std::type_identity_t<std::function<int(const Params&, CUstream_st*)>> launch,
           std::type_identity_t<std::function<void(const Params&, int64_t, int64_t)>> kernel, int64_t items) {
    Case added{std::move(name), std::move(buffers), {}, {}};
    if (launch) {
      added.gpu = [=](const Pointers& pointers, CUstream_st* stream) { return launch(make(pointers), stream); };
    }
    if (kernel) added.cpu = [=](const Pointers& pointers) { kernel(make(pointers), 0, items); };
    cases.push_back(std::move(added));
  }

  /// The same for a launcher with a workspace of so many floats, which is the last of the pointers.
  template <class Make, class Params = std::invoke_result_t<Make, const Pointers&>>
  void add(std::string name, std::vector<Buffer> buffers, int64_t floats, Make make,
           std::type_identity_t<std::function<int(const Params&, float*, CUstream_st*)>> launch,
           std::type_identity_t<std::function<void(const Params&, int64_t, int64_t)>> kernel, int64_t items) {
    buffers.push_back({floats, DType::kFloat32, false});
    add(std::move(name), std::move(buffers), make, nullptr, kernel, items);
    if (!launch) return;
    cases.back().gpu = [=](const Pointers& pointers, CUstream_st* stream) {
      return launch(make(pointers), static_cast<float*>(pointers.back()), stream);
    };
  }
};

}  // namespace edm2::bench
