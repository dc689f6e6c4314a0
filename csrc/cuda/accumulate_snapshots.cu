#include "edm2/accumulate_snapshots.h"

#include "accumulate_snapshots.cuh"
#include "launch.h"

namespace edm2::cuda {
namespace {

/// One launch: inputs [first_input, first_input + num_inputs) into outputs [first_output, first_output + num_outputs).
struct Part {
  int64_t first_input;
  int64_t num_inputs;
  int64_t first_output;
  int64_t num_outputs;
};

/// The most threads side by side for which a tile of all inputs fits into shared memory.
template <class Table>
int32_t lanes_of_tile(int64_t num_inputs) {
  static_assert(Table::kInputs * kWarpSize * kElements <= Table::kTileFloats);
  int32_t lanes = kThreads;
  while (num_inputs * lanes * kElements > Table::kTileFloats) lanes /= 2;
  return lanes;
}

int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

template <bool kCompensated, class Table>
cudaError_t accumulate(const AccumulateSnapshotsParams& params, const Part& part, cudaStream_t stream) {
  Table table;
  table.out = static_cast<float*>(params.out) + part.first_output * params.row_stride;
  table.row_stride = params.row_stride;
  table.numel = params.numel;
  table.num_inputs = static_cast<int32_t>(part.num_inputs);
  table.num_outputs = static_cast<int32_t>(part.num_outputs);
  table.lanes = lanes_of_tile<Table>(part.num_inputs);
  const int64_t outputs_bytes = 4 * part.num_outputs * params.numel;
  Traffic traffic{outputs_bytes, outputs_bytes};
  for (int64_t n = 0; n < part.num_inputs; ++n) {
    const SnapshotInput& input = params.inputs[part.first_input + n];
    table.inputs[n] = input.data;
    table.dtypes[n] = input.dtype;
    traffic.read += params.numel * bytes_of(input.dtype);
  }
  float* next = table.coefs;
  for (int64_t m = part.first_output; m < part.first_output + part.num_outputs; ++m) {
    for (int64_t n = part.first_input; n < part.first_input + part.num_inputs; ++n) {
      const double coef = params.coefs[n * params.num_outputs + m];
      *next++ = static_cast<float>(coef);
      if constexpr (kCompensated) *next++ = static_cast<float>(coef - static_cast<float>(coef));
    }
  }
  return launch(accumulate_snapshots_tiles<kCompensated, Table>, ceil_div(params.numel, table.lanes * kElements),
                kThreads, stream, traffic, table);
}

template <bool kCompensated>
cudaError_t accumulate_all(const AccumulateSnapshotsParams& params, cudaStream_t stream) {
  using Small = SmallSnapshotTable;
  using Large = LargeSnapshotTable;
  constexpr int kParts = kCompensated ? 2 : 1;
  for (Part part = {}; part.first_input < params.num_inputs; part.first_input += part.num_inputs) {
    part.num_inputs = std::min<int64_t>(params.num_inputs - part.first_input, Large::kInputs);
    const int64_t most_outputs = Large::kCoefs / (kParts * part.num_inputs);
    for (part.first_output = 0; part.first_output < params.num_outputs; part.first_output += part.num_outputs) {
      part.num_outputs = std::min(params.num_outputs - part.first_output, most_outputs);
      const bool small =
          part.num_inputs <= Small::kInputs && part.num_inputs * part.num_outputs * kParts <= Small::kCoefs;
      const cudaError_t error = small ? accumulate<kCompensated, Small>(params, part, stream)
                                      : accumulate<kCompensated, Large>(params, part, stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace

int launch_accumulate_snapshots(const AccumulateSnapshotsParams& params, CUstream_st* stream) {
  if (params.out_dtype != DType::kFloat32) return cudaErrorInvalidValue;
  for (int64_t n = 0; n < params.num_inputs; ++n) {
    if (params.inputs[n].dtype == DType::kFloat64) return cudaErrorInvalidValue;
  }
  return params.compensated ? accumulate_all<true>(params, stream) : accumulate_all<false>(params, stream);
}

}  // namespace edm2::cuda
