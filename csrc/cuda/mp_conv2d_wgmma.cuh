// The convolution on Hopper's tensor cores (sm_90a). CUTLASS's implicit-GEMM collective copies operands by TMA, im2col
// for what the taps see, and multiplies them by wgmma; around it a persistent kernel: one warp copies, two warpgroups
// multiply and store, each pair of blocks shares its filters. Device code only; needs CUTLASS's headers and NDEBUG,
// without which ptxas waits after every wgmma.
#pragma once

#include <cutlass/kernel_hardware_info.hpp>  // before the others, which use it

#include <cutlass/arch/reg_reconfig.h>
#include <cute/tensor.hpp>
#include <cutlass/conv/collective/collective_builder.hpp>

#include "mp_conv2d.cuh"

namespace edm2::cuda {

/// The collective for one direction, tile and dtype.
template <ConvDirection Direction, int Tile, typename T>
struct WgmmaConv {
  static constexpr ConvWgmmaTile kTile = conv_wgmma_tile(Direction, Tile);
  static constexpr int kGroups = 2;  // warpgroups that multiply; one more copies
  static constexpr int kThreads = 128 * (1 + kGroups);
  static constexpr int kBlocks = kConvWgmmaBlocks;  // of a cluster, one below the other in the product
  static constexpr cutlass::conv::Operator kOperator =
      Direction == ConvDirection::kForward         ? cutlass::conv::Operator::kFprop
      : Direction == ConvDirection::kBackwardInput ? cutlass::conv::Operator::kDgrad
                                                   : cutlass::conv::Operator::kWgrad;
  using Element = std::conditional_t<std::is_same_v<T, __half>, cutlass::half_t, cutlass::bfloat16_t>;
  using Rows = cute::Int<kTile.rows>;
  using Columns = cute::Int<kTile.columns>;
  using Depth = cute::Int<kConvWgmmaDepth>;
  /// What runs over channels and taps is a tuple.
  using TileShape =
      std::conditional_t<Direction == ConvDirection::kBackwardWeight, cute::Shape<Rows, cute::Shape<Columns>, Depth>,
                         cute::Shape<Rows, Columns, cute::Shape<Depth>>>;
  using Cluster = cute::Shape<cute::Int<kBlocks>, cute::_1, cute::_1>;
  using Schedule = cutlass::conv::KernelImplicitTmaWarpSpecializedSm90;
  /// Layouts and copies as CUTLASS chooses them; its product is for one warpgroup only.
  using Builder =
      cutlass::conv::collective::CollectiveBuilder<cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, kOperator,
                                                   Element, cutlass::layout::TensorNHWC, kConvPack, Element,
                                                   cutlass::layout::TensorNHWC, kConvPack, float, TileShape, Cluster,
                                                   cutlass::conv::collective::StageCount<kTile.stages>, Schedule>;
  using TiledMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, TileShape, Builder::GmmaMajorA, Builder::GmmaMajorB>(),
      cute::Layout<cute::Shape<cute::Int<kGroups>, cute::_1, cute::_1>>{}));
  using Mainloop = cutlass::conv::collective::CollectiveConv<
      cutlass::conv::MainloopSm90TmaGmmaWarpSpecializedImplicitGemm<kOperator, kTile.stages, 2, Cluster, Schedule>,
      TileShape, Element, Element, TiledMma,
      cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<typename Builder::GmemTiledCopyA,
                                                                    typename Builder::SmemLayoutA>,
      cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<typename Builder::GmemTiledCopyB,
                                                                    typename Builder::SmemLayoutB>>;
  using Problem = typename Mainloop::ProblemShape;
  using Sizes = decltype(Mainloop::get_problem_shape_MNKL(Problem{}));

  struct Arguments {
    typename Mainloop::Params operands;
    Sizes sizes;
    ConvArguments<T> sums;  // steps: of kConvWgmmaDepth
  };

  struct Shared {
    typename Mainloop::TensorStorage operands;
    typename Mainloop::PipelineStorage pipeline;
    alignas(16) float staging[kGroups * 4][16 * kConvWgmmaPadded];  // of each multiplying warp
  };
  static_assert(sizeof(Shared) <= kConvWgmmaSharedBytes);
};

/// Sums on their way from the layout of wgmma to rows of 16 bytes, through the warp's staging: 16 rows and
/// kConvWgmmaChunk columns at a time.
template <ConvDirection Direction, typename Conv, typename T, typename Accumulators>
__device__ void store_wgmma(const ConvArguments<T>& args, const WgmmaWork& work, const Accumulators& sums,
                            float* staging, int thread) {
  constexpr int kPacks = kConvWgmmaChunk / kConvPack;
  constexpr int kGroupRows = 64;
  const int lane = thread % kWarpSize;
  const int first_row = work.row_tile * Conv::kTile.rows + thread / kWarpSize * 16;  // of this warp
  WgmmaColumns columns = {work.column_tile * Conv::kTile.columns, args.columns};     // with no register to spare
  if constexpr (Direction == ConvDirection::kBackwardWeight) {
    columns = wgmma_columns(work.column_tile, Conv::kTile.columns, args.sizes.in);
  }
#pragma unroll
  for (int i = 0; i < Conv::kTile.rows / (kGroupRows * Conv::kGroups); ++i) {
#pragma unroll
    for (int chunk = 0; chunk < Conv::kTile.columns; chunk += kConvWgmmaChunk) {
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        const auto sum = [&](int across, int down) {
          return sums(cute::make_coord(across, down, chunk / 8 + j), i, 0);
        };
        float* target = staging + lane / 4 * kConvWgmmaPadded + j * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(target) = {sum(0, 0), sum(1, 0)};
        *reinterpret_cast<float2*>(target + 8 * kConvWgmmaPadded) = {sum(0, 1), sum(1, 1)};
      }
      __syncwarp();
#pragma unroll
      for (int k = lane; k < 16 * kPacks; k += kWarpSize) {
        const int row = first_row + i * kGroupRows * Conv::kGroups + k / kPacks;
        const int column = columns.first + chunk + k % kPacks * kConvPack;
        if (row >= args.rows || column >= columns.last) continue;
        const float* source = staging + k / kPacks * kConvWgmmaPadded + k % kPacks * kConvPack;
        store_or_part<Direction>(args, work.split, row, column, load<4>(source), load<4>(source + 4));
      }
      __syncwarp();
    }
  }
}

template <ConvDirection Direction, int Tile, typename T>
__global__ void __launch_bounds__(WgmmaConv<Direction, Tile, T>::kThreads, 1)
    mp_conv2d_wgmma(const __grid_constant__ typename WgmmaConv<Direction, Tile, T>::Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Conv = WgmmaConv<Direction, Tile, T>;
  using Mainloop = typename Conv::Mainloop;
  using Pipeline = typename Mainloop::MainloopPipeline;
  auto& shared = *reinterpret_cast<typename Conv::Shared*>(shared_stages());
  const int group = cutlass::canonical_warp_group_idx();
  const int warp = cutlass::canonical_warp_idx_sync();
  const bool copies = group == 0;

  if (warp == 0 && cute::elect_one_sync()) Mainloop::prefetch_tma_descriptors(args.operands);
  typename Pipeline::Params parameters;
  parameters.role = !copies     ? Pipeline::ThreadCategory::Consumer
                    : warp == 0 ? Pipeline::ThreadCategory::Producer
                                : Pipeline::ThreadCategory::NonParticipant;
  parameters.is_leader = threadIdx.x % 128 == 0;
  parameters.num_consumers = 128 * Conv::kGroups;
  parameters.transaction_bytes = args.operands.tma_transaction_bytes;
  Pipeline pipeline(shared.pipeline, parameters, typename Conv::Cluster{});
  cute::cluster_arrive_relaxed();

  Mainloop mainloop;
  const auto operands = mainloop.load_init(args.sizes, args.operands);
  const auto a_tiles = cute::shape<2>(cute::get<0>(operands));
  const auto b_tiles = cute::shape<2>(cute::get<1>(operands));
  const auto steps = cute::shape<3>(cute::get<0>(operands));
  const int rank = static_cast<int>(cute::block_rank_in_cluster());
  const int column_tiles = cute::size(b_tiles);
  const int row_pairs = (cute::size(a_tiles) + Conv::kBlocks - 1) / Conv::kBlocks;
  const int first = static_cast<int>(blockIdx.x) / Conv::kBlocks;
  const int stride = static_cast<int>(gridDim.x) / Conv::kBlocks;
  const int all = column_tiles * row_pairs * args.sums.splits;
  const auto work_at = [&](int index) {
    return wgmma_work(index, rank, Conv::kBlocks, column_tiles, row_pairs, args.sums.steps, args.sums.splits);
  };
  cute::cluster_wait();  // the barriers of both blocks are set up

  if (copies) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (warp != 0) return;
    auto state = cutlass::make_producer_start_state<Pipeline>();
    for (int index = first; index < all; index += stride) {
      const WgmmaWork work = work_at(index);
      const auto place = cute::make_coord(cute::idx2crd(work.row_tile, a_tiles),
                                          cute::idx2crd(work.column_tile, b_tiles), cute::_, cute::Int<0>{});
      const auto step = cute::make_coord_iterator(cute::idx2crd(work.first, steps), steps);
      mainloop.load(args.operands, pipeline, state, operands, place, step, work.count,
                    static_cast<int>(threadIdx.x) % kWarpSize, static_cast<uint32_t>(rank), shared.operands);
      state.advance(static_cast<uint32_t>(work.count));
    }
    mainloop.load_tail(pipeline, state);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    const int thread = static_cast<int>(threadIdx.x) - 128;
    typename Mainloop::PipelineState state;
    for (int index = first; index < all; index += stride) {
      const WgmmaWork work = work_at(index);
      auto sums = cute::partition_fragment_C(typename Conv::TiledMma{},
                                             cute::Shape<typename Conv::Rows, typename Conv::Columns>{});
      mainloop.mma(pipeline, state, sums, work.count, thread, shared.operands, args.operands);
      mainloop.mma_tail(pipeline, state, work.count);
      state.advance(static_cast<uint32_t>(work.count));
      store_wgmma<Direction, Conv>(args.sums, work, sums, shared.staging[thread / kWarpSize], thread);
    }
  }
#endif
}

}  // namespace edm2::cuda
