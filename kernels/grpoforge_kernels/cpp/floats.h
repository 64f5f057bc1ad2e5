// As many floats at a time as one register of the target holds.

constexpr int64_t LANES = REGISTER_BYTES / 4;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t Unaligned __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#if REGISTER_BYTES == 64
constexpr float UNDERFLOW = -1000.0f;  // exp2_of is exactly 0 here
#else
constexpr float UNDERFLOW = -127.0f;
#endif

struct float32 {
    float value;
};
struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

INLINE Floats all(float x) { return Floats{} + x; }
INLINE Floats floats_of(Bits x) { return (Floats)x; }
INLINE Bits bits_of(Floats x) { return (Bits)x; }

// The larger or smaller of the two. Where x is NaN: `larger` and `smaller` give NaN, `larger_number` gives y. (The
// instruction gives its second operand; a compiler takes two for the expression.)
#if REGISTER_BYTES == 64
INLINE Floats larger_or_second(Floats x, Floats y) {
    Floats z;
    __asm__("vmaxps %2, %1, %0" : "=v"(z) : "v"(x), "v"(y));
    return z;
}
INLINE Floats larger(Floats x, Floats y) { return larger_or_second(y, x); }
INLINE Floats smaller(Floats x, Floats y) {
    Floats z;
    __asm__("vminps %2, %1, %0" : "=v"(z) : "v"(y), "v"(x));
    return z;
}
INLINE Floats larger_number(Floats x, Floats y) { return larger_or_second(x, y); }
#else
INLINE Floats larger(Floats x, Floats y) { return x < y ? y : x; }
INLINE Floats smaller(Floats x, Floats y) { return x > y ? y : x; }
INLINE Floats larger_number(Floats x, Floats y) { return x > y ? x : y; }
#endif

// d where its power of two counts, else a d whose power is exactly 0.
template <typename Least>
INLINE Floats at_least(Floats d, Least least) { return d < least ? all(UNDERFLOW) : d; }

// For exp2_of, whose result is 0 where it would be subnormal: no float32 sum with a 1 in it would notice. vscalefps takes
// sixty times as long to make such a number, and a 0 from any d between -150 and about -500.
#if REGISTER_BYTES == 64
INLINE Floats at_least_underflow(Floats d) { return at_least(d, -126.0f); }
#else
INLINE Floats at_least_underflow(Floats d) { return larger(d, all(UNDERFLOW)); }
#endif

// Minimax polynomials of 2^f, for f in [0, 1) where the target has an instruction for it and in [-1/2, 1/2] elsewhere: of
// relative error 1.6e-7 in float32, and 7.5e-5 for what is rounded to bfloat16 (2e-3) at once.
#if REGISTER_BYTES == 64
constexpr float FINE[] = {1.0f, 0.6931513f, 0.24016444f, 0.055799913f, 0.00901703f, 0.0018671302f};
constexpr float COARSE[] = {0.9999252f, 0.69583356f, 0.22606716f, 0.07802452f};
#else
constexpr float FINE[] = {1.0f, 0.693147f, 0.24022242f, 0.055507336f, 0.009671513f, 0.0013264727f};
constexpr float COARSE[] = {0.99992806f, 0.69326097f, 0.24261113f, 0.05517167f};
#endif

// The polynomial c of the fraction of d, times a power of two: c[0] 2^d for d from UNDERFLOW (where it is 0) to 126. NaN
// gives NaN.
template <int terms>
INLINE Floats power_of(Floats d, const float (&c)[terms]) {
#if REGISTER_BYTES == 64
    Floats f, power;
    __asm__("vreduceps $9, %1, %0" : "=v"(f) : "v"(d));  // d - floor(d), 0 for -inf
#else
    constexpr float MAGIC = 12582912.0f + 127.0f;  // 1.5 * 2^23 rounds to integers; 127 biases the exponent
    const Floats t = d + MAGIC, f = d - (t - MAGIC);
#endif
    Floats p = all(c[terms - 1]);
#pragma GCC unroll 8
    for (int term = terms - 2; term >= 0; term--) p = p * f + c[term];
#if REGISTER_BYTES == 64
    __asm__("vscalefps %2, %1, %0" : "=v"(power) : "v"(p), "v"(d));  // p 2^floor(d)
    return power;
#else
    return p * floats_of(bits_of(t) << 23);
#endif
}

// x 2^n for whole n, rounded once, and not at all unless the result is subnormal.
INLINE Floats times_power_of_two(Floats x, Floats n) {
#if REGISTER_BYTES == 64
    Floats scaled;
    __asm__("vscalefps %2, %1, %0" : "=v"(scaled) : "v"(x), "v"(n));
    return scaled;
#else
    // Two factors: neither leaves the range of normal numbers where the result may.
    const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;
    return x * floats_of((Bits)(half + 127) << 23) * floats_of((Bits)(whole - half + 127) << 23);
#endif
}

// 2^d, exactly 1 at 0.
INLINE Floats exp2_of(Floats d) { return power_of(d, FINE); }

// 1 / (1 + exp(-x)); at least 2^-126.
INLINE Floats sigmoid_of(Floats x) {
    const Floats d = -x * grpoforge::LOG2E;
    return 1.0f / (1.0f + exp2_of(at_least_underflow(d > 126.0f ? all(126.0f) : d)));
}

// tanh u: an odd minimax polynomial (4e-9) below 0.625, (1 - q) / (1 + q) with q = exp(-2|u|) above.
INLINE Floats tanh_of(Floats u) {
    const Floats size = u < 0.0f ? -u : u, square = u * u;
    Floats p = all(-0.0057049873f);
    p = p * square + 0.020639088f;
    p = p * square - 0.053739715f;
    p = p * square + 0.13331442f;
    p = p * square - 0.3333328f;
    p = p * square + 1.0f;
    const Floats q = exp2_of(at_least_underflow(size * (-2.0f * grpoforge::LOG2E)));
    const Floats far = (1.0f - q) / (1.0f + q);
    return size < 0.625f ? p * u : (u < 0.0f ? -far : far);
}

template <typename T>
INLINE T read(const void* x) {
    T value;
    std::memcpy(&value, x, sizeof(T));
    return value;
}

INLINE Floats load(const float32* x) { return read<Floats>(x); }
INLINE Floats load_at(const float* x) { return read<Floats>(x); }
INLINE void store_at(Floats x, float* y) { std::memcpy(y, &x, sizeof x); }

#if REGISTER_BYTES >= 32
INLINE Bits load_halves(const void* x) {
    Bits bits;
    __asm__("vpmovzxwd %1, %0" : "=v"(bits) : "m"(*static_cast<const Unaligned*>(x)));
    return bits;
}
#else
INLINE Bits load_halves(const void* x) { return __builtin_convertvector(read<Halves>(x), Bits); }
#endif

INLINE Floats load(const bfloat16* x) { return floats_of(load_halves(x) << 16); }

INLINE Floats load(const float16* x) {
    const Bits half = load_halves(x), sign = (half & 0x8000u) << 16, size = half & 0x7fffu;
    const Floats finite = floats_of(size << 13) * 0x1p112f;  // moves the exponent's bias; right for subnormals too
    const Bits special = (size << 13) | 0x7f800000u;
    return floats_of(sign | ((Ints)size >= 0x7c00 ? special : bits_of(finite)));
}

INLINE void store(Floats x, float32* y) { std::memcpy(y, &x, sizeof x); }

#if REGISTER_BYTES == 64
INLINE void store_halves(Bits bits, void* y) {
    __asm__("vpmovdw %1, %0" : "=m"(*static_cast<Unaligned*>(y)) : "v"(bits));
}
#else
INLINE void store_halves(Bits bits, void* y) {
    const Halves halves = __builtin_convertvector(bits, Halves);
    std::memcpy(y, &halves, sizeof halves);
}
#endif

// Rounds to nearest, ties away from zero, in the upper half. The NaNs of these kernels have no low bits to overflow.
INLINE Bits rounded_to_bfloat16(Floats x) { return bits_of(x) + 0x8000u; }

INLINE void store(Floats x, bfloat16* y) { store_halves(rounded_to_bfloat16(x) >> 16, y); }

INLINE void store(Floats x, float16* y) {
    const Bits bits = bits_of(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    const Bits normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
    const Bits subnormal = bits_of(floats_of(size) + 0.5f) - 0x3f000000u;  // the last bit of 0.5 is 2^-24
    Bits half = (Ints)size < (113 << 23) ? subnormal : normal;
    half = (Ints)size >= 0x477ff000 ? Bits{} + 0x7c00u : half;  // from 65520 up
    half = (Ints)size > 0x7f800000 ? Bits{} + 0x7e00u : half;
    store_halves(sign | half, y);
}

// 2 LANES neighbors, in whatever order is cheap, the same for both: of bfloat16, those at even places and those at odd.
struct Two {
    Floats a, b;
};

template <typename T>
INLINE Two load_two(const T* x) {
    return {load(x), load(x + LANES)};
}

template <typename T>
INLINE void store_two(const Two& two, T* y) {
    store(two.a, y);
    store(two.b, y + LANES);
}

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
INLINE Two load_two(const bfloat16* x) {
    const Bits both = read<Bits>(x);
    return {floats_of(both << 16), floats_of(both & 0xffff0000u)};
}

INLINE void store_two(const Two& two, bfloat16* y) {
    const Bits both = (rounded_to_bfloat16(two.a) >> 16) | (rounded_to_bfloat16(two.b) & 0xffff0000u);
    std::memcpy(y, &both, sizeof both);
}
#endif

// The first n < LANES numbers at x, zeros behind them.
template <typename T>
INLINE Floats load_some(const T* x, int64_t n) {
    T whole[LANES] = {};
    std::memcpy(whole, x, static_cast<size_t>(n) * sizeof(T));
    return load(whole);
}

template <typename T>
INLINE void store_some(Floats values, T* x, int64_t n) {
    T whole[LANES];
    store(values, whole);
    std::memcpy(x, whole, static_cast<size_t>(n) * sizeof(T));
}
