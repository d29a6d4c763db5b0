// Stands in for rocBLAS in the shim's build: the names and values that native/hip/vendor_products.cpp uses, as the
// library's documentation gives them, and no more. See rocblas.cpp.
#pragma once
#include <cstddef>
#include <cstdint>

#include "shim/shim.h"

using rocblas_int = std::int32_t;
struct _rocblas_handle;
using rocblas_handle = _rocblas_handle*;

enum rocblas_status {
    rocblas_status_success = 0,
    rocblas_status_invalid_handle = 1,
    rocblas_status_not_implemented = 2,
    rocblas_status_invalid_pointer = 3,
    rocblas_status_invalid_size = 4
};
enum rocblas_operation { rocblas_operation_none = 111, rocblas_operation_transpose = 112 };
enum rocblas_datatype { rocblas_datatype_f16_r = 150, rocblas_datatype_f32_r = 151, rocblas_datatype_bf16_r = 168 };
enum rocblas_gemm_algo { rocblas_gemm_algo_standard = 0 };
enum rocblas_atomics_mode { rocblas_atomics_not_allowed = 0, rocblas_atomics_allowed = 1 };
enum rocblas_pointer_mode { rocblas_pointer_mode_host = 0 };

rocblas_status rocblas_create_handle(rocblas_handle* handle);
rocblas_status rocblas_destroy_handle(rocblas_handle handle);
rocblas_status rocblas_set_stream(rocblas_handle handle, hipStream_t stream);
rocblas_status rocblas_set_atomics_mode(rocblas_handle handle, rocblas_atomics_mode mode);
rocblas_status rocblas_set_pointer_mode(rocblas_handle handle, rocblas_pointer_mode mode);
rocblas_status rocblas_get_version_string_size(std::size_t* size);
rocblas_status rocblas_get_version_string(char* text, std::size_t size);
// Columns first: d (m, n) = alpha op(a) (m, k) op(b) (k, n) + beta c (m, n).
rocblas_status rocblas_gemm_ex(rocblas_handle handle, rocblas_operation transpose_a, rocblas_operation transpose_b,
                               rocblas_int m, rocblas_int n, rocblas_int k, const void* alpha, const void* a,
                               rocblas_datatype a_type, rocblas_int lda, const void* b, rocblas_datatype b_type,
                               rocblas_int ldb, const void* beta, const void* c, rocblas_datatype c_type,
                               rocblas_int ldc, void* d, rocblas_datatype d_type, rocblas_int ldd,
                               rocblas_datatype compute_type, rocblas_gemm_algo algorithm, std::int32_t solution_index,
                               std::uint32_t flags);

namespace pytrain::shim {
std::int64_t rocblas_products();  // that gemm_ex was asked for since the beginning
}
