// Packing of panels whose words are pairs of bf16, from bf16 or fp32 (rounded to nearest even).
//
// Bytes: each element is read once and written once as bf16. Loads and shuffles: four shuffles per word along, one
// permutation per sixteen words across.
#pragma once
#include <cstdint>

#include "cpu/avx512/microkernel.h"  // transpose
#include "cpu/avx512/simd.h"

namespace pytrain::cpu::avx512_bf16 {
namespace {

using avx512::kTileRows;

inline __mmask32 elements(std::int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1u; }

// Sixteen words of bf16 pairs read along a vector, and two rows of sixteen elements, each the lower or upper half of
// sixteen words. Tails are zero.
struct FromBf16 {
    using Element = std::uint16_t;
    static __m512i load_words(const Element* p) { return _mm512_loadu_si512(p); }
    static __m512i load_words(const Element* p, std::int64_t n) { return _mm512_maskz_loadu_epi16(elements(n), p); }
    // Row `upper` may be null: zeros.
    static __m512i load_rows(const Element* lower, const Element* upper, std::int64_t n) {
        const __mmask16 mask = avx512::lanes(n);
        const __m256i low = _mm256_maskz_loadu_epi16(mask, lower);
        const __m256i high = upper ? _mm256_maskz_loadu_epi16(mask, upper) : _mm256_setzero_si256();
        return interleave(low, high);
    }
    static __m512i load_rows(const Element* lower, const Element* upper) {
        return interleave(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lower)),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(upper)));
    }
    // All 32 elements of two rows.
    static void load_rows(const Element* lower, const Element* upper, __m512i* first, __m512i* second) {
        const __m512i low = load_words(lower), high = load_words(upper);
        const __m512i order = _mm512_set_epi32(0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a,
                                               0x00290009, 0x00280008, 0x00270007, 0x00260006, 0x00250005, 0x00240004,
                                               0x00230003, 0x00220002, 0x00210001, 0x00200000);
        *first = _mm512_permutex2var_epi16(low, order, high);
        *second = _mm512_permutex2var_epi16(low, _mm512_add_epi16(order, _mm512_set1_epi16(16)), high);
    }
    // The first sixteen elements of two rows, whatever is wanted of them.
    static __m512i load_first(const Element* lower, const Element* upper) {
        const __m512i order = _mm512_set_epi32(0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a,
                                               0x00290009, 0x00280008, 0x00270007, 0x00260006, 0x00250005, 0x00240004,
                                               0x00230003, 0x00220002, 0x00210001, 0x00200000);
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lower));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(upper));
        return _mm512_permutex2var_epi16(_mm512_castsi256_si512(low), order, _mm512_castsi256_si512(high));
    }
    static __m512i interleave(__m256i low, __m256i high) {
        return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    }
};

struct FromFp32 {
    using Element = float;
    static __m512i load_words(const Element* p) { return round(_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)); }
    static __m512i load_words(const Element* p, std::int64_t n) {
        const std::int64_t rest = n > 16 ? n - 16 : 0;
        const __m512 low = _mm512_maskz_loadu_ps(avx512::lanes(n < 16 ? n : 16), p);
        return round(low, rest > 0 ? _mm512_maskz_loadu_ps(avx512::lanes(rest), p + 16) : _mm512_setzero_ps());
    }
    static __m512i load_rows(const Element* lower, const Element* upper, std::int64_t n) {
        const __mmask16 mask = avx512::lanes(n);
        return interleave(_mm512_maskz_loadu_ps(mask, lower),
                          upper ? _mm512_maskz_loadu_ps(mask, upper) : _mm512_setzero_ps());
    }
    static __m512i load_rows(const Element* lower, const Element* upper) {
        return interleave(_mm512_loadu_ps(lower), _mm512_loadu_ps(upper));
    }
    static void load_rows(const Element* lower, const Element* upper, __m512i* first, __m512i* second) {
        *first = load_rows(lower, upper);
        *second = load_rows(lower + 16, upper + 16);
    }
    static __m512i load_first(const Element* lower, const Element* upper) { return load_rows(lower, upper); }
    static __m512i round(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
    static __m512i interleave(__m512 low, __m512 high) {
        const __m512i both = round(low, high);
        const __m512i halves = _mm512_set_epi32(0x001f000f, 0x001e000e, 0x001d000d, 0x001c000c, 0x001b000b, 0x001a000a,
                                                0x00190009, 0x00180008, 0x00170007, 0x00160006, 0x00150005, 0x00140004,
                                                0x00130003, 0x00120002, 0x00110001, 0x00100000);
        return _mm512_permutexvar_epi16(halves, both);
    }
};

// Stores sixteen words at row `word` of a panel, lane 0 at `first`; see store_panel in generic/pack.inl.
inline void store_words(float* panel, std::int64_t word, std::int64_t words, std::int64_t panel_width,
                        std::int64_t first, __m512i x) {
    float* out = panel + word * panel_width + first;
    const std::int64_t room = panel_width - first;
    if (room >= 16 || (first == 0 && (words - word) * panel_width >= 16))
        _mm512_storeu_si512(out, x);
    else
        _mm512_mask_storeu_epi32(out, avx512::lanes(room), x);
}

template <class Source>
void pack_along(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                std::int64_t panel_width) {
    const auto* from = static_cast<const typename Source::Element*>(source);
    const std::int64_t words = (k + 1) / 2;
    for (std::int64_t first = 0; first < panel_width; first += 16) {
        const auto* vectors = from + first * ld;
        const std::int64_t valid = width - first;
        for (std::int64_t word = 0; word < words; word += 16) {
            const std::int64_t p = 2 * word, rest = k - p;
            __m512 block[16];
            PYTRAIN_UNROLL
            for (std::int64_t i = 0; i < 16; ++i) {
                const auto* begin = vectors + i * ld + p;
                if (i < valid) _mm_prefetch(reinterpret_cast<const char*>(begin) + 256, _MM_HINT_T0);
                const __m512i row = i >= valid   ? _mm512_setzero_si512()
                                    : rest >= 32 ? Source::load_words(begin)
                                                 : Source::load_words(begin, rest);
                block[i] = _mm512_castsi512_ps(row);
            }
            avx512::transpose(block);
            PYTRAIN_UNROLL
            for (std::int64_t i = 0; i < 16; ++i)
                if (word + i < words)
                    store_words(panel, word + i, words, panel_width, first, _mm512_castps_si512(block[i]));
        }
    }
}

// Rows lie too far apart for the hardware to see that the next panels read on in each.
constexpr std::int64_t kAhead = 128;  // bytes: two panels of 32 elements, four of 14

// A width that the compiler knows: what is packed at a time is short, so that it shows.
template <std::int64_t width>
struct Width {
    constexpr operator std::int64_t() const { return width; }
};

// A panel of 8 to 16 columns, all there, of a source at least 16 wide, as far as whole vectors may be used: while a row
// of the source still follows, which holds what is read beyond, and a word, which overwrites what is written beyond.
// Returns how many words that is.
template <class Source, class PanelWidth>
std::int64_t pack_left(float* panel, const typename Source::Element* from, std::int64_t ld, std::int64_t k,
                       PanelWidth panel_width) {
    std::int64_t word = 0;
    for (; 2 * word + 2 < k; ++word) {
        const auto* lower = from + 2 * word * ld;
        const auto* upper = lower + ld;
        _mm_prefetch(reinterpret_cast<const char*>(lower) + kAhead, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(upper) + kAhead, _MM_HINT_T0);
        _mm512_storeu_si512(panel + word * panel_width, Source::load_first(lower, upper));
    }
    return word;
}

template <class Source>
void pack_across(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                 std::int64_t panel_width) {
    const auto* from = static_cast<const typename Source::Element*>(source);
    const std::int64_t words = (k + 1) / 2;
    std::int64_t word = 0;
    if (width == 32 && panel_width == 32) {  // the usual right operand
        for (; 2 * word + 1 < k; ++word) {
            __m512i first, second;
            const auto* lower = from + 2 * word * ld;
            const auto* upper = lower + ld;
            _mm_prefetch(reinterpret_cast<const char*>(lower) + kAhead, _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(upper) + kAhead, _MM_HINT_T0);
            Source::load_rows(lower, upper, &first, &second);
            _mm512_storeu_si512(panel + word * 32, first);
            _mm512_storeu_si512(panel + word * 32 + 16, second);
        }
    }
    if (width == panel_width && ld >= 16) {  // the usual left operand: fourteen rows, or at the end eight to twelve
        if (panel_width == kTileRows) word = pack_left<Source>(panel, from, ld, k, Width<kTileRows>());
        if (panel_width >= 8 && panel_width < kTileRows) word = pack_left<Source>(panel, from, ld, k, panel_width);
    }
    for (; word < words; ++word) {
        const auto* lower = from + 2 * word * ld;
        const auto* upper = 2 * word + 1 < k ? lower + ld : nullptr;
        _mm_prefetch(reinterpret_cast<const char*>(lower) + kAhead, _MM_HINT_T0);
        if (upper != nullptr) _mm_prefetch(reinterpret_cast<const char*>(upper) + kAhead, _MM_HINT_T0);
        for (std::int64_t first = 0; first < panel_width; first += 16) {
            const std::int64_t valid = width - first;
            const auto* second = upper ? upper + first : nullptr;
            const __m512i x = valid <= 0 ? _mm512_setzero_si512()
                              : valid >= 16 && second != nullptr
                                  ? Source::load_rows(lower + first, second)
                                  : Source::load_rows(lower + first, second, valid < 16 ? valid : 16);
            store_words(panel, word, words, panel_width, first, x);
        }
    }
}

}  // namespace
}  // namespace pytrain::cpu::avx512_bf16
