#include "cpu/blocks.h"

#include <algorithm>

namespace pytrain::cpu {

namespace {

constexpr std::int64_t kFloat = sizeof(float);

// The largest number of whole tiles within `vectors`, from `least` to `most` of them.
std::int64_t whole_tiles(std::int64_t vectors, std::int64_t tile, std::int64_t least, std::int64_t most) {
    return std::clamp(vectors / tile, least, most) * tile;
}

}  // namespace

void fit_blocks(Kernels* kernels, const Features& features) {
    if (features.l1_data == 0 || features.l2 == 0) return;
    const auto first = static_cast<std::int64_t>(features.l1_data);
    const auto share = static_cast<std::int64_t>(features.l2) / std::max(1, features.l2_cores);
    const std::int64_t step = (kernels->tile_rows + kernels->tile_columns) * kFloat;
    kernels->block_depth = std::clamp<std::int64_t>(first * 3 / 4 / step / 64 * 64, 128, 512);
    const std::int64_t vector = kernels->block_depth * kFloat;
    kernels->block_columns = whole_tiles(share / 4 / vector, kernels->tile_columns, 2, 16);
    kernels->block_rows = whole_tiles(share / 8 / vector, kernels->tile_rows, 4, 12);
    if (Products& chains = kernels->fp16_chains; chains.matmul_tile != nullptr) {  // as many words, in the same tiles
        chains.block_rows = kernels->block_rows;
        chains.block_depth = chains.word_depth * kernels->block_depth;
        chains.block_columns = kernels->block_columns;
    }
}

}  // namespace pytrain::cpu
