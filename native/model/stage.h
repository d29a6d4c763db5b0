// A range of ops on one rank: C++ runs any sub-range per call, Python owns what happens at the cuts.
//
// With tp_size > 1 the row-parallel ops (embed, attention, mlp) leave a partial product in `partial`; the caller sums
// it over the tensor-parallel group before it runs the next op, which completes the residual stream (partial + bias)
// itself; after the last op of a stage `finish_forward` does. In backward, the attention, mlp and head ops leave this
// rank's part of the gradient of their input in `dnorm`, to be summed before the norm's backward_input runs. The head
// leaves this slice's row statistics in `statistics`, to be gathered before the loss.
//
// With sequence parallelism the residual stream, its gradient and the norms are those of this rank's rows. Each sum is
// a reduce-scatter then: only this rank's rows of `partial` and `dnorm` are read. A norm writes its rows of `gathered`,
// and the caller gathers the others before the op that multiplies with them. In backward it gathers `dresidual_rows`
// before an embed, attention or mlp op, and what `rebuild_gathered` has written before the head's backward_input and
// the others' backward_weight. Gradients of replicated tensors are then of this rank's rows.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "device.h"
#include "model/arena.h"
#include "model/parameters.h"
#include "model/product.h"

namespace pytrain {

// train: keep what backward needs, and with tp_size = 1 let the head take its gradients at once, while a chunk of
// logits exists (three products instead of four). evaluate: the loss alone.
enum class Pass : std::uint8_t { train, evaluate };

// cos and sin of every position and frequency: (positions, head_size/2, 2).
std::vector<float> rope_table(const Shape&, std::int64_t positions);

class Stage {
public:
    Stage(Device&, const Shape&, const Policy&, const StageConfig&);
    ~Stage();
    Stage(const Stage&) = delete;
    Stage& operator=(const Stage&) = delete;

    Device& device() { return device_; }
    const Shape& shape() const { return shape_; }
    const Policy& policy() const { return policy_; }
    const StageConfig& config() const { return config_; }
    const Arena& arena() const { return arena_; }
    Parameters& parameters() { return parameters_; }
    // Before the first micro-batch of a step; see Parameters. Every tensor gets a gradient in every micro-batch.
    void overwrite_gradients() { parameters_.overwrite_gradients(&device_); }
    const Layout& layout() const { return parameters_.layout(); }
    StepScalars* scalars() { return scalars_; }

    // Ops [begin, end), global numbers. Forward ascends, backward descends.
    void forward(std::int64_t slot, std::int64_t begin, std::int64_t end, Pass pass);
    void finish_forward(std::int64_t slot);  // tp_size > 1: completes the stream that leaves the stage
    // tp_size > 1: completes the stream that enters `op` now, so that the weights before it may go away; the bias of a
    // row-parallel product is otherwise added by the norm after it.
    void finish_segment(std::int64_t slot, std::int64_t op);
    void backward_input(std::int64_t slot, std::int64_t begin, std::int64_t end);
    void backward_weight(std::int64_t slot, std::int64_t begin, std::int64_t end);
    // each op's weight gradient straight after its input's
    void backward(std::int64_t slot, std::int64_t begin, std::int64_t end);
    // Runs the forward of ops [begin, end) of one layer again, without its last product. With tp_size = 1 backward does
    // so itself where the policy asks for it; with more the caller does, since the layer has a cut inside.
    void recompute(std::int64_t slot, std::int64_t begin, std::int64_t end);

    // Sequence parallelism. This rank's rows of the norm output that `op` (attention, mlp, head) multiplies with, into
    // `gathered`; false if all rows of it are there since they were gathered last.
    bool rebuild_gathered(std::int64_t slot, std::int64_t op);
    // The gradient of the output of `op` (embed, attention, mlp), all rows: this rank's are there, the others are to be
    // gathered. `late` is for a deferred backward_weight, whose backward_input was not the last that ran.
    Tensor dresidual_rows(std::int64_t slot, std::int64_t op, bool late);

    // Views of the arena for the caller; shapes beside the Place in arena.h.
    Tensor at(const Place& place, std::int64_t slot, DType dtype) const;
    float* floats(const Place& place, std::int64_t slot) const {
        return static_cast<float*>(at(place, slot, DType::fp32).data);
    }
    std::int32_t* integers(const Place& place, std::int64_t slot) const {
        return static_cast<std::int32_t*>(at(place, slot, DType::fp32).data);
    }
    Tensor input(std::int64_t slot) const;  // residual stream that enters a stage without the embedding
    Tensor dresidual() const;               // gradient of this rank's rows of the residual stream
    Range stream() const { return stream_; }

private:
    const OpPlaces& places(std::int64_t op) const {
        return arena_.ops[static_cast<std::size_t>(op - config_.first_op)];
    }
    Tensor activation(const Place& place, std::int64_t slot) const { return at(place, slot, policy_.activations); }
    Tensor stream_after(std::int64_t op, std::int64_t slot) const;  // where op writes the residual stream
    bool leaves_partial(std::int64_t op) const;
    void check_range(std::int64_t slot, std::int64_t begin, std::int64_t end) const;
    void forward_op(std::int64_t slot, std::int64_t op, Pass pass, bool again);
    void backward_input_op(std::int64_t slot, std::int64_t op);
    void backward_weight_op(std::int64_t slot, std::int64_t op);

    void stream_forward(std::int64_t slot, std::int64_t op, Tensor x);
    std::size_t stream_bytes() const;
    Tensor own_rows(Tensor all) const { return all.at(stream_.begin * shape_.hidden); }
    void keep_dresidual(std::int64_t slot, std::int64_t op);
    Tensor dresidual_of(std::int64_t slot, std::int64_t op) const;  // all rows, for backward_weight

    void embed_forward(std::int64_t slot);
    void embed_backward_weight(std::int64_t slot);

    Norm norm_arguments(std::int64_t slot, std::int64_t op) const;
    void norm_rows(std::int64_t slot, std::int64_t op);  // the output of this rank's rows
    void complete_stream(std::int64_t slot, std::int64_t op);
    void norm_forward(std::int64_t slot, std::int64_t op, bool again);
    void norm_backward_input(std::int64_t slot, std::int64_t op);
    Tensor norm_output(std::int64_t slot, std::int64_t op);  // rebuilt if the policy dropped it

    Attention attention_arguments(std::int64_t slot, std::int64_t op) const;
    void attention_forward(std::int64_t slot, std::int64_t op);
    void attention_backward_input(std::int64_t slot, std::int64_t op);
    void attention_backward_weight(std::int64_t slot, std::int64_t op);

    void mlp_activate(std::int64_t slot, std::int64_t op);
    void mlp_forward(std::int64_t slot, std::int64_t op, bool again);
    void mlp_backward_input(std::int64_t slot, std::int64_t op);
    void mlp_backward_weight(std::int64_t slot, std::int64_t op);

    // The head, a chunk of rows at a time: logits exist for one chunk only.
    struct HeadChunk;
    HeadChunk head_chunk(std::int64_t slot, std::int64_t first) const;
    Product head_product() const;
    void head_logits(const HeadChunk&);
    void head_gradients(const HeadChunk&, Tensor dx);
    void head_forward(std::int64_t slot, Pass pass);
    void head_backward_input(std::int64_t slot);
    void loss_forward(std::int64_t slot, Pass pass);

    // Who filled a shared (recomputed) piece last, so that it is rebuilt only when another op has used it since.
    bool holds(const Place& place, std::int64_t slot, std::int64_t op) const;
    void claim(const Place& place, std::int64_t slot, std::int64_t op);
    void ensure_layer(std::int64_t slot, std::int64_t op);

    Device& device_;
    Shape shape_;
    Policy policy_;
    StageConfig config_;
    Ops ops_;
    Parameters parameters_;
    Arena arena_;
    std::int64_t rows_;
    Range stream_;  // rows of the residual stream that are here
    HeadRange heads_;
    Range ffn_, vocabulary_;
    char* memory_ = nullptr;
    float* rope_table_ = nullptr;  // (context, head_size/2, 2)
    StepScalars* scalars_ = nullptr;
    struct Holder {
        std::int64_t slot, op;
    };
    std::map<std::int64_t, Holder> holders_;  // by offset of the shared piece
    Holder finished_ = {kNone, kNone};        // by finish_segment; the norm that reads it forgets it
};

}  // namespace pytrain
