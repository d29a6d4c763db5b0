// The vocabulary of generic/*.inl for AVX512_BF16: that of AVX-512, and an instruction that rounds to bf16 where there
// it takes nine.
#pragma once
#include "cpu/avx512/simd.h"

namespace pytrain::cpu::avx512_bf16 {
namespace {

// One by one: a using-directive would be hidden by the overloads that generic/math.inl adds.
using avx512::add;
using avx512::add_products;
using avx512::D;
using avx512::div;
using avx512::double_zeros;
using avx512::fma;
using avx512::Fp16;
using avx512::Fp32;
using avx512::keep_n;
using avx512::kLanes;
using avx512::kMostLanes;
using avx512::kSideBySide;
using avx512::load;
using avx512::load_n;
using avx512::max;
using avx512::min;
using avx512::mul;
using avx512::reduce_add;
using avx512::reduce_max;
using avx512::round_to_integer;
using avx512::scale_by_power;
using avx512::set;
using avx512::square_root;
using avx512::store;
using avx512::store_n;
using avx512::sub;
using avx512::total_of;
using avx512::V;

// The instruction rounds to nearest even and keeps a NaN's upper bits, as float_to_bf16 does, but takes subnormal
// numbers for 0 whatever the flush mode. Inside parallel_for, which flushes them, no arithmetic gives any, so rows have
// the same bits; `narrow`, which has to keep what it is given, stays that of AVX-512.
struct Bf16 : avx512::Bf16 {
    static __m256i narrow(V x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
    static void store(Element* p, V x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
    static void store_n(Element* p, V x, std::int64_t n) { _mm256_mask_storeu_epi16(p, avx512::lanes(n), narrow(x)); }
};

}  // namespace
}  // namespace pytrain::cpu::avx512_bf16
