// Every row kernel of cpu/kernels.h, written once over simd.h. Included inside an instruction set's anonymous
// namespace, after its simd.h. FLOPs count one for each operation, e^x included. All are bound by memory where rows
// come from it; from cache, those with an exponential (about 16 operations) are bound by arithmetic.

#include "cpu/generic/math.inl"

#include "cpu/generic/attention.inl"  // after the functions that it uses

// Asks for the line of element i, once per line of 64 bytes. An address past the end of an array does no harm.
template <class Element>
inline void prefetch(const Element* p, std::int64_t i) {
    if (i % static_cast<std::int64_t>(64 / sizeof(Element)) == 0) __builtin_prefetch(p + i);
}

// The same where a vector of floats is a line, and nothing elsewhere: with two vectors to a line (AVX2), asking cost a
// norm's backward pass more than it gained.
template <class Element>
inline void prefetch_line(const Element* p, std::int64_t i) {
    if (kMostLanes == 16) prefetch(p, i);
}

// The lines of elements i and on 1 KiB ahead: gate and up lie in rows of two halves, so that a hardware prefetcher has
// to find both streams anew in every row.
template <class Element, class Access>
inline void prefetch_ahead(const Element* p, std::int64_t i, Access) {
    for (std::int64_t j = 0; j < Access::kVectors; ++j) prefetch(p + 1024 / sizeof(Element), i + j * kLanes);
}

// --- storage types: 4 + 2 bytes per element ---------------------------------------------------------

template <class Storage>
void widen_row(float* y, const void* x, std::int64_t n) {
    const auto* source = static_cast<const typename Storage::Element*>(x);
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, Storage::load(source + i));
    if (i < n) store_n(y + i, Storage::load_n(source + i, n - i), n - i);
}

template <class Storage>
void narrow_row(void* y, const float* x, std::int64_t n) {
    auto* destination = static_cast<typename Storage::Element*>(y);
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) Storage::store(destination + i, load(x + i));
    if (i < n) Storage::store_n(destination + i, load_n(x + i, n - i, 0.0f), n - i);
}

// --- elementwise ------------------------------------------------------------------------------------

// y += x. 1 FLOP, 12 bytes per element.
void add_row(float* y, const float* x, std::int64_t n) {
    for_vectors(n,
                [&](std::int64_t i, auto access) { access.write(y + i, add(access.read(y + i), access.read(x + i))); });
}

// y += row 0, then row 1, and so on, `rows` of them ld elements apart. Eight rows at a time, so that y is read and
// written once for eight. 1 FLOP, and the bytes of its storage type, per element.
template <class Storage>
void add_rows(float* y, const void* x, std::int64_t ld, std::int64_t rows, std::int64_t n) {
    const auto* source = static_cast<const typename Storage::Element*>(x);
    std::int64_t row = 0;
    for (; row + 8 <= rows; row += 8, source += 8 * ld) {
        std::int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            V sum = load(y + i);
            for (int k = 0; k < 8; ++k) sum = add(sum, Storage::load(source + k * ld + i));
            store(y + i, sum);
        }
        if (i < n) {
            V sum = load_n(y + i, n - i, 0.0f);
            for (int k = 0; k < 8; ++k) sum = add(sum, Storage::load_n(source + k * ld + i, n - i));
            store_n(y + i, sum, n - i);
        }
    }
    for (; row < rows; ++row, source += ld) {
        std::int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) store(y + i, add(load(y + i), Storage::load(source + i)));
        if (i < n) store_n(y + i, add(load_n(y + i, n - i, 0.0f), Storage::load_n(source + i, n - i)), n - i);
    }
}

// x += partial, += bias where there is one: two sums, rounded to x's storage type once. 2 FLOPs, and three times the
// bytes of that type, per element.
template <class Storage>
void residual_row(void* x, const void* partial, const float* bias, std::int64_t n) {
    const Target<Storage> sum(x);
    const Source<Storage> part(partial);
    for_vectors(n, [&](std::int64_t i, auto access) {
        V total = add(access.read(sum + i), access.read(part + i));
        if (bias != nullptr) total = add(total, access.read(bias + i));
        access.write(sum + i, total);
    });
}

// y *= factor. 1 FLOP, 8 bytes per element.
void scale_row(float* y, float factor, std::int64_t n) {
    const V factors = set(factor);
    for_vectors(n, [&](std::int64_t i, auto access) { access.write(y + i, mul(access.read(y + i), factors)); });
}

// GELU in its tanh form: y = x (1 + tanh u) / 2 = x sigmoid(2u), with u = sqrt(2/pi) (x + 0.044715 x^3).
constexpr float kGeluLinear = 1.5957691216057308f;  // 2 sqrt(2/pi)
constexpr float kGeluCubic = 0.044715f;

template <class X>
PYTRAIN_INLINED X gelu_argument(X x) {  // 2u
    return mul(mul(set(kGeluLinear), x), fma(mul(set(kGeluCubic), x), x, set(1.0f)));
}

// 24 FLOPs, 8 bytes per element of fp32.
template <class Storage>
void gelu_forward_row(void* y, const void* x, std::int64_t n) {
    const Target<Storage> out(y);
    const Source<Storage> in(x);
    for_pairs(n, [&](std::int64_t i, auto access) {
        const auto value = access.read(in + i);
        access.write(out + i, mul(value, sigmoid(gelu_argument(value))));
    });
}

// dx = dy (s + x s (1 - s) (2u)'), and what gelu_forward gives where asked for. 34 FLOPs, 12 or 16 bytes per
// element of fp32.
template <class Storage>
void gelu_backward_row(void* dx, void* y, const void* dy, const void* x, std::int64_t n) {
    const Target<Storage> out(dx), again(y);
    const Source<Storage> gradient(dy), in(x);
    for_pairs(n, [&](std::int64_t i, auto access) {
        // Beyond 30 the derivative is 0 or 1 to the last bit, while x^3 could overflow and meet a 0.
        const auto given = access.read(in + i);
        const auto value = clamp(given, -30.0f, 30.0f);
        const auto s = sigmoid(gelu_argument(value));
        if (again) access.write(again + i, mul(given, s));
        const auto slope = mul(set(kGeluLinear), fma(mul(set(3.0f * kGeluCubic), value), value, set(1.0f)));
        const auto derivative = fma(mul(mul(value, s), sub(set(1.0f), s)), slope, s);
        access.write(out + i, mul(access.read(gradient + i), derivative));
    });
}

// y = silu(gate) up, silu(x) = x sigmoid(x). 21 FLOPs, 12 bytes per element of fp32.
template <class Storage>
void swiglu_forward_row(void* y, const void* gate, const void* up, std::int64_t n) {
    const Target<Storage> out(y);
    const Source<Storage> gates(gate), ups(up);
    for_pairs(n, [&](std::int64_t i, auto access) {
        prefetch_ahead(gates.first, i, access);
        prefetch_ahead(ups.first, i, access);
        const auto g = access.read(gates + i);
        access.write(out + i, mul(mul(g, sigmoid(g)), access.read(ups + i)));
    });
}

// dup = dy silu(gate); dgate = dy up s (1 + gate (1 - s)); and what swiglu_forward gives where asked for. 27 FLOPs, 20
// or 24 bytes per element of fp32.
template <class Storage>
void swiglu_backward_row(void* dgate, void* dup, void* y, const void* dy, const void* gate, const void* up,
                         std::int64_t n) {
    const Target<Storage> gate_out(dgate), up_out(dup), again(y);
    const Source<Storage> gradient(dy), gates(gate), ups(up);
    for_pairs(n, [&](std::int64_t i, auto access) {
        prefetch_ahead(gates.first, i, access);
        prefetch_ahead(ups.first, i, access);
        prefetch_ahead(gradient.first, i, access);
        const auto g = access.read(gates + i);
        const auto d = access.read(gradient + i);
        const auto s = sigmoid(g);
        const auto derivative = mul(s, fma(g, sub(set(1.0f), s), set(1.0f)));
        const auto u = access.read(ups + i);
        const auto active = mul(g, s);
        if (again) access.write(again + i, mul(active, u));
        access.write(up_out + i, mul(d, active));
        access.write(gate_out + i, mul(mul(d, u), derivative));
    });
}

// (a, b) -> (a cos - b sin, b cos + a sin), where b lies half a head after a. 6 FLOPs, 16 bytes per pair of fp32. The
// loop over heads is the inner one, so that the table's pairs are taken apart once for all heads.
template <class Storage>
void rope_row(void* x, const float* cos_sin, std::int64_t heads, std::int64_t head_size, float sign) {
    const std::int64_t half = head_size / 2;
    for_vectors(half, [&](std::int64_t i, auto access) {
        float cosines[kMostLanes] = {};
        float sines[kMostLanes] = {};
        for (std::int64_t lane = 0; lane < kLanes && i + lane < half; ++lane) {
            cosines[lane] = cos_sin[2 * (i + lane)];
            sines[lane] = sign * cos_sin[2 * (i + lane) + 1];
        }
        const V cosine = load(cosines);
        const V sine = load(sines);
        for (std::int64_t head = 0; head < heads; ++head) {
            const Target<Storage> first = Target<Storage>(x) + (head * head_size + i);
            const V a = access.read(first);
            const V b = access.read(first + half);
            access.write(first, sub(mul(a, cosine), mul(b, sine)));
            access.write(first + half, fma(b, cosine, mul(a, sine)));
        }
    });
}

// --- norms ------------------------------------------------------------------------------------------

inline float inverse_deviation(double variance, float eps) {
    return static_cast<float>(1.0 / __builtin_sqrt(variance + static_cast<double>(eps)));
}

// y = (x - mean) rstd weight + bias. Two passes for the statistics: no cancellation where |mean| >> deviation.
// 8 FLOPs per element; 8 bytes of fp32, and x is read three times (from L1).
// Two rows at a time: a row's sums, division and root are one chain, which the other row's arithmetic hides; weight and
// bias are read once for both. The first sums go row by row, in the order in which memory delivers; the second ones ask
// for the next two rows. A last odd row is its own partner. Each row has the bits that it has alone.
template <class Storage>
void layernorm_forward_rows(void* y, float* mean, float* rstd, const void* x, const float* weight, const float* bias,
                            std::int64_t rows, std::int64_t n, float eps) {
    const Target<Storage> out(y);
    const Source<Storage> in(x);
    const double count = static_cast<double>(n);
    for (std::int64_t row = 0; row < rows; row += 2) {
        const std::int64_t other = row + 1 < rows ? row + 1 : row;
        const Source<Storage> x0 = in + row * n;
        const Source<Storage> x1 = in + other * n;
        const double sum0 = sum_of(n, [&](std::int64_t i, auto access) { return access.read(x0 + i); });
        const double sum1 = sum_of(n, [&](std::int64_t i, auto access) { return access.read(x1 + i); });
        mean[row] = static_cast<float>(sum0 / count);
        mean[other] = static_cast<float>(sum1 / count);
        const V center0 = set(mean[row]), center1 = set(mean[other]);
        const TwoSums squares = two_sums_of(n, [&](std::int64_t i, auto access, V& sum0, V& sum1) {
            prefetch((x0 + 2 * n).first, i);
            prefetch((x1 + 2 * n).first, i);
            const V difference0 = access.keep(sub(access.read(x0 + i), center0));
            const V difference1 = access.keep(sub(access.read(x1 + i), center1));
            sum0 = add(sum0, mul(difference0, difference0));
            sum1 = add(sum1, mul(difference1, difference1));
        });
        rstd[row] = inverse_deviation(squares.first / count, eps);
        rstd[other] = inverse_deviation(squares.second / count, eps);
        const V inverse0 = set(rstd[row]), inverse1 = set(rstd[other]);
        for_vectors(n, [&](std::int64_t i, auto access) {
            const V normal0 = mul(sub(access.read(x0 + i), center0), inverse0);
            const V normal1 = mul(sub(access.read(x1 + i), center1), inverse1);
            const V factor = access.read(weight + i);
            const V offset = access.read(bias + i);
            access.write(out + (row * n + i), fma(normal0, factor, offset));
            access.write(out + (other * n + i), fma(normal1, factor, offset));
        });
    }
}

// With h = (x - mean) rstd and g = dy weight: dx += rstd (g - mean(g) - h mean(g h)); dweight += dy h; dbias += dy.
// 19 FLOPs, 36 bytes per element of fp32. The first walk asks for dx, the second for the rows of dy and x that follow.
template <class Storage>
void layernorm_backward_row(Target<Storage> dx, float* dweight, float* dbias, Source<Storage> dy, Source<Storage> x,
                            const float* weight, float mean, float rstd, std::int64_t n) {
    const V centers = set(mean);
    const V inverses = set(rstd);
    const double count = static_cast<double>(n);
    const TwoSums sums = two_sums_of(n, [&](std::int64_t i, auto access, V& sum, V& sum_normal) {
        prefetch_line(dx.first, i);
        const V gradient = mul(access.read(dy + i), access.read(weight + i));
        sum = add(sum, gradient);
        sum_normal = add(sum_normal, access.keep(mul(gradient, mul(sub(access.read(x + i), centers), inverses))));
    });
    const V average = set(static_cast<float>(sums.first / count));
    const V average_normal = set(static_cast<float>(sums.second / count));
    for_vectors(n, [&](std::int64_t i, auto access) {
        prefetch_line((dy + n).first, i);
        prefetch_line((x + n).first, i);
        const V d = access.read(dy + i);
        const V normal = mul(sub(access.read(x + i), centers), inverses);
        const V remainder = sub(sub(mul(d, access.read(weight + i)), average), mul(normal, average_normal));
        access.write(dx + i, fma(remainder, inverses, access.read(dx + i)));
        access.write(dweight + i, fma(d, normal, access.read(dweight + i)));
        access.write(dbias + i, add(d, access.read(dbias + i)));
    });
}

template <class Storage>
void layernorm_backward_rows(void* dx, float* dweight, float* dbias, const void* dy, const void* x, const float* weight,
                             const float* mean, const float* rstd, std::int64_t rows, std::int64_t n) {
    const Target<Storage> out(dx);
    const Source<Storage> gradient(dy), in(x);
    for (std::int64_t row = 0; row < rows; ++row)
        layernorm_backward_row(out + row * n, dweight, dbias, gradient + row * n, in + row * n, weight, mean[row],
                               rstd[row], n);
}

// y = x rstd weight, rstd = 1 / sqrt(mean(x^2) + eps). 4 FLOPs, 8 bytes per element of fp32.
template <class Storage>
void rmsnorm_forward_rows(void* y, float* rstd, const void* x, const float* weight, std::int64_t rows, std::int64_t n,
                          float eps) {
    for (std::int64_t row = 0; row < rows; ++row) {
        const Target<Storage> out = Target<Storage>(y) + row * n;
        const Source<Storage> in = Source<Storage>(x) + row * n;
        const double squares = sum_of(n, [&](std::int64_t i, auto access) {
            const V value = access.read(in + i);
            return mul(value, value);
        });
        rstd[row] = inverse_deviation(squares / static_cast<double>(n), eps);
        const V inverses = set(rstd[row]);
        for_vectors(n, [&](std::int64_t i, auto access) {
            access.write(out + i, mul(mul(access.read(in + i), inverses), access.read(weight + i)));
        });
    }
}

// With h = x rstd and g = dy weight: dx += rstd (g - h mean(g h)); dweight += dy h. 13 FLOPs, 28 bytes per element of
// fp32. Lines are asked for as in layernorm_backward_row.
template <class Storage>
void rmsnorm_backward_row(Target<Storage> dx, float* dweight, Source<Storage> dy, Source<Storage> x,
                          const float* weight, float rstd, std::int64_t n) {
    const V inverses = set(rstd);
    const double sum_normal = sum_of(n, [&](std::int64_t i, auto access) {
        prefetch_line(dx.first, i);
        return mul(mul(access.read(dy + i), access.read(weight + i)), mul(access.read(x + i), inverses));
    });
    const V average_normal = set(static_cast<float>(sum_normal / static_cast<double>(n)));
    for_vectors(n, [&](std::int64_t i, auto access) {
        prefetch_line((dy + n).first, i);
        prefetch_line((x + n).first, i);
        const V d = access.read(dy + i);
        const V normal = mul(access.read(x + i), inverses);
        const V remainder = sub(mul(d, access.read(weight + i)), mul(normal, average_normal));
        access.write(dx + i, fma(remainder, inverses, access.read(dx + i)));
        access.write(dweight + i, fma(d, normal, access.read(dweight + i)));
    });
}

template <class Storage>
void rmsnorm_backward_rows(void* dx, float* dweight, const void* dy, const void* x, const float* weight,
                           const float* rstd, std::int64_t rows, std::int64_t n) {
    const Target<Storage> out(dx);
    const Source<Storage> gradient(dy), in(x);
    for (std::int64_t row = 0; row < rows; ++row)
        rmsnorm_backward_row(out + row * n, dweight, gradient + row * n, in + row * n, weight, rstd[row], n);
}

// --- softmax pieces ---------------------------------------------------------------------------------

// NaN elements are passed over: exp_sum brings them back. 1 FLOP, 4 bytes per element.
float maximum_row(const float* x, std::int64_t n) {
    V largest0 = set(-__builtin_inff());
    V largest1 = largest0;
    std::int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        largest0 = max(load(x + i), largest0);
        largest1 = max(load(x + i + kLanes), largest1);
    }
    for_vectors(n - i, [&](std::int64_t j, auto access) {
        largest0 = max(access.read_or(x + i + j, -__builtin_inff()), largest0);
    });
    return reduce_max(max(largest0, largest1));
}

// y = exp(scale x - shift), and their sum; n elements at `next` are asked for. 19 FLOPs, 8 bytes per element.
float exp_sum_row(float* y, const float* x, const float* next, float scale, float shift, std::int64_t n) {
    const V factor = set(scale);
    const V offset = set(-shift);
    return static_cast<float>(sum_of(n, [&](std::int64_t i, auto access) {
        prefetch(next, i);
        const V power = exponential(fma(access.read(x + i), factor, offset));
        access.write(y + i, power);
        return access.keep(power);
    }));
}

// 2 FLOPs, 8 bytes per element.
float dot_row(const float* x, const float* y, std::int64_t n) {
    return static_cast<float>(
        sum_of(n, [&](std::int64_t i, auto access) { return mul(access.read(x + i), access.read(y + i)); }));
}

// --- optimizer --------------------------------------------------------------------------------------

// Products of floats are exact in float64. Four vectors at a time, into eight sums: one pair of sums would wait for its
// own additions. 2 FLOPs, 4 bytes per element.
double sum_squares_row(const float* x, std::int64_t n) {
    D first0 = double_zeros(), first1 = double_zeros(), first2 = double_zeros(), first3 = double_zeros();
    D second0 = double_zeros(), second1 = double_zeros(), second2 = double_zeros(), second3 = double_zeros();
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        const V x0 = load(x + i), x1 = load(x + i + kLanes);
        const V x2 = load(x + i + 2 * kLanes), x3 = load(x + i + 3 * kLanes);
        add_products(first0, second0, x0, x0);
        add_products(first1, second1, x1, x1);
        add_products(first2, second2, x2, x2);
        add_products(first3, second3, x3, x3);
    }
    for_vectors(n - i, [&](std::int64_t j, auto access) {
        const V value = access.read(x + i + j);
        add_products(first0, second0, value, value);
    });
    return (total_of(first0, second0) + total_of(first1, second1)) +
           (total_of(first2, second2) + total_of(first3, second3));
}

// Adam with decoupled weight decay (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019):
// m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; master -= decay master + step_size m / (sqrt(v)
// correction2 + eps); weights = master, rounded, where there are any. 15 FLOPs, 28 bytes per element and those of a
// weight: memory binds.
template <class Storage>
void adamw_row(void* weights, float* master, float* m, float* v, const float* gradient, std::int64_t n,
               const AdamWRow* row) {
    const Target<Storage> rounded(weights);
    const V beta1 = set(row->beta1), beta2 = set(row->beta2), gain1 = set(row->gain1), gain2 = set(row->gain2);
    const V eps = set(row->eps), step = set(-row->step_size), correction2 = set(row->correction2);
    const V kept = set(1.0f - row->decay), factor = set(row->gradient_factor);
    for_vectors(n, [&](std::int64_t i, auto access) {
        const V g = mul(access.read(gradient + i), factor);
        const V first = fma(gain1, g, mul(beta1, access.read(m + i)));
        const V second = fma(mul(gain2, g), g, mul(beta2, access.read(v + i)));
        const V update = div(first, fma(square_root(second), correction2, eps));
        const V value = fma(step, update, mul(kept, access.read(master + i)));
        access.write(master + i, value);
        if (rounded) access.write(rounded + i, value);
        access.write(m + i, first);
        access.write(v + i, second);
    });
}

// ------------------------------------------------------------------------------------------------------

// What is written for each storage type.
template <class Storage>
void fill_stored_rows(Kernels* kernels, DType type) {
    const int index = static_cast<int>(type);
    kernels->widen[index] = widen_row<Storage>;
    kernels->narrow[index] = narrow_row<Storage>;
    kernels->add_rows[index] = add_rows<Storage>;
    kernels->residual[index] = residual_row<Storage>;
    kernels->gelu_forward[index] = gelu_forward_row<Storage>;
    kernels->gelu_backward[index] = gelu_backward_row<Storage>;
    kernels->swiglu_forward[index] = swiglu_forward_row<Storage>;
    kernels->swiglu_backward[index] = swiglu_backward_row<Storage>;
    kernels->rope[index] = rope_row<Storage>;
    kernels->layernorm_forward[index] = layernorm_forward_rows<Storage>;
    kernels->layernorm_backward[index] = layernorm_backward_rows<Storage>;
    kernels->rmsnorm_forward[index] = rmsnorm_forward_rows<Storage>;
    kernels->rmsnorm_backward[index] = rmsnorm_backward_rows<Storage>;
    kernels->adamw[index] = adamw_row<Storage>;
}

inline void fill_rows(Kernels* kernels) {
    fill_stored_rows<Fp32>(kernels, DType::fp32);
    fill_stored_rows<Bf16>(kernels, DType::bf16);
    fill_stored_rows<Fp16>(kernels, DType::fp16);
    kernels->add = add_row;
    kernels->scale = scale_row;
    kernels->maximum = maximum_row;
    kernels->exp_sum = exp_sum_row;
    kernels->softmax_columns = softmax_columns_tile;
    kernels->softmax_row = softmax_row_tile;
    kernels->scale_columns = scale_columns_tile;
    kernels->softmax_backward = softmax_backward_row;
    kernels->dot = dot_row;
    kernels->sum_squares = sum_squares_row;
}
