#include "model/arena.h"

#include <algorithm>

#include "core/check.h"

namespace pytrain {

namespace {
constexpr std::int64_t kAlignment = 64;  // a cache line, and the widest vector

std::int64_t aligned_bytes(std::int64_t elements, DType dtype) {
    return (elements * static_cast<std::int64_t>(size_of(dtype)) + kAlignment - 1) / kAlignment * kAlignment;
}

// Sizes that this rank sees, in elements of one micro-batch.
struct Sizes {
    std::int64_t rows, hidden, stream_rows, stream, heads, query, qkv, ffn, vocabulary, scores;
    Sizes(const Shape& shape, const StageConfig& config) {
        const HeadRange part = head_range(shape, config.tp_rank, config.tp_size);
        rows = config.batch * config.length;
        hidden = rows * shape.hidden;
        stream_rows = pytrain::stream_rows(config).size();
        stream = stream_rows * shape.hidden;
        heads = part.heads.size();
        query = rows * heads * shape.head_size;
        qkv = query + 2 * rows * part.kv_heads.size() * shape.head_size;
        ffn = rows * balanced(shape.ffn, config.tp_rank, config.tp_size).size();
        vocabulary = balanced(shape.vocabulary, config.tp_rank, config.tp_size).size();
        scores = rows * heads;
    }
};

// Rows of a chunk of logits. Chosen ones are of nearly equal size.
std::int64_t head_rows(const StageConfig& config, const Policy& policy, std::int64_t rows, std::int64_t vocabulary) {
    if (config.head_chunk > 0) return std::min(config.head_chunk, rows);
    const std::int64_t row_bytes = vocabulary * static_cast<std::int64_t>(size_of(DType::fp32));
    const std::int64_t bytes = policy.activations == DType::bf16 ? kLogitsBytesOfBf16 : kLogitsBytes;
    const std::int64_t most = std::max<std::int64_t>(1, bytes / std::max<std::int64_t>(1, row_bytes));
    const std::int64_t chunks = (rows + most - 1) / most;
    return (rows + chunks - 1) / chunks;
}
}  // namespace

const char* name_of(Lifetime lifetime) {
    constexpr const char* names[] = {"forward_backward", "forward_weight", "backward_weight", "operation", "update"};
    return names[static_cast<int>(lifetime)];
}

Range stream_rows(const StageConfig& config) {
    const std::int64_t rows = config.batch * config.length;
    return config.gathers() ? balanced(rows, config.tp_rank, config.tp_size) : Range{0, rows};
}

Place Arena::add(const std::string& name, Lifetime lifetime, std::int64_t elements, DType dtype, std::int64_t copies) {
    const std::int64_t size = elements * static_cast<std::int64_t>(size_of(dtype)),
                       stride = aligned_bytes(elements, dtype);
    entries.push_back({name, lifetime, size, copies, bytes});
    const Place place{bytes, copies > 1 ? stride : 0};
    bytes += stride * copies;
    return place;
}

Arena::Arena(const Shape& shape, const Policy& policy, const StageConfig& config) {
    shape.validate();
    const Ops all(shape.layers);
    check(static_cast<std::int64_t>(config.recompute.size()) == shape.layers, "recompute has ", config.recompute.size(),
          " entries for ", shape.layers, " layers");
    check(config.batch >= 1 && config.length >= 1 && config.slots >= 1,
          "batch, length and slots of a stage must be at least 1");
    check(config.head_chunk >= 0, "head_chunk of a stage must be at least 1, or 0 to have it chosen");
    check(!config.gathers() || config.batch * config.length >= config.tp_size, "sequence parallelism of ",
          config.tp_size, " ranks needs as many tokens in a micro-batch, which has ", config.batch * config.length);
    check(config.gradient_shards == 0 || (config.training && !config.defer_weight),
          "gradients can follow activations only in training, and where each comes straight after its input gradient");
    check(config.length <= shape.context || !shape.learned_positions, "sequences of ", config.length,
          " tokens are longer than model.context = ", shape.context);
    for (const std::int64_t edge : {config.first_op, config.last_op}) {
        if (edge == 0 || edge == all.count()) continue;
        check(all.kind(edge) == OpKind::norm, "a stage cannot be cut before ", all.name(edge),
              ": only the residual stream passes between stages");
    }
    ops.resize(static_cast<std::size_t>(config.last_op - config.first_op));
    plan_shared(shape, policy, config);
    plan_ends(shape, policy, config);
    ends_.push_back(bytes);
    for (std::int64_t layer = 0; layer < shape.layers; ++layer) {
        plan_layer(shape, policy, config, layer);
        ends_.push_back(bytes);
    }
    if (config.gradient_shards > 0) plan_gradients(shape, policy, config);
}

// From the end down in the order in which backward writes them, each no lower than the activations of its own layer
// reach. The end is the lowest that allows it, and leaves room for the logits above all activations.
void Arena::plan_gradients(const Shape& shape, const Policy& policy, const StageConfig& config) {
    const Layout layout(shape, config.first_op, config.last_op, config.tp_rank, config.tp_size);
    const std::int64_t count = static_cast<std::int64_t>(layout.buckets().size()), activations = bytes;
    gradients.resize(layout.buckets().size());
    std::int64_t below_end = 0;
    for (std::int64_t index = count - 1; index >= 0; --index) {
        const BucketSpec& bucket = layout.buckets()[static_cast<std::size_t>(index)];
        if (!bucket.follows_backward) continue;
        const std::int64_t elements = layout.shard_elements(index, config.gradient_shards) * config.gradient_shards;
        below_end += aligned_bytes(elements, policy.gradients);
        gradients[static_cast<std::size_t>(index)].offset = below_end;
        bytes = std::max(bytes, ends_[static_cast<std::size_t>(bucket.layer + 1)] + below_end);
    }
    for (Place& place : gradients)
        if (place.offset != kNone) place.offset = bytes - place.offset;
    if (config.last_op == Ops(shape.layers).count()) {
        logits = {activations, 0};
        bytes = std::max(bytes, activations + aligned_bytes(head_chunk * Sizes(shape, config).vocabulary, DType::fp32));
    }
    entries.push_back({"gradients of layers, or logits", Lifetime::update, bytes - activations, 1, activations});
}

void Arena::plan_ends(const Shape& shape, const Policy& policy, const StageConfig& config) {
    const Sizes size(shape, config);
    const Ops all(shape.layers);
    const auto slot = [&](const char* name, std::int64_t elements, DType dtype) {
        return add(name, Lifetime::forward_backward, elements, dtype, config.slots);
    };
    tokens = slot("tokens", size.rows, DType::fp32);
    targets = slot("targets", size.rows, DType::fp32);
    positions = slot("positions", size.rows, DType::fp32);
    document_starts = slot("document_starts", size.rows, DType::fp32);
    if (config.last_op <= all.final_norm()) output = slot("output", size.stream, policy.activations);
    if (config.last_op > all.final_norm()) {
        OpPlaces& norm = ops[static_cast<std::size_t>(all.final_norm() - config.first_op)];
        norm.x = slot("final_norm.x", size.stream, policy.activations);
        norm.y = config.gathers() ? gathered : slot("final_norm.y", size.hidden, policy.activations);
        norm.mean = slot("final_norm.mean", size.stream_rows, DType::fp32);
        norm.rstd = slot("final_norm.rstd", size.stream_rows, DType::fp32);
        statistics = slot("head.statistics", config.tp_size * size.rows * kHeadStatistics, DType::fp32);
        lse = slot("head.lse", size.rows, DType::fp32);
    }
}

void Arena::plan_shared(const Shape& shape, const Policy& policy, const StageConfig& config) {
    const Sizes size(shape, config);
    const Ops all(shape.layers);
    const auto shared = [&](const char* name, std::int64_t elements, DType dtype) {
        return add(name, Lifetime::operation, elements, dtype, 1);
    };
    head_chunk = head_rows(config, policy, size.rows, size.vocabulary);
    if (config.tp_size > 1) partial = shared("partial", size.hidden, policy.activations);
    if (config.gathers()) gathered = shared("gathered", size.hidden, policy.activations);
    if (config.training) {
        dresidual = shared("dresidual", size.hidden, policy.activations);
        dnorm = shared("dnorm", size.hidden, policy.activations);
    }
    const bool has_layers = config.first_op <= 4 * shape.layers && config.last_op > 1;
    const bool has_logits = config.last_op == all.count() && config.gradient_shards == 0;
    std::int64_t most = config.training && has_layers ? plan_operation(shape, policy, config) : 0;
    if (has_logits) {
        logits = {bytes, 0};
        most = std::max(most, aligned_bytes(head_chunk * size.vocabulary, DType::fp32));
    }
    if (most > 0)
        shared(has_logits ? "logits, or gradients within an op" : "gradients within an op", most / 4, DType::fp32);
}

// Gradients that live within one op: attention's and the mlp's begin at the same place, where `bytes` stands. Returns
// the bytes that they need.
std::int64_t Arena::plan_operation(const Shape& shape, const Policy& policy, const StageConfig& config) {
    const Sizes size(shape, config);
    const DType act = policy.activations;
    std::int64_t used = 0, most = 0;
    const auto carve = [&](std::int64_t elements, DType dtype) {
        const Place place{bytes + used, 0};
        used += aligned_bytes(elements, dtype);
        most = std::max(most, used);
        return place;
    };
    if (!config.defer_weight) dqkv_ = carve(size.qkv, act);
    dout = carve(size.query, act);
    delta = carve(size.scores, DType::fp32);
    used = 0;
    if (!config.defer_weight) dup_ = carve((shape.gated ? 2 : 1) * size.ffn, act);
    // GELU's gradient is taken in place, unless it has to outlive the op.
    if (shape.gated || config.defer_weight) dactive = carve(size.ffn, act);
    return most;
}

// One piece for all layers that do not keep their own.
Place Arena::shared(const std::string& name, std::int64_t elements, DType dtype) {
    const auto found = shared_.find(name);
    if (found != shared_.end()) return found->second;
    return shared_[name] = add(name, Lifetime::operation, elements, dtype, 1);
}

void Arena::plan_layer(const Shape& shape, const Policy& policy, const StageConfig& config, std::int64_t layer) {
    const Sizes size(shape, config);
    const Ops all(shape.layers);
    const Recompute mode = config.training ? config.recompute[static_cast<std::size_t>(layer)] : Recompute::full;
    check(!(config.training && config.defer_weight && mode == Recompute::full),
          "full recompute needs each weight gradient ",
          "straight after its input gradient: choose none or selective for layer ", layer);
    const auto keep = [&](bool own, const std::string& name, Lifetime lifetime, std::int64_t elements, DType dtype) {
        if (!own) return shared(name, elements, dtype);
        return add("layer." + std::to_string(layer) + "." + name, lifetime, elements, dtype, config.slots);
    };
    const DType act = policy.activations;
    // What recomputation reads must live until the weight gradient where that is deferred.
    const Lifetime kept = config.defer_weight ? Lifetime::forward_weight : Lifetime::forward_backward;
    const bool core_own = mode == Recompute::none, most_own = mode != Recompute::full;
    const std::int64_t up_elements = (shape.gated ? 2 : 1) * size.ffn;
    for (std::int64_t op = std::max(1 + 4 * layer, config.first_op); op < std::min(5 + 4 * layer, config.last_op);
         ++op) {
        OpPlaces& places = ops[static_cast<std::size_t>(op - config.first_op)];
        const OpKind kind = all.kind(op);
        const std::string name = kind == OpKind::attention ? "attention."
                                 : kind == OpKind::mlp     ? "mlp."
                                 : all.is_second_norm(op)  ? "norm2."
                                                           : "norm1.";
        if (kind == OpKind::norm) {
            // A layer's input is what full recompute starts from; so is a stage's.
            const bool input = !all.is_second_norm(op) || op == config.first_op;
            places.x = keep(config.training && (most_own || input), name + "x", kept, size.stream, act);
            // Full recompute has both norms of a layer alive at once; else one is rebuilt at a time. Rows that have
            // to be gathered again anyway are rebuilt where they are gathered: that costs what a copy would.
            places.y = config.gathers() ? gathered : shared(most_own ? "norm.y" : name + "y", size.hidden, act);
            places.mean = keep(most_own, name + "mean", kept, size.stream_rows, DType::fp32);
            places.rstd = keep(most_own, name + "rstd", kept, size.stream_rows, DType::fp32);
            continue;
        }
        if (kind == OpKind::attention) {
            places.qkv = keep(most_own, name + "qkv", kept, size.qkv, act);
            places.out = keep(core_own, name + "out", Lifetime::forward_weight, size.query, act);
            places.lse = keep(most_own, name + "lse", kept, size.scores, DType::fp32);
            if (config.training)
                places.dqkv =
                    config.defer_weight ? keep(true, name + "dqkv", Lifetime::backward_weight, size.qkv, act) : dqkv_;
        } else {
            places.up = keep(most_own, name + "up", kept, up_elements, act);
            places.active = shared(name + "active", size.ffn, act);
            if (config.training)
                places.dup =
                    config.defer_weight ? keep(true, name + "dup", Lifetime::backward_weight, up_elements, act) : dup_;
        }
        if (config.training && config.defer_weight)
            places.dresidual = keep(true, name + "dresidual", Lifetime::backward_weight, size.stream, act);
    }
}

}  // namespace pytrain
