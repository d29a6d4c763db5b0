// The operations of a Device that only a model needs: attention, head, loss and optimizer. See bind_device.cpp.
#include "bindings/arrays.h"

namespace py = pybind11;

namespace pytrain {

namespace {

using Array = py::array;
using Object = py::object;
using Release = py::gil_scoped_release;

// --- attention ------------------------------------------------------------------------------------

// q (batch, query_rows, heads*head_size); k, v (batch, key_rows, kv_heads*head_size), with the same strides.
Attention attention_of(const Arguments& arguments, const Array& q, const Array& k, const Array& v, std::int64_t heads,
                       std::int64_t kv_heads, std::int64_t query_offset, const Object& document_starts) {
    Attention attention{};
    attention.q = arguments.rows("q", q, 3);
    attention.k = arguments.rows("k", k, 3);
    attention.v = arguments.rows("v", v, 3);
    check(heads > 0 && q.shape(2) % heads == 0, "q: the last dimension of ", text_of(shape_of(q)),
          " is not a multiple of ", heads, " heads");
    check(kv_heads > 0 && heads % kv_heads == 0, "kv_heads: ", kv_heads, " does not divide ", heads, " heads");
    attention.batch = q.shape(0);
    attention.heads = heads;
    attention.kv_heads = kv_heads;
    attention.head_size = q.shape(2) / heads;
    attention.query_rows = q.shape(1);
    attention.key_rows = k.shape(1);
    attention.query_offset = query_offset;
    check_shape("k", k, {q.shape(0), k.shape(1), kv_heads * attention.head_size});
    check_shape("v", v, shape_of(k));
    attention.q_stride = stride_of(q, 1);
    attention.q_batch_stride = stride_of(q, 0);
    attention.kv_stride = stride_of(k, 1);
    attention.kv_batch_stride = stride_of(k, 0);
    check(stride_of(v, 0) == attention.kv_batch_stride && stride_of(v, 1) == attention.kv_stride,
          "v: must have the strides of k");
    const std::int64_t rows = attention.batch * attention.query_rows;
    attention.document_starts = plain_optional<std::int32_t>("document_starts", document_starts, {rows});
    for (std::int64_t i = 0; attention.document_starts && i < rows; ++i)
        check(attention.document_starts[i] >= 0 &&
                  attention.document_starts[i] <= query_offset + i % attention.query_rows,
              "document_starts: element ", i, " is ", attention.document_starts[i], ", but its query is key ",
              query_offset + i % attention.query_rows);
    return attention;
}

Sizes statistics_shape(const Attention& attention) { return {attention.batch, attention.heads, attention.query_rows}; }
Sizes out_shape(const Attention& attention) {
    return {attention.batch, attention.query_rows, attention.heads * attention.head_size};
}

void attention_forward(Device& device, const Array& out, const Object& lse, const Array& q, const Array& k,
                       const Array& v, std::int64_t heads, std::int64_t kv_heads, std::int64_t query_offset,
                       const Object& document_starts, const std::string& half) {
    const Arguments arguments(half);
    Attention attention = attention_of(arguments, q, k, v, heads, kv_heads, query_offset, document_starts);
    attention.out = arguments.flat("out", out, out_shape(attention), true);
    attention.lse = plain_optional<float>("lse", lse, statistics_shape(attention), true);
    const Release release;
    device.attention_forward(attention, nullptr);
    finish(device);
}

void check_strides(const char* name, const Array& gradient, const char* like_name, const Array& like) {
    check_shape(name, gradient, shape_of(like));
    check(stride_of(gradient, 0) == stride_of(like, 0) && stride_of(gradient, 1) == stride_of(like, 1), name,
          ": must have the strides of ", like_name);
}

void attention_backward(Device& device, const Array& dq, const Array& dk, const Array& dv, const Array& delta,
                        const Array& dout, const Array& out, const Array& lse, const Array& q, const Array& k,
                        const Array& v, std::int64_t heads, std::int64_t kv_heads, std::int64_t query_offset,
                        const Object& document_starts, const std::string& half) {
    const Arguments arguments(half);
    Attention attention = attention_of(arguments, q, k, v, heads, kv_heads, query_offset, document_starts);
    attention.out = arguments.flat("out", out, out_shape(attention));
    attention.lse = plain<float>("lse", lse, statistics_shape(attention));
    check_strides("dq", dq, "q", q);
    check_strides("dk", dk, "k", k);
    check_strides("dv", dv, "k", k);
    const Tensor dqueries = arguments.rows("dq", dq, 3, true), dkeys = arguments.rows("dk", dk, 3, true),
                 dvalues = arguments.rows("dv", dv, 3, true);
    const Tensor gradient = arguments.flat("dout", dout, out_shape(attention));
    float* const scratch = plain<float>("delta", delta, statistics_shape(attention), true);
    const Release release;
    device.attention_backward(attention, dqueries, dkeys, dvalues, gradient, scratch, nullptr);
    finish(device);
}

// --- head and loss --------------------------------------------------------------------------------

constexpr py::ssize_t kScalars = sizeof(StepScalars) / sizeof(double);

StepScalars* scalars_of(const Array& scalars, bool write) {
    return reinterpret_cast<StepScalars*>(plain<double>("scalars", scalars, {kScalars}, write));
}

void head_statistics(Device& device, const Array& statistics, const Array& logits, const Array& targets,
                     std::int64_t vocabulary_begin, const std::string& half) {
    check(logits.ndim() == 2, "logits: must be (rows, width), not ", text_of(shape_of(logits)));
    const std::int64_t rows = logits.shape(0), width = logits.shape(1);
    const Tensor slice = Arguments(half).flat("logits", logits);
    float* const out = plain<float>("statistics", statistics, {rows, kHeadStatistics}, true);
    const std::int32_t* const wanted = plain<std::int32_t>("targets", targets, {rows});
    const Release release;
    device.head_statistics(out, slice, wanted, rows, width, vocabulary_begin, nullptr);
    finish(device);
}

void loss_forward(Device& device, const Array& scalars, const Array& lse, const Array& statistics,
                  const Array& targets) {
    check(statistics.ndim() == 3, "statistics: must be (slices, rows, 3), not ", text_of(shape_of(statistics)));
    const std::int64_t slices = statistics.shape(0), rows = statistics.shape(1);
    const float* const in = plain<float>("statistics", statistics, {slices, rows, kHeadStatistics});
    float* const out = plain<float>("lse", lse, {rows}, true);
    const std::int32_t* const wanted = plain<std::int32_t>("targets", targets, {rows});
    StepScalars* const sums = scalars_of(scalars, true);
    const Release release;
    device.loss_forward(sums, out, in, slices, wanted, rows, nullptr);
    finish(device);
}

// Where the gradient of logits goes: in their place, or to `dlogits`.
struct Gradient {
    Gradient(const std::string& half, const Array& logits, const Tensor& in_place, const Object& dlogits)
        : tensor(in_place), stride(logits.shape(1)) {
        if (dlogits.is_none()) return;
        const auto array = py::cast<Array>(dlogits);
        tensor = Arguments(half).rows("dlogits", array, 2, true);
        check_shape("dlogits", array, shape_of(logits));
        stride = stride_of(array, 0);
    }

    Tensor tensor;
    std::int64_t stride;
};

void loss_backward(Device& device, const Array& logits, const Array& lse, const Array& targets, const Array& scalars,
                   std::int64_t vocabulary_begin, const std::string& half, const Object& dlogits) {
    check(logits.ndim() == 2, "logits: must be (rows, width), not ", text_of(shape_of(logits)));
    const std::int64_t rows = logits.shape(0), width = logits.shape(1);
    const Tensor slice = Arguments(half).flat("logits", logits, true);
    const Gradient gradient(half, logits, slice, dlogits);
    const float* const sums = plain<float>("lse", lse, {rows});
    const std::int32_t* const wanted = plain<std::int32_t>("targets", targets, {rows});
    const StepScalars* const scale = scalars_of(scalars, false);
    const Release release;
    device.loss_backward(gradient.tensor, gradient.stride, slice, sums, wanted, scale, rows, width, vocabulary_begin,
                         nullptr);
    finish(device);
}

void loss_forward_backward(Device& device, const Array& scalars, const Array& lse, const Array& statistics,
                           const Array& logits, const Array& targets, const std::string& half, const Object& dlogits) {
    check(logits.ndim() == 2, "logits: must be (rows, width), not ", text_of(shape_of(logits)));
    const std::int64_t rows = logits.shape(0), width = logits.shape(1);
    const Tensor slice = Arguments(half).flat("logits", logits, true);
    const Gradient gradient(half, logits, slice, dlogits);
    float* const out = plain<float>("lse", lse, {rows}, true);
    float* const of_rows = plain<float>("statistics", statistics, {rows, kHeadStatistics}, true);
    const std::int32_t* const wanted = plain<std::int32_t>("targets", targets, {rows});
    StepScalars* const sums = scalars_of(scalars, true);
    const Release release;
    device.loss_forward_backward(sums, out, of_rows, gradient.tensor, gradient.stride, slice, wanted, rows, width,
                                 nullptr);
    finish(device);
}

// --- optimizer ------------------------------------------------------------------------------------

void sum_squares(Device& device, const Array& sum, const Array& x, const std::string& half) {
    double* const total = plain<double>("sum", sum, {1}, true);
    const Tensor in = Arguments(half).flat("x", x);
    const std::int64_t n = x.size();
    const Release release;
    device.sum_squares(total, in, n, nullptr);
    finish(device);
}

// One call for all tensors of a stage: what a call costs in Python is what a small model's step is made of.
void sum_squares_each(Device& device, const Array& sum, const std::vector<Array>& arrays, const std::string& half) {
    double* const total = plain<double>("sum", sum, {1}, true);
    const Arguments arguments(half);
    std::vector<std::pair<Tensor, std::int64_t>> each;
    for (const Array& array : arrays) each.emplace_back(arguments.flat("arrays", array), array.size());
    const Release release;
    for (const auto& [x, n] : each) device.sum_squares(total, x, n, nullptr);
    finish(device);
}

void finish_norm(Device& device, const Array& scalars, const Array& sum, double limit, double loss_scale) {
    const double* const total = plain<double>("sum", sum, {1});
    StepScalars* const out = scalars_of(scalars, true);
    const Release release;
    device.finish_norm(out, total, limit, loss_scale, nullptr);
    finish(device);
}

// What AdamW changes and reads of one tensor; all of one shape.
struct Updated {
    Tensor weights, master, m, v, gradient;
    std::int64_t n;
};

Updated updated(const Arguments& arguments, const Array& weights, const Array& master, const Array& m, const Array& v,
                const Array& gradient) {
    const Sizes shape = shape_of(weights);
    Updated tensors{};
    tensors.weights = arguments.flat("weights", weights, true);
    tensors.master = arguments.flat("master", master, shape, true);
    tensors.m = arguments.flat("m", m, shape, true), tensors.v = arguments.flat("v", v, shape, true);
    tensors.gradient = arguments.flat("gradient", gradient, shape);
    tensors.n = weights.size();
    return tensors;
}

void adamw(Device& device, const Array& weights, const Array& master, const Array& m, const Array& v,
           const Array& gradient, const Array& scalars, double beta1, double beta2, float eps, float step_size,
           float correction2, float decay, const std::string& half) {
    const Updated one = updated(Arguments(half), weights, master, m, v, gradient);
    const StepScalars* const factors = scalars_of(scalars, false);
    const AdamW step{beta1, beta2, eps, step_size, correction2, decay};
    const Release release;
    device.adamw(step, one.weights, one.master, one.m, one.v, one.gradient, one.n, factors, nullptr);
    finish(device);
}

using Run = std::tuple<Array, Array, Array, Array, Array, bool>;  // weights, master, m, v, gradient; whether it decays

void adamw_each(Device& device, const std::vector<Run>& runs, const Array& scalars, double beta1, double beta2,
                float eps, float step_size, float correction2, float decay, const std::string& half) {
    const Arguments arguments(half);
    const StepScalars* const factors = scalars_of(scalars, false);
    std::vector<std::pair<Updated, AdamW>> each;
    for (const auto& [weights, master, m, v, gradient, decays] : runs)
        each.emplace_back(updated(arguments, weights, master, m, v, gradient),
                          AdamW{beta1, beta2, eps, step_size, correction2, decays ? decay : 0.0f});
    const Release release;
    for (const auto& [one, step] : each)
        device.adamw(step, one.weights, one.master, one.m, one.v, one.gradient, one.n, factors, nullptr);
    finish(device);
}

}  // namespace

void bind_device_model(py::class_<Device>& device) {
    const py::arg_v half = py::arg("half") = "bf16";
    device
        .def("attention_forward", &attention_forward, py::arg("out"), py::arg("lse"), py::arg("q"), py::arg("k"),
             py::arg("v"), py::kw_only(), py::arg("heads"), py::arg("kv_heads"), py::arg("query_offset") = 0,
             py::arg("document_starts") = py::none(), half,
             "Causal attention: q (B, queries, heads*D), k and v (B, keys, kv_heads*D), strided alike; out (B, "
             "queries, heads*D);\n"
             "lse (B, heads, queries) float32 or None; query i sees keys document_starts[i] .. query_offset + i.")
        .def("attention_backward", &attention_backward, py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("delta"),
             py::arg("dout"), py::arg("out"), py::arg("lse"), py::arg("q"), py::arg("k"), py::arg("v"), py::kw_only(),
             py::arg("heads"), py::arg("kv_heads"), py::arg("query_offset") = 0,
             py::arg("document_starts") = py::none(), half,
             "Overwrites dq, dk, dv (strided as q, k, k); delta (B, heads, queries) float32 is scratch.")
        .def("head_statistics", &head_statistics, py::arg("statistics"), py::arg("logits"), py::arg("targets"),
             py::arg("vocabulary_begin") = 0, half,
             "statistics (rows, 3): maximum, sum of exp(logit - maximum), target logit of a slice of the vocabulary.")
        .def("loss_forward", &loss_forward, py::arg("scalars"), py::arg("lse"), py::arg("statistics"),
             py::arg("targets"),
             "Merges statistics (slices, rows, 3): lse (rows); loss_sum and target_count of scalars (6) float64 grow.")
        .def("loss_backward", &loss_backward, py::arg("logits"), py::arg("lse"), py::arg("targets"), py::arg("scalars"),
             py::arg("vocabulary_begin") = 0, half, py::arg("dlogits") = py::none(),
             "The gradient of logits (rows, width), times scalars' gradient_scale, in their place or in dlogits, whose "
             "rows may begin where those of logits do.")
        .def("loss_forward_backward", &loss_forward_backward, py::arg("scalars"), py::arg("lse"), py::arg("statistics"),
             py::arg("logits"), py::arg("targets"), half, py::arg("dlogits") = py::none(),
             "head_statistics (rows, 3), loss_forward and loss_backward of logits (rows, width) float32, which are the "
             "whole\n"
             "vocabulary and hold nothing of use afterwards, unless the gradient takes their place.")
        .def("sum_squares", &sum_squares, py::arg("sum"), py::arg("x"), half, "sum (1) float64 += sum of squares of x.")
        .def("sum_squares_each", &sum_squares_each, py::arg("sum"), py::arg("arrays"), half,
             "sum_squares of one array after another.")
        .def("finish_norm", &finish_norm, py::arg("scalars"), py::arg("sum"), py::arg("limit"), py::arg("loss_scale"),
             "gradient_norm, clip_factor and finite of scalars (6) float64, from the sum of squares; limit 0: no "
             "clipping.")
        .def("adamw", &adamw, py::arg("weights"), py::arg("master"), py::arg("m"), py::arg("v"), py::arg("gradient"),
             py::arg("scalars"), py::kw_only(), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
             py::arg("step_size"), py::arg("correction2"), py::arg("decay"), half,
             "One AdamW step, all arrays of one shape; weights may be master. Nothing changes where scalars say not "
             "finite.")
        .def("adamw_each", &adamw_each, py::arg("runs"), py::arg("scalars"), py::kw_only(), py::arg("beta1"),
             py::arg("beta2"), py::arg("eps"), py::arg("step_size"), py::arg("correction2"), py::arg("decay"), half,
             "adamw of one run after another: (weights, master, m, v, gradient, whether it decays) each.");
}

}  // namespace pytrain
