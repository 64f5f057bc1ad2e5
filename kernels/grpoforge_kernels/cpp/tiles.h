// What multiplies bfloat16 matrices with float32 sums: tiles, how they are packed, and the sums of a block of 32 x 32.
//
// Both factors are packed in tiles of 16 x 32 numbers, zeros behind the edges: a row of a is 32 neighbors along the depth;
// a row of b is a pair of neighbors along the depth for each of 16 columns. Such tiles are what AMX multiplies, and what
// AVX512_BF16 multiplies one register at a time. Every number is summed in one order, along the depth.
//
// Where HAS_PRODUCT is defined, all that follows the include is compiled for processors with AVX-512.
#pragma once

#include "rows.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(GRPOFORGE_PLAIN)
#define HAS_PRODUCT 1
#include <cstdlib>
#include <sys/syscall.h>
#include <unistd.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")

namespace {

constexpr int64_t LANES = 16, DEPTH = 2 * LANES, TILE = LANES * DEPTH, BLOCK = 2 * LANES;

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Pairs __attribute__((vector_size(64)));  // of bfloat16
typedef uint16_t Halves __attribute__((vector_size(32)));

enum Kind : int32_t { NONE = 0, AVX512 = 1, AMX = 2 };

struct Matrix {
    const void* data;
    int64_t row, column;  // strides in elements; one of them is 1
    bool is_float32;      // rounded to bfloat16 when it is packed
};

INLINE Halves rounded(Floats x) {
    Halves halves;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(x));
    return halves;
}

INLINE uint16_t element(const Matrix& m, int64_t i, int64_t k) {
    const int64_t at = i * m.row + k * m.column;
    if (!m.is_float32) return static_cast<const uint16_t*>(m.data)[at];
    return rounded(Floats{} + static_cast<const float*>(m.data)[at])[0];
}

// 16 neighbors from element `at` on.
INLINE Halves neighbors(const Matrix& m, int64_t at) {
    if (m.is_float32) {
        Floats x;
        std::memcpy(&x, static_cast<const float*>(m.data) + at, sizeof x);
        return rounded(x);
    }
    Halves halves;
    std::memcpy(&halves, static_cast<const uint16_t*>(m.data) + at, sizeof halves);
    return halves;
}

INLINE Pairs wide(Halves x) { return __builtin_convertvector(x, Pairs); }

#include "exchange.h"

INLINE void transpose(Pairs* rows) {
    exchange<8, Pairs>(rows);
    exchange<4, Pairs>(rows);
    exchange<2, Pairs>(rows);
    exchange<1, Pairs>(rows);
}

// 16 lines of 32 neighbors along the depth, lines apart by m.row: a tile of a, or a tile of b transposed.
INLINE void read_lines(const Matrix& m, int64_t at, Pairs* rows) {
#pragma GCC unroll 16
    for (int line = 0; line < LANES; line++) {
        const Halves halves[2] = {neighbors(m, at + line * m.row), neighbors(m, at + line * m.row + LANES)};
        std::memcpy(&rows[line], halves, 64);
    }
}

// 32 lines of 16 neighbors, lines apart along the depth by m.column: pairs of lines are a tile of b, or one of a transposed.
INLINE void read_pairs(const Matrix& m, int64_t at, Pairs* rows) {
#pragma GCC unroll 16
    for (int pair = 0; pair < LANES; pair++) {
        const int64_t even = at + 2 * pair * m.column;
        rows[pair] = wide(neighbors(m, even)) | wide(neighbors(m, even + m.column)) << 16;
    }
}

// The tile at line i (a row of a, a column of b) and depth k; `lines` and `depth` are what is left from there. `is_paired`:
// in the order of b.
__attribute__((noinline)) void pack_tile(
    const Matrix& m, int64_t i, int64_t k, int64_t lines, int64_t depth, bool is_paired, uint16_t* tile) {
    if (lines >= LANES && depth >= DEPTH) {
        const int64_t at = i * m.row + k * m.column;
        Pairs rows[LANES];
        const bool is_deep = m.column == 1;
        is_deep ? read_lines(m, at, rows) : read_pairs(m, at, rows);
        if (is_deep == is_paired) transpose(rows);
        std::memcpy(tile, rows, sizeof rows);
        return;
    }
    std::memset(tile, 0, TILE * sizeof *tile);
    for (int64_t line = 0; line < lines && line < LANES; line++)
        for (int64_t d = 0; d < depth && d < DEPTH; d++)
            tile[is_paired ? d / 2 * DEPTH + 2 * line + d % 2 : line * DEPTH + d] = element(m, i + line, k + d);
}

// All tiles along the depth of 16 lines, one after the other; what is in order is read line by line, as memory likes it.
void pack_lines(const Matrix& m, int64_t i, int64_t num_lines, int64_t depth, bool is_paired, uint16_t* packed) {
    if (!is_paired && !m.is_float32 && m.column == 1 && num_lines - i >= LANES && depth % DEPTH == 0) {
        const uint16_t* const from = static_cast<const uint16_t*>(m.data) + i * m.row;
        for (int64_t line = 0; line < LANES; line++)
            for (int64_t k = 0; k < depth; k += DEPTH)
                std::memcpy(packed + k * LANES + line * DEPTH, from + line * m.row + k, DEPTH * sizeof *packed);
        return;
    }
    for (int64_t k = 0; k < depth; k += DEPTH)
        pack_tile(m, i, k, num_lines - i, depth - k, is_paired, packed + k / DEPTH * TILE);
}

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The sums of a block of 32 x 32, or what they add to, by `num_tiles` tiles of two lines each of a and b, lines apart by
// `next`. Tiles of b should stay in L1, where those of a leave them alone (`t1`).
void block_amx(
    const uint16_t* a, const uint16_t* b, int64_t next, int64_t num_tiles, float* sums, int64_t sums_row, bool add) {
    const int64_t bytes = sums_row * int64_t{sizeof(float)};
    float* const below = sums + LANES * sums_row;
    if (add)
        __asm__ volatile(
            "tileloadd (%0,%4,1), %%tmm0\n\ttileloadd (%1,%4,1), %%tmm1\n\t"
            "tileloadd (%2,%4,1), %%tmm2\n\ttileloadd (%3,%4,1), %%tmm3"
            ::"r"(sums), "r"(sums + LANES), "r"(below), "r"(below + LANES), "r"(bytes) : "memory");
    else
        __asm__ volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::);
    for (int64_t at = 0; at < num_tiles * TILE; at += TILE)
        __asm__ volatile(
            "tileloaddt1 (%0,%4,1), %%tmm4\n\ttileloadd (%2,%4,1), %%tmm6\n\ttdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
            "tileloadd (%3,%4,1), %%tmm7\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
            "tileloaddt1 (%1,%4,1), %%tmm5\n\ttdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3"
            ::"r"(a + at), "r"(a + next + at), "r"(b + at), "r"(b + next + at), "r"(int64_t{64}) : "memory");
    __asm__ volatile(
        "tilestored %%tmm0, (%0,%4,1)\n\ttilestored %%tmm1, (%1,%4,1)\n\t"
        "tilestored %%tmm2, (%2,%4,1)\n\ttilestored %%tmm3, (%3,%4,1)"
        ::"r"(sums), "r"(sums + LANES), "r"(below), "r"(below + LANES), "r"(bytes) : "memory");
}

void block_avx512(
    const uint16_t* a, const uint16_t* b, int64_t next, int64_t num_tiles, float* sums, int64_t sums_row, bool add) {
    constexpr int ROWS = 8;
    for (int64_t row = 0; row < BLOCK; row += ROWS) {
        const uint16_t* const lines = a + row / LANES * next + row % LANES * DEPTH;
        Floats found[ROWS][2] = {};
        if (add)
            for (int r = 0; r < ROWS; r++) std::memcpy(found[r], sums + (row + r) * sums_row, sizeof found[r]);
        for (int64_t at = 0; at < num_tiles * TILE; at += TILE)
            for (int64_t pair = 0; pair < LANES; pair++) {
                Pairs left, right;
                std::memcpy(&left, b + at + pair * DEPTH, 64);
                std::memcpy(&right, b + next + at + pair * DEPTH, 64);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    uint32_t value;
                    std::memcpy(&value, lines + at + r * DEPTH + 2 * pair, 4);
                    const Pairs both = Pairs{} + value;
                    __asm__("vdpbf16ps %2, %1, %0" : "+v"(found[r][0]) : "v"(both), "v"(left));
                    __asm__("vdpbf16ps %2, %1, %0" : "+v"(found[r][1]) : "v"(both), "v"(right));
                }
            }
        for (int r = 0; r < ROWS; r++) std::memcpy(sums + (row + r) * sums_row, found[r], sizeof found[r]);
    }
}

struct Result {
    void* data;
    int64_t row;  // stride in elements
    bool is_float32, add;
};

// A whole block, rounded.
void write_rounded(const float* sums, uint16_t* out, int64_t row) {
    for (int64_t at = 0; at < BLOCK; at++, sums += BLOCK, out += row) {
        Floats left, right;
        std::memcpy(&left, sums, sizeof left);
        std::memcpy(&right, sums + LANES, sizeof right);
        const Halves halves[] = {rounded(left), rounded(right)};
        std::memcpy(out, halves, sizeof halves);
    }
}

// Writes the part of a block that is inside the result, `rows` x `columns` from row i and column n on.
void write(const float* sums, const Result& c, int64_t i, int64_t n, int64_t rows, int64_t columns) {
    if (!c.is_float32 && rows == BLOCK && columns == BLOCK)
        return write_rounded(sums, static_cast<uint16_t*>(c.data) + i * c.row + n, c.row);
    for (int64_t row = 0; row < rows; row++, sums += BLOCK) {
        const int64_t at = (i + row) * c.row + n;
        for (int64_t column = 0; column < columns; column += LANES) {
            const auto count = static_cast<size_t>(columns - column < LANES ? columns - column : LANES);
            Floats sum, before = {};
            std::memcpy(&sum, sums + column, sizeof sum);
            if (!c.is_float32) {
                const Halves halves = rounded(sum);
                std::memcpy(static_cast<uint16_t*>(c.data) + at + column, &halves, 2 * count);
                continue;
            }
            float* const to = static_cast<float*>(c.data) + at + column;
            if (c.add) std::memcpy(&before, to, 4 * count);
            sum += before;
            std::memcpy(to, &sum, 4 * count);
        }
    }
}

int64_t tiles_of(int64_t number, int64_t size) { return (number + size - 1) / size; }

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

#endif
