// rocBLAS behind HipDevice::matmul. See vendor_products.h.
#include "hip/vendor_products.h"

#include <algorithm>
#include <limits>

#include "core/check.h"
#include "hip/kernels.h"

#if defined(PYTRAIN_ROCBLAS)
#include <rocblas/rocblas.h>
#endif

namespace pytrain::hip {

namespace {

constexpr std::int64_t kColumns = 128;  // rows of sums in the workspace begin at multiples of it

std::int64_t padded(std::int64_t n) { return (n + kColumns - 1) / kColumns * kColumns; }

// Whether gemm_ex writes c itself, rounded from its fp32 sums.
bool plain(const Matmul& product) {
    return !product.bias && !product.residual && product.activation == Activation::none &&
           (product.c.dtype == DType::fp32 || product.c.dtype == product.a.dtype);
}

}  // namespace

bool VendorProducts::takes(const Matmul& product) {
    constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
    const std::int64_t largest =
        std::max({product.m, product.n, product.k, product.lda, product.ldb, product.ldc, product.ldresidual});
    return product.a.dtype == product.b.dtype && product.m > 0 && product.n > 0 && product.k > 0 && largest <= most &&
           (plain(product) || padded(product.n) <= kSplitFloats);
}

#if defined(PYTRAIN_ROCBLAS)

namespace {

void check_rocblas(rocblas_status status, const char* what) {
    check(status == rocblas_status_success, what, ": rocBLAS reports status ", static_cast<int>(status));
}

rocblas_datatype type_of(DType dtype) {
    switch (dtype) {
        case DType::bf16:
            return rocblas_datatype_bf16_r;
        case DType::fp16:
            return rocblas_datatype_f16_r;
        default:
            return rocblas_datatype_f32_r;
    }
}

rocblas_int narrow(std::int64_t n) { return static_cast<rocblas_int>(n); }

}  // namespace

struct VendorProducts::Library {
    rocblas_handle handle = nullptr;

    Library() {
        check_rocblas(rocblas_create_handle(&handle), "rocblas_create_handle");
        check_rocblas(rocblas_set_atomics_mode(handle, rocblas_atomics_not_allowed), "rocblas_set_atomics_mode");
        check_rocblas(rocblas_set_pointer_mode(handle, rocblas_pointer_mode_host), "rocblas_set_pointer_mode");
    }
    ~Library() { static_cast<void>(rocblas_destroy_handle(handle)); }

    // Rows [row, row + rows) of op(a) op(b), and c to them where `accumulate`. rocBLAS counts by columns: a row-major
    // (rows, width) array is to it a (width, rows) one, the transpose, of the same stride. So the transposed product is
    // asked for, op(b)^T op(a)^T, whose first operand is b. A stored operand that we would not transpose is already
    // the transpose that is wanted; one that we would, is not.
    void multiply(const Matmul& product, std::int64_t row, std::int64_t rows, Tensor c, std::int64_t ldc,
                  bool accumulate) const {
        const auto operation = [](Transpose transpose) {
            return transpose == Transpose::yes ? rocblas_operation_transpose : rocblas_operation_none;
        };
        const Tensor a = product.a.at(product.transpose_a == Transpose::yes ? row : row * product.lda);
        const float alpha = 1.0f, beta = accumulate ? 1.0f : 0.0f;
        const rocblas_datatype input = type_of(product.a.dtype), output = type_of(c.dtype);
        check_rocblas(
            rocblas_gemm_ex(handle, operation(product.transpose_b), operation(product.transpose_a), narrow(product.n),
                            narrow(rows), narrow(product.k), &alpha, product.b.data, input, narrow(product.ldb), a.data,
                            input, narrow(product.lda), &beta, c.data, output, narrow(ldc), c.data, output, narrow(ldc),
                            rocblas_datatype_f32_r, rocblas_gemm_algo_standard, 0, 0),
            "rocblas_gemm_ex");
    }
};

VendorProducts::VendorProducts() : library_(std::make_unique<Library>()) {}
VendorProducts::~VendorProducts() = default;

std::string VendorProducts::version() {
    std::size_t size = 0;
    check_rocblas(rocblas_get_version_string_size(&size), "rocblas_get_version_string_size");
    std::string text(size, '\0');
    check_rocblas(rocblas_get_version_string(text.data(), size), "rocblas_get_version_string");
    return text.substr(0, text.find('\0'));
}

void VendorProducts::matmul(const Matmul& product, float* partials, hipStream_t queue) {
    check_rocblas(rocblas_set_stream(library_->handle, queue), "rocblas_set_stream");
    if (plain(product)) {
        library_->multiply(product, 0, product.m, product.c, product.ldc, product.accumulate);
        return;
    }
    const std::int64_t ld = padded(product.n), most = kSplitFloats / ld;
    for (std::int64_t row = 0; row < product.m; row += most) {
        const std::int64_t rows = std::min(most, product.m - row);
        library_->multiply(product, row, rows, {partials, DType::fp32}, ld, false);
        Matmul part = product;
        part.m = rows;
        part.c = product.c.at(row * product.ldc);
        if (product.residual) part.residual = product.residual.at(row * product.ldresidual);
        if (product.activated) part.activated = product.activated.at(row * product.ldactivated);
        launch_matmul_end(part, partials, ld, queue);
    }
}

#else

namespace {
[[noreturn]] void refuse() {
    throw Error(
        "this build has no rocBLAS (built with -DPYTRAIN_ROCBLAS=ON it would, see native/hip/README.md); "
        "run.hip_products = \"own\" needs none");
}
}  // namespace

struct VendorProducts::Library {};
VendorProducts::VendorProducts() { refuse(); }
VendorProducts::~VendorProducts() = default;
std::string VendorProducts::version() { refuse(); }
void VendorProducts::matmul(const Matmul&, float*, hipStream_t) { refuse(); }

#endif

}  // namespace pytrain::hip
