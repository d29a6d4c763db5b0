// Tiles of fewer rows than kTileRows, from the multiply_tile<rows> of microkernel.h. Included by it.
//
// Rows by twos: the odd one of a panel costs little, and there are half as many loops.
constexpr int kLowStep = 2;

// Of `rows` rows, a multiple of kLowStep below kTileRows.
template <int kRows = kLowStep>
inline void matmul_low(std::int64_t rows, std::int64_t words, const float* a, const float* b, float* c,
                       std::int64_t ldc, bool accumulate) {
    if (rows == kRows)
        multiply_tile<kRows>(words, a, b, c, ldc, accumulate);
    else if constexpr (kRows + kLowStep < kTileRows)
        matmul_low<kRows + kLowStep>(rows, words, a, b, c, ldc, accumulate);
}
