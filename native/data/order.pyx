# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Sample order: a keyed permutation of [0, n) and the interleaving of several corpora.

Nothing is stored and nothing is drawn in sequence: each element is a function of (seed, stream, epoch,
position), so that a seek costs as much as the next element and every process grid sees the same order.
"""
from libc.stdint cimport int32_t, int64_t, uint64_t

import math

import numpy as np

cdef extern from *:
    """
    #include <stdint.h>
    /* 64 x 64 -> 128 bit products; ISO C has no type for them, GCC and Clang do on every 64-bit target. */
    __extension__ typedef unsigned __int128 pytrain_wide;
    static inline uint64_t multiply_high(uint64_t a, uint64_t b) {
        return (uint64_t)(((pytrain_wide)a * b) >> 64);
    }
    /* floor(a * b / c) for a result that fits 64 bits. */
    static inline uint64_t multiply_divide(uint64_t a, uint64_t b, uint64_t c) {
        return (uint64_t)((pytrain_wide)a * b / c);
    }
    """
    uint64_t multiply_high(uint64_t a, uint64_t b) noexcept nogil
    uint64_t multiply_divide(uint64_t a, uint64_t b, uint64_t c) noexcept nogil

# Chi-square tests over all orders of five elements fail at 12 rounds and pass from 16 on; 24 leaves a margin
# and still costs about 0.1 microseconds a sample.
cdef enum:
    ROUNDS = 24
    BLOCK = 64

# Second word of Philox's third counter: separates the uses of one seed.
cdef enum:
    DOMAIN_ORDER = 1
    DOMAIN_MIXTURE = 2

MIXTURE_BLOCK = BLOCK
MAXIMUM_SIZE = 1 << 62


cdef void philox(uint64_t* counter, uint64_t key0, uint64_t key1, uint64_t* output) noexcept nogil:
    """Philox4x64-10, four words to four (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3")."""
    cdef uint64_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3]
    cdef uint64_t high0, high1, low0, low1
    cdef int turn
    for turn in range(10):
        high0 = multiply_high(0xD2E7470EE14C6C93u, c0)
        low0 = 0xD2E7470EE14C6C93u * c0
        high1 = multiply_high(0xCA5A826395121157u, c2)
        low1 = 0xCA5A826395121157u * c2
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 += 0x9E3779B97F4A7C15u
        key1 += 0xBB67AE8584CAA73Bu
    output[0] = c0
    output[1] = c1
    output[2] = c2
    output[3] = c3


cdef inline uint64_t scramble(uint64_t value) noexcept nogil:
    """The finaliser of splitmix64: a bijection in which each input bit moves half of the output bits."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu
    return value ^ (value >> 31)


cdef struct Permutation:
    uint64_t size
    # The Feistel network runs on pairs (left < rows, right < columns); rows * columns >= size.
    uint64_t rows
    uint64_t columns
    uint64_t keys[ROUNDS]


cdef void set_keys(Permutation* permutation, uint64_t seed, uint64_t stream, uint64_t epoch) noexcept nogil:
    cdef uint64_t counter[4]
    cdef int block
    counter[1] = epoch
    counter[2] = DOMAIN_ORDER
    counter[3] = 0
    for block in range(ROUNDS // 4):
        counter[0] = block
        philox(counter, seed, stream, &permutation.keys[4 * block])


cdef inline uint64_t permuted(const Permutation* permutation, uint64_t position) noexcept nogil:
    """Element `position` of the permutation.

    A Feistel network on a rows x columns rectangle about as wide as high, walked again while it leads outside
    [0, size). The rectangle exceeds `size` by less than one row, so that a second walk is rare for any size.
    """
    cdef uint64_t left, right
    cdef int turn
    while True:
        right = position // permutation.rows
        left = position - right * permutation.rows
        for turn in range(0, ROUNDS, 2):
            left += multiply_high(scramble(right ^ permutation.keys[turn]), permutation.rows)
            if left >= permutation.rows:
                left -= permutation.rows
            right += multiply_high(scramble(left ^ permutation.keys[turn + 1]), permutation.columns)
            if right >= permutation.columns:
                right -= permutation.columns
        position = right * permutation.rows + left
        if position < permutation.size:
            return position


cdef Permutation make_permutation(object size) except *:
    cdef Permutation permutation
    if not 1 <= size <= MAXIMUM_SIZE:
        raise ValueError(f"the size of a permutation must be in 1..{MAXIMUM_SIZE}, not {size}")
    permutation.size = size
    permutation.rows = math.isqrt(size - 1) + 1
    permutation.columns = (size + permutation.rows - 1) // permutation.rows
    return permutation


def philox_block(counter, uint64_t key0, uint64_t key1):
    """Philox4x64-10 of a counter of four uint64 words: uint64 [4]. Public for its known answers."""
    cdef uint64_t words[4]
    cdef uint64_t[::1] view
    cdef int i
    for i in range(4):
        words[i] = counter[i]
    output = np.empty(4, np.uint64)
    view = output
    philox(words, key0, key1, &view[0])
    return output


def permute(int64_t first, int64_t count, size, uint64_t seed, uint64_t stream, uint64_t epoch):
    """Elements `first .. first + count - 1` of the permutation of [0, size) keyed by (seed, stream, epoch).

    Returns int64 [count]. Cost O(count), whatever `first` and `size`. Raises ValueError outside [0, size).
    """
    cdef Permutation permutation = make_permutation(size)
    if first < 0 or count < 0 or first + count > size:
        raise ValueError(
            f"positions {first}..{first + count - 1} are outside a permutation of {size} elements"
        )
    output = np.empty(count, np.int64)
    cdef int64_t[::1] view = output
    cdef int64_t i
    with nogil:
        set_keys(&permutation, seed, stream, epoch)
        for i in range(count):
            view[i] = <int64_t>permuted(&permutation, <uint64_t>(first + i))
    return output


def ordinals_to_samples(const int64_t[::1] ordinals, size, uint64_t seed, uint64_t stream):
    """Sample ids of the draws `ordinals` (int64 [count], counted from 0 over all epochs) of one corpus.

    Draw m is element m % size of the permutation of epoch m // size. Returns int64 [count] in [0, size).
    """
    cdef Permutation permutation = make_permutation(size)
    cdef int64_t i, count = ordinals.shape[0]
    cdef uint64_t epoch, current = 0
    cdef uint64_t ordinal
    output = np.empty(count, np.int64)
    cdef int64_t[::1] view = output
    for i in range(count):
        if ordinals[i] < 0:
            raise ValueError(f"draw {ordinals[i]} is negative")
    with nogil:
        set_keys(&permutation, seed, stream, current)
        for i in range(count):
            ordinal = <uint64_t>ordinals[i]
            epoch = ordinal // permutation.size
            if epoch != current:
                set_keys(&permutation, seed, stream, epoch)
                current = epoch
            view[i] = <int64_t>permuted(&permutation, ordinal - epoch * permutation.size)
    return output


cdef uint64_t whole_count(uint64_t samples, const uint64_t* cumulative, int corpora,
                          int corpus) noexcept nogil:
    """How many of the first `samples` samples belong to `corpus`, at a block boundary.

    Samples are split between the first and second half of the corpora in proportion to their weights,
    rounding down for the first, then again inside each half. Rounding corpora one by one (largest remainder)
    can make a count fall as `samples` grows; these counts never fall, add up to `samples`, and stay within
    log2(corpora) + 1 of weight * samples.
    """
    cdef int low = 0, high = corpora, middle
    cdef uint64_t first
    while high - low > 1:
        middle = (low + high) // 2
        first = 0
        if cumulative[high] > cumulative[low]:
            first = multiply_divide(samples, cumulative[middle] - cumulative[low],
                                    cumulative[high] - cumulative[low])
        if corpus < middle:
            high = middle
            samples = first
        else:
            low = middle
            samples -= first
    return samples


cdef void block_labels(uint64_t block, const uint64_t* cumulative, int corpora, uint64_t seed, uint64_t phase,
                       int64_t* before, int32_t* labels) noexcept nogil:
    """Corpus of each of the BLOCK samples of `block`, shuffled; before[c]: samples of corpus c before it."""
    cdef uint64_t counter[4]
    cdef uint64_t words[4]
    cdef uint64_t after
    cdef int corpus, slot = 0, other
    cdef int32_t label
    for corpus in range(corpora):
        before[corpus] = <int64_t>whole_count(block * BLOCK, cumulative, corpora, corpus)
        after = whole_count((block + 1) * BLOCK, cumulative, corpora, corpus)
        for other in range(<int>(after - <uint64_t>before[corpus])):
            labels[slot] = corpus
            slot += 1
    counter[0] = block
    counter[2] = DOMAIN_MIXTURE
    counter[3] = 0
    # Fisher-Yates from the end; slot i takes word i % 4 of Philox block i / 4.
    for slot in range(BLOCK - 1, 0, -1):
        if slot % 4 == 3:
            counter[1] = slot // 4
            philox(counter, seed, phase, words)
        other = <int>multiply_high(words[slot % 4], <uint64_t>(slot + 1))
        label = labels[slot]
        labels[slot] = labels[other]
        labels[other] = label


def interleave(int64_t first, int64_t count, const uint64_t[::1] cumulative, uint64_t seed, uint64_t phase):
    """Corpus and draw of the samples `first .. first + count - 1` of one phase.

    cumulative: uint64 [corpora + 1], running sum of integer weights from 0. Returns (corpus int32 [count],
    draw int64 [count]): sample i is draw `draw[i]` (0, 1, 2, ... without gaps) of corpus `corpus[i]` since
    the phase began. Each block of MIXTURE_BLOCK samples holds an exact quota of every corpus, shuffled.
    """
    cdef int corpora = <int>cumulative.shape[0] - 1
    check_interleave(first, count, cumulative)
    corpus_ids = np.empty(count, np.int32)
    draws = np.empty(count, np.int64)
    before_array = np.zeros(corpora, np.int64)
    cdef int32_t[::1] corpus_view = corpus_ids
    cdef int64_t[::1] draw_view = draws
    cdef int64_t[::1] before = before_array
    cdef int32_t labels[BLOCK]
    cdef int64_t block, sample
    cdef int slot
    with nogil:
        for block in range(first // BLOCK, (first + count + BLOCK - 1) // BLOCK):
            block_labels(<uint64_t>block, &cumulative[0], corpora, seed, phase, &before[0], labels)
            for slot in range(BLOCK):
                sample = block * BLOCK + slot - first
                if 0 <= sample < count:
                    corpus_view[sample] = labels[slot]
                    draw_view[sample] = before[labels[slot]]
                before[labels[slot]] += 1
    return corpus_ids, draws


def interleaved_counts(int64_t samples, const uint64_t[::1] cumulative, uint64_t seed, uint64_t phase):
    """How many of a phase's first `samples` samples each corpus gives: int64 [corpora]."""
    cdef int corpora = <int>cumulative.shape[0] - 1
    check_interleave(samples, 0, cumulative)
    counts = np.zeros(corpora, np.int64)
    cdef int64_t[::1] view = counts
    cdef int32_t labels[BLOCK]
    cdef int slot
    with nogil:
        block_labels(<uint64_t>(samples // BLOCK), &cumulative[0], corpora, seed, phase, &view[0], labels)
        for slot in range(<int>(samples % BLOCK)):
            view[labels[slot]] += 1
    return counts


cdef int check_interleave(int64_t first, int64_t count, const uint64_t[::1] cumulative) except -1:
    cdef Py_ssize_t i
    if cumulative.shape[0] < 2 or cumulative[0] != 0 or cumulative[cumulative.shape[0] - 1] == 0:
        raise ValueError("the running sum of weights must start at 0 and end above 0")
    for i in range(cumulative.shape[0] - 1):
        if cumulative[i + 1] < cumulative[i]:
            raise ValueError("the running sum of weights must not fall")
    if first < 0 or count < 0 or first > MAXIMUM_SIZE or count > MAXIMUM_SIZE:
        raise ValueError(f"samples {first}..{first + count - 1} are outside [0, {MAXIMUM_SIZE}]")
    return 0
