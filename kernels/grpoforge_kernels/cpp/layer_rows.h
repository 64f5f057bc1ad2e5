// What rows of a decoder's layer need in decoding and in the update, for the target that this file is included for.

INLINE float sum_of(Floats x) {
    float sum = 0.0f;
    for (int64_t lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

// x [d] turned by its position; halves are pairs (the convention of Llama in transformers). May be in place.
INLINE void turn(const float* x, int64_t d, const float* cosine, const float* sine, float* y) {
    const int64_t half = d / 2;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const Floats a = load_at(x + i), b = load_at(x + i + half);
        store_at(a * load_at(cosine + i) - b * load_at(sine + i), y + i);
        store_at(b * load_at(cosine + i + half) + a * load_at(sine + i + half), y + i + half);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[i + half];
        y[i] = a * cosine[i] - b * sine[i];
        y[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}
