// Exchanges the blocks of `size` lanes off the diagonal of each pair of as many registers of 32-bit numbers as one has lanes;
// half of the lanes, a quarter, ..., 1 transpose them. `Lanes` are as many integers. For the target that this file is
// included for.
template <int size, typename Lanes, typename Register>
INLINE void exchange(Register* rows) {
    constexpr int lanes = sizeof(Register) / 4;
#if defined(__clang__)
    Register before[lanes];
    std::memcpy(before, rows, sizeof before);
    for (int i = 0; i < lanes; i++)
        for (int j = 0; j < lanes; j++)
            rows[i][j] = (i & size) == (j & size) ? before[i][j] : before[i ^ size][j ^ size];
#else
    Lanes low, high;
    for (int lane = 0; lane < lanes; lane++) {
        low[lane] = lane & size ? lanes + lane - size : lane;
        high[lane] = lane & size ? lanes + lane : lane + size;
    }
#pragma GCC unroll 16
    for (int at = 0; at < lanes; at++) {
        if (at & size) continue;
        const Register a = rows[at], b = rows[at + size];
        rows[at] = __builtin_shuffle(a, b, low);
        rows[at + size] = __builtin_shuffle(a, b, high);
    }
#endif
}
