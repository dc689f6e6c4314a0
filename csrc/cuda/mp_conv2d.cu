#include "edm2/mp_conv2d.h"

#include "mp_conv2d.h"

namespace edm2::cuda {
namespace {

/// Whether these are halves that there are kernels for.
bool are_halves(const ConvShape& shape, const ConvHalves& halves) {
  const int64_t in_b = shape.in - halves.in_a;
  return shape.taps() == 1 && halves.in_a > 0 && in_b > 0 && halves.in_a % kConvHalf == 0 && in_b % kConvHalf == 0;
}

template <typename T>
CatHalves<T> halves_of(const ConvHalves& halves) {
  return {static_cast<const T*>(halves.b), static_cast<int>(halves.in_a), static_cast<float>(halves.weight_a),
          static_cast<float>(halves.weight_b), static_cast<float>(halves.weight_a / halves.weight_b)};
}

bool fits(const ConvShape& shape) {
  const bool odd = shape.kernel_height % 2 == 1 && shape.kernel_width % 2 == 1;
  return odd && shape.in % kConvChannels == 0 && shape.out % kConvChannels == 0 && shape.taps() <= kConvMostTaps &&
         shape.pixels() <= kConvMostPixels && std::max(shape.in, shape.out) * shape.taps() <= kConvMostColumns;
}

ConvSizes sizes_of(const ConvShape& shape) {
  const auto narrow = [](int64_t size) { return static_cast<int>(size); };
  const auto divisor = [](int64_t size) { return fast_divisor(static_cast<uint32_t>(std::max<int64_t>(size, 1))); };
  return {narrow(shape.pixels()),     narrow(shape.height),  narrow(shape.width),
          narrow(shape.in),           narrow(shape.out),     narrow(shape.kernel_height),
          narrow(shape.kernel_width), divisor(shape.height), divisor(shape.width)};
}

template <ConvDirection Direction, bool Cat, typename T>
cudaError_t launch_portable(int tile, const ConvArguments<T>& args, cudaStream_t stream, Traffic traffic) {
  static_assert(kConvTileCount == 4);
  switch (tile) {
    case 0:
      return launch_conv_tiles<Direction, 0, Cat>(args, stream, traffic);
    case 1:
      return launch_conv_tiles<Direction, 1, Cat>(args, stream, traffic);
    case 2:
      return launch_conv_tiles<Direction, 2, Cat>(args, stream, traffic);
    default:
      return launch_conv_tiles<Direction, 3, Cat>(args, stream, traffic);
  }
}

template <ConvDirection Direction, typename T>
cudaError_t launch_tiles([[maybe_unused]] const ConvShape& shape, int tile, const ConvArguments<T>& args,
                         cudaStream_t stream, Traffic traffic) {
  if constexpr (Direction != ConvDirection::kBackwardInput) {
    if (args.halves.b != nullptr) return launch_portable<Direction, true>(tile, args, stream, traffic);
  }
#if defined(EDM2_CONV_WGMMA)
  static_assert(kConvWgmmaTileCount == 2);
  if (tile == kConvTileCount) return launch_conv_wgmma<Direction, 0>(shape, args, stream, traffic);
  if (tile == kConvTileCount + 1) return launch_conv_wgmma<Direction, 1>(shape, args, stream, traffic);
#endif
  return launch_portable<Direction, false>(tile, args, stream, traffic);
}

/// The product, and the sum of its parts if there are several. `traffic`: of all but the parts.
template <ConvDirection Direction, typename T>
cudaError_t run(const ConvShape& shape, const ConvPlan& plan, float* workspace, ConvArguments<T> args,
                cudaStream_t stream, Traffic traffic, const ConvHalves& halves = {}) {
  if (!fits(shape)) return cudaErrorInvalidValue;
  if (halves.b != nullptr) {
    if (!are_halves(shape, halves) || is_wgmma(plan)) return cudaErrorInvalidValue;
    args.halves = halves_of<T>(halves);
  }
  const ConvProduct product = conv_product(Direction, shape, plan);
  if (product.rows == 0) return cudaSuccess;
  if (plan.tile < 0 || plan.tile >= conv_tile_count() || plan.splits < 1 ||
      plan.splits > std::max<int64_t>(product.steps, 1)) {
    return cudaErrorInvalidValue;
  }
  args.sizes = sizes_of(shape);
  args.rows = static_cast<int>(product.rows);
  args.columns = static_cast<int>(product.columns);
  args.steps = static_cast<int>(product.steps);
  args.splits = plan.splits;
  args.parts = workspace;
  if (plan.splits == 1) return launch_tiles<Direction>(shape, plan.tile, args, stream, traffic);
  const int64_t parts = 4 * conv_workspace(product, plan);
  const int64_t operands = 2 * (shape.pixels() * (Direction == ConvDirection::kForward ? shape.in : shape.out) +
                                (Direction == ConvDirection::kBackwardWeight ? shape.pixels() * shape.in
                                                                             : shape.in * shape.out * shape.taps()));
  const cudaError_t error = launch_tiles<Direction>(shape, plan.tile, args, stream, {operands, parts});
  if (error != cudaSuccess) return error;
  return launch(mp_conv2d_add_parts<Direction, T>, ceil_div(product.rows * product.columns / kConvPack, kThreads),
                kThreads, stream, {parts + traffic.read - operands, traffic.written}, args);
}

template <typename Body>
cudaError_t dispatch_16_bits(DType dtype, Body body) {
  if (dtype == DType::kFloat16) return body(Storage<__half>{});
  return dtype == DType::kBFloat16 ? body(Storage<__nv_bfloat16>{}) : cudaErrorInvalidValue;
}

template <typename T>
cudaError_t forward(const MPConv2dParams& params, cudaStream_t stream) {
  const ConvShape& shape = params.shape;
  const bool heads = params.epilogue == ConvEpilogue::kQKVNorm;
  const bool whole = params.plan.tile == kConvQKVPlan.tile && params.plan.splits == 1;
  if (heads && (!whole || shape.out % (3 * kConvHead) != 0)) return cudaErrorInvalidValue;
  if (params.halves.b != nullptr && params.epilogue != ConvEpilogue::kNone) return cudaErrorInvalidValue;
  ConvArguments<T> args = {};
  args.a = static_cast<const T*>(params.x);
  args.b = static_cast<const T*>(params.w);
  args.output = {params.epilogue,
                 static_cast<T*>(params.y),
                 static_cast<T*>(params.out),
                 params.gain,
                 static_cast<const T*>(params.c),
                 static_cast<const T*>(params.skip),
                 static_cast<float>(params.weight_skip),
                 static_cast<float>(params.weight_y),
                 static_cast<float>(params.clip),
                 params.mask,
                 sizes_of({1, 1, shape.height * shape.width, 0, 0, 0, 0}).by_width,
                 {static_cast<T*>(params.qkv[0]), static_cast<T*>(params.qkv[1]), static_cast<T*>(params.qkv[2])},
                 static_cast<float>(params.eps)};
  const int64_t x_bytes = shape.pixels() * shape.in * 2;
  const int64_t y_bytes = shape.pixels() * shape.out * 2;
  const int64_t w_bytes = shape.in * shape.out * shape.taps() * 2;
  const int64_t extra = (params.gain != nullptr ? 4 : 0) + (params.c != nullptr ? shape.batch * shape.out * 2 : 0) +
                        (params.skip != nullptr ? y_bytes : 0);
  const int64_t mask_bytes = params.mask != nullptr ? shape.pixels() * shape.out / kMaskedTogether : 0;
  const int outputs = (params.y != nullptr ? 1 : 0) + (params.out != nullptr || heads ? 1 : 0);
  return run<ConvDirection::kForward>(shape, params.plan, params.workspace, args, stream,
                                      {x_bytes + w_bytes + extra, outputs * y_bytes + mask_bytes}, params.halves);
}

template <typename T>
cudaError_t backward_input(const MPConv2dBackwardInputParams& params, cudaStream_t stream) {
  const ConvShape& shape = params.shape;
  ConvArguments<T> args = {};
  args.a = static_cast<const T*>(params.grad_y);
  args.b = static_cast<const T*>(params.w);
  args.output.y = static_cast<T*>(params.grad_x);
  const int64_t w_bytes = shape.in * shape.out * shape.taps() * 2;
  return run<ConvDirection::kBackwardInput>(shape, params.plan, params.workspace, args, stream,
                                            {shape.pixels() * shape.out * 2 + w_bytes, shape.pixels() * shape.in * 2});
}

template <typename T>
cudaError_t backward_weight(const MPConv2dBackwardWeightParams& params, cudaStream_t stream) {
  const ConvShape& shape = params.shape;
  ConvArguments<T> args = {};
  args.a = static_cast<const T*>(params.grad_y);
  args.b = static_cast<const T*>(params.x);
  args.grad_w = params.grad_w;
  return run<ConvDirection::kBackwardWeight>(
      shape, params.plan, params.workspace, args, stream,
      {shape.pixels() * (shape.in + shape.out) * 2, shape.in * shape.out * shape.taps() * 4}, params.halves);
}

}  // namespace

int conv_tile_count() {
#if defined(EDM2_CONV_WGMMA)
  return kConvTileCount + kConvWgmmaTileCount;
#else
  return kConvTileCount;
#endif
}

int plan_mp_conv2d(ConvDirection direction, const ConvShape& shape, bool meta, ConvPlan* plan) {
  int multiprocessors = 132;
  if (!meta) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
  }
  *plan = plan_conv(direction, shape, multiprocessors);
  return cudaSuccess;
}

int launch_mp_conv2d(const MPConv2dParams& params, CUstream_st* stream) {
  return dispatch_16_bits(params.dtype,
                          [&](auto storage) { return forward<typename decltype(storage)::type>(params, stream); });
}

int launch_mp_conv2d_backward_input(const MPConv2dBackwardInputParams& params, CUstream_st* stream) {
  return dispatch_16_bits(
      params.dtype, [&](auto storage) { return backward_input<typename decltype(storage)::type>(params, stream); });
}

int launch_mp_conv2d_backward_weight(const MPConv2dBackwardWeightParams& params, CUstream_st* stream) {
  return dispatch_16_bits(
      params.dtype, [&](auto storage) { return backward_weight<typename decltype(storage)::type>(params, stream); });
}

}  // namespace edm2::cuda
