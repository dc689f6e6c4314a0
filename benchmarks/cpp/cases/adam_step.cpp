#include "edm2/adam_step.h"

#include <memory>

#include "networks.h"
#include "table.h"

namespace edm2::bench {

/// The whole optimizer step with gradients of effective weights, two averages and the next forward's effective weights
/// in fp16 (bf16 on the CPU).
void adam_step(Table& table) {
  constexpr int64_t kProfiles = 2;
  const DType half = table.size == Size::kCPU ? DType::kBFloat16 : DType::kFloat16;
  for (const Network& network : networks(table.size)) {
    const std::vector<Weight> weights = weights_of(network);
    const Ends ends(weights);
    struct Lists {
      std::vector<AdamTensor> tensors;
      std::vector<void*> emas;
      std::vector<int64_t> offsets{0};
    };
    const auto lists = std::make_shared<Lists>();
    const auto count = static_cast<int64_t>(weights.size());
    lists->tensors.resize(weights.size());
    lists->emas.resize(weights.size() * kProfiles);
    for (const Weight& weight : weights)
      lists->offsets.push_back(lists->offsets.back() + weight.rows * weight.row_size);
    const Buffer raw{ends.numel, DType::kFloat32, true};
    const Buffer zeros{ends.numel, DType::kFloat32, false, true};  // random squares would have no root
    const Buffer scalars{2 + kProfiles, DType::kFloat64, true};
    table.add(
        std::string("adam_step 2 profiles of ") + network.name,
        {raw, raw, raw, zeros, raw, raw, {ends.numel, half, false}, scalars, {count, DType::kFloat64, false, true}},
        [=](const Pointers& p) {
          for (size_t i = 0; i < weights.size(); ++i) {
            const auto tensor = [&](size_t k) { return static_cast<float*>(p[k]) + ends.offsets[i]; };
            void** emas = &lists->emas[i * kProfiles];
            for (size_t k = 0; k < kProfiles; ++k) emas[k] = tensor(4 + k);
            AdamTensor& t = lists->tensors[i] = {};
            t.param = tensor(0);
            t.grad = tensor(1);
            t.exp_avg = tensor(2);
            t.exp_avg_sq = tensor(3);
            t.emas = emas;
            t.nonfinite = static_cast<int64_t*>(p[8]) + i;
            t.prepared = static_cast<uint16_t*>(p[6]) + ends.offsets[i];
            t.prepared_dtype = half;
            t.rows = weights[i].rows;
            t.row_size = weights[i].row_size;
            t.inner = 1;
            t.weight = true;
          }
          return AdamStepParams{lists->tensors.data(),
                                lists->offsets.data(),
                                count,
                                kProfiles,
                                static_cast<const double*>(p[7]),
                                nullptr,
                                DType::kFloat32,
                                0.9,
                                0.99,
                                1e-8,
                                kEps,
                                true,
                                true};
        },
        GPU(cuda::launch_adam_step), CPU(cpu::adam_step), lists->offsets.back());
  }
}

}  // namespace edm2::bench
