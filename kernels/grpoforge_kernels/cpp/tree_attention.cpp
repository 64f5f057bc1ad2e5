// Attention over packed trees of tokens: which tokens are computed together, and which thread computes what. The equation
// is in ../reference/tree_attention.py, the arithmetic in tree_kernels.h.
#include "tree_attention.h"

#include <algorithm>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#define KERNEL "tree_kernels.h"
#include "targets.h"

using namespace grpoforge;

static const TreeArithmetic& arithmetic = *CHOSEN(arithmetic);

namespace {

constexpr int64_t MOST_QUERIES = 64;  // of a block, unless one token has more
constexpr int64_t OVERHEAD = 16;      // of a block, in places

// The work at one place for a block of each number of tokens, in quarters of a register of queries. A pair of registers
// costs a bit less than two alone.
std::vector<int64_t> place_costs(int64_t group) {
    std::vector<int64_t> costs(static_cast<size_t>(std::max<int64_t>(1, MOST_QUERIES / group) + 1));
    for (size_t count = 1; count < costs.size(); count++) {
        const int64_t queries = static_cast<int64_t>(count) * group;
        const int64_t registers = (queries + arithmetic.lanes - 1) / arithmetic.lanes;
        costs[count] = 4 * registers + registers % 2 + 2;
    }
    return costs;
}

// The cheapest division of the tokens of a tree into blocks, from its last token to its first: `counts` gets the tokens of
// the block that begins at each, `costs` the work from there on. Every query of a block is multiplied with every place of
// its first token's path and of the block.
void divide(
    const Trees& trees, const std::vector<int64_t>& by_place, int64_t first, int64_t end, int64_t* counts, int64_t* costs) {
    for (int64_t token = end - 1; token >= first; token--) {
        const int64_t most = std::min<int64_t>(static_cast<int64_t>(by_place.size()) - 1, end - token);
        costs[token] = INT64_MAX;
        for (int64_t count = 1; count <= most; count++) {
            const int64_t rest = token + count < end ? costs[token + count] : 0;
            const int64_t whole = by_place[count] * (trees.positions[token] + count + OVERHEAD) + rest;
            if (whole < costs[token]) costs[token] = whole, counts[token] = count;
        }
    }
}

void link(const Trees& trees) {
    std::vector<int64_t> path;
    for (int64_t token = 0; token < trees.num_tokens; token++) {
        const size_t depth = static_cast<size_t>(trees.positions[token]);
        for (size_t at = depth; at < path.size(); at++) trees.ends[path[at]] = token;
        path.resize(depth);
        trees.parents[token] = depth ? path.back() : -1;
        path.push_back(token);
    }
    for (const int64_t token : path) trees.ends[token] = trees.num_tokens;
}

// Where in the memory of one thread everything is; with `memory` null only its size is right.
struct Layout {
    int64_t size = 0;  // floats
    Room room;

    Layout(const Trees& trees, int64_t d, float* memory) {
        const int64_t width = rounded(d, 16), lanes = rounded(trees.queries, 16);
        const auto take = [&](int64_t n) {
            float* const taken = memory + size;
            size += rounded(n, 16);
            return taken;
        };
        for (int64_t** one : {&room.held, &room.from, &room.to}) *one = reinterpret_cast<int64_t*>(take(2 * trees.slots));
        for (float** one : {&room.keys, &room.values, &room.d_keys, &room.d_values}) *one = take(trees.slots * width);
        for (float** one : {&room.scores, &room.slopes}) *one = take(PART * lanes);
        for (float** one : {&room.queries, &room.grads, &room.rows}) *one = take(lanes * width);
        for (float** one : {&room.query_columns, &room.grad_columns, &room.columns}) *one = take(lanes * width);
        for (float** one : {&room.lowest, &room.highest, &room.sums}) *one = take(lanes);
    }
};

using Run = void (*)(const Trees&, const Attention&, const Task&, const Room&);

// Each tree, head of keys and `pieces`-th of its query heads by one thread.
void run(const Trees& trees, const Attention& attention, int64_t pieces, float* memory, int32_t num_threads, Run task) {
    const int64_t each = trees.num_trees ? attention.kv_heads * pieces : 0, num_tasks = trees.num_trees * each;
    const int64_t size = Layout(trees, attention.d, memory).size;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        int64_t thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        const Room room = Layout(trees, attention.d, memory + thread * size).room;
        // Up to a STEP of places behind the last is computed with and thrown away; what is left in memory may be slow.
        std::memset(room.keys, 0, static_cast<size_t>(room.d_keys - room.keys) * 4);
#pragma omp for schedule(dynamic)
        for (int64_t index = 0; index < num_tasks; index++) {
            const int64_t *const tree = trees.order + 2 * (index / each), part = index % each;
            const int64_t kv_head = part / pieces, piece = part % pieces;
            const int64_t from = piece * trees.group / pieces, to = (piece + 1) * trees.group / pieces;
            task(trees, attention, {tree[0], tree[1], kv_head, from, to - from}, room);
        }
    }
}

}  // namespace

extern "C" {

// Fills what `trees` says beside tokens, group and positions. Arrays have room for num_tokens + 1 entries, `order` for two
// for each tree.
void grpoforge_tree_plan(Trees* trees) {
    const int64_t n = trees->num_tokens;
    link(*trees);
    const std::vector<int64_t> by_place = place_costs(trees->group);
    std::vector<int64_t> counts(n), costs(n), roots;
    for (int64_t token = 0; token < n; token = trees->ends[token]) roots.push_back(token);
    trees->num_trees = static_cast<int64_t>(roots.size());
    trees->work = 0;
    int64_t num_blocks = 0, deepest_block = 0, most = 0;
    std::vector<std::pair<int64_t, int64_t>> blocks_of(n);
    for (const int64_t root : roots) {
        const int64_t end = trees->ends[root];
        divide(*trees, by_place, root, end, counts.data(), costs.data());
        trees->work += costs[root];
        blocks_of[root].first = num_blocks;
        for (int64_t token = root; token < end; token += counts[token]) {
            trees->blocks[num_blocks++] = token;
            deepest_block = std::max(deepest_block, trees->positions[token] + counts[token]);
            most = std::max(most, counts[token]);
        }
        blocks_of[root].second = num_blocks;
    }
    trees->blocks[num_blocks] = n;
    trees->slots = rounded(deepest_block, STEP);
    trees->queries = most * trees->group;
    std::stable_sort(roots.begin(), roots.end(), [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });
    for (size_t tree = 0; tree < roots.size(); tree++) {
        trees->order[2 * tree] = blocks_of[roots[tree]].first;
        trees->order[2 * tree + 1] = blocks_of[roots[tree]].second;
    }
}

// Floats that each thread needs.
int64_t grpoforge_tree_room(const Trees* trees, int64_t d) { return Layout(*trees, d, nullptr).size; }

void grpoforge_tree_forward(const Trees* trees, const Attention* attention, float* memory, int32_t num_threads) {
    const int64_t num_tasks = std::max<int64_t>(1, trees->num_trees * attention->kv_heads);
    const int64_t pieces = std::clamp<int64_t>(num_threads / num_tasks, 1, trees->group);
    run(*trees, *attention, pieces, memory, num_threads, arithmetic.forward);
}

void grpoforge_tree_backward(const Trees* trees, const Attention* attention, float* memory, int32_t num_threads) {
    run(*trees, *attention, 1, memory, num_threads, arithmetic.backward);
}

}  // extern "C"
