// The clipped loss with a KL term: sums and gradient in one pass over the tokens, and straight from logits. The
// equations are in ../grpo_loss.py; how ties split the gradient is in ../reference/grpo_loss.py.
//
// Tokens are taken in blocks of BLOCK in row-major order, whatever their strides. Each block leaves its own sums in
// float64, which are added in order at the end: results are bitwise the same for any number of threads and any layout.
#include "rows.h"

namespace grpoforge {

struct GrpoOptions {
    float low, high, bound, beta;  // no bound is an infinite one
    int32_t kl;  // 0: none, 1: k1, 2: k2, 3: k3
};

// In the order of GrpoLoss.
struct GrpoSums {
    double loss, kl, low, high, bound, ratio_deviation, kl_max;
};

}  // namespace grpoforge

#define KERNEL "grpo_loss_kernels.h"
#include "targets.h"

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

// [b, T] each; strides in elements, those within a row 1 but for the advantages (0 or 1). ref may be null.
struct GrpoTokens {
    const float *logprobs, *old, *ref, *advantages;
    const uint8_t* mask;
    const double* weights;
    int64_t logprobs_row, old_row, ref_row, advantages_row, advantages_column, mask_row, weights_row;
    int64_t num_rows, num_columns;
    GrpoOptions options;
};

}  // extern "C"

namespace {

typedef target::Tokens Block;  // of BLOCK tokens or fewer

// Copies of a block whose tokens are in several rows, or fewer than BLOCK; masked behind the last.
struct Gathered {
    float logprobs[BLOCK], old[BLOCK], ref[BLOCK], advantages[BLOCK];
    uint8_t mask[BLOCK] = {};
    double weights[BLOCK];
};

Block at_token(const GrpoTokens& tokens, int64_t row, int64_t column) {
    return {
        tokens.logprobs + row * tokens.logprobs_row + column,
        tokens.old + row * tokens.old_row + column,
        tokens.ref ? tokens.ref + row * tokens.ref_row + column : nullptr,
        tokens.advantages + row * tokens.advantages_row + column * tokens.advantages_column,
        tokens.advantages_column,
        tokens.mask + row * tokens.mask_row + column,
        tokens.weights + row * tokens.weights_row + column,
    };
}

template <typename T>
void copy(const T* from, int64_t n, T* to) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}

Block gather(const GrpoTokens& tokens, int64_t start, int64_t n, Gathered& to) {
    int64_t row = start / tokens.num_columns, column = start % tokens.num_columns;
    for (int64_t at = 0; at < n; row++, column = 0) {
        const int64_t left = tokens.num_columns - column, part = left < n - at ? left : n - at;
        const Block from = at_token(tokens, row, column);
        copy(from.logprobs, part, to.logprobs + at);
        copy(from.old, part, to.old + at);
        if (from.ref) copy(from.ref, part, to.ref + at);
        for (int64_t i = 0; i < part; i++) to.advantages[at + i] = from.advantages[i * from.advantages_step];
        copy(from.mask, part, to.mask + at);
        copy(from.weights, part, to.weights + at);
        at += part;
    }
    return {to.logprobs, to.old, tokens.ref ? to.ref : nullptr, to.advantages, 1, to.mask, to.weights};
}

const auto grpo_sums = CHOSEN(grpo_sums);

// `gradient` is that of the block's first token, or null.
GrpoSums block_sums(const GrpoTokens& tokens, int64_t start, int64_t n, float* gradient) {
    const int64_t row = start / tokens.num_columns, column = start % tokens.num_columns;
    const bool is_whole = n == BLOCK && column + n <= tokens.num_columns;
    float slopes[BLOCK];
    if (is_whole) return grpo_sums(at_token(tokens, row, column), n, tokens.options, gradient ? gradient : slopes);
    Gathered gathered;
    const int64_t whole = (n + target::LANES - 1) / target::LANES * target::LANES;
    const GrpoSums sums = grpo_sums(gather(tokens, start, n, gathered), whole, tokens.options, slopes);
    if (gradient) copy(slopes, n, gradient);
    return sums;
}

double larger(double a, double b) { return a != a ? a : (b > a || b != b ? b : a); }  // NaN stays

int64_t num_blocks(int64_t num_tokens) { return (num_tokens + BLOCK - 1) / BLOCK; }

void add_up(const GrpoSums* parts, int64_t num_parts, double* sums) {
    GrpoSums whole = {};
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

// `gradient` [b, T] is contiguous and may be null; `sums` is a GrpoSums.
void grpoforge_grpo_loss(const GrpoTokens* tokens, double* sums, float* gradient, int32_t num_threads) {
    const int64_t num_tokens = tokens->num_rows * tokens->num_columns, count = num_blocks(num_tokens);
    const Aligned<GrpoSums> of_blocks(count);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t i = 0; i < count; i++) {
        const int64_t start = i * BLOCK, n = num_tokens - start < BLOCK ? num_tokens - start : BLOCK;
        of_blocks[i] = block_sums(*tokens, start, n, gradient ? gradient + start : nullptr);
    }
    add_up(of_blocks, count, sums);
}

// `tokens` is one row of N tokens whose logprobs and `stats` (maximum, total, weighted, chosen; [N] each) this writes.
// The gradient of a row follows its statistics at once, while it is in a cache. `out` may be null or `logits`.
void grpoforge_grpo_loss_from_logits(
    const char* logits, int64_t row_bytes, int64_t num_tokens, const int64_t* ids, const float* inv_temperature,
    int64_t format, float softcap, float scale, const GrpoTokens* tokens, float* logprobs, float* stats, double* sums,
    char* out, int64_t out_row_bytes, int32_t num_threads) {
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
        const float zero = 0.0f;
        float slope;
        block_sums(*tokens, row, 1, &slope);
        grpoforge_row_gradient(
            from, row_bytes, 1, num_tokens, ids + row, 0, inv_temperature + row, tokens->mask + row, format, softcap,
            scale, maximum + row, total + row, weighted + row, &slope, &zero, &zero, out + row * out_row_bytes,
            out_row_bytes, 1);
    }
    grpoforge_grpo_loss(tokens, sums, nullptr, num_threads);
}

}  // extern "C"
