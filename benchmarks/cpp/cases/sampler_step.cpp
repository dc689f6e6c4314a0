#include "edm2/sampler_step.h"

#include "table.h"

namespace edm2::bench {

/// Heun's correction with guidance and noise.
void sampler_step(Table& table) {
  for (const Image& image : table.noisy_images()) {
    const auto [batch, channels, height, width, channels_last, dtype] = image;
    const int64_t pixels = batch * height * width;
    const Activation shape{batch, channels, height * width, false};
    const Buffer picture{image.numel(), DType::kFloat32, true};
    const Buffer level{1, DType::kFloat32, true};
    table.add(
        "sampler_step" + image.label(),
        {picture,
         picture,
         picture,
         picture,
         picture,
         level,
         level,
         {image.numel(), DType::kFloat32, false},
         {image.numel() + pixels, dtype, false}},
        [=](const Pointers& p) {
          return SamplerStepParams{p[0], p[1],  p[2],          p[3], p[4], p[5], p[6], p[7],
                                   p[8], shape, channels_last, 2.0,  0.1,  0.5,  0.5,  dtype};
        },
        GPU(cuda::launch_sampler_step), CPU(cpu::sampler_step), pixels);
  }
}

}  // namespace edm2::bench
