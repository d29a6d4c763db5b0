// The names of the HIP run time that native/hip uses, over CUDA's, for kernels without matrix units. See compat.h.
#pragma once
#include <cuda_runtime.h>

using hipError_t = cudaError_t;
using hipEvent_t = cudaEvent_t;
using hipStream_t = cudaStream_t;
constexpr auto hipSuccess = cudaSuccess;
