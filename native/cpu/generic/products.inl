// What an instruction set's products add to the table, written once over its simd.h and microkernel.h (matmul_tile,
// transpose, tile and block sizes). Included inside the instruction set's unnamed namespace.
#include "cpu/generic/pack.inl"
#include "cpu/generic/peak.inl"
#include "cpu/generic/row_product.inl"

void fill_products(Kernels* kernels) {
    kernels->tile_rows = kTileRows;
    kernels->tile_columns = kTileColumns;
    kernels->block_rows = kBlockRows;
    kernels->block_depth = kBlockDepth;
    kernels->block_columns = kBlockColumns;
    kernels->matmul_tile = matmul_tile;
    kernels->matmul_row = matmul_row;
    kernels->pack_along[static_cast<int>(DType::fp32)] = pack_along<Fp32>;
    kernels->pack_along[static_cast<int>(DType::bf16)] = pack_along<Bf16>;
    kernels->pack_along[static_cast<int>(DType::fp16)] = pack_along<Fp16>;
    kernels->pack_across[static_cast<int>(DType::fp32)] = pack_across<Fp32>;
    kernels->pack_across[static_cast<int>(DType::bf16)] = pack_across<Bf16>;
    kernels->pack_across[static_cast<int>(DType::fp16)] = pack_across<Fp16>;
    kernels->peak_flops = peak_flops;
}
