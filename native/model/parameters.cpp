#include "model/parameters.h"

#include "core/check.h"

namespace pytrain {

namespace {
OpParameters resolve(const Layout& layout, const Shape& shape, std::int64_t op) {
    const Ops ops(shape.layers);
    const std::string layer = "layer." + std::to_string(ops.layer(op));
    const auto find = [&](const std::string& name) { return layout.find(name); };
    switch (ops.kind(op)) {
        case OpKind::embed:
            return {find("embed.tokens"), -1, find("embed.positions"), -1};
        case OpKind::norm: {
            const std::string name =
                op == ops.final_norm() ? "final_norm" : layer + (ops.is_second_norm(op) ? ".norm2" : ".norm1");
            return {find(name + ".weight"), find(name + ".bias"), -1, -1};
        }
        case OpKind::attention: {
            const std::string name = layer + ".attention";
            return {find(name + ".q.weight"), find(name + ".q.bias"), find(name + ".out.weight"),
                    find(name + ".out.bias")};
        }
        case OpKind::mlp: {
            const std::string name = layer + ".mlp", first = name + (shape.gated ? ".gate" : ".up");
            return {find(first + ".weight"), find(first + ".bias"), find(name + ".down.weight"),
                    find(name + ".down.bias")};
        }
        case OpKind::head:
            return {find(shape.tied_head ? "embed.tokens" : "head.weight"), -1, -1, -1};
        case OpKind::loss:
            break;
    }
    return {};
}
}  // namespace

Parameters::Parameters(const Shape& shape, const Policy& policy, std::int64_t first_op, std::int64_t last_op,
                       std::int64_t tp_rank, std::int64_t tp_size)
    : all_(shape.layers),
      gated_(shape.gated),
      hidden_(shape.hidden),
      policy_(policy),
      first_op_(first_op),
      layout_(shape, first_op, last_op, tp_rank, tp_size),
      weights_(layout_.buckets().size(), nullptr),
      gradients_(layout_.buckets().size(), nullptr),
      stale_(layout_.tensors().size(), false) {
    for (std::int64_t op = first_op; op < last_op; ++op) ops_.push_back(resolve(layout_, shape, op));
}

std::int64_t Parameters::rows(std::int64_t tensor, std::int64_t count) const {
    std::int64_t total = 0;
    for (std::int64_t i = tensor; i < tensor + count; ++i)
        total += layout_.tensors()[static_cast<std::size_t>(i)].rows.size();
    return total;
}

Product Parameters::first_product(std::int64_t index) const {
    const std::int64_t fused = all_.kind(index) == OpKind::attention ? 3 : gated_ ? 2 : 1;
    return {hidden_, rows(op(index).weight, fused), op(index).weight, op(index).bias};
}

Product Parameters::second_product(std::int64_t index) const {
    return {rows(op(index).out_weight, 1), hidden_, op(index).out_weight, op(index).out_bias};
}

void Parameters::bind_weights(std::int64_t bucket, void* data) { weights_.at(static_cast<std::size_t>(bucket)) = data; }
void Parameters::bind_gradients(std::int64_t bucket, void* data) {
    gradients_.at(static_cast<std::size_t>(bucket)) = data;
}

void Parameters::overwrite_gradients(Device* device) {
    device_ = device;
    stale_.assign(layout_.tensors().size(), true);
}

Tensor Parameters::gradient(std::int64_t tensor, std::int64_t elements) const {
    bool accumulate = false;
    const Tensor found = gradient(tensor, &accumulate);
    if (found && !accumulate) {
        if (elements == 0) elements = layout_.tensors()[static_cast<std::size_t>(tensor)].elements();
        device_->zero(found.data, static_cast<std::size_t>(elements) * size_of(found.dtype), device_->compute_queue());
    }
    return found;
}

Tensor Parameters::gradient(std::int64_t tensor, bool* accumulate) const {
    const Tensor found = find(gradients_, tensor, policy_.gradients, "gradients");
    if (!found) return found;
    const auto index = static_cast<std::size_t>(tensor);
    *accumulate = !stale_[index];
    stale_[index] = false;
    return found;
}

Tensor Parameters::find(const std::vector<void*>& bound, std::int64_t tensor, DType dtype, const char* what) const {
    if (tensor < 0) return {};
    const TensorSpec& spec = layout_.tensors()[static_cast<std::size_t>(tensor)];
    void* const data = bound[static_cast<std::size_t>(spec.bucket)];
    check(data != nullptr, "the ", what, " of bucket ", layout_.buckets()[static_cast<std::size_t>(spec.bucket)].name,
          " are not bound, and ", spec.name, " is needed");
    return Tensor{data, dtype}.at(spec.offset);
}

}  // namespace pytrain
