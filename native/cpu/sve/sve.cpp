// The table for SVE of any vector length. Built with that flag, so nothing here may leave this file: see "Traps" in
// native/README.md.
#include "cpu/generic/unroll.h"
#include "cpu/kernels.h"
#include "cpu/sve/fp16_chains.h"
#include "cpu/sve/microkernel.h"
#include "cpu/sve/pack.h"
#include "cpu/sve/simd.h"

namespace pytrain::cpu::sve {
namespace {

#include "cpu/generic/rows.inl"

void fill_products(Kernels* kernels) {
    kernels->tile_rows = kTileRows;
    kernels->tile_columns = kTileVectors * kLanes;
    kernels->block_rows = kBlockRows;
    kernels->block_depth = kBlockDepth;
    kernels->block_columns = kBlockTiles * kernels->tile_columns;
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

void fill_chains(Kernels* kernels) {
    Products& products = kernels->fp16_chains;
    products.word_depth = kPair;
    products.step_words = 1;
    products.tile_rows = kTileRows;
    products.tile_columns = kernels->tile_columns;
    products.block_rows = kBlockRows;
    products.block_depth = kPair * kBlockDepth;
    products.block_columns = kernels->block_columns;
    products.matmul_tile = matmul_tile_chains;
    products.pack_along[static_cast<int>(DType::fp16)] = pack_pairs_along;
    products.pack_across[static_cast<int>(DType::fp16)] = pack_pairs_across;
    products.peak_flops = peak_flops_chains;
    kernels->fp16_chain = kChain;
}

}  // namespace
}  // namespace pytrain::cpu::sve

namespace pytrain::cpu {

void fill_sve(Kernels* kernels) {
    kernels->name = "sve";
    sve::fill_rows(kernels);
    sve::fill_products(kernels);
    sve::fill_chains(kernels);
}

}  // namespace pytrain::cpu
