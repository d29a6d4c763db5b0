// What a model asks of a device: memory, queues and operations on whole tensors. Implementers: cpu/, hip/.
//
// Every operation takes a queue and may return before it is done. None returns a number to the host: losses, counts and
// norms are written to device memory and read once a step. Row-major everywhere; `rows` counts tokens (B*T).
// Operations allocate nothing: what they need beside their arguments comes from the workspace that `reserve` sized.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace pytrain {

enum class MemoryKind : std::uint8_t {
    weights,
    gradients,
    master,
    optimizer,
    activations,
    workspace,
    staging,
    snapshot,  // what an asynchronous save is written from
    count
};

struct Queue;  // an ordered stream of operations (CPU: executes at once)
struct Event;  // a point in a queue

// A typed pointer. What it points at is said by the operation that takes it.
struct Tensor {
    void* data = nullptr;
    DType dtype = DType::fp32;
    explicit operator bool() const { return data != nullptr; }
    // The tensor that starts `elements` further on.
    Tensor at(std::int64_t elements) const {
        return {static_cast<char*>(data) + elements * static_cast<std::int64_t>(size_of(dtype)), dtype};
    }
};

enum class Transpose : std::uint8_t { no, yes };
enum class Activation : std::uint8_t { none, gelu };
enum class NormKind : std::uint8_t { layernorm, rmsnorm };

// c (m,n) = op(a) (m,k) * op(b) (k,n)  [+ c if accumulate]  [+ bias (n)]  [+ residual (m,n)];
// activated (m,n) = activation(c) where asked for. lda, ldb, ldc... are row strides of the arrays as stored, in
// elements.
struct Matmul {
    std::int64_t m, n, k;
    Tensor a;
    std::int64_t lda;
    Transpose transpose_a;
    Tensor b;
    std::int64_t ldb;
    Transpose transpose_b;
    Tensor c;
    std::int64_t ldc;
    bool accumulate = false;
    Tensor bias = {};
    Tensor residual = {};
    std::int64_t ldresidual = 0;
    Activation activation = Activation::none;
    Tensor activated = {};
    std::int64_t ldactivated = 0;
};

struct Embed {
    std::int64_t rows, hidden;
    std::int64_t vocabulary_begin, vocabulary_end;  // this rank's rows of the table; other tokens contribute zero
    const std::int32_t* tokens;                     // (rows)
    const std::int32_t* positions;                  // (rows)
};

// One norm over rows of the residual stream.
struct Norm {
    NormKind kind;
    std::int64_t rows, width;
    float eps;
    Tensor x;       // (rows, width) residual stream
    Tensor weight;  // (width)
    Tensor bias;    // (width) or none
    float* mean;    // (rows), unused by rmsnorm
    float* rstd;    // (rows)
};

struct Attention {
    std::int64_t batch, heads, kv_heads, head_size;
    std::int64_t query_rows, key_rows;  // per sequence
    std::int64_t query_offset;         // key index of query 0: query i sees keys document_starts[i] .. query_offset + i
    Tensor q, k, v;                    // rows of (heads*head_size), (kv_heads*head_size)
    std::int64_t q_stride, kv_stride;  // between rows, in elements
    std::int64_t q_batch_stride, kv_batch_stride;  // between sequences, in elements
    const std::int32_t* document_starts;           // (batch*query_rows): first visible key, or null for all 0
    Tensor out;                                    // (batch*query_rows, heads*head_size), contiguous
    float* lse;  // (batch, heads, query_rows) log-sum-exp of the scaled scores, or null
};

struct AdamW {
    double beta1, beta2;
    float eps;
    float step_size;    // lr / (1 - beta1^t)
    float correction2;  // 1 / sqrt(1 - beta2^t)
    float decay;        // lr * weight_decay, 0 where the tensor is not decayed
};

// Row statistics of one vocabulary slice of the logits, (rows, 3): maximum, sum of exp(logit - maximum), target logit
// (0 where the target lies in another slice).
constexpr int kHeadStatistics = 3;

// Scalars of one step on the device, all float64: read by the host once, after the last operation.
struct StepScalars {
    double loss_sum;  // over targets != -1, this rank, this step
    double target_count;
    double gradient_norm;   // after `finish_norm`
    double clip_factor;     // min(1, limit / norm) / loss scale; what AdamW multiplies gradients with
    double finite;          // 1 if every gradient was finite, else 0: AdamW then leaves everything as it is
    double gradient_scale;  // what d(loss_sum) is seeded with: loss scale / global target count
};

class Device {
public:
    virtual ~Device() = default;
    virtual const char* name() const = 0;

    // --- memory, counted by kind -----------------------------------------------------------------
    virtual void* allocate(std::size_t bytes, MemoryKind kind) = 0;  // 4096-byte aligned, zeroed
    virtual void release(void* pointer) = 0;
    virtual void* allocate_pinned(std::size_t bytes) = 0;  // host memory that copies and MPI may use
    virtual void release_pinned(void* pointer) = 0;
    // Whether these bytes lie in memory of the device's own, which an MPI that knows no GPUs must not be handed.
    virtual bool is_device_memory(const void* pointer, std::size_t bytes) const = 0;
    virtual std::size_t bytes_in_use(MemoryKind kind) const = 0;
    virtual std::size_t bytes_peak(MemoryKind kind) const = 0;
    // Makes room for operations up to these sizes; called before step 0, never inside a step.
    virtual void reserve(std::int64_t rows, std::int64_t width, std::int64_t head_size) = 0;

    // --- queues and events -----------------------------------------------------------------------
    virtual Queue* compute_queue() = 0;
    virtual Queue* communication_queue() = 0;
    virtual Event* record(Queue* queue) = 0;
    virtual void wait(Queue* queue, Event* event) = 0;  // the queue waits, the host does not
    virtual bool done(Event* event) = 0;
    virtual void synchronize(Event* event) = 0;  // the host waits
    virtual void release(Event* event) = 0;

    // --- plain data ------------------------------------------------------------------------------
    virtual void copy(void* destination, const void* source, std::size_t bytes, Queue*) = 0;
    virtual void zero(void* destination, std::size_t bytes, Queue*) = 0;
    virtual void convert(Tensor destination, Tensor source, std::int64_t n, Queue*) = 0;
    virtual void add(Tensor destination, Tensor source, std::int64_t n, Queue*) = 0;  // destination += source, in fp32
    // Philox normal numbers of a tensor's elements [first, first + n), keyed by (seed, key): the same on every grid.
    virtual void fill_normal(Tensor destination, std::int64_t n, std::uint64_t seed, std::uint64_t key,
                             std::int64_t first, float deviation, Queue*) = 0;
    virtual void fill(Tensor destination, std::int64_t n, float value, Queue*) = 0;

    // --- products --------------------------------------------------------------------------------
    virtual void matmul(const Matmul&, Queue*) = 0;
    // dbias (n) += column sums of dy (m,n) with row stride ldy.
    virtual void bias_backward(Tensor dbias, Tensor dy, std::int64_t m, std::int64_t n, std::int64_t ldy, Queue*) = 0;

    // --- embedding -------------------------------------------------------------------------------
    // out (rows, hidden) = table[token] (0 outside the slice) [+ position_table[position]]
    virtual void embed_forward(const Embed&, Tensor out, Tensor table, Tensor position_table, Queue*) = 0;
    // dtable[token] += dout, dposition_table[position] += dout; either may be none
    virtual void embed_backward(const Embed&, Tensor dtable, Tensor dposition_table, Tensor dout, Queue*) = 0;

    // --- rows ------------------------------------------------------------------------------------
    // x += partial [+ bias]: completes the residual stream after a tensor-parallel sum.
    virtual void residual_add(Tensor x, Tensor partial, Tensor bias, std::int64_t rows, std::int64_t width, Queue*) = 0;
    virtual void norm_forward(const Norm&, Tensor y, Queue*) = 0;
    // dx += gradient through the norm; dweight, dbias += their sums over rows
    virtual void norm_backward(const Norm&, Tensor dx, Tensor dweight, Tensor dbias, Tensor dy, Queue*) = 0;
    virtual void gelu_forward(Tensor y, Tensor x, std::int64_t n, Queue*) = 0;
    // dx may be dy. y, where given, becomes what gelu_forward gives of x, to the bit.
    virtual void gelu_backward(Tensor dx, Tensor dy, Tensor x, Tensor y, std::int64_t n, Queue*) = 0;
    // gate_up (rows, 2*width) = [gate | up]; y (rows, width) = silu(gate) * up
    virtual void swiglu_forward(Tensor y, Tensor gate_up, std::int64_t rows, std::int64_t width, Queue*) = 0;
    // y, where given, becomes what swiglu_forward gives of gate_up, to the bit.
    virtual void swiglu_backward(Tensor dgate_up, Tensor dy, Tensor gate_up, Tensor y, std::int64_t rows,
                                 std::int64_t width, Queue*) = 0;
    // Rotates heads in place (rotate-half). x: rows of `stride` elements that begin with heads*head_size rotated ones;
    // table (context, head_size/2, 2) fp32 of cos, sin; inverse rotates back (the gradient).
    virtual void rope(Tensor x, std::int64_t rows, std::int64_t stride, std::int64_t heads, std::int64_t head_size,
                      const std::int32_t* positions, const float* table, bool inverse, Queue*) = 0;

    // --- attention -------------------------------------------------------------------------------
    virtual void attention_forward(const Attention&, Queue*) = 0;
    // dq, dk, dv have the strides of q, k, v and are overwritten; delta (batch, heads, query_rows) is scratch
    virtual void attention_backward(const Attention&, Tensor dq, Tensor dk, Tensor dv, Tensor dout, float* delta,
                                    Queue*) = 0;

    // --- head and loss ---------------------------------------------------------------------------
    // statistics (rows, 3) of logits (rows, width), the slice [vocabulary_begin, vocabulary_begin + width)
    virtual void head_statistics(float* statistics, Tensor logits, const std::int32_t* targets, std::int64_t rows,
                                 std::int64_t width, std::int64_t vocabulary_begin, Queue*) = 0;
    // Merges `slices` blocks of (rows, 3), in order: lse (rows), and loss_sum, target_count of `scalars` grow.
    virtual void loss_forward(StepScalars* scalars, float* lse, const float* statistics, std::int64_t slices,
                              const std::int32_t* targets, std::int64_t rows, Queue*) = 0;
    // dlogits (rows, width), rows ld_dlogits apart, = (softmax - onehot(target)) * scalars->gradient_scale, 0 where the
    // target is -1. dlogits may begin where logits (rows, width) begins if no row of it is longer in bytes and
    // ld_dlogits puts each at the beginning of its row of logits: the same type in place, or 16 bits over fp32 with
    // twice the stride.
    virtual void loss_backward(Tensor dlogits, std::int64_t ld_dlogits, Tensor logits, const float* lse,
                               const std::int32_t* targets, const StepScalars* scalars, std::int64_t rows,
                               std::int64_t width, std::int64_t vocabulary_begin, Queue*) = 0;
    // head_statistics, loss_forward and loss_backward of logits (rows, width) that are the whole vocabulary, a row at a
    // time: statistics (rows, 3), lse (rows) and dlogits as above. logits are fp32 and worth nothing afterwards.
    virtual void loss_forward_backward(StepScalars* scalars, float* lse, float* statistics, Tensor dlogits,
                                       std::int64_t ld_dlogits, Tensor logits, const std::int32_t* targets,
                                       std::int64_t rows, std::int64_t width, Queue*) = 0;

    // --- optimizer -------------------------------------------------------------------------------
    // *sum += sum of squares in float64, in an order fixed by n alone
    virtual void sum_squares(double* sum, Tensor x, std::int64_t n, Queue*) = 0;
    // From *sum (already reduced over ranks) and the loss scale: gradient_norm, clip_factor, finite. limit 0: no
    // clipping.
    virtual void finish_norm(StepScalars* scalars, const double* sum, double limit, double loss_scale, Queue*) = 0;
    // master, m, v (n) fp32 or stored types; weights = master rounded, unless they are the same buffer
    virtual void adamw(const AdamW&, Tensor weights, Tensor master, Tensor m, Tensor v, Tensor gradient, std::int64_t n,
                       const StepScalars* scalars, Queue*) = 0;
};

}  // namespace pytrain
