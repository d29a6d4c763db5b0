// The shape of a model, and the straight list of ops it is made of.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "device.h"

namespace pytrain {

struct Shape {
    std::int64_t layers, hidden, heads, kv_heads, head_size, ffn, vocabulary, context;
    NormKind norm;           // layernorm has biases of its own
    bool bias;               // on q, k, v, out, up, down
    bool learned_positions;  // else RoPE with the frequencies below
    bool gated;              // SwiGLU, else GELU
    bool tied_head;          // the head multiplies with embed.tokens
    float norm_eps;
    std::vector<double> rope_frequencies;  // (head_size/2) radians per position; empty with learned positions

    void validate() const;  // throws on a shape that cannot be
};

// embed, (norm, attention, norm, mlp) x layers, norm, head, loss
enum class OpKind : std::uint8_t { embed, norm, attention, mlp, head, loss };

class Ops {
public:
    explicit Ops(std::int64_t layers) : layers_(layers) {}
    std::int64_t count() const { return 4 * layers_ + 4; }
    OpKind kind(std::int64_t op) const;
    // The layer an op belongs to; `layers` for the last norm, head and loss, -1 for embed.
    std::int64_t layer(std::int64_t op) const { return op == 0 ? -1 : op > 4 * layers_ ? layers_ : (op - 1) / 4; }
    bool is_second_norm(std::int64_t op) const { return op >= 1 && op <= 4 * layers_ && (op - 1) % 4 == 2; }
    std::int64_t final_norm() const { return 4 * layers_ + 1; }
    std::int64_t head() const { return 4 * layers_ + 2; }
    std::int64_t loss() const { return 4 * layers_ + 3; }
    std::string name(std::int64_t op) const;

private:
    std::int64_t layers_;
};

}  // namespace pytrain
