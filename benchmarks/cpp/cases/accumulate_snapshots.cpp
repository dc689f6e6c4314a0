#include "edm2/accumulate_snapshots.h"

#include <memory>

#include "table.h"

namespace edm2::bench {

void accumulate_snapshots(Table& table) {
  struct Shape {
    int64_t inputs;
    int64_t outputs;
  };
  const int64_t numel = table.size == Size::kSmall ? 1037 : table.size == Size::kCPU ? 1 << 16 : 1 << 24;
  for (const auto& [num_inputs, num_outputs] : {Shape{1, 12}, Shape{8, 6}, Shape{40, 20}}) {
    for (const bool compensated : {false, true}) {
      // What the parameters point to stays where it is for as long as the case lives.
      struct Lists {
        std::vector<SnapshotInput> inputs;
        std::vector<double> coefs;
      };
      const auto lists = std::make_shared<Lists>();
      for (int64_t i = 0; i < num_inputs * num_outputs; ++i) lists->coefs.push_back(0.1 * static_cast<double>(i % 7));
      std::vector<Buffer> buffers(static_cast<size_t>(num_inputs), {numel, DType::kFloat16, true});
      buffers.push_back({num_outputs * numel, DType::kFloat32, true});
      table.add(
          std::string("accumulate_snapshots ") + std::to_string(num_inputs) + " -> " + std::to_string(num_outputs) +
              (compensated ? " compensated" : ""),
          buffers,
          [=, num_inputs = num_inputs, num_outputs = num_outputs](const Pointers& p) {
            lists->inputs.clear();
            for (size_t n = 0; n + 1 < p.size(); ++n) lists->inputs.push_back({p[n], DType::kFloat16});
            return AccumulateSnapshotsParams{
                p.back(), DType::kFloat32, lists->inputs.data(), lists->coefs.data(), num_inputs, num_outputs,
                numel,    numel,           compensated};
          },
          GPU(cuda::launch_accumulate_snapshots), CPU(cpu::accumulate_snapshots), numel);
    }
  }
}

}  // namespace edm2::bench
