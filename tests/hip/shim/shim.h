// Runs HIP kernels on the CPU: one operating-system thread, one fiber per thread of a block, one block at a time.
//
// A wave runs until every lane of it stands at a barrier or has ended; waves, and the lanes within one, go in order or
// in an order shuffled by a seed, anew after every barrier. A barrier that is missing therefore shows as a read of what
// nobody has written yet: LDS is filled with NaN before each block. A barrier or an exchange that not all lanes reach
// is counted and ends the launch. What this cannot show: caches, timing, and what the compiler for the GPU does.
//
// PYTRAIN_SHIM_LANES=32 makes it NVIDIA's: warps of 32 lanes run together, two of them are a wave that meets at
// barriers of its own, and matrix products are mma.sync of a warp. Kernels then take the text that nvcc compiles
// (native/hip/compat_warps.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1) : x(width), y(height), z(depth) {}
};

namespace pytrain::shim {

struct Index {
    unsigned x, y, z;
};
extern Index thread_of_block, block_of_grid, size_of_grid;  // of the fiber that runs

constexpr int kLanes = PYTRAIN_SHIM_LANES;  // that run together, and exchange
static_assert(kLanes == 64 || kLanes == 32, "AMD's waves or NVIDIA's warps");
constexpr int kWave = 64;
// LDS of a block on gfx90a; with warps of 32, what kernels may take of it and the room for exchanges beside.
constexpr std::size_t kSharedBytes = 65536 + (kLanes == 32 ? 5120 : 0);

typedef float Sums __attribute__((vector_size(64)));

void* shared(const char* file, int line, std::size_t bytes);
void check_alignment(const void* address);  // of a 16-byte access; a wrong one ends the launch as failed
void barrier(const char* file, int line);
void wave_barrier(const char* file, int line);
float shuffle_xor(float value, int mask, int line);
Sums mfma_32x32x8(const std::uint16_t* a, const std::uint16_t* b, Sums sums, bool bf16, int line);
Sums mfma_32x32x2_fp32(float a, float b, Sums sums, int line);
void mma_16x8x8(float* d, const std::uint32_t* a, std::uint32_t b, bool bf16, int line);  // mma.sync.m16n8k8

struct Stream;
void launch(const void* kernel, dim3 blocks, int threads, Stream* stream, std::function<void()> body);

// What tests ask and say.
struct Counts {
    std::int64_t launches, blocks, barriers, divergent_barriers, products;  // products: matrix instructions
};
enum class Order { ascending, descending, shuffled };
void set_order(Order order, std::uint64_t seed);
Counts counts();
std::vector<std::string> launched_kernels();  // symbols, mangled

// A mistake that tests ask for, in the kernels whose symbol has `kernel` in it: a barrier that is not there, or two
// rows of a matrix product's result that have changed places.
struct Fault {
    enum class Kind { none, barrier, rows } kind = Kind::none;
    std::string kernel;
    std::string file;  // of the barrier
    int line = 0;
};
void set_fault(const Fault& fault);

// Barriers that were reached since the beginning.
struct BarrierSite {
    std::string kernel;  // symbol, mangled
    std::string file;
    int line;
};
std::vector<BarrierSite> barriers_reached();

}  // namespace pytrain::shim

#define threadIdx (pytrain::shim::thread_of_block)
#define blockIdx (pytrain::shim::block_of_grid)
#define gridDim (pytrain::shim::size_of_grid)

// --- the part of the HIP run time that native/hip uses -----------------------------------------------------------
// Streams hold what was queued until somebody waits: work that nobody waited for is work that has not been done.

using hipStream_t = pytrain::shim::Stream*;
struct hipEventState;
using hipEvent_t = hipEventState*;
enum hipError_t {
    hipSuccess = 0,
    hipErrorOutOfMemory = 2,
    hipErrorNoDevice = 100,
    hipErrorNotReady = 600,
    hipErrorLaunch = 719
};
enum hipMemcpyKind { hipMemcpyDefault = 4 };
enum hipMemoryAdvise { hipMemAdviseSetPreferredLocation = 3, hipMemAdviseSetAccessedBy = 5 };
struct hipDeviceProp_t {
    char name[256];
    char gcnArchName[256];
};
constexpr unsigned hipMemAttachGlobal = 1, hipHostMallocDefault = 0, hipEventDisableTiming = 2,
                   hipStreamNonBlocking = 1;
constexpr int hipCpuDeviceId = -1;

const char* hipGetErrorString(hipError_t error);
hipError_t hipGetLastError();
hipError_t hipGetDeviceCount(int* count);
hipError_t hipGetDeviceProperties(hipDeviceProp_t* properties, int device);
hipError_t hipSetDevice(int device);
hipError_t hipMallocManaged(void** pointer, std::size_t bytes, unsigned flags);
hipError_t hipMemAdvise(const void* pointer, std::size_t bytes, hipMemoryAdvise advice, int device);
hipError_t hipFree(void* pointer);
hipError_t hipHostMalloc(void** pointer, std::size_t bytes, unsigned flags);
hipError_t hipHostFree(void* pointer);
hipError_t hipMemset(void* pointer, int value, std::size_t bytes);
hipError_t hipMemcpyAsync(void* to, const void* from, std::size_t bytes, hipMemcpyKind kind, hipStream_t stream);
hipError_t hipMemsetAsync(void* pointer, int value, std::size_t bytes, hipStream_t stream);
hipError_t hipStreamCreateWithFlags(hipStream_t* stream, unsigned flags);
hipError_t hipStreamSynchronize(hipStream_t stream);
hipError_t hipStreamDestroy(hipStream_t stream);
hipError_t hipStreamWaitEvent(hipStream_t stream, hipEvent_t event, unsigned flags);
hipError_t hipEventCreateWithFlags(hipEvent_t* event, unsigned flags);
hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream);
hipError_t hipEventQuery(hipEvent_t event);
hipError_t hipEventSynchronize(hipEvent_t event);
hipError_t hipEventDestroy(hipEvent_t event);
