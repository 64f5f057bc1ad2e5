// Products of bfloat16 matrices, left in float32. torch has none on a CPU: its bfloat16 product rounds the result to
// bfloat16.
//
// A strip of COLUMNS columns of b is packed once (pairs of neighbors along k side by side, which `vdpbf16ps` multiplies
// and adds) and stays in L2, while ROWS rows of a at a time, in L1, pass over it. A strip is computed by one thread, in
// one order, so results do not depend on how many there are.
#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(GRPOFORGE_NO_CLONES)
#define HAS_PRODUCT 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")

namespace {

constexpr int64_t LANES = 16, COLUMNS = 2 * LANES, ROWS = 12, DEPTH = 1024;

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Pairs __attribute__((vector_size(64)));  // of bfloat16

struct Matrix {
    const uint16_t* data;
    int64_t row, column;  // strides in elements
};

INLINE uint32_t pair_at(const uint16_t* x) {
    uint32_t pair;
    std::memcpy(&pair, x, 4);
    return pair;
}

INLINE void multiply_add(Floats& sum, Pairs a, Pairs b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

// Exchanges the blocks of `size` lanes off the diagonal of each pair of registers; sizes 8, 4, 2, 1 transpose 16 x 16.
template <int size>
INLINE void exchange(Pairs* rows) {
    Pairs low, high;
    for (uint32_t lane = 0; lane < LANES; lane++) {
        low[lane] = lane & size ? LANES + lane - size : lane;
        high[lane] = lane & size ? LANES + lane : lane + size;
    }
#pragma GCC unroll 16
    for (int at = 0; at < LANES; at++) {
        if (at & size) continue;
        const Pairs a = rows[at], b = rows[at + size];
        rows[at] = __builtin_shuffle(a, b, low);
        rows[at + size] = __builtin_shuffle(a, b, high);
    }
}

// 16 columns of a matrix whose columns are contiguous, 32 elements of each.
INLINE void pack_square(const uint16_t* b, int64_t column, uint32_t* packed) {
    Pairs rows[LANES];
#pragma GCC unroll 16
    for (int at = 0; at < LANES; at++) std::memcpy(&rows[at], b + at * column, 64);
    exchange<8>(rows);
    exchange<4>(rows);
    exchange<2>(rows);
    exchange<1>(rows);
#pragma GCC unroll 16
    for (int at = 0; at < LANES; at++) std::memcpy(packed + at * COLUMNS, &rows[at], 64);
}

// packed[k / 2][COLUMNS] pairs, with zeros where b has no element.
void pack(const Matrix& b, int64_t depth, int64_t num_columns, uint32_t* packed) {
    int64_t done = 0;
    if (b.row == 1 && num_columns == COLUMNS) {
        for (; done + 2 * LANES <= depth; done += 2 * LANES)
            for (int64_t half = 0; half < COLUMNS; half += LANES)
                pack_square(b.data + done + half * b.column, b.column, packed + done / 2 * COLUMNS + half);
    }
    for (int64_t k = done; k < depth; k += 2) {
        const uint16_t *even = b.data + k * b.row, *odd = even + b.row;
        uint32_t* const to = packed + k / 2 * COLUMNS;
        if (b.column == 1 && num_columns == COLUMNS && k + 1 < depth) {
            for (int64_t n = 0; n < COLUMNS; n++) to[n] = even[n] | uint32_t{odd[n]} << 16;
            continue;
        }
        for (int64_t n = 0; n < COLUMNS; n++) {
            const uint32_t low = n < num_columns ? even[n * b.column] : 0;
            to[n] = low | (n < num_columns && k + 1 < depth ? uint32_t{odd[n * b.column]} << 16 : 0);
        }
    }
}

// `num_rows` rows of c by one strip: c = a b, or c += a b.
template <int num_rows>
__attribute__((noinline)) void tile(
    const uint16_t* a, int64_t a_row, const uint32_t* packed, int64_t depth, float* c, int64_t c_row, int64_t num_columns,
    bool add) {
    Floats sums[num_rows][2] = {};
    for (int64_t k = 0; k < depth; k += 2) {
        Pairs left, right;
        std::memcpy(&left, packed + k / 2 * COLUMNS, 64);
        std::memcpy(&right, packed + k / 2 * COLUMNS + LANES, 64);
        const bool is_last = k + 1 == depth;
#pragma GCC unroll 16
        for (int row = 0; row < num_rows; row++) {
            const uint16_t* const at = a + row * a_row + k;
            const Pairs both = Pairs{} + (is_last ? uint32_t{*at} : pair_at(at));
            multiply_add(sums[row][0], both, left);
            multiply_add(sums[row][1], both, right);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < num_rows; row++) {
        float* const to = c + row * c_row;
        if (num_columns == COLUMNS) {
            Floats before[2] = {};
            if (add) std::memcpy(before, to, sizeof before);
            const Floats after[2] = {before[0] + sums[row][0], before[1] + sums[row][1]};
            std::memcpy(to, after, sizeof after);
        } else {
            float values[COLUMNS];
            std::memcpy(values, sums[row], sizeof values);
            for (int64_t n = 0; n < num_columns; n++) to[n] = add ? to[n] + values[n] : values[n];
        }
    }
}

}  // namespace

static void strip(
    const Matrix& a, const Matrix& b, int64_t num_rows, int64_t num_columns, int64_t depth, float* c, int64_t c_row,
    bool add) {
    alignas(64) uint32_t packed[DEPTH / 2 * COLUMNS];
    for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t deep = depth - k < DEPTH ? depth - k : DEPTH;
        pack({b.data + k * b.row, b.row, b.column}, deep, num_columns, packed);
        int64_t row = 0;
        const auto rows_by = [&](auto some) {
            for (; row + some <= num_rows; row += some)
                tile<some>(a.data + row * a.row + k, a.row, packed, deep, c + row * c_row, c_row, num_columns, add || k > 0);
        };
        rows_by(std::integral_constant<int, ROWS>{});
        rows_by(std::integral_constant<int, 4>{});
        rows_by(std::integral_constant<int, 1>{});
    }
}

#pragma GCC pop_options
#endif

extern "C" {

// Whether this processor multiplies bfloat16, and the compiler could say so.
int32_t grpoforge_has_bfloat16_product() {
#ifdef HAS_PRODUCT
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
#else
    return 0;
#endif
}

// c [num_rows, num_columns] = a [num_rows, depth] b [depth, num_columns], or c += a b. Strides are in elements; rows of a
// and of c are contiguous, and b is in either order.
void grpoforge_bfloat16_product(
    const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t b_row, int64_t b_column, int64_t num_rows,
    int64_t num_columns, int64_t depth, float* c, int64_t c_row, int32_t add, int32_t num_threads) {
#ifdef HAS_PRODUCT
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
    for (int64_t column = 0; column < num_columns; column += COLUMNS) {
        const int64_t wide = num_columns - column < COLUMNS ? num_columns - column : COLUMNS;
        strip(
            {a, a_row, 1}, {b + column * b_column, b_row, b_column}, num_rows, wide, depth, c + column, c_row, add != 0);
    }
#endif
}

}  // extern "C"
