// Activation memory of a stage: one allocation, planned before step 0 and never grown.
//
// Five lifetimes. With W straight after B, what lives from B to W is one op deep and shared by all ops; with deferred
// weight gradients (zero-bubble) it is kept for every micro-batch in flight.
//   forward_backward  F -> B, one per micro-batch in flight and op     (residual stream, q k v, pre-activations)
//   forward_weight    F -> W, the inputs of weight products            (attention output)
//   backward_weight   B -> W, gradients of the products' outputs
//   operation         within one op
//   update            W -> the optimizer's update: gradients of weights, beyond the activations that they follow
// The outputs of norms and activations are in `operation` whatever the policy: a weight product that needs them finds
// them made again, in one pass over memory, or by the pass that takes the activation's gradient. A recompute policy
// moves more there. What such a pass reads is kept until the weight product. Under sequence parallelism what a norm
// reads is as long as this rank's part of the rows, and what is gathered from all ranks lives in `operation`.
//
// Where a step has one micro-batch, backward leaves a layer's activations for good when it has taken the layer's
// gradients: those of the layer before it then lie there, from the end of the arena down (`gradients`). The logits,
// which forward needs while no gradient of a layer exists, lie at the end too; else they share with what backward needs
// within an op.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "model/layout.h"
#include "model/shape.h"

namespace pytrain {

enum class Lifetime : std::uint8_t { forward_backward, forward_weight, backward_weight, operation, update };
const char* name_of(Lifetime);

// none rebuilds norm outputs and activations, which costs next to nothing; selective the attention core too (no product
// of a weight); full keeps a layer's input alone and runs its forward again.
enum class Recompute : std::uint8_t { none, selective, full };

struct StageConfig {
    std::int64_t first_op, last_op;
    std::int64_t tp_rank = 0, tp_size = 1;
    bool sequence_parallel = false;    // the residual stream and the norms on this rank's rows alone: stream_rows
    std::int64_t batch, length;        // sequences and tokens of a micro-batch
    std::int64_t slots = 1;            // micro-batches in flight
    bool training = true;              // else no backward: one layer's activations are kept
    bool defer_weight = false;         // backward_weight may come long after backward_input
    std::vector<Recompute> recompute;  // one per layer of the model
    std::int64_t head_chunk = 0;       // rows of logits that exist at a time; 0: see kLogitsBytes
    // Parts that a bucket of gradients is padded to a multiple of, where gradients that follow backward lie in the
    // arena (a step of one micro-batch alone, and no deferred weight gradients); 0: they lie elsewhere.
    std::int64_t gradient_shards = 0;

    bool gathers() const { return sequence_parallel && tp_size > 1; }
};

// Rows of the residual stream that this rank holds, of batch * length: all, or its part under sequence parallelism,
// which cuts the flattened rows and not each sequence, so that one sequence is enough and no length has to divide.
Range stream_rows(const StageConfig&);

// Every chunk of logits packs the head's matrix twice and adds to the whole of its gradient, which is worth much more
// memory than a chunk is, up to this much. bf16 products take half the time and a chunk's packing and adding nearly the
// same: gpt2-124m at 1024 rows spends 6 % less in the head in one chunk than in two (fp32: 1 to 2 %).
constexpr std::int64_t kLogitsBytes = std::int64_t{128} << 20;
constexpr std::int64_t kLogitsBytesOfBf16 = std::int64_t{256} << 20;  // where activations are bf16; logits are fp32

// A named piece of the arena: offsets are bytes from its start. Gradients that follow activations are none; what they
// need beyond these is one.
struct ArenaEntry {
    std::string name;
    Lifetime lifetime;
    std::int64_t bytes;   // of one copy
    std::int64_t copies;  // slots, or 1
    std::int64_t offset;
};

constexpr std::int64_t kNone = -1;

// Byte offsets (of slot 0) of what one op keeps; kNone where it has no such thing. Shared pieces have slot stride 0.
// `stream` rows are those of stream_rows, `rows` all of the micro-batch.
struct Place {
    std::int64_t offset = kNone, slot_stride = 0;
};

struct OpPlaces {
    Place x;           // norm: residual stream that enters it (stream, hidden)
    Place y;           // norm: output (rows, hidden), shared; under sequence parallelism it is `gathered`
    Place mean, rstd;  // norm: (stream) fp32
    Place qkv;         // attention: (rows, (heads + 2 kv_heads) * head_size), rotated
    Place out;         // attention: (rows, heads * head_size)
    Place lse;         // attention: (batch, heads, length) fp32
    Place dqkv;
    Place up;      // mlp: (rows, ffn) or (rows, 2 ffn) [gate | up], before the activation
    Place active;  // mlp: (rows, ffn), shared
    Place dup;
    Place dresidual;  // attention, mlp: gradient of the op's output (stream, hidden), for a deferred backward_weight
};

struct Arena {
    Arena(const Shape&, const Policy&, const StageConfig&);

    std::vector<ArenaEntry> entries;
    std::int64_t bytes = 0;
    std::vector<OpPlaces> ops;  // indexed by op - first_op
    // One per slot
    Place tokens, targets, positions, document_starts;  // (rows) int32
    Place output;                                       // residual stream that leaves the stage (stream, hidden)
    Place statistics, lse;                              // head: (rows, 3), (rows) fp32
    // Shared
    // (rows, hidden): gradient of the stream; of a norm's output; row-parallel product; norm output of which this rank
    // wrote its rows and the caller gathers the others (sequence parallelism). All rows, since each is what ranks
    // exchange: under sequence parallelism this rank's rows of the first three are what it works on.
    Place dresidual, dnorm, partial, gathered;
    Place dout, dactive;  // (rows, heads*head_size), (rows, ffn)
    Place delta;          // (batch, heads, length) fp32
    Place logits;         // (head_chunk, vocabulary slice)
    std::int64_t head_chunk = 0;
    std::vector<Place> gradients;  // per bucket of the layout, kNone where they lie elsewhere

private:
    Place add(const std::string& name, Lifetime, std::int64_t elements, DType, std::int64_t copies);
    void plan_layer(const Shape&, const Policy&, const StageConfig&, std::int64_t layer);
    void plan_ends(const Shape&, const Policy&, const StageConfig&);
    void plan_shared(const Shape&, const Policy&, const StageConfig&);
    std::int64_t plan_operation(const Shape&, const Policy&, const StageConfig&);
    void plan_gradients(const Shape&, const Policy&, const StageConfig&);
    Place shared(const std::string& name, std::int64_t elements, DType);
    std::vector<std::int64_t> ends_;       // bytes when what precedes the layers was planned, then after each layer
    Place dqkv_, dup_;                     // of all ops, where weight gradients come at once
    std::map<std::string, Place> shared_;  // recomputed pieces, one set for all layers
};

}  // namespace pytrain
