// Loops and elementary functions over simd.h. Included inside an instruction set's anonymous namespace.
//
// A kernel's body is written once, for an `access` that is a whole vector or a tail, and for rows of any storage type:
// Source and Target are pointers to elements that are widened as they are read and rounded as they are written.

template <class Storage>
struct Source {
    const typename Storage::Element* first;
    explicit Source(const void* row) : first(static_cast<const typename Storage::Element*>(row)) {}
    Source operator+(std::int64_t n) const { return Source(first + n); }
};

template <class Storage>
struct Target {
    typename Storage::Element* first;
    explicit Target(void* row) : first(static_cast<typename Storage::Element*>(row)) {}
    explicit operator bool() const { return first != nullptr; }
    Target operator+(std::int64_t n) const { return Target(first + n); }
};

struct Whole {
    static constexpr std::int64_t kVectors = 1;
    template <class Storage>
    V read(Source<Storage> p) const {
        return Storage::load(p.first);
    }
    template <class Storage>
    V read(Target<Storage> p) const {
        return Storage::load(p.first);
    }
    template <class Storage>
    void write(Target<Storage> p, V x) const {
        Storage::store(p.first, x);
    }
    V read(const float* p) const { return load(p); }
    V read_or(const float* p, float) const { return load(p); }
    void write(float* p, V x) const { store(p, x); }
    V keep(V x) const { return x; }
};

struct Tail {
    static constexpr std::int64_t kVectors = 1;
    std::int64_t n;  // 0 < n < kLanes
    template <class Storage>
    V read(Source<Storage> p) const {
        return Storage::load_n(p.first, n);
    }
    template <class Storage>
    V read(Target<Storage> p) const {
        return Storage::load_n(p.first, n);
    }
    template <class Storage>
    void write(Target<Storage> p, V x) const {
        Storage::store_n(p.first, x, n);
    }
    V read(const float* p) const { return load_n(p, n, 0.0f); }
    V read_or(const float* p, float fill) const { return load_n(p, n, fill); }
    void write(float* p, V x) const { store_n(p, x, n); }
    V keep(V x) const { return keep_n(x, n); }
};

// Two vectors side by side. Where every operation waits for the one before it, as in an exponential, several elements
// have to be under way at once, and a CPU looks no further ahead than its schedulers hold: kernels with a long chain
// are written for a vector and for a pair. (A template, since SVE's vectors cannot be members.)
struct Lane {
    using Vector = V;
};

template <class T>
struct Pair {
    typename T::Vector first, second;
};

template <class T>
PYTRAIN_INLINED Pair<T> add(Pair<T> x, Pair<T> y) {
    return {add(x.first, y.first), add(x.second, y.second)};
}
template <class T>
PYTRAIN_INLINED Pair<T> add(Pair<T> x, V y) {
    return {add(x.first, y), add(x.second, y)};
}
template <class T>
PYTRAIN_INLINED Pair<T> sub(V x, Pair<T> y) {
    return {sub(x, y.first), sub(x, y.second)};
}
template <class T>
PYTRAIN_INLINED Pair<T> mul(Pair<T> x, Pair<T> y) {
    return {mul(x.first, y.first), mul(x.second, y.second)};
}
template <class T>
PYTRAIN_INLINED Pair<T> mul(V x, Pair<T> y) {
    return {mul(x, y.first), mul(x, y.second)};
}
template <class T>
PYTRAIN_INLINED Pair<T> div(V x, Pair<T> y) {
    return {div(x, y.first), div(x, y.second)};
}
template <class T>
PYTRAIN_INLINED Pair<T> min(V x, Pair<T> y) {
    return {min(x, y.first), min(x, y.second)};
}
template <class T>
PYTRAIN_INLINED Pair<T> max(V x, Pair<T> y) {
    return {max(x, y.first), max(x, y.second)};
}
template <class T>
PYTRAIN_INLINED Pair<T> fma(Pair<T> x, Pair<T> y, Pair<T> z) {
    return {fma(x.first, y.first, z.first), fma(x.second, y.second, z.second)};
}
template <class T>
PYTRAIN_INLINED Pair<T> fma(Pair<T> x, Pair<T> y, V z) {
    return {fma(x.first, y.first, z), fma(x.second, y.second, z)};
}
template <class T>
PYTRAIN_INLINED Pair<T> fma(Pair<T> x, V y, Pair<T> z) {
    return {fma(x.first, y, z.first), fma(x.second, y, z.second)};
}
template <class T>
PYTRAIN_INLINED Pair<T> fma(V x, Pair<T> y, V z) {
    return {fma(x, y.first, z), fma(x, y.second, z)};
}
template <class T>
PYTRAIN_INLINED Pair<T> fma(Pair<T> x, V y, V z) {
    return {fma(x.first, y, z), fma(x.second, y, z)};
}
template <class T>
PYTRAIN_INLINED Pair<T> round_to_integer(Pair<T> x) {
    return {round_to_integer(x.first), round_to_integer(x.second)};
}
template <class T>
PYTRAIN_INLINED Pair<T> scale_by_power(Pair<T> x, Pair<T> y) {
    return {scale_by_power(x.first, y.first), scale_by_power(x.second, y.second)};
}

// A whole pair, for the kernels of for_pairs.
struct Two {
    static constexpr std::int64_t kVectors = 2;
    template <class Row, class T = Lane>
    Pair<T> read(Row p) const {
        return {Whole{}.read(p), Whole{}.read(p + kLanes)};
    }
    template <class Row, class T>
    void write(Row p, Pair<T> x) const {
        Whole{}.write(p, x.first);
        Whole{}.write(p + kLanes, x.second);
    }
};

// The same as for_vectors, two vectors at a time as long as there are two.
template <class Body>
void for_pairs(std::int64_t n, Body body) {
    std::int64_t i = 0;
    if constexpr (kSideBySide)
        for (; i + 2 * kLanes <= n; i += 2 * kLanes) body(i, Two{});
    for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
    if (i < n) body(i, Tail{n - i});
}

// body(index, access) over [0, n), a vector at a time.
template <class Body>
void for_vectors(std::int64_t n, Body body) {
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
    if (i < n) body(i, Tail{n - i});
}

// Rows are summed in chunks, whose fp32 sums are added in float64: the error does not grow with the row (a vocabulary's
// softmax has 50,000 terms), at the price of one reduction per chunk.
constexpr std::int64_t kChunk = 512;

// Sum of term(index, access), which keeps the lanes outside a tail at 0. Four accumulators hide the latency of
// addition.
template <class Term>
double sum_of(std::int64_t n, Term term) {
    double total = 0.0;
    for (std::int64_t begin = 0; begin < n; begin += kChunk) {
        const std::int64_t end = n - begin < kChunk ? n : begin + kChunk;
        V sum0 = set(0.0f), sum1 = set(0.0f), sum2 = set(0.0f), sum3 = set(0.0f);
        std::int64_t i = begin;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
            sum0 = add(sum0, term(i, Whole{}));
            sum1 = add(sum1, term(i + kLanes, Whole{}));
            sum2 = add(sum2, term(i + 2 * kLanes, Whole{}));
            sum3 = add(sum3, term(i + 3 * kLanes, Whole{}));
        }
        for (; i + kLanes <= end; i += kLanes) sum0 = add(sum0, term(i, Whole{}));
        if (i < end) sum1 = add(sum1, term(i, Tail{end - i}));
        total += static_cast<double>(reduce_add(add(add(sum0, sum1), add(sum2, sum3))));
    }
    return total;
}

// Two such sums in one walk, for terms that share what they read: term(index, access, first, second) adds to two
// accumulators, lanes outside a tail at 0. Each has the bits that sum_of gives.
struct TwoSums {
    double first, second;
};

template <class Term>
TwoSums two_sums_of(std::int64_t n, Term term) {
    TwoSums total{0.0, 0.0};
    for (std::int64_t begin = 0; begin < n; begin += kChunk) {
        const std::int64_t end = n - begin < kChunk ? n : begin + kChunk;
        V first0 = set(0.0f), first1 = set(0.0f), first2 = set(0.0f), first3 = set(0.0f);
        V second0 = set(0.0f), second1 = set(0.0f), second2 = set(0.0f), second3 = set(0.0f);
        std::int64_t i = begin;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
            term(i, Whole{}, first0, second0);
            term(i + kLanes, Whole{}, first1, second1);
            term(i + 2 * kLanes, Whole{}, first2, second2);
            term(i + 3 * kLanes, Whole{}, first3, second3);
        }
        for (; i + kLanes <= end; i += kLanes) term(i, Whole{}, first0, second0);
        if (i < end) term(i, Tail{end - i}, first1, second1);
        total.first += static_cast<double>(reduce_add(add(add(first0, first1), add(first2, first3))));
        total.second += static_cast<double>(reduce_add(add(add(second0, second1), add(second2, second3))));
    }
    return total;
}

template <class X>
PYTRAIN_INLINED X clamp(X x, float low, float high) {
    return min(set(high), max(set(low), x));  // NaN stays NaN
}

// e^x to 1 ulp where the result is normal; 0 below -104, infinity above 88.73, NaN for NaN.
// x = n log 2 + r with |r| <= log(2)/2; e^r = 1 + r + r^2 q(r), q the least-error polynomial of degree 4 (3e-9).
template <class X>
PYTRAIN_INLINED X exponential(X x) {
    const X bounded = clamp(x, -104.0f, 89.0f);
    const X n = round_to_integer(mul(set(0x1.715476p+0f), bounded));  // 1 / log 2
    // log 2 in two parts; the first has so few bits that its product with n is exact.
    X r = fma(n, set(-0x1.62e4p-1f), bounded);
    r = fma(n, set(-0x1.7f7d1cp-20f), r);
    X q = fma(set(0x1.6a2352p-10f), r, set(0x1.123a6cp-7f));
    q = fma(q, r, set(0x1.5558f4p-5f));
    q = fma(q, r, set(0x1.55549p-3f));
    q = fma(q, r, set(0x1.fffffcp-2f));
    const X power = add(fma(mul(r, r), q, r), set(1.0f));
    return scale_by_power(power, n);
}

// 1 / (1 + e^-x): never overflows, since e^-x = infinity gives 0.
template <class X>
PYTRAIN_INLINED X sigmoid(X x) {
    return div(set(1.0f), add(exponential(sub(set(0.0f), x)), set(1.0f)));
}
