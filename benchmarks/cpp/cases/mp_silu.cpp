#include "edm2/mp_silu.h"

#include "table.h"

namespace edm2::bench {

namespace {

void plain(Table& table) {
  for (const Image& image : table.images()) {
    if (!image.channels_last) continue;  // the layout is the same to it
    const auto [numel, dtype] = std::pair(image.numel(), image.dtype);
    table.add(
        "mp_silu" + image.label(), {image.in(), image.out()},
        [=](const Pointers& p) { return MPSiLUParams{p[0], p[1], numel, dtype}; }, GPU(cuda::launch_mp_silu),
        CPU(cpu::mp_silu), numel);
    table.add(
        "mp_silu_backward" + image.label(), {image.in(), image.in(), image.out()},
        [=](const Pointers& p) { return MPSiLUBackwardParams{p[0], p[1], p[2], numel, dtype}; },
        GPU(cuda::launch_mp_silu_backward), CPU(cpu::mp_silu_backward), numel);
  }
}

void modulated(Table& table) {
  for (const Image& image : table.images()) {
    table.add(
        "mp_silu_modulated" + image.label(), {image.in(), image.vector_in(), image.out()},
        [=](const Pointers& p) { return MPSiLUModulatedParams{p[0], p[1], p[2], image.shape(), image.dtype}; },
        GPU(cuda::launch_mp_silu_modulated), CPU(cpu::mp_silu_modulated), image.pixels_or_planes());
    table.add(
        "mp_silu_modulated_backward" + image.label(),
        {image.in(), image.in(), image.vector_in(), image.out(), image.vector_out()},
        GPU_OR_0(cuda::mp_silu_modulated_backward_workspace(image.shape())),
        [=](const Pointers& p) {
          return MPSiLUModulatedBackwardParams{p[0], p[1], p[2], p[3], p[4], image.shape(), image.dtype};
        },
        GPU(cuda::launch_mp_silu_modulated_backward), CPU(cpu::mp_silu_modulated_backward),
        cpu::mp_silu_modulated_backward_items(image.shape()));
  }
}

}  // namespace

void mp_silu(Table& table) {
  plain(table);
  modulated(table);
}

}  // namespace edm2::bench
