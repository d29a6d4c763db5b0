// Rows and elements of stored tensors as fp32: read in place where they are fp32, else widened into scratch and
// narrowed back. And the one rule by which work is cut: by shape alone, so that results do not depend on the number of
// threads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "device.h"

namespace pytrain::cpu {

// Elements that one task, or one trip through scratch, works on: 16 KiB of fp32, a third to a half of L1.
constexpr std::int64_t kPiece = 4096;

// Elements of an elementwise task: enough that starting it (about 0.1 us) does not matter.
constexpr std::int64_t kTaskElements = 4 * kPiece;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline std::int64_t rows_per_task(std::int64_t width) {
    return std::max<std::int64_t>(1, kTaskElements / std::max<std::int64_t>(1, width));
}

// The n elements of x from `first` on, to be read.
inline const float* read_row(const Kernels& kernels, Tensor x, std::int64_t first, std::int64_t n, float* scratch) {
    const Tensor row = x.at(first);
    if (x.dtype == DType::fp32) return static_cast<const float*>(row.data);
    kernels.widen[static_cast<int>(x.dtype)](scratch, row.data, n);
    return scratch;
}

// Where to write n elements that write_row will store: in place, or scratch.
inline float* output_row(Tensor y, std::int64_t first, float* scratch) {
    return y.dtype == DType::fp32 ? static_cast<float*>(y.at(first).data) : scratch;
}

// The same with what is there now, for sums.
inline float* update_row(const Kernels& kernels, Tensor y, std::int64_t first, std::int64_t n, float* scratch) {
    return const_cast<float*>(read_row(kernels, y, first, n, scratch));
}

// Stores what output_row or update_row handed out.
inline void write_row(const Kernels& kernels, Tensor y, std::int64_t first, std::int64_t n, const float* row) {
    if (y.dtype != DType::fp32) kernels.narrow[static_cast<int>(y.dtype)](y.at(first).data, row, n);
}

// Rows for a kernel that is an array by storage type: where all tensors have one type they are read and written in
// place, else as fp32 by way of scratch.
class StoredRows {
public:
    template <class... Others>
    explicit StoredRows(const Kernels& kernels, Tensor first, Others... others) : kernels_(kernels) {
        in_place_ = ((others.dtype == first.dtype) && ...);
        type_ = in_place_ ? first.dtype : DType::fp32;
    }
    bool in_place() const { return in_place_; }
    int type() const { return static_cast<int>(type_); }  // the index of the kernel

    const void* read(Tensor x, std::int64_t first, std::int64_t n, float* scratch) const {
        return in_place_ ? x.at(first).data : read_row(kernels_, x, first, n, scratch);
    }
    void* output(Tensor y, std::int64_t first, float* scratch) const {
        return in_place_ ? y.at(first).data : output_row(y, first, scratch);
    }
    void* update(Tensor y, std::int64_t first, std::int64_t n, float* scratch) const {
        return const_cast<void*>(read(y, first, n, scratch));
    }
    void write(Tensor y, std::int64_t first, std::int64_t n, const void* row) const {
        if (!in_place_) write_row(kernels_, y, first, n, static_cast<const float*>(row));
    }

private:
    const Kernels& kernels_;
    DType type_;
    bool in_place_;
};

}  // namespace pytrain::cpu
