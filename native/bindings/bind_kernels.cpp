// pytrain._native.kernels: every kernel of every instruction set on NumPy arrays, for tests, and what runs here.
#include <array>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "bindings/bind.h"
#include "core/buffer.h"
#include "core/philox.h"
#include "cpu/features.h"
#include "cpu/select.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace pytrain {

namespace {

using cpu::Kernels;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Halves = py::array_t<std::uint16_t, py::array::c_style>;

// What the row kernels of several storage types are tested with here; the others, in test_device.py.
constexpr int kFp32 = static_cast<int>(DType::fp32);

struct Field {
    const char* name;
    std::size_t offset;
    std::size_t pointers;
};

#define PYTRAIN_FIELD(name, count) \
    Field { #name, offsetof(Kernels, name), count }
constexpr std::array kFields = {
    PYTRAIN_FIELD(matmul_tile, 1),
    PYTRAIN_FIELD(matmul_row, 1),
    PYTRAIN_FIELD(pack_along, kDTypes),
    PYTRAIN_FIELD(pack_across, kDTypes),
    PYTRAIN_FIELD(widen, kDTypes),
    PYTRAIN_FIELD(narrow, kDTypes),
    PYTRAIN_FIELD(add, 1),
    PYTRAIN_FIELD(add_rows, kDTypes),
    PYTRAIN_FIELD(scale, 1),
    PYTRAIN_FIELD(residual, kDTypes),
    PYTRAIN_FIELD(gelu_forward, kDTypes),
    PYTRAIN_FIELD(gelu_backward, kDTypes),
    PYTRAIN_FIELD(swiglu_forward, kDTypes),
    PYTRAIN_FIELD(swiglu_backward, kDTypes),
    PYTRAIN_FIELD(rope, kDTypes),
    PYTRAIN_FIELD(layernorm_forward, kDTypes),
    PYTRAIN_FIELD(layernorm_backward, kDTypes),
    PYTRAIN_FIELD(rmsnorm_forward, kDTypes),
    PYTRAIN_FIELD(rmsnorm_backward, kDTypes),
    PYTRAIN_FIELD(maximum, 1),
    PYTRAIN_FIELD(exp_sum, 1),
    PYTRAIN_FIELD(softmax_columns, 1),
    PYTRAIN_FIELD(softmax_row, 1),
    PYTRAIN_FIELD(scale_columns, 1),
    PYTRAIN_FIELD(softmax_backward, 1),
    PYTRAIN_FIELD(dot, 1),
    PYTRAIN_FIELD(sum_squares, 1),
    PYTRAIN_FIELD(adamw, kDTypes),
    PYTRAIN_FIELD(peak_flops, 1),
};
#undef PYTRAIN_FIELD

constexpr std::size_t listed_pointers() {
    std::size_t count = 0;
    for (const Field& field : kFields) count += field.pointers;
    return count;
}
// Beside the pointers: a name, five sizes, low tiles (their step, and a pointer that is null where there are none),
// products of bf16 and chains of fp16, which only some tables have, with the length of a chain and whether it is taken
// (a word, with its padding). A field that is new in Kernels has to be listed above.
static_assert(sizeof(Kernels) == sizeof(const char*) + 8 * sizeof(std::int64_t) + sizeof(void (*)()) +
                                     2 * sizeof(cpu::Products) + listed_pointers() * sizeof(void (*)()));

// Names of the fields of a table in which a pointer is still the scalar one, or null.
std::vector<std::string> is_scalar(const std::string& isa) {
    const Kernels table = cpu::kernels_of(isa);
    const Kernels scalar = cpu::kernels_of("scalar");
    constexpr std::size_t size = sizeof(void (*)());
    const std::array<char, size> null{};
    std::vector<std::string> names;
    for (const Field& field : kFields) {
        bool found = false;
        for (std::size_t i = 0; i < field.pointers; ++i) {
            const char* const pointer = reinterpret_cast<const char*>(&table) + field.offset + i * size;
            const char* const other = reinterpret_cast<const char*>(&scalar) + field.offset + i * size;
            found = found || std::memcmp(pointer, other, size) == 0 || std::memcmp(pointer, null.data(), size) == 0;
        }
        if (found) names.emplace_back(field.name);
    }
    return names;
}

// Runs body(kernels) with the table of `isa`, without the GIL.
template <class Body>
auto run(const std::string& isa, const Body& body) {
    const Kernels kernels = cpu::kernels_of(isa);
    const py::gil_scoped_release release;
    return body(kernels);
}

std::int64_t same_size(const Floats& x, std::initializer_list<std::pair<const char*, const Floats*>> others) {
    for (const auto& [name, other] : others)
        check(other->size() == x.size(), name, " has ", other->size(), " elements, but the first row has ", x.size());
    return x.size();
}

Floats row_of(std::int64_t n) { return Floats(static_cast<py::ssize_t>(n)); }
Floats copy_of(const Floats& x) { return Floats(x.size(), x.data()); }
Floats copy_of_matrix(const Floats& x) { return Floats({x.shape(0), x.shape(1)}, x.data()); }

// --- storage types ------------------------------------------------------------------------------------

Floats widen(const std::string& isa, const Halves& x, const std::string& dtype) {
    const auto type = static_cast<int>(dtype_from(dtype));
    check(dtype != "fp32", "widen takes the bits of bf16 or fp16");
    Floats y = row_of(x.size());
    float* const out = y.mutable_data();
    run(isa, [&](const Kernels& kernels) { kernels.widen[type](out, x.data(), x.size()); });
    return y;
}

Halves narrow(const std::string& isa, const Floats& x, const std::string& dtype) {
    const auto type = static_cast<int>(dtype_from(dtype));
    check(dtype != "fp32", "narrow gives the bits of bf16 or fp16");
    Halves y(x.size());
    std::uint16_t* const out = y.mutable_data();
    run(isa, [&](const Kernels& kernels) { kernels.narrow[type](out, x.data(), x.size()); });
    return y;
}

Floats copy_fp32(const std::string& isa, const Floats& x, bool narrowing) {
    Floats y = row_of(x.size());
    float* const out = y.mutable_data();
    run(isa, [&](const Kernels& kernels) {
        if (narrowing)
            kernels.narrow[0](out, x.data(), x.size());
        else
            kernels.widen[0](out, x.data(), x.size());
    });
    return y;
}

// --- elementwise --------------------------------------------------------------------------------------

Floats add(const std::string& isa, const Floats& y, const Floats& x) {
    Floats sum = copy_of(y);
    float* const out = sum.mutable_data();
    const std::int64_t n = same_size(y, {{"x", &x}});
    run(isa, [&](const Kernels& kernels) { kernels.add(out, x.data(), n); });
    return sum;
}

Floats scale(const std::string& isa, const Floats& y, float factor) {
    Floats product = copy_of(y);
    float* const out = product.mutable_data();
    run(isa, [&](const Kernels& kernels) { kernels.scale(out, factor, y.size()); });
    return product;
}

Floats gelu_forward(const std::string& isa, const Floats& x) {
    Floats y = row_of(x.size());
    float* const out = y.mutable_data();
    run(isa, [&](const Kernels& kernels) { kernels.gelu_forward[kFp32](out, x.data(), x.size()); });
    return y;
}

py::tuple gelu_backward(const std::string& isa, const Floats& dy, const Floats& x) {
    Floats dx = row_of(x.size());
    Floats y = row_of(x.size());
    float* const out = dx.mutable_data();
    float* const again = y.mutable_data();
    const std::int64_t n = same_size(x, {{"dy", &dy}});
    run(isa, [&](const Kernels& kernels) { kernels.gelu_backward[kFp32](out, again, dy.data(), x.data(), n); });
    return py::make_tuple(dx, y);
}

Floats swiglu_forward(const std::string& isa, const Floats& gate, const Floats& up) {
    const std::int64_t n = same_size(gate, {{"up", &up}});
    Floats y = row_of(n);
    float* const out = y.mutable_data();
    run(isa, [&](const Kernels& kernels) { kernels.swiglu_forward[kFp32](out, gate.data(), up.data(), n); });
    return y;
}

py::tuple swiglu_backward(const std::string& isa, const Floats& dy, const Floats& gate, const Floats& up) {
    const std::int64_t n = same_size(gate, {{"up", &up}, {"dy", &dy}});
    Floats dgate = row_of(n);
    Floats dup = row_of(n);
    Floats y = row_of(n);
    float* const again = y.mutable_data();
    float* const gate_out = dgate.mutable_data();
    float* const up_out = dup.mutable_data();
    run(isa, [&](const Kernels& kernels) {
        kernels.swiglu_backward[kFp32](gate_out, up_out, again, dy.data(), gate.data(), up.data(), n);
    });
    return py::make_tuple(dgate, dup, y);
}

Floats rope(const std::string& isa, const Floats& x, const Floats& cos_sin, float sign) {
    check(x.ndim() == 2 && cos_sin.ndim() == 2 && cos_sin.shape(1) == 2 && cos_sin.shape(0) == x.shape(1) / 2,
          "rope needs x (heads, head_size) and cos_sin (head_size/2, 2)");
    Floats y({x.shape(0), x.shape(1)}, x.data());
    float* const out = y.mutable_data();
    run(isa, [&](const Kernels& kernels) { kernels.rope[kFp32](out, cos_sin.data(), x.shape(0), x.shape(1), sign); });
    return y;
}

// --- norms --------------------------------------------------------------------------------------------

py::tuple layernorm_forward(const std::string& isa, const Floats& x, const Floats& weight, const Floats& bias,
                            float eps) {
    const std::int64_t n = same_size(x, {{"weight", &weight}, {"bias", &bias}});
    Floats y = row_of(n);
    float* const out = y.mutable_data();
    float mean = 0.0f;
    float rstd = 0.0f;
    run(isa, [&](const Kernels& kernels) {
        kernels.layernorm_forward[kFp32](out, &mean, &rstd, x.data(), weight.data(), bias.data(), 1, n, eps);
    });
    return py::make_tuple(y, mean, rstd);
}

py::tuple layernorm_backward(const std::string& isa, const Floats& dx, const Floats& dweight, const Floats& dbias,
                             const Floats& dy, const Floats& x, const Floats& weight, float mean, float rstd) {
    const std::int64_t n =
        same_size(x, {{"dx", &dx}, {"dweight", &dweight}, {"dbias", &dbias}, {"dy", &dy}, {"weight", &weight}});
    Floats dx_sum = copy_of(dx);
    Floats dweight_sum = copy_of(dweight);
    Floats dbias_sum = copy_of(dbias);
    float* const x_out = dx_sum.mutable_data();
    float* const weight_out = dweight_sum.mutable_data();
    float* const bias_out = dbias_sum.mutable_data();
    run(isa, [&](const Kernels& kernels) {
        kernels.layernorm_backward[kFp32](x_out, weight_out, bias_out, dy.data(), x.data(), weight.data(), &mean, &rstd,
                                          1, n);
    });
    return py::make_tuple(dx_sum, dweight_sum, dbias_sum);
}

py::tuple rmsnorm_forward(const std::string& isa, const Floats& x, const Floats& weight, float eps) {
    const std::int64_t n = same_size(x, {{"weight", &weight}});
    Floats y = row_of(n);
    float* const out = y.mutable_data();
    float rstd = 0.0f;
    run(isa, [&](const Kernels& kernels) {
        kernels.rmsnorm_forward[kFp32](out, &rstd, x.data(), weight.data(), 1, n, eps);
    });
    return py::make_tuple(y, rstd);
}

py::tuple rmsnorm_backward(const std::string& isa, const Floats& dx, const Floats& dweight, const Floats& dy,
                           const Floats& x, const Floats& weight, float rstd) {
    const std::int64_t n = same_size(x, {{"dx", &dx}, {"dweight", &dweight}, {"dy", &dy}, {"weight", &weight}});
    Floats dx_sum = copy_of(dx);
    Floats dweight_sum = copy_of(dweight);
    float* const x_out = dx_sum.mutable_data();
    float* const weight_out = dweight_sum.mutable_data();
    run(isa, [&](const Kernels& kernels) {
        kernels.rmsnorm_backward[kFp32](x_out, weight_out, dy.data(), x.data(), weight.data(), &rstd, 1, n);
    });
    return py::make_tuple(dx_sum, dweight_sum);
}

// --- softmax pieces -----------------------------------------------------------------------------------

float maximum(const std::string& isa, const Floats& x) {
    return run(isa, [&](const Kernels& kernels) { return kernels.maximum(x.data(), x.size()); });
}

py::tuple exp_sum(const std::string& isa, const Floats& x, float factor, float shift) {
    Floats y = row_of(x.size());
    float* const out = y.mutable_data();
    const float sum = run(
        isa, [&](const Kernels& kernels) { return kernels.exp_sum(out, x.data(), x.data(), factor, shift, x.size()); });
    return py::make_tuple(y, sum);
}

// x (rows, columns), maximum and denominator (columns) -> all three carried on, factor, whether a maximum changed
py::tuple softmax_columns(const std::string& isa, const Floats& x, const Floats& maximum, const Floats& denominator,
                          float factor) {
    if (x.ndim() != 2 || maximum.size() != x.shape(1) || denominator.size() != x.shape(1))
        throw Error("softmax_columns needs x (rows, columns) and statistics (columns)");
    Floats weights = copy_of_matrix(x), largest = copy_of(maximum), sum = copy_of(denominator),
           shrink = row_of(x.shape(1));
    float *const x_out = weights.mutable_data(), *const maximum_out = largest.mutable_data();
    float *const sum_out = sum.mutable_data(), *const shrink_out = shrink.mutable_data();
    const bool changed = run(isa, [&](const Kernels& kernels) {
        return kernels.softmax_columns(x_out, maximum_out, sum_out, shrink_out, factor, x.shape(0), x.shape(1));
    });
    return py::make_tuple(weights, largest, sum, shrink, changed);
}

Floats scale_columns(const std::string& isa, const Floats& y, const Floats& factor) {
    if (y.ndim() != 2 || factor.size() != y.shape(1))
        throw Error("scale_columns needs y (rows, columns) and factors (columns)");
    Floats result = copy_of_matrix(y);
    float* const out = result.mutable_data();
    run(isa, [&](const Kernels& kernels) { kernels.scale_columns(out, factor.data(), y.shape(0), y.shape(1)); });
    return result;
}

py::tuple softmax_backward(const std::string& isa, const Floats& dp, const Floats& scores, float lse, float delta,
                           float factor) {
    Floats result = copy_of(dp), p = copy_of(scores);
    float *const out = result.mutable_data(), *const p_out = p.mutable_data();
    const std::int64_t n = same_size(dp, {{"scores", &scores}});
    run(isa, [&](const Kernels& kernels) { kernels.softmax_backward(out, p_out, lse, delta, factor, n); });
    return py::make_tuple(result, p);
}

float dot(const std::string& isa, const Floats& x, const Floats& y) {
    const std::int64_t n = same_size(x, {{"y", &y}});
    return run(isa, [&](const Kernels& kernels) { return kernels.dot(x.data(), y.data(), n); });
}

// --- optimizer ----------------------------------------------------------------------------------------

double sum_squares(const std::string& isa, const Floats& x) {
    return run(isa, [&](const Kernels& kernels) { return kernels.sum_squares(x.data(), x.size()); });
}

py::tuple adamw(const std::string& isa, const Floats& master, const Floats& m, const Floats& v, const Floats& gradient,
                const std::array<float, 9>& row) {
    const std::int64_t n = same_size(master, {{"m", &m}, {"v", &v}, {"gradient", &gradient}});
    Floats new_master = copy_of(master);
    Floats new_m = copy_of(m);
    Floats new_v = copy_of(v);
    float* const master_out = new_master.mutable_data();
    float* const m_out = new_m.mutable_data();
    float* const v_out = new_v.mutable_data();
    const cpu::AdamWRow options = {row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8]};
    run(isa, [&](const Kernels& kernels) {
        kernels.adamw[kFp32](nullptr, master_out, m_out, v_out, gradient.data(), n, &options);
    });
    return py::make_tuple(new_master, new_m, new_v);
}

// --- what runs here -----------------------------------------------------------------------------------

std::vector<std::string> tables() {
    std::vector<std::string> names;
    for (const cpu::Isa& isa : cpu::list_isas(cpu::detect_features()))
        if (isa.available()) names.emplace_back(isa.name);
    return names;
}

py::list isas() {
    py::list list;
    for (const cpu::Isa& isa : cpu::list_isas(cpu::detect_features())) {
        py::dict entry;
        entry["name"] = isa.name;
        entry["needs"] = isa.needs;
        entry["built"] = isa.built();
        entry["supported"] = isa.supported;
        list.append(entry);
    }
    return list;
}

py::dict features() {
    const cpu::Features found = cpu::detect_features();
    py::dict result;
    result["avx2"] = found.avx2;
    result["avx512"] = found.avx512;
    result["avx512_bf16"] = found.avx512_bf16;
    result["neon"] = found.neon;
    result["sve"] = found.sve;
    result["neon_bf16"] = found.neon_bf16;
    result["sve_bf16"] = found.sve_bf16;
    result["a64fx"] = found.a64fx;
    result["vector_bits"] = found.vector_bits;
    result["l1_data"] = found.l1_data;
    result["l2"] = found.l2;
    result["l3"] = found.l3;
    result["cache_line"] = found.cache_line;
    result["l2_cores"] = found.l2_cores;
    result["affinity_cores"] = found.affinity_cores;
    return result;
}

py::dict block_sizes(const std::string& isa, const std::string& dtype) {
    const DType type = dtype_from(dtype);
    const cpu::Products products = cpu::kernels_of(isa).products(type, type);
    py::dict sizes;
    sizes["word_depth"] = products.word_depth;
    sizes["step_words"] = products.step_words;
    sizes["tile_rows"] = products.tile_rows;
    sizes["tile_columns"] = products.tile_columns;
    sizes["block_rows"] = products.block_rows;
    sizes["block_depth"] = products.block_depth;
    sizes["block_columns"] = products.block_columns;
    return sizes;
}

// The thread that ran each task; task `failing` throws. For tests of parallel_for.
std::vector<int> parallel_tasks(int threads, std::int64_t tasks, std::int64_t failing) {
    std::vector<int> ran(static_cast<std::size_t>(tasks), -1);
    cpu::parallel_for(threads, tasks, [&](std::int64_t task, int thread) {
        check(task != failing, "task ", task, " failed on purpose");
        ran[static_cast<std::size_t>(task)] = thread;
    });
    return ran;
}

void bind_rows(py::module_& kernels) {
    using py::arg;
    kernels.def("widen", widen, arg("isa"), arg("x"), arg("dtype"), "x: uint16 bits of bf16 or fp16 -> float32");
    kernels.def("narrow", narrow, arg("isa"), arg("x"), arg("dtype"), "float32 -> uint16 bits of bf16 or fp16");
    kernels.def("copy_fp32", copy_fp32, arg("isa"), arg("x"), arg("narrowing"));
    kernels.def("add", add, arg("isa"), arg("y"), arg("x"));
    kernels.def("scale", scale, arg("isa"), arg("y"), arg("factor"));
    kernels.def("gelu_forward", gelu_forward, arg("isa"), arg("x"));
    kernels.def("gelu_backward", gelu_backward, arg("isa"), arg("dy"), arg("x"), "-> dx, y");
    kernels.def("swiglu_forward", swiglu_forward, arg("isa"), arg("gate"), arg("up"));
    kernels.def("swiglu_backward", swiglu_backward, arg("isa"), arg("dy"), arg("gate"), arg("up"), "-> dgate, dup, y");
    kernels.def("rope", rope, arg("isa"), arg("x"), arg("cos_sin"), arg("sign"));
    kernels.def("layernorm_forward", layernorm_forward, arg("isa"), arg("x"), arg("weight"), arg("bias"), arg("eps"),
                "-> y, mean, rstd");
    kernels.def("layernorm_backward", layernorm_backward, arg("isa"), arg("dx"), arg("dweight"), arg("dbias"),
                arg("dy"), arg("x"), arg("weight"), arg("mean"), arg("rstd"), "-> the three sums");
    kernels.def("rmsnorm_forward", rmsnorm_forward, arg("isa"), arg("x"), arg("weight"), arg("eps"), "-> y, rstd");
    kernels.def("rmsnorm_backward", rmsnorm_backward, arg("isa"), arg("dx"), arg("dweight"), arg("dy"), arg("x"),
                arg("weight"), arg("rstd"), "-> the two sums");
    kernels.def("maximum", maximum, arg("isa"), arg("x"));
    kernels.def("exp_sum", exp_sum, arg("isa"), arg("x"), arg("scale"), arg("shift"),
                "-> exp(scale*x - shift), its sum");
    kernels.def("softmax_columns", softmax_columns, arg("isa"), arg("x"), arg("maximum"), arg("denominator"),
                arg("scale"));
    kernels.def("scale_columns", scale_columns, arg("isa"), arg("y"), arg("factor"));
    kernels.def("softmax_backward", softmax_backward, arg("isa"), arg("dp"), arg("scores"), arg("lse"), arg("delta"),
                arg("scale"));
    kernels.def("dot", dot, arg("isa"), arg("x"), arg("y"));
    kernels.def("sum_squares", sum_squares, arg("isa"), arg("x"));
    kernels.def("adamw", adamw, arg("isa"), arg("master"), arg("m"), arg("v"), arg("gradient"), arg("row"),
                "row: the nine fields of AdamWRow -> master, m, v");
}

}  // namespace

void bind_kernels(py::module_& module) {
    using py::arg;
    py::module_ kernels =
        module.def_submodule("kernels", "Kernels of one instruction set at a time; see native/cpu/kernels.h.");
    kernels.def("tables", tables, "Names of the instruction sets that can run here, best first.");
    kernels.def(
        "chosen", [] { return std::string(cpu::chosen_kernels().name); },
        "The one in use; raises Error for a wrong PYTRAIN_ISA.");
    kernels.def("isas", isas, "What pytrain knows for this architecture: name, needs, built, supported; best first.");
    kernels.def("is_scalar", is_scalar, arg("isa"), "Fields of the table that are still the scalar one's, or null.");
    kernels.def("block_sizes", block_sizes, arg("isa"), arg("dtype") = "fp32",
                "Tile and cache block sizes of products of this type, in elements.");
    kernels.def("features", features,
                "What the CPU and the affinity mask offer; cache sizes in bytes, 0 where unknown.");
    kernels.def("default_threads", cpu::default_threads, "OMP_NUM_THREADS, or the cores of the affinity mask.");
    kernels.def("set_default_threads", cpu::set_default_threads, arg("threads"),
                "What default_threads answers from now on, on this thread; devices made before keep their number.");
    kernels.def("parallel_tasks", parallel_tasks, arg("threads"), arg("tasks"), arg("failing") = -1, Gil());
    kernels.def("philox", philox, arg("counter"), arg("key"), "Four 32-bit words of Philox4x32-10.");
    kernels.def("philox_normals", philox_normals, arg("seed"), arg("key"), arg("block"),
                "Elements 4*block .. 4*block+3, float64.");
    bind_rows(kernels);
}

}  // namespace pytrain
