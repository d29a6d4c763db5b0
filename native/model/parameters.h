// Where an op finds its weights and gradients: the layout resolved to one small record per op, over bound buffers.
#pragma once
#include <cstdint>
#include <vector>

#include "model/layout.h"
#include "model/product.h"

namespace pytrain {

// Indices into Layout::tensors(), -1 where the op has no such tensor. Fused tensors are named by their first.
struct OpParameters {
    std::int64_t weight = -1, bias = -1;  // norm; attention q k v; mlp [gate] up; embed.tokens; the head's matrix
    std::int64_t out_weight = -1, out_bias = -1;  // attention out, mlp down; embed.positions as out_weight
};

class Parameters {
public:
    Parameters(const Shape&, const Policy&, std::int64_t first_op, std::int64_t last_op, std::int64_t tp_rank,
               std::int64_t tp_size);

    const Layout& layout() const { return layout_; }
    const OpParameters& op(std::int64_t op) const { return ops_.at(static_cast<std::size_t>(op - first_op_)); }

    // The products of attention and mlp: q k v or [gate] up, then out or down.
    Product first_product(std::int64_t op) const;
    Product second_product(std::int64_t op) const;

    // Points a bucket at its flat ranges. Either may be none: no gradients in evaluation, no weights while they are
    // away.
    void bind_weights(std::int64_t bucket, void* data);
    void bind_gradients(std::int64_t bucket, void* data);
    // Throws, naming the tensor, if its bucket is not bound. -1 gives none.
    Tensor weight(std::int64_t tensor) const { return find(weights_, tensor, policy_.weights, "weights"); }
    // To add to: `elements` from the start of the tensor (fused ones follow it), 0 for its own.
    Tensor gradient(std::int64_t tensor, std::int64_t elements = 0) const;
    // To be written by one product over the whole tensor, which adds to it if `accumulate` is set.
    Tensor gradient(std::int64_t tensor, bool* accumulate) const;

    // From here on the first gradient of each tensor takes the place of what is there, so that nobody has to zero it:
    // products write over it, and what only knows how to add finds zeros, made on `device`.
    void overwrite_gradients(Device* device);

private:
    Tensor find(const std::vector<void*>& bound, std::int64_t tensor, DType, const char* what) const;

    // Elements of dimension 0 of this rank's part of `count` adjacent tensors.
    std::int64_t rows(std::int64_t tensor, std::int64_t count) const;

    Ops all_;
    bool gated_;
    std::int64_t hidden_;
    Policy policy_;
    std::int64_t first_op_;
    Layout layout_;
    std::vector<OpParameters> ops_;
    std::vector<void*> weights_, gradients_;  // per bucket
    Device* device_ = nullptr;
    // Per tensor: its gradient is still an earlier step's. Asking for the gradient changes that, not what it stands
    // for.
    mutable std::vector<bool> stale_;
};

}  // namespace pytrain
