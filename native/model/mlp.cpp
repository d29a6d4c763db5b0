// Two products around GELU, or three around SwiGLU.
// FLOPs per token forward: 4 hidden ffn (GELU), 6 hidden ffn (SwiGLU). Products bind.
#include "core/check.h"
#include "model/stage.h"

namespace pytrain {

void Stage::mlp_activate(std::int64_t slot, std::int64_t op) {
    const OpPlaces& place = places(op);
    const Tensor active = activation(place.active, slot), up = activation(place.up, slot);
    if (shape_.gated)
        device_.swiglu_forward(active, up, rows_, ffn_.size(), device_.compute_queue());
    else
        device_.gelu_forward(active, up, rows_ * ffn_.size(), device_.compute_queue());
    claim(place.active, slot, op);
}

void Stage::mlp_forward(std::int64_t slot, std::int64_t op, bool again) {
    const OpPlaces& place = places(op);
    const Tensor up = activation(place.up, slot), active = activation(place.active, slot);
    column_forward(device_, parameters_, parameters_.first_product(op), rows_, up, activation(places(op - 1).y, slot),
                   shape_.gated ? Tensor{} : active);
    claim(place.up, slot, op);
    claim(place.active, slot, op);
    if (shape_.gated) mlp_activate(slot, op);
    if (!again) stream_forward(slot, op, active);  // backward has no use for the last product
}

void Stage::mlp_backward_input(std::int64_t slot, std::int64_t op) {
    ensure_layer(slot, op);
    const OpPlaces& place = places(op);
    const Tensor up = activation(place.up, slot), dup = activation(place.dup, slot);
    // GELU's gradient is taken in place where nobody reads the gradient of its output afterwards.
    const Tensor dactive = arena_.dactive.offset == kNone ? dup : activation(arena_.dactive, 0);
    row_backward_input(device_, parameters_, parameters_.second_product(op), rows_, dactive,
                       activation(arena_.dresidual, 0));
    // A weight gradient that follows at once reads the activation's output, which costs one write here.
    const bool again = !config_.defer_weight && !holds(place.active, slot, op);
    const Tensor active = again ? activation(place.active, slot) : Tensor{};
    if (shape_.gated)
        device_.swiglu_backward(dup, dactive, up, active, rows_, ffn_.size(), device_.compute_queue());
    else
        device_.gelu_backward(dup, dactive, up, active, rows_ * ffn_.size(), device_.compute_queue());
    if (again) claim(place.active, slot, op);
    column_backward_input(device_, parameters_, parameters_.first_product(op), rows_, activation(arena_.dnorm, 0), dup);
    keep_dresidual(slot, op);
}

void Stage::mlp_backward_weight(std::int64_t slot, std::int64_t op) {
    const OpPlaces& place = places(op);
    if (!holds(place.active, slot, op)) mlp_activate(slot, op);
    row_backward_weight(device_, parameters_, parameters_.second_product(op), rows_, dresidual_of(slot, op),
                        activation(place.active, slot), stream_);
    column_backward_weight(device_, parameters_, parameters_.first_product(op), rows_, activation(place.dup, slot),
                           norm_output(slot, op - 1));
}

}  // namespace pytrain
