#include "edm2/cuda_error.h"

#include <cuda_runtime.h>

namespace edm2::cuda {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace edm2::cuda
