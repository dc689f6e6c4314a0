#include "edm2/conv_weight_grad.h"

#include "common.h"
#include "edm2/cpu.h"

namespace edm2::torch_ops {
namespace {

/// A dense channels_last image batch as the kernel multiplies it.
Tensor operand_of(const View& images, bool pairs) {
  if (images.scalar_type == ScalarType::Float) return images.tensor;
  const int64_t batch = images.sizes[0], size = batch > 0 ? images.numel / batch : 0, two = (batch + 1) / 2;
  const int64_t elements = (pairs ? two : batch) * size;
  const Tensor operand = empty(images, &elements, 1, Format::kContiguous, ScalarType::Float);
  run_cpu(cpu::conv_operand, ConvOperandParams{images.data(), operand.mutable_data_ptr(), batch, size, pairs}, two,
          images.numel);
  return operand;
}

Tensor conv_weight_grad(const Tensor& grad_, const Tensor& x_, int64_t kernel_size) {
  const char* op = "conv_weight_grad";
  for (const View& view : {View(x_), View(grad_)}) {
    EDM2_CHECK(view.dim == 4, op, "x and grad", "expected [batch, channels, height, width], got ", view.shape());
  }
  const View x = dense(x_, Format::kChannelsLast);
  const View grad = dense(grad_, Format::kChannelsLast);
  const bool bf16 = x.scalar_type == ScalarType::BFloat16;
  EDM2_CHECK(bf16 || x.scalar_type == ScalarType::Float, op, "x", "expected dtype Float or BFloat16, got ",
             to_string(x.scalar_type));
  EDM2_CHECK(x.sizes[1] % kConvLanes == 0, op, "x", "expected channels in multiples of ", kConvLanes, ", got ",
             x.sizes[1]);
  check_same_dtype(x, grad, op, "grad");
  EDM2_CHECK(grad.sizes[0] == x.sizes[0] && grad.sizes[2] == x.sizes[2] && grad.sizes[3] == x.sizes[3], op, "grad",
             "expected batch, height and width of ", x.shape(), ", got ", grad.shape());
  EDM2_CHECK(kernel_size > 0 && kernel_size % 2 == 1, op, "kernel_size", "expected an odd number, got ", kernel_size);
  const int64_t sizes[] = {grad.sizes[1], x.sizes[1], kernel_size, kernel_size};
  const int64_t positions = kernel_size * kernel_size;
  const int64_t items = positions * conv_tiles(sizes[0], kConvTileOut) * conv_tiles(sizes[1], kConvTileIn);
  const int64_t partial_size = items * kConvTileOut * kConvTileIn;
  const Tensor y = empty(x, sizes, 4, Format::kContiguous, ScalarType::Float);
  const Tensor partial = empty(x, &partial_size, 1, Format::kContiguous, ScalarType::Float);
  const bool pairs = bf16 && cpu::multiplies_bf16();
  const Tensor of_grad = operand_of(grad, pairs), of_x = operand_of(x, pairs);
  const int64_t batch = pairs ? (x.sizes[0] + 1) / 2 : x.sizes[0];
  const auto floats = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  const ConvWeightGradParams params{of_grad.mutable_data_ptr(),
                                    of_x.mutable_data_ptr(),
                                    pairs,
                                    floats(y),
                                    floats(partial),
                                    batch,
                                    x.sizes[2],
                                    x.sizes[3],
                                    sizes[0],
                                    sizes[1],
                                    kernel_size};
  const int64_t pixels = batch * x.sizes[2] * x.sizes[3];
  run_cpu(cpu::conv_weight_grad, params, items, items * (pixels + 1), kConvTileOut * 2);  // without pixels: zeros
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) { m.impl("conv_weight_grad", TORCH_BOX(&conv_weight_grad)); }

}  // namespace edm2::torch_ops
