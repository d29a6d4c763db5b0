#include "model/stage.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"

namespace pytrain {

Stage::Stage(Device& device, const Shape& shape, const Policy& policy, const StageConfig& config)
    : device_(device),
      shape_(shape),
      policy_(policy),
      config_(config),
      ops_(shape.layers),
      parameters_(shape, policy, config.first_op, config.last_op, config.tp_rank, config.tp_size),
      arena_(shape, policy, config),
      rows_(config.batch * config.length),
      stream_(stream_rows(config)),
      heads_(head_range(shape, config.tp_rank, config.tp_size)),
      ffn_(balanced(shape.ffn, config.tp_rank, config.tp_size)),
      vocabulary_(balanced(shape.vocabulary, config.tp_rank, config.tp_size)) {
    const std::int64_t widest = std::max(
        {shape.hidden, (shape.heads + 2 * shape.kv_heads) * shape.head_size, 2 * shape.ffn, vocabulary_.size()});
    device_.reserve(rows_, widest, shape.head_size);
    memory_ = static_cast<char*>(device_.allocate(static_cast<std::size_t>(arena_.bytes), MemoryKind::activations));
    scalars_ = static_cast<StepScalars*>(device_.allocate(sizeof(StepScalars), MemoryKind::workspace));
    for (std::size_t bucket = 0; bucket < arena_.gradients.size(); ++bucket)
        if (const Place& place = arena_.gradients[bucket]; place.offset != kNone)
            parameters_.bind_gradients(static_cast<std::int64_t>(bucket), memory_ + place.offset);
    if (shape.learned_positions) return;
    const std::vector<float> table = rope_table(shape, std::max(shape.context, config.length));
    rope_table_ = static_cast<float*>(device_.allocate(table.size() * sizeof(float), MemoryKind::workspace));
    device_.copy(rope_table_, table.data(), table.size() * sizeof(float), device_.compute_queue());
}

Stage::~Stage() {
    device_.release(memory_);
    device_.release(scalars_);
    if (rope_table_ != nullptr) device_.release(rope_table_);
}

std::vector<float> rope_table(const Shape& shape, std::int64_t positions) {
    std::vector<float> table;
    table.reserve(static_cast<std::size_t>(positions) * shape.rope_frequencies.size() * 2);
    for (std::int64_t position = 0; position < positions; ++position) {
        for (const double frequency : shape.rope_frequencies) {
            const double angle = static_cast<double>(position) * frequency;
            table.push_back(static_cast<float>(std::cos(angle)));
            table.push_back(static_cast<float>(std::sin(angle)));
        }
    }
    return table;
}

Tensor Stage::at(const Place& place, std::int64_t slot, DType dtype) const {
    check(place.offset != kNone, "this stage keeps no such buffer");
    check(slot >= 0 && slot < config_.slots, "slot ", slot, " is outside the stage's ", config_.slots);
    return {memory_ + place.offset + slot * place.slot_stride, dtype};
}

Tensor Stage::input(std::int64_t slot) const {
    check(config_.first_op > 0, "the first stage reads tokens, it has no input stream");
    return activation(places(config_.first_op).x, slot);
}

Tensor Stage::dresidual() const { return own_rows(activation(arena_.dresidual, 0)); }

std::size_t Stage::stream_bytes() const {
    return static_cast<std::size_t>(stream_.size() * shape_.hidden) * size_of(policy_.activations);
}

Tensor Stage::stream_after(std::int64_t op, std::int64_t slot) const {
    return op + 1 == config_.last_op ? activation(arena_.output, slot) : activation(places(op + 1).x, slot);
}

bool Stage::leaves_partial(std::int64_t op) const {
    if (config_.tp_size == 1) return false;
    const OpKind kind = ops_.kind(op);
    return kind == OpKind::embed || kind == OpKind::attention || kind == OpKind::mlp;
}

void Stage::check_range(std::int64_t slot, std::int64_t begin, std::int64_t end) const {
    check(begin >= config_.first_op && begin <= end && end <= config_.last_op, "ops ", begin, "..", end,
          " are outside this stage's ", config_.first_op, "..", config_.last_op);
    check(slot >= 0 && slot < config_.slots, "slot ", slot, " is outside the stage's ", config_.slots);
}

void Stage::forward(std::int64_t slot, std::int64_t begin, std::int64_t end, Pass pass) {
    check_range(slot, begin, end);
    check(pass == Pass::evaluate || config_.training, "this stage was built for evaluation only");
    for (std::int64_t op = begin; op < end; ++op) forward_op(slot, op, pass, false);
}

void Stage::forward_op(std::int64_t slot, std::int64_t op, Pass pass, bool again) {
    switch (ops_.kind(op)) {
        case OpKind::embed:
            return embed_forward(slot);
        case OpKind::norm:
            return norm_forward(slot, op, again);
        case OpKind::attention:
            return attention_forward(slot, op);
        case OpKind::mlp:
            return mlp_forward(slot, op, again);
        case OpKind::head:
            return head_forward(slot, pass);
        case OpKind::loss:
            return loss_forward(slot, pass);
    }
}

void Stage::finish_forward(std::int64_t slot) {
    if (config_.last_op <= ops_.final_norm() && leaves_partial(config_.last_op - 1))
        complete_stream(slot, config_.last_op);
}

void Stage::finish_segment(std::int64_t slot, std::int64_t op) {
    check_range(slot, op, op);
    if (op == config_.last_op) return finish_forward(slot);
    if (op == config_.first_op || !leaves_partial(op - 1)) return;
    complete_stream(slot, op);
    finished_ = {slot, op};
}

void Stage::backward(std::int64_t slot, std::int64_t begin, std::int64_t end) {
    check_range(slot, begin, end);
    for (std::int64_t op = end - 1; op >= begin; --op) {
        backward_input_op(slot, op);
        backward_weight_op(slot, op);
    }
}

void Stage::backward_input(std::int64_t slot, std::int64_t begin, std::int64_t end) {
    check_range(slot, begin, end);
    for (std::int64_t op = end - 1; op >= begin; --op) backward_input_op(slot, op);
}

void Stage::backward_weight(std::int64_t slot, std::int64_t begin, std::int64_t end) {
    check_range(slot, begin, end);
    for (std::int64_t op = end - 1; op >= begin; --op) backward_weight_op(slot, op);
}

void Stage::backward_input_op(std::int64_t slot, std::int64_t op) {
    check(config_.training, "this stage was built for evaluation only");
    switch (ops_.kind(op)) {
        case OpKind::norm:
            return norm_backward_input(slot, op);
        case OpKind::attention:
            return attention_backward_input(slot, op);
        case OpKind::mlp:
            return mlp_backward_input(slot, op);
        case OpKind::head:
            return head_backward_input(slot);
        case OpKind::embed:  // tokens have no gradient
        case OpKind::loss:
            return;  // d logits exist only while the head has a chunk of them
    }
}

void Stage::backward_weight_op(std::int64_t slot, std::int64_t op) {
    check(config_.training, "this stage was built for evaluation only");
    switch (ops_.kind(op)) {
        case OpKind::embed:
            return embed_backward_weight(slot);
        case OpKind::attention:
            return attention_backward_weight(slot, op);
        case OpKind::mlp:
            return mlp_backward_weight(slot, op);
        case OpKind::norm:  // its gains are summed in the pass over rows that backward_input makes anyway
        case OpKind::head:  // taken from each chunk of logits while it exists
        case OpKind::loss:
            return;
    }
}

// --- recomputation ----------------------------------------------------------------------------------------------

void Stage::recompute(std::int64_t slot, std::int64_t begin, std::int64_t end) {
    check_range(slot, begin, end);
    for (std::int64_t op = begin; op < end; ++op) forward_op(slot, op, Pass::train, true);
}

bool Stage::holds(const Place& place, std::int64_t slot, std::int64_t op) const {
    if (place.slot_stride != 0) return true;
    const auto found = holders_.find(place.offset);
    return found != holders_.end() && found->second.slot == slot && found->second.op == op;
}

void Stage::claim(const Place& place, std::int64_t slot, std::int64_t op) { holders_[place.offset] = {slot, op}; }

// Before a backward op of a fully recomputed layer: its forward runs again unless this layer's was the last that ran.
void Stage::ensure_layer(std::int64_t slot, std::int64_t op) {
    const std::int64_t layer = ops_.layer(op);
    if (config_.recompute[static_cast<std::size_t>(layer)] != Recompute::full) return;
    const std::int64_t begin = std::max(1 + 4 * layer, config_.first_op),
                       end = std::min(5 + 4 * layer, config_.last_op);
    const std::int64_t last_kept = end - 1;  // the op whose kept piece is written last
    const OpPlaces& kept = places(last_kept);
    const Place& witness = ops_.kind(last_kept) == OpKind::mlp ? kept.up : kept.qkv;
    if (holds(witness, slot, last_kept)) return;
    check(config_.tp_size == 1, "layer ", layer,
          " must be recomputed by the caller before its backward, since tensor parallelism sums inside it");
    recompute(slot, begin, end);
}

// --- the residual stream ------------------------------------------------------------------------------------------

// The second product of attention and mlp yields the stream's next value, or this rank's part of it.
void Stage::stream_forward(std::int64_t slot, std::int64_t op, Tensor x) {
    if (leaves_partial(op)) {
        return row_forward(device_, parameters_, parameters_.second_product(op), rows_, activation(arena_.partial, 0),
                           x, {{}, false});
    }
    if (op + 1 < config_.last_op) claim(places(op + 1).x, slot, op + 1);
    row_forward(device_, parameters_, parameters_.second_product(op), rows_, stream_after(op, slot), x,
                {activation(places(op - 1).x, slot), true});
}

// The gradient of an op's output is the stream's: still there when the weight gradient follows at once, else copied.
void Stage::keep_dresidual(std::int64_t slot, std::int64_t op) {
    if (!config_.defer_weight) return;
    device_.copy(activation(places(op).dresidual, slot).data, dresidual().data, stream_bytes(),
                 device_.compute_queue());
}

Tensor Stage::dresidual_of(std::int64_t slot, std::int64_t op) const {
    if (!config_.defer_weight) return activation(arena_.dresidual, 0);
    if (config_.gathers()) return activation(arena_.dnorm, 0);  // where dresidual_rows has put it
    return activation(places(op).dresidual, slot);
}

// --- sequence parallelism: what the caller gathers --------------------------------------------------------------

bool Stage::rebuild_gathered(std::int64_t slot, std::int64_t op) {
    check_range(slot, op, op + 1);
    const OpKind kind = ops_.kind(op);
    check(config_.gathers() && (kind == OpKind::attention || kind == OpKind::mlp || kind == OpKind::head),
          ops_.name(op), " reads no norm output that has to be gathered");
    if (holds(arena_.gathered, slot, op - 1)) return false;
    norm_rows(slot, op - 1);
    return true;
}

Tensor Stage::dresidual_rows(std::int64_t slot, std::int64_t op, bool late) {
    check_range(slot, op, op + 1);
    check(config_.gathers(), "the gradient of the residual stream is whole without sequence parallelism");
    if (!late || op == 0) return activation(arena_.dresidual, 0);
    // Between two passes nobody needs `dnorm`, while `dresidual` may still have the embedding's.
    const Tensor rows = activation(arena_.dnorm, 0);
    device_.copy(own_rows(rows).data, activation(places(op).dresidual, slot).data, stream_bytes(),
                 device_.compute_queue());
    return rows;
}

}  // namespace pytrain
