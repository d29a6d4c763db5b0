// Norms, and the residual stream that they read. Memory binds: forward reads and writes a row, backward reads two and
// adds to one.
#include "core/check.h"
#include "model/stage.h"

namespace pytrain {

Norm Stage::norm_arguments(std::int64_t slot, std::int64_t op) const {
    const OpPlaces& place = places(op);
    const OpParameters& tensors = parameters_.op(op);
    return {shape_.norm,
            rows_,
            shape_.hidden,
            shape_.norm_eps,
            activation(place.x, slot),
            parameters_.weight(tensors.weight),
            parameters_.weight(tensors.bias),
            floats(place.mean, slot),
            floats(place.rstd, slot)};
}

// The stream that enters `op` (or leaves the stage) is the one before the row-parallel op, plus its summed product and
// bias.
void Stage::complete_stream(std::int64_t slot, std::int64_t op) {
    const std::int64_t source = op - 1;
    const Tensor x = op == config_.last_op ? activation(arena_.output, slot) : activation(places(op).x, slot);
    const Tensor partial = at(arena_.partial, 0, policy_.activations);
    const std::size_t bytes = static_cast<std::size_t>(rows_ * shape_.hidden) * size_of(policy_.activations);
    if (op < config_.last_op) claim(places(op).x, slot, op);
    if (ops_.kind(source) == OpKind::embed) return device_.copy(x.data, partial.data, bytes, device_.compute_queue());
    device_.copy(x.data, activation(places(source - 1).x, slot).data, bytes, device_.compute_queue());
    device_.residual_add(x, partial, parameters_.weight(parameters_.op(source).out_bias), rows_, shape_.hidden,
                         device_.compute_queue());
}

void Stage::norm_forward(std::int64_t slot, std::int64_t op, bool again) {
    const bool stream_kept = again && op % 4 == 1;  // a layer's input is what recomputation starts from
    const bool finished = finished_.slot == slot && finished_.op == op;
    finished_ = {kNone, kNone};
    if (op > config_.first_op && leaves_partial(op - 1) && !stream_kept && !finished) complete_stream(slot, op);
    device_.norm_forward(norm_arguments(slot, op), activation(places(op).y, slot), device_.compute_queue());
    claim(places(op).y, slot, op);
}

Tensor Stage::norm_output(std::int64_t slot, std::int64_t op) {
    const OpPlaces& place = places(op);
    const Tensor y = activation(place.y, slot);
    if (!holds(place.y, slot, op)) {
        device_.norm_forward(norm_arguments(slot, op), y, device_.compute_queue());
        claim(place.y, slot, op);
    }
    return y;
}

void Stage::norm_backward_input(std::int64_t slot, std::int64_t op) {
    if (op != ops_.final_norm()) ensure_layer(slot, op);
    const OpParameters& tensors = parameters_.op(op);
    // With one tensor-parallel rank the head has left the gradient of its input where that input was.
    const bool head_in_place = op == ops_.final_norm() && config_.tp_size == 1;
    const Tensor dy = head_in_place ? activation(places(op).y, slot) : activation(arena_.dnorm, 0);
    device_.norm_backward(norm_arguments(slot, op), activation(arena_.dresidual, 0),
                          parameters_.gradient(tensors.weight), parameters_.gradient(tensors.bias), dy,
                          device_.compute_queue());
}

}  // namespace pytrain
