// The arithmetic of decoding, for the target that this file is included for (targets.h).
//
// Every number of a row is computed in an order that depends on the row alone: products are one chain of fused
// multiply-adds along k, sums go over fixed lanes. So results are bitwise the same for a row alone or in any batch, and
// for any number of threads.

using grpoforge::Draw;
using grpoforge::Product;
using grpoforge::Span;
using grpoforge::STRIP;
using grpoforge::KEYS;

#include "layer_rows.h"

constexpr int VECTORS = STRIP / LANES;  // registers of a strip
constexpr int ROWS = REGISTER_BYTES == 64 ? 12 : REGISTER_BYTES == 32 ? 3 : 1;
constexpr int64_t DEPTH = 1024;  // products are added to memory after so many steps: rounding, and room in L1
constexpr int64_t AHEAD = 2048;  // floats of weights that are asked for ahead

INLINE float highest_of(const Floats& x) {
    alignas(64) float values[LANES];
    std::memcpy(values, &x, sizeof x);
    float highest = values[0];
    for (float value : values) highest = value > highest ? value : highest;
    return highest;
}

INLINE Floats silu(Floats x) { return x * sigmoid_of(x); }

// What becomes of the sums of `rows` rows by one strip.
template <int rows>
INLINE void finish(const Product& p, const Floats (&sums)[rows][VECTORS], int64_t row, int64_t strip, bool is_first) {
    if (p.mode == grpoforge::GATED) {
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS / 2; v++) {
                Floats gate = sums[r][v], up = sums[r][v + VECTORS / 2];
                if (p.bias) {
                    gate += load_at(p.bias + strip * STRIP + v * LANES);
                    up += load_at(p.bias + strip * STRIP + STRIP / 2 + v * LANES);
                }
                store_at(silu(gate) * up, p.c + (row + r) * p.c_row + strip * (STRIP / 2) + v * LANES);
            }
        return;
    }
    const bool adds = p.mode == grpoforge::ADD || !is_first;
    const int64_t left = p.num_columns - strip * STRIP;
    for (int r = 0; r < rows; r++) {
        float* const to = p.c + (row + r) * p.c_row + strip * STRIP;
        for (int v = 0; v < VECTORS; v++) {
            Floats sum = sums[r][v];
            if (p.bias && is_first) sum += load_at(p.bias + strip * STRIP + v * LANES);
            if (left >= (v + 1) * LANES) {
                store_at(adds ? load_at(to + v * LANES) + sum : sum, to + v * LANES);
            } else {
                for (int64_t i = v * LANES; i < left; i++) to[i] = adds ? to[i] + sum[i - v * LANES] : sum[i - v * LANES];
            }
        }
    }
}

// `rows` rows by `strips` strips, steps [from, to) of k.
template <int rows, int strips>
static __attribute__((noinline)) void tile(const Product& p, int64_t row, int64_t strip, int64_t from, int64_t to) {
    Floats sums[strips][rows][VECTORS] = {};
    const float* a = p.a + row * p.a_row;
    const int64_t size = p.depth * STRIP;
    const float* b = p.packed + strip * size;
    for (int64_t k = from; k < to; k++) {
#pragma GCC unroll 4
        for (int s = 0; s < strips; s++) {
            const float* const at = b + s * size + k * STRIP;
            Floats column[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) column[v] = load_at(at + v * LANES);
            __builtin_prefetch(at + AHEAD);
            __builtin_prefetch(at + AHEAD + STRIP / 2);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) sums[s][r][v] += a[r * p.a_row + k] * column[v];
        }
    }
    for (int s = 0; s < strips; s++) finish<rows>(p, sums[s], row, strip + s, from == 0);
}

template <int rows, int strips>
INLINE void rows_by(const Product& p, int64_t& row, int64_t strip, int64_t from, int64_t to) {
    for (; row + rows <= p.num_rows; row += rows) tile<rows, strips>(p, row, strip, from, to);
}

template <int strips>
INLINE void strips_by(const Product& p, int64_t strip) {
    const int64_t depth = p.mode == grpoforge::GATED ? p.depth : DEPTH;
    for (int64_t from = 0; from < p.depth; from += depth) {
        const int64_t to = from + depth < p.depth ? from + depth : p.depth;
        int64_t row = 0;
        if constexpr (strips == 1) {
            if constexpr (ROWS >= 3) rows_by<ROWS, 1>(p, row, strip, from, to);
            if constexpr (ROWS >= 8) rows_by<8, 1>(p, row, strip, from, to);
            if constexpr (ROWS >= 4) rows_by<4, 1>(p, row, strip, from, to);
        }
        if constexpr (ROWS >= 2) rows_by<2, strips>(p, row, strip, from, to);
        rows_by<1, strips>(p, row, strip, from, to);
    }
}

// c = a b, c += a b or c = silu(a b_gate) (a b_up), in the columns of strips [first, last).
static void product(const Product& p, int64_t first, int64_t last) {
    int64_t strip = first;
    if (ROWS >= 8 && p.num_rows <= 3)
        for (; strip + 4 <= last; strip += 4) strips_by<4>(p, strip);  // few rows: more chains of sums at a time
    for (; strip < last; strip++) strips_by<1>(p, strip);
}

static void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
    Floats squares = all(0.0f);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Floats value = load_at(x + i);
        squares += value * value;
    }
    float sum = sum_of(squares);
    for (int64_t j = i; j < n; j++) sum += x[j] * x[j];
    const float by = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
    for (i = 0; i + LANES <= n; i += LANES) store_at(load_at(x + i) * by * load_at(weight + i), y + i);
    for (; i < n; i++) y[i] = x[i] * by * weight[i];
}

// The scores of `heads` queries with `chunks` chunks of KEYS keys.
template <int heads, int chunks>
INLINE void score(const float* q, int64_t d, const float* keys, float* scores, int64_t stride) {
    constexpr int PER = KEYS / LANES;
    Floats sums[heads][chunks * PER] = {};
    for (int64_t j = 0; j < d; j++) {
#pragma GCC unroll 8
        for (int c = 0; c < chunks * PER; c++) {
            const Floats key = load_at(keys + (c / PER * d + j) * KEYS + c % PER * LANES);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) sums[h][c] += q[h * d + j] * key;
        }
    }
    for (int h = 0; h < heads; h++)
        for (int c = 0; c < chunks * PER; c++) store_at(sums[h][c], scores + h * stride + c * LANES);
}

// out[heads][J registers] += the values of a span weighed by scores; even and odd places in sums of their own.
template <int heads, int J>
INLINE void weigh(const float* weights, int64_t stride, const Span& span, int64_t width, Floats (&sums)[2][heads][J], int64_t at) {
    int64_t place = 0;
    for (; place + 2 <= span.length; place += 2)
#pragma GCC unroll 2
        for (int side = 0; side < 2; side++)
#pragma GCC unroll 2
            for (int v = 0; v < J; v++) {
                const Floats value = load_at(span.values + (place + side) * width + at + v * LANES);
#pragma GCC unroll 4
                for (int h = 0; h < heads; h++) sums[side][h][v] += weights[h * stride + place + side] * value;
            }
    if (place < span.length)
        for (int v = 0; v < J; v++) {
            const Floats value = load_at(span.values + place * width + at + v * LANES);
            for (int h = 0; h < heads; h++) sums[0][h][v] += weights[h * stride + place] * value;
        }
}

INLINE int64_t rounded(int64_t length) { return (length + KEYS - 1) / KEYS * KEYS; }

template <int heads, int J>
INLINE void mix(const float* scores, int64_t stride, const Span* spans, int64_t d, int64_t width, const float* by, float* out, int64_t at) {
    Floats sums[2][heads][J] = {};
    weigh<heads, J>(scores, stride, spans[0], width, sums, at);
    weigh<heads, J>(scores + rounded(spans[0].length), stride, spans[1], width, sums, at);
    for (int h = 0; h < heads; h++)
        for (int v = 0; v < J; v++) {
            const Floats sum = (sums[0][h][v] + sums[1][h][v]) * by[h];
            const int64_t column = at + v * LANES;
            if (column + LANES <= d)
                store_at(sum, out + h * d + column);
            else
                for (int64_t i = column; i < d; i++) out[h * d + i] = sum[i - column];
        }
}

// Softmax of the scores over both spans, unscaled; 1 / the sum of each head in `by`.
static void soften(float* scores, int64_t stride, const Span* spans, int heads, float k, float* by) {
    const int64_t first = rounded(spans[0].length), total = first + rounded(spans[1].length);
    for (int h = 0; h < heads; h++) {
        float* const row = scores + h * stride;
        for (int64_t i = spans[0].length; i < first; i++) row[i] = -FLT_MAX;
        for (int64_t i = first + spans[1].length; i < total; i++) row[i] = -FLT_MAX;
        Floats highest = all(-FLT_MAX), sum = all(0.0f);
        for (int64_t i = 0; i < total; i += LANES) highest = larger(load_at(row + i), highest);
        const float maximum = highest_of(highest);
        for (int64_t i = 0; i < total; i += LANES) {
            const Floats e = exp2_of(at_least_underflow((load_at(row + i) - maximum) * k));
            store_at(e, row + i);
            sum += e;
        }
        by[h] = 1.0f / sum_of(sum);
    }
}

// The scores with all keys of a span. Several chunks at a time: one alone has too few sums to keep the multipliers busy.
template <int heads, int most>
INLINE float* score_span(const float* q, int64_t d, const Span& span, float* scores, int64_t stride) {
    const float* keys = span.keys;
    int64_t left = (span.length + KEYS - 1) / KEYS;
    const auto chunks = [&](auto some) {
        score<heads, some>(q, d, keys, scores, stride);
        left -= some, keys += some * d * KEYS, scores += some * KEYS;
    };
    while (left >= most) chunks(std::integral_constant<int, most>{});
    if constexpr (most > 2)
        if (left == 3) chunks(std::integral_constant<int, 3>{});
    if constexpr (most > 1)
        if (left == 2) chunks(std::integral_constant<int, 2>{});
    if (left == 1) chunks(std::integral_constant<int, 1>{});
    return scores;
}

template <int heads>
static __attribute__((noinline)) void attend_heads(
    const float* q, int64_t d, int64_t width, const Span* spans, float k, float* scores, int64_t stride, float* out) {
    constexpr int MOST = LANES != 16 ? 1 : heads == 2 ? 4 : 2;
    float* const own = score_span<heads, MOST>(q, d, spans[0], scores, stride);
    score_span<heads, MOST>(q, d, spans[1], own, stride);
    float by[heads];
    soften(scores, stride, spans, heads, k, by);
    int64_t at = 0;
    for (; at + 2 * LANES <= width; at += 2 * LANES) mix<heads, 2>(scores, stride, spans, d, width, by, out, at);
    for (; at < width; at += LANES) mix<heads, 1>(scores, stride, spans, d, width, by, out, at);
}

// Attention of the `heads` queries q [heads][d] that share a head of keys and values: out [heads][d].
static void attend(
    const float* q, int64_t heads, int64_t d, int64_t width, const Span* spans, float k, float* scores, int64_t stride,
    float* out) {
    int64_t h = 0;
    if constexpr (LANES == 16)
        for (; h + 4 <= heads; h += 4) attend_heads<4>(q + h * d, d, width, spans, k, scores, stride, out + h * d);
    for (; h + 2 <= heads; h += 2) attend_heads<2>(q + h * d, d, width, spans, k, scores, stride, out + h * d);
    for (; h < heads; h++) attend_heads<1>(q + h * d, d, width, spans, k, scores, stride, out + h * d);
}

constexpr int64_t PART = 512;  // weights that are added in float32, LANES ways; sums of parts are added in float64

// 2^((z - maximum) k) of n <= PART logits, and their sum.
static __attribute__((noinline)) double weights_of(const float* z, int64_t n, float maximum, float k, float* weights) {
    Floats sum = all(0.0f);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Floats e = exp2_of(at_least_underflow((load_at(z + i) - maximum) * k));
        store_at(e, weights + i);
        sum += e;
    }
    double total = sum_of(sum);
    if (i < n) {
        float rest[LANES];
        for (int64_t j = 0; j < LANES; j++) rest[j] = i + j < n ? z[i + j] : -INFINITY;
        store_at(exp2_of(at_least_underflow((load_at(rest) - maximum) * k)), rest);
        for (int64_t j = i; j < n; j++) total += weights[j] = rest[j - i];
    }
    return total;
}

static float highest_in(const float* z, int64_t n) {
    Floats highest = all(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) highest = larger_number(load_at(z + i), highest);
    float result = highest_of(highest);
    for (; i < n; i++) result = z[i] > result ? z[i] : result;
    return result;
}

// The weights of a row of logits, the sum of each part and of all.
static double weigh_row(const Draw& draw, const float* z, float maximum, float* weights, double* parts) {
    double total = 0.0;
    for (int64_t start = 0, part = 0; start < draw.vocabulary; start += PART, part++) {
        const int64_t n = draw.vocabulary - start < PART ? draw.vocabulary - start : PART;
        total += parts[part] = weights_of(z + start, n, maximum, draw.inv_temperature * grpoforge::LOG2E, weights + start);
    }
    return total;
}


static const grpoforge::Arithmetic arithmetic = {product, rms_norm, attend, turn, highest_in, weigh_row};
