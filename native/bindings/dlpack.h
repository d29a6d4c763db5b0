// A flat tensor as a DLPack capsule (https://dmlc.github.io/dlpack/latest/c_api.html), which mpi4py and array libraries
// take without a copy: in the form of DLPack 1 where the consumer says that it knows it, and else in the one before.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

#include "bindings/bind.h"

namespace pytrain::dlpack {

enum DeviceType : std::int32_t { on_cpu = 1, on_rocm = 10, on_rocm_host = 11 };

struct DLDevice {
    std::int32_t device_type, device_id;
};
struct DLDataType {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};
struct DLTensor {
    void* data;
    DLDevice device;
    std::int32_t ndim;
    DLDataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};
struct DLManagedTensor {
    static constexpr const char* kName = "dltensor";
    DLTensor dl_tensor;
    void* manager_ctx;
    void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
    static constexpr const char* kName = "dltensor_versioned";
    std::uint32_t major, minor;
    void* manager_ctx;
    void (*deleter)(DLManagedTensorVersioned*);
    std::uint64_t flags;
    DLTensor dl_tensor;
};

// What a consumer holds until it calls the deleter, from any thread: a reference to the owner of the memory.
template <class Managed>
struct Loan {
    Managed tensor;
    std::int64_t shape, stride;
    PyObject* owner;
};

template <class Managed>
void give_back(Managed* tensor) {
    const std::unique_ptr<Loan<Managed>> loan(static_cast<Loan<Managed>*>(tensor->manager_ctx));
    const pybind11::gil_scoped_acquire gil;
    Py_DECREF(loan->owner);
}

// (elements,): float32, or uint16 for the 16-bit types (bfloat16 included, as everywhere at the border to Python).
template <class Managed>
pybind11::capsule lend(Tensor tensor, std::int64_t elements, DLDevice device, const pybind11::object& owner) {
    auto* const loan = new Loan<Managed>{{}, elements, 1, owner.ptr()};
    Py_INCREF(loan->owner);
    constexpr std::uint8_t kUnsigned = 1, kFloat = 2;
    const DLDataType dtype = tensor.dtype == DType::fp32 ? DLDataType{kFloat, 32, 1} : DLDataType{kUnsigned, 16, 1};
    if constexpr (std::is_same_v<Managed, DLManagedTensorVersioned>) loan->tensor.major = 1;
    loan->tensor.dl_tensor = {tensor.data, device, 1, dtype, &loan->shape, &loan->stride, 0};
    loan->tensor.manager_ctx = loan;
    loan->tensor.deleter = give_back<Managed>;
    // A consumer renames the capsule when it takes the tensor; one that nobody took gives it back itself.
    return pybind11::capsule(&loan->tensor, Managed::kName, [](PyObject* capsule) {
        if (PyCapsule_IsValid(capsule, Managed::kName) == 0) return;
        auto* const untaken = static_cast<Managed*>(PyCapsule_GetPointer(capsule, Managed::kName));
        untaken->deleter(untaken);
    });
}

}  // namespace pytrain::dlpack
