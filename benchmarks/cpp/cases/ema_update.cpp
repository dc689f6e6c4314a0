#include "edm2/ema_update.h"

#include <memory>

#include "networks.h"
#include "table.h"

namespace edm2::bench {

void ema_update(Table& table) {
  constexpr int64_t kProfiles = 2;
  static const double kWeights[kProfiles] = {0.1, 0.2};
  for (const Network& network : networks(table.size)) {
    const std::vector<Weight> weights = weights_of(network);
    const Ends ends(weights);
    const Buffer buffer{ends.numel, DType::kFloat32, true};
    // What the parameters point to stays where it is for as long as the case lives.
    struct Lists {
      std::vector<EMATensor> tensors;
      std::vector<void*> emas;
    };
    const auto lists = std::make_shared<Lists>();
    lists->tensors.resize(weights.size());
    lists->emas.resize(weights.size() * kProfiles);
    int64_t items = 0;
    for (const Weight& weight : weights) items += weight.rows * weight.row_size;
    table.add(
        std::string("ema_update 2 profiles of ") + network.name, std::vector<Buffer>(1 + kProfiles, buffer),
        [=](const Pointers& p) {
          for (size_t i = 0; i < weights.size(); ++i) {
            const auto tensor = [&](size_t k) { return static_cast<float*>(p[k]) + ends.offsets[i]; };
            void** emas = &lists->emas[i * kProfiles];
            for (size_t k = 0; k < kProfiles; ++k) emas[k] = tensor(1 + k);
            lists->tensors[i] = {tensor(0), emas, weights[i].rows * weights[i].row_size};
          }
          return EMAUpdateParams{lists->tensors.data(), kWeights, static_cast<int64_t>(weights.size()), kProfiles,
                                 DType::kFloat32};
        },
        GPU(cuda::launch_ema_update), CPU(cpu::ema_update), items);
  }
}

}  // namespace edm2::bench
