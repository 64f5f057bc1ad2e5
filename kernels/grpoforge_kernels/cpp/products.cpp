// Products of bfloat16 matrices with float32 sums. torch has none on a CPU: its bfloat16 product rounds the result to
// bfloat16.
//
// A strip of columns of b is packed by the thread that multiplies it and stays in L2 while all of a passes over it. Every
// number of the result is summed in one order, so it depends neither on the number of threads nor on the rows beside it.
#include "tiles.h"

#ifdef HAS_PRODUCT

namespace {

constexpr int64_t STRIP = 4 * BLOCK, MOST_DEPTH = 2048;  // of b, packed at a time: 512 KiB at most

uint16_t* lines_for(int64_t number, int64_t num_tiles) {
    return static_cast<uint16_t*>(std::aligned_alloc(64, static_cast<size_t>(number * num_tiles * TILE) * sizeof(uint16_t)));
}

struct Product {
    Kind kind;
    Matrix a, b;
    int64_t num_rows, num_columns, depth;
    Result c;

    int64_t num_tiles() const { return tiles_of(depth, DEPTH); }

    // The columns of a strip from n on, by the packed a; `sums` is room for a block.
    void strip(int64_t n, const uint16_t* left, uint16_t* right, float* sums) const {
        const auto block = kind == AMX ? block_amx : block_avx512;
        const int64_t line = num_tiles() * TILE, end = smaller(n + STRIP, num_columns);
        for (int64_t column = n; column < end; column += LANES)
            pack_lines(b, column, num_columns, depth, true, right + (column - n) / LANES * line);
        if (tiles_of(end - n, LANES) % 2) std::memset(right + tiles_of(end - n, LANES) * line, 0, line * sizeof *right);
        for (int64_t i = 0; i < num_rows; i += BLOCK)
            for (int64_t column = n; column < end; column += BLOCK) {
                const uint16_t* const packed = right + (column - n) / LANES * line;
                const int64_t rows = smaller(num_rows - i, BLOCK), columns = smaller(end - column, BLOCK);
                if (c.is_float32 && rows == BLOCK && columns == BLOCK) {
                    float* const to = static_cast<float*>(c.data) + i * c.row + column;
                    block(left + i / LANES * line, packed, line, num_tiles(), to, c.row, c.add);
                } else {
                    block(left + i / LANES * line, packed, line, num_tiles(), sums, BLOCK, false);
                    write(sums, c, i, column, rows, columns);
                }
            }
    }

    void run(int num_threads) const {
        const int64_t line = num_tiles() * TILE, num_lines = 2 * tiles_of(num_rows, BLOCK);
        uint16_t* const left = lines_for(num_lines, num_tiles());
        const TileShapes shapes;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
        {
            uint16_t* const right = lines_for(STRIP / LANES, num_tiles());
            alignas(64) float sums[BLOCK * BLOCK];
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < num_lines; i++) pack_lines(a, i * LANES, num_rows, depth, false, left + i * line);
            if (kind == AMX) __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < num_columns; n += STRIP) strip(n, left, right, sums);
            if (kind == AMX) __asm__ volatile("tilerelease" ::);
            std::free(right);
        }
        std::free(left);
    }
};

Kind best_kind() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512bw")
        || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512cd"))
        return NONE;
    // The kernel lends a process the tile registers when asked.
    const bool has_amx = __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-tile")
        && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return has_amx ? AMX : AVX512;
}

}  // namespace

#pragma GCC pop_options
#endif

extern "C" {

// What multiplies bfloat16 on this processor, as far as the compiler can say so: 2 tiles (AMX), 1 registers (AVX512_BF16),
// 0 nothing.
int32_t grpoforge_bfloat16_product_kind() {
#ifdef HAS_PRODUCT
    static const Kind kind = best_kind();
    return kind;
#else
    return 0;
#endif
}

// c [num_rows, num_columns] = a [num_rows, depth] b [depth, num_columns], or c += a b. Strides are in elements; each of a
// and b is contiguous along its rows or its columns, c along its rows. Where a flag says so, a and c are float32; a c in
// bfloat16 is rounded once, so it takes no `add` and no depth above grpoforge_bfloat16_product_depth().
void grpoforge_bfloat16_product(
    int32_t kind, const void* a, int32_t a_is_float32, int64_t a_row, int64_t a_column, const uint16_t* b, int64_t b_row,
    int64_t b_column, int64_t num_rows, int64_t num_columns, int64_t depth, void* c, int32_t c_is_float32, int64_t c_row,
    int32_t add, int32_t num_threads) {
#ifdef HAS_PRODUCT
    const int64_t a_size = a_is_float32 ? 4 : 2;
    for (int64_t k = 0; k < depth; k += MOST_DEPTH) {
        const Matrix left = {static_cast<const char*>(a) + k * a_column * a_size, a_row, a_column, a_is_float32 != 0};
        const Matrix right = {b + k * b_row, b_column, b_row, false};  // its lines are columns
        const Result result = {c, c_row, c_is_float32 != 0, add != 0 || k > 0};
        const int64_t deep = depth - k < MOST_DEPTH ? depth - k : MOST_DEPTH;
        Product{static_cast<Kind>(kind), left, right, num_rows, num_columns, deep, result}.run(num_threads);
    }
#endif
}

int64_t grpoforge_bfloat16_product_depth() {
#ifdef HAS_PRODUCT
    return MOST_DEPTH;
#else
    return 0;
#endif
}

}  // extern "C"
