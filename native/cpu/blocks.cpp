#include "cpu/blocks.h"

#include <algorithm>

namespace pytrain::cpu {

namespace {

constexpr std::int64_t kWord = 4;  // bytes

// The largest number of whole tiles within `vectors`, from `least` to `most` of them.
std::int64_t whole_tiles(std::int64_t vectors, std::int64_t tile, std::int64_t least, std::int64_t most) {
    return std::clamp(vectors / tile, least, most) * tile;
}

struct Blocks {
    std::int64_t rows, words, columns;
};

// Of a tile, whose panels take a word of each vector at a time.
Blocks fit(std::int64_t tile_rows, std::int64_t tile_columns, const Features& features) {
    const auto first = static_cast<std::int64_t>(features.l1_data);
    const auto share = static_cast<std::int64_t>(features.l2) / std::max(1, features.l2_cores);
    Blocks blocks{};
    blocks.words = std::clamp<std::int64_t>(first * 3 / 4 / ((tile_rows + tile_columns) * kWord) / 64 * 64, 128, 512);
    const std::int64_t vector = blocks.words * kWord;
    blocks.columns = whole_tiles(share / 4 / vector, tile_columns, 2, 16);
    blocks.rows = whole_tiles(share / 8 / vector, tile_rows, 4, 12);
    return blocks;
}

void fit(Products* products, const Features& features) {
    if (products->matmul_tile == nullptr) return;
    const Blocks blocks = fit(products->tile_rows, products->tile_columns, features);
    products->block_rows = blocks.rows;
    products->block_depth = products->word_depth * blocks.words;
    products->block_columns = blocks.columns;
}

}  // namespace

void fit_blocks(Kernels* kernels, const Features& features) {
    if (features.l1_data == 0 || features.l2 == 0) return;
    const Blocks blocks = fit(kernels->tile_rows, kernels->tile_columns, features);
    kernels->block_rows = blocks.rows;
    kernels->block_depth = blocks.words;
    kernels->block_columns = blocks.columns;
    fit(&kernels->bf16, features);
    fit(&kernels->fp16_chains, features);
}

}  // namespace pytrain::cpu
