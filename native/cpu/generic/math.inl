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

inline V clamp(V x, float low, float high) { return min(set(high), max(set(low), x)); }  // NaN stays NaN

// e^x to 1 ulp where the result is normal; 0 below -104, infinity above 88.73, NaN for NaN.
// x = n log 2 + r with |r| <= log(2)/2; e^r = 1 + r + r^2 q(r), q the least-error polynomial of degree 4 (3e-9).
inline V exponential(V x) {
    const V bounded = clamp(x, -104.0f, 89.0f);
    const V n = round_to_integer(mul(bounded, set(0x1.715476p+0f)));  // 1 / log 2
    // log 2 in two parts; the first has so few bits that its product with n is exact.
    V r = fma(n, set(-0x1.62e4p-1f), bounded);
    r = fma(n, set(-0x1.7f7d1cp-20f), r);
    V q = set(0x1.6a2352p-10f);
    q = fma(q, r, set(0x1.123a6cp-7f));
    q = fma(q, r, set(0x1.5558f4p-5f));
    q = fma(q, r, set(0x1.55549p-3f));
    q = fma(q, r, set(0x1.fffffcp-2f));
    const V power = add(fma(mul(r, r), q, r), set(1.0f));
    return scale_by_power(power, n);
}

// 1 / (1 + e^-x): never overflows, since e^-x = infinity gives 0.
inline V sigmoid(V x) { return div(set(1.0f), add(set(1.0f), exponential(sub(set(0.0f), x)))); }
