// Panels of the operands of a product.
#pragma once
#include <algorithm>
#include <cstdint>

namespace pytrain::cpu {

inline std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t multiple) { return ceil_divide(a, multiple) * multiple; }

// How the vectors of an operand (rows of op(a), columns of op(b)) are cut into panels: whole tiles, and where there are
// lower ones, the last two panels share what is left over one, each about half. (1024 rows by 14 leave 2: one more
// tile would compute 12 rows for nothing, and one of 2 has too few sums to keep the multiply-adds going; 8 and 8 cost
// what they are worth.) Where a panel begins depends on how many vectors there are; what is computed of each does not.
struct Panels {
    Panels() = default;
    // step: of the heights of low panels; 0 where there are only whole ones
    Panels(std::int64_t all, std::int64_t width, std::int64_t step)
        : vectors(all),
          tile(width),
          count(ceil_divide(all, width)),
          whole(all / width),
          last_begin((count - 1) * width) {
        if (step == 0 || vectors == 0 || vectors % tile == 0) return;
        if (count > 1) {
            const std::int64_t shared = vectors - (count - 2) * tile;
            last_begin = (count - 2) * tile + round_up(ceil_divide(shared, 2), step);
        }
        low_step = step;
        whole = std::max<std::int64_t>(0, count - 2);
    }

    std::int64_t begin(std::int64_t panel) const {
        return panel < count - 1 ? panel * tile : panel == count - 1 ? last_begin : vectors;
    }
    std::int64_t width(std::int64_t panel) const { return panel < whole ? tile : begin(panel + 1) - begin(panel); }
    // As packed and computed: the rest of a panel is padded with zeros.
    std::int64_t padded(std::int64_t panel) const {
        return panel < whole || low_step == 0 ? tile : std::min(tile, round_up(width(panel), low_step));
    }

    std::int64_t vectors = 0, tile = 1, count = 0;
    std::int64_t whole = 0;  // so many are, from the first on, as wide as a tile
    std::int64_t last_begin = 0;
    std::int64_t low_step = 0;  // 0: the last panel is a whole one
};

}  // namespace pytrain::cpu
