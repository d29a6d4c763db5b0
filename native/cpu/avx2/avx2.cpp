// The table for AVX2, FMA and F16C. Built with those flags, so nothing here may leave this file: see "Traps" in
// native/README.md.
#include "cpu/avx2/microkernel.h"
#include "cpu/avx2/simd.h"
#include "cpu/kernels.h"

namespace pytrain::cpu::avx2 {
namespace {

#include "cpu/generic/products.inl"
#include "cpu/generic/rows.inl"

}  // namespace
}  // namespace pytrain::cpu::avx2

namespace pytrain::cpu {

void fill_avx2(Kernels* kernels) {
    kernels->name = "avx2";
    avx2::fill_rows(kernels);
    avx2::fill_products(kernels);
    kernels->low_step = avx2::kLowStep;
    kernels->matmul_low = avx2::matmul_low<>;
}

}  // namespace pytrain::cpu
