// What a decoder layer of Llama's kind does between its products: RMSNorm, rotary positions, the gated activation, forward
// and backward. The equations are in ../reference/decoder_layer.py; the products are torch's.
#include "rows.h"

#include <algorithm>

namespace grpoforge {

// y = weight * x / rms(x), rows of n; backward: `grad` in place, `add` is added to it, `inverse` is 1 / rms.
struct Norm {
    const float *x, *weight, *add;
    float *y, *inverse, *grad;
    int64_t num_rows, n;
    float eps;
};

// product = silu(gate) * up; rows of gate_up are [gate, up].
struct Gate {
    const float* gate_up;
    float *product, *d_gate_up;
    int64_t num_rows, n;
};

// Rows of [queries, keys, values], heads of head_size: bias, norms of queries and keys, turned by position. `bias` and norms
// may be null; without norms `rotated` may be `qkv`. The bias is added to `qkv` in its place.
struct Rotation {
    float *qkv, *rotated;
    const float *bias, *q_norm, *k_norm, *cosine, *sine;
    const int64_t* positions;
    int64_t num_rows, heads, kv_heads, head_size;
    float eps;
};

struct LayerRows {
    void (*norm)(const Norm&, int64_t, int64_t);
    void (*norm_back)(const Norm&, int64_t, int64_t, float*);
    void (*gate)(const Gate&, int64_t, int64_t);
    void (*gate_back)(const Gate&, int64_t, int64_t);
    void (*rotate)(const Rotation&, int64_t, int64_t);
    void (*rotate_back)(const Rotation&, int64_t, int64_t, float*);
};

}  // namespace grpoforge

#define KERNEL "decoder_layer_kernels.h"
#include "targets.h"

using namespace grpoforge;

static const LayerRows& best = *CHOSEN(rows);

// Rows that one thread takes at a time, and whose sums are added first: results do not depend on the number of threads.
static constexpr int64_t CHUNK = 32;

template <typename Work>
static void by_chunks(int64_t num_rows, int32_t num_threads, const Work& work) {
    const int64_t num_chunks = (num_rows + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t chunk = 0; chunk < num_chunks; chunk++)
        work(chunk, chunk * CHUNK, std::min((chunk + 1) * CHUNK, num_rows));
}

// As `by_chunks`, with sums of `width` numbers for each chunk, added up in order. `parts` has room for all of them.
template <typename Work>
static void summed_by_chunks(
    int64_t num_rows, int64_t width, float* parts, float* sums, int32_t num_threads, const Work& work) {
    by_chunks(num_rows, num_threads, [&](int64_t chunk, int64_t first, int64_t last) {
        float* const part = parts + chunk * width;
        std::fill(part, part + width, 0.0f);
        work(first, last, part);
    });
    std::fill(sums, sums + width, 0.0f);
    for (int64_t chunk = 0; chunk * CHUNK < num_rows; chunk++)
        for (int64_t i = 0; i < width; i++) sums[i] += parts[chunk * width + i];
}

extern "C" {

int64_t grpoforge_layer_chunk() { return CHUNK; }

void grpoforge_norm(const Norm* p, int32_t num_threads) {
    by_chunks(p->num_rows, num_threads, [&](int64_t, int64_t first, int64_t last) { best.norm(*p, first, last); });
}

void grpoforge_norm_back(const Norm* p, float* parts, float* d_weight, int32_t num_threads) {
    summed_by_chunks(p->num_rows, p->n, parts, d_weight, num_threads, [&](int64_t first, int64_t last, float* part) {
        best.norm_back(*p, first, last, part);
    });
}

void grpoforge_gate(const Gate* p, int32_t num_threads) {
    by_chunks(p->num_rows, num_threads, [&](int64_t, int64_t first, int64_t last) { best.gate(*p, first, last); });
}

void grpoforge_gate_back(const Gate* p, int32_t num_threads) {
    by_chunks(p->num_rows, num_threads, [&](int64_t, int64_t first, int64_t last) { best.gate_back(*p, first, last); });
}

void grpoforge_rotate(const Rotation* p, int32_t num_threads) {
    by_chunks(p->num_rows, num_threads, [&](int64_t, int64_t first, int64_t last) { best.rotate(*p, first, last); });
}

// `sums`: of the biases, one for each column, then of the norms of queries and of keys, head_size each.
void grpoforge_rotate_back(const Rotation* p, float* parts, float* sums, int32_t num_threads) {
    const int64_t width = (p->heads + 2 * p->kv_heads + 2) * p->head_size;
    summed_by_chunks(p->num_rows, width, parts, sums, num_threads, [&](int64_t first, int64_t last, float* part) {
        best.rotate_back(*p, first, last, part);
    });
}

}  // extern "C"
