// Queues and operations of the HIP device: arguments are checked here, work is done by kernels/.
#include "hip/hip_device.h"

#include <algorithm>

#include "core/check.h"
#include "hip/kernels.h"

namespace pytrain::hip {

namespace {

// device.h hands out opaque queues and events: here they are streams and events of the HIP run time.
Queue* queue_of(hipStream_t stream) { return reinterpret_cast<Queue*>(stream); }
hipEvent_t event_of(Event* event) { return reinterpret_cast<hipEvent_t>(event); }

constexpr std::int64_t kLeastWidth = 4096;  // rows this wide need no reserve()

std::size_t workspace_bytes(std::int64_t width) {
    const auto floats = static_cast<std::size_t>(std::max(kRowChunks * 2 * std::max(width, kLeastWidth), kSplitFloats));
    static_assert(sizeof(double) * kSumBlocks <= sizeof(float) * kRowChunks * 2 * kLeastWidth, "sum_squares fits, too");
    return floats * sizeof(float);
}

void check_attention(const Attention& attention, const char* operation) {
    check(attention.kv_heads > 0 && attention.heads % attention.kv_heads == 0, operation, ": heads (", attention.heads,
          ") must be a multiple of kv_heads (", attention.kv_heads, ")");
    check(attention.head_size > 0 && attention.head_size <= kLargestHead, operation,
          ": on a GPU head_size must be between 1 and ", kLargestHead, ", not ", attention.head_size);
    check(attention.query_offset >= 0 && attention.query_offset + attention.query_rows <= attention.key_rows, operation,
          ": ", attention.query_rows, " query rows at offset ", attention.query_offset,
          " need as many keys, but there are ", attention.key_rows, " key rows");
    const DType dtype = attention.q.dtype;
    check(attention.k.dtype == dtype && attention.v.dtype == dtype && attention.out.dtype == dtype, operation,
          ": on a GPU q, k, v and out must be stored in one type");
}

}  // namespace

HipDevice::HipDevice(int index, bool rocblas) : index_(index) {
    if (rocblas) static_cast<void>(VendorProducts::version());
    const int count = device_count();
    check(count > 0, "no ", kMaker, " GPU is visible to this process (", kCount, " finds none)");
    check(index >= 0 && index < count, "there is no GPU ", index, ": ", count, " visible");
    check_hip(hipSetDevice(index), "cannot use the GPU");
    check_hip(hipGetDeviceProperties(&properties_, index), "cannot read the GPU's properties");
    if (rocblas) vendor_ = std::make_unique<VendorProducts>();
    memory_ = std::make_unique<HipMemory>(index);
    check_hip(hipStreamCreateWithFlags(&compute_, hipStreamNonBlocking), "cannot create a stream");
    check_hip(hipStreamCreateWithFlags(&communication_, hipStreamNonBlocking), "cannot create a stream");
    reserve(0, 0, 0);
}

HipDevice::~HipDevice() {
    for (hipStream_t stream : {compute_, communication_}) static_cast<void>(hipStreamSynchronize(stream));
    vendor_.reset();  // which knows a stream
    for (hipStream_t stream : {compute_, communication_}) static_cast<void>(hipStreamDestroy(stream));
}

// --- memory ---------------------------------------------------------------------------------------------------------

void* HipDevice::allocate(std::size_t bytes, MemoryKind kind) { return memory_->allocate(bytes, kind); }
void* HipDevice::allocate_pinned(std::size_t bytes) { return memory_->allocate_pinned(bytes); }
std::size_t HipDevice::bytes_in_use(MemoryKind kind) const { return memory_->bytes_in_use(kind); }
std::size_t HipDevice::bytes_peak(MemoryKind kind) const { return memory_->bytes_peak(kind); }

// What is queued may still use it.
void HipDevice::release(void* pointer) {
    check_hip(hipStreamSynchronize(compute_), "the compute queue failed");
    check_hip(hipStreamSynchronize(communication_), "the communication queue failed");
    memory_->release(pointer);
}
void HipDevice::release_pinned(void* pointer) { release(pointer); }
bool HipDevice::is_device_memory(const void* pointer, std::size_t bytes) const {
    return memory_->holds_for_gpu(pointer, bytes);
}

void HipDevice::reserve(std::int64_t, std::int64_t width, std::int64_t) {
    const std::size_t bytes = workspace_bytes(width);
    if (bytes <= workspace_bytes_) return;
    if (workspace_ != nullptr) release(workspace_);
    workspace_ = memory_->allocate(bytes, MemoryKind::workspace);
    workspace_bytes_ = bytes;
}

float* HipDevice::floats(std::size_t n, const char* operation) const {
    check(n * sizeof(float) <= workspace_bytes_, operation, " needs a workspace of ", n * sizeof(float),
          " bytes, but reserve() made room for ", workspace_bytes_);
    return static_cast<float*>(workspace_);
}

// --- queues and events
// -------------------------------------------------------------------------------------------------

Queue* HipDevice::compute_queue() { return queue_of(compute_); }
Queue* HipDevice::communication_queue() { return queue_of(communication_); }
hipStream_t HipDevice::stream_of(Queue* queue) const {
    return queue == nullptr ? compute_ : reinterpret_cast<hipStream_t>(queue);
}

Event* HipDevice::record(Queue* queue) {
    hipEvent_t event = nullptr;
    check_hip(hipEventCreateWithFlags(&event, hipEventDisableTiming), "cannot create an event");
    check_hip(hipEventRecord(event, stream_of(queue)), "cannot record an event");
    return reinterpret_cast<Event*>(event);
}
void HipDevice::wait(Queue* queue, Event* event) {
    check_hip(hipStreamWaitEvent(stream_of(queue), event_of(event), 0), "cannot make a queue wait");
}
bool HipDevice::done(Event* event) {
    const hipError_t state = hipEventQuery(event_of(event));
    if (state == hipErrorNotReady) return false;
    check_hip(state, "an operation on the GPU failed");
    return true;
}
void HipDevice::synchronize(Event* event) {
    check_hip(hipEventSynchronize(event_of(event)), "an operation on the GPU failed");
}
void HipDevice::release(Event* event) { check_hip(hipEventDestroy(event_of(event)), "cannot release an event"); }

void HipDevice::launched(const char* operation) const { check_hip(hipGetLastError(), operation); }

// --- plain data
// ---------------------------------------------------------------------------------------------------------

void HipDevice::copy(void* destination, const void* source, std::size_t bytes, Queue* queue) {
    if (bytes == 0) return;
    const hipStream_t stream = stream_of(queue);
    check_hip(hipMemcpyAsync(destination, source, bytes, hipMemcpyDefault, stream), "copy");
    // The caller may reuse host memory that is not ours as soon as we return.
    if (!memory_->owns(source, bytes) || !memory_->owns(destination, bytes))
        check_hip(hipStreamSynchronize(stream), "copy");
}
void HipDevice::zero(void* destination, std::size_t bytes, Queue* queue) {
    if (bytes > 0) check_hip(hipMemsetAsync(destination, 0, bytes, stream_of(queue)), "zero");
}
void HipDevice::convert(Tensor destination, Tensor source, std::int64_t n, Queue* queue) {
    launch_convert(destination, source, n, stream_of(queue));
    launched("convert");
}
void HipDevice::add(Tensor destination, Tensor source, std::int64_t n, Queue* queue) {
    launch_add(destination, source, n, stream_of(queue));
    launched("add");
}
void HipDevice::fill_normal(Tensor destination, std::int64_t n, std::uint64_t seed, std::uint64_t key,
                            std::int64_t first, float deviation, Queue* queue) {
    launch_fill_normal(destination, n, seed, key, first, deviation, stream_of(queue));
    launched("fill_normal");
}
void HipDevice::fill(Tensor destination, std::int64_t n, float value, Queue* queue) {
    launch_fill(destination, n, value, stream_of(queue));
    launched("fill");
}

// --- products
// ------------------------------------------------------------------------------------------------------------

void HipDevice::matmul(const Matmul& product, Queue* queue) {
    check(!product.residual || product.residual.data != product.c.data,
          "matmul: residual may not be c; accumulate adds to c");
    float* const partials = floats(kSplitFloats, "matmul");
    if (vendor_ && VendorProducts::takes(product))
        vendor_->matmul(product, partials, stream_of(queue));
    else
        launch_matmul(product, partials, stream_of(queue));
    launched("matmul");
}
void HipDevice::bias_backward(Tensor dbias, Tensor dy, std::int64_t m, std::int64_t n, std::int64_t ldy, Queue* queue) {
    launch_bias_backward(dbias, dy, m, n, ldy, floats(static_cast<std::size_t>(kRowChunks * n), "bias_backward"),
                         stream_of(queue));
    launched("bias_backward");
}

// --- embedding and rows
// ----------------------------------------------------------------------------------------------------

void HipDevice::embed_forward(const Embed& embed, Tensor out, Tensor table, Tensor position_table, Queue* queue) {
    launch_embed_forward(embed, out, table, position_table, stream_of(queue));
    launched("embed_forward");
}
void HipDevice::embed_backward(const Embed& embed, Tensor dtable, Tensor dposition_table, Tensor dout, Queue* queue) {
    launch_embed_backward(embed, dtable, dposition_table, dout, stream_of(queue));
    launched("embed_backward");
}
void HipDevice::residual_add(Tensor x, Tensor partial, Tensor bias, std::int64_t rows, std::int64_t width,
                             Queue* queue) {
    launch_residual_add(x, partial, bias, rows, width, stream_of(queue));
    launched("residual_add");
}
void HipDevice::norm_forward(const Norm& norm, Tensor y, Queue* queue) {
    check(norm.kind == NormKind::rmsnorm || norm.bias, "norm_forward: a layernorm needs a bias");
    launch_norm_forward(norm, y, stream_of(queue));
    launched("norm_forward");
}
void HipDevice::norm_backward(const Norm& norm, Tensor dx, Tensor dweight, Tensor dbias, Tensor dy, Queue* queue) {
    check(norm.kind == NormKind::rmsnorm || dbias, "norm_backward: a layernorm needs a dbias");
    float* const partials = floats(static_cast<std::size_t>(kRowChunks * 2 * norm.width), "norm_backward");
    launch_norm_backward(norm, dx, dweight, dbias, dy, partials, stream_of(queue));
    launched("norm_backward");
}
void HipDevice::gelu_forward(Tensor y, Tensor x, std::int64_t n, Queue* queue) {
    launch_gelu_forward(y, x, n, stream_of(queue));
    launched("gelu_forward");
}
void HipDevice::gelu_backward(Tensor dx, Tensor dy, Tensor x, Tensor y, std::int64_t n, Queue* queue) {
    launch_gelu_backward(dx, dy, x, y, n, stream_of(queue));
    launched("gelu_backward");
}
void HipDevice::swiglu_forward(Tensor y, Tensor gate_up, std::int64_t rows, std::int64_t width, Queue* queue) {
    launch_swiglu_forward(y, gate_up, rows, width, stream_of(queue));
    launched("swiglu_forward");
}
void HipDevice::swiglu_backward(Tensor dgate_up, Tensor dy, Tensor gate_up, Tensor y, std::int64_t rows,
                                std::int64_t width, Queue* queue) {
    launch_swiglu_backward(dgate_up, dy, gate_up, y, rows, width, stream_of(queue));
    launched("swiglu_backward");
}
void HipDevice::rope(Tensor x, std::int64_t rows, std::int64_t stride, std::int64_t heads, std::int64_t head_size,
                     const std::int32_t* positions, const float* table, bool inverse, Queue* queue) {
    check(head_size % 2 == 0, "rope: head_size must be even, not ", head_size);
    launch_rope({x, rows, stride, heads, head_size, positions, table, inverse}, stream_of(queue));
    launched("rope");
}

// --- attention
// -----------------------------------------------------------------------------------------------------------

void HipDevice::attention_forward(const Attention& attention, Queue* queue) {
    check_attention(attention, "attention_forward");
    launch_attention_forward(attention, stream_of(queue));
    launched("attention_forward");
}
void HipDevice::attention_backward(const Attention& attention, Tensor dq, Tensor dk, Tensor dv, Tensor dout,
                                   float* delta, Queue* queue) {
    check_attention(attention, "attention_backward");
    for (const Tensor& gradient : {dq, dk, dv, dout})
        check(gradient.dtype == attention.q.dtype,
              "attention_backward: on a GPU gradients must be stored in the type of q");
    launch_attention_backward(attention, {dq, dk, dv, dout, delta}, stream_of(queue));
    launched("attention_backward");
}

// --- head, loss, optimizer ----------------------------------------------------------------------------------------

void HipDevice::head_statistics(float* statistics, Tensor logits, const std::int32_t* targets, std::int64_t rows,
                                std::int64_t width, std::int64_t vocabulary_begin, Queue* queue) {
    launch_head_statistics(statistics, logits, targets, rows, width, vocabulary_begin, stream_of(queue));
    launched("head_statistics");
}
void HipDevice::loss_forward(StepScalars* scalars, float* lse, const float* statistics, std::int64_t slices,
                             const std::int32_t* targets, std::int64_t rows, Queue* queue) {
    launch_loss_forward(scalars, lse, statistics, slices, targets, rows, stream_of(queue));
    launched("loss_forward");
}
void HipDevice::loss_backward(Tensor dlogits, std::int64_t ld_dlogits, Tensor logits, const float* lse,
                              const std::int32_t* targets, const StepScalars* scalars, std::int64_t rows,
                              std::int64_t width, std::int64_t vocabulary_begin, Queue* queue) {
    launch_loss_backward(dlogits, ld_dlogits, logits, lse, targets, scalars, rows, width, vocabulary_begin,
                         stream_of(queue));
    launched("loss_backward");
}
// Blocks are rows, and a row's block reads it from L2 the second time: its three kernels one after another.
void HipDevice::loss_forward_backward(StepScalars* scalars, float* lse, float* statistics, Tensor dlogits,
                                      std::int64_t ld_dlogits, Tensor logits, const std::int32_t* targets,
                                      std::int64_t rows, std::int64_t width, Queue* queue) {
    check(logits.dtype == DType::fp32, "loss_forward_backward: logits must be fp32, not ", name_of(logits.dtype));
    head_statistics(statistics, logits, targets, rows, width, 0, queue);
    loss_forward(scalars, lse, statistics, 1, targets, rows, queue);
    loss_backward(dlogits, ld_dlogits, logits, lse, targets, scalars, rows, width, 0, queue);
}
void HipDevice::sum_squares(double* sum, Tensor x, std::int64_t n, Queue* queue) {
    launch_sum_squares(sum, x, n, static_cast<double*>(workspace_), stream_of(queue));
    launched("sum_squares");
}
void HipDevice::finish_norm(StepScalars* scalars, const double* sum, double limit, double loss_scale, Queue* queue) {
    launch_finish_norm(scalars, sum, limit, loss_scale, stream_of(queue));
    launched("finish_norm");
}
void HipDevice::adamw(const AdamW& options, Tensor weights, Tensor master, Tensor m, Tensor v, Tensor gradient,
                      std::int64_t n, const StepScalars* scalars, Queue* queue) {
    launch_adamw(options, {weights, master, m, v, gradient}, n, scalars, stream_of(queue));
    launched("adamw");
}

}  // namespace pytrain::hip
