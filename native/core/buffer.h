// Memory of a device: aligned, zeroed, counted by kind. Nothing else allocates inside a step.
#pragma once
#include <array>
#include <cstddef>
#include <mutex>
#include <unordered_map>

#include "device.h"

namespace pytrain {

// Owns every block that it hands out; thread-safe. Blocks are 4096-byte aligned, zeroed and, from 2 MiB on, advised to
// live in huge pages.
class Memory {
public:
    Memory() = default;
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    void* allocate(std::size_t bytes,
                   MemoryKind kind);  // never null, not even for 0 bytes; throws Error when out of memory
    void release(void* pointer);      // null is allowed; a pointer that is not ours throws Error
    std::size_t bytes_in_use(MemoryKind kind) const;
    std::size_t bytes_peak(MemoryKind kind) const;

private:
    struct Block {
        std::size_t bytes;   // as asked for: what is counted
        std::size_t mapped;  // rounded up to the alignment
        MemoryKind kind;
    };
    struct Count {
        std::size_t in_use = 0;
        std::size_t peak = 0;
    };

    mutable std::mutex mutex_;
    std::unordered_map<void*, Block> blocks_;
    std::array<Count, static_cast<std::size_t>(MemoryKind::count)> counts_{};
};

const char* name_of(MemoryKind kind);

}  // namespace pytrain
