#include "cpu/features.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#include <sys/prctl.h>
#endif

namespace pytrain::cpu {

namespace {

#if defined(__x86_64__)

struct CpuId {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuId cpuid(unsigned leaf, unsigned subleaf) {
    CpuId result;
    if (__get_cpuid_count(leaf, subleaf, &result.eax, &result.ebx, &result.ecx, &result.edx) == 0) return {};
    return result;
}

// XCR0: which registers the operating system saves. Written as bytes: the intrinsic needs -mxsave.
std::uint64_t saved_registers() {
    std::uint32_t low, high;
    __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<std::uint64_t>(high) << 32) | low;
}

bool has(unsigned word, int bit) { return (word >> bit & 1u) != 0; }

void detect_instructions(Features& features) {
    const CpuId basic = cpuid(1, 0);
    if (!has(basic.ecx, 27)) return;  // OSXSAVE: without it there is no XCR0 to ask
    const std::uint64_t saved = saved_registers();
    const bool saves_avx = (saved & 0x06) == 0x06;     // XMM and YMM
    const bool saves_avx512 = (saved & 0xe6) == 0xe6;  // and the masks, the upper halves of ZMM0-15, and ZMM16-31
    const CpuId extended = cpuid(7, 0);
    const CpuId extended1 = cpuid(7, 1);
    const bool fma = has(basic.ecx, 12), avx = has(basic.ecx, 28), f16c = has(basic.ecx, 29);
    features.avx2 = saves_avx && avx && fma && f16c && has(extended.ebx, 5);
    const bool f = has(extended.ebx, 16), dq = has(extended.ebx, 17), bw = has(extended.ebx, 30),
               vl = has(extended.ebx, 31);
    features.avx512 = features.avx2 && saves_avx512 && f && dq && bw && vl;
    features.avx512_bf16 = features.avx512 && has(extended1.eax, 5);
}

#elif defined(__aarch64__) && defined(__linux__)

void detect_instructions(Features& features) {
    // The bits of the kernel's ABI (asm/hwcap.h), written out: older headers lack the newer ones.
    constexpr unsigned long kHwcapAsimd = 1ul << 1, kHwcapCpuid = 1ul << 11, kHwcapSve = 1ul << 22;
    constexpr unsigned long kHwcap2SveBf16 = 1ul << 12, kHwcap2Bf16 = 1ul << 14;
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    features.neon = (first & kHwcapAsimd) != 0;
    features.sve = (first & kHwcapSve) != 0;
    features.neon_bf16 = features.neon && (second & kHwcap2Bf16) != 0;
    features.sve_bf16 = features.neon_bf16 && features.sve && (second & kHwcap2SveBf16) != 0;
    if (features.sve) {
        constexpr int kGetVectorLength = 51, kLengthBytes = 0xffff;  // PR_SVE_GET_VL, PR_SVE_VL_LEN_MASK
        const int length = prctl(kGetVectorLength, 0, 0, 0, 0);
        if (length > 0) features.vector_bits = 8 * (length & kLengthBytes);
    }
    if ((first & kHwcapCpuid) != 0) {  // the system lets programs read MIDR_EL1
        std::uint64_t identification;
        __asm__("mrs %0, midr_el1" : "=r"(identification));
        const std::uint64_t implementer = identification >> 24 & 0xff, part = identification >> 4 & 0xfff;
        features.a64fx = implementer == 0x46 && part == 0x001;  // Fujitsu's
    }
}

#else

void detect_instructions(Features&) {}

#endif

std::string first_word(const std::string& path) {
    std::ifstream file(path);
    std::string word;
    file >> word;
    return word;
}

// "48K", "32M" as sysfs writes cache sizes; 0 for anything else.
std::size_t parse_size(const std::string& text) {
    std::size_t digits = 0;
    std::size_t value = 0;
    while (digits < text.size() && text[digits] >= '0' && text[digits] <= '9')
        value = value * 10 + static_cast<std::size_t>(text[digits++] - '0');
    const std::string unit = text.substr(digits);
    if (unit == "K") return value << 10;
    if (unit == "M") return value << 20;
    return unit.empty() ? value : 0;
}

// "0-3,8": how many numbers a list of the kernel's names; 1 where there is none.
int count_list(const std::string& text) {
    int count = 0;
    for (std::size_t begin = 0; begin < text.size();) {
        const std::size_t end = std::min(text.find(',', begin), text.size());
        const std::string range = text.substr(begin, end - begin);
        const std::size_t dash = range.find('-');
        const int first = std::atoi(range.c_str());
        count += (dash == std::string::npos ? first : std::atoi(range.c_str() + dash + 1)) - first + 1;
        begin = end + 1;
    }
    return std::max(count, 1);
}

void detect_caches(Features& features) {
    if (features.a64fx) {  // by its data sheet: not every system lists its caches
        features.l1_data = std::size_t{64} << 10;
        features.l2 = std::size_t{8} << 20;  // of a core memory group
        features.l2_cores = 12;
        features.cache_line = 256;
        return;
    }
    for (int index = 0; index < 8; ++index) {
        const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
        const std::string level = first_word(folder + "level");
        if (level.empty()) return;
        if (first_word(folder + "type") == "Instruction") continue;
        const std::size_t bytes = parse_size(first_word(folder + "size"));
        if (level == "1") {
            features.l1_data = bytes;
            features.cache_line = parse_size(first_word(folder + "coherency_line_size"));
        }
        if (level == "2") {
            features.l2 = bytes;
            features.l2_cores = count_list(first_word(folder + "shared_cpu_list"));
        }
        if (level == "3") features.l3 = bytes;
    }
}

int count_affinity_cores() {
#if defined(__linux__)
    // The mask must be at least as large as the kernel's, which is not known beforehand.
    for (int cores = 1024; cores <= (1 << 20); cores *= 2) {
        cpu_set_t* const mask = CPU_ALLOC(static_cast<std::size_t>(cores));
        if (mask == nullptr) break;
        const std::size_t bytes = CPU_ALLOC_SIZE(static_cast<std::size_t>(cores));
        const bool known = sched_getaffinity(0, bytes, mask) == 0;
        const int count = known ? CPU_COUNT_S(bytes, mask) : 0;
        CPU_FREE(mask);
        if (known) return count;
    }
#endif
    return 1;
}

}  // namespace

Features detect_features() {
    Features features;
    detect_instructions(features);
    detect_caches(features);
    features.affinity_cores = count_affinity_cores();
    return features;
}

}  // namespace pytrain::cpu
