#include "model/decode.h"

#include <algorithm>

#include "core/check.h"
#include "model/stage.h"

namespace pytrain {

Decoder::Decoder(Device& device, const Shape& shape, const Policy& policy, const DecoderConfig& config)
    : device_(device),
      shape_(shape),
      policy_(policy),
      config_(config),
      ops_(shape.layers),
      parameters_(shape, policy, 0, Ops(shape.layers).count(), config.tp_rank, config.tp_size),
      heads_(head_range(shape, config.tp_rank, config.tp_size)),
      ffn_(balanced(shape.ffn, config.tp_rank, config.tp_size)),
      vocabulary_(balanced(shape.vocabulary, config.tp_rank, config.tp_size)) {
    check(config.batch >= 1 && config.capacity >= 1 && config.chunk >= 1,
          "batch, capacity and chunk of a decoder must be at least 1");
    check(!shape.learned_positions || config.capacity <= shape.context, "a cache of ", config.capacity,
          " tokens is longer than model.context = ", shape.context, ", which learned positions cannot exceed");
    const std::int64_t rows = config.batch * config.chunk, kv = heads_.kv_heads.size() * shape.head_size,
                       query = heads_.heads.size() * shape.head_size;
    const DType act = policy.activations;
    device_.reserve(rows, std::max({shape.hidden, query + 2 * kv, 2 * shape.ffn, vocabulary_.size()}), shape.head_size);
    const auto activation = [&](std::int64_t width, DType dtype) {
        return allocate(rows * width, dtype, MemoryKind::activations);
    };
    x_first_ = activation(shape.hidden, act), x_second_ = activation(shape.hidden, act),
    y_ = activation(shape.hidden, act);
    qkv_ = activation(query + 2 * kv, act), out_ = activation(query, act), active_ = activation(ffn_.size(), act);
    up_ = activation((shape.gated ? 2 : 1) * ffn_.size(), act);
    if (config.tp_size > 1) partial_ = activation(shape.hidden, act);
    logits_ = activation(vocabulary_.size(), DType::fp32);
    mean_ = static_cast<float*>(activation(1, DType::fp32).data),
    rstd_ = static_cast<float*>(activation(1, DType::fp32).data);
    tokens_ = static_cast<std::int32_t*>(activation(1, DType::fp32).data),
    positions_ = static_cast<std::int32_t*>(activation(1, DType::fp32).data);
    for (std::int64_t layer = 0; layer < shape.layers; ++layer) {
        keys_.push_back(allocate(config.batch * config.capacity * kv, act, MemoryKind::activations));
        values_.push_back(allocate(config.batch * config.capacity * kv, act, MemoryKind::activations));
    }
    if (shape.learned_positions) return;
    const std::vector<float> table = rope_table(shape, config.capacity);
    rope_table_ =
        static_cast<float*>(allocate(static_cast<std::int64_t>(table.size()), DType::fp32, MemoryKind::workspace).data);
    device_.copy(rope_table_, table.data(), table.size() * sizeof(float), device_.compute_queue());
}

Decoder::~Decoder() {
    for (void* const pointer : owned_) device_.release(pointer);
}

Tensor Decoder::allocate(std::int64_t elements, DType dtype, MemoryKind kind) {
    owned_.push_back(device_.allocate(static_cast<std::size_t>(elements) * size_of(dtype), kind));
    return {owned_.back(), dtype};
}

void Decoder::feed(const std::int32_t* tokens, std::int64_t count) {
    check(count >= 1 && count <= config_.chunk, "a call feeds 1..", config_.chunk, " tokens, not ", count);
    check(length_ + count <= config_.capacity, "the cache holds ", config_.capacity, " tokens, ", length_,
          " are there, and ", count, " more were fed");
    count_ = count;
    std::vector<std::int32_t> positions;
    for (std::int64_t row = 0; row < rows(); ++row) {
        check(tokens[row] >= 0 && tokens[row] < shape_.vocabulary, "token ", tokens[row],
              " is outside the vocabulary of ", shape_.vocabulary);
        positions.push_back(static_cast<std::int32_t>(length_ + row % count));
    }
    const std::size_t bytes = static_cast<std::size_t>(rows()) * sizeof(std::int32_t);
    device_.copy(tokens_, tokens, bytes, device_.compute_queue());
    device_.copy(positions_, positions.data(), bytes, device_.compute_queue());
}

void Decoder::finish() {
    length_ += count_;
    count_ = 0;
}

void Decoder::rewind(std::int64_t length) {
    check(length >= 0 && length <= length_, "cannot rewind ", length_, " cached tokens to ", length);
    length_ = length;
}

void Decoder::forward(std::int64_t begin, std::int64_t end) {
    check(begin >= 0 && end <= op_count(), "ops ", begin, "..", end, " are outside the decoder's 0..", op_count());
    for (std::int64_t op = begin; op < end; ++op) {
        switch (ops_.kind(op)) {
            case OpKind::embed: {
                const bool with_positions = shape_.learned_positions && config_.tp_rank == 0;
                const Embed args{rows(), shape_.hidden, vocabulary_.begin, vocabulary_.end, tokens_, positions_};
                device_.embed_forward(args, partial_ ? partial_ : x_first_,
                                      parameters_.weight(parameters_.op(0).weight),
                                      with_positions ? parameters_.weight(parameters_.op(0).out_weight) : Tensor{},
                                      device_.compute_queue());
                break;
            }
            case OpKind::norm:
                norm(op);
                break;
            case OpKind::attention:
                attention(op);
                break;
            case OpKind::mlp:
                mlp(op);
                break;
            case OpKind::head:
            case OpKind::loss:
                break;  // not in the range
        }
    }
}

void Decoder::norm(std::int64_t op) {
    if (partial_) complete_stream(op);
    const OpParameters& tensors = parameters_.op(op);
    const Norm args{shape_.norm,
                    rows(),
                    shape_.hidden,
                    shape_.norm_eps,
                    x_of(op),
                    parameters_.weight(tensors.weight),
                    parameters_.weight(tensors.bias),
                    mean_,
                    rstd_};
    device_.norm_forward(args, y_, device_.compute_queue());
}

void Decoder::complete_stream(std::int64_t op) {
    const std::size_t bytes = static_cast<std::size_t>(rows() * shape_.hidden) * size_of(policy_.activations);
    if (op == 1) return device_.copy(x_first_.data, partial_.data, bytes, device_.compute_queue());
    device_.copy(x_of(op).data, x_of(op - 2).data, bytes, device_.compute_queue());
    device_.residual_add(x_of(op), partial_, parameters_.weight(parameters_.op(op - 1).out_bias), rows(), shape_.hidden,
                         device_.compute_queue());
}

void Decoder::stream(std::int64_t op, Tensor x) {
    const Product product = parameters_.second_product(op);
    if (partial_) return row_forward(device_, parameters_, product, rows(), partial_, x, {{}, false});
    row_forward(device_, parameters_, product, rows(), x_of(op + 1), x, {x_of(op - 1), true});
}

void Decoder::attention(std::int64_t op) {
    const std::int64_t size = shape_.head_size, heads = heads_.heads.size(), kv_heads = heads_.kv_heads.size(),
                       kv = kv_heads * size;
    const Product product = parameters_.first_product(op);
    column_forward(device_, parameters_, product, rows(), qkv_, y_, {});
    if (!shape_.learned_positions)
        device_.rope(qkv_, rows(), product.out, heads + kv_heads, size, positions_, rope_table_, false,
                     device_.compute_queue());
    const std::size_t layer = static_cast<std::size_t>(ops_.layer(op)),
                      bytes = static_cast<std::size_t>(kv) * size_of(policy_.activations);
    for (std::int64_t row = 0; row < rows(); ++row) {
        const std::int64_t cached = (row / count_) * config_.capacity + length_ + row % count_;
        device_.copy(keys_[layer].at(cached * kv).data, qkv_.at(row * product.out + heads * size).data, bytes,
                     device_.compute_queue());
        device_.copy(values_[layer].at(cached * kv).data, qkv_.at(row * product.out + heads * size + kv).data, bytes,
                     device_.compute_queue());
    }
    Attention args{};
    args.batch = config_.batch, args.heads = heads, args.kv_heads = kv_heads, args.head_size = size;
    args.query_rows = count_, args.key_rows = length_ + count_, args.query_offset = length_;
    args.q = qkv_, args.k = keys_[layer], args.v = values_[layer];
    args.q_stride = product.out, args.kv_stride = kv;
    args.q_batch_stride = product.out * count_, args.kv_batch_stride = config_.capacity * kv;
    args.out = out_;
    device_.attention_forward(args, device_.compute_queue());
    stream(op, out_);
}

void Decoder::mlp(std::int64_t op) {
    column_forward(device_, parameters_, parameters_.first_product(op), rows(), up_, y_,
                   shape_.gated ? Tensor{} : active_);
    if (shape_.gated) device_.swiglu_forward(active_, up_, rows(), ffn_.size(), device_.compute_queue());
    stream(op, active_);
}

const float* Decoder::logits() {
    const Product product{shape_.hidden, vocabulary_.size(), parameters_.op(ops_.head()).weight, -1};
    column_forward(device_, parameters_, product, rows(), logits_, y_, {});
    return static_cast<const float*>(logits_.data);
}

}  // namespace pytrain
