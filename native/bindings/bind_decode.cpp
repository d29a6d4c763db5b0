#include "bindings/bind.h"
#include "model/decode.h"

namespace py = pybind11;

namespace pytrain {

void bind_decode(py::module_& module) {
    py::class_<Decoder>(module, "Decoder", "Generation with a cache of keys and values; see native/model/decode.h.")
        .def(py::init([](Device& device, const Shape& shape, const Policy& policy, std::int64_t capacity,
                         std::int64_t batch, std::int64_t chunk, std::int64_t tp_rank, std::int64_t tp_size) {
                 DecoderConfig config{};
                 config.tp_rank = tp_rank, config.tp_size = tp_size, config.batch = batch, config.capacity = capacity,
                 config.chunk = chunk;
                 return new Decoder(device, shape, policy, config);
             }),
             py::arg("device"), py::arg("shape"), py::arg("policy"), py::kw_only(), py::arg("capacity"),
             py::arg("batch") = 1, py::arg("chunk") = 128, py::arg("tp_rank") = 0, py::arg("tp_size") = 1,
             py::keep_alive<1, 2>())
        .def_property_readonly(
            "layout", [](Decoder& decoder) -> const Layout& { return decoder.parameters().layout(); },
            py::return_value_policy::reference_internal)
        .def_property_readonly("length", &Decoder::length)
        .def_property_readonly("capacity", [](const Decoder& decoder) { return decoder.config().capacity; })
        .def_property_readonly("chunk", [](const Decoder& decoder) { return decoder.config().chunk; })
        .def_property_readonly("op_count", &Decoder::op_count)
        .def(
            "bind_weights",
            [](Decoder& decoder, std::int64_t bucket, std::uintptr_t address) {
                decoder.parameters().bind_weights(bucket, reinterpret_cast<void*>(address));
            },
            py::arg("bucket"), py::arg("address"))
        .def(
            "feed",
            [](Decoder& decoder, const py::array_t<std::int32_t, py::array::c_style>& tokens) {
                check(tokens.ndim() == 2 && tokens.shape(0) == decoder.config().batch,
                      "tokens must be (batch, count) with batch ", decoder.config().batch);
                decoder.feed(tokens.data(), tokens.shape(1));
            },
            py::arg("tokens"), "(batch, count) int32")
        .def(
            "forward",
            [](Decoder& decoder, std::int64_t begin, std::int64_t end) {
                decoder.forward(begin, end);
                finish(decoder.device());
            },
            py::arg("begin"), py::arg("end"), Gil())
        .def(
            "logits",
            [](const py::object& self) {
                Decoder& decoder = self.cast<Decoder&>();
                const float* logits = nullptr;
                {
                    py::gil_scoped_release release;
                    logits = decoder.logits();
                    finish(decoder.device());
                }
                return py::array(py::dtype::of<float>(),
                                 std::vector<py::ssize_t>{decoder.rows(), decoder.vocabulary().size()}, logits, self);
            },
            "(batch * count, vocabulary slice) float32 of the tokens just fed; valid until the next feed")
        .def_property_readonly("partial",
                               [](const py::object& self) {
                                   const Decoder& decoder = self.cast<Decoder&>();
                                   check(static_cast<bool>(decoder.partial()),
                                         "a decoder of one tensor-parallel rank has no partial products");
                                   return view(decoder.partial(), {decoder.rows(), decoder.hidden()}, self);
                               })
        .def("finish", &Decoder::finish)
        .def("rewind", &Decoder::rewind, py::arg("length"));
}

}  // namespace pytrain
