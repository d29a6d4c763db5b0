// The names of the HIP run time that native/hip uses, over CUDA's, for PYTRAIN_HIP=CUDA. See compat.h.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdio>

using hipError_t = cudaError_t;
using hipEvent_t = cudaEvent_t;
using hipStream_t = cudaStream_t;
constexpr auto hipSuccess = cudaSuccess;
constexpr auto hipErrorNotReady = cudaErrorNotReady;
constexpr auto hipMemcpyDefault = cudaMemcpyDefault;
constexpr auto hipMemAdviseSetPreferredLocation = cudaMemAdviseSetPreferredLocation;
constexpr auto hipMemAdviseSetAccessedBy = cudaMemAdviseSetAccessedBy;
constexpr unsigned hipMemAttachGlobal = cudaMemAttachGlobal;
constexpr unsigned hipHostMallocDefault = cudaHostAllocDefault;
constexpr unsigned hipEventDisableTiming = cudaEventDisableTiming;
constexpr unsigned hipStreamNonBlocking = cudaStreamNonBlocking;
constexpr int hipCpuDeviceId = cudaCpuDeviceId;

inline const char* hipGetErrorString(hipError_t error) { return cudaGetErrorString(error); }
inline hipError_t hipGetLastError() { return cudaGetLastError(); }
inline hipError_t hipGetDeviceCount(int* count) { return cudaGetDeviceCount(count); }
inline hipError_t hipSetDevice(int device) { return cudaSetDevice(device); }

struct hipDeviceProp_t {
    char name[256];
    char gcnArchName[256];
};
inline hipError_t hipGetDeviceProperties(hipDeviceProp_t* properties, int device) {
    cudaDeviceProp found{};
    const hipError_t error = cudaGetDeviceProperties(&found, device);
    if (error != hipSuccess) return error;
    std::snprintf(properties->name, sizeof properties->name, "%.255s", found.name);
    std::snprintf(properties->gcnArchName, sizeof properties->gcnArchName, "sm_%d%d", found.major, found.minor);
    return error;
}

inline hipError_t hipMallocManaged(void** pointer, std::size_t bytes, unsigned flags) {
    return cudaMallocManaged(pointer, bytes, flags);
}
inline hipError_t hipMemAdvise(const void* pointer, std::size_t bytes, cudaMemoryAdvise advice, int device) {
#if CUDART_VERSION >= 13000
    cudaMemLocation location{};
    location.type = device == hipCpuDeviceId ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice;
    location.id = device == hipCpuDeviceId ? 0 : device;
    return cudaMemAdvise(pointer, bytes, advice, location);
#else
    return cudaMemAdvise(pointer, bytes, advice, device);
#endif
}
inline hipError_t hipFree(void* pointer) { return cudaFree(pointer); }
inline hipError_t hipHostMalloc(void** pointer, std::size_t bytes, unsigned flags) {
    return cudaHostAlloc(pointer, bytes, flags);
}
inline hipError_t hipHostFree(void* pointer) { return cudaFreeHost(pointer); }
inline hipError_t hipMemset(void* pointer, int value, std::size_t bytes) { return cudaMemset(pointer, value, bytes); }
inline hipError_t hipMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                                 hipStream_t stream) {
    return cudaMemcpyAsync(to, from, bytes, kind, stream);
}
inline hipError_t hipMemsetAsync(void* pointer, int value, std::size_t bytes, hipStream_t stream) {
    return cudaMemsetAsync(pointer, value, bytes, stream);
}
inline hipError_t hipStreamCreateWithFlags(hipStream_t* stream, unsigned flags) {
    return cudaStreamCreateWithFlags(stream, flags);
}
inline hipError_t hipStreamSynchronize(hipStream_t stream) { return cudaStreamSynchronize(stream); }
inline hipError_t hipStreamDestroy(hipStream_t stream) { return cudaStreamDestroy(stream); }
inline hipError_t hipStreamWaitEvent(hipStream_t stream, hipEvent_t event, unsigned flags) {
    return cudaStreamWaitEvent(stream, event, flags);
}
inline hipError_t hipEventCreateWithFlags(hipEvent_t* event, unsigned flags) {
    return cudaEventCreateWithFlags(event, flags);
}
inline hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream) { return cudaEventRecord(event, stream); }
inline hipError_t hipEventQuery(hipEvent_t event) { return cudaEventQuery(event); }
inline hipError_t hipEventSynchronize(hipEvent_t event) { return cudaEventSynchronize(event); }
inline hipError_t hipEventDestroy(hipEvent_t event) { return cudaEventDestroy(event); }

#if defined(__CUDACC__)
namespace pytrain::hip {

// Lets a kernel be launched with so many bytes of dynamic shared memory. Where that is refused, the launch fails and
// says so.
template <class Kernel>
hipError_t allow_shared(Kernel* kernel, std::size_t bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace pytrain::hip
#endif
