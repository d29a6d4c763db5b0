// Threads through OpenMP, within the affinity mask that the launcher gave us.
#pragma once
#include <cstdint>
#include <type_traits>

namespace pytrain::cpu {

// OMP_NUM_THREADS, or else the number of cores in the affinity mask.
int default_threads();

// Makes default_threads() answer this from now on, on the calling thread: for several ranks that share a node's cores
// where OMP_NUM_THREADS says nothing. Devices that were made before keep their number.
void set_default_threads(int threads);

// Flushes subnormal results and operands to zero on this thread while it lives, and restores what was there before:
// subnormals slow training down, and a process-wide flush breaks other people's code.
class FlushSubnormals {
public:
    FlushSubnormals();
    ~FlushSubnormals();
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

private:
    std::uint64_t saved_;
};

using TaskBody = void (*)(void* context, std::int64_t task, int thread);
void parallel_for_erased(int threads, std::int64_t tasks, TaskBody body, void* context);

// Calls body(task, thread) for every task in [0, tasks), on at most `threads` threads and in no particular order;
// thread < threads says whose scratch to use. Results must depend on the task alone. The first exception is thrown to
// the caller after all threads have stopped. Subnormals are flushed inside. A body must not call parallel_for again.
template <class Body>
void parallel_for(int threads, std::int64_t tasks, Body&& body) {
    using Function = std::remove_reference_t<Body>;
    parallel_for_erased(
        threads, tasks,
        [](void* context, std::int64_t task, int thread) { (*static_cast<Function*>(context))(task, thread); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace pytrain::cpu
