#include "cpu/select.h"

#include <cstdlib>

#include "core/check.h"
#include "cpu/blocks.h"

namespace pytrain::cpu {

namespace {

#if defined(__x86_64__)
#ifdef PYTRAIN_BUILD_AVX2
constexpr auto kFillAvx2 = fill_avx2;
#else
constexpr void (*kFillAvx2)(Kernels*) = nullptr;
#endif
#ifdef PYTRAIN_BUILD_AVX512
constexpr auto kFillAvx512 = fill_avx512;
#else
constexpr void (*kFillAvx512)(Kernels*) = nullptr;
#endif
#if defined(PYTRAIN_BUILD_AVX512) && defined(PYTRAIN_BUILD_AVX512_BF16)
void fill_both_avx512(Kernels* kernels) {
    fill_avx512(kernels);
    fill_avx512_bf16(kernels);
}
constexpr auto kFillAvx512Bf16 = fill_both_avx512;
#else
constexpr void (*kFillAvx512Bf16)(Kernels*) = nullptr;
#endif
#elif defined(__aarch64__)
#ifdef PYTRAIN_BUILD_NEON
constexpr auto kFillNeon = fill_neon;
#else
constexpr void (*kFillNeon)(Kernels*) = nullptr;
#endif
#ifdef PYTRAIN_BUILD_SVE
constexpr auto kFillSve = fill_sve;
#else
constexpr void (*kFillSve)(Kernels*) = nullptr;
#endif
#if defined(PYTRAIN_BUILD_NEON) && defined(PYTRAIN_BUILD_NEON_BF16)
void fill_both_neon(Kernels* kernels) {
    fill_neon(kernels);
    fill_neon_bf16(kernels);
}
constexpr auto kFillNeonBf16 = fill_both_neon;
#else
constexpr void (*kFillNeonBf16)(Kernels*) = nullptr;
#endif
#if defined(PYTRAIN_BUILD_SVE) && defined(PYTRAIN_BUILD_SVE_BF16)
void fill_both_sve(Kernels* kernels) {
    fill_sve(kernels);
    fill_sve_bf16(kernels);
}
constexpr auto kFillSveBf16 = fill_both_sve;
#else
constexpr void (*kFillSveBf16)(Kernels*) = nullptr;
#endif
#endif

std::string available_names(const std::vector<Isa>& isas) {
    std::string names;
    for (const Isa& isa : isas)
        if (isa.available()) names += (names.empty() ? "" : ", ") + std::string(isa.name);
    return names;
}

Kernels fill(const Isa& isa, const Features& features) {
    Kernels kernels{};
    fill_scalar(&kernels);
    if (isa.fill != fill_scalar) isa.fill(&kernels);
    if (isa.fits_caches) fit_blocks(&kernels, features);
    return kernels;
}

Kernels find_kernels(const std::string& name, const char* asked_by) {
    const Features features = detect_features();
    const std::vector<Isa> isas = list_isas(features);
    for (const Isa& isa : isas) {
        if (name != isa.name) continue;
        check(isa.built(), asked_by, name, ": this build of pytrain left the ", name,
              " kernels out, since its compiler could not build them; available here: ", available_names(isas));
        check(isa.supported, asked_by, name, ": this CPU or its operating system lacks ", isa.needs,
              "; available here: ", available_names(isas));
        return fill(isa, features);
    }
    throw Error(message(asked_by, name, ": there is no such instruction set; available here: ", available_names(isas)));
}

Kernels choose() {
    if (const char* forced = std::getenv("PYTRAIN_ISA"); forced != nullptr && *forced != '\0')
        return find_kernels(forced, "PYTRAIN_ISA=");
    const Features features = detect_features();
    for (const Isa& isa : list_isas(features))
        if (isa.available()) return fill(isa, features);
    throw Error("no instruction set is available, not even scalar");
}

}  // namespace

std::vector<Isa> list_isas(const Features& features) {
    std::vector<Isa> isas;
#if defined(__x86_64__)
    isas.push_back({"avx512_bf16", "AVX-512 (F, BW, VL, DQ, BF16)", kFillAvx512Bf16, features.avx512_bf16});
    isas.push_back({"avx512", "AVX-512 (F, BW, VL, DQ)", kFillAvx512, features.avx512});
    isas.push_back({"avx2", "AVX2, FMA and F16C", kFillAvx2, features.avx2});
#elif defined(__aarch64__)
    isas.push_back({"sve_bf16", "SVE with bf16", kFillSveBf16, features.sve_bf16, true});
    isas.push_back({"sve", "SVE", kFillSve, features.sve, true});
    isas.push_back({"neon_bf16", "NEON (ASIMD) with bf16", kFillNeonBf16, features.neon_bf16, true});
    isas.push_back({"neon", "NEON (ASIMD)", kFillNeon, features.neon, true});
#else
    static_cast<void>(features);
#endif
    isas.push_back({"scalar", "nothing", fill_scalar, true});
    return isas;
}

Kernels kernels_of(const std::string& name) { return find_kernels(name, "isa="); }

const Kernels& chosen_kernels() {
    static const Kernels kernels = choose();
    return kernels;
}

Kernels with_fp16_chains(Kernels kernels) {
    check(kernels.fp16_chains.matmul_tile != nullptr, "chains of fp16 multiply-adds need an Arm CPU with SVE; the ",
          kernels.name, " kernels have none");
    kernels.chain_fp16 = true;
    return kernels;
}

}  // namespace pytrain::cpu
