// The one place that knows who compiles the kernels: hipcc for AMD GPUs, nvcc for NVIDIA's, or the host compiler over
// the shim of tests/hip/shim, which runs them on the CPU. Kernels are written against this page alone.
//
// A block has up to 256 threads along x. A wave has 64 lanes; shuffles and matrix products are exchanges between them,
// and every lane of a wave must reach them, as every thread of a block must reach a barrier. On AMD GPUs its lanes run
// together; on NVIDIA's it is two warps of 32 (PYTRAIN_WARPS, compat_warps.h), which the shim can be, too.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "device.h"
#include "hip/runtime.h"

#if defined(__CUDACC__) || (defined(PYTRAIN_HIP_SHIM) && PYTRAIN_SHIM_LANES == 32)
#define PYTRAIN_WARPS
#endif

// LDS: `type name[count]` of the block. PYTRAIN_SHARED_FIRST: at most one of a kernel, and launched by
// PYTRAIN_LAUNCH_FIRST, which says its bytes: on NVIDIA GPUs it is dynamic, since all others together may take no more
// than 48 KiB there.
#if defined(PYTRAIN_HIP_SHIM)
#define PYTRAIN_DEVICE
#define PYTRAIN_INLINE inline
#define PYTRAIN_KERNEL __attribute__((visibility("default"))) void
#define PYTRAIN_SHARED(type, name, count) \
    type(&name)[count] = *static_cast<type(*)[count]>(pytrain::shim::shared(__FILE__, __LINE__, sizeof(type) * (count)))
#define PYTRAIN_LAUNCH(kernel, blocks, queue, ...)                                                       \
    pytrain::shim::launch(reinterpret_cast<const void*>(&kernel), blocks, pytrain::hip::kThreads, queue, \
                          [=] { kernel(__VA_ARGS__); })
#define PYTRAIN_SHARED_FIRST PYTRAIN_SHARED
#define PYTRAIN_LAUNCH_FIRST(bytes, ...) (static_cast<void>(bytes), PYTRAIN_LAUNCH(__VA_ARGS__))
#define PYTRAIN_WAVES(waves)
#define PYTRAIN_UNROLL
#define PYTRAIN_NO_UNROLL
#else
#define PYTRAIN_DEVICE __device__
#define PYTRAIN_INLINE __device__ __forceinline__
#define PYTRAIN_SHARED(type, name, count) __shared__ type name[count]
#define PYTRAIN_LAUNCH(kernel, blocks, queue, ...) kernel<<<blocks, pytrain::hip::kThreads, 0, queue>>>(__VA_ARGS__)
#if defined(__HIPCC__)
#define PYTRAIN_KERNEL __global__ void __launch_bounds__(256)
#define PYTRAIN_SHARED_FIRST PYTRAIN_SHARED
#define PYTRAIN_LAUNCH_FIRST(bytes, ...) (static_cast<void>(bytes), PYTRAIN_LAUNCH(__VA_ARGS__))
#define PYTRAIN_WAVES(waves) __attribute__((amdgpu_waves_per_eu(waves)))  // of a SIMD, at least, at once
#else
#define PYTRAIN_KERNEL __global__ void __launch_bounds__(256, 1)  // one block may have all registers
#define PYTRAIN_SHARED_FIRST(type, name, count)              \
    extern __shared__ __align__(16) char name##_of_launch[]; \
    type* const name = reinterpret_cast<type*>(name##_of_launch)
#define PYTRAIN_LAUNCH_FIRST(bytes, kernel, blocks, queue, ...)    \
    (static_cast<void>(pytrain::hip::allow_shared(kernel, bytes)), \
     kernel<<<blocks, pytrain::hip::kThreads, bytes, queue>>>(__VA_ARGS__))
#define PYTRAIN_WAVES(waves)
#endif
#define PYTRAIN_UNROLL _Pragma("unroll")
#define PYTRAIN_NO_UNROLL _Pragma("unroll 1")
#endif

// Scalars shared with the CPU device are plain inline functions: here they are compiled for the GPU as well.
#if defined(__HIPCC__)
namespace std {
using ::memcpy;  // HIP's, for the GPU, too
}
#pragma clang force_cuda_host_device begin
#include "core/half.h"
#include "core/philox.h"
#pragma clang force_cuda_host_device end
#elif defined(__CUDACC__)
#include <array>
#define inline __host__ __device__ inline
#include "core/half.h"
#include "core/philox.h"
#undef inline
#else
#include "core/half.h"
#include "core/philox.h"
#endif

namespace pytrain::hip {

constexpr int kThreads = 256;  // of every block

constexpr int kWave = 64;
constexpr int kWaves = kThreads / kWave;  // of a block

// --- where a thread stands ----------------------------------------------------------------------------------

PYTRAIN_INLINE int thread_index() { return static_cast<int>(threadIdx.x); }
PYTRAIN_INLINE int lane_index() { return static_cast<int>(threadIdx.x) % kWave; }
PYTRAIN_INLINE int wave_index() { return static_cast<int>(threadIdx.x) / kWave; }
PYTRAIN_INLINE std::int64_t block_index() { return static_cast<std::int64_t>(blockIdx.x); }
PYTRAIN_INLINE std::int64_t block_row() { return static_cast<std::int64_t>(blockIdx.y); }
PYTRAIN_INLINE std::int64_t block_count() { return static_cast<std::int64_t>(gridDim.x); }

// --- exchange -------------------------------------------------------------------------------------------------

#if defined(PYTRAIN_HIP_SHIM)
inline void barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { shim::barrier(file, line); }
#else
PYTRAIN_INLINE void barrier() { __syncthreads(); }
#endif

#if defined(PYTRAIN_WARPS)
PYTRAIN_INLINE float shuffle_xor(float value, int mask);
#elif defined(PYTRAIN_HIP_SHIM)
inline float shuffle_xor(float value, int mask, int line = __builtin_LINE()) {
    return shim::shuffle_xor(value, mask, line);
}
#else
PYTRAIN_INLINE float shuffle_xor(float value, int mask) { return __shfl_xor(value, mask); }
#endif

// --- 16 bytes, and sixteen sums in registers ---------------------------------------------------------------------

#if defined(PYTRAIN_WARPS)
struct alignas(16) Chunk {
    std::uint32_t word[4];
    PYTRAIN_INLINE std::uint32_t& operator[](int i) { return word[i]; }
    PYTRAIN_INLINE std::uint32_t operator[](int i) const { return word[i]; }
};
#else
typedef std::uint32_t Chunk __attribute__((vector_size(16)));
#endif

// keep_order: the compiler moves nothing across, so that loads which were put early stay early.
// uniform: a value that is the same in all lanes, for the compiler to know.
// GlobalBytes: an address that is known to lie in global memory, not in LDS.
// kept_scalar, kept_offset: an address that all threads share stays in scalar registers, and a lane's offset from it 32
// bits wide, so that a load takes both and needs no addition before it.
#if defined(__HIPCC__) && defined(__HIP_DEVICE_COMPILE__)
PYTRAIN_INLINE void keep_order() { __builtin_amdgcn_sched_barrier(0); }
typedef const __attribute__((address_space(1))) char* GlobalBytes;
PYTRAIN_INLINE int uniform(int value) { return __builtin_amdgcn_readfirstlane(value); }
PYTRAIN_INLINE GlobalBytes kept_scalar(GlobalBytes address) {
    const auto bits = (std::uint64_t)address;  // newer compilers want to be told that it is the same in all lanes
    const auto low = static_cast<std::uint32_t>(uniform(static_cast<int>(bits)));
    const auto high = static_cast<std::uint32_t>(uniform(static_cast<int>(bits >> 32)));
    address = (GlobalBytes)(static_cast<std::uint64_t>(high) << 32 | low);
    asm volatile("" : "+s"(address));
    return address;
}
PYTRAIN_INLINE std::uint32_t kept_offset(std::uint32_t offset) {
    asm volatile("" : "+v"(offset));
    return offset;
}
template <class Value>
PYTRAIN_INLINE Value load_global(GlobalBytes address) {
    return *(const __attribute__((address_space(1))) Value*)address;
}
#else
typedef const char* GlobalBytes;
template <class Value>
PYTRAIN_INLINE Value load_global(GlobalBytes address) {
#if defined(__CUDACC__)
    return *reinterpret_cast<const Value*>(address);  // one load: memcpy would go by bytes
#else
    Value value;
    memcpy(&value, address, sizeof value);
    return value;
#endif
}
PYTRAIN_INLINE int uniform(int value) { return value; }
PYTRAIN_INLINE void keep_order() {}
PYTRAIN_INLINE GlobalBytes kept_scalar(GlobalBytes address) { return address; }
PYTRAIN_INLINE std::uint32_t kept_offset(std::uint32_t offset) { return offset; }
#endif

// Global memory, where the address is a multiple of 16 (the shim makes sure).
#if defined(PYTRAIN_HIP_SHIM)
inline Chunk load_16(const void* address) {
    shim::check_alignment(address);
    Chunk chunk;
    std::memcpy(&chunk, address, sizeof chunk);
    return chunk;
}
inline void store_16(void* address, Chunk chunk) {
    shim::check_alignment(address);
    std::memcpy(address, &chunk, sizeof chunk);
}
#else
PYTRAIN_INLINE Chunk load_16(const void* address) { return *static_cast<const Chunk*>(address); }
PYTRAIN_INLINE void store_16(void* address, Chunk chunk) { *static_cast<Chunk*>(address) = chunk; }
#endif

// --- matrix products of a wave ------------------------------------------------------------------------------------
// Every lane gives one chunk of the left and one of the right operand and holds 16 of the 32 x 32 sums. With
// half = lane / 32, a chunk holds 8 (16-bit) or 4 (fp32) neighbouring k of one row: row lane % 32 of the left operand,
// column lane % 32 of the right one. Which k the chunks stand for is the caller's choice, as long as both agree.
// Sum g of a lane is row 8 (g / 4) + 4 half + g % 4, column lane % 32.

enum class Format : std::uint8_t { bf16, fp16, fp32 };  // of what the matrix units multiply

// `multiply` is so many matrix instructions, part after part.
template <Format format>
constexpr int kParts = format == Format::fp32 ? 4 : 2;

#if defined(PYTRAIN_WARPS)
}  // namespace pytrain::hip
#include "hip/compat_warps.h"
namespace pytrain::hip {
#elif defined(PYTRAIN_HIP_SHIM)
typedef float Sums __attribute__((vector_size(64)));

template <Format format>
inline Sums multiply_part(Chunk a, Chunk b, int part, Sums sums, int line = __builtin_LINE()) {
    if constexpr (format == Format::fp32)
        return shim::mfma_32x32x2_fp32(float_of(a[part]), float_of(b[part]), sums, line);
    std::uint16_t left[4], right[4];
    for (int i = 0; i < 4; ++i) {
        left[i] = static_cast<std::uint16_t>(a[2 * part + i / 2] >> (16 * (i % 2)));
        right[i] = static_cast<std::uint16_t>(b[2 * part + i / 2] >> (16 * (i % 2)));
    }
    return shim::mfma_32x32x8(left, right, sums, format == Format::bf16, line);
}
#else
typedef float Sums __attribute__((ext_vector_type(16)));
typedef short Mfma4Bf16 __attribute__((ext_vector_type(4)));
typedef _Float16 Mfma4Fp16 __attribute__((ext_vector_type(4)));

template <class To, class From>
PYTRAIN_INLINE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

template <Format format>
PYTRAIN_INLINE Sums multiply_part(Chunk a, Chunk b, int part, Sums sums) {
    if constexpr (format == Format::fp32) {
        return __builtin_amdgcn_mfma_f32_32x32x2f32(bit_cast<float>(a[part]), bit_cast<float>(b[part]), sums, 0, 0, 0);
    } else {
        const std::uint64_t left = a[2 * part] | static_cast<std::uint64_t>(a[2 * part + 1]) << 32;
        const std::uint64_t right = b[2 * part] | static_cast<std::uint64_t>(b[2 * part + 1]) << 32;
        if constexpr (format == Format::bf16)
            return __builtin_amdgcn_mfma_f32_32x32x8bf16_1k(bit_cast<Mfma4Bf16>(left), bit_cast<Mfma4Bf16>(right), sums,
                                                            0, 0, 0);
        else
            return __builtin_amdgcn_mfma_f32_32x32x8f16(bit_cast<Mfma4Fp16>(left), bit_cast<Mfma4Fp16>(right), sums, 0,
                                                        0, 0);
    }
}
#endif

template <Format format>
PYTRAIN_INLINE Sums multiply(Chunk a, Chunk b, Sums sums) {
    PYTRAIN_UNROLL
    for (int part = 0; part < kParts<format>; ++part) sums = multiply_part<format>(a, b, part, sums);
    return sums;
}

// --- numbers ------------------------------------------------------------------------------------------------------

// fp16 is converted by hardware where there is one; the bits are those of core/half.h.
PYTRAIN_INLINE float half_to_float(std::uint16_t bits) {
#if defined(__HIPCC__)
    return static_cast<float>(bit_cast<_Float16>(bits));
#else
    return fp16_to_float(bits);
#endif
}
PYTRAIN_INLINE std::uint16_t float_to_half(float value) {
#if defined(__HIPCC__)
    return bit_cast<std::uint16_t>(static_cast<_Float16>(value));
#else
    return float_to_fp16(value);
#endif
}

}  // namespace pytrain::hip
