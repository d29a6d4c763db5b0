#include <string>
#include <string_view>

#include "bindings/bind.h"
#include "bindings/flat_range.h"
#include "core/buffer.h"

namespace py = pybind11;

namespace pytrain {

namespace {
MemoryKind kind_from(const std::string& name) {
    for (int i = 0; i < static_cast<int>(MemoryKind::count); ++i)
        if (name == name_of(static_cast<MemoryKind>(i))) return static_cast<MemoryKind>(i);
    throw Error(message("memory kind '", name, "' is not known"));
}
}  // namespace

void bind_core(py::module_& module) {
    py::register_exception<Error>(module, "Error", PyExc_ValueError);
    py::class_<Device>(
        module, "Device",
        "What a model asks of a device; see native/device.h. Operations take C-contiguous float32 arrays, "
        "or uint16 ones that hold\n"
        "`half` (bf16 or fp16), and write their results into the arrays given; matrices may have strided "
        "rows where said. Wrong shapes,\n"
        "types or indices raise Error, which names the argument. They return when they are done.")
        .def_property_readonly("name", &Device::name)
        .def(
            "bytes_in_use",
            [](const Device& device, const std::string& kind) { return device.bytes_in_use(kind_from(kind)); },
            py::arg("kind"))
        .def(
            "bytes_peak",
            [](const Device& device, const std::string& kind) { return device.bytes_peak(kind_from(kind)); },
            py::arg("kind"))
        .def_property_readonly_static("memory_kinds", [](const py::object&) {
            py::list names;
            for (int i = 0; i < static_cast<int>(MemoryKind::count); ++i)
                names.append(name_of(static_cast<MemoryKind>(i)));
            return names;
        });
    module.def(
        "hip_device", &make_hip_device, py::arg("index"),
        "GPU `index` of those that are visible, as a Device; Error where this build has no HIP, or no GPU is there.");
    py::class_<Buffer>(
        module, "Buffer",
        "A typed flat range of device memory, zeroed, counted by kind; some are parts of a stage's arena.")
        .def(py::init([](Device& device, std::int64_t elements, const std::string& dtype, const std::string& kind) {
                 return new Buffer(device, elements, dtype, kind_from(kind));
             }),
             py::arg("device"), py::arg("elements"), py::arg("dtype"), py::arg("kind"), py::keep_alive<1, 2>())
        .def_property_readonly("elements", &Buffer::elements)
        .def_property_readonly("kind", &Buffer::kind)
        .def_property_readonly("dtype", [](const Buffer& buffer) { return name_of(buffer.tensor().dtype); })
        .def_property_readonly(
            "address", [](const Buffer& buffer) { return reinterpret_cast<std::uintptr_t>(buffer.tensor().data); })
        .def_property_readonly(
            "array",
            [](const py::object& self) {
                const Buffer& buffer = self.cast<const Buffer&>();
                return view(buffer.tensor(), {static_cast<py::ssize_t>(buffer.elements())}, self);
            },
            "(elements,) float32, or uint16 holding bf16 or fp16 bits; shares the buffer's memory")
        .def_property_readonly(
            "__cuda_array_interface__",
            [](const Buffer& buffer) {
                if (!buffer.on_gpu()) throw py::attribute_error("this buffer is not on a GPU");
                py::dict interface;
                interface["shape"] = py::make_tuple(buffer.elements());
                interface["typestr"] = buffer.tensor().dtype == DType::fp32 ? "<f4" : "<u2";
                interface["data"] = py::make_tuple(reinterpret_cast<std::uintptr_t>(buffer.tensor().data), false);
                interface["strides"] = py::none();
                interface["stream"] = py::none();  // operations called from Python are done when they return
                interface["version"] = 3;
                return interface;
            },
            "For a GPU-aware MPI (mpi4py takes it), version 3; AttributeError on the CPU.");
}

}  // namespace pytrain
