#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda_support.h"
#include "edm2/mp_conv2d.h"
#include "edm2/mp_conv2d_plan.h"
#include "mp_cat.h"
#include "mp_sum.h"

namespace edm2::torch_ops {
namespace {

using Plan = std::vector<int64_t>;

/// An operand: on x's GPU, of x's dtype, [A, B, H, W] with B innermost in memory, at an address of 16 bytes.
View operand(const Tensor& t, const View& x, const char* op, const char* argument) {
  View view(t);
  check_same_gpu(x, view, op, argument);
  check_same_dtype(x, view, op, argument);
  EDM2_CHECK(view.dim == 4, op, argument, "expected 4 dimensions, got shape ", view.shape());
  view = dense(t, Format::kChannelsLast);
  if (reinterpret_cast<uintptr_t>(view.data()) % 16 != 0) view = View(torch::stable::clone(view.tensor));
  return view;
}

/// The same for x or the gradient of y, whose dtype is to have kernels.
View activation(const Tensor& t, const char* op, const char* argument) {
  const View view(t);
  EDM2_CHECK(view.scalar_type == ScalarType::Half || view.scalar_type == ScalarType::BFloat16, op, argument,
             "expected float16 or bfloat16, got ", to_string(view.scalar_type));
  return operand(t, view, op, argument);
}

DType storage_of(const View& view) { return view.scalar_type == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16; }

/// Checked: channels and filter sizes that there are kernels for.
ConvShape conv_shape(const View& image, int64_t in, int64_t out, int64_t kernel_height, int64_t kernel_width,
                     const char* op) {
  const ConvShape shape{image.sizes[0], image.sizes[2], image.sizes[3], in, out, kernel_height, kernel_width};
  EDM2_CHECK(in > 0 && out > 0 && in % kConvChannels == 0 && out % kConvChannels == 0, op, "w",
             "expected multiples of ", kConvChannels, " channels, got ", in, " in and ", out, " out");
  EDM2_CHECK(kernel_height % 2 == 1 && kernel_width % 2 == 1 && shape.taps() <= kConvMostTaps, op, "w",
             "expected odd filter sizes with a product of at most ", kConvMostTaps, ", got ", kernel_height, " x ",
             kernel_width);
  EDM2_CHECK(shape.pixels() <= kConvMostPixels && (in > out ? in : out) * shape.taps() <= kConvMostColumns, op, "w",
             "too large: ", shape.pixels(), " pixels, ", in, " channels in, ", out, " out");
  return shape;
}

/// The plan asked for, with one of so many tiles, or the one for x's GPU.
ConvPlan chosen(ConvDirection direction, const ConvShape& shape, const Plan& plan, const View& x, const char* op,
                int tiles = cuda::conv_tile_count()) {
  ConvPlan result{0, 1};
  if (plan.empty()) {
    int error = 0;
    if (is_meta(x.tensor)) {
      error = cuda::plan_mp_conv2d(direction, shape, true, &result);
    } else {
      run_cuda(x, op, [&](CUstream_st*) { return error = cuda::plan_mp_conv2d(direction, shape, false, &result); });
    }
    return result;
  }
  const bool known = plan.size() == 2 && plan[0] >= 0 && plan[0] < tiles;
  if (known) result.tile = static_cast<int>(plan[0]);
  const int64_t steps = conv_product(direction, shape, result).steps;
  EDM2_CHECK(known && plan[1] >= 1 && (plan[1] <= steps || steps == 0), op, "plan",
             "expected nothing, or a tile below ", tiles, " and 1 to ", steps, " splits");
  result.splits = static_cast<int>(plan[1]);
  return result;
}

/// The partial sums of a plan.
Tensor parts_of(ConvDirection direction, const ConvShape& shape, const ConvPlan& plan, const View& x) {
  return workspace(x, conv_workspace(conv_product(direction, shape, plan), plan));
}

Tensor empty_image(const View& like, int64_t channels) {
  const int64_t sizes[] = {like.sizes[0], channels, like.sizes[2], like.sizes[3]};
  return empty(like, sizes, 4, Format::kChannelsLast, like.scalar_type);
}

/// The convolution of x with w, and what the epilogue makes of it: `finish` fills in the parameters.
template <class Finish>
void convolve(const Tensor& x_, const Tensor& w_, const Plan& plan_, const char* op, Finish finish) {
  const View x = activation(x_, op, "x");
  const View w = operand(w_, x, op, "w");
  EDM2_CHECK(x.sizes[1] == w.sizes[1], op, "x", "expected ", w.sizes[1], " channels for w of shape ", w.shape(),
             ", got shape ", x.shape());
  const ConvShape shape = conv_shape(x, w.sizes[1], w.sizes[0], w.sizes[2], w.sizes[3], op);
  const ConvPlan plan = chosen(ConvDirection::kForward, shape, plan_, x, op);
  const Tensor parts = parts_of(ConvDirection::kForward, shape, plan, x);
  MPConv2dParams params{x.data(), w.data(), nullptr, shape, storage_of(x), plan, static_cast<float*>(address(parts))};
  finish(x, params);
  run_cuda(x, op, [&](CUstream_st* stream) { return cuda::launch_mp_conv2d(params, stream); });
}

Tensor mp_conv2d(const Tensor& x_, const Tensor& w, const std::optional<Tensor>& gain_, const Plan& plan) {
  const char* op = "mp_conv2d";
  std::optional<View> gain;
  std::optional<Tensor> y;
  convolve(x_, w, plan, op, [&](const View& x, MPConv2dParams& params) {
    if (gain_) {
      gain = View(*gain_);
      check_same_gpu(x, *gain, op, "gain");
      EDM2_CHECK(gain->numel == 1 && gain->scalar_type == ScalarType::Float, op, "gain", "expected one float32, got ",
                 to_string(gain->scalar_type), " of shape ", gain->shape());
      params.epilogue = ConvEpilogue::kGain;
      params.gain = static_cast<const float*>(gain->data());
    }
    y = empty_image(x, params.shape.out);
    params.y = address(*y);
  });
  return *y;
}

/// y where it is to be kept, else nothing.
Tensor kept(const View& x, bool keep, MPConv2dParams& params) {
  const int64_t none = 0;
  const Tensor y = keep ? empty_image(x, params.shape.out) : empty(x, &none, 1, Format::kContiguous, x.scalar_type);
  params.y = keep ? address(y) : nullptr;
  return y;
}

/// mp_silu(y * c) and, to be kept for the backward pass, y.
std::tuple<Tensor, Tensor> mp_conv2d_silu_modulated(const Tensor& x_, const Tensor& w, const Tensor& c_, bool keep,
                                                    const Plan& plan) {
  const char* op = "mp_conv2d_silu_modulated";
  std::optional<View> c;
  std::optional<Tensor> y;
  std::optional<Tensor> out;
  convolve(x_, w, plan, op, [&](const View& x, MPConv2dParams& params) {
    check_same_gpu(x, View(c_), op, "c");
    c = dense(c_, Format::kContiguous);
    EDM2_CHECK(c->dim == 2 && c->sizes[0] == params.shape.batch && c->sizes[1] == params.shape.out, op, "c",
               "expected shape [", params.shape.batch, ", ", params.shape.out, "], got ", c->shape());
    check_same_dtype(x, *c, op, "c");
    if (reinterpret_cast<uintptr_t>(c->data()) % 16 != 0) c = View(torch::stable::clone(c->tensor));
    params.epilogue = ConvEpilogue::kModulatedSiLU;
    params.c = c->data();
    y = kept(x, keep, params);
    out = empty_image(x, params.shape.out);
    params.out = address(*out);
  });
  return {*out, *y};
}

/// mp_sum(skip, y, t), clamped, and its mask where that is wanted.
std::tuple<Tensor, Tensor> mp_conv2d_sum(const Tensor& x_, const Tensor& w, const Tensor& skip_, double t, double clip,
                                         bool masked, const Plan& plan) {
  const char* op = "mp_conv2d_sum";
  std::optional<View> skip;
  std::optional<Tensor> mask;
  std::optional<Tensor> out;
  convolve(x_, w, plan, op, [&](const View& x, MPConv2dParams& params) {
    skip = operand(skip_, x, op, "skip");
    EDM2_CHECK(skip->sizes[0] == x.sizes[0] && skip->sizes[1] == params.shape.out && skip->sizes[2] == x.sizes[2] &&
                   skip->sizes[3] == x.sizes[3],
               op, "skip", "expected shape [", x.sizes[0], ", ", params.shape.out, ", ", x.sizes[2], ", ", x.sizes[3],
               "], got ", skip->shape());
    EDM2_CHECK(clip >= 0, op, "clip", "expected at least 0, got ", clip);
    std::tie(params.weight_skip, params.weight_y) = sum_weights(t);
    params.epilogue = ConvEpilogue::kSum;
    params.skip = skip->data();
    params.clip = clip;
    const int64_t none = 0;
    mask = masked ? empty_mask(*skip) : empty(x, &none, 1, Format::kContiguous, ScalarType::Byte);
    params.mask = masked ? static_cast<uint8_t*>(address(*mask)) : nullptr;
    out = empty_image(x, params.shape.out);
    params.out = address(*out);
  });
  return {*out, *mask};
}

/// q, k and v as qkv_norm makes them of the convolution, which comes last where it is to be kept.
std::tuple<Tensor, Tensor, Tensor, Tensor> mp_conv2d_qkv_norm(const Tensor& x_, const Tensor& w, double eps,
                                                              bool keep) {
  const char* op = "mp_conv2d_qkv_norm";
  std::optional<Tensor> y;
  std::vector<Tensor> parts;
  const Plan plan = {kConvQKVPlan.tile, kConvQKVPlan.splits};
  convolve(x_, w, plan, op, [&](const View& x, MPConv2dParams& params) {
    const ConvShape& shape = params.shape;
    EDM2_CHECK(shape.out % (3 * kConvHead) == 0, op, "w", "expected a multiple of ", 3 * kConvHead,
               " channels out, got ", shape.out);
    params.epilogue = ConvEpilogue::kQKVNorm;
    params.eps = eps;
    y = kept(x, keep, params);
    const int64_t sizes[] = {shape.batch, shape.height * shape.width, shape.out / (3 * kConvHead), kConvHead};
    for (void*& part : params.qkv) {
      parts.push_back(empty(x, sizes, 4, Format::kContiguous, x.scalar_type));
      part = address(parts.back());
    }
  });
  const auto by_head = [](const Tensor& part) { return torch::stable::transpose(part, 1, 2); };
  return {by_head(parts[0]), by_head(parts[1]), by_head(parts[2]), *y};
}

Tensor mp_conv2d_backward_input(const Tensor& grad, const Tensor& w_, const Plan& plan_) {
  const char* op = "mp_conv2d_backward_input";
  const View grad_y = activation(grad, op, "grad");
  const View w = operand(w_, grad_y, op, "w");
  EDM2_CHECK(grad_y.sizes[1] == w.sizes[0], op, "grad", "expected ", w.sizes[0], " channels for w of shape ", w.shape(),
             ", got shape ", grad_y.shape());
  const ConvShape shape = conv_shape(grad_y, w.sizes[1], w.sizes[0], w.sizes[2], w.sizes[3], op);
  const ConvPlan plan = chosen(ConvDirection::kBackwardInput, shape, plan_, grad_y, op);
  const Tensor parts = parts_of(ConvDirection::kBackwardInput, shape, plan, grad_y);
  const Tensor grad_x = empty_image(grad_y, shape.in);
  const MPConv2dBackwardInputParams params{
      grad_y.data(), w.data(), address(grad_x), shape, storage_of(grad_y), plan, static_cast<float*>(address(parts))};
  run_cuda(grad_y, op, [&](CUstream_st* stream) { return cuda::launch_mp_conv2d_backward_input(params, stream); });
  return grad_x;
}

/// In float32.
Tensor mp_conv2d_backward_weight(const Tensor& grad, const Tensor& x_, int64_t kernel_height, int64_t kernel_width,
                                 const Plan& plan_) {
  const char* op = "mp_conv2d_backward_weight";
  const View x = activation(x_, op, "x");
  const View grad_y = operand(grad, x, op, "grad");
  EDM2_CHECK(grad_y.sizes[0] == x.sizes[0] && grad_y.sizes[2] == x.sizes[2] && grad_y.sizes[3] == x.sizes[3], op,
             "grad", "expected the images of x of shape ", x.shape(), ", got ", grad_y.shape());
  const ConvShape shape = conv_shape(x, x.sizes[1], grad_y.sizes[1], kernel_height, kernel_width, op);
  const ConvPlan plan = chosen(ConvDirection::kBackwardWeight, shape, plan_, x, op);
  const Tensor parts = parts_of(ConvDirection::kBackwardWeight, shape, plan, x);
  const int64_t sizes[] = {shape.out, shape.in, kernel_height, kernel_width};
  const Tensor grad_w = empty(x, sizes, 4, Format::kChannelsLast, ScalarType::Float);
  const MPConv2dBackwardWeightParams params{grad_y.data(), x.data(), static_cast<float*>(address(grad_w)), shape,
                                            storage_of(x), plan,     static_cast<float*>(address(parts))};
  run_cuda(x, op, [&](CUstream_st* stream) { return cuda::launch_mp_conv2d_backward_weight(params, stream); });
  return grad_w;
}

/// The halves of mp_cat(a, b, t).
struct Halves {
  View a;
  View b;
  ConvHalves params;

  int64_t channels() const { return a.sizes[1] + b.sizes[1]; }
};

Halves halves_of(const Tensor& a_, const Tensor& b_, double t, const char* op) {
  const View a = activation(a_, op, "a");
  const View b = operand(b_, a, op, "b");
  check_images_of(a, b, b.sizes[1], op, "b");
  for (const auto& [half, argument] : {std::pair(&a, "a"), std::pair(&b, "b")}) {
    EDM2_CHECK(half->sizes[1] > 0 && half->sizes[1] % kConvHalf == 0, op, argument, "expected a multiple of ",
               kConvHalf, " channels, got shape ", half->shape());
  }
  EDM2_CHECK(t >= kConvLeastBalance && t <= 1 - kConvLeastBalance, op, "t", "expected ", kConvLeastBalance, " to ",
             1 - kConvLeastBalance, ", got ", t);
  const auto [weight_a, weight_b] = cat_weights(t, a.sizes[1], b.sizes[1]);
  return {a, b, {b.data(), a.sizes[1], weight_a, weight_b}};
}

/// The 1x1 convolution of mp_cat(a, b, t).
Tensor mp_cat_conv2d(const Tensor& a, const Tensor& b, const Tensor& w_, double t, const Plan& plan_) {
  const char* op = "mp_cat_conv2d";
  const Halves x = halves_of(a, b, t, op);
  const View w = operand(w_, x.a, op, "w");
  EDM2_CHECK(w.sizes[1] == x.channels() && w.sizes[2] == 1 && w.sizes[3] == 1, op, "w", "expected shape [out, ",
             x.channels(), ", 1, 1], got ", w.shape());
  const ConvShape shape = conv_shape(x.a, x.channels(), w.sizes[0], 1, 1, op);
  const ConvPlan plan = chosen(ConvDirection::kForward, shape, plan_, x.a, op, kConvTileCount);
  const Tensor parts = parts_of(ConvDirection::kForward, shape, plan, x.a);
  const Tensor y = empty_image(x.a, shape.out);
  MPConv2dParams params{
      x.a.data(), w.data(), address(y), shape, storage_of(x.a), plan, static_cast<float*>(address(parts))};
  params.halves = x.params;
  run_cuda(x.a, op, [&](CUstream_st* stream) { return cuda::launch_mp_conv2d(params, stream); });
  return y;
}

/// In float32.
Tensor mp_cat_conv2d_backward_weight(const Tensor& grad, const Tensor& a, const Tensor& b, double t,
                                     const Plan& plan_) {
  const char* op = "mp_cat_conv2d_backward_weight";
  const Halves x = halves_of(a, b, t, op);
  const View grad_y = operand(grad, x.a, op, "grad");
  check_images_of(x.a, grad_y, grad_y.sizes[1], op, "grad");
  const ConvShape shape = conv_shape(x.a, x.channels(), grad_y.sizes[1], 1, 1, op);
  const ConvPlan plan = chosen(ConvDirection::kBackwardWeight, shape, plan_, x.a, op, kConvTileCount);
  const Tensor parts = parts_of(ConvDirection::kBackwardWeight, shape, plan, x.a);
  const int64_t sizes[] = {shape.out, shape.in, 1, 1};
  const Tensor grad_w = empty(x.a, sizes, 4, Format::kChannelsLast, ScalarType::Float);
  const MPConv2dBackwardWeightParams params{
      grad_y.data(),   x.a.data(), static_cast<float*>(address(grad_w)), shape,
      storage_of(x.a), plan,       static_cast<float*>(address(parts)),  x.params};
  run_cuda(x.a, op, [&](CUstream_st* stream) { return cuda::launch_mp_conv2d_backward_weight(params, stream); });
  return grad_w;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) {
  m.impl("mp_conv2d", TORCH_BOX(&mp_conv2d));
  m.impl("mp_conv2d_backward_input", TORCH_BOX(&mp_conv2d_backward_input));
  m.impl("mp_conv2d_backward_weight", TORCH_BOX(&mp_conv2d_backward_weight));
  m.impl("mp_conv2d_silu_modulated", TORCH_BOX(&mp_conv2d_silu_modulated));
  m.impl("mp_conv2d_sum", TORCH_BOX(&mp_conv2d_sum));
  m.impl("mp_conv2d_qkv_norm", TORCH_BOX(&mp_conv2d_qkv_norm));
  m.impl("mp_cat_conv2d", TORCH_BOX(&mp_cat_conv2d));
  m.impl("mp_cat_conv2d_backward_weight", TORCH_BOX(&mp_cat_conv2d_backward_weight));
}

}  // namespace edm2::torch_ops
