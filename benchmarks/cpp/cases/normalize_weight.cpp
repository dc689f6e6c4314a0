#include "edm2/normalize_weight.h"

#include <cmath>
#include <memory>

#include "networks.h"
#include "table.h"

namespace edm2::bench {

/// Effective weights of a whole network in fp16 (bf16 on the CPU), with and without forced normalisation, and their
/// backward, with one gain for every tensor.
void normalize_weight(Table& table) {
  const DType half = table.size == Size::kCPU ? DType::kBFloat16 : DType::kFloat16;
  for (const Network& network : networks(table.size)) {
    const std::vector<Weight> weights = weights_of(network);
    const Ends ends(weights);
    const auto count = static_cast<int64_t>(weights.size());
    struct Lists {
      std::vector<WeightRows> tensors;
      std::vector<WeightRowsBackward> backward;
      std::vector<int64_t> offsets{0};
      int64_t rows = 0;
    };
    const auto lists = std::make_shared<Lists>();
    lists->tensors.resize(weights.size());
    lists->backward.resize(weights.size());
    for (const Weight& weight : weights) {
      lists->offsets.push_back(lists->offsets.back() + weight.rows * weight.row_size);
      lists->rows += weight.rows;
    }
    const Buffer raw{ends.numel, DType::kFloat32, true};
    const Buffer effective{ends.numel, half, true};
    const Buffer gains{count, DType::kFloat32, true};
    for (const bool force : {false, true}) {
      table.add(
          std::string(force ? "normalize_weight_forced " : "normalize_weight ") + network.name, {raw, effective, gains},
          [=](const Pointers& p) {
            for (size_t i = 0; i < weights.size(); ++i) {
              const auto [rows, row_size] = weights[i];
              lists->tensors[i] = {static_cast<float*>(p[0]) + ends.offsets[i],
                                   static_cast<uint16_t*>(p[1]) + ends.offsets[i],
                                   rows,
                                   row_size,
                                   1,
                                   GPU_OR_0(static_cast<const float*>(p[2]) + i),
                                   1.0 / std::sqrt(static_cast<double>(row_size)),
                                   half};
            }
            return NormalizeWeightParams{
                lists->tensors.data(), lists->offsets.data(), count, DType::kFloat32, kEps, force};
          },
          GPU(cuda::launch_normalize_weight), CPU(cpu::normalize_weight), lists->offsets.back());
    }
    // On the GPU the dots of a row are floats.
    const Buffer dots{lists->rows, GPU_OR_0(true) ? DType::kFloat32 : DType::kFloat64, false};
    table.add(
        std::string("normalize_weight_backward ") + network.name, {effective, raw, raw, dots, gains, gains},
        [=](const Pointers& p) {
          int64_t row = 0;
          for (size_t i = 0; i < weights.size(); ++i) {
            const auto [rows, row_size] = weights[i];
            const double factor = 1.0 / std::sqrt(static_cast<double>(row_size));
            auto* row_dots = static_cast<unsigned char*>(p[3]) + dots.bytes() / lists->rows * row;
            lists->backward[i] = {static_cast<uint16_t*>(p[0]) + ends.offsets[i],
                                  static_cast<float*>(p[1]) + ends.offsets[i],
                                  static_cast<float*>(p[2]) + ends.offsets[i],
                                  row_dots,
                                  rows,
                                  row_size,
                                  GPU_OR_0(static_cast<const float*>(p[4]) + i),
                                  factor,
                                  GPU_OR_0(static_cast<float*>(p[5]) + i),
                                  factor};
            row += rows;
          }
          return NormalizeWeightBackwardParams{
              lists->backward.data(), lists->offsets.data(), count, DType::kFloat32, half, kEps};
        },
        GPU(cuda::launch_normalize_weight_backward), CPU(cpu::normalize_weight_backward), lists->offsets.back());
  }
}

}  // namespace edm2::bench
