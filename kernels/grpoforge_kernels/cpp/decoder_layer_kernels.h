// The arithmetic of a decoder layer between its products, on some of its rows, for the target that this file is included
// for (targets.h). Every number of a row depends on the row alone; what is summed over rows (gradients of norms and biases)
// is added to, row by row.

using grpoforge::Gate;
using grpoforge::Norm;
using grpoforge::Rotation;

#include "layer_rows.h"

INLINE Floats load_left(const float* x, int64_t left) {
    return left >= LANES ? load_at(x) : load_some(reinterpret_cast<const float32*>(x), left);
}
INLINE void store_left(Floats value, float* y, int64_t left) {
    left >= LANES ? store_at(value, y) : store_some(value, reinterpret_cast<float32*>(y), left);
}
INLINE void add_left(Floats value, float* y, int64_t left) { store_left(load_left(y, left) + value, y, left); }

// 1 / sqrt(mean(x^2) + eps)
INLINE float inverse_rms(const float* x, int64_t n, float eps) {
    Floats squares = all(0.0f), others = squares;
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        const Floats one = load_at(x + i), other = load_at(x + i + LANES);
        squares += one * one;
        others += other * other;
    }
    for (; i < n; i += LANES) {
        const Floats value = load_left(x + i, n - i);
        squares += value * value;
    }
    return 1.0f / std::sqrt(sum_of(squares + others) / static_cast<float>(n) + eps);
}

INLINE void norm_row(const float* x, const float* weight, int64_t n, float by, float* y) {
    for (int64_t i = 0; i < n; i += LANES)
        store_left(load_left(x + i, n - i) * by * load_left(weight + i, n - i), y + i, n - i);
}

// From the gradient g of y = w x r with r = inverse_rms(x): r (g w - x r mean(g w x r)), to which `add` is added (if given);
// the gradient of w is added to `d_weight`, and y is written again (if wanted).
INLINE void norm_row_back(
    const float* x, const float* weight, int64_t n, float by, const float* add, float* grad, float* d_weight, float* y) {
    Floats products = all(0.0f);
    for (int64_t i = 0; i < n; i += LANES)
        products += load_left(grad + i, n - i) * load_left(weight + i, n - i) * load_left(x + i, n - i);
    const float mean = sum_of(products) * by * by / static_cast<float>(n);
    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t left = n - i;
        const Floats g = load_left(grad + i, left), w = load_left(weight + i, left), z = load_left(x + i, left);
        Floats d = (g * w - z * mean) * by;
        if (add) d += load_left(add + i, left);
        store_left(d, grad + i, left);
        add_left(g * z * by, d_weight + i, left);
        if (y) store_left(z * by * w, y + i, left);
    }
}

static void norm_rows(const Norm& p, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const float* const x = p.x + row * p.n;
        const float by = inverse_rms(x, p.n, p.eps);
        if (p.inverse) p.inverse[row] = by;
        norm_row(x, p.weight, p.n, by, p.y + row * p.n);
    }
}

static void norm_rows_back(const Norm& p, int64_t first, int64_t last, float* d_weight) {
    for (int64_t row = first; row < last; row++) {
        const int64_t at = row * p.n;
        norm_row_back(
            p.x + at, p.weight, p.n, p.inverse[row], p.add ? p.add + at : nullptr, p.grad + at, d_weight,
            p.y ? p.y + at : nullptr);
    }
}

static void gate_rows(const Gate& p, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const float *gate = p.gate_up + row * 2 * p.n, *up = gate + p.n;
        float* const to = p.product + row * p.n;
        for (int64_t i = 0; i < p.n; i += LANES) {
            const Floats g = load_left(gate + i, p.n - i);
            store_left(g * sigmoid_of(g) * load_left(up + i, p.n - i), to + i, p.n - i);
        }
    }
}

// The gradient of the product in its place becomes the product.
static void gate_rows_back(const Gate& p, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const float *gate = p.gate_up + row * 2 * p.n, *up = gate + p.n;
        float *product = p.product + row * p.n, *d_gate = p.d_gate_up + row * 2 * p.n, *d_up = d_gate + p.n;
        for (int64_t i = 0; i < p.n; i += LANES) {
            const int64_t left = p.n - i;
            const Floats g = load_left(gate + i, left), u = load_left(up + i, left), d = load_left(product + i, left);
            const Floats s = sigmoid_of(g), silu = g * s;
            store_left(silu * u, product + i, left);
            store_left(d * silu, d_up + i, left);
            store_left(d * u * (s + silu * (1.0f - s)), d_gate + i, left);
        }
    }
}

// The transpose of `turn`, in place.
INLINE void turn_back(float* x, int64_t d, const float* cosine, const float* sine) {
    const int64_t half = d / 2;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const Floats a = load_at(x + i), b = load_at(x + i + half);
        store_at(a * load_at(cosine + i) + b * load_at(sine + i + half), x + i);
        store_at(b * load_at(cosine + i + half) - a * load_at(sine + i), x + i + half);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] + b * sine[i + half];
        x[i + half] = b * cosine[i + half] - a * sine[i];
    }
}

INLINE const float* norm_of(const Rotation& p, int64_t head) { return head < p.heads ? p.q_norm : p.k_norm; }

static void rotate_rows(const Rotation& p, int64_t first, int64_t last) {
    const int64_t d = p.head_size, turned = p.heads + p.kv_heads, width = (turned + p.kv_heads) * d;
    for (int64_t row = first; row < last; row++) {
        float* const x = p.qkv + row * width;
        float* const y = p.rotated + row * width;
        const float *cosine = p.cosine + p.positions[row] * d, *sine = p.sine + p.positions[row] * d;
        if (p.bias)
            for (int64_t i = 0; i < width; i += LANES) add_left(load_left(p.bias + i, width - i), x + i, width - i);
        for (int64_t head = 0; head < turned; head++) {
            const float* from = x + head * d;
            float* const to = y + head * d;
            if (const float* weight = norm_of(p, head)) {
                norm_row(from, weight, d, inverse_rms(from, d, p.eps), to);
                from = to;
            }
            turn(from, d, cosine, sine, to);
        }
        if (x != y) std::memcpy(y + turned * d, x + turned * d, static_cast<size_t>(p.kv_heads * d) * sizeof(float));
    }
}

// `rotated` holds the gradient, which becomes that of `qkv`; sums: of the biases [width], then of both norms [d] each.
static void rotate_rows_back(const Rotation& p, int64_t first, int64_t last, float* sums) {
    const int64_t d = p.head_size, turned = p.heads + p.kv_heads, width = (turned + p.kv_heads) * d;
    for (int64_t row = first; row < last; row++) {
        float* const grad = p.rotated + row * width;
        const float *cosine = p.cosine + p.positions[row] * d, *sine = p.sine + p.positions[row] * d;
        for (int64_t head = 0; head < turned; head++) {
            turn_back(grad + head * d, d, cosine, sine);
            if (const float* weight = norm_of(p, head)) {
                const float* const x = p.qkv + row * width + head * d;
                float* const d_weight = sums + width + (head < p.heads ? 0 : d);
                norm_row_back(x, weight, d, inverse_rms(x, d, p.eps), nullptr, grad + head * d, d_weight, nullptr);
            }
        }
        if (p.bias)
            for (int64_t i = 0; i < width; i += LANES) add_left(load_left(grad + i, width - i), sums + i, width - i);
    }
}

static const grpoforge::LayerRows rows = {norm_rows, norm_rows_back, gate_rows, gate_rows_back, rotate_rows, rotate_rows_back};
