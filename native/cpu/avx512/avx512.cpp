// The table for AVX-512 F, BW, VL and DQ. Built with those flags, so nothing here may leave this file: see "Traps" in
// native/README.md.
#include "cpu/avx512/microkernel.h"
#include "cpu/avx512/simd.h"
#include "cpu/kernels.h"

namespace pytrain::cpu::avx512 {
namespace {

#include "cpu/generic/products.inl"
#include "cpu/generic/rows.inl"

}  // namespace
}  // namespace pytrain::cpu::avx512

namespace pytrain::cpu {

void fill_avx512(Kernels* kernels) {
    kernels->name = "avx512";
    avx512::fill_rows(kernels);
    avx512::fill_products(kernels);
    kernels->low_step = avx512::kLowStep;
    kernels->matmul_low = avx512::matmul_low<>;
}

}  // namespace pytrain::cpu
