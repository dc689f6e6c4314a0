// One tile of one direction of the convolution on Hopper, for one dtype. Compiled once per combination, with
// EDM2_CONV_DIRECTION, EDM2_CONV_TILE and EDM2_CONV_DTYPE (CMakeLists.txt), for sm_90a only.
#include "mp_conv2d_wgmma.cuh"

#include "mp_conv2d.h"

namespace edm2::cuda {
namespace {

/// The convolution as CUTLASS describes it.
template <typename Problem>
Problem problem_of(const ConvShape& shape) {
  const auto narrow = [](int64_t size) { return static_cast<int>(size); };
  const int height = narrow(shape.kernel_height);
  const int width = narrow(shape.kernel_width);
  const int out = narrow(shape.out);
  const int in = narrow(shape.in);
  return {cutlass::conv::Mode::kCrossCorrelation,
          {narrow(shape.batch), narrow(shape.height), narrow(shape.width), in},
          {out, height, width, in},
          {height / 2, width / 2},
          {height / 2, width / 2},
          {1, 1},
          {1, 1},
          1};
}

/// As many clusters as are resident at once: they share out the work.
template <typename Conv, typename Kernel>
cudaError_t launch_persistent(Kernel kernel, int64_t work, cudaStream_t stream,
                              const typename Conv::Arguments& arguments) {
  int device = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  constexpr int kShared = sizeof(typename Conv::Shared);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Conv::kBlocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.dynamicSmemBytes = kShared;
  config.gridDim = static_cast<unsigned>(std::min<int64_t>(work, multiprocessors / Conv::kBlocks) * Conv::kBlocks);
  config.blockDim = Conv::kThreads;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace

template <ConvDirection Direction, int Tile, typename T>
cudaError_t launch_conv_wgmma(const ConvShape& shape, const ConvArguments<T>& args, cudaStream_t stream,
                              Traffic traffic) {
  using Conv = WgmmaConv<Direction, Tile, T>;
  using Mainloop = typename Conv::Mainloop;
  using Element = typename Conv::Element;
  const auto kernel = mp_conv2d_wgmma<Direction, Tile, T>;
  const int64_t work = conv_wgmma_works(Direction, shape, Tile) * args.splits;
  if (stream == counting_stream()) {  // without a driver to describe tensors to
    return launch_blocks(0, kernel, work, Conv::kThreads, stream, traffic, typename Conv::Arguments{});
  }
  const auto problem = problem_of<typename Conv::Problem>(shape);
  const typename Mainloop::Arguments operands = {reinterpret_cast<const Element*>(args.a),
                                                 reinterpret_cast<const Element*>(args.b)};
  if (args.steps == 0 || !Mainloop::can_implement(problem, operands)) return cudaErrorInvalidValue;
  return launch_persistent<Conv>(
      mp_conv2d_wgmma<Direction, Tile, T>, work, stream,
      {Mainloop::to_underlying_arguments(problem, operands, nullptr), Mainloop::get_problem_shape_MNKL(problem), args});
}

#if defined(EDM2_CONV_DIRECTION)
template cudaError_t launch_conv_wgmma<ConvDirection::EDM2_CONV_DIRECTION, EDM2_CONV_TILE>(
    const ConvShape&, const ConvArguments<EDM2_CONV_DTYPE>&, cudaStream_t, Traffic);
#endif

}  // namespace edm2::cuda
