// Flat ranges of device memory as Python holds them.
#pragma once
#include <string>
#include <string_view>
#include <utility>

#include "bindings/bind.h"
#include "bindings/dlpack.h"
#include "core/buffer.h"

namespace pytrain {

// A typed flat range of device memory: its own, or a part of what somebody else holds and keeps alive.
class Buffer {
public:
    Buffer(Device& device, std::int64_t elements, const std::string& dtype, MemoryKind kind)
        : device_(device),
          elements_(elements),
          kind_(name_of(kind)),
          tensor_{nullptr, dtype_from(dtype)},
          owned_(true) {
        check(elements >= 0, "a buffer of ", elements, " elements cannot be");
        tensor_.data = device.allocate(static_cast<std::size_t>(elements) * size_of(tensor_.dtype), kind);
    }
    Buffer(Device& device, std::int64_t elements, Tensor part, MemoryKind kind)
        : device_(device), elements_(elements), kind_(name_of(kind)), tensor_(part), owned_(false) {}
    ~Buffer() {
        if (owned_) device_.release(tensor_.data);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    std::int64_t elements() const { return elements_; }
    const std::string& kind() const { return kind_; }
    Tensor tensor() const { return tensor_; }
    bool on_gpu() const {
        return device_.is_device_memory(tensor_.data, static_cast<std::size_t>(elements_) * size_of(tensor_.dtype));
    }
    // A process opens the first GPU that it sees, which is number 0 to it.
    dlpack::DLDevice dlpack_device() const {
        if (on_gpu()) return {dlpack::on_rocm, 0};
        return {std::string_view(device_.name()) == "hip" ? dlpack::on_rocm_host : dlpack::on_cpu, 0};
    }

private:
    Device& device_;
    std::int64_t elements_;
    std::string kind_;
    Tensor tensor_;
    bool owned_;
};

}  // namespace pytrain
