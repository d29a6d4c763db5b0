// What the documentation of rocblas_gemm_ex says, in float64 on the CPU, when the stream gets there. It refuses what
// the library refuses: types that it has no form for, and strides shorter than a column. Atomics must have been
// switched off.
#include "rocblas/rocblas.h"

#include <atomic>
#include <cstdio>
#include <cstring>

#include "core/half.h"
#include "shim/streams.h"

struct _rocblas_handle {
    hipStream_t stream = nullptr;
    rocblas_atomics_mode atomics = rocblas_atomics_allowed;
};

namespace {

constexpr char kVersion[] = "0.0.0-shim";
std::atomic<std::int64_t> products{0};

double load(const void* x, rocblas_datatype type, std::int64_t i) {
    if (type == rocblas_datatype_f32_r) return static_cast<const float*>(x)[i];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(x)[i];
    return type == rocblas_datatype_bf16_r ? pytrain::bf16_to_float(bits) : pytrain::fp16_to_float(bits);
}

void store(void* x, rocblas_datatype type, std::int64_t i, double value) {
    const auto rounded = static_cast<float>(value);
    if (type == rocblas_datatype_f32_r)
        static_cast<float*>(x)[i] = rounded;
    else
        static_cast<std::uint16_t*>(x)[i] =
            type == rocblas_datatype_bf16_r ? pytrain::float_to_bf16(rounded) : pytrain::float_to_fp16(rounded);
}

struct Operand {
    const void* data;
    rocblas_datatype type;
    std::int64_t ld;
    bool transposed;
    double at(std::int64_t row, std::int64_t column) const {
        return load(data, type, transposed ? column + row * ld : row + column * ld);
    }
};

}  // namespace

rocblas_status rocblas_create_handle(rocblas_handle* handle) {
    *handle = new _rocblas_handle;
    return rocblas_status_success;
}
rocblas_status rocblas_destroy_handle(rocblas_handle handle) {
    delete handle;
    return rocblas_status_success;
}
rocblas_status rocblas_set_stream(rocblas_handle handle, hipStream_t stream) {
    handle->stream = stream;
    return rocblas_status_success;
}
rocblas_status rocblas_set_atomics_mode(rocblas_handle handle, rocblas_atomics_mode mode) {
    handle->atomics = mode;
    return rocblas_status_success;
}
rocblas_status rocblas_set_pointer_mode(rocblas_handle, rocblas_pointer_mode) { return rocblas_status_success; }
rocblas_status rocblas_get_version_string_size(std::size_t* size) {
    *size = sizeof kVersion;
    return rocblas_status_success;
}
rocblas_status rocblas_get_version_string(char* text, std::size_t size) {
    std::snprintf(text, size, "%s", kVersion);
    return rocblas_status_success;
}

rocblas_status rocblas_gemm_ex(rocblas_handle handle, rocblas_operation transpose_a, rocblas_operation transpose_b,
                               rocblas_int m, rocblas_int n, rocblas_int k, const void* alpha, const void* a,
                               rocblas_datatype a_type, rocblas_int lda, const void* b, rocblas_datatype b_type,
                               rocblas_int ldb, const void* beta, const void* c, rocblas_datatype c_type,
                               rocblas_int ldc, void* d, rocblas_datatype d_type, rocblas_int ldd,
                               rocblas_datatype compute_type, rocblas_gemm_algo, std::int32_t, std::uint32_t) {
    if (handle == nullptr || handle->stream == nullptr) return rocblas_status_invalid_handle;
    if (handle->atomics != rocblas_atomics_not_allowed) return rocblas_status_not_implemented;
    const Operand left{a, a_type, lda, transpose_a == rocblas_operation_transpose};
    const Operand right{b, b_type, ldb, transpose_b == rocblas_operation_transpose};
    if (m < 0 || n < 0 || k < 0 || lda < (left.transposed ? k : m) || ldb < (right.transposed ? n : k) || ldc < m ||
        ldd < m)
        return rocblas_status_invalid_size;
    if (a_type != b_type || c_type != d_type || compute_type != rocblas_datatype_f32_r ||
        (c_type != a_type && c_type != rocblas_datatype_f32_r))
        return rocblas_status_not_implemented;
    if (a == nullptr || b == nullptr || c == nullptr || d == nullptr) return rocblas_status_invalid_pointer;
    const double factor = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
    ++products;
    pytrain::shim::enqueue(handle->stream, [=] {
        for (std::int64_t column = 0; column < n; ++column)
            for (std::int64_t row = 0; row < m; ++row) {
                double sum = 0.0;
                for (std::int64_t i = 0; i < k; ++i) sum += left.at(row, i) * right.at(i, column);
                sum *= factor;
                if (keep != 0.0) sum += keep * load(c, c_type, row + column * std::int64_t{ldc});
                store(d, d_type, row + column * std::int64_t{ldd}, sum);
            }
    });
    return rocblas_status_success;
}

std::int64_t pytrain::shim::rocblas_products() { return products; }
