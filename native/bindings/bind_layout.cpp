#include <cmath>

#include "bindings/bind.h"
#include "model/layout.h"
#include "model/shape.h"

namespace py = pybind11;

namespace pytrain {

namespace {
NormKind norm_from(const std::string& name) {
    check(name == "layernorm" || name == "rmsnorm", "norm '", name, "' is not one of layernorm, rmsnorm");
    return name == "layernorm" ? NormKind::layernorm : NormKind::rmsnorm;
}

const char* name_of_init(TensorSpec::Init init) {
    constexpr const char* names[] = {"normal", "residual", "ones", "zeros"};
    return names[static_cast<int>(init)];
}

py::tuple pair(const Range& range) { return py::make_tuple(range.begin, range.end); }

void bind_shape(py::module_& module) {
    py::class_<Shape>(module, "Shape", "Shape of a model; see native/model/shape.h.")
        .def(py::init([](std::int64_t layers, std::int64_t hidden, std::int64_t heads, std::int64_t kv_heads,
                         std::int64_t head_size, std::int64_t ffn, std::int64_t vocabulary, std::int64_t context,
                         const std::string& norm, bool bias, bool learned_positions, bool gated, bool tied_head,
                         float norm_eps, std::vector<double> rope_frequencies) {
                 Shape shape{layers,
                             hidden,
                             heads,
                             kv_heads,
                             head_size,
                             ffn,
                             vocabulary,
                             context,
                             norm_from(norm),
                             bias,
                             learned_positions,
                             gated,
                             tied_head,
                             norm_eps,
                             std::move(rope_frequencies)};
                 shape.validate();
                 return shape;
             }),
             py::kw_only(), py::arg("layers"), py::arg("hidden"), py::arg("heads"), py::arg("kv_heads"),
             py::arg("head_size"), py::arg("ffn"), py::arg("vocabulary"), py::arg("context"), py::arg("norm"),
             py::arg("bias"), py::arg("learned_positions"), py::arg("gated"), py::arg("tied_head"), py::arg("norm_eps"),
             py::arg("rope_frequencies"))
        .def_readonly("layers", &Shape::layers)
        .def_readonly("hidden", &Shape::hidden)
        .def_readonly("heads", &Shape::heads)
        .def_readonly("kv_heads", &Shape::kv_heads)
        .def_readonly("head_size", &Shape::head_size)
        .def_readonly("ffn", &Shape::ffn)
        .def_readonly("vocabulary", &Shape::vocabulary)
        .def_readonly("context", &Shape::context)
        .def_readonly("tied_head", &Shape::tied_head)
        .def_property_readonly("op_count", [](const Shape& shape) { return Ops(shape.layers).count(); })
        .def("op_name", [](const Shape& shape, std::int64_t op) { return Ops(shape.layers).name(op); }, py::arg("op"));
}

void bind_policy(py::module_& module) {
    py::class_<Policy>(module, "Policy", "Storage type of each kind of tensor: fp32, bf16 or fp16.")
        .def(py::init([](const std::string& weights, const std::string& activations, const std::string& gradients,
                         const std::string& gradient_reduction, const std::string& master) {
                 return Policy{dtype_from(weights), dtype_from(activations), dtype_from(gradients),
                               dtype_from(gradient_reduction), dtype_from(master)};
             }),
             py::kw_only(), py::arg("weights") = "fp32", py::arg("activations") = "fp32", py::arg("gradients") = "fp32",
             py::arg("gradient_reduction") = "fp32", py::arg("master") = "fp32")
        .def_property_readonly("weights", [](const Policy& policy) { return name_of(policy.weights); })
        .def_property_readonly("activations", [](const Policy& policy) { return name_of(policy.activations); })
        .def_property_readonly("gradients", [](const Policy& policy) { return name_of(policy.gradients); })
        .def_property_readonly("gradient_reduction",
                               [](const Policy& policy) { return name_of(policy.gradient_reduction); })
        .def_property_readonly("master", [](const Policy& policy) { return name_of(policy.master); });
}

// Rows of the parameter table.
void bind_rows(py::module_& module) {
    py::class_<TensorSpec>(module, "TensorSpec", "One row of the parameter table; see native/model/layout.h.")
        .def_readonly("name", &TensorSpec::name)
        .def_readonly("bucket", &TensorSpec::bucket)
        .def_readonly("op", &TensorSpec::op)
        .def_property_readonly(
            "shape", [](const TensorSpec& spec) { return py::tuple(py::cast(spec.shape)); }, "global shape")
        .def_property_readonly(
            "rows", [](const TensorSpec& spec) { return pair(spec.rows); }, "rows of dimension 0 held here")
        .def_property_readonly("local_shape",
                               [](const TensorSpec& spec) {
                                   std::vector<std::int64_t> local = spec.shape;
                                   local[0] = spec.rows.size();
                                   return py::tuple(py::cast(local));
                               })
        .def_readonly("offset", &TensorSpec::offset)
        .def_property_readonly("elements", &TensorSpec::elements)
        .def_property_readonly("first_element", &TensorSpec::first_element)
        .def_readonly("replicated", &TensorSpec::replicated)
        .def_readonly("partial_with_sequence_parallel", &TensorSpec::partial_with_sequence_parallel)
        .def_property_readonly("sharing_ranks", [](const TensorSpec& spec) { return pair(spec.sharing_ranks); })
        .def_readonly("sum_over_sharing", &TensorSpec::sum_over_sharing)
        .def_readonly("tied_copy", &TensorSpec::tied_copy)
        .def_readonly("owner", &TensorSpec::owner)
        .def_readonly("decay", &TensorSpec::decay)
        .def_property_readonly("initialisation", [](const TensorSpec& spec) { return name_of_init(spec.init); });

    py::class_<BucketSpec>(module, "BucketSpec", "A flat range of tensors: the unit of reduction, ZeRO and files.")
        .def_readonly("name", &BucketSpec::name)
        .def_readonly("follows_backward", &BucketSpec::follows_backward)
        .def_readonly("first_tensor", &BucketSpec::first_tensor)
        .def_readonly("tensor_count", &BucketSpec::tensor_count)
        .def_readonly("elements", &BucketSpec::elements);

    py::class_<Piece>(module, "Piece", "A part of one tensor inside a ZeRO shard.")
        .def_readonly("tensor", &Piece::tensor)
        .def_readonly("begin", &Piece::begin)
        .def_readonly("end", &Piece::end)
        .def_readonly("shard_offset", &Piece::shard_offset);
}

void bind_table(py::module_& module) {
    py::class_<Layout>(module, "Layout", "The parameter table of a range of ops on one tensor-parallel rank.")
        .def(py::init<const Shape&, std::int64_t, std::int64_t, std::int64_t, std::int64_t>(), py::arg("shape"),
             py::arg("first_op"), py::arg("last_op"), py::arg("tp_rank") = 0, py::arg("tp_size") = 1)
        .def_property_readonly("tensors", &Layout::tensors)
        .def_property_readonly("buckets", &Layout::buckets)
        .def_property_readonly("elements", &Layout::elements)
        .def("find", &Layout::find, py::arg("name"), "index of a tensor, or -1")
        .def("shard_elements", &Layout::shard_elements, py::arg("bucket"), py::arg("shards"))
        .def("parts", &Layout::parts, py::arg("bucket"), py::arg("shards"), py::arg("limit"))
        .def("pieces", &Layout::pieces, py::arg("bucket"), py::arg("shard"), py::arg("shards"), py::arg("limit") = 0);
}

void bind_ranges(py::module_& module) {
    module.def(
        "balanced",
        [](std::int64_t n, std::int64_t part, std::int64_t parts) { return pair(balanced(n, part, parts)); },
        py::arg("n"), py::arg("part"), py::arg("parts"), "(begin, end) of one of nearly equal parts of n things");
    module.def(
        "head_range",
        [](const Shape& shape, std::int64_t tp_rank, std::int64_t tp_size) {
            const HeadRange part = head_range(shape, tp_rank, tp_size);
            return py::make_tuple(pair(part.heads), pair(part.kv_heads), pair(part.sharing_ranks));
        },
        py::arg("shape"), py::arg("tp_rank"), py::arg("tp_size"),
        "(heads, kv_heads, ranks that hold the same kv_heads), each (begin, end)");
}
}  // namespace

void bind_layout(py::module_& module) {
    bind_shape(module);
    bind_policy(module);
    bind_rows(module);
    bind_table(module);
    bind_ranges(module);
}

}  // namespace pytrain
