#include "edm2/precondition.h"

#include "table.h"

namespace edm2::bench {

void precondition(Table& table) {
  for (const Image& image : table.noisy_images()) {
    const auto [batch, channels, height, width, channels_last, dtype] = image;
    const int64_t pixels = batch * height * width;
    const Activation shape{batch, channels, height * width, false};
    const Buffer noisy{image.numel(), DType::kFloat32, true};
    const Buffer denoised{image.numel(), DType::kFloat32, false};
    const Buffer sigma{batch, DType::kFloat32, true};
    table.add(
        "precondition_input" + image.label(), {noisy, sigma, {image.numel() + pixels, dtype, false}},
        [=](const Pointers& p) {
          return PreconditionScaleParams{p[0], p[1], p[2], shape, channels_last, true, true, 0.5, dtype};
        },
        GPU(cuda::launch_precondition_scale), CPU(cpu::precondition_scale), pixels);
    table.add(
        "precondition_output" + image.label(), {noisy, image.in(), sigma, denoised},
        [=](const Pointers& p) {
          return PreconditionOutputParams{p[0], p[1], p[2], p[3], shape, channels_last, true, 0.5, dtype};
        },
        GPU(cuda::launch_precondition_output), CPU(cpu::precondition_output), pixels);
    table.add(
        "precondition_output_backward" + image.label(), {noisy, sigma, image.out()},
        [=](const Pointers& p) {
          return PreconditionScaleParams{p[0], p[1], p[2], shape, channels_last, false, true, 0.5, dtype};
        },
        GPU(cuda::launch_precondition_scale), CPU(cpu::precondition_scale), pixels);
  }
}

}  // namespace edm2::bench
