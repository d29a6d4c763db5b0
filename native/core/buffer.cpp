#include "core/buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <limits>

#include "core/check.h"

namespace pytrain {

namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Fresh pages, zeroed by the system when a thread first touches them (which also places them on that thread's node).
void* map_pages(std::size_t bytes, std::size_t alignment) {
    const std::size_t slack = alignment > kPage ? alignment : 0;
    void* mapped = mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    if (slack == 0) return mapped;
    char* const begin = static_cast<char*>(mapped);
    const std::size_t head = (alignment - reinterpret_cast<std::uintptr_t>(begin) % alignment) % alignment;
    if (head > 0) munmap(begin, head);
    if (slack > head) munmap(begin + head + bytes, slack - head);
    return begin + head;
}

}  // namespace

const char* name_of(MemoryKind kind) {
    switch (kind) {
        case MemoryKind::weights:
            return "weights";
        case MemoryKind::gradients:
            return "gradients";
        case MemoryKind::master:
            return "master";
        case MemoryKind::optimizer:
            return "optimizer";
        case MemoryKind::activations:
            return "activations";
        case MemoryKind::workspace:
            return "workspace";
        case MemoryKind::staging:
            return "staging";
        case MemoryKind::snapshot:
            return "snapshot";
        case MemoryKind::count:
            break;
    }
    return "unknown";
}

Memory::~Memory() {
    for (const auto& [pointer, block] : blocks_) munmap(pointer, block.mapped);
}

void* Memory::allocate(std::size_t bytes, MemoryKind kind) {
    check(bytes <= std::numeric_limits<std::size_t>::max() / 2, "cannot allocate ", bytes, " bytes for ",
          name_of(kind));
    const std::size_t alignment = bytes >= kHugePage ? kHugePage : kPage;
    const std::size_t mapped = std::max(round_up(bytes, kPage), kPage);
    void* const pointer = map_pages(mapped, alignment);
    check(pointer != nullptr, "cannot allocate ", bytes, " bytes for ", name_of(kind), ": ", std::strerror(errno));
#ifdef MADV_HUGEPAGE
    if (alignment == kHugePage) madvise(pointer, mapped, MADV_HUGEPAGE);  // advice: a kernel that has none may refuse
#endif
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.emplace(pointer, Block{bytes, mapped, kind});
    Count& count = counts_[static_cast<std::size_t>(kind)];
    count.in_use += bytes;
    count.peak = std::max(count.peak, count.in_use);
    return pointer;
}

void Memory::release(void* pointer) {
    if (pointer == nullptr) return;
    Block block{};
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = blocks_.find(pointer);
        check(found != blocks_.end(), "released a pointer that this device did not allocate");
        block = found->second;
        counts_[static_cast<std::size_t>(block.kind)].in_use -= block.bytes;
        blocks_.erase(found);
    }
    munmap(pointer, block.mapped);
}

std::size_t Memory::bytes_in_use(MemoryKind kind) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return counts_.at(static_cast<std::size_t>(kind)).in_use;
}

std::size_t Memory::bytes_peak(MemoryKind kind) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return counts_.at(static_cast<std::size_t>(kind)).peak;
}

}  // namespace pytrain
