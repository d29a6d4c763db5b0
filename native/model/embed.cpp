// Token and position embedding. FLOPs: none to speak of; bytes: one row read and one written per token. Memory binds.
#include "core/check.h"
#include "model/stage.h"

namespace pytrain {

void Stage::embed_forward(std::int64_t slot) {
    const OpParameters& op = parameters_.op(0);
    const Embed args{rows_,
                     shape_.hidden,
                     vocabulary_.begin,
                     vocabulary_.end,
                     integers(arena_.tokens, slot),
                     integers(arena_.positions, slot)};
    // Under tensor parallelism the slices are summed afterwards: positions enter that sum once.
    const bool with_positions = shape_.learned_positions && config_.tp_rank == 0;
    const Tensor out = leaves_partial(0) ? at(arena_.partial, 0, policy_.activations) : stream_after(0, slot);
    if (!leaves_partial(0) && config_.last_op > 1) claim(places(1).x, slot, 1);
    device_.embed_forward(args, out, parameters_.weight(op.weight),
                          with_positions ? parameters_.weight(op.out_weight) : Tensor{}, device_.compute_queue());
}

void Stage::embed_backward_weight(std::int64_t slot) {
    const OpParameters& op = parameters_.op(0);
    const Embed args{rows_,
                     shape_.hidden,
                     vocabulary_.begin,
                     vocabulary_.end,
                     integers(arena_.tokens, slot),
                     integers(arena_.positions, slot)};
    device_.embed_backward(args, parameters_.gradient(op.weight), parameters_.gradient(op.out_weight),
                           activation(arena_.dresidual, 0), device_.compute_queue());
}

}  // namespace pytrain
