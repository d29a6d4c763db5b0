// The first row of a tile's product, written once over simd.h and the tile's shape. Included by products.inl.
//
// FLOPs: 2*columns*k, from 4*columns*k bytes of b, which bind: each is used once. What several panels give is that many
// more independent chains of multiply-adds, each of which waits for the one before.

template <int kPanels>
inline void multiply_row(std::int64_t k, const float* a, const float* b, std::int64_t step, std::int64_t stride,
                         float* c, bool accumulate) {
    V sum[kPanels][kTileVectors];
    PYTRAIN_UNROLL
    for (int panel = 0; panel < kPanels; ++panel) {
        PYTRAIN_UNROLL
        for (int vector = 0; vector < kTileVectors; ++vector) sum[panel][vector] = set(0.0f);
    }
    for (std::int64_t p = 0; p < k; ++p, b += step) {
        const V factor = set(a[p]);
        PYTRAIN_UNROLL
        for (int panel = 0; panel < kPanels; ++panel) {
            PYTRAIN_UNROLL
            for (int vector = 0; vector < kTileVectors; ++vector)
                sum[panel][vector] = fma(factor, load(b + panel * stride + vector * kLanes), sum[panel][vector]);
        }
    }
    PYTRAIN_UNROLL
    for (int panel = 0; panel < kPanels; ++panel) {
        PYTRAIN_UNROLL
        for (int vector = 0; vector < kTileVectors; ++vector) {
            float* const out = c + panel * kTileColumns + vector * kLanes;
            store(out, accumulate ? add(load(out), sum[panel][vector]) : sum[panel][vector]);
        }
    }
}

void matmul_row(std::int64_t k, const float* a, const float* b, std::int64_t step, std::int64_t stride,
                std::int64_t panels, float* c, bool accumulate) {
    for (; panels >= 4; panels -= 4, b += 4 * stride, c += 4 * kTileColumns)
        multiply_row<4>(k, a, b, step, stride, c, accumulate);
    if (panels >= 2) {
        multiply_row<2>(k, a, b, step, stride, c, accumulate);
        panels -= 2, b += 2 * stride, c += 2 * kTileColumns;
    }
    if (panels > 0) multiply_row<1>(k, a, b, step, stride, c, accumulate);
}
