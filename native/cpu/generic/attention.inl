// The elementwise part of attention, over tiles of scores that products leave in cache. Included by rows.inl.

// One step of a softmax over blocks of keys (Milakov and Gimelshein, "Online normalizer calculation for softmax",
// 2018). x (rows, columns) holds scores, a key per row and a query per column, so that maxima and sums run down the
// lanes: nothing is reduced across them. Per query: maximum is the largest score so far, denominator the sum of
// exponentials under it; both are carried on, `factor` is what earlier sums are to be scaled by, and x becomes
// exp(scale (x - maximum)). A score of -infinity becomes 0. Returns whether any maximum changed. NaN is passed over in
// maxima and comes back in sums. 21 FLOPs per element, from cache.
bool softmax_columns_tile(float* x, float* maximum, float* denominator, float* factor, float scale, std::int64_t rows,
                          std::int64_t columns) {
    const V scales = set(scale), zero = set(0.0f);
    bool changed = false;
    for_vectors(columns, [&](std::int64_t j, auto access) {
        const auto score = [&](std::int64_t row) { return access.read(x + row * columns + j); };
        const V before = access.read(maximum + j);
        V largest0 = before, largest1 = before;
        std::int64_t row = 0;
        for (; row + 2 <= rows; row += 2) {
            largest0 = max(score(row), largest0);
            largest1 = max(score(row + 1), largest1);
        }
        if (row < rows) largest0 = max(score(row), largest0);
        const V largest = max(largest0, largest1);
        const V offset = sub(zero, mul(scales, largest));
        // From the same rounded products as the exponentials below, so that it is 1 where nothing changed.
        const V shrink = exponential(add(mul(scales, before), offset));
        V sum0 = zero, sum1 = zero;
        for (row = 0; row + 2 <= rows; row += 2) {
            const V even = exponential(fma(score(row), scales, offset));
            const V odd = exponential(fma(score(row + 1), scales, offset));
            access.write(x + row * columns + j, even);
            access.write(x + (row + 1) * columns + j, odd);
            sum0 = add(sum0, even);
            sum1 = add(sum1, odd);
        }
        if (row < rows) {
            const V even = exponential(fma(score(row), scales, offset));
            access.write(x + row * columns + j, even);
            sum0 = add(sum0, even);
        }
        access.write(maximum + j, largest);
        access.write(factor + j, shrink);
        access.write(denominator + j, fma(access.read(denominator + j), shrink, add(sum0, sum1)));
        changed = changed || reduce_max(sub(largest, before)) > 0.0f;
    });
    return changed;
}

// The same step for one query, n scores along the lanes. Its exponentials are added as softmax_columns adds those of a
// column, even and odd ones apart and one after the other: two scalar additions at a time, which wait for each other,
// bind.
bool softmax_row_tile(float* x, float* maximum, float* denominator, float* factor, float scale, std::int64_t n) {
    const V scales = set(scale), zero = set(0.0f), before = set(*maximum);
    V lanes = before;
    for_vectors(n, [&](std::int64_t i, auto access) { lanes = max(access.read_or(x + i, *maximum), lanes); });
    const float most = reduce_max(lanes);
    const V largest = set(most);
    const V offset = sub(zero, mul(scales, largest));
    const V shrink = exponential(add(mul(scales, before), offset));
    for_vectors(n, [&](std::int64_t i, auto access) {
        access.write(x + i, exponential(fma(access.read(x + i), scales, offset)));
    });
    float even = 0.0f, odd = 0.0f;
    std::int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
        even += x[i];
        odd += x[i + 1];
    }
    if (i < n) even += x[i];
    const bool changed = most > *maximum;
    *maximum = most;
    *factor = reduce_max(shrink);
    *denominator = reduce_max(fma(set(*denominator), shrink, set(even + odd)));
    return changed;
}

// y (rows, columns) *= factor (columns). 1 FLOP per element, from cache.
void scale_columns_tile(float* y, const float* factor, std::int64_t rows, std::int64_t columns) {
    for_vectors(columns, [&](std::int64_t j, auto access) {
        const V factors = access.read(factor + j);
        for (std::int64_t row = 0; row < rows; ++row) {
            float* const element = y + row * columns + j;
            access.write(element, mul(access.read(element), factors));
        }
    });
}

// p = exp(scale p - lse), dp = p (dp - delta) scale. 22 FLOPs, 16 bytes per element.
void softmax_backward_row(float* dp, float* p, float lse, float delta, float scale, std::int64_t n) {
    const V factor = set(scale), offset = set(-lse), deltas = set(delta);
    for_vectors(n, [&](std::int64_t i, auto access) {
        const V weight = exponential(fma(access.read(p + i), factor, offset));
        access.write(p + i, weight);
        access.write(dp + i, mul(mul(weight, sub(access.read(dp + i), deltas)), factor));
    });
}
