// AMD GPUs as a Device: unified memory that prefers the GPU, two streams, hand-written kernels (kernels/).
//
// Memory is hipMallocManaged with the GPU as its preferred place, so that the few numbers which the host reads or
// writes (tokens, scalars) need no second copy of the code; on Frontier that wants HSA_XNACK=1. What the host keeps of
// the device's data (snapshots, messages on their way) is pinned host memory, filled by copies on the communication
// queue. Operations are queued and return at once: whoever touches memory on the host first waits for the queue.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "device.h"
#include "hip/runtime.h"
#include "hip/vendor_products.h"

namespace pytrain::hip {

// Throws Error if a call of the HIP run time failed; `what` says what it was for.
void check_hip(hipError_t error, const char* what);

// How many GPUs there are; 0 also where there is no driver.
int device_count();

// Blocks of device memory and pinned host memory, counted by kind; thread-safe.
class HipMemory {
public:
    explicit HipMemory(int device) : device_(device) {}
    ~HipMemory();
    HipMemory(const HipMemory&) = delete;
    HipMemory& operator=(const HipMemory&) = delete;

    void* allocate(std::size_t bytes, MemoryKind kind);
    void* allocate_pinned(std::size_t bytes);
    void release(void* pointer);
    bool owns(const void* pointer, std::size_t bytes) const;
    bool holds_for_gpu(const void* pointer, std::size_t bytes) const;  // not where it is pinned: that is the host's
    std::size_t bytes_in_use(MemoryKind kind) const;
    std::size_t bytes_peak(MemoryKind kind) const;

private:
    struct Block {
        std::size_t bytes;
        MemoryKind kind;
        bool pinned;
    };
    struct Count {
        std::size_t in_use = 0, peak = 0;
    };
    const Block* find(const void* pointer, std::size_t bytes) const;  // that holds them, or null
    void* pinned(std::size_t bytes, MemoryKind kind);
    void* add(void* pointer, const Block& block);
    static hipError_t free(void* pointer, const Block& block);

    int device_;
    mutable std::mutex mutex_;
    std::map<std::uintptr_t, Block> blocks_;
    Count counts_[static_cast<std::size_t>(MemoryKind::count)];
};

class HipDevice final : public Device {
public:
    // rocblas: who multiplies (see vendor_products.h). Throws Error where there is no such GPU or library.
    explicit HipDevice(int index, bool rocblas = false);
    ~HipDevice() override;
    HipDevice(const HipDevice&) = delete;
    HipDevice& operator=(const HipDevice&) = delete;

    const char* name() const override { return "hip"; }
    int index() const { return index_; }
    const char* model() const { return properties_.name; }
    const char* architecture() const { return properties_.gcnArchName; }

    void* allocate(std::size_t bytes, MemoryKind kind) override;
    void release(void* pointer) override;
    void* allocate_pinned(std::size_t bytes) override;
    void release_pinned(void* pointer) override;
    bool is_device_memory(const void* pointer, std::size_t bytes) const override;
    std::size_t bytes_in_use(MemoryKind kind) const override;
    std::size_t bytes_peak(MemoryKind kind) const override;
    void reserve(std::int64_t rows, std::int64_t width, std::int64_t head_size) override;

    Queue* compute_queue() override;
    Queue* communication_queue() override;
    Event* record(Queue* queue) override;
    void wait(Queue* queue, Event* event) override;
    bool done(Event* event) override;
    void synchronize(Event* event) override;
    void release(Event* event) override;

    void copy(void* destination, const void* source, std::size_t bytes, Queue*) override;
    void zero(void* destination, std::size_t bytes, Queue*) override;
    void convert(Tensor destination, Tensor source, std::int64_t n, Queue*) override;
    void add(Tensor destination, Tensor source, std::int64_t n, Queue*) override;
    void fill_normal(Tensor destination, std::int64_t n, std::uint64_t seed, std::uint64_t key, std::int64_t first,
                     float deviation, Queue*) override;
    void fill(Tensor destination, std::int64_t n, float value, Queue*) override;

    void matmul(const Matmul&, Queue*) override;
    void bias_backward(Tensor dbias, Tensor dy, std::int64_t m, std::int64_t n, std::int64_t ldy, Queue*) override;

    void embed_forward(const Embed&, Tensor out, Tensor table, Tensor position_table, Queue*) override;
    void embed_backward(const Embed&, Tensor dtable, Tensor dposition_table, Tensor dout, Queue*) override;

    void residual_add(Tensor x, Tensor partial, Tensor bias, std::int64_t rows, std::int64_t width, Queue*) override;
    void norm_forward(const Norm&, Tensor y, Queue*) override;
    void norm_backward(const Norm&, Tensor dx, Tensor dweight, Tensor dbias, Tensor dy, Queue*) override;
    void gelu_forward(Tensor y, Tensor x, std::int64_t n, Queue*) override;
    void gelu_backward(Tensor dx, Tensor dy, Tensor x, Tensor y, std::int64_t n, Queue*) override;
    void swiglu_forward(Tensor y, Tensor gate_up, std::int64_t rows, std::int64_t width, Queue*) override;
    void swiglu_backward(Tensor dgate_up, Tensor dy, Tensor gate_up, Tensor y, std::int64_t rows, std::int64_t width,
                         Queue*) override;
    void rope(Tensor x, std::int64_t rows, std::int64_t stride, std::int64_t heads, std::int64_t head_size,
              const std::int32_t* positions, const float* table, bool inverse, Queue*) override;

    void attention_forward(const Attention&, Queue*) override;
    void attention_backward(const Attention&, Tensor dq, Tensor dk, Tensor dv, Tensor dout, float* delta,
                            Queue*) override;

    void head_statistics(float* statistics, Tensor logits, const std::int32_t* targets, std::int64_t rows,
                         std::int64_t width, std::int64_t vocabulary_begin, Queue*) override;
    void loss_forward(StepScalars* scalars, float* lse, const float* statistics, std::int64_t slices,
                      const std::int32_t* targets, std::int64_t rows, Queue*) override;
    void loss_backward(Tensor dlogits, std::int64_t ld_dlogits, Tensor logits, const float* lse,
                       const std::int32_t* targets, const StepScalars* scalars, std::int64_t rows, std::int64_t width,
                       std::int64_t vocabulary_begin, Queue*) override;
    void loss_forward_backward(StepScalars* scalars, float* lse, float* statistics, Tensor dlogits,
                               std::int64_t ld_dlogits, Tensor logits, const std::int32_t* targets, std::int64_t rows,
                               std::int64_t width, Queue*) override;

    void sum_squares(double* sum, Tensor x, std::int64_t n, Queue*) override;
    void finish_norm(StepScalars* scalars, const double* sum, double limit, double loss_scale, Queue*) override;
    void adamw(const AdamW&, Tensor weights, Tensor master, Tensor m, Tensor v, Tensor gradient, std::int64_t n,
               const StepScalars* scalars, Queue*) override;

private:
    hipStream_t stream_of(Queue* queue) const;
    void launched(const char* operation) const;                 // throws if the last launch was refused
    float* floats(std::size_t n, const char* operation) const;  // of the workspace, which must hold so many

    int index_;
    hipDeviceProp_t properties_{};
    std::unique_ptr<HipMemory> memory_;
    std::unique_ptr<VendorProducts> vendor_;  // null: our own kernels multiply
    hipStream_t compute_ = nullptr, communication_ = nullptr;
    void* workspace_ = nullptr;
    std::size_t workspace_bytes_ = 0;
};

}  // namespace pytrain::hip
