#include "edm2/conv_weight_grad.h"

#include "common.h"

namespace edm2::torch_ops {
namespace {

Tensor conv_weight_grad(const Tensor& grad_, const Tensor& x_, int64_t kernel_size) {
  const char* op = "conv_weight_grad";
  for (const View& view : {View(x_), View(grad_)}) {
    EDM2_CHECK(view.dim == 4, op, "x and grad", "expected [batch, channels, height, width], got ", view.shape());
  }
  const View x = dense(x_, Format::kChannelsLast);
  const View grad = dense(grad_, Format::kChannelsLast);
  EDM2_CHECK(x.scalar_type == ScalarType::Float, op, "x", "expected dtype Float, got ", to_string(x.scalar_type));
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
  const auto floats = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  const ConvWeightGradParams params{floats(grad.tensor), floats(x.tensor), floats(y), floats(partial), x.sizes[0],
                                    x.sizes[2],          x.sizes[3],       sizes[0],  sizes[1],        kernel_size};
  const int64_t pixels = x.sizes[0] * x.sizes[2] * x.sizes[3];
  run_cpu(cpu::conv_weight_grad, params, items, items * (pixels + 1), kConvTileOut * 2);  // without pixels: zeros
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) { m.impl("conv_weight_grad", TORCH_BOX(&conv_weight_grad)); }

}  // namespace edm2::torch_ops
