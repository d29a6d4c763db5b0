// CpuDevice and its operations on NumPy arrays, for tests and for the parts of a step that Python drives.
//
// Arrays are float32 or uint16 (bf16 or fp16 bits, which `half` says); results are written into the arrays given.
// Shapes, types and indices are checked before the GIL is released; the operations themselves are those of
// native/device.h.
#include <optional>

#include "bindings/arrays.h"
#include "cpu/cpu_device.h"
#include "cpu/select.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace pytrain {

using cpu::CpuDevice;

namespace {

using Array = py::array;
using Object = py::object;
using Release = py::gil_scoped_release;

std::unique_ptr<CpuDevice> make_device(const std::optional<std::string>& isa, std::optional<int> threads,
                                       bool fp16_chains) {
    check(!threads || *threads >= 1, "threads: must be at least 1, not ", threads.value_or(1));
    cpu::Kernels kernels = isa ? cpu::kernels_of(*isa) : cpu::chosen_kernels();
    if (fp16_chains) kernels = cpu::with_fp16_chains(kernels);
    return std::make_unique<CpuDevice>(kernels, threads ? *threads : cpu::default_threads());
}

double peak_flops(CpuDevice& device, std::int64_t repeats, const std::string& dtype) {
    check(repeats >= 0, "repeats: must not be negative, not ", repeats);
    const DType type = dtype_from(dtype);
    const cpu::Products products = device.kernels().matrix_products(type, type);
    const Release release;
    constexpr std::size_t sink = 64;  // floats, see kernels.h
    std::vector<float> sinks(sink * static_cast<std::size_t>(device.threads()));
    std::vector<double> flops(static_cast<std::size_t>(device.threads()));
    cpu::parallel_for(device.threads(), device.threads(), [&](std::int64_t task, int) {
        const auto i = static_cast<std::size_t>(task);
        flops[i] = products.peak_flops(repeats, &sinks[sink * i]);
    });
    double total = 0.0;
    for (const double part : flops) total += part;
    return total;
}

// --- plain data -----------------------------------------------------------------------------------

void copy(Device& device, const Array& destination, const Array& source) {
    check(destination.nbytes() == source.nbytes(), "destination: holds ", destination.nbytes(), " bytes, but source ",
          source.nbytes());
    check((destination.flags() & source.flags() & Array::c_style) && destination.writeable(),
          "copy: both arrays must be C-contiguous, and destination writeable");
    void* const to = const_cast<void*>(destination.data());
    const void* const from = source.data();
    const auto bytes = static_cast<std::size_t>(source.nbytes());
    const Release release;
    device.copy(to, from, bytes, nullptr);
    finish(device);
}

// Of the communication queue, beside what the compute queue does.
void start_copy(Device& device, const Array& destination, const Array& source) {
    check(destination.nbytes() == source.nbytes(), "destination: holds ", destination.nbytes(), " bytes, but source ",
          source.nbytes());
    check((destination.flags() & source.flags() & Array::c_style) && destination.writeable(),
          "start_copy: both arrays must be C-contiguous, and destination writeable");
    void* const to = const_cast<void*>(destination.data());
    const void* const from = source.data();
    const auto bytes = static_cast<std::size_t>(source.nbytes());
    const Release release;
    device.copy(to, from, bytes, device.communication_queue());
}

void finish_copies(Device& device) {
    const Release release;
    Event* const event = device.record(device.communication_queue());
    device.synchronize(event);
    device.release(event);
}

bool is_device_memory(const Device& device, const Array& array) {
    return device.is_device_memory(array.data(), static_cast<std::size_t>(array.nbytes()));
}

void convert(Device& device, const Array& destination, const Array& source, const std::string& half) {
    const Arguments arguments(half);
    const Tensor from = arguments.flat("source", source);
    const Tensor to = arguments.flat("destination", destination, shape_of(source), true);
    const std::int64_t n = source.size();
    const Release release;
    device.convert(to, from, n, nullptr);
    finish(device);
}

void add(Device& device, const Array& destination, const Array& source, const std::string& half) {
    const Arguments arguments(half);
    const Tensor from = arguments.flat("source", source);
    const Tensor to = arguments.flat("destination", destination, shape_of(source), true);
    const std::int64_t n = source.size();
    const Release release;
    device.add(to, from, n, nullptr);
    finish(device);
}

void fill(Device& device, const Array& destination, float value, const std::string& half) {
    const Tensor to = Arguments(half).flat("destination", destination, true);
    const std::int64_t n = destination.size();
    const Release release;
    device.fill(to, n, value, nullptr);
    finish(device);
}

void fill_normal(Device& device, const Array& destination, std::uint64_t seed, std::uint64_t key, std::int64_t first,
                 float deviation, const std::string& half) {
    const Tensor to = Arguments(half).flat("destination", destination, true);
    const std::int64_t n = destination.size();
    check(first >= 0, "first: must not be negative, not ", first);
    const Release release;
    device.fill_normal(to, n, seed, key, first, deviation, nullptr);
    finish(device);
}

// --- products -------------------------------------------------------------------------------------

void matmul(Device& device, const Array& c, const Array& a, const Array& b, bool transpose_a, bool transpose_b,
            bool accumulate, const Object& bias, const Object& residual, const Object& activated,
            const std::string& half) {
    const Arguments arguments(half);
    Matmul product{};
    product.a = arguments.rows("a", a, 2);
    product.b = arguments.rows("b", b, 2);
    product.c = arguments.rows("c", c, 2, true);
    product.m = a.shape(transpose_a ? 1 : 0);
    product.k = a.shape(transpose_a ? 0 : 1);
    product.n = b.shape(transpose_b ? 0 : 1);
    check(b.shape(transpose_b ? 1 : 0) == product.k, "b: ", transpose_b ? "transposed " : "", text_of(shape_of(b)),
          " does not fit a ", transpose_a ? "transposed " : "", text_of(shape_of(a)));
    check_shape("c", c, {product.m, product.n});
    product.lda = stride_of(a, 0);
    product.ldb = stride_of(b, 0);
    product.ldc = stride_of(c, 0);
    product.transpose_a = transpose_a ? Transpose::yes : Transpose::no;
    product.transpose_b = transpose_b ? Transpose::yes : Transpose::no;
    product.accumulate = accumulate;
    product.bias = arguments.optional("bias", bias, {product.n});
    if (!residual.is_none()) {
        const auto array = py::cast<Array>(residual);
        product.residual = arguments.rows("residual", array, 2);
        check_shape("residual", array, {product.m, product.n});
        product.ldresidual = stride_of(array, 0);
    }
    if (!activated.is_none()) {
        const auto array = py::cast<Array>(activated);
        product.activated = arguments.rows("activated", array, 2, true);
        check_shape("activated", array, {product.m, product.n});
        product.ldactivated = stride_of(array, 0);
        product.activation = Activation::gelu;
    }
    const Release release;
    device.matmul(product, nullptr);
    finish(device);
}

void pack(CpuDevice& device, const Array& panel, const Array& source, bool along, const std::string& half, bool pairs) {
    const Tensor from = Arguments(half).rows("source", source, 2);
    const std::int64_t width = source.shape(along ? 0 : 1), k = source.shape(along ? 1 : 0), ld = stride_of(source, 0);
    const DType type = pairs ? dtype_from(half) : DType::fp32;
    const cpu::Products products = device.kernels().matrix_products(type, type);
    const std::int64_t words = products.words(k);
    check(!pairs || products.word_depth == 2, "pack: ", device.kernels().name, " has no products of pairs of ", half);
    check(panel.ndim() == 2 && panel.shape(0) == words && panel.shape(1) >= width, "panel: must be (", words,
          ", at least ", width, "), not ", text_of(shape_of(panel)));
    const std::int64_t panel_width = panel.shape(1);
    float* const to = plain<float>("panel", panel, {words, panel_width}, true);
    const auto* const kernels = along ? products.pack_along : products.pack_across;
    check(kernels[static_cast<int>(from.dtype)] != nullptr, "pack: no packing of ", name_of(from.dtype));
    const Release release;
    kernels[static_cast<int>(from.dtype)](to, from.data, ld, k, width, panel_width);
}

void bias_backward(Device& device, const Array& dbias, const Array& dy, const std::string& half) {
    const Arguments arguments(half);
    const Tensor gradient = arguments.rows("dy", dy, 2);
    const std::int64_t m = dy.shape(0), n = dy.shape(1), ldy = stride_of(dy, 0);
    const Tensor sum = arguments.flat("dbias", dbias, {n}, true);
    const Release release;
    device.bias_backward(sum, gradient, m, n, ldy, nullptr);
    finish(device);
}

// --- embedding ------------------------------------------------------------------------------------

// Positions are indices of the position table; tokens outside [begin, end) contribute nothing, so that any value is
// good.
Embed embed_of(const Array& rows, const Array& tokens, const Array& positions, const Object& table,
               const Object& position_table, std::int64_t begin) {
    check(rows.ndim() == 2, "out or dout: must be (rows, hidden), not ", text_of(shape_of(rows)));
    Embed embed{rows.shape(0), rows.shape(1), begin, begin, nullptr, nullptr};
    embed.tokens = plain<std::int32_t>("tokens", tokens, {rows.shape(0)});
    embed.positions = plain<std::int32_t>("positions", positions, {rows.shape(0)});
    if (!table.is_none()) embed.vocabulary_end += py::cast<Array>(table).shape(0);
    if (!position_table.is_none())
        check_indices("positions", embed.positions, embed.rows, py::cast<Array>(position_table).shape(0));
    return embed;
}

Sizes table_shape(const Object& table, std::int64_t hidden) {
    return table.is_none() ? Sizes{} : Sizes{py::cast<Array>(table).shape(0), hidden};
}

void embed_forward(Device& device, const Array& out, const Array& table, const Object& position_table,
                   const Array& tokens, const Array& positions, std::int64_t vocabulary_begin,
                   const std::string& half) {
    const Arguments arguments(half);
    const Embed embed = embed_of(out, tokens, positions, table, position_table, vocabulary_begin);
    const Tensor y = arguments.flat("out", out, true);
    const Tensor tokens_table = arguments.optional("table", table, table_shape(table, embed.hidden));
    const Tensor positions_table =
        arguments.optional("position_table", position_table, table_shape(position_table, embed.hidden));
    const Release release;
    device.embed_forward(embed, y, tokens_table, positions_table, nullptr);
    finish(device);
}

void embed_backward(Device& device, const Object& dtable, const Object& dposition_table, const Array& dout,
                    const Array& tokens, const Array& positions, std::int64_t vocabulary_begin,
                    const std::string& half) {
    const Arguments arguments(half);
    const Embed embed = embed_of(dout, tokens, positions, dtable, dposition_table, vocabulary_begin);
    const Tensor dy = arguments.flat("dout", dout);
    const Tensor dtokens = arguments.optional("dtable", dtable, table_shape(dtable, embed.hidden), true);
    const Tensor dpositions =
        arguments.optional("dposition_table", dposition_table, table_shape(dposition_table, embed.hidden), true);
    const Release release;
    device.embed_backward(embed, dtokens, dpositions, dy, nullptr);
    finish(device);
}

// --- rows -----------------------------------------------------------------------------------------

void residual_add(Device& device, const Array& x, const Array& partial, const Object& bias, const std::string& half) {
    const Arguments arguments(half);
    check(x.ndim() == 2, "x: must be (rows, width), not ", text_of(shape_of(x)));
    const Tensor residual = arguments.flat("x", x, true);
    const Tensor sum = arguments.flat("partial", partial, shape_of(x));
    const Tensor row = arguments.optional("bias", bias, {x.shape(1)});
    const std::int64_t rows = x.shape(0), width = x.shape(1);
    const Release release;
    device.residual_add(residual, sum, row, rows, width, nullptr);
    finish(device);
}

// A LayerNorm where there is a mean, else an RMSNorm.
Norm norm_of(const Arguments& arguments, const Array& x, const Array& weight, const Object& bias, const Object& mean,
             const Array& rstd, float eps, bool write) {
    check(x.ndim() == 2, "x: must be (rows, width), not ", text_of(shape_of(x)));
    const py::ssize_t rows = x.shape(0), width = x.shape(1);
    Norm norm{mean.is_none() ? NormKind::rmsnorm : NormKind::layernorm, rows, width, eps, {}, {}, {}, nullptr, nullptr};
    norm.x = arguments.flat("x", x);
    norm.weight = arguments.flat("weight", weight, Sizes{width});
    norm.bias = arguments.optional("bias", bias, {width});
    norm.mean = plain_optional<float>("mean", mean, {rows}, write);
    norm.rstd = plain<float>("rstd", rstd, {rows}, write);
    return norm;
}

void norm_forward(Device& device, const Array& y, const Object& mean, const Array& rstd, const Array& x,
                  const Array& weight, const Object& bias, float eps, const std::string& half) {
    const Arguments arguments(half);
    const Norm norm = norm_of(arguments, x, weight, bias, mean, rstd, eps, true);
    const Tensor out = arguments.flat("y", y, shape_of(x), true);
    const Release release;
    device.norm_forward(norm, out, nullptr);
    finish(device);
}

void norm_backward(Device& device, const Array& dx, const Array& dweight, const Object& dbias, const Array& dy,
                   const Object& mean, const Array& rstd, const Array& x, const Array& weight,
                   const std::string& half) {
    const Arguments arguments(half);
    const Norm norm = norm_of(arguments, x, weight, py::none(), mean, rstd, 0.0f, false);
    const Tensor dinput = arguments.flat("dx", dx, shape_of(x), true);
    const Tensor dscale = arguments.flat("dweight", dweight, {x.shape(1)}, true);
    const Tensor dshift = arguments.optional("dbias", dbias, {x.shape(1)}, true);
    const Tensor dout = arguments.flat("dy", dy, shape_of(x));
    const Release release;
    device.norm_backward(norm, dinput, dscale, dshift, dout, nullptr);
    finish(device);
}

void gelu_forward(Device& device, const Array& y, const Array& x, const std::string& half) {
    const Arguments arguments(half);
    const Tensor in = arguments.flat("x", x), out = arguments.flat("y", y, shape_of(x), true);
    const std::int64_t n = x.size();
    const Release release;
    device.gelu_forward(out, in, n, nullptr);
    finish(device);
}

void gelu_backward(Device& device, const Array& dx, const Array& dy, const Array& x, const py::object& y,
                   const std::string& half) {
    const Arguments arguments(half);
    const Tensor in = arguments.flat("x", x), dout = arguments.flat("dy", dy, shape_of(x)),
                 din = arguments.flat("dx", dx, shape_of(x), true),
                 again = arguments.optional("y", y, shape_of(x), true);
    const std::int64_t n = x.size();
    const Release release;
    device.gelu_backward(din, dout, in, again, n, nullptr);
    finish(device);
}

void swiglu_forward(Device& device, const Array& y, const Array& gate_up, const std::string& half) {
    const Arguments arguments(half);
    check(y.ndim() == 2, "y: must be (rows, width), not ", text_of(shape_of(y)));
    const std::int64_t rows = y.shape(0), width = y.shape(1);
    const Tensor out = arguments.flat("y", y, true), in = arguments.flat("gate_up", gate_up, {rows, 2 * width});
    const Release release;
    device.swiglu_forward(out, in, rows, width, nullptr);
    finish(device);
}

void swiglu_backward(Device& device, const Array& dgate_up, const Array& dy, const Array& gate_up, const py::object& y,
                     const std::string& half) {
    const Arguments arguments(half);
    check(dy.ndim() == 2, "dy: must be (rows, width), not ", text_of(shape_of(dy)));
    const std::int64_t rows = dy.shape(0), width = dy.shape(1);
    const Tensor dout = arguments.flat("dy", dy), in = arguments.flat("gate_up", gate_up, {rows, 2 * width});
    const Tensor din = arguments.flat("dgate_up", dgate_up, {rows, 2 * width}, true),
                 again = arguments.optional("y", y, {rows, width}, true);
    const Release release;
    device.swiglu_backward(din, dout, in, again, rows, width, nullptr);
    finish(device);
}

void rope(Device& device, const Array& x, std::int64_t heads, std::int64_t head_size, const Array& positions,
          const Array& table, bool inverse, const std::string& half) {
    const Tensor rotated = Arguments(half).rows("x", x, 2, true);
    const std::int64_t rows = x.shape(0), stride = stride_of(x, 0);
    check(head_size % 2 == 0 && head_size > 0, "head_size: must be even and positive, not ", head_size);
    check(heads * head_size <= x.shape(1), "x: rows of ", x.shape(1), " elements do not hold ", heads, " heads of ",
          head_size);
    check(table.ndim() == 3, "table: must be (context, head_size/2, 2), not ", text_of(shape_of(table)));
    const std::int32_t* const indices = plain<std::int32_t>("positions", positions, {rows});
    const float* const angles = plain<float>("table", table, {table.shape(0), head_size / 2, 2});
    check_indices("positions", indices, rows, table.shape(0));
    const Release release;
    device.rope(rotated, rows, stride, heads, head_size, indices, angles, inverse, nullptr);
    finish(device);
}

}  // namespace

void bind_device_model(py::class_<Device>& device);  // attention, head and optimizer: bind_device_model.cpp

namespace {
// What every device does, on arrays: methods of Device itself.
void bind_operations(py::module_& module) {
    const py::arg_v half = py::arg("half") = "bf16";
    py::class_<Device> device(module.attr("Device"));
    device
        .def("reserve", &Device::reserve, py::arg("rows"), py::arg("width"), py::arg("head_size"), Gil(),
             "Makes room for operations on rows of `width` elements and heads of `head_size`; needed before them.")
        .def("copy", &copy, py::arg("destination"), py::arg("source"), "Copies bytes, with all threads.")
        .def("start_copy", &start_copy, py::arg("destination"), py::arg("source"),
             "Copies bytes on the communication queue; both arrays belong to the copy until it is done.")
        .def("finish_copies", &finish_copies, "Waits on an event after all copies that were started.")
        .def("is_device_memory", &is_device_memory, py::arg("array"),
             "Whether a C-contiguous array lies in memory of a GPU, which an MPI that knows none must not be handed.")
        .def("convert", &convert, py::arg("destination"), py::arg("source"), half,
             "destination = source, rounded to its type.")
        .def("add", &add, py::arg("destination"), py::arg("source"), half, "destination += source, in fp32.")
        .def("fill", &fill, py::arg("destination"), py::arg("value"), half)
        .def("fill_normal", &fill_normal, py::arg("destination"), py::arg("seed"), py::arg("key"), py::arg("first"),
             py::arg("deviation"), half,
             "Philox normal numbers: elements [first, first + n) of the tensor that (seed, key) names.")
        .def("matmul", &matmul, py::arg("c"), py::arg("a"), py::arg("b"), py::kw_only(), py::arg("transpose_a") = false,
             py::arg("transpose_b") = false, py::arg("accumulate") = false, py::arg("bias") = py::none(),
             py::arg("residual") = py::none(), py::arg("activated") = py::none(), half,
             "c (m,n) = op(a) op(b) [+ c] [+ bias (n)] [+ residual (m,n)]; activated (m,n) = gelu(c). Rows may be "
             "strided.")
        .def("bias_backward", &bias_backward, py::arg("dbias"), py::arg("dy"), half,
             "dbias (n) += column sums of dy (m,n), rows strided.")
        .def("embed_forward", &embed_forward, py::arg("out"), py::arg("table"), py::arg("position_table"),
             py::arg("tokens"), py::arg("positions"), py::arg("vocabulary_begin") = 0, half,
             "out (rows,H) = table[token] [+ position_table[position]]; table (slice of V, H).")
        .def("embed_backward", &embed_backward, py::arg("dtable"), py::arg("dposition_table"), py::arg("dout"),
             py::arg("tokens"), py::arg("positions"), py::arg("vocabulary_begin") = 0, half,
             "Adds dout's rows to those of the tables; either may be None.")
        .def("residual_add", &residual_add, py::arg("x"), py::arg("partial"), py::arg("bias"), half,
             "x (rows, width) += partial [+ bias].")
        .def("norm_forward", &norm_forward, py::arg("y"), py::arg("mean"), py::arg("rstd"), py::arg("x"),
             py::arg("weight"), py::arg("bias"), py::arg("eps"), half,
             "LayerNorm, or RMSNorm where mean is None; mean, rstd (rows) float32 are written.")
        .def("norm_backward", &norm_backward, py::arg("dx"), py::arg("dweight"), py::arg("dbias"), py::arg("dy"),
             py::arg("mean"), py::arg("rstd"), py::arg("x"), py::arg("weight"), half,
             "dx, dweight, dbias += their gradients.")
        .def("gelu_forward", &gelu_forward, py::arg("y"), py::arg("x"), half)
        .def("gelu_backward", &gelu_backward, py::arg("dx"), py::arg("dy"), py::arg("x"), py::arg("y") = py::none(),
             half, "dx of dy at x; y, unless None, becomes gelu(x) again.")
        .def("swiglu_forward", &swiglu_forward, py::arg("y"), py::arg("gate_up"), half,
             "y (rows, F) of gate_up (rows, 2 F).")
        .def("swiglu_backward", &swiglu_backward, py::arg("dgate_up"), py::arg("dy"), py::arg("gate_up"),
             py::arg("y") = py::none(), half, "dgate_up of dy; y, unless None, becomes the forward's again.")
        .def("rope", &rope, py::arg("x"), py::arg("heads"), py::arg("head_size"), py::arg("positions"),
             py::arg("table"), py::arg("inverse") = false, half,
             "Rotates the first heads*head_size elements of x's rows in place; table (context, head_size/2, 2) of cos, "
             "sin.");
    bind_device_model(device);
}
}  // namespace

void bind_device(py::module_& module) {
    bind_operations(module);
    const py::arg_v half = py::arg("half") = "bf16";
    py::class_<CpuDevice, Device> device(module, "CpuDevice", "The CPU as a device.");
    device
        .def(
            py::init(&make_device), py::arg("isa") = py::none(), py::arg("threads") = py::none(),
            py::arg("fp16_chains") = false,
            "isa: instruction set (default: PYTRAIN_ISA, or the best of this CPU); threads: OMP_NUM_THREADS or the "
            "cores of\n"
            "the affinity mask, unless given; fp16_chains: products of fp16 matrices in chains of fp16 multiply-adds,\n"
            "flushed into fp32 (Arm with SVE; raises Error elsewhere).")
        .def_property_readonly("isa", [](const CpuDevice& self) { return self.kernels().name; })
        .def_property_readonly("threads", &CpuDevice::threads)
        .def("peak_flops", &peak_flops, py::arg("repeats"), py::arg("dtype") = "fp32",
             "Runs `repeats` rounds of independent multiply-adds on every thread, those that products of this type are "
             "made of; returns the FLOPs done.")
        .def("pack", &pack, py::arg("panel"), py::arg("source"), py::arg("along"), half, py::arg("pairs") = false,
             "The packing kernel, for tests: panel (k, panel width) float32 of source (width, k) if along, else (k, "
             "width); with pairs, panel ((k+1)/2, panel width) of words that each hold two bf16 or fp16.");
}

}  // namespace pytrain
