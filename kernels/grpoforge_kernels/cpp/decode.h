// What the arithmetic of decoding (decode_kernels.h) and its schedule (decode.cpp) say to each other.
#pragma once

#include "rows.h"

namespace grpoforge {

constexpr int64_t STRIP = 32;  // columns of a matrix that are packed side by side
constexpr int64_t KEYS = 16;   // keys that are stored side by side: [chunk][d][KEYS]

enum Mode : int64_t { STORE = 0, ADD = 1, GATED = 2 };

// c [num_rows, num_columns] by a [num_rows, depth] and packed [strips][depth][STRIP]. GATED: half a strip are columns of
// the gate, the other half those of what it lets through, and c has half as many columns.
struct Product {
    const float* a;
    int64_t a_row;
    const float *packed, *bias;
    int64_t num_rows, depth, num_columns;
    float* c;
    int64_t c_row, mode;
};

// Keys [chunks][d][KEYS] and values [places][width] of one head, as far as a query may look.
struct Span {
    const float *keys, *values;
    int64_t length;
};

struct Draw {
    int64_t vocabulary;
    float inv_temperature;
};

struct Arithmetic {
    void (*product)(const Product&, int64_t first, int64_t last);
    void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* y);
    void (*attend)(
        const float* q, int64_t heads, int64_t d, int64_t width, const Span* spans, float k, float* scores, int64_t stride,
        float* out);
    void (*turn)(const float* x, int64_t d, const float* cosine, const float* sine, float* y);
    float (*highest_in)(const float* z, int64_t n);
    double (*weigh_row)(const Draw&, const float* z, float maximum, float* weights, double* parts);
};

// What this processor runs best.
const Arithmetic& decode_arithmetic();

}  // namespace grpoforge
