#include "edm2/mp_fourier.h"

#include "table.h"

namespace edm2::bench {

void mp_fourier(Table& table) {
  const int64_t batch = table.size == Size::kSmall ? 9 : 256;
  const int64_t channels = table.size == Size::kSmall ? 35 : 192;
  for (const DType dtype : table.dtypes()) {
    std::string label = " ";
    label.append(std::to_string(batch)).append("x").append(std::to_string(channels)).append(" ").append(name_of(dtype));
    const Buffer x{batch, dtype, true};
    const Buffer buffer{channels, DType::kFloat32, true};
    const Buffer grad_x{batch, dtype, false};
    const Buffer grad_buffer{channels, DType::kFloat32, false};
    table.add(
        "mp_fourier" + label, {x, buffer, buffer, {batch * channels, dtype, false}},
        [=](const Pointers& p) { return MPFourierParams{p[0], p[1], p[2], p[3], batch, channels, dtype}; },
        GPU(cuda::launch_mp_fourier), CPU(cpu::mp_fourier), batch);
    table.add(
        "mp_fourier_backward" + label,
        {{batch * channels, dtype, true}, x, buffer, buffer, grad_x, grad_buffer, grad_buffer},
        [=](const Pointers& p) {
          return MPFourierBackwardParams{p[0], p[1], p[2], p[3], p[4], p[5], p[6], batch, channels, dtype};
        },
        GPU(cuda::launch_mp_fourier_backward), CPU([](const MPFourierBackwardParams& params, int64_t, int64_t) {
          cpu::mp_fourier_backward_x(params, 0, params.batch);
          cpu::mp_fourier_backward_buffers(params, 0, params.channels);
        }),
        0);
  }
}

}  // namespace edm2::bench
