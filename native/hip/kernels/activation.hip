// Activations and rotations. Bound by memory: gelu 2 (backward 4), swiglu 3 (6) and rope 2 elements moved per element
// computed, against 10 to 40 FLOPs.
#include "hip/common.h"
#include "hip/kernels.h"

namespace pytrain::hip {

inline dim3 blocks_for_tasks(std::int64_t tasks) { return dim3(static_cast<unsigned>(ceil_div(tasks, kThreads))); }
PYTRAIN_INLINE std::int64_t task_index() { return block_index() * kThreads + thread_index(); }

PYTRAIN_KERNEL gelu_forward_kernel(Tensor y, Tensor x, std::int64_t n) {
    const std::int64_t i = task_index() * kOctet;
    if (i >= n) return;
    Octet octet = load_octet(x, i, n - i);
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) octet.value[j] = gelu(octet.value[j]);
    store_octet(y, i, n - i, octet);
}

PYTRAIN_KERNEL gelu_backward_kernel(Tensor dx, Tensor dy, Tensor x, Tensor y, std::int64_t n) {
    const std::int64_t i = task_index() * kOctet;
    if (i >= n) return;
    Octet octet = load_octet(dy, i, n - i);
    Octet in = load_octet(x, i, n - i);
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) octet.value[j] *= gelu_slope(in.value[j]);
    store_octet(dx, i, n - i, octet);
    if (y.data == nullptr) return;
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) in.value[j] = gelu(in.value[j]);
    store_octet(y, i, n - i, in);
}

// gate_up (rows, 2 width) = [gate | up]; a task is an octet of y.
PYTRAIN_KERNEL swiglu_forward_kernel(Tensor y, Tensor gate_up, std::int64_t rows, std::int64_t width) {
    const std::int64_t octets = ceil_div(width, kOctet), task = task_index();
    if (task >= rows * octets) return;
    const std::int64_t row = task / octets, column = task % octets * kOctet, n = width - column;
    const Octet gate = load_octet(gate_up, row * 2 * width + column, n);
    Octet out = load_octet(gate_up, row * 2 * width + width + column, n);
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) out.value[j] *= gate.value[j] * sigmoid(gate.value[j]);
    store_octet(y, row * width + column, n, out);
}

// dup = dy silu(gate); dgate = dy up s (1 + gate (1 - s)).
PYTRAIN_KERNEL swiglu_backward_kernel(Tensor dgate_up, Tensor dy, Tensor gate_up, Tensor y, std::int64_t rows,
                                      std::int64_t width) {
    const std::int64_t octets = ceil_div(width, kOctet), task = task_index();
    if (task >= rows * octets) return;
    const std::int64_t row = task / octets, column = task % octets * kOctet, n = width - column;
    const std::int64_t at_gate = row * 2 * width + column, at_up = at_gate + width;
    const Octet gate = load_octet(gate_up, at_gate, n), up = load_octet(gate_up, at_up, n);
    const Octet d = load_octet(dy, row * width + column, n);
    Octet dgate, dup;
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) {
        const float s = sigmoid(gate.value[j]);
        dup.value[j] = d.value[j] * gate.value[j] * s;
        dgate.value[j] = d.value[j] * up.value[j] * s * (1.0f + gate.value[j] * (1.0f - s));
    }
    store_octet(dgate_up, at_gate, n, dgate);
    store_octet(dgate_up, at_up, n, dup);
    if (y.data == nullptr) return;
    Octet active = up;
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) active.value[j] *= gate.value[j] * sigmoid(gate.value[j]);
    store_octet(y, row * width + column, n, active);
}

// A task turns eight pairs of one head: elements [pair, pair + 8) and those half a head later.
PYTRAIN_KERNEL rope_kernel(Rope rope) {
    const std::int64_t half = rope.head_size / 2, octets = ceil_div(half, kOctet), task = task_index();
    if (task >= rope.rows * rope.heads * octets) return;
    const std::int64_t pair = task % octets * kOctet, n = half - pair, head = task / octets % rope.heads;
    const std::int64_t row = task / octets / rope.heads;
    const std::int64_t i = row * rope.stride + head * rope.head_size + pair;
    const float* const turns = rope.table + (static_cast<std::int64_t>(rope.positions[row]) * half + pair) * 2;
    Octet first = load_octet(rope.x, i, n), second = load_octet(rope.x, i + half, n);
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) {
        if (j >= n) continue;
        const float cosine = turns[2 * j], sine = rope.inverse ? -turns[2 * j + 1] : turns[2 * j + 1];
        const float a = first.value[j], b = second.value[j];
        first.value[j] = a * cosine - b * sine;
        second.value[j] = b * cosine + a * sine;
    }
    store_octet(rope.x, i, n, first);
    store_octet(rope.x, i + half, n, second);
}

void launch_gelu_forward(Tensor y, Tensor x, std::int64_t n, hipStream_t queue) {
    if (n > 0) PYTRAIN_LAUNCH(gelu_forward_kernel, blocks_for_tasks(ceil_div(n, kOctet)), queue, y, x, n);
}
void launch_gelu_backward(Tensor dx, Tensor dy, Tensor x, Tensor y, std::int64_t n, hipStream_t queue) {
    if (n > 0) PYTRAIN_LAUNCH(gelu_backward_kernel, blocks_for_tasks(ceil_div(n, kOctet)), queue, dx, dy, x, y, n);
}
void launch_swiglu_forward(Tensor y, Tensor gate_up, std::int64_t rows, std::int64_t width, hipStream_t queue) {
    const dim3 blocks = blocks_for_tasks(rows * ceil_div(width, kOctet));
    if (rows * width > 0) PYTRAIN_LAUNCH(swiglu_forward_kernel, blocks, queue, y, gate_up, rows, width);
}
void launch_swiglu_backward(Tensor dgate_up, Tensor dy, Tensor gate_up, Tensor y, std::int64_t rows, std::int64_t width,
                            hipStream_t queue) {
    const dim3 blocks = blocks_for_tasks(rows * ceil_div(width, kOctet));
    if (rows * width > 0) PYTRAIN_LAUNCH(swiglu_backward_kernel, blocks, queue, dgate_up, dy, gate_up, y, rows, width);
}
void launch_rope(const Rope& rope, hipStream_t queue) {
    const std::int64_t tasks = rope.rows * rope.heads * ceil_div(rope.head_size / 2, kOctet);
    if (tasks > 0) PYTRAIN_LAUNCH(rope_kernel, blocks_for_tasks(tasks), queue, rope);
}

}  // namespace pytrain::hip
