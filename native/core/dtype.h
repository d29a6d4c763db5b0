// Storage types and the policy that assigns them. Arithmetic is fp32 everywhere; bf16 and fp16 are ways to store.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pytrain {

enum class DType : std::uint8_t { fp32 = 0, bf16 = 1, fp16 = 2 };
constexpr int kDTypes = 3;

constexpr std::size_t size_of(DType dtype) { return dtype == DType::fp32 ? 4 : 2; }
const char* name_of(DType dtype);

// What every op and the arena take: which type each kind of tensor is stored in.
struct Policy {
    DType weights = DType::fp32;
    DType activations = DType::fp32;
    DType gradients = DType::fp32;           // accumulated weight gradients
    DType gradient_reduction = DType::fp32;  // on the wire, between data-parallel ranks
    DType master = DType::fp32;              // what AdamW updates; the same buffer as weights if both are fp32
};

}  // namespace pytrain
