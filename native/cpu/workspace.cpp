#include "cpu/workspace.h"

#include <utility>

#include "core/check.h"

namespace pytrain::cpu {

namespace {
constexpr std::size_t kPageFloats = 4096 / sizeof(float);
}

Workspace::Workspace(Memory& memory, int threads) : memory_(memory), threads_(threads) {
    check(threads >= 1, "a workspace needs at least one thread, not ", threads);
}

Workspace::~Workspace() {
    memory_.release(thread_block_);
    memory_.release(shared_);
}

void Workspace::reserve(const WorkspaceNeed& need) {
    const auto allocate = [this](std::size_t floats) {
        return static_cast<float*>(memory_.allocate(floats * sizeof(float), MemoryKind::workspace));
    };
    if (need.thread_floats > size_.thread_floats) {
        memory_.release(std::exchange(thread_block_, nullptr));
        size_.thread_floats = 0;
        thread_stride_ = (need.thread_floats + kPageFloats - 1) / kPageFloats * kPageFloats;
        thread_block_ = allocate(thread_stride_ * static_cast<std::size_t>(threads_));
        size_.thread_floats = need.thread_floats;
    }
    if (need.shared_floats > size_.shared_floats) {
        memory_.release(std::exchange(shared_, nullptr));
        size_.shared_floats = 0;
        shared_ = allocate(need.shared_floats);
        size_.shared_floats = need.shared_floats;
    }
}

float* Workspace::thread(int index) const { return thread_block_ + static_cast<std::size_t>(index) * thread_stride_; }

void Workspace::require(const WorkspaceNeed& need, const char* operation) const {
    check(need.thread_floats <= size_.thread_floats && need.shared_floats <= size_.shared_floats, operation,
          " needs a workspace of ", need.thread_floats, " floats per thread and ", need.shared_floats,
          " shared, but only ", size_.thread_floats, " and ", size_.shared_floats,
          " were reserved: call reserve with the largest sizes first");
}

}  // namespace pytrain::cpu
