// NumPy arrays as Tensors: types, shapes and strides are checked here, with messages that name the argument.
#pragma once
#include <string>
#include <vector>

#include "bindings/bind.h"

namespace pytrain {

using Sizes = std::vector<pybind11::ssize_t>;

inline std::string text_of(const Sizes& shape) {
    std::string text = "(";
    for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + (shape.size() == 1 ? ",)" : ")");
}

// Runs Python, and takes microseconds: for messages alone.
inline std::string text_of(const pybind11::dtype& dtype) {
    return std::string(pybind11::str(static_cast<const pybind11::object&>(dtype)));
}

inline Sizes shape_of(const pybind11::array& x) { return Sizes(x.shape(), x.shape() + x.ndim()); }

inline void check_shape(const char* name, const pybind11::array& x, const Sizes& wanted) {
    if (shape_of(x) != wanted)
        check(false, name, ": the shape must be ", text_of(wanted), ", not ", text_of(shape_of(x)));
}

// Reads the arguments of one call. uint16 arrays hold `half`: bf16 or fp16. With `write`, the array must be writeable.
class Arguments {
public:
    explicit Arguments(const std::string& half) : half_(dtype_from(half)) {
        check(half_ != DType::fp32, "half: what uint16 arrays hold must be bf16 or fp16, not fp32");
    }

    // Any shape, contiguous.
    Tensor flat(const char* name, const pybind11::array& x, bool write = false) const {
        const Tensor tensor = typed(name, x, write);
        check(x.flags() & pybind11::array::c_style, name, ": the array must be C-contiguous");
        return tensor;
    }
    Tensor flat(const char* name, const pybind11::array& x, const Sizes& shape, bool write = false) const {
        check_shape(name, x, shape);
        return flat(name, x, write);
    }
    // None is no tensor.
    Tensor optional(const char* name, const pybind11::object& x, const Sizes& shape, bool write = false) const {
        if (x.is_none()) return {};
        check(pybind11::isinstance<pybind11::array>(x), name, ": must be an array or None");
        return flat(name, pybind11::reinterpret_borrow<pybind11::array>(x), shape, write);
    }
    // Elements of the last dimension side by side, the others strided at will.
    Tensor rows(const char* name, const pybind11::array& x, pybind11::ssize_t dimensions, bool write = false) const {
        check(x.ndim() == dimensions, name, ": the array must have ", dimensions, " dimensions, not ", x.ndim());
        check(x.size() == 0 || x.shape(dimensions - 1) == 1 || x.strides(dimensions - 1) == x.itemsize(), name,
              ": the last dimension must be contiguous");
        for (pybind11::ssize_t i = 0; i + 1 < dimensions; ++i)
            check(x.strides(i) % x.itemsize() == 0 && x.strides(i) >= 0, name,
                  ": strides must be whole elements and not negative");
        return typed(name, x, write);
    }

private:
    Tensor typed(const char* name, const pybind11::array& x, bool write) const {
        const bool full = x.dtype().equal(pybind11::dtype::of<float>());
        if (!full && !x.dtype().equal(pybind11::dtype::of<std::uint16_t>()))
            check(false, name, ": the dtype must be float32 or uint16, not ", text_of(x.dtype()));
        check(!write || x.writeable(), name, ": the array is read-only");
        return {const_cast<void*>(x.data()), full ? DType::fp32 : half_};
    }

    DType half_;
};

// Elements between neighbours along one dimension.
inline std::int64_t stride_of(const pybind11::array& x, pybind11::ssize_t dimension) {
    return static_cast<std::int64_t>(x.strides(dimension) / x.itemsize());
}

// A contiguous array of one C++ type: int32 tokens, float32 statistics, float64 scalars.
template <class T>
T* plain(const char* name, const pybind11::array& x, const Sizes& shape, bool write = false) {
    check_shape(name, x, shape);
    const auto wanted = pybind11::dtype::of<T>();
    if (!x.dtype().equal(wanted))
        check(false, name, ": the dtype must be ", text_of(wanted), ", not ", text_of(x.dtype()));
    check(x.flags() & pybind11::array::c_style, name, ": the array must be C-contiguous");
    check(!write || x.writeable(), name, ": the array is read-only");
    return static_cast<T*>(const_cast<void*>(x.data()));
}

template <class T>
T* plain_optional(const char* name, const pybind11::object& x, const Sizes& shape, bool write = false) {
    if (x.is_none()) return nullptr;
    check(pybind11::isinstance<pybind11::array>(x), name, ": must be an array or None");
    return plain<T>(name, pybind11::reinterpret_borrow<pybind11::array>(x), shape, write);
}

// Every index must be in [0, end).
inline void check_indices(const char* name, const std::int32_t* indices, std::int64_t n, std::int64_t end) {
    for (std::int64_t i = 0; i < n; ++i)
        check(indices[i] >= 0 && indices[i] < end, name, ": element ", i, " is ", indices[i], ", outside [0, ", end,
              ")");
}

}  // namespace pytrain
