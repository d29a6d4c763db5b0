// The complete table in plain C++: what every other table starts from, and what its kernels are compared with.
#include "cpu/generic/unroll.h"
#include "cpu/kernels.h"
#include "cpu/scalar/simd.h"

namespace pytrain::cpu::scalar {
namespace {

#include "cpu/generic/peak.inl"
#include "cpu/generic/rows.inl"

// 4 x 8 accumulators fit the sixteen four-lane registers that every 64-bit baseline has.
constexpr std::int64_t kTileRows = 4;
constexpr std::int64_t kTileColumns = 8;

void matmul_tile(std::int64_t k, const float* a, const float* b, float* c, std::int64_t ldc, bool accumulate) {
    float sum[kTileRows][kTileColumns] = {};
    for (std::int64_t p = 0; p < k; ++p)
        for (std::int64_t row = 0; row < kTileRows; ++row)
            for (std::int64_t column = 0; column < kTileColumns; ++column)
                sum[row][column] += a[p * kTileRows + row] * b[p * kTileColumns + column];
    for (std::int64_t row = 0; row < kTileRows; ++row)
        for (std::int64_t column = 0; column < kTileColumns; ++column) {
            float* const out = c + row * ldc + column;
            *out = accumulate ? *out + sum[row][column] : sum[row][column];
        }
}

void matmul_row(std::int64_t k, const float* a, const float* b, std::int64_t step, std::int64_t stride,
                std::int64_t panels, float* c, bool accumulate) {
    for (std::int64_t panel = 0; panel < panels; ++panel, b += stride, c += kTileColumns) {
        float sum[kTileColumns] = {};
        for (std::int64_t p = 0; p < k; ++p)
            for (std::int64_t column = 0; column < kTileColumns; ++column) sum[column] += a[p] * b[p * step + column];
        for (std::int64_t column = 0; column < kTileColumns; ++column)
            c[column] = accumulate ? c[column] + sum[column] : sum[column];
    }
}

template <class Storage>
void pack_along(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                std::int64_t panel_width) {
    const auto* elements = static_cast<const typename Storage::Element*>(source);
    for (std::int64_t p = 0; p < k; ++p)
        for (std::int64_t i = 0; i < panel_width; ++i)
            panel[p * panel_width + i] = i < width ? Storage::load(elements + i * ld + p) : 0.0f;
}

template <class Storage>
void pack_across(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                 std::int64_t panel_width) {
    const auto* elements = static_cast<const typename Storage::Element*>(source);
    for (std::int64_t p = 0; p < k; ++p)
        for (std::int64_t i = 0; i < panel_width; ++i)
            panel[p * panel_width + i] = i < width ? Storage::load(elements + p * ld + i) : 0.0f;
}

void fill_products(Kernels* kernels) {
    kernels->tile_rows = kTileRows;
    kernels->tile_columns = kTileColumns;
    // A task's panels of a (64 KiB) and of b (128 KiB) stay in a 256 KiB or larger L2, one of a (4 KiB) in L1.
    kernels->block_rows = 64;
    kernels->block_depth = 256;
    kernels->block_columns = 128;
    kernels->matmul_tile = matmul_tile;
    kernels->matmul_row = matmul_row;
    kernels->peak_flops = peak_flops;
    kernels->pack_along[static_cast<int>(DType::fp32)] = pack_along<Fp32>;
    kernels->pack_along[static_cast<int>(DType::bf16)] = pack_along<Bf16>;
    kernels->pack_along[static_cast<int>(DType::fp16)] = pack_along<Fp16>;
    kernels->pack_across[static_cast<int>(DType::fp32)] = pack_across<Fp32>;
    kernels->pack_across[static_cast<int>(DType::bf16)] = pack_across<Bf16>;
    kernels->pack_across[static_cast<int>(DType::fp16)] = pack_across<Fp16>;
}

}  // namespace
}  // namespace pytrain::cpu::scalar

namespace pytrain::cpu {

void fill_scalar(Kernels* kernels) {
    kernels->name = "scalar";
    scalar::fill_rows(kernels);
    scalar::fill_products(kernels);
}

}  // namespace pytrain::cpu
