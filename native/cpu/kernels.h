// What the CPU device asks of an instruction set: operations on rows and tiles, single-threaded, fp32 in registers.
//
// The scalar table is complete and is the reference; every other one starts as a copy of it and overwrites pointers and
// block sizes (`fill_<isa>`), so that a new CPU is right on its first day. A row is fp32 (float*), or, in a kernel that
// is an array by storage type, of that type (void*): widened and rounded in registers, with the bits that widening the
// row first and narrowing the result would give. Where the types of its rows differ, the device widens them into
// scratch. n, k: any size from 0 (tails are the kernel's business). Pointers need no alignment unless said.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace pytrain::cpu {

struct AdamWRow {
    float beta1, beta2;
    float gain1, gain2;  // 1 - beta1, 1 - beta2, rounded after the subtraction
    float eps, step_size, correction2, decay, gradient_factor;
};

// Products from packed panels of 32-bit words: tiles, cache blocks, packing. A word is one float, or a pair of bf16
// whose earlier one is in the lower half: `word_depth` elements of k. A panel of width w holds, for each step along k,
// `step_words` neighbouring words of each of its w vectors, side by side, padded with zeros. So element p of k, the
// first of a step, begins words(p) * w words after the panel does. (float* is how a word's address is written, whatever
// the word holds.)
struct Products {
    std::int64_t word_depth;
    std::int64_t step_words;
    std::int64_t tile_rows, tile_columns;
    std::int64_t block_rows, block_depth, block_columns;  // block_depth: elements of k, whole steps
    // c (tile_rows, tile_columns) = a * b, or += with accumulate, from `words` words of each vector, whole steps. One
    // fp32 accumulator per element, k ascending.
    void (*matmul_tile)(std::int64_t words, const float* a, const float* b, float* c, std::int64_t ldc,
                        bool accumulate);
    // The same of a panel of a of fewer rows, any multiple of low_step. Null where only whole tiles are computed.
    std::int64_t low_step;
    void (*matmul_low)(std::int64_t rows, std::int64_t words, const float* a, const float* b, float* c,
                       std::int64_t ldc, bool accumulate);
    // See matmul_row below; null where a row is made by matmul_tile, as one of a tile.
    void (*matmul_row)(std::int64_t words, const float* a, const float* b, std::int64_t step, std::int64_t stride,
                       std::int64_t panels, float* c, bool accumulate);
    // One panel, from k elements of `width` <= panel_width vectors; see below. fp32 sources are rounded where a word
    // holds less. Null for a storage type that this product is not for.
    void (*pack_along[kDTypes])(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                                std::int64_t panel_width);
    void (*pack_across[kDTypes])(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                                 std::int64_t panel_width);
    double (*peak_flops)(std::int64_t repeats, float* sink);

    std::int64_t step_depth() const { return word_depth * step_words; }
    // Of a vector of k elements, padding included.
    std::int64_t words(std::int64_t k) const { return (k + step_depth() - 1) / step_depth() * step_words; }
};

struct Kernels {
    const char* name;

    // --- products: C (m,n) in tiles of (tile_rows, tile_columns) from packed panels -------------
    // Panels: a (k, tile_rows) and b (k, tile_columns), 64-byte aligned, zero-padded at the edges.
    std::int64_t tile_rows, tile_columns;
    // Cache blocks: a task computes block_rows x block_columns of C (multiples of the tile) from block_depth steps of
    // k, so that its packed panels of both operands stay in the second-level cache, and one panel of a in the first.
    std::int64_t block_rows, block_depth, block_columns;
    // c (tile_rows, tile_columns) = a * b, or += with accumulate. One accumulator per element, k ascending.
    void (*matmul_tile)(std::int64_t k, const float* a, const float* b, float* c, std::int64_t ldc, bool accumulate);
    // The same of a panel of a of fewer rows, any multiple of low_step. Null where only whole tiles are computed.
    std::int64_t low_step;
    void (*matmul_low)(std::int64_t rows, std::int64_t k, const float* a, const float* b, float* c, std::int64_t ldc,
                       bool accumulate);
    // c (panels * tile_columns) = a (k) * b, or += with accumulate: the bits of a row of matmul_tile. The panels of b
    // begin `stride` floats apart, their steps `step` (tile_columns where b is packed), with any alignment.
    void (*matmul_row)(std::int64_t k, const float* a, const float* b, std::int64_t step, std::int64_t stride,
                       std::int64_t panels, float* c, bool accumulate);
    // One panel of `width` <= panel_width vectors of length k, by storage type of the source:
    // pack_along: source[i*ld + p] (k contiguous) -> panel[p*panel_width + i]
    // pack_across: source[p*ld + i] -> panel[p*panel_width + i]
    void (*pack_along[kDTypes])(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                                std::int64_t panel_width);
    void (*pack_across[kDTypes])(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                                 std::int64_t panel_width);

    // `repeats` rounds of independent fused multiply-adds on registers, for measuring the peak. Returns the FLOPs done;
    // sink has room for one vector (64 floats are enough for any).
    double (*peak_flops)(std::int64_t repeats, float* sink);

    // Products of two bf16 operands without widening them. A table whose instruction set has no such arithmetic leaves
    // all of it null: its bf16 operands are widened as they are packed.
    Products bf16;

    // Products of two fp16 operands in fp16 multiply-adds, at most `fp16_chain` in a row before they are flushed into
    // fp32: faster and less exact, so whole matrices take them only where chain_fp16 is set (select.h), and attention
    // never. Null where the instruction set has none.
    Products fp16_chains;
    std::int64_t fp16_chain;
    bool chain_fp16;

    // --- storage types --------------------------------------------------------------------------
    void (*widen[kDTypes])(float* y, const void* x, std::int64_t n);   // [fp32] copies
    void (*narrow[kDTypes])(void* y, const float* x, std::int64_t n);  // round to nearest even, NaN stays NaN

    // --- elementwise ----------------------------------------------------------------------------
    void (*add)(float* y, const float* x, std::int64_t n);  // y += x
    void (*scale)(float* y, float factor, std::int64_t n);  // y *= factor
    // y += each of `rows` rows of x, ld elements apart, one after the other; by storage type of x
    void (*add_rows[kDTypes])(float* y, const void* x, std::int64_t ld, std::int64_t rows, std::int64_t n);
    void (*residual[kDTypes])(void* x, const void* partial, const float* bias,
                              std::int64_t n);                              // x += partial [+ bias]
    void (*gelu_forward[kDTypes])(void* y, const void* x, std::int64_t n);  // tanh approximation
    // The backward ones write what the forward ones give into y too, unless it is null: the same bits.
    void (*gelu_backward[kDTypes])(void* dx, void* y, const void* dy, const void* x, std::int64_t n);
    void (*swiglu_forward[kDTypes])(void* y, const void* gate, const void* up, std::int64_t n);
    void (*swiglu_backward[kDTypes])(void* dgate, void* dup, void* y, const void* dy, const void* gate, const void* up,
                                     std::int64_t n);
    // x (heads, head_size): rotate-half with cos_sin (head_size/2, 2); sign -1 rotates back
    void (*rope[kDTypes])(void* x, const float* cos_sin, std::int64_t heads, std::int64_t head_size, float sign);

    // --- norms of rows (rows, n), one after the other; backward adds to dx (rows, n), dweight, dbias (n) ------------
    void (*layernorm_forward[kDTypes])(void* y, float* mean, float* rstd, const void* x, const float* weight,
                                       const float* bias, std::int64_t rows, std::int64_t n, float eps);
    void (*layernorm_backward[kDTypes])(void* dx, float* dweight, float* dbias, const void* dy, const void* x,
                                        const float* weight, const float* mean, const float* rstd, std::int64_t rows,
                                        std::int64_t n);
    void (*rmsnorm_forward[kDTypes])(void* y, float* rstd, const void* x, const float* weight, std::int64_t rows,
                                     std::int64_t n, float eps);
    void (*rmsnorm_backward[kDTypes])(void* dx, float* dweight, const void* dy, const void* x, const float* weight,
                                      const float* rstd, std::int64_t rows, std::int64_t n);

    // --- softmax pieces ---------------------------------------------------------------------------
    float (*maximum)(const float* x, std::int64_t n);  // -inf for n = 0
    // y = exp(scale*x - shift), returns the sum; y may be x. next (n): what is read after this, for which memory is
    // asked meanwhile; any address, x where nothing is known
    float (*exp_sum)(float* y, const float* x, const float* next, float scale, float shift, std::int64_t n);
    // One step of a softmax over blocks of keys; x (rows, columns): scores, a key per row and a query per column.
    // Carries maximum and denominator (columns) on, x becomes exp(scale * (x - maximum)), factor (columns) is what
    // earlier sums shrink by. Returns whether any maximum changed.
    bool (*softmax_columns)(float* x, float* maximum, float* denominator, float* factor, float scale, std::int64_t rows,
                            std::int64_t columns);
    // The same step for one query, whose scores x (n) lie along the lanes: the bits of a column of softmax_columns.
    bool (*softmax_row)(float* x, float* maximum, float* denominator, float* factor, float scale, std::int64_t n);
    // y (rows, columns) *= factor (columns)
    void (*scale_columns)(float* y, const float* factor, std::int64_t rows, std::int64_t columns);
    // p = exp(scale*p - lse), dp = p * (dp - delta) * scale, both in place
    void (*softmax_backward)(float* dp, float* p, float lse, float delta, float scale, std::int64_t n);
    float (*dot)(const float* x, const float* y, std::int64_t n);

    // --- optimizer --------------------------------------------------------------------------------
    double (*sum_squares)(const float* x, std::int64_t n);  // float64 inside
    // weights, by their storage type: master rounded, or null where there are none beside master
    void (*adamw[kDTypes])(void* weights, float* master, float* m, float* v, const float* gradient, std::int64_t n,
                           const AdamWRow* row);

    // How operands of these types are multiplied.
    Products products(DType a, DType b) const {
        if (a == DType::bf16 && b == DType::bf16 && bf16.matmul_tile != nullptr) return bf16;
        Products widened{1,           1,        tile_rows,  tile_columns, block_rows, block_depth, block_columns,
                         matmul_tile, low_step, matmul_low, matmul_row,   {},         {},          peak_flops};
        for (int type = 0; type < kDTypes; ++type) {
            widened.pack_along[type] = pack_along[type];
            widened.pack_across[type] = pack_across[type];
        }
        return widened;
    }

    // How whole matrices of these types are multiplied.
    Products matrix_products(DType a, DType b) const {
        if (chain_fp16 && a == DType::fp16 && b == DType::fp16) return fp16_chains;
        return products(a, b);
    }
};

// Each fills the whole table (scalar) or overwrites its part of one that is already filled.
void fill_scalar(Kernels*);
#ifdef PYTRAIN_BUILD_AVX2
void fill_avx2(Kernels*);
#endif
#ifdef PYTRAIN_BUILD_AVX512
void fill_avx512(Kernels*);
#endif
#ifdef PYTRAIN_BUILD_AVX512_BF16
void fill_avx512_bf16(Kernels*);  // over the table of avx512
#endif
#ifdef PYTRAIN_BUILD_NEON
void fill_neon(Kernels*);
#endif
#ifdef PYTRAIN_BUILD_SVE
void fill_sve(Kernels*);
#endif
#ifdef PYTRAIN_BUILD_NEON_BF16
void fill_neon_bf16(Kernels*);  // over the table of neon
#endif
#ifdef PYTRAIN_BUILD_SVE_BF16
void fill_sve_bf16(Kernels*);  // over the table of sve
#endif

}  // namespace pytrain::cpu
