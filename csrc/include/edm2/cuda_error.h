// Names for the error codes that launchers return.
#pragma once

namespace edm2::cuda {

/// The description of a cudaError_t.
const char* error_string(int error);

}  // namespace edm2::cuda
