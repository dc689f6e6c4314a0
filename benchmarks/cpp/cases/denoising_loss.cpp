#include "edm2/denoising_loss.h"

#include "table.h"

namespace edm2::bench {

void denoising_loss(Table& table) {
  for (const Image& image : table.noisy_images()) {
    const auto [batch, channels, height, width, channels_last, dtype] = image;
    const Activation shape{batch, channels, height * width, false};
    const Buffer picture{image.numel(), DType::kFloat32, true};
    const Buffer numbers{batch, DType::kFloat32, true};
    table.add(
        "denoising_loss" + image.label(),
        {image.in(), picture, picture, numbers, numbers, numbers, image.out(), numbers},
        GPU_OR_0(cuda::denoising_loss_workspace(shape)),
        [=](const Pointers& p) {
          return DenoisingLossParams{p[0], p[1],  p[2],          p[3], p[4], p[5], p[6],
                                     p[7], shape, channels_last, 0.5,  1.0,  dtype};
        },
        GPU(cuda::launch_denoising_loss), CPU(cpu::denoising_loss), batch);
  }
}

}  // namespace edm2::bench
