// The clipped loss and its KL term over a block of tokens, for the target that this file is included for (targets.h): as many
// tokens at a time as a register holds floats. How ties split the gradient is in ../reference/grpo_loss.py.

using grpoforge::GrpoOptions;
using grpoforge::GrpoSums;

typedef double Doubles __attribute__((vector_size(4 * LANES)));
typedef int64_t Longs __attribute__((vector_size(4 * LANES)));
typedef float HalfFloats __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint8_t HalfBytes __attribute__((vector_size(LANES / 2)));

// Neighbors in memory, as many as a multiple of LANES; one advantage stands for all where the step is 0.
struct Tokens {
    const float *logprobs, *old, *ref, *advantages;
    int64_t advantages_step;
    const uint8_t* mask;
    const double* weights;
};

// One number for each byte.
template <typename Narrow, typename Wide>
INLINE Wide flags(const uint8_t* x) {
#if REGISTER_BYTES >= 32
    typedef Narrow Unaligned __attribute__((aligned(1), may_alias));
    Wide wide;
    if constexpr (sizeof(Wide) == 4 * sizeof(Narrow))
        __asm__("vpmovzxbd %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const Unaligned*>(x)));
    else
        __asm__("vpmovzxbq %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const Unaligned*>(x)));
    return wide;
#else
    return __builtin_convertvector(read<Narrow>(x), Wide);
#endif
}

// exp y, and exp y - 1 and exp y - 1 - y without their cancellation near 0.
struct Exponential {
    Floats exp, less_one, excess;
};

// exp y = 2^n (1 + p) with |y - n ln 2| <= ln 2 / 2 and p by its Taylor series, whose rest float32 cannot hold.
// Overflow gives inf and underflow a subnormal number. NaN gives NaN.
INLINE Exponential exponential_of(Floats y) {
    constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23 rounds to integers
    constexpr float LN2_HIGH = 0.693145751953125f, LN2_LOW = 1.42860682e-6f;
    const Floats bounded = smaller(larger(y, all(-104.0f)), all(89.0f));
    const Floats t = bounded * grpoforge::LOG2E + MAGIC, n = t - MAGIC;
    const Floats r = (bounded - n * LN2_HIGH) - n * LN2_LOW;
    constexpr float SERIES[] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f};
    Floats q = all(1.0f / 5040.0f);
    for (const float term : SERIES) q = q * r + term;
    const Floats excess = r * r * q, p = r + excess, exp = times_power_of_two(1.0f + p, n);
    const Ints is_near = n == 0.0f;
    return {exp, is_near ? p : exp - 1.0f, is_near ? excess : exp - 1.0f - y};
}

struct Term {
    Floats value, slope;
};

INLINE Term clip_term(Floats ratio, Floats advantage, const GrpoOptions& o) {
    const Floats none = all(0.0f), one = all(1.0f);
    const Floats free = ratio * advantage, held = smaller(larger(ratio, all(o.low)), all(o.high)) * advantage;
    const Ints is_free = free < held;
    // A tie gives a half of the gradient to each branch, and the clipped one passes its half on inside the range.
    const Floats inside = ((ratio < o.low) | (ratio > o.high)) ? none : one;
    const Floats share = is_free ? one : (free == held ? 0.5f + 0.5f * inside : inside);
    const Ints is_stopped = (advantage < 0.0f) & (ratio > o.bound);
    const Floats factor = is_stopped ? none : share;
    const Floats value = is_stopped ? -o.bound * advantage : (held <= free ? -held : -free);  // NaN where either is
    const Floats slope = factor == 0.0f ? none : -factor * advantage * ratio;
    return {value, value != value ? value : slope};
}

template <int kl>
INLINE Term kl_term(Floats difference) {
    if (kl == 1) return {difference, all(1.0f)};
    if (kl == 2) return {0.5f * difference * difference, difference};
    if (kl == 3) {
        const Exponential e = exponential_of(-difference);
        return {e.excess, -e.less_one};
    }
    return {all(0.0f), all(0.0f)};
}

// Half of the numbers, from one of them on.
INLINE Doubles widened(Floats x, int64_t from) {
    const HalfFloats half = read<HalfFloats>(reinterpret_cast<const float*>(&x) + from);
#if REGISTER_BYTES == 64
    Doubles wide;
    __asm__("vcvtps2pd %1, %0" : "=v"(wide) : "v"(half));
    return wide;
#else
    return __builtin_convertvector(half, Doubles);
#endif
}

// All lanes by one operation, halves at a time.
template <typename T, typename Lanes, typename Operation>
INLINE T folded(const Lanes& x, const Operation& of) {
    constexpr int64_t COUNT = sizeof x / sizeof(T);
    T lanes[COUNT];
    std::memcpy(lanes, &x, sizeof x);
    for (int64_t width = COUNT / 2; width > 0; width /= 2)
        for (int64_t lane = 0; lane < width; lane++) lanes[lane] = of(lanes[lane], lanes[lane + width]);
    return lanes[0];
}

// What is counted of LANES tokens at a time. `deviation` and `kl_max` are bits of what has no sign, which are in the order
// of the numbers, with NaN above all.
struct Counts {
    Ints low = {}, high = {}, bound = {}, deviation = {}, kl_max = {};
    Doubles loss[2] = {}, kl[2] = {};

    INLINE_MEMBER void add(Floats ratio, Floats distance, Floats advantage, Floats of_kl, const GrpoOptions& o) {
        const Ints is_negative = advantage < 0.0f;
        low -= is_negative & (ratio < o.low);
        high -= (advantage > 0.0f) & (ratio > o.high);
        bound -= is_negative & (ratio > o.bound);
        const Ints far = (Ints)distance & 0x7fffffff, size = (Ints)of_kl & 0x7fffffff;
        deviation = far > deviation ? far : deviation;
        kl_max = size > kl_max ? size : kl_max;
        for (int half = 0; half < 2; half++) kl[half] += widened(of_kl, half * (LANES / 2));
    }

    GrpoSums sums() const {
        const auto plus = [](auto a, auto b) { return a + b; };
        const auto larger = [](auto a, auto b) { return a > b ? a : b; };
        const auto number = [](int32_t bits) { return grpoforge::float_of(static_cast<uint32_t>(bits)); };
        return {
            folded<double>(loss[0] + loss[1], plus),
            folded<double>(kl[0] + kl[1], plus),
            double(folded<int32_t>(low, plus)),
            double(folded<int32_t>(high, plus)),
            double(folded<int32_t>(bound, plus)),
            number(folded<int32_t>(deviation, larger)),
            number(folded<int32_t>(kl_max, larger)),
        };
    }
};

// The weights of a half of LANES tokens, 0 where they do not count.
INLINE Doubles half_of_weights(const Tokens& x, int64_t v) {
    const Doubles weights = read<Doubles>(x.weights + v), none = {};
    const Longs is_used = (flags<HalfBytes, Longs>(x.mask + v) != 0) & (weights > 0.0);
    return is_used ? weights : none;
}

// The sums of n tokens and, in `slopes`, the derivatives of the loss by their log-probs. Masked tokens are replaced, not
// multiplied: NaN may stand there.
template <int kl>
static __attribute__((noinline)) GrpoSums sums_of(
    const Tokens& tokens, int64_t n, const GrpoOptions& options, float* slopes) {
    const Tokens x = tokens;  // copies, which no write to `slopes` can change
    const GrpoOptions o = options;
    const Floats none = all(0.0f);
    Counts counts;
    for (int64_t v = 0; v < n; v += LANES) {
        const Ints is_kept = flags<Bytes, Ints>(x.mask + v) != 0;
        const Floats logprobs = load_at(x.logprobs + v);
        const Floats given = x.advantages_step ? load_at(x.advantages + v) : all(*x.advantages);
        const Floats advantage = is_kept ? given : none;
        const Exponential ratio = exponential_of(is_kept ? logprobs - load_at(x.old + v) : none);
        const Term clip = clip_term(ratio.exp, advantage, o);
        const Term penalty = kl_term<kl>(kl && x.ref ? (is_kept ? logprobs - load_at(x.ref + v) : none) : none);
        counts.add(ratio.exp, ratio.less_one, advantage, penalty.value, o);
        const Floats value = clip.value + o.beta * penalty.value;
        float32 weights[LANES];
        for (int half = 0; half < 2; half++) {
            const int64_t at = half * (LANES / 2);
            const Doubles weight = half_of_weights(x, v + at);
            const HalfFloats narrow = __builtin_convertvector(weight, HalfFloats);
            std::memcpy(weights + at, &narrow, sizeof narrow);
            counts.loss[half] += weight > 0.0 ? weight * widened(value, at) : Doubles{};
        }
        const Floats weight = load(weights), slope = weight * (clip.slope + o.beta * penalty.slope);
        store_at(weight > 0.0f ? slope : none, slopes + v);
    }
    return counts.sums();
}

static GrpoSums grpo_sums(const Tokens& x, int64_t n, const GrpoOptions& options, float* slopes) {
    const auto of = options.kl == 1 ? sums_of<1> : options.kl == 2 ? sums_of<2> : options.kl == 3 ? sums_of<3> : sums_of<0>;
    return of(x, n, options, slopes);
}
