#include "edm2/traffic.h"

/// For ctypes: what ops on meta tensors would have launched since the last call, as launches, bytes read, bytes written
/// and bytes of workspace.
extern "C" __attribute__((visibility("default"))) void edm2_take_tally(int64_t result[4]) {
  edm2::cuda::Tally& tally = edm2::cuda::tally;
  std::atomic<int64_t>* const counters[] = {&tally.launches, &tally.read, &tally.written, &tally.workspace};
  for (int i = 0; i < 4; ++i) result[i] = counters[i]->exchange(0);
}
