// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
// and normal numbers from it (Box and Muller, 1958). A number depends on (seed, key, index) alone, never on who asks
// for it.
//
// The logarithm and the circle functions are written out in plain double arithmetic, whose every step IEEE 754 fixes:
// the C library's differ in the last bit between machines, and initial weights would with them.
#pragma once
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace pytrain {

using PhiloxBlock = std::array<std::uint32_t, 4>;

// Ten rounds over a 128-bit counter with a 64-bit key.
inline PhiloxBlock philox(PhiloxBlock counter, std::uint64_t key) {
    std::uint32_t key0 = static_cast<std::uint32_t>(key);
    std::uint32_t key1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * counter[0];
        const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * counter[2];
        counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<std::uint32_t>(product1),
                   static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key1,
                   static_cast<std::uint32_t>(product0)};
        key0 += 0x9E3779B9u;  // the golden ratio and sqrt(3) - 1, as in the paper
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// Natural logarithm of a positive normal number, to about 2 ulp: x = 2^e * m, log m = 2 artanh((m - 1) / (m + 1)).
inline double portable_log(double x) {
    std::uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    int exponent = static_cast<int>(bits >> 52) - 1023;
    bits = (bits & 0x000fffffffffffffu) | 0x3ff0000000000000u;
    double m;
    std::memcpy(&m, &bits, sizeof m);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        ++exponent;
    }
    const double s = (m - 1.0) / (m + 1.0);  // at most 0.172: eleven terms reach double precision
    const double square = s * s;
    double series = 0.0;
    for (int term = 21; term >= 1; term -= 2) series = series * square + 1.0 / term;
    return 2.0 * s * series + exponent * 0.6931471805599453;
}

struct CirclePoint {
    double cosine, sine;
};

// cos and sin of 2 pi turns, for turns in [0, 1].
inline CirclePoint portable_circle(double turns) {
    const int quarter = static_cast<int>(turns * 4.0 + 0.5);
    const double angle = (turns - quarter * 0.25) * 6.283185307179586;  // within pi/4 of 0
    const double square = angle * angle;
    double cosine = 1.0;
    double sine = 1.0;
    for (int term = 18; term >= 2; term -= 2) {
        cosine = 1.0 - cosine * square / (term * (term - 1));
        sine = 1.0 - sine * square / (term * (term + 1));
    }
    sine *= angle;
    switch (quarter % 4) {
        case 0:
            return {cosine, sine};
        case 1:
            return {-sine, cosine};
        case 2:
            return {-cosine, -sine};
        default:
            return {sine, -cosine};
    }
}

// Four independent standard normal numbers: elements 4*block .. 4*block + 3 of the sequence (seed, key).
inline std::array<double, 4> philox_normals(std::uint64_t seed, std::uint64_t key, std::uint64_t block) {
    const PhiloxBlock random = philox({static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32),
                                       static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)},
                                      seed);
    std::array<double, 4> normals;
    for (std::size_t pair = 0; pair < 4; pair += 2) {
        // Half a step away from 0 and 1, so that the logarithm is finite.
        const double radius = std::sqrt(-2.0 * portable_log((random[pair] + 0.5) * 0x1p-32));
        const CirclePoint point = portable_circle((random[pair + 1] + 0.5) * 0x1p-32);
        normals[pair] = radius * point.cosine;
        normals[pair + 1] = radius * point.sine;
    }
    return normals;
}

}  // namespace pytrain
