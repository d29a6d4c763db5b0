// The head and the loss, a chunk of rows at a time: the full logits never exist.
// FLOPs per token: 2 hidden vocabulary forward, 4 backward; 2 more where tensor parallelism has to see every slice's
// statistics before the first gradient, so that the logits are made twice. Products bind.
#include <algorithm>

#include "core/check.h"
#include "model/stage.h"

namespace pytrain {

struct Stage::HeadChunk {
    std::int64_t rows;
    Tensor x;        // (rows, hidden)
    Tensor logits;   // (rows, vocabulary slice) fp32
    Tensor dlogits;  // the same memory, row by row; bf16 where activations are
    std::int64_t ld_dlogits;
    float* statistics;            // (rows, 3), this slice's
    float* lse;                   // (rows)
    const std::int32_t* targets;  // (rows)
};

Stage::HeadChunk Stage::head_chunk(std::int64_t slot, std::int64_t first) const {
    // What meets bf16 weights and activations in a product has their precision; fp16's range would be too small for it.
    const DType dtype = policy_.activations == DType::bf16 ? DType::bf16 : DType::fp32;
    const Tensor logits = at(arena_.logits, 0, DType::fp32);
    const auto halves = static_cast<std::int64_t>(size_of(DType::fp32) / size_of(dtype));
    float* const own = floats(arena_.statistics, slot) + config_.tp_rank * rows_ * kHeadStatistics;
    return {std::min(arena_.head_chunk, rows_ - first),
            activation(places(ops_.final_norm()).y, slot).at(first * shape_.hidden),
            logits,
            {logits.data, dtype},
            vocabulary_.size() * halves,
            own + first * kHeadStatistics,
            floats(arena_.lse, slot) + first,
            integers(arena_.targets, slot) + first};
}

Product Stage::head_product() const {
    return {shape_.hidden, vocabulary_.size(), parameters_.op(ops_.head()).weight, -1};
}

void Stage::head_logits(const HeadChunk& chunk) {
    column_forward(device_, parameters_, head_product(), chunk.rows, chunk.logits, chunk.x, {});
}

// From d logits the weight gradient, and the gradient of x, which may take x's place.
void Stage::head_gradients(const HeadChunk& chunk, Tensor dx) {
    column_backward_weight(device_, parameters_, head_product(), chunk.rows, chunk.dlogits, chunk.x, chunk.ld_dlogits);
    column_backward_input(device_, parameters_, head_product(), chunk.rows, dx, chunk.dlogits, chunk.ld_dlogits);
}

void Stage::head_forward(std::int64_t slot, Pass pass) {
    const bool fused = pass == Pass::train && config_.tp_size == 1;
    for (std::int64_t first = 0; first < rows_; first += arena_.head_chunk) {
        const HeadChunk chunk = head_chunk(slot, first);
        head_logits(chunk);
        if (!fused) {
            device_.head_statistics(chunk.statistics, chunk.logits, chunk.targets, chunk.rows, vocabulary_.size(),
                                    vocabulary_.begin, device_.compute_queue());
            continue;
        }
        device_.loss_forward_backward(scalars_, chunk.lse, chunk.statistics, chunk.dlogits, chunk.ld_dlogits,
                                      chunk.logits, chunk.targets, chunk.rows, vocabulary_.size(),
                                      device_.compute_queue());
        head_gradients(chunk, chunk.x);
    }
}

void Stage::loss_forward(std::int64_t slot, Pass pass) {
    if (pass == Pass::train && config_.tp_size == 1) return;  // taken chunk by chunk
    device_.loss_forward(scalars_, floats(arena_.lse, slot), floats(arena_.statistics, slot), config_.tp_size,
                         integers(arena_.targets, slot), rows_, device_.compute_queue());
}

void Stage::head_backward_input(std::int64_t slot) {
    device_.zero(dresidual().data, stream_bytes(), device_.compute_queue());
    if (config_.tp_size == 1) return;
    norm_output(slot, ops_.final_norm());  // refuses one that was to be gathered again and was not
    for (std::int64_t first = 0; first < rows_; first += arena_.head_chunk) {
        const HeadChunk chunk = head_chunk(slot, first);
        head_logits(chunk);
        device_.loss_backward(chunk.dlogits, chunk.ld_dlogits, chunk.logits, chunk.lse, chunk.targets, scalars_,
                              chunk.rows, vocabulary_.size(), vocabulary_.begin, device_.compute_queue());
        head_gradients(chunk, activation(arena_.dnorm, 0).at(first * shape_.hidden));
    }
}

}  // namespace pytrain
