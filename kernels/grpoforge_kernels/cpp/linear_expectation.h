// The forward of a frozen head (linear.cpp): the logits of a group of tokens give statistics of rows and, while they are there,
// the sum over tokens of their weights by rows of the head's weight, of which the backward is a scaling. All threads share
// the logits of a group, and terms are relative to the highest score so far, as in an attention that goes along its keys.

// Terms that a column's blocks hold so far, relative to what their rows are relative to now.
void shrink(const Sweep& in, const float* by, float* blocks) {
    for (int64_t row = 0; row < in.rows; row++, blocks += BLOCK) {
        if (by[row] == 1.0f) continue;
        store(load(blocks) * by[row], blocks);
        store(load(blocks + LANES) * by[row], blocks + LANES);
    }
}

// What the forward of a frozen head carries from group to group: of each row, the highest score so far, and what makes the
// terms relative to it of those that were relative to the one before. All [rows].
struct Running {
    float *highest, *by;

    // The scores of a group and LANES rows: their sums go to `part`, [3, rows], and their weights 2^((score - highest) k) to
    // the panel, 0 for the chosen token.
    void add(
        const Sweep& in, const Panel& panel, const float* scores, const float* k, int64_t row, float* part,
        float* chosen) const {
        const int64_t count = smaller(GROUP, in.vocab_size - panel.start), stride = in.stride();
        const Floats unit = load(k + row), before = load(highest + row);
        alignas(64) uint16_t narrow[GROUP * LANES] = {};
        const Terms terms = terms_of(scores + row, count, stride, before, unit, [&](int64_t at, Floats e) {
            const Halves halves = rounded(e);
            std::memcpy(narrow + at * LANES, &halves, sizeof halves);
        });
        for (int64_t lane = 0; lane < LANES && row + lane < in.num_rows; lane++) {
            const int64_t at = in.ids[row + lane] - panel.start;
            if (at < 0 || at >= count) continue;
            chosen[row + lane] = scores[at * stride + row + lane];
            narrow[at * LANES + lane] = 0;
        }
        store(terms.highest, highest + row);
        store(simd::exp2_of(simd::at_least_underflow((before - terms.highest) * unit)), by + row);
        store(terms.highest, part + row);
        store(terms.total, part + in.rows + row);
        store(terms.weighted, part + 2 * in.rows + row);
        panel.pack({narrow, 1, LANES, false}, 0, row, 0, panel.num_tiles);
    }
};

// As `forward`, and into `expectation`, [num_rows, hidden_size], the sums over tokens of their weights by rows of the weight.
void expect(const Sweep& in, const float* k, float* parts, float* chosen, float* expectation) {
    const Factors factors(in, false);
    const TileShapes shapes;
    const int64_t columns = in.hidden_lines() * LANES;
    const Aligned<uint16_t> weights(in.slopes_room());
    const Aligned<float> blocks(in.rows * columns), scores(in.group_room()), rows(2 * in.rows);
    const Running running = {rows, rows + in.rows};
    for (int64_t row = 0; row < in.rows; row++) running.highest[row] = -FLT_MAX;
#pragma omp parallel num_threads(in.num_threads) if (in.num_threads > 1)
    {
        const Aligned<uint16_t> lines(in.lines_room()), weight(in.weight_room());
#pragma omp for schedule(dynamic)
        for (int64_t line = 0; line < in.rows / LANES; line++) factors.pack_columns(line);
#pragma omp for schedule(static)
        for (int64_t column = 0; column < columns; column += BLOCK)
            std::memset(blocks + column * in.rows, 0, in.rows * BLOCK * sizeof(float));
        if (in.kind == AMX) __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
        for (int64_t start = 0; start < in.vocab_size; start += GROUP) {
            const int64_t stop = smaller(start + GROUP, in.vocab_size);
            const Panel panel = {start, tiles_of(stop - start, DEPTH), weights};
#pragma omp for schedule(static)
            for (int64_t token = start; token < stop; token += in.strip)
                in.make_scores(token, factors.columns, lines, scores + (token - start) * in.stride());
#pragma omp for schedule(static)
            for (int64_t row = 0; row < in.rows; row += LANES)
                running.add(in, panel, scores, k, row, parts + start / GROUP * 3 * in.rows, chosen);
#pragma omp for schedule(static)
            for (int64_t column = 0; column < columns; column += in.width) {
                const int64_t end = smaller(column + in.width, columns);
                for (int64_t at = column; at < end; at += BLOCK) shrink(in, running.by, blocks + at * in.rows);
                add_hidden_gradient(in, panel, column, end, weight, blocks);
            }
        }
        if (in.kind == AMX) __asm__ volatile("tilerelease" ::);
#pragma omp for schedule(static)
        for (int64_t column = 0; column < columns; column += BLOCK) write_hidden_gradient(in, blocks, column, expectation);
    }
}
