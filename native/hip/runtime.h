// The HIP run time: AMD's, the shim's (tests/hip/shim) or CUDA's under HIP's names.
#pragma once
#if defined(PYTRAIN_HIP_SHIM)
#include "shim/shim.h"
#elif defined(__CUDACC__)
#include "hip/compat_cuda.h"
#else
#include <hip/hip_runtime.h>
#endif
