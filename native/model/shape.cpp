#include "model/shape.h"

#include "core/check.h"

namespace pytrain {

void Shape::validate() const {
    const struct {
        const char* name;
        std::int64_t value;
    } sizes[] = {{"layers", layers},       {"hidden", hidden}, {"heads", heads},           {"kv_heads", kv_heads},
                 {"head_size", head_size}, {"ffn", ffn},       {"vocabulary", vocabulary}, {"context", context}};
    for (const auto& size : sizes)
        check(size.value >= 1,
              std::string("model.") + size.name + " must be at least 1, not " + std::to_string(size.value));
    check(heads % kv_heads == 0, "model.heads (" + std::to_string(heads) + ") must be a multiple of model.kv_heads (" +
                                     std::to_string(kv_heads) + ")");
    if (learned_positions) {
        check(rope_frequencies.empty(), "a model with learned positions takes no RoPE frequencies");
    } else {
        check(head_size % 2 == 0, "RoPE needs an even model.head_size, not " + std::to_string(head_size));
        check(static_cast<std::int64_t>(rope_frequencies.size()) == head_size / 2,
              "RoPE needs head_size/2 = " + std::to_string(head_size / 2) + " frequencies, not " +
                  std::to_string(rope_frequencies.size()));
    }
}

OpKind Ops::kind(std::int64_t op) const {
    check(op >= 0 && op < count(),
          "op " + std::to_string(op) + " is outside the model's 0.." + std::to_string(count() - 1));
    if (op == 0) return OpKind::embed;
    if (op == head()) return OpKind::head;
    if (op == loss()) return OpKind::loss;
    if (op == final_norm()) return OpKind::norm;
    constexpr OpKind layer_ops[] = {OpKind::norm, OpKind::attention, OpKind::norm, OpKind::mlp};
    return layer_ops[(op - 1) % 4];
}

std::string Ops::name(std::int64_t op) const {
    switch (kind(op)) {
        case OpKind::embed:
            return "embed";
        case OpKind::head:
            return "head";
        case OpKind::loss:
            return "loss";
        case OpKind::attention:
            return "layer " + std::to_string(layer(op)) + " attention";
        case OpKind::mlp:
            return "layer " + std::to_string(layer(op)) + " mlp";
        case OpKind::norm:
            break;
    }
    if (op == final_norm()) return "final norm";
    return "layer " + std::to_string(layer(op)) + (is_second_norm(op) ? " norm2" : " norm1");
}

}  // namespace pytrain
