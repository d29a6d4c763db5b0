// THE parameter table: which tensors a range of ops holds on one tensor-parallel rank, and where.
//
// Parameters lie in buckets ("embed", one per layer, "head"); a bucket is one flat range, the unit of gradient
// reduction, of ZeRO and of a checkpoint file; a large one travels in parts. Every tensor's first dimension is the one
// that tensor parallelism cuts, so this rank's part of a tensor is rows [begin, end) of the global one: one byte range
// on disk, one in the flat range. q, k, v (and gate, up) are adjacent, so that a fused product sees one matrix.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "model/shape.h"

namespace pytrain {

// Balanced cut of n things in `parts`: part r is [n*r/parts, n*(r+1)/parts).
struct Range {
    std::int64_t begin, end;
    std::int64_t size() const { return end - begin; }
};
Range balanced(std::int64_t n, std::int64_t part, std::int64_t parts);

// This rank's heads. Cut at KV groups; with more ranks than KV heads, neighbouring ranks share (replicate) one KV head.
struct HeadRange {
    Range heads, kv_heads;
    Range sharing_ranks;  // the tp ranks that hold the same kv_heads (just this one, unless shared)
};
HeadRange head_range(const Shape&, std::int64_t tp_rank, std::int64_t tp_size);

struct TensorSpec {
    std::string name;
    std::int64_t bucket;                  // index into Layout::buckets()
    std::int64_t op;                      // whose backward adds to its gradient last: its own, of a tied one the first
    std::vector<std::int64_t> shape;      // global
    Range rows;                           // of dimension 0, on this rank
    std::int64_t offset;                  // elements from the start of the bucket
    bool replicated;                      // every tp rank holds the whole of it
    bool partial_with_sequence_parallel;  // its gradient is then summed over tp: norms, row-parallel biases, positions
    Range sharing_ranks;    // tp ranks that hold these very rows; their gradients are summed where each saw other heads
    bool sum_over_sharing;  // true for k and v of a replicated KV head
    bool tied_copy;         // the last stage's copy of embed.tokens: gradient summed with the first stage's
    bool owner;             // counts in the gradient norm and writes to disk here
    bool decay;             // weight decay applies (matrices and embeddings)
    enum class Init : std::uint8_t { normal, residual, ones, zeros } init;  // residual: normal / sqrt(2 layers)

    std::int64_t row_elements() const { return shape.size() == 2 ? shape[1] : 1; }
    std::int64_t elements() const { return rows.size() * row_elements(); }
    // Elements [first, first + elements()) of the global tensor, flat.
    std::int64_t first_element() const { return rows.begin * row_elements(); }
};

struct BucketSpec {
    std::string name;    // "embed", "layer_007", "head"
    std::int64_t layer;  // as Ops::layer: -1 for embed, `layers` for head
    // Its gradients are written by the backward of its own ops alone, in the order of backward: not so where the head,
    // which takes its gradients while it has logits, has a part in them.
    bool follows_backward;
    std::int64_t first_tensor, tensor_count;
    std::int64_t elements;  // of the flat range, alignment gaps included
};

// A part of one tensor inside a ZeRO shard.
struct Piece {
    std::int64_t tensor;        // index into Layout::tensors()
    std::int64_t begin, end;    // elements of this rank's part of the tensor
    std::int64_t shard_offset;  // elements from the start of the shard
};

class Layout {
public:
    // Holds what ops [first_op, last_op) need.
    Layout(const Shape&, std::int64_t first_op, std::int64_t last_op, std::int64_t tp_rank, std::int64_t tp_size);

    const std::vector<TensorSpec>& tensors() const { return tensors_; }
    const std::vector<BucketSpec>& buckets() const { return buckets_; }
    std::int64_t find(const std::string& name) const;  // index, or -1
    std::int64_t elements() const;                     // of all buckets

    // ZeRO: a shard of a bucket has ceil(elements / shards) elements.
    std::int64_t shard_elements(std::int64_t bucket, std::int64_t shards) const;
    // Where the parts begin that a bucket travels in, and where the last one ends: `shards` shards from the start. As
    // few parts as have at most `limit` elements, of nearly equal size, and each of whole groups of elements for every
    // shard; one part where the limit is 0. Shard r of a part is its r-th piece of shards that are equal.
    std::vector<std::int64_t> parts(std::int64_t bucket, std::int64_t shards, std::int64_t limit) const;
    // What shard r of a bucket holds: its shard of the first part, then of the next. One shard is the bucket itself.
    std::vector<Piece> pieces(std::int64_t bucket, std::int64_t shard, std::int64_t shards,
                              std::int64_t limit = 0) const;

private:
    struct Add;  // builds the table
    std::vector<TensorSpec> tensors_;
    std::vector<BucketSpec> buckets_;
};

}  // namespace pytrain
