// What the arithmetic of attention over trees (tree_kernels.h) and its schedule (tree_attention.cpp) say to each other.
#pragma once

#include <initializer_list>

#include "rows.h"

namespace grpoforge {

constexpr int64_t STEP = 8;    // places, and numbers of a head, that are multiplied at a time
constexpr int64_t PART = 128;  // places whose scores are held at a time

INLINE int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Tokens in preorder. `ends`: where the subtree of a token ends. `blocks`: where each block of tokens begins that is
// computed at a time; the last entry is the number of tokens. A block has tokens of one tree. `order`: where the blocks of
// each tree begin and end, the trees with most work first.
struct Trees {
    int64_t num_tokens, group;  // query heads that share a head of keys
    const int64_t* positions;
    int64_t *parents, *ends, *blocks, *order;
    int64_t num_trees, work;
    int64_t slots, queries;  // that the largest block needs
};

// [tokens, heads, d] with `row` numbers from a token to the next.
struct Heads {
    float* data;
    int64_t row;
};

struct Attention {
    int64_t kv_heads, d;
    float scale;
    Heads query, key, value, out;
    float* logsumexp;  // [tokens, heads]
    Heads grad, d_query, d_key, d_value;
};

// Blocks [first, last) of a tree, and `num_heads` of the query heads that share a head of keys.
struct Task {
    int64_t first, last, kv_head, first_head, num_heads;
};

// The memory that one thread computes in. Slots hold the path of tokens from the root, then the tokens of a block.
struct Room {
    int64_t *held, *from, *to;                                    // [slots]; the token that stands in each
    float *keys, *values, *d_keys, *d_values;                     // [slots][width]
    float *scores, *slopes;                                       // [PART][lanes]
    float *queries, *grads, *rows;                                // [lanes][width]
    float *query_columns, *grad_columns, *columns;                // [width][lanes]
    float *lowest, *highest, *sums;                               // [lanes]
};

struct TreeArithmetic {
    int64_t lanes;  // floats of a register
    void (*forward)(const Trees&, const Attention&, const Task&, const Room&);
    void (*backward)(const Trees&, const Attention&, const Task&, const Room&);
};

}  // namespace grpoforge
