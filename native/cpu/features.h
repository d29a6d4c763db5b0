// What this machine offers: instruction sets that the CPU has and the system saves, cache sizes, cores we may use.
#pragma once
#include <cstddef>

namespace pytrain::cpu {

struct Features {
    // x86-64; false elsewhere
    bool avx2 = false;    // with FMA and F16C
    bool avx512 = false;  // F, BW, VL and DQ
    bool avx512_bf16 = false;
    // aarch64; false elsewhere
    bool neon = false;
    bool sve = false;
    bool neon_bf16 = false;  // BFMMLA and BFCVT in NEON
    bool sve_bf16 = false;   // and in SVE
    bool a64fx = false;      // by its identification register
    int vector_bits = 0;     // of an SVE register, as this process sees it; 0 without SVE
    // bytes of one core's caches and of the last level; 0 where the system does not say
    std::size_t l1_data = 0;
    std::size_t l2 = 0;
    std::size_t l3 = 0;
    std::size_t cache_line = 0;
    int l2_cores = 1;        // cores that share one l2
    int affinity_cores = 1;  // cores in this process's affinity mask
};

Features detect_features();

}  // namespace pytrain::cpu
