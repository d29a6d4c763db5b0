// Matrix products on the matrix units (MFMA 32x32x8 for bf16 and fp16, 32x32x2 for fp32), fp32 sums.
//
// A block computes 128 x 128 of c, each of its four waves 64 x 64: four 32 x 32 sums, 64 registers. Both operands come
// through LDS, 64 bytes of k per row and step (32 k of 16 bits, 16 of fp32), in two buffers of 16 KiB. A step is 16
// matrix instructions of 64 cycles (fp32: 32), which everything else is put between, by hand:
//
//     first half of the step:   reads the other half's operands from LDS; writes the next step's, which global loads
//                               of 16 bytes have brought, to the other buffer
//     second half:              barrier; starts the loads of the step after the next; reads the next one's first half
//
// so that a load has a step to arrive and a read of LDS half of one, and a wave alone keeps its matrix unit busy. 32
// KiB of LDS and at most 256 registers leave room for two blocks on a compute unit, which covers what waits at the
// barrier.
//
// FLOPs 2 m n k; bytes about (m k + k n) (tiles that read them) + m n. The matrix units bind. k ascends in one order
// that k alone fixes, so that a row's result does not depend on the other rows; gradients of weights, whose rows are
// not rows of a batch, may be cut along k (see `slices_of`).
#include <type_traits>

#include "hip/kernels.h"
#include "hip/matmul_tiles.h"

namespace pytrain::hip {

constexpr int kTilesPerGroup = 8;  // rows of tiles that are computed together, so that they share columns in L2

struct MatmulArguments {
    Matmul product;
    Operand a, b;
    std::int64_t tiles_m, tiles_n;
    std::int64_t slices, slice_steps;  // pieces of k, and steps of each
    float* partials;                   // (slices, tiles_m kTile, tiles_n kTile), where there is more than one
};

// c = sums [+ c] [+ bias] [+ residual], rounded once; activated = gelu of what was stored. Elements [column, column +
// 8) of one row, of which those before the edge count.
PYTRAIN_INLINE void write_octet(const Matmul& product, Octet sums, std::int64_t row, std::int64_t column) {
    if (row >= product.m || column >= product.n) return;
    const std::int64_t n = least(kOctet, product.n - column);
    const std::int64_t place = row * product.ldc + column;
    const auto add = [&](const Tensor& x, std::int64_t i) {
        const Octet octet = load_octet(x, i, n);
        PYTRAIN_UNROLL
        for (int j = 0; j < kOctet; ++j) sums.value[j] += octet.value[j];
    };
    if (product.accumulate) add(product.c, place);
    if (product.bias.data != nullptr) add(product.bias, column);
    if (product.residual.data != nullptr) add(product.residual, row * product.ldresidual + column);
    store_octet(product.c, place, n, sums);
    if (product.activation != Activation::gelu) return;
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) {
        const float stored = product.c.dtype == DType::fp32
                                 ? sums.value[j]
                                 : widened(narrowed(sums.value[j], product.c.dtype), product.c.dtype);
        sums.value[j] = gelu(stored);
    }
    store_octet(product.activated, row * product.ldactivated + column, n, sums);
}

// A wave's sums go through its quarter of LDS, 32 rows at a time, so that memory is read and written by chunks.
PYTRAIN_INLINE void write_sums(const Matmul& product, const Sums (&sums)[2][2], char* room, std::int64_t first_row,
                               std::int64_t first_column) {
    const int line = lane_index() % 32, half = lane_index() / 32;
    float* const mine = reinterpret_cast<float*>(room) + wave_index() * 32 * 64;
    PYTRAIN_UNROLL
    for (int i = 0; i < 2; ++i) {
        barrier();
        PYTRAIN_UNROLL
        for (int j = 0; j < 2; ++j) {
            PYTRAIN_UNROLL
            for (int g = 0; g < 16; ++g) mine[(8 * (g / 4) + 4 * half + g % 4) * 64 + 32 * j + line] = sums[i][j][g];
        }
        barrier();
        for (int task = lane_index(); task < 32 * 64 / kOctet; task += kWave) {
            const int row = task / (64 / kOctet), column = task % (64 / kOctet) * kOctet;
            Octet octet;
            PYTRAIN_UNROLL
            for (int j = 0; j < kOctet; ++j) octet.value[j] = mine[row * 64 + column + j];
            write_octet(product, octet, first_row + 32 * i + row, first_column + column);
        }
    }
}

// The sums of one block, step by step.
template <Format format, bool along_a, bool along_b>
struct TileProduct {
    static constexpr int kDepth = Carrier<format, along_a>::kDepth;
    const Operand &a, &b;
    Carrier<format, along_a> carry_a;
    Carrier<format, along_b> carry_b;
    char *left, *right;  // two buffers each
    int wave_row, wave_column;
    Fragments first, second;  // the halves of a step
    Sums sums[2][2] = {};

    PYTRAIN_INLINE TileProduct(const MatmulArguments& arguments, char* room, std::int64_t tile_row,
                               std::int64_t tile_column, std::int64_t first_step)
        : a(arguments.a),
          b(arguments.b),
          carry_a(a, tile_row, first_step),
          carry_b(b, tile_column, first_step),
          left(room),
          right(room + 2 * kBufferBytes),
          wave_row(wave_index() / 2 * 64),
          wave_column(wave_index() % 2 * 64) {}

    template <bool stored_wide>
    PYTRAIN_INLINE void fetch() {
        carry_a.template fetch<stored_wide>(a);
        carry_b.template fetch<stored_wide>(b);
    }
    PYTRAIN_INLINE void store(int buffer) {
        carry_a.store_to(left + buffer * kBufferBytes);
        carry_b.store_to(right + buffer * kBufferBytes);
    }
    PYTRAIN_INLINE void read(Fragments& fragments, int buffer, int s) {
        fragments.load(left + buffer * kBufferBytes, right + buffer * kBufferBytes, wave_row, wave_column, s);
    }

    // Half a step; `between(i)` goes after the i-th matrix instruction.
    template <class Between>
    PYTRAIN_INLINE void multiply_half(const Fragments& fragments, Between between) {
        PYTRAIN_UNROLL
        for (int i = 0; i < 4 * kParts<format>; ++i) {
            Sums& sum = sums[i / 2 % 2][i % 2];
            sum = multiply_part<format>(fragments.a[i / 2 % 2], fragments.b[i % 2], i / 4, sum);
            keep_order();
            between(i);
            keep_order();
        }
    }

    // The step that `buffer` holds, of which `first` has been read. `more`: there is a whole step after it, which has
    // been fetched; `further`: there is one after that.
    template <bool stored_wide>
    PYTRAIN_INLINE void advance(int buffer, bool more, bool further) {
        read(second, buffer, 1);
        keep_order();
        multiply_half(first, [&](int i) {
            if (!more || i >= 8) return;
            if (i % 2 == 0)
                carry_a.store_quarter(left + (1 - buffer) * kBufferBytes, i / 2);
            else
                carry_b.store_quarter(right + (1 - buffer) * kBufferBytes, i / 2);
        });
        multiply_half(second, [&](int i) {
            if (!more || i != 1) return;
            barrier();  // the other buffer is written, and this one has been read
            if (further) fetch<stored_wide>();
            read(first, 1 - buffer, 0);
        });
    }

    // `whole` steps by chunks. stored_wide: memory holds what is multiplied.
    template <bool stored_wide>
    PYTRAIN_INLINE void run_whole(std::int64_t whole) {
        if (whole == 0) return;
        fetch<stored_wide>();
        store(0);
        if (whole > 1) fetch<stored_wide>();
        barrier();
        read(first, 0, 0);
        std::int64_t step = 0;
        for (; step + 3 < whole; step += 2) {  // two steps, so that addresses in LDS are constants
            advance<stored_wide>(0, true, true);
            advance<stored_wide>(1, true, true);
        }
        PYTRAIN_NO_UNROLL
        for (; step < whole; ++step)
            advance<stored_wide>(static_cast<int>(step % 2), step + 1 < whole, step + 2 < whole);
    }

    // One step that does not fill k, or cannot be read by chunks.
    PYTRAIN_INLINE void run_edge(std::int64_t tile_row, std::int64_t tile_column, std::int64_t step) {
        carry_a.fetch_edge(a, tile_row, step * kDepth);
        carry_b.fetch_edge(b, tile_column, step * kDepth);
        barrier();  // the step before has been read
        store(0);
        barrier();
        read(first, 0, 0);
        read(second, 0, 1);
        multiply_half(first, [](int) {});
        multiply_half(second, [](int) {});
    }
};

// What a block writes where k is cut: its slice's sums, and nothing else yet.
PYTRAIN_INLINE Matmul slice_of(const MatmulArguments& arguments, std::int64_t slice) {
    Matmul product = arguments.product;
    const std::int64_t stride = arguments.tiles_n * kTile;
    product.c = {arguments.partials + slice * arguments.tiles_m * kTile * stride, DType::fp32};
    product.ldc = stride;
    product.accumulate = false;
    product.bias = product.residual = {};
    product.activation = Activation::none;
    return product;
}

template <Format format, bool along_a, bool along_b>
PYTRAIN_KERNEL matmul_kernel(MatmulArguments arguments) {
    using Tile = TileProduct<format, along_a, along_b>;
    PYTRAIN_SHARED(Chunk, room, 4 * kBufferBytes / 16);

    // Tiles in groups of rows, down a group's column first.
    const int index = static_cast<int>(block_index()), tiles_m = static_cast<int>(arguments.tiles_m);
    const int group_tiles = kTilesPerGroup * static_cast<int>(arguments.tiles_n);
    const int group = index / group_tiles, within = index % group_tiles;
    const int rest = tiles_m - group * kTilesPerGroup, height = rest < kTilesPerGroup ? rest : kTilesPerGroup;
    const std::int64_t tile_row = std::int64_t{uniform(group * kTilesPerGroup + within % height)} * kTile;
    const std::int64_t tile_column = std::int64_t{uniform(within / height)} * kTile;

    const std::int64_t k = arguments.product.k, slice = block_row(), begin = slice * arguments.slice_steps;
    const std::int64_t end = least(ceil_div(k, Tile::kDepth), begin + arguments.slice_steps);
    const std::int64_t last_whole = arguments.a.chunks && arguments.b.chunks ? least(end, k / Tile::kDepth) : 0;
    const std::int64_t whole = last_whole > begin ? last_whole - begin : 0;
    Tile tile(arguments, reinterpret_cast<char*>(room), tile_row, tile_column, begin);
    if (format != Format::fp32 || (arguments.a.x.dtype == DType::fp32 && arguments.b.x.dtype == DType::fp32))
        tile.template run_whole<true>(whole);
    else
        tile.template run_whole<false>(whole);
    for (std::int64_t step = begin + whole; step < end; ++step) tile.run_edge(tile_row, tile_column, step);
    // Two calls: addresses that might be one's or the other's would not be known to lie in global memory.
    const std::int64_t row = tile_row + tile.wave_row, column = tile_column + tile.wave_column;
    if (arguments.slices == 1)
        write_sums(arguments.product, tile.sums, tile.left, row, column);
    else
        write_sums(slice_of(arguments, slice), tile.sums, tile.left, row, column);
}

// The slices' sums in order, and what every product ends with.
PYTRAIN_KERNEL add_slices_kernel(MatmulArguments arguments) {
    const Matmul& product = arguments.product;
    const std::int64_t octets = ceil_div(product.n, kOctet), task = block_index() * kThreads + thread_index();
    if (task >= product.m * octets) return;
    const std::int64_t row = task / octets, column = task % octets * kOctet, stride = arguments.tiles_n * kTile;
    Octet sums = {};
    for (std::int64_t slice = 0; slice < arguments.slices; ++slice) {
        const Tensor partial = {arguments.partials, DType::fp32};
        const Octet octet = load_octet(partial, (slice * arguments.tiles_m * kTile + row) * stride + column, kOctet);
        PYTRAIN_UNROLL
        for (int j = 0; j < kOctet; ++j) sums.value[j] += octet.value[j];
    }
    write_octet(product, sums, row, column);
}

template <Format format>
void launch_format(const MatmulArguments& arguments, bool along_a, bool along_b, hipStream_t queue) {
    const dim3 blocks(static_cast<unsigned>(arguments.tiles_m * arguments.tiles_n),
                      static_cast<unsigned>(arguments.slices));
    if (along_a && along_b)
        PYTRAIN_LAUNCH((matmul_kernel<format, true, true>), blocks, queue, arguments);
    else if (along_a)
        PYTRAIN_LAUNCH((matmul_kernel<format, true, false>), blocks, queue, arguments);
    else if (along_b)
        PYTRAIN_LAUNCH((matmul_kernel<format, false, true>), blocks, queue, arguments);
    else
        PYTRAIN_LAUNCH((matmul_kernel<format, false, false>), blocks, queue, arguments);
}

Operand operand_of(const Tensor& x, std::int64_t ld, std::int64_t rows, std::int64_t depth) {
    const bool chunks = reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 &&
                        ld * static_cast<std::int64_t>(size_of(x.dtype)) % 16 == 0;
    return {x, ld, rows, depth, chunks};
}

// In how many pieces k is cut: what takes the least time by arithmetic of one GCD of MI250X, whatever the GPU, so that
// the order of addition follows from the shape alone. A compute unit takes a step of one block in 16 (fp32: 32) matrix
// instructions of 64 cycles at 1.7 GHz; a slice's tile of sums (64 KiB) is written and read again at 1.6 TB/s, by one
// more kernel.
std::int64_t slices_of(std::int64_t tiles, std::int64_t steps, bool wide) {
    constexpr std::int64_t kTileNanoseconds = 82, kLaunchNanoseconds = 5000, kLeastSteps = 8;
    const std::int64_t step_nanoseconds = wide ? 1204 : 602;
    std::int64_t best = 1, least_time = 0;
    for (std::int64_t slices = 1; slices == 1 || (slices * tiles <= kSplitTiles && slices * kLeastSteps <= steps);
         ++slices) {
        const std::int64_t sums = slices == 1 ? 0 : kLaunchNanoseconds + slices * tiles * kTileNanoseconds;
        const std::int64_t time =
            ceil_div(slices * tiles, kComputeUnits) * ceil_div(steps, slices) * step_nanoseconds + sums;
        if (slices == 1 || time < least_time) best = slices, least_time = time;
    }
    return best;
}

void launch_add_slices(const MatmulArguments& arguments, hipStream_t queue) {
    const Matmul& product = arguments.product;
    const dim3 blocks(static_cast<unsigned>(ceil_div(product.m * ceil_div(product.n, kOctet), kThreads)));
    PYTRAIN_LAUNCH(add_slices_kernel, blocks, queue, arguments);
}

void launch_matmul(const Matmul& product, float* partials, hipStream_t queue) {
    if (product.m == 0 || product.n == 0) return;
    MatmulArguments arguments{};
    arguments.product = product;
    arguments.a = operand_of(product.a, product.lda, product.m, product.k);
    arguments.b = operand_of(product.b, product.ldb, product.n, product.k);
    arguments.tiles_m = ceil_div(product.m, kTile);
    arguments.tiles_n = ceil_div(product.n, kTile);
    const bool wide = product.a.dtype != product.b.dtype || product.a.dtype == DType::fp32;
    const std::int64_t steps = ceil_div(product.k, std::int64_t{kRowBytes / (wide ? 4 : 2)});
    const bool weight_gradient = product.transpose_a == Transpose::yes && product.transpose_b == Transpose::no;
    arguments.slices = weight_gradient ? slices_of(arguments.tiles_m * arguments.tiles_n, steps, wide) : 1;
    arguments.slice_steps = ceil_div(steps, arguments.slices);
    arguments.slices = steps == 0 ? 1 : ceil_div(steps, arguments.slice_steps);
    arguments.partials = partials;
    const bool along_a = product.transpose_a == Transpose::no, along_b = product.transpose_b == Transpose::yes;
    if (wide)
        launch_format<Format::fp32>(arguments, along_a, along_b, queue);
    else if (product.a.dtype == DType::bf16)
        launch_format<Format::bf16>(arguments, along_a, along_b, queue);
    else
        launch_format<Format::fp16>(arguments, along_a, along_b, queue);
    if (arguments.slices > 1) launch_add_slices(arguments, queue);
}

void launch_matmul_end(const Matmul& product, float* sums, std::int64_t ld, hipStream_t queue) {
    MatmulArguments arguments{};
    arguments.product = product;
    arguments.tiles_m = ceil_div(product.m, kTile);
    arguments.tiles_n = ld / kTile;
    arguments.slices = 1;
    arguments.partials = sums;
    launch_add_slices(arguments, queue);
}

}  // namespace pytrain::hip
