#include <string>
#include <string_view>

#include "bindings/bind.h"
#include "bindings/dlpack.h"
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

// Pinned host memory of a device, as bytes: what copies on its queues and an MPI that knows no GPUs may use.
class PinnedBuffer {
public:
    PinnedBuffer(Device& device, std::int64_t bytes) : device_(device), bytes_(bytes) {
        check(bytes >= 0, "a buffer of ", bytes, " bytes cannot be");
        data_ = device.allocate_pinned(static_cast<std::size_t>(bytes));
    }
    ~PinnedBuffer() { device_.release_pinned(data_); }
    PinnedBuffer(const PinnedBuffer&) = delete;
    PinnedBuffer& operator=(const PinnedBuffer&) = delete;

    std::int64_t bytes() const { return bytes_; }
    void* data() const { return data_; }

private:
    Device& device_;
    std::int64_t bytes_;
    void* data_ = nullptr;
};

// All copies that a device's communication queue was given so far.
class StartedCopies {
public:
    explicit StartedCopies(Device& device) : device_(device), event_(device.record(device.communication_queue())) {}
    ~StartedCopies() { device_.release(event_); }
    StartedCopies(const StartedCopies&) = delete;
    StartedCopies& operator=(const StartedCopies&) = delete;

    bool done() { return device_.done(event_); }
    void wait() { device_.synchronize(event_); }

private:
    Device& device_;
    Event* event_;
};

py::capsule lend(const py::object& self, const py::object& max_version, const py::object& dl_device,
                 const py::object& copy) {
    const Buffer& buffer = self.cast<const Buffer&>();
    const dlpack::DLDevice device = buffer.dlpack_device();
    const bool elsewhere = !dl_device.is_none() &&
                           !dl_device.equal(py::make_tuple(static_cast<int>(device.device_type), device.device_id));
    if (elsewhere || (!copy.is_none() && copy.cast<bool>()))
        throw py::buffer_error("this buffer is lent where it lies, and not copied");
    if (!max_version.is_none() && max_version.cast<std::pair<int, int>>().first >= 1)
        return dlpack::lend<dlpack::DLManagedTensorVersioned>(buffer.tensor(), buffer.elements(), device, self);
    return dlpack::lend<dlpack::DLManagedTensor>(buffer.tensor(), buffer.elements(), device, self);
}

void bind_any_device(py::module_& module) {
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
        .def(
            "record_copies", [](Device& device) { return std::make_unique<StartedCopies>(device); },
            py::keep_alive<0, 1>(), "All copies that `start_copy` has queued so far, to be waited for or looked at.")
        .def_property_readonly_static("memory_kinds", [](const py::object&) {
            py::list names;
            for (int i = 0; i < static_cast<int>(MemoryKind::count); ++i)
                names.append(name_of(static_cast<MemoryKind>(i)));
            return names;
        });
    module.def(
        "hip_device", &make_hip_device, py::arg("index"), py::arg("rocblas") = false,
        "GPU `index` of those that are visible, as a Device; Error where this build has no HIP, or no GPU is there.\n"
        "rocblas: it multiplies by rocBLAS; Error where this build has none.");
}

void bind_started_copies(py::module_& module) {
    py::class_<StartedCopies>(module, "StartedCopies", "Copies on their way: see Device.record_copies.")
        .def("done", &StartedCopies::done, Gil(), "Whether all have arrived; does not wait.")
        .def("wait", &StartedCopies::wait, Gil(), "Returns when all have arrived.");
}

void bind_buffer(py::module_& module) {
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
            "For a GPU-aware MPI (mpi4py takes it), version 3; AttributeError on the CPU.")
        .def("__dlpack_device__",
             [](const Buffer& buffer) {
                 const dlpack::DLDevice device = buffer.dlpack_device();
                 return py::make_tuple(static_cast<int>(device.device_type), device.device_id);
             })
        .def(
            "__dlpack__",
            // What was called from Python is done when it returns, so that no stream has anything to wait for.
            [](const py::object& self, const py::object&, const py::object& max_version, const py::object& dl_device,
               const py::object& copy) { return lend(self, max_version, dl_device, copy); },
            py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
            py::arg("dl_device") = py::none(), py::arg("copy") = py::none(),
            "(elements,) float32 or uint16 as a capsule without a copy; BufferError where a copy is asked for.");
}

void bind_pinned_buffer(py::module_& module) {
    py::class_<PinnedBuffer>(module, "PinnedBuffer",
                             "Host memory that copies of a device's queues and MPI may use, counted as staging.")
        .def(py::init<Device&, std::int64_t>(), py::arg("device"), py::arg("bytes"), py::keep_alive<1, 2>())
        .def_property_readonly("bytes", &PinnedBuffer::bytes)
        .def_property_readonly(
            "array",
            [](const py::object& self) {
                const PinnedBuffer& buffer = self.cast<const PinnedBuffer&>();
                return py::array(py::dtype::of<std::uint8_t>(), {static_cast<py::ssize_t>(buffer.bytes())},
                                 buffer.data(), self);
            },
            "(bytes,) uint8; shares the buffer's memory");
}
}  // namespace

void bind_core(py::module_& module) {
    py::register_exception<Error>(module, "Error", PyExc_ValueError);
    bind_any_device(module);
    bind_started_copies(module);
    bind_buffer(module);
    bind_pinned_buffer(module);
}

}  // namespace pytrain
