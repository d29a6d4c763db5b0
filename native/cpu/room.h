// Where the panels and sums of a product lie in the workspace.
#pragma once
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/panels.h"

namespace pytrain::cpu {

// What is packed at once: large enough that a packed panel of one operand meets many of the other, small enough that
// both (2 and 6 MiB at a depth of 512) stay in a last-level cache.
constexpr std::int64_t kRegionRows = 1024;
constexpr std::int64_t kRegionColumns = 3072;
constexpr std::int64_t kAlignFloats = 16;  // 64 bytes, what kernels.h promises of panels

// From the table alone.
struct Room {
    explicit Room(const Products& table)
        : region_rows(round_up(kRegionRows, table.tile_rows)),
          region_columns(round_up(kRegionColumns, table.tile_columns)),
          a_panel(round_up(table.tile_rows * table.words(table.block_depth), kAlignFloats) + kAlignFloats),
          b_panel(round_up(table.tile_columns * table.words(table.block_depth), kAlignFloats) + kAlignFloats),
          own_panels(table.block_columns / table.tile_columns * b_panel),
          a_floats(region_rows / table.tile_rows * a_panel),
          b_floats(region_columns / table.tile_columns * b_panel),
          tile_floats(round_up(table.tile_rows * table.tile_columns, kAlignFloats)),
          row_floats(round_up(table.block_columns, kAlignFloats)),
          block_floats(round_up(table.block_rows * table.block_columns, kAlignFloats)) {}

    std::int64_t shared() const { return a_floats + b_floats + region_rows * region_columns; }
    std::int64_t thread() const { return own_panels + tile_floats + 2 * row_floats + block_floats; }

    std::int64_t region_rows, region_columns;
    std::int64_t a_panel, b_panel;  // floats from one panel to the next: no power of two, which would share cache sets
    std::int64_t own_panels;        // thread: panels of b, of a column block
    std::int64_t a_floats, b_floats;  // shared: panels of a, panels of b, then sums (region_rows, region_columns)
    std::int64_t tile_floats;         // thread, after its panels: a tile, two rows of a task, then the sums of one
    std::int64_t row_floats, block_floats;
};

}  // namespace pytrain::cpu
