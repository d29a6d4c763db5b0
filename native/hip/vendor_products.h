// Products by rocBLAS instead of kernels/matmul.hip, where a run asks for it (`run.hip_products = "rocblas"`) and the
// build has the library (-DPYTRAIN_ROCBLAS=ON).
//
// It takes what rocblas_gemm_ex has a form for: both operands of one type, sums in fp32. What every product ends with
// (bias, residual, GELU, a type of c that gemm_ex does not write) is done by our kernel: the sums of some rows at a
// time go through the workspace, so that c is rounded once, as everywhere. Mixed operands, and products without k, stay
// with our own kernels.
//
// Atomics are switched off, so that the same product gives the same bits again. What else kernels/matmul.hip promises,
// the library does not: it chooses its kernel by the whole shape, so that a row's bits may depend on how many there
// are.
#pragma once
#include <memory>
#include <string>

#include "device.h"
#include "hip/runtime.h"

namespace pytrain::hip {

class VendorProducts {
public:
    VendorProducts();  // throws Error in a build without rocBLAS
    ~VendorProducts();
    VendorProducts(const VendorProducts&) = delete;
    VendorProducts& operator=(const VendorProducts&) = delete;

    static std::string version();  // of the library; throws Error in a build without it
    static bool takes(const Matmul& product);
    // partials: (kSplitFloats)
    void matmul(const Matmul& product, float* partials, hipStream_t queue);

private:
    struct Library;
    std::unique_ptr<Library> library_;
};

}  // namespace pytrain::hip
