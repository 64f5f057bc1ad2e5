// Sweeps of linear_logprobs over the vocabulary for bfloat16 with float32 logits, on processors that multiply bfloat16
// (tiles.h): statistics of rows, and gradients that make the logits again or, for a frozen head, are had along the way
// (linear_expectation.h). The equations are in ../linear_logprobs.py.
//
// Logits are made transposed, a strip of up to 256 tokens by all rows at a time: rows of the weight are packed by a copy,
// all arithmetic has as many rows as lanes and adds nothing across them, and what one step leaves in L2 the next one reads.
// A block of packed hidden states stays in L1 while a strip passes by. Every number is summed in one order for any number
// of threads.
#include "tiles.h"

#ifdef HAS_PRODUCT
#include <sys/mman.h>

#define REGISTER_BYTES 64
namespace simd {
#include "floats.h"
}  // namespace simd
#endif

extern "C" {

struct GrpoforgeLinear {
    const uint16_t *hidden, *weight;
    const float* bias;  // may be null
    const int64_t* ids;
    const float* inv_temperature;
    int64_t hidden_row, weight_row, num_rows, hidden_size, vocab_size, chunk_bytes;  // strides in elements
    float scale;
    int32_t kind, num_threads;
};

}  // extern "C"

#ifdef HAS_PRODUCT

namespace {

using grpoforge::coefficients_of, grpoforge::Gradient, grpoforge::LN2, grpoforge::LOG2E, grpoforge::Aligned;

constexpr int64_t GROUP = 16 * BLOCK;   // tokens whose sums stay in float32, a multiple of every strip
constexpr int64_t MOST_TILES = 16;      // of a line of a second factor, which stay in L1 while the first passes by
constexpr int64_t MOST_COLUMNS = 256;   // of the weight that a thread packs for the hidden states' gradient
constexpr int64_t STRIP_SIZE = 1 << 17; // scores of a strip, which stay in L2 with its packed weight

int64_t rounded_up(int64_t n, int64_t to) { return tiles_of(n, to) * to; }

INLINE Floats load(const float* x) { return simd::read<Floats>(x); }
INLINE void store(Floats x, float* y) { std::memcpy(y, &x, sizeof x); }

struct Sweep : GrpoforgeLinear {
    int64_t rows, across, deep;  // num_rows in whole blocks; tiles along them; tiles along the hidden size
    int64_t strip = GROUP / 2;   // tokens whose scores are made at a time
    bool is_frozen;              // hidden states' gradients grow in the forward, whose groups are the same for all threads
    int64_t panel;               // tokens by which they grow at a time: strips for all threads
    int64_t width;               // columns of these gradients that a thread makes at a time

    explicit Sweep(const GrpoforgeLinear& given, bool is_frozen = false)
        : GrpoforgeLinear(given), rows(rounded_up(num_rows, BLOCK)), across(rows / DEPTH), deep(tiles_of(hidden_size, DEPTH)),
          is_frozen(is_frozen), panel(is_frozen ? GROUP : GROUP * tiles_of(num_threads, 2)),
          width(smaller(rounded_up(tiles_of(hidden_size, 2 * num_threads), BLOCK), MOST_COLUMNS)) {
        const auto is_large = [&] {
            return strip * rows > STRIP_SIZE || strip * hidden_size > 2 * STRIP_SIZE || strip * num_threads > panel;
        };
        while (strip > BLOCK && (is_large() || room_bytes() > chunk_bytes)) strip /= 2;
    }

    // Of a strip of scores: 16 floats more than there are rows, so that the strip's lines are in different sets of L1.
    int64_t stride() const { return rows + LANES; }
    int64_t strip_size(int64_t token) const { return smaller(vocab_size - token, strip); }
    int64_t num_groups() const { return tiles_of(vocab_size, GROUP); }
    // What a thread has room for: packed lines of a strip, scores, rounded slopes; the packed weight of its columns.
    int64_t lines_room() const { return strip / LANES * (deep > across ? deep : across) * TILE; }
    int64_t scores_room() const { return strip * stride(); }
    int64_t group_room() const { return GROUP * stride(); }
    int64_t weight_room() const { return width / LANES * (panel / DEPTH) * TILE; }
    int64_t slopes_room() const { return rows / LANES * (panel / DEPTH) * TILE; }
    // All that is held beside factors, results and what each row has.
    int64_t room_bytes() const {
        const int64_t scores = is_frozen ? 4 * group_room() : 6 * num_threads * scores_room();
        return num_threads * (2 * lines_room() + 2 * weight_room()) + scores + 2 * slopes_room()
            + num_groups() * 3 * rows * int64_t{sizeof(float)};
    }
    int64_t hidden_lines() const { return 2 * tiles_of(hidden_size, BLOCK); }
    Matrix tokens() const { return {weight, weight_row, 1, false}; }
    void block(
        const uint16_t* a, const uint16_t* b, int64_t next, int64_t num_tiles, float* sums, int64_t sums_row, bool add) const {
        (kind == AMX ? block_amx : block_avx512)(a, b, next, num_tiles, sums, sums_row, add);
    }

    // The scores of the strip of tokens from `token` on, [strip, stride()]; `lines` is room for its packed weight.
    void make_scores(int64_t token, const uint16_t* columns, uint16_t* lines, float* scores) const {
        for (int64_t at = 0; at < strip; at += LANES)
            pack_lines(tokens(), token + at, vocab_size, hidden_size, false, lines + at / LANES * deep * TILE);
        const int64_t line = deep * TILE, parts = tiles_of(deep, MOST_TILES), part = tiles_of(deep, parts);
        for (int64_t row = 0; row < rows; row += BLOCK)
            for (int64_t tile = 0; tile < deep; tile += part)
                for (int64_t at = 0; at < strip; at += BLOCK)
                    block(
                        lines + at / LANES * line + tile * TILE, columns + row / LANES * line + tile * TILE, line,
                        smaller(deep - tile, part), scores + at * stride() + row, stride(), tile > 0);
        if (!bias && scale == 1.0f) return;
        for (int64_t at = 0; at < strip_size(token); at++) {
            const float more = bias ? bias[token + at] : 0.0f;
            float* const line = scores + at * stride();
            for (int64_t row = 0; row < rows; row += LANES) store((load(line + row) + more) * scale, line + row);
        }
    }
};

// Of LANES rows: the highest of their scores and of `before`, and sums relative to it, `weighted` in units of log2.
struct Terms {
    Floats highest, total, weighted;
};

// `scores` are the first row's; `see` is told each token's place and its terms 2^((score - highest) unit).
template <typename See>
INLINE Terms terms_of(const float* scores, int64_t count, int64_t stride, Floats before, Floats unit, const See& see) {
    Terms terms = {before, simd::all(0.0f), simd::all(0.0f)};
    for (int64_t at = 0; at < count; at++) terms.highest = simd::larger_number(load(scores + at * stride), terms.highest);
#pragma GCC unroll 4
    for (int64_t at = 0; at < count; at++) {
        const Floats d = simd::at_least_underflow((load(scores + at * stride) - terms.highest) * unit);
        const Floats e = simd::exp2_of(d);
        see(at, e);
        terms.total += e;
        terms.weighted += e * d;
    }
    return terms;
}

// Of rows: the highest score, and sums relative to it, `weighted` in units of log2. All [rows].
struct Sums {
    float *highest, *total, *weighted;

    void clear(int64_t rows) const {
        for (int64_t row = 0; row < rows; row++) highest[row] = -FLT_MAX, total[row] = weighted[row] = 0.0f;
    }

    void add(const float* scores, int64_t count, int64_t stride, const float* k, int64_t row) const {
        const Floats unit = load(k + row), before = load(highest + row);
        const Terms terms = terms_of(scores + row, count, stride, before, unit, [](int64_t, Floats) {});
        const Floats shift = simd::at_least_underflow((before - terms.highest) * unit), by = simd::exp2_of(shift);
        const Floats old = load(total + row);
        store(terms.highest, highest + row);
        store(terms.total + by * old, total + row);
        store(terms.weighted + by * (load(weighted + row) + old * shift), weighted + row);
    }
};

// The sums of all groups, in their order: `parts` is [num_groups, 3, rows].
void merge(const Sweep& in, const float* parts, const float* k, int64_t row, float* maximum, float* sum, float* weighted) {
    float highest = -FLT_MAX;
    for (int64_t group = 0; group < in.num_groups(); group++) {
        const float one = parts[group * 3 * in.rows + row];
        highest = one > highest ? one : highest;
    }
    double whole = 0.0, products = 0.0;
    for (int64_t group = 0; group < in.num_groups(); group++) {
        const float* const part = parts + group * 3 * in.rows + row;
        const double shift = std::fmax((static_cast<double>(part[0]) - highest) * k[row], -1e4), by = std::exp2(shift);
        whole += by * part[in.rows];
        products += by * (part[2 * in.rows] + part[in.rows] * shift);
    }
    maximum[row] = highest;
    sum[row] = static_cast<float>(whole);
    weighted[row] = static_cast<float>(products * LN2);
}

// What the gradients of rows by their scores are made of, and where they go. All of rows are [rows].
struct Slopes {
    const float *maximum, *k, *a, *c, *spike, *least;

    INLINE_MEMBER Floats of(Floats score, int64_t row) const {
        const Floats d = simd::at_least((score - load(maximum + row)) * load(k + row), load(least + row));
        const Floats none = simd::all(0.0f), a_here = load(a + row), c_here = load(c + row);
        // A row without a gradient has none even where its scores are not numbers.
        const simd::Ints is_alive = (a_here != none) | (c_here != none) | (load(spike + row) != none);
        return is_alive ? simd::exp2_of(d) * (a_here + c_here * d) : none;
    }
};

struct Gradients {
    float* hidden;  // [num_rows, hidden_size]; each may be null
    uint16_t* weight;  // [vocab_size, hidden_size]
    float* bias;
};

// Slopes by rows with a depth of the tokens of a panel, packed.
struct Panel {
    int64_t start, num_tiles;
    uint16_t* slopes;

    // `count` tiles from `first` on of LANES rows, which are lines of `from` beginning with `line`.
    void pack(const Matrix& from, int64_t line, int64_t row, int64_t first, int64_t count) const {
        for (int64_t tile = 0; tile < count; tile++)
            pack_tile(
                from, line, tile * DEPTH, LANES, DEPTH, false, slopes + (row / LANES * num_tiles + first + tile) * TILE);
    }
};

// The gradient by the scores of a strip, rounded, [strip, stride()]: zeros behind the last token.
void write_slopes(
    const Sweep& in, const Slopes& slopes, int64_t token, const float* scores, uint16_t* narrow, float* bias_gradient) {
    const int64_t count = in.strip_size(token), stride = in.stride();
    for (int64_t at = 0; at < count; at++) {
        Floats sum = simd::all(0.0f);
        for (int64_t row = 0; row < in.rows; row += LANES) {
            const Floats slope = slopes.of(load(scores + at * stride + row), row);
            const Halves halves = rounded(slope);
            std::memcpy(narrow + at * stride + row, &halves, sizeof halves);
            sum += slope;
        }
        if (!bias_gradient) continue;
        float whole = 0.0f;
        for (int64_t lane = 0; lane < LANES; lane++) whole += sum[lane];
        bias_gradient[token + at] = whole;
    }
    std::memset(narrow + count * stride, 0, static_cast<size_t>((in.strip - count) * stride) * sizeof *narrow);
    for (int64_t row = 0; row < in.num_rows; row++) {
        const int64_t at = in.ids[row] - token, lane = row % LANES;
        if (at < 0 || at >= count) continue;
        const Floats slope = slopes.of(load(scores + at * stride + row - lane), row - lane) + slopes.spike[row];
        narrow[at * stride + row] = rounded(slope)[lane];
        if (bias_gradient) bias_gradient[token + at] += slopes.spike[row];
    }
}

// Lets the system map memory that is written next in one go, not page by page; it may refuse.
void ask_for(void* data, int64_t bytes) {
    constexpr int POPULATE_WRITE = 23;
    const uintptr_t page = 4096, from = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t to = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, POPULATE_WRITE);
}

// The strip's rows of the weight's gradient; `factor` is packed hidden states with a depth of rows.
void write_weight_gradient(
    const Sweep& in, const uint16_t* narrow, const uint16_t* factor, int64_t token, uint16_t* lines, uint16_t* out) {
    alignas(64) float sums[BLOCK * BLOCK];
    const int64_t line = in.across * TILE;
    const Matrix slopes = {narrow, in.stride(), 1, false};
    for (int64_t at = 0; at < in.strip; at += LANES) pack_lines(slopes, at, in.strip, in.rows, false, lines + at / LANES * line);
    const Result result = {out, in.hidden_size, false, false};
    ask_for(out + token * in.hidden_size, in.strip_size(token) * in.hidden_size * int64_t{sizeof *out});
    for (int64_t column = 0; column < in.hidden_size; column += BLOCK)
        for (int64_t at = 0; at < in.strip_size(token); at += BLOCK) {
            in.block(lines + at / LANES * line, factor + column / LANES * line, line, in.across, sums, BLOCK, false);
            write(
                sums, result, token + at, column, smaller(in.strip_size(token) - at, BLOCK),
                smaller(in.hidden_size - column, BLOCK));
        }
}

void pack_strip(const Sweep& in, const uint16_t* narrow, int64_t token, const Panel& panel) {
    const Matrix slopes = {narrow, 1, in.stride(), false};
    const int64_t first = (token - panel.start) / DEPTH, count = tiles_of(in.strip_size(token), DEPTH);
    for (int64_t row = 0; row < in.rows; row += LANES) panel.pack(slopes, row, row, first, count);
}

// Adds the panel's part of columns of the hidden states' gradient, which is in blocks of 32 x 32 here, those of one column
// after each other; `lines` is room for the panel's weight of those columns, packed by who needs it.
void add_hidden_gradient(const Sweep& in, const Panel& panel, int64_t from, int64_t to, uint16_t* lines, float* blocks) {
    const int64_t line = panel.num_tiles * TILE;
    const Matrix weight = {in.weight + panel.start * in.weight_row, 1, in.weight_row, false};
    for (int64_t tile = 0; tile < panel.num_tiles; tile++)
        for (int64_t column = from; column < to; column += LANES)
            pack_tile(
                weight, column, tile * DEPTH, in.hidden_size - column, in.vocab_size - panel.start - tile * DEPTH, true,
                lines + (column - from) / LANES * line + tile * TILE);
    for (int64_t column = from; column < to; column += BLOCK)
        for (int64_t at = 0; at < panel.num_tiles; at += MOST_TILES)
            for (int64_t row = 0; row < in.rows; row += BLOCK)
                in.block(
                    panel.slopes + row / LANES * line + at * TILE, lines + (column - from) / LANES * line + at * TILE, line,
                    smaller(panel.num_tiles - at, MOST_TILES), blocks + column * in.rows + row * BLOCK, BLOCK, true);
}

void write_hidden_gradient(const Sweep& in, const float* blocks, int64_t column, float* out) {
    const Result result = {out, in.hidden_size, true, false};
    for (int64_t row = 0; row < in.num_rows; row += BLOCK)
        write(
            blocks + column * in.rows + row * BLOCK, result, row, column, smaller(in.num_rows - row, BLOCK),
            smaller(in.hidden_size - column, BLOCK));
}

// Hidden states as a second factor: by rows with a depth of the hidden size, and by the hidden size with a depth of rows.
struct Factors {
    Aligned<uint16_t> columns, across;
    const Sweep& in;
    explicit Factors(const Sweep& in, bool has_across)
        : columns(in.rows / LANES * in.deep * TILE), across(has_across ? in.hidden_lines() * in.across * TILE : 0), in(in) {}

    void pack_columns(int64_t line) const {
        const Matrix hidden = {in.hidden, in.hidden_row, 1, false};
        pack_lines(hidden, line * LANES, in.num_rows, in.hidden_size, true, columns + line * in.deep * TILE);
    }
    void pack_across(int64_t line) const {
        const Matrix hidden = {in.hidden, 1, in.hidden_row, false};
        pack_lines(hidden, line * LANES, in.hidden_size, in.num_rows, true, across + line * in.across * TILE);
    }
};

void forward(const Sweep& in, const float* k, float* parts, float* chosen) {
    const Factors factors(in, false);
    const TileShapes shapes;
#pragma omp parallel num_threads(in.num_threads) if (in.num_threads > 1)
    {
        const Aligned<uint16_t> lines(in.lines_room());
        const Aligned<float> scores(in.scores_room());
#pragma omp for schedule(dynamic)
        for (int64_t line = 0; line < in.rows / LANES; line++) factors.pack_columns(line);
        if (in.kind == AMX) __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < in.vocab_size; group += GROUP) {
            float* const part = parts + group / GROUP * 3 * in.rows;
            const Sums sums = {part, part + in.rows, part + 2 * in.rows};
            sums.clear(in.rows);
            for (int64_t token = group; token < smaller(group + GROUP, in.vocab_size); token += in.strip) {
                const int64_t count = in.strip_size(token);
                in.make_scores(token, factors.columns, lines, scores);
                for (int64_t row = 0; row < in.rows; row += LANES) sums.add(scores, count, in.stride(), k, row);
                for (int64_t row = 0; row < in.num_rows; row++) {
                    const int64_t at = in.ids[row] - token;
                    if (at >= 0 && at < count) chosen[row] = scores[at * in.stride() + row];
                }
            }
        }
        if (in.kind == AMX) __asm__ volatile("tilerelease" ::);
    }
}

#include "linear_expectation.h"

void backward(const Sweep& in, const Slopes& slopes, const Gradients& into) {
    const Factors factors(in, into.weight);
    const TileShapes shapes;
    const int64_t columns = into.hidden ? in.hidden_lines() * LANES : 0;
    const Aligned<uint16_t> panel_slopes(into.hidden ? in.slopes_room() : 0);
    const Aligned<float> blocks(in.rows * columns);
#pragma omp parallel num_threads(in.num_threads) if (in.num_threads > 1)
    {
        const Aligned<uint16_t> lines(in.lines_room()), narrow(in.scores_room());
        const Aligned<uint16_t> weight(into.hidden ? in.weight_room() : 0);
        const Aligned<float> scores(in.scores_room());
#pragma omp for schedule(dynamic)
        for (int64_t line = 0; line < in.rows / LANES; line++) factors.pack_columns(line);
#pragma omp for schedule(dynamic)
        for (int64_t line = 0; line < (into.weight ? in.hidden_lines() : 0); line++) factors.pack_across(line);
#pragma omp for schedule(static)
        for (int64_t column = 0; column < columns; column += BLOCK)
            std::memset(blocks + column * in.rows, 0, in.rows * BLOCK * sizeof(float));
        if (in.kind == AMX) __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
        for (int64_t start = 0; start < in.vocab_size; start += in.panel) {
            const int64_t stop = smaller(start + in.panel, in.vocab_size);
            const Panel panel = {start, tiles_of(stop - start, DEPTH), panel_slopes};
#pragma omp for schedule(dynamic)
            for (int64_t token = start; token < stop; token += in.strip) {
                in.make_scores(token, factors.columns, lines, scores);
                write_slopes(in, slopes, token, scores, narrow, into.bias);
                if (into.weight) write_weight_gradient(in, narrow, factors.across, token, lines, into.weight);
                if (into.hidden) pack_strip(in, narrow, token, panel);
            }
            if (!into.hidden) continue;
#pragma omp for schedule(static)
            for (int64_t column = 0; column < columns; column += in.width)
                add_hidden_gradient(in, panel, column, smaller(column + in.width, columns), weight, blocks);
        }
        if (in.kind == AMX) __asm__ volatile("tilerelease" ::);
#pragma omp for schedule(static)
        for (int64_t column = 0; column < columns; column += BLOCK) write_hidden_gradient(in, blocks, column, into.hidden);
    }
}

}  // namespace

#pragma GCC pop_options
#endif

extern "C" {

// What the two below hold beside 12 bytes for each hidden state, results and numbers of rows: at most chunk_bytes, if they
// can do with so little.
int64_t grpoforge_linear_room(const GrpoforgeLinear* linear, int32_t is_frozen) {
#ifdef HAS_PRODUCT
    return Sweep(*linear, is_frozen).room_bytes();
#else
    return 0;
#endif
}

// Statistics of rows, as grpoforge_row_stats makes them of all logits; and, unless `expectation` is null, which is contiguous,
// the sums over all tokens but the chosen one of e^((score - maximum) / temperature) by the token's row of the weight.
void grpoforge_linear_forward(
    const GrpoforgeLinear* linear, float* maximum, float* total, float* weighted, float* chosen, float* expectation) {
#ifdef HAS_PRODUCT
    const Sweep in(*linear, expectation);
    const Aligned<float> k(in.rows), parts(in.num_groups() * 3 * in.rows);
    for (int64_t row = 0; row < in.rows; row++) k[row] = row < in.num_rows ? in.inv_temperature[row] * LOG2E : 1.0f;
    expectation ? expect(in, k, parts, chosen, expectation) : forward(in, k, parts, chosen);
    for (int64_t row = 0; row < in.num_rows; row++) merge(in, parts, k, row, maximum, total, weighted);
#endif
}

// Writes the gradients by hidden states (float32), weight (bfloat16) and bias (float32); each may be null, and is
// contiguous.
void grpoforge_linear_backward(
    const GrpoforgeLinear* linear, const float* maximum, const float* total, const float* weighted, const float* g,
    const float* h, const float* l, float* hidden, uint16_t* weight, float* bias) {
#ifdef HAS_PRODUCT
    const Sweep in(*linear);
    const Aligned<float> rows(6 * in.rows);
    for (int64_t row = 0; row < in.rows; row++) {
        Gradient one = {0.0f, 1.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        if (row < in.num_rows)
            one = coefficients_of(
                {maximum[row], total[row], weighted[row], 0.0f}, in.inv_temperature[row], in.scale, g[row], h[row], l[row]);
        const float values[] = {one.maximum, one.k, one.a, one.c, one.spike, one.least};
        for (int64_t at = 0; at < 6; at++) rows[at * in.rows + row] = values[at];
    }
    const auto of = [&](int64_t at) { return rows + at * in.rows; };
    const Slopes slopes = {of(0), of(1), of(2), of(3), of(4), of(5)};
    backward(in, slopes, {hidden, weight, bias});
#endif
}

}  // extern "C"
