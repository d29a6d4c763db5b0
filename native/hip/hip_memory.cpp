// Device and pinned memory of the HIP device.
#include <algorithm>
#include <cstring>

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

// A snapshot is the host's: it is written to disk, and would take the GPU's memory from the training that goes on
// meanwhile. Pinned, it is filled at the full rate of the link, and by a queue that nobody needs to wait for.
void* HipMemory::allocate(std::size_t bytes, MemoryKind kind) {
    if (kind == MemoryKind::snapshot) return pinned(bytes, kind);
    void* pointer = nullptr;
    const std::size_t mapped = std::max<std::size_t>(bytes, 1);
    const hipError_t error = hipMallocManaged(&pointer, mapped, hipMemAttachGlobal);
    check(error == hipSuccess, "cannot allocate ", bytes, " bytes on GPU ", device_, " for ", name_of(kind), ": ",
          hipGetErrorString(error));
    // Advice: where the system has no page migration, the memory works all the same.
    static_cast<void>(hipMemAdvise(pointer, mapped, hipMemAdviseSetPreferredLocation, device_));
    static_cast<void>(hipMemAdvise(pointer, mapped, hipMemAdviseSetAccessedBy, hipCpuDeviceId));
    check_hip(hipMemset(pointer, 0, mapped), "cannot zero new memory");
    return add(pointer, {bytes, kind, false});
}

void* HipMemory::allocate_pinned(std::size_t bytes) { return pinned(bytes, MemoryKind::staging); }

void* HipMemory::pinned(std::size_t bytes, MemoryKind kind) {
    void* pointer = nullptr;
    const std::size_t mapped = std::max<std::size_t>(bytes, 1);
    const hipError_t error = hipHostMalloc(&pointer, mapped, hipHostMallocDefault);
    check(error == hipSuccess, "cannot allocate ", bytes, " bytes of pinned host memory for ", name_of(kind), ": ",
          hipGetErrorString(error));
    std::memset(pointer, 0, mapped);
    return add(pointer, {bytes, kind, true});
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

const HipMemory::Block* HipMemory::find(const void* pointer, std::size_t bytes) const {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    auto after = blocks_.upper_bound(address);
    if (after == blocks_.begin()) return nullptr;
    --after;
    return address + bytes <= after->first + after->second.bytes ? &after->second : nullptr;
}

bool HipMemory::owns(const void* pointer, std::size_t bytes) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return find(pointer, bytes) != nullptr;
}

bool HipMemory::holds_for_gpu(const void* pointer, std::size_t bytes) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Block* const block = find(pointer, bytes);
    return block != nullptr && !block->pinned;
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
