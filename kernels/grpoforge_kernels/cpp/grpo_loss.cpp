// The clipped loss with a KL term: sums and gradient in one pass over the tokens, and straight from logits. The
// equations are in ../grpo_loss.py; how ties split the gradient is in ../reference/grpo_loss.py.
//
// Tokens are taken in blocks of BLOCK in row-major order, whatever their strides. Each block leaves its own sums in
// float64, which are added in order at the end: results are bitwise the same for any number of threads and any layout.
#include "rows.h"

using namespace grpoforge;

extern "C" {

// selective_log_softmax.cpp
void grpoforge_row_stats(
    const char* logits, int64_t row_bytes, int64_t num_rows, int64_t num_tokens, const int64_t* ids, int64_t first_id,
    const float* inv_temperature, const uint8_t* mask, int64_t format, float softcap, float scale, float* maximum,
    float* total, float* weighted, float* chosen, int32_t num_threads);
void grpoforge_finish(
    const float* maximum, const float* total, const float* weighted, const float* chosen, const float* inv_temperature,
    int64_t num_rows, float* logprobs, float* entropy, float* logsumexp);
void grpoforge_row_gradient(
    const char* logits, int64_t row_bytes, int64_t num_rows, int64_t num_tokens, const int64_t* ids, int64_t first_id,
    const float* inv_temperature, const uint8_t* mask, int64_t format, float softcap, float scale, const float* maximum,
    const float* total, const float* weighted, const float* g, const float* h, const float* l, char* out,
    int64_t out_row_bytes, int32_t num_threads);

struct GrpoOptions {
    float low, high, bound, beta;  // no bound is an infinite one
    int32_t kl;  // 0: none, 1: k1, 2: k2, 3: k3
};

// [b, T] each; strides in elements, those within a row 1 but for the advantages (0 or 1). ref may be null.
struct GrpoTokens {
    const float *logprobs, *old, *ref, *advantages;
    const uint8_t* mask;
    const double* weights;
    int64_t logprobs_row, old_row, ref_row, advantages_row, advantages_column, mask_row, weights_row;
    int64_t num_rows, num_columns;
};

}  // extern "C"

namespace {

// In the order of GrpoLoss.
struct Sums {
    double loss, kl, low, high, bound, ratio_deviation, kl_max;
};

constexpr int64_t NUM_SUMS = sizeof(Sums) / sizeof(double);

// exp y, and exp y - 1 and exp y - 1 - y without their cancellation near 0.
struct Exponential {
    float exp, less_one, excess;
};

// exp y = 2^n (1 + p) with |y - n ln 2| <= ln 2 / 2 and p by its Taylor series, whose rest float32 cannot hold.
// 2^n is two factors, so that overflow gives inf and underflow a subnormal. NaN gives NaN.
INLINE Exponential exponential_of(float y) {
    constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23 rounds to integers
    constexpr float LN2_HIGH = 0.693145751953125f, LN2_LOW = 1.42860682e-6f;
    float bounded = y < -104.0f ? -104.0f : y;
    bounded = bounded > 89.0f ? 89.0f : bounded;
    const float t = bounded * LOG2E + MAGIC, n = t - MAGIC;
    const float r = (bounded - n * LN2_HIGH) - n * LN2_LOW;
    float q = 1.0f / 5040.0f;
    q = q * r + 1.0f / 720.0f;
    q = q * r + 1.0f / 120.0f;
    q = q * r + 1.0f / 24.0f;
    q = q * r + 1.0f / 6.0f;
    q = q * r + 0.5f;
    const float excess = r * r * q, p = r + excess;
    const int32_t exponent = static_cast<int32_t>(bits_of(t)) - static_cast<int32_t>(bits_of(MAGIC));
    const int32_t half = exponent >> 1;
    const float exp = (1.0f + p) * float_of(static_cast<uint32_t>(half + 127) << 23)
        * float_of(static_cast<uint32_t>(exponent - half + 127) << 23);
    return {exp, n == 0.0f ? p : exp - 1.0f, n == 0.0f ? excess : exp - 1.0f - y};
}

// A block of tokens in L1. Masked tokens and those beyond the end have log-prob differences and advantages of 0.
struct Block {
    alignas(64) float old_difference[BLOCK], ref_difference[BLOCK], advantages[BLOCK], weights32[BLOCK];
    alignas(64) float ratios[BLOCK], deviations[BLOCK], kl[BLOCK], kl_slopes[BLOCK], values[BLOCK], slopes[BLOCK];
    alignas(64) double weights[BLOCK];
    alignas(64) int32_t kept[BLOCK];
};

// Part of a row: n tokens to position `at` of the block. Replaced where masked, not multiplied: NaN may stand there.
INLINE void load_part(const GrpoTokens& tokens, int64_t row, int64_t column, int64_t n, int64_t at, Block& block) {
    const uint8_t* const mask = tokens.mask + row * tokens.mask_row + column;
    const double* const weights = tokens.weights + row * tokens.weights_row + column;
    const float* const logprobs = tokens.logprobs + row * tokens.logprobs_row + column;
    const float* const old = tokens.old + row * tokens.old_row + column;
    const float* const advantages = tokens.advantages + row * tokens.advantages_row + column * tokens.advantages_column;
    int32_t* const kept = block.kept + at;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) kept[i] = mask[i];
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const double weight = weights[i], counted = (mask[i] != 0) & (weight > 0.0) ? weight : 0.0;
        block.weights[at + i] = counted;
        block.weights32[at + i] = static_cast<float>(counted);
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float difference = logprobs[i] - old[i];
        block.old_difference[at + i] = kept[i] ? difference : 0.0f;
    }
    if (tokens.advantages_column == 0) {
        const float advantage = advantages[0];
#pragma omp simd
        for (int64_t i = 0; i < n; i++) block.advantages[at + i] = kept[i] ? advantage : 0.0f;
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float advantage = advantages[i];
            block.advantages[at + i] = kept[i] ? advantage : 0.0f;
        }
    }
    if (!tokens.ref) return;
    const float* const ref = tokens.ref + row * tokens.ref_row + column;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float difference = logprobs[i] - ref[i];
        block.ref_difference[at + i] = kept[i] ? difference : 0.0f;
    }
}

INLINE void load_block(const GrpoTokens& tokens, int64_t start, int64_t n, Block& block) {
    if (n < BLOCK) {
        std::memset(block.old_difference + n, 0, static_cast<size_t>(BLOCK - n) * sizeof(float));
        std::memset(block.ref_difference + n, 0, static_cast<size_t>(BLOCK - n) * sizeof(float));
        std::memset(block.advantages + n, 0, static_cast<size_t>(BLOCK - n) * sizeof(float));
        std::memset(block.weights + n, 0, static_cast<size_t>(BLOCK - n) * sizeof(double));
        std::memset(block.weights32 + n, 0, static_cast<size_t>(BLOCK - n) * sizeof(float));
    }
    int64_t row = start / tokens.num_columns, column = start % tokens.num_columns;
    for (int64_t at = 0; at < n; row++, column = 0) {
        const int64_t left = tokens.num_columns - column, part = left < n - at ? left : n - at;
        load_part(tokens, row, column, part, at, block);
        at += part;
    }
}

struct Term {
    float value, slope;
};

INLINE Term clip_term(float ratio, float advantage, const GrpoOptions& options) {
    float clipped = ratio < options.low ? options.low : ratio;
    clipped = clipped > options.high ? options.high : clipped;
    const float free = ratio * advantage, held = clipped * advantage, least = free < held ? free : held;
    // A tie gives a half of the gradient to each branch, and the clipped one passes its half on inside the range.
    const float share = free < held ? 1.0f : (free == held ? 0.5f : 0.0f);
    const float inside = ratio < options.low ? 0.0f : (ratio > options.high ? 0.0f : 1.0f);
    const bool stopped = (advantage < 0.0f) & (ratio > options.bound);
    const float factor = stopped ? 0.0f : share + (1.0f - share) * inside;
    const float value = stopped ? -options.bound * advantage : -least;
    const float slope = factor == 0.0f ? 0.0f : -factor * advantage * ratio;
    return {value, value != value ? value : slope};
}

INLINE Term kl_term(float difference, int32_t kl) {
    if (kl == 1) return {difference, 1.0f};
    if (kl == 2) return {0.5f * difference * difference, difference};
    if (kl == 3) {
        const Exponential e = exponential_of(-difference);
        return {e.excess, -e.less_one};
    }
    return {0.0f, 0.0f};
}

INLINE void kl_terms(Block& block, int32_t kl) {
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; i++) {
        const Term term = kl_term(block.ref_difference[i], kl);
        block.kl[i] = term.value;
        block.kl_slopes[i] = term.slope;
    }
}

// Loops of one purpose each: the compiler vectorizes them.
INLINE void policy_terms(Block& block, const GrpoOptions& options) {
    const GrpoOptions o = options;
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; i++) {
        const Exponential e = exponential_of(block.old_difference[i]);
        block.ratios[i] = e.exp;
        block.deviations[i] = std::fabs(e.less_one);
    }
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; i++) {
        const Term clip = clip_term(block.ratios[i], block.advantages[i], o);
        const float weight = block.weights32[i], slope = weight * (clip.slope + o.beta * block.kl_slopes[i]);
        block.values[i] = clip.value + o.beta * block.kl[i];
        block.slopes[i] = weight > 0.0f ? slope : 0.0f;
    }
}

INLINE Sums sums_of(const Block& block, const GrpoOptions& options) {
    const float low = options.low, high = options.high, bound = options.bound;
    int32_t num_low = 0, num_high = 0, num_bound = 0, num_nan = 0, num_kl_nan = 0;
    float deviation = 0.0f, kl_max = 0.0f;
#pragma omp simd reduction(+ : num_low, num_high, num_bound, num_nan, num_kl_nan) reduction(max : deviation, kl_max)
    for (int64_t i = 0; i < BLOCK; i++) {
        const float ratio = block.ratios[i], advantage = block.advantages[i];
        const float distance = block.deviations[i], size = std::fabs(block.kl[i]);
        num_low += (ratio < low) & (advantage < 0.0f) ? 1 : 0;
        num_high += (ratio > high) & (advantage > 0.0f) ? 1 : 0;
        num_bound += (ratio > bound) & (advantage < 0.0f) ? 1 : 0;
        num_nan += distance != distance ? 1 : 0;
        num_kl_nan += size != size ? 1 : 0;
        deviation = distance > deviation ? distance : deviation;
        kl_max = size > kl_max ? size : kl_max;
    }
    double loss = 0.0, kl = 0.0;
#pragma omp simd reduction(+ : loss, kl)
    for (int64_t i = 0; i < BLOCK; i++) {
        const double weight = block.weights[i], value = weight * block.values[i];
        loss += weight > 0.0 ? value : 0.0;
        kl += block.kl[i];
    }
    return {
        loss, kl, double(num_low), double(num_high), double(num_bound), num_nan ? double(NAN) : deviation,
        num_kl_nan ? double(NAN) : kl_max};
}

// `gradient` is that of the block's first token, or null.
Sums block_sums(
    const GrpoTokens& tokens, int64_t start, int64_t n, const GrpoOptions& options, float* gradient) {
    Block block;
    load_block(tokens, start, n, block);
    switch (options.kl) {
        case 1: kl_terms(block, 1); break;
        case 2: kl_terms(block, 2); break;
        case 3: kl_terms(block, 3); break;
        default: kl_terms(block, 0);
    }
    policy_terms(block, options);
    if (gradient) std::memcpy(gradient, block.slopes, static_cast<size_t>(n) * sizeof(float));
    return sums_of(block, options);
}

// What block_sums makes of one token: the derivative of the loss by its log-prob.
float slope_of(const GrpoTokens& tokens, int64_t i, const GrpoOptions& options) {
    const float weight = tokens.weights[i] > 0.0 ? static_cast<float>(tokens.weights[i]) : 0.0f;
    if (!tokens.mask[i] || !(weight > 0.0f)) return 0.0f;
    const float ratio = exponential_of(tokens.logprobs[i] - tokens.old[i]).exp;
    const float difference = tokens.ref ? tokens.logprobs[i] - tokens.ref[i] : 0.0f;
    const float advantage = tokens.advantages[i * tokens.advantages_column];
    return weight * (clip_term(ratio, advantage, options).slope + options.beta * kl_term(difference, options.kl).slope);
}

double larger(double a, double b) { return a != a ? a : (b > a || b != b ? b : a); }  // NaN stays

int64_t num_blocks(int64_t num_tokens) { return (num_tokens + BLOCK - 1) / BLOCK; }

void add_up(const Sums* parts, int64_t num_parts, double* sums) {
    Sums whole = {};
    for (int64_t i = 0; i < num_parts; i++) {
        whole.loss += parts[i].loss;
        whole.kl += parts[i].kl;
        whole.low += parts[i].low;
        whole.high += parts[i].high;
        whole.bound += parts[i].bound;
        whole.ratio_deviation = larger(whole.ratio_deviation, parts[i].ratio_deviation);
        whole.kl_max = larger(whole.kl_max, parts[i].kl_max);
    }
    std::memcpy(sums, &whole, sizeof(whole));
}

}  // namespace

extern "C" {

// `gradient` [b, T] is contiguous and may be null; `sums` has NUM_SUMS numbers; `parts` is room for them once a block.
void grpoforge_grpo_loss(
    const GrpoTokens* tokens, const GrpoOptions* options, double* sums, double* parts, float* gradient,
    int32_t num_threads) {
    const int64_t num_tokens = tokens->num_rows * tokens->num_columns, count = num_blocks(num_tokens);
    Sums* const of_blocks = reinterpret_cast<Sums*>(parts);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t i = 0; i < count; i++) {
        const int64_t start = i * BLOCK, n = num_tokens - start < BLOCK ? num_tokens - start : BLOCK;
        of_blocks[i] = block_sums(*tokens, start, n, *options, gradient ? gradient + start : nullptr);
    }
    add_up(of_blocks, count, sums);
}

// `tokens` is one row of N tokens whose logprobs and `stats` (maximum, total, weighted, chosen; [N] each) this writes.
// The gradient of a row follows its statistics at once, while it is in a cache. `out` may be null or `logits`.
void grpoforge_grpo_loss_from_logits(
    const char* logits, int64_t row_bytes, int64_t num_tokens, const int64_t* ids, const float* inv_temperature,
    int64_t format, float softcap, float scale, const GrpoTokens* tokens, const GrpoOptions* options, float* logprobs,
    float* stats, double* sums, double* parts, char* out, int64_t out_row_bytes, int32_t num_threads) {
    const int64_t num_rows = tokens->num_columns;
    float *const maximum = stats, *const total = stats + num_rows, *const weighted = stats + 2 * num_rows,
          *const chosen = stats + 3 * num_rows;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
    for (int64_t row = 0; row < num_rows; row++) {
        const char* const from = logits + row * row_bytes;
        float entropy, logsumexp;
        grpoforge_row_stats(
            from, row_bytes, 1, num_tokens, ids + row, 0, inv_temperature + row, tokens->mask + row, format, softcap,
            scale, maximum + row, total + row, weighted + row, chosen + row, 1);
        grpoforge_finish(
            maximum + row, total + row, weighted + row, chosen + row, inv_temperature + row, 1, logprobs + row,
            &entropy, &logsumexp);
        if (!out) continue;
        const float slope = slope_of(*tokens, row, *options), zero = 0.0f;
        grpoforge_row_gradient(
            from, row_bytes, 1, num_tokens, ids + row, 0, inv_temperature + row, tokens->mask + row, format, softcap,
            scale, maximum + row, total + row, weighted + row, &slope, &zero, &zero, out + row * out_row_bytes,
            out_row_bytes, 1);
    }
    grpoforge_grpo_loss(tokens, options, sums, parts, nullptr, num_threads);
}

}  // extern "C"
