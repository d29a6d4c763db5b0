// Embedding. Forward moves 2 (3 with positions) elements per element, bound by memory.
//
// Backward without atomics: the block of a row goes on only if no earlier row has the same token; it then adds all rows
// of that token, in their order. Looking costs rows^2 / 2 comparisons of integers, 34 million for 8192 rows, a few
// dozen microseconds of a whole GPU; every gradient element has one writer and one order of addition.
#include "hip/common.h"
#include "hip/kernels.h"

namespace pytrain::hip {

PYTRAIN_KERNEL embed_forward_kernel(Embed embed, Tensor out, Tensor table, Tensor position_table) {
    const std::int64_t octets = ceil_div(embed.hidden, kOctet);
    const std::int64_t task = block_index() * kThreads + thread_index();
    if (task >= embed.rows * octets) return;
    const std::int64_t row = task / octets, column = task % octets * kOctet, n = embed.hidden - column;
    const std::int64_t token = embed.tokens[row];
    Octet sum = {};
    if (token >= embed.vocabulary_begin && token < embed.vocabulary_end)
        sum = load_octet(table, (token - embed.vocabulary_begin) * embed.hidden + column, n);
    if (position_table.data != nullptr) {
        const Octet place = load_octet(position_table, embed.positions[row] * embed.hidden + column, n);
        PYTRAIN_UNROLL
        for (int j = 0; j < kOctet; ++j) sum.value[j] += place.value[j];
    }
    store_octet(out, row * embed.hidden + column, n, sum);
}

// gradient[index - begin] += rows of dout, for indices in [begin, end).
PYTRAIN_KERNEL embed_backward_kernel(const std::int32_t* indices, std::int64_t rows, std::int64_t hidden,
                                     std::int64_t begin, std::int64_t end, Tensor gradient, Tensor dout) {
    PYTRAIN_SHARED(std::int32_t, room, kThreads);
    PYTRAIN_SHARED(std::int32_t, equal, kThreads);
    const std::int64_t row = block_index();
    const std::int32_t wanted = indices[row];
    if (wanted < begin || wanted >= end) return;
    int earlier = 0;
    for (std::int64_t other = thread_index(); other < row; other += kThreads) earlier |= indices[other] == wanted;
    if (block_sum(earlier, room) > 0) return;
    const std::int64_t target = (wanted - begin) * hidden;
    for (std::int64_t column = 0; column < hidden; column += kThreads) {
        const std::int64_t mine = column + thread_index();
        const bool inside = mine < hidden;
        float sum = inside ? load(gradient, target + mine) : 0.0f;
        for (std::int64_t first = row; first < rows; first += kThreads) {
            const std::int64_t other = first + thread_index();
            equal[thread_index()] = other < rows && indices[other] == wanted;
            barrier();
            const int n = static_cast<int>(least(kThreads, rows - first));
            for (int i = 0; i < n; ++i)
                if (equal[i] != 0 && inside) sum += load(dout, (first + i) * hidden + mine);
            barrier();
        }
        if (inside) store(gradient, target + mine, sum);
    }
}

void launch_embed_forward(const Embed& embed, Tensor out, Tensor table, Tensor position_table, hipStream_t queue) {
    const std::int64_t blocks = ceil_div(embed.rows * ceil_div(embed.hidden, kOctet), kThreads);
    if (blocks > 0)
        PYTRAIN_LAUNCH(embed_forward_kernel, dim3(static_cast<unsigned>(blocks)), queue, embed, out, table,
                       position_table);
}

void launch_embed_backward(const Embed& embed, Tensor dtable, Tensor dposition_table, Tensor dout, hipStream_t queue) {
    if (embed.rows == 0) return;
    const dim3 blocks(static_cast<unsigned>(embed.rows));
    if (dtable)
        PYTRAIN_LAUNCH(embed_backward_kernel, blocks, queue, embed.tokens, embed.rows, embed.hidden,
                       embed.vocabulary_begin, embed.vocabulary_end, dtable, dout);
    if (dposition_table)
        PYTRAIN_LAUNCH(embed_backward_kernel, blocks, queue, embed.positions, embed.rows, embed.hidden, std::int64_t{0},
                       std::int64_t{INT32_MAX}, dposition_table, dout);
}

}  // namespace pytrain::hip
