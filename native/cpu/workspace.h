// Scratch that operations use beside their arguments: one block per thread and one that all share, sized before step 0.
#pragma once
#include <cstddef>

#include "core/buffer.h"

namespace pytrain::cpu {

// What an operation asks for, in floats. Needs of several operations combine by taking the larger of each.
struct WorkspaceNeed {
    std::size_t thread_floats = 0;
    std::size_t shared_floats = 0;
};

class Workspace {
public:
    Workspace(Memory& memory, int threads);
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    // Makes room for `need`; never shrinks. Pointers handed out before are no longer valid.
    void reserve(const WorkspaceNeed& need);

    int threads() const { return threads_; }   // what to give to parallel_for
    float* thread(int index) const;            // (thread_floats), 4096-byte aligned; index as parallel_for hands it out
    float* shared() const { return shared_; }  // (shared_floats), 4096-byte aligned
    const WorkspaceNeed& size() const { return size_; }
    // Throws Error, naming the operation, where the reserved room is smaller than its need.
    void require(const WorkspaceNeed& need, const char* operation) const;

private:
    Memory& memory_;
    int threads_;
    WorkspaceNeed size_;
    std::size_t thread_stride_ = 0;  // floats between the blocks of two threads: whole pages, so that none is shared
    float* thread_block_ = nullptr;
    float* shared_ = nullptr;
};

}  // namespace pytrain::cpu
