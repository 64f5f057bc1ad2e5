// Statistics of one row of logits, and its gradient, for the target that this file is included for (targets.h).
//
// No loop depends on where the row lies in memory or on the rows beside it, so results are bitwise the same for a row
// alone or in a batch, for any number of threads, and in place or not.

using grpoforge::Gradient;
using grpoforge::Scores;
using grpoforge::Stats;

constexpr int64_t PART = 2048;  // elements that are added in float32, LANES ways; sums of parts are added in float64

// Asks memory for the 2 LANES numbers that a pass over a row reads AHEAD bytes after those at x. A processor foresees such
// passes by itself, but only to the end of a page of 4 KiB; there it would wait for memory each time.
constexpr int64_t AHEAD = 2048, LINE = 64;

template <typename T>
INLINE void fetch_ahead(const T* x) {
    const char* const from = reinterpret_cast<const char*>(x) + AHEAD;
    for (int64_t at = 0; at < 2 * LANES * int64_t{sizeof(T)}; at += LINE) __builtin_prefetch(from + at);
}

INLINE Floats exponent_of(Floats z, float maximum, float k) { return at_least_underflow((z - maximum) * k); }

struct Sums {
    Floats highest, total, weighted;  // weighted in units of log2
};

INLINE void add(Floats z, float maximum, float k, Sums& sums) {
    const Floats d = exponent_of(z, maximum, k), e = exp2_of(d);
    sums.highest = larger_number(z, sums.highest);
    sums.total += e;
    sums.weighted += e * d;
}

// The sums of n scores relative to `maximum`, of no use when the highest is above it.
template <typename T>
static __attribute__((noinline)) void part_sums(const T* x, int64_t n, float maximum, float k, Sums* result) {
    Sums sums = {all(-FLT_MAX), all(0.0f), all(0.0f)}, others = sums;
    int64_t v = 0;
    for (; v + 2 * LANES <= n; v += 2 * LANES) {
        fetch_ahead(x + v);
        const Two two = load_two(x + v);
        add(two.a, maximum, k, sums);
        add(two.b, maximum, k, others);
    }
    sums = {larger_number(others.highest, sums.highest), sums.total + others.total, sums.weighted + others.weighted};
    for (; v + LANES <= n; v += LANES) add(load(x + v), maximum, k, sums);
    if (v < n) {
        // -inf behind the last: weight 0.
        float32 rest[LANES];
        store(load_some(x + v, n - v), rest);
        for (int64_t i = n - v; i < LANES; i++) rest[i].value = -INFINITY;
        add(load(rest), maximum, k, sums);
    }
    *result = sums;
}

// The scores of n <= PART logits with a softcap or a scale: softcap tanh(scale x / softcap), or scale x. They are rounded to
// float32 here, and from then on treated as logits with neither.
template <typename T>
static __attribute__((noinline)) void write_scores(const T* x, int64_t n, const Scores& scores, float32* out) {
    const bool capped = scores.softcap != 0.0f;
    const float inner = capped ? scores.scale / scores.softcap : scores.scale;
    for (int64_t v = 0; v < n; v += LANES) {
        const Floats z = (v + LANES <= n ? load(x + v) : load_some(x + v, n - v)) * inner;
        store(capped ? scores.softcap * tanh_of(z) : z, out + v);
    }
}

INLINE float highest_of(const Floats& x) {
    alignas(64) float values[LANES];
    std::memcpy(values, &x, sizeof x);
    float highest = values[0];
    for (float value : values) highest = value > highest ? value : highest;
    return highest;
}

INLINE double sum_of(const Floats& x) {
    alignas(64) float values[LANES];
    std::memcpy(values, &x, sizeof x);
    double sum = 0.0;
    for (float value : values) sum += value;
    return sum;
}

// Whether the loops read the logits. Where there is something to compute first, and for float16, which is rare and whose
// loops would take a third of the compiler's time, they read scores.
template <typename T>
static bool reads_itself(const Scores& scores) {
    return !std::is_same_v<T, float16> && scores.softcap == 0.0f && scores.scale == 1.0f;
}

template <typename T>
static __attribute__((noinline)) float highest_in(const T* x, int64_t n) {
    Floats highest = all(-FLT_MAX), other = highest;
    int64_t v = 0;
    for (; v + 2 * LANES <= n; v += 2 * LANES) {
        const Two two = load_two(x + v);
        highest = larger_number(two.a, highest);
        other = larger_number(two.b, other);
    }
    float result = highest_of(larger_number(other, highest));
    for (; v < n; v++) {
        const float last = load_some(x + v, 1)[0];
        result = last > result ? last : result;
    }
    return result;
}

// Sums relative to `from` as sums relative to `to`.
static void rebase(double& total, double& weighted, float from, float to, float k) {
    const double shift = std::fmax(static_cast<double>(from - to) * k, -1e4), by = std::exp2(shift);
    weighted = by * (weighted + total * shift);
    total *= by;
}

// Sums are relative to the maximum of the first part, until a part rises above that by so much (in units of log2) that
// digits would be lost: then it is summed again, out of the cache, and the sums are relative to its maximum from then on.
// A token that has nearly all probability rises that much, so its own term is exactly 1.
constexpr float RISE = 4.0f;

template <typename T>
static Stats stats_of(const char* row, int64_t num_tokens, int64_t id, float k, const Scores& scores) {
    const T* x = reinterpret_cast<const T*>(row);
    const bool is_plain = reads_itself<T>(scores);
    float32 part[PART];
    float maximum = -FLT_MAX, base = -FLT_MAX, chosen = -INFINITY;
    double total = 0.0, weighted = 0.0;
    for (int64_t start = 0; start < num_tokens; start += PART) {
        const int64_t n = num_tokens - start < PART ? num_tokens - start : PART;
        if (!is_plain) write_scores(x + start, n, scores, part);
        const auto sum_up = [&](Sums* sums) {
            if constexpr (!std::is_same_v<T, float16>)
                if (is_plain) return part_sums(x + start, n, base, k, sums);
            part_sums(part, n, base, k, sums);
        };
        const auto highest_of_first = [&] {
            if constexpr (!std::is_same_v<T, float16>)
                if (is_plain) return highest_in(x, n);
            return highest_in(part, n);
        };
        if (id >= start && id < start + n) chosen = is_plain ? load_some(x + id, 1)[0] : part[id - start].value;
        if (start == 0) base = highest_of_first();
        Sums sums;
        sum_up(&sums);
        const float highest = highest_of(sums.highest);
        maximum = highest > maximum ? highest : maximum;
        if ((highest - base) * k > RISE) {
            rebase(total, weighted, base, highest, k);
            base = highest;
            sum_up(&sums);
        }
        total += sum_of(sums.total);
        weighted += sum_of(sums.weighted);
    }
    if (maximum > base) rebase(total, weighted, base, maximum, k);
    return {maximum, static_cast<float>(total), static_cast<float>(weighted * grpoforge::LN2), chosen};
}

INLINE Floats slope_of(Floats z, const Gradient& row) {
    const Floats d = at_least((z - row.maximum) * row.k, row.least);
    return exp2_of(d) * (row.a + row.c * d);
}

template <typename T, typename Slope>
INLINE void write_slopes(const T* x, T* out, int64_t n, const Slope& slope) {
    int64_t v = 0;
    for (; v + 2 * LANES <= n; v += 2 * LANES) {
        fetch_ahead(x + v);
        const Two two = load_two(x + v);
        store_two(Two{slope(two.a), slope(two.b)}, out + v);
    }
    for (; v + LANES <= n; v += LANES) store(slope(load(x + v)), out + v);
    if (v < n) store_some(slope(load_some(x + v, n - v)), out + v, n - v);
}

struct WithEntropy {
    Gradient row;
    INLINE_MEMBER Floats operator()(Floats z) const { return slope_of(z, row); }
};

// a 2^d, with the factor inside the coefficients.
template <int terms>
struct WithoutEntropy {
    float maximum, k, least, c[terms];
    WithoutEntropy(const Gradient& row, const float (&power)[terms]) : maximum(row.maximum), k(row.k), least(row.least) {
        for (int term = 0; term < terms; term++) c[term] = row.a * power[term];
    }
    INLINE_MEMBER Floats operator()(Floats z) const { return power_of(at_least((z - maximum) * k, least), c); }
};

template <typename T>
static __attribute__((noinline)) void slopes(const T* x, T* out, int64_t n, const Gradient& row) {
    if (row.c != 0.0f)
        write_slopes(x, out, n, WithEntropy{row});
    else if constexpr (std::is_same_v<T, bfloat16>)
        write_slopes(x, out, n, WithoutEntropy(row, COARSE));
    else
        write_slopes(x, out, n, WithoutEntropy(row, FINE));
}

template <typename T>
static void scored_gradient(const T* x, T* out, int64_t num_tokens, int64_t id, const Gradient& row, const Scores& scores) {
    float32 part[PART], slope[PART];
    const bool capped = scores.softcap != 0.0f;
    for (int64_t start = 0; start < num_tokens; start += PART) {
        const int64_t n = num_tokens - start < PART ? num_tokens - start : PART;
        write_scores(x + start, n, scores, part);
        slopes(part, slope, n, row);
        if (id >= start && id < start + n) slope[id - start].value += row.spike;
        for (int64_t v = 0; v < n; v += LANES) {
            // Without a softcap nothing may be made of the score: it may be -inf.
            const Floats t = capped ? load(part + v) / scores.softcap : all(0.0f);
            const Floats result = load(slope + v) * (1.0f - t * t);
            if (v + LANES <= n)
                store(result, out + start + v);
            else
                store_some(result, out + start + v, n - v);
        }
    }
}

// The chosen logit is read before `out`, which may be the row itself, is written.
template <typename T>
static void gradient_of(
    const char* from, char* to, int64_t num_tokens, int64_t id, const Gradient& row, const Scores& scores) {
    const T* x = reinterpret_cast<const T*>(from);
    T* out = reinterpret_cast<T*>(to);
    if (!reads_itself<T>(scores)) return scored_gradient(x, out, num_tokens, id, row, scores);
    if constexpr (!std::is_same_v<T, float16>) {
        const bool has_id = id >= 0 && id < num_tokens;
        const Floats chosen = has_id ? slope_of(load_some(x + id, 1), row) + row.spike : all(0.0f);
        slopes(x, out, num_tokens, row);
        if (has_id) store_some(chosen, out + id, 1);
    }
}

static Stats row_stats(const char* x, int64_t num_tokens, int64_t id, float k, const Scores& scores) {
    const auto of = scores.format == grpoforge::FLOAT32 ? stats_of<float32>
        : scores.format == grpoforge::BFLOAT16          ? stats_of<bfloat16>
                                                        : stats_of<float16>;
    return of(x, num_tokens, id, k, scores);
}

static void row_gradient(const char* x, char* out, int64_t n, int64_t id, const Gradient& row, const Scores& scores) {
    const auto of = scores.format == grpoforge::FLOAT32 ? gradient_of<float32>
        : scores.format == grpoforge::BFLOAT16          ? gradient_of<bfloat16>
                                                        : gradient_of<float16>;
    of(x, out, n, id, row, scores);
}
