// Statistics of rows of logits (one read) and their gradient (one read, one write). The equations are in
// ../rows.py and ../reference/selective_log_softmax.py.
#include "rows.h"

#define KERNEL "row_kernels.h"
#include "targets.h"

using namespace grpoforge;

static const auto row_stats = CHOSEN(row_stats);
static const auto row_gradient = CHOSEN(row_gradient);

extern "C" {

// Strides are in bytes; mask may be null. `empty` is what a masked row gives (rows.py says why).
void grpoforge_row_stats(
    const char* logits, int64_t row_bytes, int64_t num_rows, int64_t num_tokens, const int64_t* ids, int64_t first_id,
    const float* inv_temperature, const uint8_t* mask, int64_t format, float softcap, float scale, float* maximum,
    float* total, float* weighted, float* chosen, int32_t num_threads) {
    const Scores scores = {format, softcap, scale};
    const Stats masked = first_id == 0 ? Stats{0.0f, 1.0f, 0.0f, 0.0f} : Stats{-FLT_MAX, 0.0f, 0.0f, -INFINITY};
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
    for (int64_t row = 0; row < num_rows; row++) {
        const Stats stats = mask && !mask[row]
            ? masked
            : row_stats(logits + row * row_bytes, num_tokens, ids[row] - first_id, inv_temperature[row] * LOG2E, scores);
        maximum[row] = stats.maximum;
        total[row] = stats.total;
        weighted[row] = stats.weighted;
        chosen[row] = stats.chosen;
    }
}

void grpoforge_finish(
    const float* maximum, const float* total, const float* weighted, const float* chosen, const float* inv_temperature,
    int64_t num_rows, float* logprobs, float* entropy, float* logsumexp) {
    for (int64_t row = 0; row < num_rows; row++) {
        const double log_total = std::log(static_cast<double>(total[row])), s = inv_temperature[row];
        const double m = maximum[row];
        logprobs[row] = static_cast<float>(s * (chosen[row] - m) - log_total);
        entropy[row] = static_cast<float>(log_total - static_cast<double>(weighted[row]) / total[row]);
        logsumexp[row] = static_cast<float>(s * m + log_total);
    }
}

// `out` may be `logits`: a block is read before it is written, and no block is read twice.
void grpoforge_row_gradient(
    const char* logits, int64_t row_bytes, int64_t num_rows, int64_t num_tokens, const int64_t* ids, int64_t first_id,
    const float* inv_temperature, const uint8_t* mask, int64_t format, float softcap, float scale, const float* maximum,
    const float* total, const float* weighted, const float* g, const float* h, const float* l, char* out,
    int64_t out_row_bytes, int32_t num_threads) {
    const Scores scores = {format, softcap, scale};
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
    for (int64_t row = 0; row < num_rows; row++) {
        char* const to = out + row * out_row_bytes;
        if ((mask && !mask[row]) || (g[row] == 0.0f && h[row] == 0.0f && l[row] == 0.0f)) {
            std::memset(to, 0, static_cast<size_t>(num_tokens * size_of(format)));
            continue;
        }
        const Gradient gradient = coefficients_of(
            {maximum[row], total[row], weighted[row], 0.0f}, inv_temperature[row], scale, g[row], h[row], l[row]);
        row_gradient(logits + row * row_bytes, to, num_tokens, ids[row] - first_id, gradient, scores);
    }
}

}  // extern "C"
