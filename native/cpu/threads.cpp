#include "cpu/threads.h"

#include <atomic>
#include <exception>

#include <omp.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "core/check.h"

namespace pytrain::cpu {

namespace {

#if defined(__x86_64__)
constexpr std::uint64_t kFlushBits = 0x8040;  // MXCSR: flush to zero (bit 15), denormals are zero (bit 6)
std::uint64_t read_control() { return _mm_getcsr(); }
void write_control(std::uint64_t value) { _mm_setcsr(static_cast<unsigned>(value)); }
#elif defined(__aarch64__)
constexpr std::uint64_t kFlushBits = std::uint64_t{1} << 24;  // FPCR.FZ: results and operands
std::uint64_t read_control() {
    std::uint64_t value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
}
void write_control(std::uint64_t value) { __asm__ volatile("msr fpcr, %0" : : "r"(value)); }
#else
constexpr std::uint64_t kFlushBits = 0;  // this architecture's control word is unknown: subnormals are slow but right
std::uint64_t read_control() { return 0; }
void write_control(std::uint64_t) {}
#endif

}  // namespace

int default_threads() { return omp_get_max_threads(); }

void set_default_threads(int threads) {
    check(threads >= 1, "threads: must be at least 1, not ", threads);
    omp_set_num_threads(threads);
}

FlushSubnormals::FlushSubnormals() : saved_(read_control()) { write_control(saved_ | kFlushBits); }

FlushSubnormals::~FlushSubnormals() { write_control(saved_); }

void parallel_for_erased(int threads, std::int64_t tasks, TaskBody body, void* context) {
    check(threads >= 1, "parallel_for needs at least one thread, not ", threads);
    if (tasks <= 0) return;
    if (threads == 1 || tasks == 1) {
        const FlushSubnormals flush;
        for (std::int64_t task = 0; task < tasks; ++task) body(context, task, 0);
        return;
    }
    // An exception may not leave an OpenMP region: the first one is kept and thrown once all threads are back.
    std::exception_ptr failure;
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads)
    {
        const FlushSubnormals flush;
        const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1) nowait
        for (std::int64_t task = 0; task < tasks; ++task) {
            if (failed.load(std::memory_order_relaxed)) continue;
            try {
                body(context, task, thread);
            } catch (...) {
                if (!failed.exchange(true)) failure = std::current_exception();
            }
        }
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace pytrain::cpu
