// Norms, and the residual stream that they read. Memory binds: forward reads and writes a row, backward reads two and
// adds to one.
#include "core/check.h"
#include "model/stage.h"

namespace pytrain {

Norm Stage::norm_arguments(std::int64_t slot, std::int64_t op) const {
    const OpPlaces& place = places(op);
    const OpParameters& tensors = parameters_.op(op);
    return {shape_.norm,
            stream_.size(),
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
    const Tensor partial = own_rows(activation(arena_.partial, 0));
    const std::size_t bytes = stream_bytes();
    if (op < config_.last_op) claim(places(op).x, slot, op);
    if (ops_.kind(source) == OpKind::embed) return device_.copy(x.data, partial.data, bytes, device_.compute_queue());
    device_.copy(x.data, activation(places(source - 1).x, slot).data, bytes, device_.compute_queue());
    device_.residual_add(x, partial, parameters_.weight(parameters_.op(source).out_bias), stream_.size(), shape_.hidden,
                         device_.compute_queue());
}

void Stage::norm_forward(std::int64_t slot, std::int64_t op, bool again) {
    const bool stream_kept = again && op % 4 == 1;  // a layer's input is what recomputation starts from
    const bool finished = finished_.slot == slot && finished_.op == op;
    finished_ = {kNone, kNone};
    if (op > config_.first_op && leaves_partial(op - 1) && !stream_kept && !finished) complete_stream(slot, op);
    norm_rows(slot, op);
}

void Stage::norm_rows(std::int64_t slot, std::int64_t op) {
    const Place& place = places(op).y;
    const Tensor y = activation(place, slot);
    device_.norm_forward(norm_arguments(slot, op), config_.gathers() ? own_rows(y) : y, device_.compute_queue());
    claim(place, slot, op);
}

Tensor Stage::norm_output(std::int64_t slot, std::int64_t op) {
    const Place& place = places(op).y;
    if (!holds(place, slot, op)) {
        check(!config_.gathers(), ops_.name(op + 1), " needs the output of ", ops_.name(op),
              ", which was not gathered");
        norm_rows(slot, op);
    }
    return activation(place, slot);
}

void Stage::norm_backward_input(std::int64_t slot, std::int64_t op) {
    if (op != ops_.final_norm()) ensure_layer(slot, op);
    const OpParameters& tensors = parameters_.op(op);
    // With one tensor-parallel rank the head has left the gradient of its input where that input was.
    const bool head_in_place = op == ops_.final_norm() && config_.tp_size == 1;
    const Tensor dy = head_in_place ? activation(places(op).y, slot) : own_rows(activation(arena_.dnorm, 0));
    device_.norm_backward(norm_arguments(slot, op), dresidual(), parameters_.gradient(tensors.weight),
                          parameters_.gradient(tensors.bias), dy, device_.compute_queue());
}

}  // namespace pytrain
