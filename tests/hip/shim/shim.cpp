// Fibers, barriers, exchanges and LDS. See shim.h.
#include "shim/shim.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <tuple>

#include "core/half.h"
#include "shim/streams.h"

namespace pytrain::shim {

Index thread_of_block{}, block_of_grid{}, size_of_grid{};

namespace {

constexpr int kMostThreads = 1024;
constexpr std::size_t kStackBytes = std::size_t{256} << 10;
constexpr std::size_t kRoomBytes = 4 * kSharedBytes;  // more than there is, so that too much is reported, not a crash

// What a lane brings to an exchange: `run` is called once, with the operands of all lanes of the wave.
struct Exchange {
    void (*run)(void* const* operands);
    void* operand;
};

enum class State { ready, barrier, wave_barrier, exchange, done };

struct Fiber {
    ucontext_t entry;
    jmp_buf context;
    std::unique_ptr<char[]> stack;
    bool started = false;
    State state = State::done;
    int line = 0;
    Exchange exchange{};
};

struct SharedVariable {
    const char* file;
    int line;
    std::size_t offset;
};

// Everything of the one block that runs.
struct Machine {
    std::vector<Fiber> fibers{kMostThreads};
    jmp_buf scheduler;
    Fiber* current = nullptr;
    const std::function<void()>* body = nullptr;
    int threads = 0;
    std::unique_ptr<char[]> room{new char[kRoomBytes + 64]};
    std::vector<SharedVariable> variables;
    std::size_t used = 0;
    Order order = Order::ascending;
    std::mt19937_64 random{0};
    Counts counts{};
    std::set<const void*> launched;
    const void* kernel = nullptr;
    std::set<std::tuple<const void*, const char*, int>> barriers;
    Fault fault;
    bool fault_here = false;  // in the kernel that runs
    bool failed = false;
};

Machine& machine() {
    static Machine one;
    return one;
}

void fiber_main() {
    Machine& m = machine();
    for (;;) {
        (*m.body)();
        m.current->state = State::done;
        if (_setjmp(m.current->context) == 0) _longjmp(m.scheduler, 1);
    }
}

__attribute__((noinline)) void resume(Machine& m, int index) {
    Fiber& fiber = m.fibers[static_cast<std::size_t>(index)];
    m.current = &fiber;
    thread_of_block = {static_cast<unsigned>(index), 0, 0};
    if (_setjmp(m.scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, fiber_main, 0);
    setcontext(&fiber.entry);
}

__attribute__((noinline)) void wait(State state, int line) {
    Machine& m = machine();
    m.current->state = state;
    m.current->line = line;
    if (_setjmp(m.current->context) == 0) _longjmp(m.scheduler, 1);
}

void exchange(void (*run)(void* const*), void* operand, int line) {
    machine().current->exchange = {run, operand};
    wait(State::exchange, line);
}

std::vector<int> ordered(Machine& m, int first, int n) {
    std::vector<int> order(static_cast<std::size_t>(n));
    for (int i = 0; i < n; ++i) order[static_cast<std::size_t>(i)] = first + i;
    if (m.order == Order::descending) std::reverse(order.begin(), order.end());
    if (m.order == Order::shuffled) std::shuffle(order.begin(), order.end(), m.random);
    return order;
}

// Runs lanes [first, last) until each stands at a barrier or has ended. False if an exchange was not reached by all.
bool run_lanes(Machine& m, int first, int last) {
    const auto fiber = [&](int lane) -> Fiber& { return m.fibers[static_cast<std::size_t>(lane)]; };
    for (;;) {
        for (const int lane : ordered(m, first, last - first))
            if (fiber(lane).state == State::ready) resume(m, lane);
        int waiting = 0;
        for (int lane = first; lane < last; ++lane) waiting += fiber(lane).state == State::exchange;
        if (waiting == 0) return true;
        void* operands[kLanes];
        for (int lane = first; lane < last; ++lane) {
            if (waiting != kLanes || fiber(lane).line != fiber(first).line) return false;
            operands[lane - first] = fiber(lane).exchange.operand;
        }
        fiber(first).exchange.run(operands);
        for (int lane = first; lane < last; ++lane) fiber(lane).state = State::ready;
    }
}

// Lets waves go on from barriers of their own: whether there were any. One that not all lanes of a wave reached is
// divergent.
bool release_wave_barriers(Machine& m, bool* divergent) {
    bool any = false;
    for (int first = 0; first < m.threads; first += kWave) {
        const auto begin = m.fibers.begin() + first, end = begin + kWave;
        const auto waits = [&](const Fiber& fiber) { return fiber.state == State::wave_barrier; };
        if (std::none_of(begin, end, waits)) continue;
        any = true;
        if (!std::all_of(begin, end, [&](const Fiber& fiber) { return waits(fiber) && fiber.line == begin->line; }))
            *divergent = true;
        std::for_each(begin, end, [](Fiber& fiber) { fiber.state = State::ready; });
    }
    return any;
}

// Lets every thread go on from a barrier. True when all have ended, false also where the barrier was not reached by
// all.
bool release_barrier(Machine& m, bool* divergent) {
    int at_barrier = 0, line = 0;
    for (int i = 0; i < m.threads; ++i) {
        const Fiber& fiber = m.fibers[static_cast<std::size_t>(i)];
        if (fiber.state != State::barrier) continue;
        *divergent = *divergent || (at_barrier > 0 && fiber.line != line);
        line = fiber.line;
        ++at_barrier;
    }
    if (at_barrier == 0) return true;
    *divergent = *divergent || at_barrier != m.threads;
    ++m.counts.barriers;
    for (int i = 0; i < m.threads; ++i) m.fibers[static_cast<std::size_t>(i)].state = State::ready;
    return false;
}

bool run_block(Machine& m) {
    std::memset(m.room.get(), 0xff, std::max(m.used, kSharedBytes) + 64);
    for (int i = 0; i < m.threads; ++i) m.fibers[static_cast<std::size_t>(i)].state = State::ready;
    const int groups = (m.threads + kLanes - 1) / kLanes;
    for (;;) {
        bool divergent = false;
        for (const int group : ordered(m, 0, groups))
            divergent = !run_lanes(m, group * kLanes, std::min(m.threads, (group + 1) * kLanes)) || divergent;
        if (!divergent && !release_wave_barriers(m, &divergent) && release_barrier(m, &divergent)) break;
        if (!divergent) continue;
        ++m.counts.divergent_barriers;
        for (Fiber& fiber : m.fibers) fiber.started = false, fiber.state = State::done;
        return false;
    }
    ++m.counts.blocks;
    return m.used <= kSharedBytes;
}

std::string symbol_of(const void* kernel) {
    Dl_info where{};
    return dladdr(kernel, &where) != 0 && where.dli_sname != nullptr ? where.dli_sname : "";
}

void run_grid(const void* kernel, dim3 blocks, int threads, const std::function<void()>& body) {
    Machine& m = machine();
    m.launched.insert(kernel);
    m.kernel = kernel;
    m.fault_here = m.fault.kind != Fault::Kind::none && symbol_of(kernel).find(m.fault.kernel) != std::string::npos;
    ++m.counts.launches;
    m.variables.clear();
    m.used = 0;
    m.body = &body;
    m.threads = threads;
    size_of_grid = {blocks.x, blocks.y, blocks.z};
    const int count = static_cast<int>(blocks.x * blocks.y * blocks.z);
    for (const int index : ordered(m, 0, count)) {
        const auto i = static_cast<unsigned>(index);
        block_of_grid = {i % blocks.x, i / blocks.x % blocks.y, i / blocks.x / blocks.y};
        if (!run_block(m)) {
            m.failed = true;
            return;
        }
    }
}

}  // namespace

bool take_failure() {
    const bool failed = machine().failed;
    machine().failed = false;
    return failed;
}

void* shared(const char* file, int line, std::size_t bytes) {
    Machine& m = machine();
    char* const base = m.room.get() + (64 - reinterpret_cast<std::uintptr_t>(m.room.get()) % 64) % 64;
    for (const SharedVariable& variable : m.variables)
        if (variable.line == line && std::strcmp(variable.file, file) == 0) return base + variable.offset;
    m.variables.push_back({file, line, m.used});
    m.used += (bytes + 15) / 16 * 16;
    return base + m.variables.back().offset;
}

void check_alignment(const void* address) {
    if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) machine().failed = true;
}

namespace {

void wait_at_barrier(State state, const char* file, int line) {
    Machine& m = machine();
    if (thread_of_block.x == 0) m.barriers.emplace(m.kernel, file, line);
    if (m.fault_here && m.fault.kind == Fault::Kind::barrier && m.fault.line == line && m.fault.file == file) return;
    wait(state, line);
}

}  // namespace

void barrier(const char* file, int line) { wait_at_barrier(State::barrier, file, line); }
void wave_barrier(const char* file, int line) { wait_at_barrier(State::wave_barrier, file, line); }

float shuffle_xor(float value, int mask, int line) {
    struct Operand {
        float value, result;
        int mask;
    } own{value, 0.0f, mask};
    exchange(
        [](void* const* operands) {
            for (int lane = 0; lane < kLanes; ++lane) {
                auto* const operand = static_cast<Operand*>(operands[lane]);
                operand->result = static_cast<const Operand*>(operands[lane ^ operand->mask])->value;
            }
        },
        &own, line);
    return own.result;
}

namespace {

// v_mfma_f32_32x32x8 (bf16_1k and f16) and v_mfma_f32_32x32x2f32, in AMD's register layout: of the left operand a lane
// holds row lane % 32 and the `depth` columns from depth * (lane / 32) on, of the right one the transpose of that; of
// the result, number g is row 8 (g / 4) + 4 (lane / 32) + g % 4 and column lane % 32.
template <int depth>
struct Product {
    float a[depth], b[depth];
    Sums sums;

    static void run(void* const* operands) {
        float left[32][2 * depth], right[2 * depth][32];
        for (int lane = 0; lane < kWave; ++lane) {
            const auto* const operand = static_cast<const Product*>(operands[lane]);
            for (int i = 0; i < depth; ++i) {
                left[lane % 32][depth * (lane / 32) + i] = operand->a[i];
                right[depth * (lane / 32) + i][lane % 32] = operand->b[i];
            }
        }
        const bool exchanged = machine().fault_here && machine().fault.kind == Fault::Kind::rows;
        for (int row = 0; row < 32; ++row) {
            const int source = exchanged && (row == 4 || row == 5) ? 9 - row : row;
            float result[32] = {};
            for (int k = 0; k < 2 * depth; ++k)
                for (int column = 0; column < 32; ++column) result[column] += left[source][k] * right[k][column];
            for (int column = 0; column < 32; ++column) {
                auto* const operand = static_cast<Product*>(operands[row / 4 % 2 * 32 + column]);
                operand->sums[row / 8 * 4 + row % 4] += result[column];
            }
        }
        ++machine().counts.products;
    }
};

// mma.sync.m16n8k8 of bf16 or fp16, in PTX's register layout (see native/hip/compat_warps.h); d = a b.
struct WarpProduct {
    float a[2][2], b[2];
    float d[4];

    static void run(void* const* operands) {
        float left[16][8], right[8][8];
        for (int lane = 0; lane < 32; ++lane) {
            const auto* const operand = static_cast<const WarpProduct*>(operands[lane]);
            for (int i = 0; i < 2; ++i) {
                left[lane / 4][lane % 4 * 2 + i] = operand->a[0][i];
                left[lane / 4 + 8][lane % 4 * 2 + i] = operand->a[1][i];
                right[lane % 4 * 2 + i][lane / 4] = operand->b[i];
            }
        }
        const bool exchanged = machine().fault_here && machine().fault.kind == Fault::Kind::rows;
        for (int lane = 0; lane < 32; ++lane) {
            auto* const operand = static_cast<WarpProduct*>(operands[lane]);
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                const int source = exchanged && (row == 4 || row == 5) ? 9 - row : row;
                operand->d[i] = 0.0f;
                for (int k = 0; k < 8; ++k) operand->d[i] += left[source][k] * right[k][column];
            }
        }
        ++machine().counts.products;
    }
};

}  // namespace

void mma_16x8x8(float* d, const std::uint32_t* a, std::uint32_t b, bool bf16, int line) {
    const auto number = [&](std::uint32_t word, int i) {
        const auto bits = static_cast<std::uint16_t>(word >> (16 * i));
        return bf16 ? bf16_to_float(bits) : fp16_to_float(bits);
    };
    WarpProduct own{};
    for (int i = 0; i < 2; ++i) {
        own.a[0][i] = number(a[0], i);
        own.a[1][i] = number(a[1], i);
        own.b[i] = number(b, i);
    }
    exchange(&WarpProduct::run, &own, line);
    std::memcpy(d, own.d, sizeof own.d);
}

Sums mfma_32x32x8(const std::uint16_t* a, const std::uint16_t* b, Sums sums, bool bf16, int line) {
    Product<4> own{};
    own.sums = sums;
    for (int i = 0; i < 4; ++i) {
        own.a[i] = bf16 ? bf16_to_float(a[i]) : fp16_to_float(a[i]);
        own.b[i] = bf16 ? bf16_to_float(b[i]) : fp16_to_float(b[i]);
    }
    exchange(&Product<4>::run, &own, line);
    return own.sums;
}

Sums mfma_32x32x2_fp32(float a, float b, Sums sums, int line) {
    Product<1> own{{a}, {b}, sums};
    exchange(&Product<1>::run, &own, line);
    return own.sums;
}

void launch(const void* kernel, dim3 blocks, int threads, Stream* stream, std::function<void()> body) {
    enqueue(stream, [=, body = std::move(body)] { run_grid(kernel, blocks, threads, body); });
}

void set_order(Order order, std::uint64_t seed) {
    machine().order = order;
    machine().random.seed(seed);
}

Counts counts() { return machine().counts; }

void set_fault(const Fault& fault) { machine().fault = fault; }

std::vector<std::string> launched_kernels() {
    std::vector<std::string> names;
    for (const void* kernel : machine().launched)
        if (std::string symbol = symbol_of(kernel); !symbol.empty()) names.push_back(std::move(symbol));
    return names;
}

std::vector<BarrierSite> barriers_reached() {
    std::vector<BarrierSite> sites;
    for (const auto& [kernel, file, line] : machine().barriers)
        if (std::string symbol = symbol_of(kernel); !symbol.empty()) sites.push_back({std::move(symbol), file, line});
    return sites;
}

}  // namespace pytrain::shim
