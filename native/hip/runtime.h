// The HIP run time: AMD's, the shim's (tests/hip/shim), or CUDA's under HIP's names.
#pragma once
#if defined(PYTRAIN_HIP_SHIM)
#include "shim/shim.h"
#elif defined(PYTRAIN_HIP_CUDA)
#include "hip/compat_cuda.h"
#else
#include <hip/hip_runtime.h>
#endif

namespace pytrain::hip {

// For the sentence that says that there is none.
#if defined(PYTRAIN_HIP_CUDA)
constexpr const char *kMaker = "NVIDIA", *kCount = "cudaGetDeviceCount";
#else
constexpr const char *kMaker = "AMD", *kCount = "hipGetDeviceCount";
#endif

}  // namespace pytrain::hip
