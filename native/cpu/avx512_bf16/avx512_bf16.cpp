// What AVX512_BF16 adds to the table of AVX-512: products of bf16 operands, two multiply-adds a lane, and rows that are
// rounded to bf16 by one instruction. Built with those flags, so nothing here may leave this file: see "Traps" in
// native/README.md.
#include "cpu/avx512_bf16/microkernel.h"
#include "cpu/avx512_bf16/pack.h"
#include "cpu/avx512_bf16/simd.h"
#include "cpu/kernels.h"

namespace pytrain::cpu::avx512_bf16 {
namespace {

#include "cpu/generic/rows.inl"

}  // namespace
}  // namespace pytrain::cpu::avx512_bf16

namespace pytrain::cpu {

void fill_avx512_bf16(Kernels* kernels) {
    using namespace avx512_bf16;
    kernels->name = "avx512_bf16";
    const auto narrow = kernels->narrow[static_cast<int>(DType::bf16)];
    fill_rows(kernels);
    kernels->narrow[static_cast<int>(DType::bf16)] = narrow;
    Products& products = kernels->bf16;
    products.word_depth = kWordDepth;
    products.step_words = 1;
    products.tile_rows = kTileRows;
    products.tile_columns = kTileColumns;
    products.block_rows = kBlockRows;
    products.block_depth = kBlockDepth;
    products.block_columns = kBlockColumns;
    products.matmul_tile = matmul_tile;
    products.low_step = kLowStep;
    products.matmul_low = matmul_low<>;
    products.matmul_row = matmul_row;
    products.pack_along[static_cast<int>(DType::fp32)] = pack_along<FromFp32>;
    products.pack_along[static_cast<int>(DType::bf16)] = pack_along<FromBf16>;
    products.pack_across[static_cast<int>(DType::fp32)] = pack_across<FromFp32>;
    products.pack_across[static_cast<int>(DType::bf16)] = pack_across<FromBf16>;
    products.peak_flops = peak_flops;
}

}  // namespace pytrain::cpu
