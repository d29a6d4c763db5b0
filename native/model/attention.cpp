// q, k, v projections, rotation, attention, output projection.
// FLOPs per token forward: 2 hidden (heads + 2 kv_heads) size + 2 length heads size (causal) + 2 heads size hidden.
// Products bind.
#include "core/check.h"
#include "model/stage.h"

namespace pytrain {

Attention Stage::attention_arguments(std::int64_t slot, std::int64_t op) const {
    const std::int64_t size = shape_.head_size, heads = heads_.heads.size(), kv_heads = heads_.kv_heads.size();
    const std::int64_t stride = (heads + 2 * kv_heads) * size;
    const Tensor qkv = activation(places(op).qkv, slot);
    Attention args{};
    args.batch = config_.batch, args.heads = heads, args.kv_heads = kv_heads, args.head_size = size;
    args.query_rows = args.key_rows = config_.length;
    args.q = qkv, args.k = qkv.at(heads * size), args.v = qkv.at((heads + kv_heads) * size);
    args.q_stride = args.kv_stride = stride;
    args.q_batch_stride = args.kv_batch_stride = stride * config_.length;
    args.document_starts = integers(arena_.document_starts, slot);
    args.out = activation(places(op).out, slot);
    args.lse = floats(places(op).lse, slot);
    return args;
}

void Stage::attention_forward(std::int64_t slot, std::int64_t op) {
    const OpPlaces& place = places(op);
    const Product product = parameters_.first_product(op);
    const Tensor qkv = activation(place.qkv, slot);
    column_forward(device_, parameters_, product, rows_, qkv, activation(places(op - 1).y, slot), {});
    if (!shape_.learned_positions) {
        device_.rope(qkv, rows_, product.out, heads_.heads.size() + heads_.kv_heads.size(), shape_.head_size,
                     integers(arena_.positions, slot), rope_table_, false, device_.compute_queue());
    }
    device_.attention_forward(attention_arguments(slot, op), device_.compute_queue());
    claim(place.qkv, slot, op);
    claim(place.out, slot, op);
    stream_forward(slot, op, activation(place.out, slot));
}

void Stage::attention_backward_input(std::int64_t slot, std::int64_t op) {
    ensure_layer(slot, op);
    const OpPlaces& place = places(op);
    const Product product = parameters_.first_product(op);
    const std::int64_t size = shape_.head_size, heads = heads_.heads.size(), kv_heads = heads_.kv_heads.size();
    const Attention args = attention_arguments(slot, op);
    if (!holds(place.out, slot, op)) {
        device_.attention_forward(args, device_.compute_queue());
        claim(place.out, slot, op);
    }
    const Tensor dresidual = activation(arena_.dresidual, 0), dout = activation(arena_.dout, 0),
                 dqkv = activation(place.dqkv, slot);
    row_backward_input(device_, parameters_, parameters_.second_product(op), rows_, dout, dresidual);
    device_.attention_backward(args, dqkv, dqkv.at(heads * size), dqkv.at((heads + kv_heads) * size), dout,
                               floats(arena_.delta, 0), device_.compute_queue());
    if (!shape_.learned_positions) {
        device_.rope(dqkv, rows_, product.out, heads + kv_heads, size, integers(arena_.positions, slot), rope_table_,
                     true, device_.compute_queue());
    }
    column_backward_input(device_, parameters_, product, rows_, activation(arena_.dnorm, 0), dqkv);
    keep_dresidual(slot, op);
}

void Stage::attention_backward_weight(std::int64_t slot, std::int64_t op) {
    const OpPlaces& place = places(op);
    const Tensor out = activation(place.out, slot);
    if (!holds(place.out, slot, op)) {
        device_.attention_forward(attention_arguments(slot, op), device_.compute_queue());
        claim(place.out, slot, op);
    }
    row_backward_weight(device_, parameters_, parameters_.second_product(op), rows_, dresidual_of(slot, op), out,
                        stream_);
    column_backward_weight(device_, parameters_, parameters_.first_product(op), rows_, activation(place.dqkv, slot),
                           norm_output(slot, op - 1));
}

}  // namespace pytrain
