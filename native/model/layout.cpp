#include "model/layout.h"

#include <algorithm>
#include <cstdio>

#include "core/check.h"

namespace pytrain {

namespace {
// Groups of tensors start on 64 bytes in every storage type, so that vector loads of the first row do not straddle
// lines.
constexpr std::int64_t kGroupAlignment = 32;

std::int64_t round_up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }
}  // namespace

Range balanced(std::int64_t n, std::int64_t part, std::int64_t parts) {
    return {n * part / parts, n * (part + 1) / parts};
}

HeadRange head_range(const Shape& shape, std::int64_t tp_rank, std::int64_t tp_size) {
    const std::int64_t group = shape.heads / shape.kv_heads;
    if (tp_size <= shape.kv_heads) {
        const Range kv = balanced(shape.kv_heads, tp_rank, tp_size);
        return {{kv.begin * group, kv.end * group}, kv, {tp_rank, tp_rank + 1}};
    }
    for (std::int64_t kv = 0; kv < shape.kv_heads; ++kv) {
        const Range ranks = balanced(tp_size, kv, shape.kv_heads);
        if (tp_rank < ranks.begin || tp_rank >= ranks.end) continue;
        check(ranks.size() <= group, "tp = " + std::to_string(tp_size) +
                                         " leaves ranks without an attention head: model.heads is " +
                                         std::to_string(shape.heads));
        const Range part = balanced(group, tp_rank - ranks.begin, ranks.size());
        return {{kv * group + part.begin, kv * group + part.end}, {kv, kv + 1}, ranks};
    }
    throw Error("tensor-parallel rank " + std::to_string(tp_rank) + " is outside tp = " + std::to_string(tp_size));
}

// Appends tensors to the bucket being built. One call to `group` starts a run of adjacent tensors.
struct Layout::Add {
    Layout& layout;
    const Shape& shape;
    std::int64_t tp_rank, tp_size;
    std::int64_t op = 0;  // whose tensors are appended
    using Init = TensorSpec::Init;

    void bucket(const std::string& name, std::int64_t layer, bool follows_backward) {
        layout.buckets_.push_back(
            {name, layer, follows_backward, static_cast<std::int64_t>(layout.tensors_.size()), 0, 0});
    }
    Add& of(std::int64_t number) {
        op = number;
        return *this;
    }
    void group() { layout.buckets_.back().elements = round_up(layout.buckets_.back().elements, kGroupAlignment); }

    TensorSpec& append(const std::string& name, std::vector<std::int64_t> global, Range rows, Init init) {
        BucketSpec& bucket = layout.buckets_.back();
        TensorSpec spec{};
        spec.name = name;
        spec.bucket = static_cast<std::int64_t>(layout.buckets_.size()) - 1;
        spec.op = op;
        spec.shape = std::move(global);
        spec.rows = rows;
        spec.offset = bucket.elements;
        spec.sharing_ranks = {tp_rank, tp_rank + 1};
        spec.owner = true;
        spec.decay = spec.shape.size() == 2;
        spec.init = init;
        bucket.elements += spec.elements();
        ++bucket.tensor_count;
        layout.tensors_.push_back(std::move(spec));
        return layout.tensors_.back();
    }
    void replicated(const std::string& name, std::vector<std::int64_t> global, Init init) {
        group();
        const std::int64_t rows = global[0];
        TensorSpec& spec = append(name, std::move(global), {0, rows}, init);
        spec.replicated = true;
        spec.partial_with_sequence_parallel = true;
        spec.sharing_ranks = {0, tp_size};
        spec.owner = tp_rank == 0;
    }
    void vocabulary(const std::string& name, bool tied_copy) {
        group();
        TensorSpec& spec =
            append(name, {shape.vocabulary, shape.hidden}, balanced(shape.vocabulary, tp_rank, tp_size), Init::normal);
        spec.tied_copy = tied_copy;
        spec.owner = !tied_copy;
    }
    void norm(const std::string& name) {
        replicated(name + ".weight", {shape.hidden}, Init::ones);
        if (shape.norm == NormKind::layernorm) replicated(name + ".bias", {shape.hidden}, Init::zeros);
    }
    void heads_tensor(const std::string& name, const HeadRange& part, bool key_value, bool bias) {
        const std::int64_t size = shape.head_size, count = key_value ? shape.kv_heads : shape.heads;
        const Range heads = key_value ? part.kv_heads : part.heads;
        std::vector<std::int64_t> global =
            bias ? std::vector<std::int64_t>{count * size} : std::vector<std::int64_t>{count * size, shape.hidden};
        TensorSpec& spec =
            append(name, std::move(global), {heads.begin * size, heads.end * size}, bias ? Init::zeros : Init::normal);
        if (key_value && part.sharing_ranks.size() > 1) {
            spec.sharing_ranks = part.sharing_ranks;
            spec.sum_over_sharing = true;
            spec.owner = tp_rank == part.sharing_ranks.begin;
        }
    }
    void attention(const std::string& name) {
        const HeadRange part = head_range(shape, tp_rank, tp_size);
        const char* names[] = {".q", ".k", ".v"};
        group();
        for (int i = 0; i < 3; ++i) heads_tensor(name + names[i] + ".weight", part, i > 0, false);
        if (shape.bias) {
            group();
            for (int i = 0; i < 3; ++i) heads_tensor(name + names[i] + ".bias", part, i > 0, true);
        }
        group();
        append(name + ".out.weight", {shape.heads * shape.head_size, shape.hidden},
               {part.heads.begin * shape.head_size, part.heads.end * shape.head_size}, Init::residual);
        if (shape.bias) replicated(name + ".out.bias", {shape.hidden}, Init::zeros);
    }
    void mlp(const std::string& name) {
        const Range part = balanced(shape.ffn, tp_rank, tp_size);
        group();
        if (shape.gated) append(name + ".gate.weight", {shape.ffn, shape.hidden}, part, Init::normal);
        append(name + ".up.weight", {shape.ffn, shape.hidden}, part, Init::normal);
        if (shape.bias) {
            group();
            if (shape.gated) append(name + ".gate.bias", {shape.ffn}, part, Init::zeros);
            append(name + ".up.bias", {shape.ffn}, part, Init::zeros);
        }
        group();
        append(name + ".down.weight", {shape.ffn, shape.hidden}, part, Init::residual);
        if (shape.bias) replicated(name + ".down.bias", {shape.hidden}, Init::zeros);
    }
};

Layout::Layout(const Shape& shape, std::int64_t first_op, std::int64_t last_op, std::int64_t tp_rank,
               std::int64_t tp_size) {
    shape.validate();
    check(tp_size >= 1 && tp_rank >= 0 && tp_rank < tp_size,
          "tensor-parallel rank " + std::to_string(tp_rank) + " is outside tp = " + std::to_string(tp_size));
    const Ops ops(shape.layers);
    check(first_op >= 0 && first_op < last_op && last_op <= ops.count(),
          "a stage of ops " + std::to_string(first_op) + ".." + std::to_string(last_op) + " is outside the model's " +
              std::to_string(ops.count()));
    Add add{*this, shape, tp_rank, tp_size};
    const auto holds = [&](std::int64_t op) { return op >= first_op && op < last_op; };
    if (holds(0)) {
        add.bucket("embed", -1, !(shape.tied_head && holds(ops.head())));
        add.vocabulary("embed.tokens", false);
        if (shape.learned_positions)
            add.replicated("embed.positions", {shape.context, shape.hidden}, TensorSpec::Init::normal);
    }
    for (std::int64_t layer = 0; layer < shape.layers; ++layer) {
        const std::int64_t op = 1 + 4 * layer;
        if (last_op <= op || first_op >= op + 4) continue;
        char name[32];
        std::snprintf(name, sizeof name, "layer_%03lld", static_cast<long long>(layer));
        add.bucket(name, layer, true);
        const std::string prefix = "layer." + std::to_string(layer);
        if (holds(op)) add.of(op).norm(prefix + ".norm1");
        if (holds(op + 1)) add.of(op + 1).attention(prefix + ".attention");
        if (holds(op + 2)) add.of(op + 2).norm(prefix + ".norm2");
        if (holds(op + 3)) add.of(op + 3).mlp(prefix + ".mlp");
    }
    if (holds(ops.final_norm()) || holds(ops.head())) {
        add.bucket("head", shape.layers, false);
        if (holds(ops.final_norm())) add.of(ops.final_norm()).norm("final_norm");
        add.of(ops.head());
        if (holds(ops.head()) && !shape.tied_head) add.vocabulary("head.weight", false);
        if (holds(ops.head()) && shape.tied_head && !holds(0)) add.vocabulary("embed.tokens", true);
    }
}

std::int64_t Layout::find(const std::string& name) const {
    for (std::size_t i = 0; i < tensors_.size(); ++i)
        if (tensors_[i].name == name) return static_cast<std::int64_t>(i);
    return -1;
}

std::int64_t Layout::elements() const {
    std::int64_t total = 0;
    for (const BucketSpec& bucket : buckets_) total += bucket.elements;
    return total;
}

std::int64_t Layout::shard_elements(std::int64_t bucket, std::int64_t shards) const {
    check(shards >= 1, "a bucket is cut in at least one shard");
    return (buckets_.at(static_cast<std::size_t>(bucket)).elements + shards - 1) / shards;
}

std::vector<std::int64_t> Layout::parts(std::int64_t bucket, std::int64_t shards, std::int64_t limit) const {
    check(limit >= 0, "a part of a bucket has no negative number of elements");
    const std::int64_t end = shard_elements(bucket, shards) * shards, unit = shards * kGroupAlignment;
    std::vector<std::int64_t> bounds{0};
    if (limit > 0 && end > limit) {
        const std::int64_t units = (end + unit - 1) / unit, most = std::max<std::int64_t>(1, limit / unit);
        const std::int64_t count = (units + most - 1) / most, step = (units + count - 1) / count * unit;
        for (std::int64_t begin = step; begin < end; begin += step) bounds.push_back(begin);
    }
    bounds.push_back(end);
    return bounds;
}

std::vector<Piece> Layout::pieces(std::int64_t bucket, std::int64_t shard, std::int64_t shards,
                                  std::int64_t limit) const {
    const BucketSpec& spec = buckets_.at(static_cast<std::size_t>(bucket));
    const std::vector<std::int64_t> bounds = parts(bucket, shards, shards == 1 ? 0 : limit);
    std::vector<Piece> pieces;
    for (std::size_t part = 1; part < bounds.size(); ++part) {
        const std::int64_t size = (bounds[part] - bounds[part - 1]) / shards;
        const std::int64_t begin = bounds[part - 1] + shard * size, end = begin + size;
        const std::int64_t in_shard = bounds[part - 1] / shards - begin;  // plus a place in the bucket
        for (std::int64_t i = spec.first_tensor; i < spec.first_tensor + spec.tensor_count; ++i) {
            const TensorSpec& tensor = tensors_[static_cast<std::size_t>(i)];
            const std::int64_t from = std::max(begin, tensor.offset);
            const std::int64_t to = std::min(end, tensor.offset + tensor.elements());
            if (from < to) pieces.push_back({i, from - tensor.offset, to - tensor.offset, in_shard + from});
        }
    }
    return pieces;
}

}  // namespace pytrain
