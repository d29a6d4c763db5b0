// The table for NEON, which every 64-bit Arm has. Nothing here may leave this file: see "Traps" in native/README.md.
#include "cpu/kernels.h"
#include "cpu/neon/microkernel.h"
#include "cpu/neon/simd.h"

namespace pytrain::cpu::neon {
namespace {

#include "cpu/generic/products.inl"
#include "cpu/generic/rows.inl"

}  // namespace
}  // namespace pytrain::cpu::neon

namespace pytrain::cpu {

void fill_neon(Kernels* kernels) {
    kernels->name = "neon";
    neon::fill_rows(kernels);
    neon::fill_products(kernels);
}

}  // namespace pytrain::cpu
