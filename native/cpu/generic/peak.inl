// The peak of a core, written once over simd.h. Included inside the instruction set's unnamed namespace.
// `repeats` rounds of independent fused multiply-adds on registers: what the cores can do at most. Twelve chains hide a
// latency of up to six cycles at two a cycle, and fit the 16 registers of AVX2. Returns the FLOPs done. The chains
// begin at what sink (kLanes) holds, which no compiler knows, and it receives their sum: nothing is optimised away.
double peak_flops(std::int64_t repeats, float* sink) {
    constexpr int chains = 12;
    V sum[chains];
    PYTRAIN_UNROLL
    for (int i = 0; i < chains; ++i) sum[i] = set(sink[0] + static_cast<float>(i));
    // Added to itself, a chain needs no copy on Arm, whose sum is also a source; so small a part of it changes nothing.
    const V factor = set(1e-9f);
    for (std::int64_t repeat = 0; repeat < repeats; ++repeat) {
        PYTRAIN_UNROLL
        for (int i = 0; i < chains; ++i) sum[i] = fma(sum[i], factor, sum[i]);
    }
    PYTRAIN_UNROLL
    for (int i = 1; i < chains; ++i) sum[0] = add(sum[0], sum[i]);
    store(sink, sum[0]);
    return 2.0 * chains * static_cast<double>(kLanes) * static_cast<double>(repeats);
}
