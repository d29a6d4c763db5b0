// What bf16 adds to the table of NEON: products of bf16 operands in BFMMLA, sixteen multiply-adds for each 128 bits.
// Built with those flags, so nothing here may leave this file: see "Traps" in native/README.md. Rows are widened and
// narrowed by the table of NEON: BFCVT would round alike, but flush subnormal numbers where FPCR.FZ is set.
#include "cpu/kernels.h"
#include "cpu/neon_bf16/microkernel.h"
#include "cpu/neon_bf16/pack.h"

namespace pytrain::cpu {

void fill_neon_bf16(Kernels* kernels) {
    using namespace neon_bf16;
    kernels->name = "neon_bf16";
    Products& products = kernels->bf16;
    products.word_depth = kWordDepth;
    products.step_words = kStepWords;
    products.tile_rows = kTileRows;
    products.tile_columns = kTileColumns;
    products.block_rows = kBlockRows;
    products.block_depth = kBlockDepth;
    products.block_columns = kBlockColumns;
    products.matmul_tile = matmul_tile;
    products.pack_along[static_cast<int>(DType::fp32)] = pack_along<FromFp32>;
    products.pack_along[static_cast<int>(DType::bf16)] = pack_along<FromBf16>;
    products.pack_across[static_cast<int>(DType::fp32)] = pack_across<FromFp32>;
    products.pack_across[static_cast<int>(DType::bf16)] = pack_across<FromBf16>;
    products.peak_flops = peak_flops;
}

}  // namespace pytrain::cpu
