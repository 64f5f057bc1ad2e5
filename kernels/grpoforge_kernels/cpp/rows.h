// What the C++ kernels share, whatever they are compiled for. No torch, no libm in a loop.
//
// -ffast-math must not be used: it cancels (t + MAGIC) - MAGIC, the rounding to integers of floats.h and grpo_loss_kernels.h.
// What slips through is refused by the check at load time.
#pragma once

#ifdef __FAST_MATH__
#error "-ffast-math changes what these kernels compute"
#endif

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

namespace grpoforge {

enum Format : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

constexpr int64_t BLOCK = 512;  // floats that are held in L1 at a time
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

// Memory for n numbers and a register more, at the border of a line of the cache.
template <typename T>
struct Aligned {
    T* data;
    explicit Aligned(int64_t n) : data(static_cast<T*>(std::aligned_alloc(64, (n * int64_t{sizeof(T)} + 127) / 64 * 64))) {}
    Aligned(const Aligned&) = delete;
    ~Aligned() { std::free(data); }
    operator T*() const { return data; }
};

INLINE int64_t size_of(int64_t format) { return format == FLOAT32 ? 4 : 2; }

INLINE float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

struct Stats {
    float maximum, total, weighted, chosen;
};

// z = softcap tanh(scale x / softcap), or scale x when softcap is 0.
struct Scores {
    int64_t format;
    float softcap, scale;
};

// The gradient by a logit is (e (a + c d) + 1[v = y] spike) (1 - (z / softcap)^2), with d = (z - maximum) k and e = 2^d, or
// e = 0 for d below `least`.
struct Gradient {
    float maximum, k, a, c, spike, least;
};

// The least d whose term e (a + c d) is a normal number, about: processors take up to sixty times as long for others. What
// is not finite has no such bound, and shows in all of its row.
INLINE float least_exponent(float a, float c) {
    if (!std::isfinite(a) || !std::isfinite(c)) return -INFINITY;
    int exponent;
    std::frexp(std::fmax(std::fabs(a), std::fabs(c)), &exponent);  // the larger is at least 2^(exponent - 1)
    return exponent < 1 ? -125.0f - static_cast<float>(exponent) : -126.0f;
}

// x, or 0 for a subnormal one.
INLINE float normal(double x) {
    const float narrow = static_cast<float>(x);
    return std::fabs(narrow) < FLT_MIN ? 0.0f : narrow;  // NaN stays
}

// Where g, h and l are the derivatives by log-prob, entropy and logsumexp: s p (b + c ln p) with p = e / S and
// ln p = d ln 2 - ln S.
INLINE Gradient coefficients_of(const Stats& stats, float inv_temperature, float scale, float g, float h, float l) {
    if (g == 0.0f && h == 0.0f && l == 0.0f) return {0.0f, 1.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    const double s = inv_temperature, sum = stats.total, log_total = std::log(sum), by_logit = s * scale;
    const double entropy = log_total - stats.weighted / sum;
    const double c = -static_cast<double>(h), b = h == 0.0f ? double(l) - g : double(l) - g - h * entropy;
    const float factor = normal(by_logit / sum * (h == 0.0f ? b : b - c * log_total));
    const float slope = normal(by_logit / sum * c * LN2), spike = static_cast<float>(by_logit * g);
    return {stats.maximum, inv_temperature * LOG2E, factor, slope, spike, least_exponent(factor, slope)};
}

}  // namespace grpoforge
