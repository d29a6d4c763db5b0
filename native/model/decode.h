// Generation: the same ops over a cache of keys and values, forward only. Batches hold sequences of equal length.
//
// Cuts are those of Stage: with tp_size > 1 sum `partial` after embed, attention and mlp. The logits of the last rows
// are this rank's vocabulary slice.
#pragma once
#include <cstdint>
#include <vector>

#include "device.h"
#include "model/parameters.h"

namespace pytrain {

struct DecoderConfig {
    std::int64_t tp_rank = 0, tp_size = 1;
    std::int64_t batch = 1;
    std::int64_t capacity;     // tokens that the cache holds
    std::int64_t chunk = 128;  // most tokens of a sequence in one call
};

class Decoder {
public:
    Decoder(Device&, const Shape&, const Policy&, const DecoderConfig&);
    ~Decoder();
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    Parameters& parameters() { return parameters_; }
    Device& device() { return device_; }
    const DecoderConfig& config() const { return config_; }
    std::int64_t length() const { return length_; }
    std::int64_t hidden() const { return shape_.hidden; }
    std::int64_t op_count() const { return ops_.head(); }
    Range vocabulary() const { return vocabulary_; }

    // Starts a call on `count` further tokens of every sequence: tokens (batch, count), host memory.
    void feed(const std::int32_t* tokens, std::int64_t count);
    void forward(std::int64_t begin, std::int64_t end);  // ops [begin, end) up to the final norm
    // Logits (batch * count, vocabulary slice) fp32 of the rows just fed, in memory that the next feed reuses.
    const float* logits();
    void finish();                     // the fed tokens are part of the past now
    void rewind(std::int64_t length);  // forgets all but the first `length` tokens
    Tensor partial() const { return partial_; }
    std::int64_t rows() const { return config_.batch * count_; }

private:
    void attention(std::int64_t op);
    void mlp(std::int64_t op);
    void norm(std::int64_t op);
    void complete_stream(std::int64_t op);
    void stream(std::int64_t op, Tensor x);  // the second product of attention or mlp
    Tensor allocate(std::int64_t elements, DType dtype, MemoryKind kind);
    Tensor x_of(std::int64_t op) const { return ops_.is_second_norm(op) ? x_second_ : x_first_; }  // of a norm

    Device& device_;
    Shape shape_;
    Policy policy_;
    DecoderConfig config_;
    Ops ops_;
    Parameters parameters_;
    HeadRange heads_;
    Range ffn_, vocabulary_;
    std::int64_t length_ = 0, count_ = 0;
    std::vector<void*> owned_;
    Tensor x_first_, x_second_, y_, qkv_, out_, up_, active_, partial_, logits_;
    float *mean_ = nullptr, *rstd_ = nullptr, *rope_table_ = nullptr;
    std::int32_t *tokens_ = nullptr, *positions_ = nullptr;
    std::vector<Tensor> keys_, values_;  // per layer (batch, capacity, kv_heads * head_size)
};

}  // namespace pytrain
