// Device and pinned memory of the HIP device.
#include <algorithm>

#include "core/buffer.h"
#include "core/check.h"
#include "hip/hip_device.h"

namespace pytrain::hip {

void check_hip(hipError_t error, const char* what) { check(error == hipSuccess, what, ": ", hipGetErrorString(error)); }

int device_count() {
    int count = 0;
    return hipGetDeviceCount(&count) == hipSuccess ? count : 0;
}

HipMemory::~HipMemory() {
    for (const auto& [address, block] : blocks_) static_cast<void>(free(reinterpret_cast<void*>(address), block));
}

hipError_t HipMemory::free(void* pointer, const Block& block) {
    return block.pinned ? hipHostFree(pointer) : hipFree(pointer);
}

void* HipMemory::add(void* pointer, const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.emplace(reinterpret_cast<std::uintptr_t>(pointer), block);
    Count& count = counts_[static_cast<std::size_t>(block.kind)];
    count.in_use += block.bytes;
    count.peak = std::max(count.peak, count.in_use);
    return pointer;
}

void* HipMemory::allocate(std::size_t bytes, MemoryKind kind) {
    void* pointer = nullptr;
    const std::size_t mapped = std::max<std::size_t>(bytes, 1);
    const hipError_t error = hipMallocManaged(&pointer, mapped, hipMemAttachGlobal);
    check(error == hipSuccess, "cannot allocate ", bytes, " bytes on GPU ", device_, " for ", name_of(kind), ": ",
          hipGetErrorString(error));
    // Advice: where the system has no page migration, the memory works all the same. A snapshot is the host's: it is
    // written to disk, and would take the GPU's memory from the training that goes on meanwhile.
    const int location = kind == MemoryKind::snapshot ? hipCpuDeviceId : device_;
    static_cast<void>(hipMemAdvise(pointer, mapped, hipMemAdviseSetPreferredLocation, location));
    static_cast<void>(hipMemAdvise(pointer, mapped, hipMemAdviseSetAccessedBy, hipCpuDeviceId));
    check_hip(hipMemset(pointer, 0, mapped), "cannot zero new memory");
    return add(pointer, {bytes, kind, false});
}

void* HipMemory::allocate_pinned(std::size_t bytes) {
    void* pointer = nullptr;
    const hipError_t error = hipHostMalloc(&pointer, std::max<std::size_t>(bytes, 1), hipHostMallocDefault);
    check(error == hipSuccess, "cannot allocate ", bytes, " bytes of pinned memory: ", hipGetErrorString(error));
    return add(pointer, {bytes, MemoryKind::staging, true});
}

void HipMemory::release(void* pointer) {
    if (pointer == nullptr) return;
    Block block{};
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = blocks_.find(reinterpret_cast<std::uintptr_t>(pointer));
        check(found != blocks_.end(), "released a pointer that this device did not allocate");
        block = found->second;
        counts_[static_cast<std::size_t>(block.kind)].in_use -= block.bytes;
        blocks_.erase(found);
    }
    check_hip(free(pointer, block), "cannot release memory");
}

bool HipMemory::owns(const void* pointer, std::size_t bytes) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    auto after = blocks_.upper_bound(address);
    if (after == blocks_.begin()) return false;
    --after;
    return address + bytes <= after->first + after->second.bytes;
}

std::size_t HipMemory::bytes_in_use(MemoryKind kind) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return counts_[static_cast<std::size_t>(kind)].in_use;
}

std::size_t HipMemory::bytes_peak(MemoryKind kind) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return counts_[static_cast<std::size_t>(kind)].peak;
}

}  // namespace pytrain::hip
