// The launcher and kernel of snapshot sums, for ctypes.
#include "cuda/accumulate_snapshots.cu"

#include <vector>

extern "C" int accumulate_snapshots(float* out, const void* const* inputs, const int* dtypes, const double* coefs,
                                    int64_t num_inputs, int64_t num_outputs, int64_t numel, int64_t row_stride,
                                    bool compensated) {
  std::vector<edm2::SnapshotInput> list;
  for (int64_t n = 0; n < num_inputs; ++n) list.push_back({inputs[n], static_cast<edm2::DType>(dtypes[n])});
  return edm2::cuda::launch_accumulate_snapshots(
      {out, edm2::DType::kFloat32, list.data(), coefs, num_inputs, num_outputs, numel, row_stride, compensated},
      nullptr);
}
