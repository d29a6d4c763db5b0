// One function per topic; module.cpp calls them in this order.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "core/check.h"
#include "device.h"

namespace pytrain {

void bind_core(pybind11::module_&);     // Error, Device, Buffer
void bind_device(pybind11::module_&);   // CpuDevice and its operations on arrays
void bind_kernels(pybind11::module_&);  // kernel tables, for tests
void bind_layout(pybind11::module_&);   // Shape, Policy, Layout
void bind_stage(pybind11::module_&);    // Stage, arena
void bind_decode(pybind11::module_&);   // Decoder
void bind_information(pybind11::module_&);
void bind_hip_shim(pybind11::module_&);  // tests/hip/shim, in builds for tests alone

using Gil = pybind11::call_guard<pybind11::gil_scoped_release>;

// Waits until the device has done what was queued: before Python sees its memory. The GIL is not needed.
inline void finish(Device& device) {
    Event* const event = device.record(device.compute_queue());
    device.synchronize(event);
    device.release(event);
}

// bind_hip.cpp: throws Error in a build without HIP (or rocBLAS, if it is asked for), and where there is no such GPU.
std::unique_ptr<Device> make_hip_device(int index, bool rocblas);
std::string rocblas_version();

inline DType dtype_from(const std::string& name) {
    for (int i = 0; i < kDTypes; ++i)
        if (name == name_of(static_cast<DType>(i))) return static_cast<DType>(i);
    throw Error(message("dtype '", name, "' is not one of fp32, bf16, fp16"));
}

// A NumPy array over device memory that `owner` keeps alive: float32, or uint16 for the 16-bit types.
inline pybind11::array view(Tensor tensor, std::vector<pybind11::ssize_t> shape, const pybind11::object& owner) {
    if (tensor.dtype == DType::fp32)
        return pybind11::array(pybind11::dtype::of<float>(), std::move(shape), tensor.data, owner);
    return pybind11::array(pybind11::dtype::of<std::uint16_t>(), std::move(shape), tensor.data, owner);
}

}  // namespace pytrain
