#include <memory>
#include <type_traits>

#include "bindings/bind.h"
#include "bindings/flat_range.h"
#include "model/stage.h"

namespace py = pybind11;

namespace pytrain {

namespace {
Recompute recompute_from(const std::string& name) {
    if (name == "none") return Recompute::none;
    if (name == "selective") return Recompute::selective;
    check(name == "full", "recompute policy '", name, "' is not one of none, selective, full");
    return Recompute::full;
}

Pass pass_from(const std::string& name) {
    check(name == "train" || name == "evaluate", "pass '", name, "' is not one of train, evaluate");
    return name == "train" ? Pass::train : Pass::evaluate;
}

StageConfig config_from(std::int64_t first_op, std::int64_t last_op, std::int64_t batch, std::int64_t length,
                        const std::vector<std::string>& recompute, std::int64_t tp_rank, std::int64_t tp_size,
                        std::int64_t slots, bool training, bool defer_weight, std::int64_t head_chunk,
                        bool sequence_parallel, std::int64_t gradient_shards) {
    StageConfig config{};
    config.first_op = first_op, config.last_op = last_op;
    config.batch = batch, config.length = length;
    for (const std::string& name : recompute) config.recompute.push_back(recompute_from(name));
    config.tp_rank = tp_rank, config.tp_size = tp_size;
    config.slots = slots, config.training = training, config.defer_weight = defer_weight,
    config.head_chunk = head_chunk, config.sequence_parallel = sequence_parallel,
    config.gradient_shards = gradient_shards;
    return config;
}

py::list arena_table(const Arena& arena) {
    py::list rows;
    for (const ArenaEntry& entry : arena.entries) {
        py::dict row;
        row["name"] = entry.name;
        row["lifetime"] = name_of(entry.lifetime);
        row["bytes"] = entry.bytes;
        row["copies"] = entry.copies;
        rows.append(row);
    }
    return rows;
}

std::unique_ptr<Buffer> gradient_buffer(Stage& stage, std::int64_t bucket) {
    const std::vector<Place>& places = stage.arena().gradients;
    if (places.empty() || places.at(static_cast<std::size_t>(bucket)).offset == kNone) return nullptr;
    const std::int64_t shards = stage.config().gradient_shards;
    const Tensor part = stage.at(places[static_cast<std::size_t>(bucket)], 0, stage.policy().gradients);
    return std::make_unique<Buffer>(stage.device(), stage.layout().shard_elements(bucket, shards) * shards, part,
                                    MemoryKind::activations);
}

// A method of Stage without the GIL, which returns when the device is done.
template <class Result, class... Arguments>
auto finished(Result (Stage::*method)(Arguments...)) {
    return [method](Stage& stage, Arguments... arguments) -> Result {
        const py::gil_scoped_release release;
        if constexpr (std::is_void_v<Result>) {
            (stage.*method)(arguments...);
            finish(stage.device());
        } else {
            const Result result = (stage.*method)(arguments...);
            finish(stage.device());
            return result;
        }
    };
}

// (rows of the residual stream that are here, hidden)
py::array stream_view(const py::object& self, Tensor tensor) {
    const Stage& stage = self.cast<const Stage&>();
    return view(tensor, {stage.stream().size(), stage.shape().hidden}, self);
}

// (rows, hidden)
py::array rows_view(const py::object& self, Tensor tensor) {
    const Stage& stage = self.cast<const Stage&>();
    return view(tensor, {stage.config().batch * stage.config().length, stage.shape().hidden}, self);
}

py::array integer_view(const py::object& self, const Place& place, std::int64_t slot) {
    const Stage& stage = self.cast<const Stage&>();
    return py::array(py::dtype::of<std::int32_t>(),
                     std::vector<py::ssize_t>{stage.config().batch * stage.config().length},
                     stage.integers(place, slot), self);
}

void bind_arena(py::module_& module) {
    module.def(
        "plan_arena",
        [](const Shape& shape, const Policy& policy, std::int64_t first_op, std::int64_t last_op, std::int64_t batch,
           std::int64_t length, const std::vector<std::string>& recompute, std::int64_t tp_rank, std::int64_t tp_size,
           std::int64_t slots, bool training, bool defer_weight, std::int64_t head_chunk, bool sequence_parallel,
           std::int64_t gradient_shards) {
            const Arena arena(shape, policy,
                              config_from(first_op, last_op, batch, length, recompute, tp_rank, tp_size, slots,
                                          training, defer_weight, head_chunk, sequence_parallel, gradient_shards));
            return py::make_tuple(arena.bytes, arena_table(arena));
        },
        py::arg("shape"), py::arg("policy"), py::kw_only(), py::arg("first_op"), py::arg("last_op"), py::arg("batch"),
        py::arg("length"), py::arg("recompute"), py::arg("tp_rank") = 0, py::arg("tp_size") = 1, py::arg("slots") = 1,
        py::arg("training") = true, py::arg("defer_weight") = false, py::arg("head_chunk") = 0,
        py::arg("sequence_parallel") = false, py::arg("gradient_shards") = 0,
        "(bytes, table) of the arena a Stage of these arguments would allocate");
}

using PythonStage = py::class_<Stage>;

// What it is made of.
void bind_facts(PythonStage& stage) {
    stage
        .def(py::init([](Device& device, const Shape& shape, const Policy& policy, std::int64_t first_op,
                         std::int64_t last_op, std::int64_t batch, std::int64_t length,
                         const std::vector<std::string>& recompute, std::int64_t tp_rank, std::int64_t tp_size,
                         std::int64_t slots, bool training, bool defer_weight, std::int64_t head_chunk,
                         bool sequence_parallel, std::int64_t gradient_shards) {
                 return new Stage(device, shape, policy,
                                  config_from(first_op, last_op, batch, length, recompute, tp_rank, tp_size, slots,
                                              training, defer_weight, head_chunk, sequence_parallel, gradient_shards));
             }),
             py::arg("device"), py::arg("shape"), py::arg("policy"), py::kw_only(), py::arg("first_op"),
             py::arg("last_op"), py::arg("batch"), py::arg("length"), py::arg("recompute"), py::arg("tp_rank") = 0,
             py::arg("tp_size") = 1, py::arg("slots") = 1, py::arg("training") = true, py::arg("defer_weight") = false,
             py::arg("head_chunk") = 0, py::arg("sequence_parallel") = false, py::arg("gradient_shards") = 0,
             py::keep_alive<1, 2>())
        .def_property_readonly("layout", &Stage::layout, py::return_value_policy::reference_internal)
        .def_property_readonly("first_op", [](const Stage& stage) { return stage.config().first_op; })
        .def_property_readonly("last_op", [](const Stage& stage) { return stage.config().last_op; })
        .def_property_readonly("slots", [](const Stage& stage) { return stage.config().slots; })
        .def_property_readonly(
            "head_chunk", [](const Stage& stage) { return stage.arena().head_chunk; }, "rows of logits at a time")
        .def_property_readonly("arena_bytes", [](const Stage& stage) { return stage.arena().bytes; })
        .def_property_readonly("arena_table", [](const Stage& stage) { return arena_table(stage.arena()); });
}

// Where its weights and gradients lie.
void bind_buffers(PythonStage& stage) {
    stage
        .def(
            "bind_weights",
            [](Stage& stage, std::int64_t bucket, std::uintptr_t address) {
                stage.parameters().bind_weights(bucket, reinterpret_cast<void*>(address));
            },
            py::arg("bucket"), py::arg("address"),
            "address of the bucket's flat range (Buffer.address), 0 for none; the caller keeps it alive")
        .def(
            "bind_gradients",
            [](Stage& stage, std::int64_t bucket, std::uintptr_t address) {
                stage.parameters().bind_gradients(bucket, reinterpret_cast<void*>(address));
            },
            py::arg("bucket"), py::arg("address"))
        .def("gradient_buffer", &gradient_buffer, py::arg("bucket"), py::keep_alive<0, 1>(),
             "The gradients of a bucket where they lie in the arena, bound already; None where they lie elsewhere.")
        .def("overwrite_gradients", &Stage::overwrite_gradients,
             "From here on the first gradient of each tensor takes the place of what is there, instead of adding to "
             "it.");
}

// What it does: ranges of ops.
void bind_calls(PythonStage& stage) {
    stage
        .def(
            "forward",
            [](Stage& stage, std::int64_t slot, std::int64_t begin, std::int64_t end, const std::string& pass) {
                const Pass kind = pass_from(pass);
                py::gil_scoped_release release;
                stage.forward(slot, begin, end, kind);
                finish(stage.device());
            },
            py::arg("slot"), py::arg("begin"), py::arg("end"), py::arg("pass_") = "train")
        .def("finish_forward", finished(&Stage::finish_forward), py::arg("slot"))
        .def("finish_segment", finished(&Stage::finish_segment), py::arg("slot"), py::arg("op"))
        .def("backward", finished(&Stage::backward), py::arg("slot"), py::arg("begin"), py::arg("end"))
        .def("backward_input", finished(&Stage::backward_input), py::arg("slot"), py::arg("begin"), py::arg("end"))
        .def("backward_weight", finished(&Stage::backward_weight), py::arg("slot"), py::arg("begin"), py::arg("end"))
        .def("recompute", finished(&Stage::recompute), py::arg("slot"), py::arg("begin"), py::arg("end"));
}

// What the caller writes before a forward pass, and what a stage hands to its neighbour.
void bind_inputs(PythonStage& stage) {
    stage
        .def(
            "tokens",
            [](const py::object& self, std::int64_t slot) {
                return integer_view(self, self.cast<Stage&>().arena().tokens, slot);
            },
            py::arg("slot"))
        .def(
            "targets",
            [](const py::object& self, std::int64_t slot) {
                return integer_view(self, self.cast<Stage&>().arena().targets, slot);
            },
            py::arg("slot"))
        .def(
            "positions",
            [](const py::object& self, std::int64_t slot) {
                return integer_view(self, self.cast<Stage&>().arena().positions, slot);
            },
            py::arg("slot"))
        .def(
            "document_starts",
            [](const py::object& self, std::int64_t slot) {
                return integer_view(self, self.cast<Stage&>().arena().document_starts, slot);
            },
            py::arg("slot"))
        .def(
            "input",
            [](const py::object& self, std::int64_t slot) {
                return stream_view(self, self.cast<Stage&>().input(slot));
            },
            py::arg("slot"))
        .def(
            "output",
            [](const py::object& self, std::int64_t slot) {
                const Stage& stage = self.cast<Stage&>();
                return stream_view(self, stage.at(stage.arena().output, slot, stage.policy().activations));
            },
            py::arg("slot"));
}

// What ranks exchange at the cuts of tensor parallelism.
void bind_cuts(PythonStage& stage) {
    stage
        .def_property_readonly(
            "dresidual",
            [](const py::object& self) {
                const Stage& stage = self.cast<Stage&>();
                return stream_view(self, stage.dresidual());
            },
            "gradient of the residual stream: of the stage's output before backward, of its input after")
        .def_property_readonly(
            "dnorm",
            [](const py::object& self) {
                const Stage& stage = self.cast<Stage&>();
                return rows_view(self, stage.at(stage.arena().dnorm, 0, stage.policy().activations));
            },
            "backward cut: this rank's part of the gradient of a norm's output")
        .def_property_readonly(
            "partial",
            [](const py::object& self) {
                const Stage& stage = self.cast<Stage&>();
                return rows_view(self, stage.at(stage.arena().partial, 0, stage.policy().activations));
            },
            "forward cut: this rank's part of a row-parallel product")
        .def_property_readonly(
            "gathered",
            [](const py::object& self) {
                const Stage& stage = self.cast<Stage&>();
                return rows_view(self, stage.at(stage.arena().gathered, 0, stage.policy().activations));
            },
            "sequence parallelism: a norm's output, of which this rank wrote its rows")
        .def("rebuild_gathered", finished(&Stage::rebuild_gathered), py::arg("slot"), py::arg("op"),
             "write this rank's rows of what op multiplies with; False: `gathered` has all of them")
        .def(
            "dresidual_rows",
            [](const py::object& self, std::int64_t slot, std::int64_t op, bool late) {
                Stage& stage = self.cast<Stage&>();
                Tensor rows;
                {
                    const py::gil_scoped_release release;
                    rows = stage.dresidual_rows(slot, op, late);
                    finish(stage.device());
                }
                return rows_view(self, rows);
            },
            py::arg("slot"), py::arg("op"), py::arg("late") = false,
            "sequence parallelism: gradient of what op gives, all rows, of which this rank's are there")
        .def_property_readonly(
            "stream_rows", [](const Stage& stage) { return py::make_tuple(stage.stream().begin, stage.stream().end); },
            "rows of the residual stream that are here, (begin, end)");
}

// What the head leaves for the loss and the optimizer.
void bind_results(PythonStage& stage) {
    stage
        .def(
            "statistics",
            [](const py::object& self, std::int64_t slot) {
                const Stage& stage = self.cast<Stage&>();
                const StageConfig& config = stage.config();
                return view(stage.at(stage.arena().statistics, slot, DType::fp32),
                            {config.tp_size, config.batch * config.length, kHeadStatistics}, self);
            },
            py::arg("slot"),
            "(tp_size, rows, 3): this rank fills its own, the caller gathers the others before the loss")
        .def_property_readonly(
            "scalars",
            [](const py::object& self) {
                return py::array(py::dtype::of<double>(),
                                 std::vector<py::ssize_t>{sizeof(StepScalars) / sizeof(double)},
                                 self.cast<Stage&>().scalars(), self);
            },
            "(6,) float64: loss_sum, target_count, gradient_norm, clip_factor, finite, gradient_scale");
}
}  // namespace

void bind_stage(py::module_& module) {
    bind_arena(module);
    PythonStage stage(module, "Stage", "A range of ops on one rank; see native/model/stage.h.");
    bind_facts(stage);
    bind_buffers(stage);
    bind_calls(stage);
    bind_inputs(stage);
    bind_cuts(stage);
    bind_results(stage);
}

}  // namespace pytrain
