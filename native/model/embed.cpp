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
    const std::int32_t* const tokens = integers(arena_.tokens, slot);
    const std::int32_t* const positions = integers(arena_.positions, slot);
    const Embed args{rows_, shape_.hidden, vocabulary_.begin, vocabulary_.end, tokens, positions};
    const Tensor dout = activation(arena_.dresidual, 0), dtable = parameters_.gradient(op.weight),
                 dpositions = parameters_.gradient(op.out_weight);
    if (!config_.gathers()) return device_.embed_backward(args, dtable, dpositions, dout, device_.compute_queue());
    // Of the tokens this rank has a slice, and takes all rows for it; of the positions it has all, and takes its rows.
    device_.embed_backward(args, dtable, {}, dout, device_.compute_queue());
    const Embed own{stream_.size(),  shape_.hidden,          vocabulary_.begin,
                    vocabulary_.end, tokens + stream_.begin, positions + stream_.begin};
    device_.embed_backward(own, {}, dpositions, own_rows(dout), device_.compute_queue());
}

}  // namespace pytrain
