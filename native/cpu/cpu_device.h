// The CPU as a Device: operations run at once on OpenMP threads, so queues are one and events are always done.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/buffer.h"
#include "cpu/kernels.h"
#include "cpu/workspace.h"
#include "device.h"

namespace pytrain::cpu {

// What the operations on rows of up to `width` elements need.
WorkspaceNeed rows_workspace(std::int64_t width);

class CpuDevice final : public Device {
public:
    // The table is copied. threads: how many the operations use, see default_threads.
    CpuDevice(const Kernels& kernels, int threads);
    ~CpuDevice() override = default;

    const Kernels& kernels() const { return kernels_; }
    int threads() const { return workspace_.threads(); }
    Workspace& workspace() { return workspace_; }

    const char* name() const override { return "cpu"; }
    void* allocate(std::size_t bytes, MemoryKind kind) override;
    void release(void* pointer) override;
    void* allocate_pinned(std::size_t bytes) override;
    void release_pinned(void* pointer) override;
    bool is_device_memory(const void*, std::size_t) const override { return false; }  // it is the host's
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
    Kernels kernels_;
    Memory memory_;  // before the workspace, which releases into it
    Workspace workspace_;
};

}  // namespace pytrain::cpu
