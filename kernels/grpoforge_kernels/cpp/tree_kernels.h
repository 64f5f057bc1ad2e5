// Attention over a tree of tokens, for the target that this file is included for (targets.h).
//
// A lane of a register is one query: a token of the block and one of its heads. Scores are [place][lane], so maxima and
// sums need no step across lanes, and keys and values are read one number at a time, as they stand.
//
// What a query gets is summed over its places in their order, PART by PART from the root on, and what it may not see adds
// exactly 0: results depend neither on the queries beside it nor on threads.

using grpoforge::Attention;
using grpoforge::PART;
using grpoforge::Room;
using grpoforge::rounded;
using grpoforge::STEP;
using grpoforge::Task;
using grpoforge::Trees;

#include "exchange.h"

constexpr int ROWS = REGISTER_BYTES == 64 ? 8 : 4;  // STEP is a multiple
constexpr int64_t MULTIPLE = LANES > STEP ? LANES : STEP;

INLINE Ints lanes_from(int64_t first) {
    Ints lanes;
    for (int32_t lane = 0; lane < LANES; lane++) lanes[lane] = lane;
    return lanes + static_cast<int32_t>(first);
}

// 2^d for d <= 0, however low.
INLINE Floats weight_of(Floats d) { return exp2_of(at_least_underflow(d)); }

// ln x of a normal x: 2 artanh((m - 1) / (m + 1)) of the mantissa m in [sqrt(1/2), sqrt(2)), by its series.
INLINE Floats log_of(Floats x) {
    const Bits bits = bits_of(x) + (0x3f800000u - 0x3f3504f3u);
    const Floats exponent = __builtin_convertvector((Ints)(bits >> 23) - 127, Floats);
    const Floats m = floats_of((bits & 0x7fffffu) + 0x3f3504f3u), z = (m - 1.0f) / (m + 1.0f), square = z * z;
    Floats p = all(2.0f / 9.0f);
    p = p * square + 2.0f / 7.0f;
    p = p * square + 2.0f / 5.0f;
    p = p * square + 2.0f / 3.0f;
    return exponent * grpoforge::LN2 + (p * square * z + 2.0f * z);
}

// A product c = a b, or c += a b. a is [rows, depth], or [depth, rows] for a product by its transpose.
struct Product {
    const float* a;
    int64_t a_row;
    const float* b;
    int64_t b_row, depth;
    float* c;
    int64_t c_row;
    bool adds;
};

template <bool is_transposed, int vectors>
static __attribute__((noinline)) void tile(const Product& p, const float* a, const float* b, float* c) {
    Floats sums[ROWS][vectors] = {};
    const int64_t a_row = p.a_row, b_row = p.b_row, c_row = p.c_row;
    const bool adds = p.adds;
    for (int64_t k = p.depth; k > 0; k--) {
        Floats column[vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) column[v] = load_at(b + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const float factor = a[is_transposed ? r : r * a_row];
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sums[r][v] += factor * column[v];
        }
        a += is_transposed ? a_row : 1;
        b += b_row;
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            float* const at = c + r * c_row + v * LANES;
            store_at(adds ? load_at(at) + sums[r][v] : sums[r][v], at);
        }
}

// `rows` is rounded up to STEP, columns are whole registers.
template <bool is_transposed>
static void multiply(const Product& p, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rounded(rows, STEP); row += ROWS) {
        const float* const a = p.a + (is_transposed ? row : row * p.a_row);
        float* const c = p.c + row * p.c_row;
        int64_t column = 0;
        for (; column + 2 * LANES <= columns; column += 2 * LANES)
            tile<is_transposed, 2>(p, a, p.b + column, c + column);
        if (column < columns) tile<is_transposed, 1>(p, a, p.b + column, c + column);
    }
}

INLINE void transpose_registers(Floats* rows) {
    if constexpr (LANES == 16) exchange<8, Ints>(rows);
    if constexpr (LANES >= 8) exchange<4, Ints>(rows);
    exchange<2, Ints>(rows);
    exchange<1, Ints>(rows);
}

// to[j][i] = by from[i][j], for whole registers of rows and of columns.
static __attribute__((noinline)) void transpose(
    const float* from, int64_t from_row, int64_t rows, int64_t columns, float by, float* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t j = 0; j < columns; j += LANES) {
            Floats square[LANES];
#pragma GCC unroll 16
            for (int64_t k = 0; k < LANES; k++) square[k] = load_at(from + (i + k) * from_row + j) * by;
            transpose_registers(square);
#pragma GCC unroll 16
            for (int64_t k = 0; k < LANES; k++) store_at(square[k], to + (j + k) * to_row + i);
        }
}

static __attribute__((noinline)) void copy(const float* from, float* to, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store_at(load_at(from + i), to + i);
    for (; i + 4 <= n; i += 4) std::memcpy(to + i, from + i, 16);
    if (i < n) std::memcpy(to + i, from + i, static_cast<size_t>(n - i) * 4);
}

INLINE void clear(float* x, int64_t n) { std::memset(x, 0, static_cast<size_t>(n) * sizeof *x); }

// Some tokens in preorder that are computed together. They stand in the slots behind their first one's path, and each
// may see a part of the slots: [from, to) are the tokens that see one, and all see those below `shared`.
struct Block {
    int64_t first, count;   // tokens
    int64_t depth, length;  // slots of the path; and of the tokens too
    int64_t shared;
    int64_t queries, lanes;  // and rounded up to whole registers
};

// One task's tree, its heads, and where it computes.
struct Work {
    const Trees& trees;
    const Attention& attention;
    const Task& task;
    const Room& room;
    const int64_t d = attention.d, width = rounded(attention.d, MULTIPLE);

    int64_t head() const { return task.kv_head * trees.group + task.first_head; }
    float* queries_of(const grpoforge::Heads& x, int64_t token) const { return x.data + token * x.row + head() * d; }
    float* keys_of(const grpoforge::Heads& x, int64_t token) const { return x.data + token * x.row + task.kv_head * d; }
    float* logsumexp_of(int64_t token) const {
        return attention.logsumexp + token * attention.kv_heads * trees.group + head();
    }
};

static Block block_of(const Work& w, int64_t index) {
    const int64_t first = w.trees.blocks[index], count = w.trees.blocks[index + 1] - first;
    const int64_t depth = w.trees.positions[first], queries = count * w.task.num_heads;
    Block b = {first, count, depth, depth + count, depth, queries, rounded(queries, LANES)};
    for (int64_t t = 0; t < count; t++) {
        w.room.from[depth + t] = t;
        const int64_t end = w.trees.ends[first + t] - first;
        w.room.to[depth + t] = end < count ? end : count;
        for (const int64_t position = w.trees.positions[first + t]; b.shared > position;) {
            b.shared--;
            w.room.from[b.shared] = 0;
            w.room.to[b.shared] = t;
        }
    }
    return b;
}

static void put(const Work& w, int64_t token, int64_t slot) {
    if (w.room.held[slot] == token) return;
    w.room.held[slot] = token;
    copy(w.keys_of(w.attention.key, token), w.room.keys + slot * w.width, w.d);
    copy(w.keys_of(w.attention.value, token), w.room.values + slot * w.width, w.d);
}

// Puts keys and values of a block and of its path in their slots. Where a slot of the path holds its token already, those
// below it do.
static void enter(const Work& w, const Block& b) {
    int64_t token = w.trees.parents[b.first], slot = b.depth - 1;
    for (; slot >= 0 && w.room.held[slot] != token; token = w.trees.parents[token]) put(w, token, slot--);
    for (int64_t t = 0; t < b.count; t++) put(w, b.first + t, b.depth + t);
}

// The queries of a block (or what is like them) as rows of `width` numbers, zeros behind their d numbers and the last row.
static void read_rows(const Work& w, const Block& b, const grpoforge::Heads& from, float* rows) {
    for (int64_t t = 0; t < b.count; t++) {
        const float* const x = w.queries_of(from, b.first + t);
        for (int64_t h = 0; h < w.task.num_heads; h++, rows += w.width) {
            for (int64_t j = w.d / LANES * LANES; j < w.width; j += LANES) store_at(all(0.0f), rows + j);
            copy(x + h * w.d, rows, w.d);
        }
    }
    clear(rows, (b.lanes - b.queries) * w.width);
}

static void write_rows(const Work& w, const Block& b, const float* rows, const grpoforge::Heads& to) {
    for (int64_t t = 0; t < b.count; t++) {
        float* const x = w.queries_of(to, b.first + t);
        for (int64_t h = 0; h < w.task.num_heads; h++, rows += w.width) copy(rows, x + h * w.d, w.d);
    }
}

// Scores [places][lanes], in units of log2, with the places from `start` on: -FLT_MAX where a query may not look.
static void score(const Work& w, const Block& b, int64_t start, int64_t places) {
    float* const scores = w.room.scores;
    multiply<false>(
        {w.room.keys + start * w.width, w.width, w.room.query_columns, b.lanes, w.d, scores, b.lanes, false}, places,
        b.lanes);
    for (int64_t slot = b.shared > start ? b.shared : start; slot < start + places; slot++) {
        const int32_t from = static_cast<int32_t>(w.room.from[slot] * w.task.num_heads);
        const int32_t to = static_cast<int32_t>(w.room.to[slot] * w.task.num_heads);
        for (int64_t lane = 0; lane < b.lanes; lane += LANES) {
            float* const at = scores + (slot - start) * b.lanes + lane;
            const Ints lanes = lanes_from(lane);
            store_at(((lanes >= from) & (lanes < to)) ? load_at(at) : all(-FLT_MAX), at);
        }
    }
}

// The scores of a part become weights 2^(score - highest), and what was summed before is made relative to that.
static void weigh(const Work& w, const Block& b, int64_t places, bool is_first) {
    for (int64_t lane = 0; lane < b.lanes; lane += LANES) {
        float* const scores = w.room.scores + lane;
        Floats highest = is_first ? all(-FLT_MAX) : load_at(w.room.highest + lane), other = highest;
        const Floats before = highest;
        int64_t place = 0;
        for (; place + 2 <= places; place += 2) {
            highest = larger(load_at(scores + place * b.lanes), highest);
            other = larger(load_at(scores + (place + 1) * b.lanes), other);
        }
        if (place < places) highest = larger(load_at(scores + place * b.lanes), highest);
        highest = larger(other, highest);
        Floats even = all(0.0f), odd = all(0.0f);
        for (place = 0; place + 2 <= places; place += 2) {
            float* const at = scores + place * b.lanes;
            const Floats first = weight_of(load_at(at) - highest), second = weight_of(load_at(at + b.lanes) - highest);
            store_at(first, at);
            store_at(second, at + b.lanes);
            even += first;
            odd += second;
        }
        if (place < places) {
            const Floats last = weight_of(load_at(scores + place * b.lanes) - highest);
            store_at(last, scores + place * b.lanes);
            even += last;
        }
        Floats sum = even + odd;
        if (!is_first) {
            const Floats by = weight_of(before - highest);
            sum += load_at(w.room.sums + lane) * by;
            for (int64_t j = 0; j < w.d; j++) {
                float* const at = w.room.columns + j * b.lanes + lane;
                store_at(load_at(at) * by, at);
            }
        }
        store_at(highest, w.room.highest + lane);
        store_at(sum, w.room.sums + lane);
    }
}

static void finish(const Work& w, const Block& b) {
    for (int64_t lane = 0; lane < b.lanes; lane += LANES) {
        const Floats sum = load_at(w.room.sums + lane), by = 1.0f / sum;
        for (int64_t j = 0; j < w.d; j++) {
            float* const at = w.room.columns + j * b.lanes + lane;
            store_at(load_at(at) * by, at);
        }
        store_at(load_at(w.room.highest + lane) * grpoforge::LN2 + log_of(sum), w.room.highest + lane);
    }
    transpose(w.room.columns, b.lanes, w.width, b.lanes, 1.0f, w.room.rows, w.width);
    write_rows(w, b, w.room.rows, w.attention.out);
    const float* from = w.room.highest;
    for (int64_t t = 0; t < b.count; t++, from += w.task.num_heads)
        std::memcpy(w.logsumexp_of(b.first + t), from, static_cast<size_t>(w.task.num_heads) * 4);
}

static void attend(const Work& w, const Block& b) {
    const Room& room = w.room;
    read_rows(w, b, w.attention.query, room.queries);
    transpose(room.queries, w.width, b.lanes, w.width, w.attention.scale * grpoforge::LOG2E, room.query_columns, b.lanes);
    for (int64_t start = 0; start < b.length; start += PART) {
        const int64_t places = b.length - start < PART ? b.length - start : PART;
        score(w, b, start, places);
        weigh(w, b, places, start == 0);
        const float* const values = room.values + start * w.width;
        multiply<true>({values, w.width, room.scores, b.lanes, places, room.columns, b.lanes, start > 0}, w.d, b.lanes);
    }
    finish(w, b);
}

// Asks for what a block will read, while another one is computed. (GCC would leave out calls of a function with no effect.)
INLINE void ask_for(const Work& w, int64_t index, std::initializer_list<const grpoforge::Heads*> queries) {
    const int64_t first = w.trees.blocks[index], end = w.trees.blocks[index + 1], n = w.task.num_heads * w.d;
    for (const grpoforge::Heads* const one : queries)
        for (int64_t token = first; token < end; token++)
            for (int64_t j = 0; j < n; j += 16) __builtin_prefetch(w.queries_of(*one, token) + j);
}

static void forward(const Trees& trees, const Attention& attention, const Task& task, const Room& room) {
    const Work w = {trees, attention, task, room};
    for (int64_t slot = 0; slot < trees.slots; slot++) room.held[slot] = -1;
    for (int64_t index = task.first; index < task.last; index++) {
        const Block b = block_of(w, index);
        enter(w, b);
        if (index + 1 < task.last) ask_for(w, index + 1, {&attention.query});
        attend(w, b);
    }
}

// What a lane's scores are less, in units of log2, and the sum over a head of the gradient times the output.
static void read_statistics(const Work& w, const Block& b) {
    const Room& room = w.room;
    clear(room.lowest, b.lanes);
    float* to = room.lowest;
    for (int64_t t = 0; t < b.count; t++, to += w.task.num_heads)
        for (int64_t h = 0; h < w.task.num_heads; h++) to[h] = w.logsumexp_of(b.first + t)[h] * grpoforge::LOG2E;
    read_rows(w, b, w.attention.out, room.rows);
    for (int64_t first = 0; first < b.lanes; first += LANES) {
        Floats sums[LANES];
#pragma GCC unroll 16
        for (int64_t lane = 0; lane < LANES; lane++) {
            const int64_t row = (first + lane) * w.width;
            sums[lane] = all(0.0f);
            for (int64_t j = 0; j < w.d; j += LANES)
                sums[lane] += load_at(room.grads + row + j) * load_at(room.rows + row + j);
        }
        transpose_registers(sums);
        for (int64_t lane = 1; lane < LANES; lane++) sums[0] += sums[lane];
        store_at(sums[0], room.sums + first);
    }
}

// The scores of a part become weights, and `slopes` the derivative by scores / scale; 0 in the places up to a whole STEP.
static void differentiate(const Work& w, const Block& b, int64_t places) {
    for (int64_t place = 0; place < places; place++)
        for (int64_t lane = 0; lane < b.lanes; lane += LANES) {
            float *const score = w.room.scores + place * b.lanes + lane, *const slope = w.room.slopes + place * b.lanes + lane;
            const Floats weight = weight_of(load_at(score) - load_at(w.room.lowest + lane));
            store_at(weight, score);
            store_at(weight * (load_at(slope) - load_at(w.room.sums + lane)), slope);
        }
    const int64_t behind = rounded(places, STEP) - places;
    clear(w.room.scores + places * b.lanes, behind * b.lanes);
    clear(w.room.slopes + places * b.lanes, behind * b.lanes);
}

// The sums of those tokens of a block that are on the path of the next block leave the slots of their positions.
static void gather(const Work& w, const Block& b, int64_t next) {
    for (int64_t token = w.trees.parents[next]; token >= b.first; token = w.trees.parents[token]) {
        const int64_t from = w.trees.positions[token] * w.width, to = (b.depth + token - b.first) * w.width;
        if (from == to) continue;
        for (float* const sums : {w.room.d_keys, w.room.d_values}) {
            copy(sums + from, sums + to, w.width);
            clear(sums + from, w.width);
        }
    }
}

// Nothing is added to the sums of a block's tokens any more.
static void leave(const Work& w, const Block& b) {
    for (int64_t t = 0; t < b.count; t++) {
        float* const d_key = w.room.d_keys + (b.depth + t) * w.width;
        float* const d_value = w.room.d_values + (b.depth + t) * w.width;
        for (int64_t j = 0; j < w.width; j += LANES) store_at(load_at(d_key + j) * w.attention.scale, d_key + j);
        copy(d_key, w.keys_of(w.attention.d_key, b.first + t), w.d);
        copy(d_value, w.keys_of(w.attention.d_value, b.first + t), w.d);
        clear(d_key, w.width);
        clear(d_value, w.width);
    }
}

static void attend_backward(const Work& w, const Block& b) {
    const Room& room = w.room;
    read_rows(w, b, w.attention.query, room.queries);
    transpose(room.queries, w.width, b.lanes, w.width, w.attention.scale * grpoforge::LOG2E, room.query_columns, b.lanes);
    read_rows(w, b, w.attention.grad, room.grads);
    transpose(room.grads, w.width, b.lanes, w.width, 1.0f, room.grad_columns, b.lanes);
    read_statistics(w, b);
    for (int64_t start = 0; start < b.length; start += PART) {
        const int64_t places = b.length - start < PART ? b.length - start : PART, at = start * w.width;
        score(w, b, start, places);
        multiply<false>(
            {room.values + at, w.width, room.grad_columns, b.lanes, w.d, room.slopes, b.lanes, false}, places, b.lanes);
        differentiate(w, b, places);
        multiply<false>(
            {room.scores, b.lanes, room.grads, w.width, b.queries, room.d_values + at, w.width, true}, places, w.width);
        multiply<false>(
            {room.slopes, b.lanes, room.queries, w.width, b.queries, room.d_keys + at, w.width, true}, places, w.width);
        multiply<true>(
            {room.keys + at, w.width, room.slopes, b.lanes, places, room.columns, b.lanes, start > 0}, w.d, b.lanes);
    }
    transpose(room.columns, b.lanes, w.width, b.lanes, w.attention.scale, room.rows, w.width);
    write_rows(w, b, room.rows, w.attention.d_query);
}

static void backward(const Trees& trees, const Attention& attention, const Task& task, const Room& room) {
    const Work w = {trees, attention, task, room};
    for (int64_t slot = 0; slot < trees.slots; slot++) room.held[slot] = -1;
    clear(room.d_keys, trees.slots * w.width);
    clear(room.d_values, trees.slots * w.width);
    for (int64_t index = task.last - 1; index >= task.first; index--) {
        const Block b = block_of(w, index);
        enter(w, b);
        if (index + 1 < task.last) gather(w, b, b.first + b.count);
        if (index > task.first) ask_for(w, index - 1, {&attention.query, &attention.grad, &attention.out});
        attend_backward(w, b);
        leave(w, b);
    }
}

static const grpoforge::TreeArithmetic arithmetic = {LANES, forward, backward};
