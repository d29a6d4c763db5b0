// Matrix products on the matrix units (MFMA 32x32x8 for bf16 and fp16, 32x32x2 for fp32), fp32 sums.
//
// A block computes 128 x 128 of c, each of its four waves 64 x 64: four 32 x 32 sums, 64 registers. Both operands come
// through LDS, 64 bytes of k per row and step (32 k of 16 bits, 16 of fp32), in two buffers: while one is multiplied,
// global loads of 16 bytes fetch the next into registers. 32 KiB of LDS leave room for two blocks on a compute unit.
//
// FLOPs 2 m n k; bytes about (m k + k n) (tiles that read them) + m n. The matrix units bind: per step a wave issues 16
// MFMA of 64 cycles, against about 60 other instructions. k ascends in one order that k alone fixes, so that a row's
// result does not depend on the other rows.
#include "hip/common.h"
#include "hip/kernels.h"

namespace pytrain::hip {

constexpr int kTile = 128;     // rows and columns of c that a block computes
constexpr int kRowBytes = 64;  // of one row of an operand in LDS
constexpr int kBufferBytes = kTile * kRowBytes;
constexpr int kTilesPerGroup = 8;  // rows of tiles that are computed together, so that they share columns in L2

// One side of the product: rows of c (or its columns) and k. `along`: neighbours in memory are neighbours in k.
struct Operand {
    Tensor x;
    std::int64_t ld, rows, depth;
    bool chunks;  // whole chunks may be read where they begin inside: base and rows lie on 16 bytes
};

struct MatmulArguments {
    Matmul product;
    Operand a, b;
    std::int64_t tiles_m, tiles_n;
};

template <Format format>
struct Element {
    using Type = std::uint16_t;
    static constexpr int kPerChunk = 8;
};
template <>
struct Element<Format::fp32> {
    using Type = float;
    static constexpr int kPerChunk = 4;
};

// Where a chunk (16 bytes; four to a row) lies in LDS. Two rows share a line of 128 bytes, which spans all banks; the
// exclusive-or spreads what eight neighbouring lanes read, and what the lanes of a transposing store write, over it.
PYTRAIN_INLINE int place_of(int row, int chunk) {
    return (row >> 1) * 128 + ((((row & 1) * 4 + chunk) ^ ((row >> 1) & 3) ^ ((row >> 3) & 7)) * 16);
}

// One element as LDS holds it; 0 outside.
template <Format format, bool along>
PYTRAIN_INLINE typename Element<format>::Type element(const Operand& operand, std::int64_t row, std::int64_t k) {
    if (row >= operand.rows || k >= operand.depth) return 0;
    const std::int64_t i = along ? row * operand.ld + k : k * operand.ld + row;
    if constexpr (format == Format::fp32)
        return load(operand.x, i);
    else
        return static_cast<const std::uint16_t*>(operand.x.data)[i];
}

// Eight 16-bit or four fp32 neighbours: 16 bytes in LDS, 8 in memory where 16-bit storage is widened.
template <Format format>
PYTRAIN_INLINE Chunk load_chunk(GlobalBytes address, DType dtype) {
    if (format != Format::fp32 || dtype == DType::fp32) return load_global<Chunk>(address);
    const auto four = load_global<std::uint64_t>(address);
    Chunk chunk;
    PYTRAIN_UNROLL
    for (int j = 0; j < 4; ++j) chunk[j] = bits_of(widened(static_cast<std::uint16_t>(four >> (16 * j)), dtype));
    return chunk;
}

// What one thread carries of an operand's tile from memory to LDS: two chunks.
// along: chunk thread % 4 of rows thread / 4 and thread / 4 + 64.
// else: the same rows of two neighbouring k, which become pairs in LDS.
template <Format format, bool along>
struct Carrier {
    static constexpr int kPer = Element<format>::kPerChunk;
    static constexpr int kDepth = kRowBytes / 16 * kPer;  // k of one step
    static constexpr int kRowBlocks = kTile / kPer;

    int row, k;                   // of the first chunk, within the tile
    GlobalBytes base;             // of the tile at this step's k: the same in all threads, so that scalars advance it
    std::int64_t step;            // bytes from one step's k to the next
    std::uint32_t first, second;  // bytes from there to this thread's chunks
    Chunk chunk[2] = {};

    PYTRAIN_INLINE Carrier(const Operand& operand, std::int64_t tile_row) {
        const int thread = thread_index();
        const std::int64_t size = operand.x.dtype == DType::fp32 ? 4 : 2, last = operand.rows - 1 - tile_row;
        base = (GlobalBytes)operand.x.data + (along ? tile_row * operand.ld : tile_row) * size;
        step = (along ? kDepth : kDepth * operand.ld) * size;
        if constexpr (along) {
            row = thread / 4;
            k = thread % 4 * kPer;
            // Rows beyond the last are read as the last: what they add is never stored.
            first = static_cast<std::uint32_t>((least(row, last) * operand.ld + k) * size);
            second = static_cast<std::uint32_t>((least(row + kTile / 2, last) * operand.ld + k) * size);
        } else {
            row = thread % kRowBlocks * kPer;
            k = thread / kRowBlocks * 2;
            first = static_cast<std::uint32_t>((k * operand.ld + least(row, last / kPer * kPer)) * size);
            second = first + static_cast<std::uint32_t>(operand.ld * size);
        }
    }

    // The next whole tile, by chunks.
    PYTRAIN_INLINE void fetch(const Operand& operand) {
        chunk[0] = load_chunk<format>(base + kept_offset(first), operand.x.dtype);
        chunk[1] = load_chunk<format>(base + kept_offset(second), operand.x.dtype);
        base = kept_scalar(base + step);
    }

    // Any tile, element by element.
    PYTRAIN_INLINE void fetch_edge(const Operand& operand, std::int64_t tile_row, std::int64_t k0) {
        PYTRAIN_UNROLL
        for (int c = 0; c < 2; ++c) {
            PYTRAIN_UNROLL
            for (int word = 0; word < 4; ++word) {
                std::uint32_t bits = 0;
                PYTRAIN_UNROLL
                for (int part = 0; part < kPer / 4; ++part) {
                    const int j = word * (kPer / 4) + part;
                    const std::int64_t at_row = along ? tile_row + row + c * (kTile / 2) : tile_row + row + j;
                    const std::int64_t at_k = along ? k0 + k + j : k0 + k + c;
                    const auto value = element<format, along>(operand, at_row, at_k);
                    if constexpr (format == Format::fp32)
                        bits = bits_of(value);
                    else
                        bits |= static_cast<std::uint32_t>(value) << (16 * part);
                }
                chunk[c][word] = bits;
            }
        }
    }

    PYTRAIN_INLINE void store_to(char* buffer) const {
        if constexpr (along) {
            *reinterpret_cast<Chunk*>(buffer + place_of(row, thread_index() % 4)) = chunk[0];
            *reinterpret_cast<Chunk*>(buffer + place_of(row + kTile / 2, thread_index() % 4)) = chunk[1];
        } else if constexpr (format == Format::fp32) {
            PYTRAIN_UNROLL
            for (int j = 0; j < 4; ++j) {
                const std::uint64_t pair = chunk[0][j] | static_cast<std::uint64_t>(chunk[1][j]) << 32;
                *reinterpret_cast<std::uint64_t*>(buffer + place_of(row + j, k / 4) + k % 4 * 4) = pair;
            }
        } else {
            PYTRAIN_UNROLL
            for (int j = 0; j < 8; ++j) {
                const std::uint32_t low = chunk[0][j / 2] >> (16 * (j % 2)), high = chunk[1][j / 2] >> (16 * (j % 2));
                *reinterpret_cast<std::uint32_t*>(buffer + place_of(row + j, k / 8) + k % 8 * 2) =
                    (low & 0xffffu) | high << 16;
            }
        }
    }
};

// Four 32 x 32 sums of a wave += one step of both operands.
template <Format format>
PYTRAIN_INLINE void multiply_step(Sums (&sums)[2][2], const char* left, const char* right, int wave_row,
                                  int wave_column) {
    const int line = lane_index() % 32, half = lane_index() / 32;
    PYTRAIN_UNROLL
    for (int s = 0; s < 2; ++s) {
        Chunk a[2], b[2];
        PYTRAIN_UNROLL
        for (int i = 0; i < 2; ++i) {
            a[i] = *reinterpret_cast<const Chunk*>(left + place_of(wave_row + 32 * i + line, 2 * s + half));
            b[i] = *reinterpret_cast<const Chunk*>(right + place_of(wave_column + 32 * i + line, 2 * s + half));
        }
        PYTRAIN_UNROLL
        for (int i = 0; i < 2; ++i) {
            PYTRAIN_UNROLL
            for (int j = 0; j < 2; ++j) sums[i][j] = multiply<format>(a[i], b[j], sums[i][j]);
        }
    }
}

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

template <Format format, bool along_a, bool along_b>
PYTRAIN_KERNEL matmul_kernel(MatmulArguments arguments) {
    using Left = Carrier<format, along_a>;
    using Right = Carrier<format, along_b>;
    constexpr int depth = Left::kDepth;
    PYTRAIN_SHARED(Chunk, room, 4 * kBufferBytes / 16);
    char* const left = reinterpret_cast<char*>(room);
    char* const right = left + 2 * kBufferBytes;

    // Tiles in groups of rows, down a group's column first.
    const int index = static_cast<int>(block_index()), tiles_m = static_cast<int>(arguments.tiles_m);
    const int group_tiles = kTilesPerGroup * static_cast<int>(arguments.tiles_n);
    const int group = index / group_tiles, within = index % group_tiles;
    const int rest = tiles_m - group * kTilesPerGroup, height = rest < kTilesPerGroup ? rest : kTilesPerGroup;
    const std::int64_t tile_row = std::int64_t{uniform(group * kTilesPerGroup + within % height)} * kTile;
    const std::int64_t tile_column = std::int64_t{uniform(within / height)} * kTile;
    const int wave_row = wave_index() / 2 * 64, wave_column = wave_index() % 2 * 64;

    const Operand &a = arguments.a, &b = arguments.b;
    const std::int64_t steps = ceil_div(arguments.product.k, depth);
    const std::int64_t whole = a.chunks && b.chunks ? arguments.product.k / depth : 0;
    Left carry_a(a, tile_row);
    Right carry_b(b, tile_column);
    Sums sums[2][2] = {};

    const auto store_step = [&](int buffer) {
        carry_a.store_to(left + buffer * kBufferBytes);
        carry_b.store_to(right + buffer * kBufferBytes);
    };
    const auto multiply_buffers = [&](int buffer) {
        multiply_step<format>(sums, left + buffer * kBufferBytes, right + buffer * kBufferBytes, wave_row, wave_column);
    };
    // Fetches the next step, multiplies the one that `buffer` holds, and puts the fetched one into the other.
    const auto advance = [&](int buffer) {
        carry_a.fetch(a);
        carry_b.fetch(b);
        keep_order();  // the loads have the whole of the products to arrive
        multiply_buffers(buffer);
        keep_order();
        store_step(1 - buffer);
        barrier();
    };
    if (whole > 0) {
        carry_a.fetch(a);
        carry_b.fetch(b);
        store_step(0);
        barrier();
    }
    std::int64_t step = 0;
    for (; step + 2 < whole; step += 2) {  // two steps, so that addresses in LDS are constants
        advance(0);
        advance(1);
    }
    // The last one or two, and what does not fill a step or cannot be read by chunks.
    for (bool fetched = whole > 0; step < steps; ++step, fetched = false) {
        if (!fetched) {
            if (step < whole) {
                carry_a.fetch(a);
                carry_b.fetch(b);
            } else {
                carry_a.fetch_edge(a, tile_row, step * depth);
                carry_b.fetch_edge(b, tile_column, step * depth);
            }
            barrier();  // the step before has been read
            store_step(0);
            barrier();
        }
        multiply_buffers(0);
    }
    write_sums(arguments.product, sums, left, tile_row + wave_row, tile_column + wave_column);
}

template <Format format>
void launch_format(const MatmulArguments& arguments, bool along_a, bool along_b, hipStream_t queue) {
    const dim3 blocks(static_cast<unsigned>(arguments.tiles_m * arguments.tiles_n));
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

void launch_matmul(const Matmul& product, hipStream_t queue) {
    if (product.m == 0 || product.n == 0) return;
    MatmulArguments arguments{};
    arguments.product = product;
    arguments.a = operand_of(product.a, product.lda, product.m, product.k);
    arguments.b = operand_of(product.b, product.ldb, product.n, product.k);
    arguments.tiles_m = ceil_div(product.m, kTile);
    arguments.tiles_n = ceil_div(product.n, kTile);
    const bool along_a = product.transpose_a == Transpose::no, along_b = product.transpose_b == Transpose::yes;
    if (product.a.dtype == DType::bf16 && product.b.dtype == DType::bf16)
        launch_format<Format::bf16>(arguments, along_a, along_b, queue);
    else if (product.a.dtype == DType::fp16 && product.b.dtype == DType::fp16)
        launch_format<Format::fp16>(arguments, along_a, along_b, queue);
    else
        launch_format<Format::fp32>(arguments, along_a, along_b, queue);
}

}  // namespace pytrain::hip
