// Decoding for Llama and its like: the schedule. Prompts and completions in any mixture go through the layers as rows of
// one batch; a prompt's keys and values are made once and read by all of its completions, and rows that have drawn the same
// tokens so far go through the layers as one.
//
// Small models: each thread has slots and completions of its own and waits for nobody. Large ones: all threads work on
// one batch, each on a share of every matrix's columns, so weights are read from memory once for all rows.
#include "decode.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

using namespace grpoforge;

static const Arithmetic& arithmetic = decode_arithmetic();

namespace {

constexpr int64_t PREFILL = 256;        // prompt tokens in one pass through the layers
constexpr int64_t LOGITS = int64_t{1} << 24;  // most logits that are held at a time, unless one row has more
constexpr int64_t PART = 512;           // of decode_kernels.h

INLINE int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

using Floats = Aligned<float>;

struct Layer {
    const float *norm, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *out_bias, *mlp_norm, *gate_up, *gate_up_bias, *down, *down_bias;
};
constexpr int64_t LAYER_TENSORS = sizeof(Layer) / sizeof(float*);

struct Model {
    int64_t num_layers, hidden, heads, kv_heads, d, ffn, vocabulary;
    float eps;
    const float *embedding, *norm, *head, *head_bias, *cosine, *sine;
    const Layer* layers;

    int64_t width() const { return rounded(d, 16); }  // of a stored value
    int64_t qkv_columns() const { return (heads + 2 * kv_heads) * d; }
    int64_t ffn_columns() const { return rounded(ffn, STRIP / 2); }
};

// Keys and values of all layers and heads for `capacity` places.
struct Block {
    const Model& model;
    int64_t capacity;
    float *keys, *values;

    static int64_t size(const Model& m, int64_t places) {
        return m.num_layers * m.kv_heads * rounded(places, KEYS) * (m.d + m.width());
    }
    Block(const Model& m, int64_t places, float* memory)
        : model(m), capacity(rounded(places, KEYS)), keys(memory),
          values(memory + m.num_layers * m.kv_heads * capacity * m.d) {}
    float* keys_of(int64_t layer, int64_t head) const {
        return keys + (layer * model.kv_heads + head) * capacity * model.d;
    }
    float* values_of(int64_t layer, int64_t head) const {
        return values + (layer * model.kv_heads + head) * capacity * model.width();
    }
    void put(int64_t layer, int64_t head, int64_t place, const float* key, const float* value) const {
        float* to = keys_of(layer, head) + place / KEYS * model.d * KEYS + place % KEYS;
        for (int64_t j = 0; j < model.d; j++) to[j * KEYS] = key[j];
        to = values_of(layer, head) + place * model.width();
        std::memcpy(to, value, static_cast<size_t>(model.d) * 4);
        std::memset(to + model.d, 0, static_cast<size_t>(model.width() - model.d) * 4);
    }
    // The first `places` of another block of the same size.
    void copy(const Block& other, int64_t places) const {
        const int64_t keys_size = rounded(places, KEYS) * model.d, values_size = places * model.width();
        for (int64_t l = 0; l < model.num_layers; l++)
            for (int64_t h = 0; h < model.kv_heads; h++) {
                std::memcpy(keys_of(l, h), other.keys_of(l, h), static_cast<size_t>(keys_size) * 4);
                std::memcpy(values_of(l, h), other.values_of(l, h), static_cast<size_t>(values_size) * 4);
            }
    }
};

struct Request {
    int64_t num_prompts, num_rows, max_tokens, slots, num_eos;
    const int64_t *prompt_tokens, *prompt_ends, *prompt_of, *eos;
    const uint64_t* streams;
    const double* temperatures;
    int64_t do_sample, top_k;
    double top_p, min_p;
    int64_t* tokens;
    float* logprobs;
    int64_t* lengths;
};

struct Prompt {
    const int64_t* tokens;
    int64_t length, rows_left;
    Floats memory, hidden;
    Block block;
    Prompt(const Model& m, const int64_t* tokens, int64_t length, int64_t rows)
        : tokens(tokens), length(length), rows_left(rows), memory(Block::size(m, length)), hidden(m.hidden),
          block(m, length, memory.data) {}
};

struct Row {
    int64_t number;
    int64_t slot;  // of the keys and values of what it has drawn, the last token excepted; shared by rows that drew the same
    int64_t drawn, last;
    Prompt* prompt;
};
constexpr int64_t NO_SLOT = -1;  // of a row that has drawn nothing

// Rows of one prompt that are handed out together.
struct Unit {
    int64_t prompt, first, count;
};

// A token that goes through the layers. Its place in `block` is where its keys and values are put.
struct Token {
    int64_t id, position, place;
    const Block *block, *prompt;
    int64_t prompt_length;  // of `prompt` that it looks at, besides its own block up to itself
    float* hidden;          // where the result is wanted; null for all but the last token of a prompt
};

struct Team {
    int64_t rank, size;
    void wait() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
    template <typename Work>
    void alone(const Work& work) const {
        if (rank == 0) work();
        wait();
    }
    void share(int64_t n, int64_t& first, int64_t& last) const { first = n * rank / size, last = n * (rank + 1) / size; }
};

// One batch: its slots, its rows, and the memory that they pass through.
class Engine {
public:
    Engine(const Model& model, const Request& request, std::atomic<int64_t>& next, const std::vector<Unit>& units,
           const std::vector<uint8_t>& ended, int64_t slots, int64_t threads)
        : m(model), r(request), next(next), units(units), ended(ended), slots(slots),
          capacity(rounded(request.max_tokens, KEYS)), batch(std::max(slots, PREFILL)),
          logit_rows(std::max<int64_t>(1, std::min(slots, LOGITS / model.vocabulary))),
          own(slots * Block::size(model, capacity)), x(batch * m.hidden), normed(batch * m.hidden),
          qkv(batch * m.qkv_columns()), mixed(batch * m.heads * m.d), act(batch * m.ffn_columns()),
          results(slots * m.hidden), logits(logit_rows * m.vocabulary) {
        for (int64_t slot = 0; slot < slots; slot++)
            blocks.emplace_back(m, capacity, own.data + slot * Block::size(m, capacity));
        prompts.resize(static_cast<size_t>(r.num_prompts));
        int64_t longest = 0;
        for (int64_t p = 0; p < r.num_prompts; p++)
            longest = std::max(longest, r.prompt_ends[p] - (p ? r.prompt_ends[p - 1] : 0));
        stride = rounded(longest, KEYS) + capacity;
        for (int64_t t = 0; t < threads; t++) {
            scores.emplace_back(new Floats(4 * stride + m.d * m.heads));
            weights.emplace_back(new Floats(2 * m.vocabulary));
            parts.emplace_back(m.vocabulary / PART + 1);
        }
    }

    // At most `steps` tokens of each row; whether any row is left.
    bool run(const Team& team, int64_t steps) {
        while (steps-- > 0) {
            team.alone([&] {
                prepare();
                is_idle = live.empty() && entering.empty();
            });
            // Not read from the lists: the first thread may be at the next pass already, changing them.
            if (is_idle) return false;
            for (size_t first = 0; first < queue.size(); first += static_cast<size_t>(batch))
                pass(team, queue.data() + first, std::min<int64_t>(batch, static_cast<int64_t>(queue.size() - first)));
            choose(team);
            team.alone([&] {
                retire();
                part();
            });
        }
        return !live.empty() || !entering.empty() || has_waiting();
    }

private:
    const Model& m;
    const Request& r;
    std::atomic<int64_t>& next;
    const std::vector<Unit>& units;
    const std::vector<uint8_t>& ended;
    const int64_t slots, capacity, batch, logit_rows;
    int64_t stride = 0;
    Floats own, x, normed, qkv, mixed, act, results, logits;
    std::vector<std::unique_ptr<Floats>> scores, weights;
    std::vector<std::vector<double>> parts;
    std::vector<Block> blocks;
    std::vector<std::unique_ptr<Prompt>> prompts;  // those that are in use
    Unit unit = {0, 0, 0};
    std::vector<Row> live, entering;
    bool is_idle = false;
    std::vector<Token> queue;
    int64_t num_going_on = 0;  // tokens of live rows, the first in the queue
    std::vector<int64_t> wanted;
    std::vector<const float*> sources;  // hidden states that go through the head
    std::vector<int64_t> source_of;     // of each live row
    std::vector<int64_t> source_at;     // of each slot that is in use
    std::vector<int64_t> old_slots;     // of each live row, before rows part
    std::vector<uint8_t> is_taken;      // each slot

    bool has_waiting() { return unit.count > 0 || next.load() < static_cast<int64_t>(units.size()); }

    // Let rows enter while there are slots, and list the tokens of this step.
    void prepare() {
        queue.clear();
        live.erase(std::remove_if(live.begin(), live.end(), [&](const Row& row) { return ended[row.number] && leave(row); }),
                   live.end());
        source_at.assign(static_cast<size_t>(slots), NO_SLOT);
        for (const Row& row : live) {
            if (source_at[row.slot] != NO_SLOT) continue;
            source_at[row.slot] = static_cast<int64_t>(queue.size());
            queue.push_back({row.last, row.prompt->length + row.drawn - 1, row.drawn - 1, &blocks[row.slot],
                             &row.prompt->block, row.prompt->length, results.data + (queue.size()) * m.hidden});
        }
        num_going_on = static_cast<int64_t>(queue.size());
        entering.clear();
        while (static_cast<int64_t>(live.size() + entering.size()) < slots && (unit.count > 0 || take_unit())) {
            entering.push_back({unit.first++, NO_SLOT, 0, 0, prompts[unit.prompt].get()});
            unit.count--;
        }
    }

    bool take_unit() {
        const int64_t number = next.fetch_add(1);
        if (number >= static_cast<int64_t>(units.size())) return false;
        unit = units[number];
        std::unique_ptr<Prompt>& prompt = prompts[unit.prompt];
        if (prompt) {
            prompt->rows_left += unit.count;
            return true;
        }
        const int64_t start = unit.prompt ? r.prompt_ends[unit.prompt - 1] : 0, length = r.prompt_ends[unit.prompt] - start;
        prompt.reset(new Prompt(m, r.prompt_tokens + start, length, unit.count));
        for (int64_t i = 0; i < length; i++)
            queue.push_back({prompt->tokens[i], i, i, &prompt->block, nullptr, 0, i + 1 == length ? prompt->hidden.data : nullptr});
        return true;
    }

    // The last row of a prompt takes the prompt along.
    bool leave(const Row& row) {
        if (--row.prompt->rows_left == 0) prompts[r.prompt_of[row.number]].reset();
        return true;
    }

    void multiply(const Team& team, const float* a, int64_t a_row, const float* packed, const float* bias, int64_t rows,
                  int64_t depth, int64_t columns, float* c, int64_t c_row, int64_t mode) {
        const Product product = {a, a_row, packed, bias, rows, depth, columns, c, c_row, mode};
        int64_t first, last;
        team.share(rounded(columns, STRIP) / STRIP, first, last);
        arithmetic.product(product, first, last);
        team.wait();
    }

    void norm(const Team& team, int64_t rows, const float* weight) {
        int64_t first, last;
        team.share(rows, first, last);
        for (int64_t i = first; i < last; i++)
            arithmetic.rms_norm(x.data + i * m.hidden, weight, m.hidden, m.eps, normed.data + i * m.hidden);
        team.wait();
    }

    // Norm and turn queries and keys, and store keys and values.
    void store(const Team& team, const Token* tokens, int64_t rows, int64_t l) {
        const Layer& layer = m.layers[l];
        int64_t first, last;
        team.share(rows, first, last);
        std::vector<float> head(m.d);
        for (int64_t i = first; i < last; i++) {
            const Token& token = tokens[i];
            float* const row = qkv.data + i * m.qkv_columns();
            const float *cosine = m.cosine + token.position * m.d, *sine = m.sine + token.position * m.d;
            for (int64_t h = 0; h < m.heads + m.kv_heads; h++) {
                const float* weight = h < m.heads ? layer.q_norm : layer.k_norm;
                if (weight)
                    arithmetic.rms_norm(row + h * m.d, weight, m.d, m.eps, head.data());
                else
                    std::memcpy(head.data(), row + h * m.d, static_cast<size_t>(m.d) * 4);
                arithmetic.turn(head.data(), m.d, cosine, sine, row + h * m.d);
            }
            const float *keys = row + m.heads * m.d, *values = keys + m.kv_heads * m.d;
            for (int64_t h = 0; h < m.kv_heads; h++)
                token.block->put(l, h, token.place, keys + h * m.d, values + h * m.d);
        }
        team.wait();
    }

    // `mixed [i]` from the query of token `wanted[i]`.
    void attend(const Team& team, const Token* tokens, int64_t l) {
        const int64_t group = m.heads / m.kv_heads, n = static_cast<int64_t>(wanted.size()) * m.kv_heads;
        const float k = LOG2E / std::sqrt(static_cast<float>(m.d));
        for (int64_t pair = team.rank; pair < n; pair += team.size) {
            const int64_t i = pair / m.kv_heads, h = pair % m.kv_heads;
            const Token& token = tokens[wanted[i]];
            Span spans[2] = {};
            if (token.prompt) spans[0] = {token.prompt->keys_of(l, h), token.prompt->values_of(l, h), token.prompt_length};
            spans[1] = {token.block->keys_of(l, h), token.block->values_of(l, h), token.place + 1};
            arithmetic.attend(qkv.data + wanted[i] * m.qkv_columns() + h * group * m.d, group, m.d, m.width(), spans, k,
                              scores[team.rank]->data, stride, mixed.data + (i * m.heads + h * group) * m.d);
        }
        team.wait();
    }

    // Some tokens through all layers. In the last one only what is wanted goes on from attention.
    void pass(const Team& team, const Token* tokens, int64_t rows) {
        const int64_t hidden = m.hidden, size = static_cast<int64_t>(hidden) * 4;
        team.alone([&] {
            wanted.clear();
            for (int64_t i = 0; i < rows; i++) wanted.push_back(i);
            for (int64_t i = 0; i < rows; i++)
                std::memcpy(x.data + i * hidden, m.embedding + tokens[i].id * hidden, static_cast<size_t>(size));
        });
        for (int64_t l = 0; l < m.num_layers; l++) {
            const Layer& layer = m.layers[l];
            norm(team, rows, layer.norm);
            multiply(team, normed.data, hidden, layer.qkv, layer.qkv_bias, rows, hidden, m.qkv_columns(), qkv.data,
                     m.qkv_columns(), STORE);
            store(team, tokens, rows, l);
            if (l + 1 == m.num_layers) {
                team.alone([&] { narrow(tokens, rows); });
                rows = static_cast<int64_t>(wanted.size());
                // All have read `wanted` before the next pass changes it.
                if (rows == 0) return team.wait();
            }
            attend(team, tokens, l);
            multiply(team, mixed.data, m.heads * m.d, layer.out, layer.out_bias, rows, m.heads * m.d, hidden, x.data,
                     hidden, ADD);
            norm(team, rows, layer.mlp_norm);
            multiply(team, normed.data, hidden, layer.gate_up, layer.gate_up_bias, rows, hidden, 2 * m.ffn_columns(),
                     act.data, m.ffn_columns(), GATED);
            multiply(team, act.data, m.ffn_columns(), layer.down, layer.down_bias, rows, m.ffn, hidden, x.data, hidden, ADD);
        }
        team.alone([&] {
            for (int64_t i = 0; i < rows; i++)
                arithmetic.rms_norm(x.data + i * hidden, m.norm, hidden, m.eps, tokens[wanted[i]].hidden);
        });
    }

    void narrow(const Token* tokens, int64_t rows) {
        wanted.clear();
        for (int64_t i = 0; i < rows; i++) {
            if (!tokens[i].hidden) continue;
            std::memmove(x.data + static_cast<int64_t>(wanted.size()) * m.hidden, x.data + i * m.hidden,
                         static_cast<size_t>(m.hidden) * 4);
            wanted.push_back(i);
        }
    }

    // The next token of every live row and the first of every entering one.
    void choose(const Team& team) {
        team.alone([&] {
            sources.clear();
            source_of.clear();
            for (int64_t i = 0; i < num_going_on; i++) sources.push_back(results.data + i * m.hidden);
            for (const Row& row : live) source_of.push_back(source_at[row.slot]);
            for (const Row& row : entering) {
                if (sources.empty() || sources.back() != row.prompt->hidden.data) sources.push_back(row.prompt->hidden.data);
                source_of.push_back(static_cast<int64_t>(sources.size()) - 1);
            }
            live.insert(live.end(), entering.begin(), entering.end());
            entering.clear();
        });
        const int64_t n = static_cast<int64_t>(sources.size());
        for (int64_t start = 0; start < n; start += logit_rows) {
            const int64_t rows = std::min(logit_rows, n - start);
            team.alone([&] {
                for (int64_t i = 0; i < rows; i++)
                    std::memcpy(normed.data + i * m.hidden, sources[start + i], static_cast<size_t>(m.hidden) * 4);
            });
            multiply(team, normed.data, m.hidden, m.head, m.head_bias, rows, m.hidden, m.vocabulary, logits.data,
                     m.vocabulary, STORE);
            for (int64_t i = team.rank; i < static_cast<int64_t>(live.size()); i += team.size)
                if (source_of[i] >= start && source_of[i] < start + rows)
                    draw(live[i], logits.data + (source_of[i] - start) * m.vocabulary, weights[team.rank]->data,
                         parts[team.rank].data());
            team.wait();
        }
    }

    void draw(Row& row, const float* z, float* weight, double* part) {
        const float inv_temperature = static_cast<float>(1.0 / r.temperatures[row.number]);
        const float maximum = arithmetic.highest_in(z, m.vocabulary);
        const double total = arithmetic.weigh_row({m.vocabulary, inv_temperature}, z, maximum, weight, part);
        int64_t id = 0;
        if (!r.do_sample)
            while (id + 1 < m.vocabulary && z[id] != maximum) id++;
        else if (r.top_k > 0 || r.top_p < 1.0 || r.min_p > 0.0)
            id = pick_cut(weight, uniform(r.streams[row.number], row.drawn));
        else
            id = pick(weight, part, total, uniform(r.streams[row.number], row.drawn));
        const int64_t at = row.number * r.max_tokens + row.drawn;
        r.tokens[at] = row.last = id;
        r.logprobs[at] = static_cast<float>(static_cast<double>(z[id] - maximum) * inv_temperature - std::log(total));
        row.drawn++;
    }

    // plugins/grpoforge_plugins/samplers/streams.py
    static double uniform(uint64_t stream, int64_t token) {
        uint64_t state = stream + static_cast<uint64_t>(token + 1) * 0x9E3779B97F4A7C15u;
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
        state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
        return static_cast<double>((state ^ (state >> 31)) >> 12) * 0x1p-52;
    }

    // The first token whose cumulative weight exceeds u times the total.
    int64_t pick(const float* weight, const double* part, double total, double u) const {
        const double target = u * total;
        double sum = 0.0;
        int64_t id = 0, last = 0;
        for (int64_t p = 0; id < m.vocabulary && sum + part[p] <= target; p++, id += PART) sum += part[p];
        for (; id < m.vocabulary; id++) {
            sum += weight[id];
            if (weight[id] > 0.0f) last = id;
            if (sum > target) return id;
        }
        while (last == 0 && id-- > 1)
            if (weight[id] > 0.0f) last = id;  // rounding: the last that has any
        return last;
    }

    int64_t pick_cut(float* weight, double u) const {
        const float least = least_kept(weight, weight + m.vocabulary);
        double total = 0.0, sum = 0.0;
        for (int64_t id = 0; id < m.vocabulary; id++) total += weight[id] >= least ? weight[id] : 0.0f;
        int64_t last = 0;
        for (int64_t id = 0; id < m.vocabulary; id++) {
            if (weight[id] < least) continue;
            last = id;
            sum += weight[id];
            if (sum > u * total) break;
        }
        return last;
    }

    // As `_kept` of plugins/grpoforge_plugins/samplers/inverse_cdf.py; sorts no more than it needs.
    float least_kept(const float* weight, float* ordered) const {
        const float least = static_cast<float>(r.min_p);
        if (r.top_k == 0 && r.top_p >= 1.0) return least;
        std::copy(weight, weight + m.vocabulary, ordered);
        const int64_t count = r.top_k > 0 ? std::min(r.top_k, m.vocabulary) : m.vocabulary;
        const auto descending = [](float a, float b) { return a > b; };
        if (count < m.vocabulary) std::nth_element(ordered, ordered + count - 1, ordered + m.vocabulary, descending);
        double total = 0.0, before = 0.0;
        for (int64_t i = 0; i < count; i++) total += ordered[i];
        for (int64_t done = 0, some = 256; done < count; some *= 8) {
            const int64_t until = std::min(count, done + some);
            std::partial_sort(ordered + done, ordered + until, ordered + count, descending);
            for (; done < until; done++) {
                before += ordered[done];
                if (before >= r.top_p * total) return std::max(least, ordered[done]);
            }
        }
        return std::max(least, ordered[count - 1]);
    }

    void retire() {
        live.erase(std::remove_if(live.begin(), live.end(), [&](const Row& row) {
            r.lengths[row.number] = row.drawn;
            const bool is_end = std::find(r.eos, r.eos + r.num_eos, row.last) != r.eos + r.num_eos;
            return (is_end || row.drawn == r.max_tokens) && leave(row);
        }), live.end());
    }

    // Rows that shared a slot and drew different tokens get slots of their own, with a copy of what they shared. There are
    // enough: no more rows are live than there are slots.
    void part() {
        old_slots.clear();
        for (const Row& row : live) old_slots.push_back(row.slot);
        is_taken.assign(static_cast<size_t>(slots), 0);
        for (size_t i = 0; i < live.size(); i++) {
            const int64_t first = first_like(static_cast<int64_t>(i)), old = old_slots[i];
            if (first != static_cast<int64_t>(i) || old == NO_SLOT || is_taken[old])
                live[i].slot = NO_SLOT;
            else
                is_taken[old] = 1;
        }
        int64_t free = 0;
        for (size_t i = 0; i < live.size(); i++) {
            if (live[i].slot != NO_SLOT) continue;
            const int64_t first = first_like(static_cast<int64_t>(i)), old = old_slots[i];
            if (first != static_cast<int64_t>(i)) {
                live[i].slot = live[first].slot;
                continue;
            }
            while (is_taken[free]) free++;
            is_taken[free] = 1;
            live[i].slot = free;
            if (old != NO_SLOT) blocks[free].copy(blocks[old], live[i].drawn - 1);
        }
    }

    // The first live row that has drawn the same tokens as row i, of its neighbors that go on from the same prompt.
    int64_t first_like(int64_t i) const {
        const Row& row = live[i];
        int64_t first = i;
        for (int64_t j = i - 1; j >= 0 && live[j].prompt == row.prompt; j--)
            if (old_slots[j] == old_slots[i] && live[j].drawn == row.drawn && live[j].last == row.last) first = j;
        return first;
    }
};

struct Decoding {
    Model model;
    std::vector<Layer> layers;
    Request request;
    std::atomic<int64_t> next{0};
    std::vector<Unit> units;
    std::vector<uint8_t> ended;
    std::vector<std::unique_ptr<Engine>> engines;
    int64_t threads;
    bool is_shared;  // one batch for all threads
};

// Groups, split where there are fewer than threads could work on.
void make_units(Decoding& d) {
    const Request& r = d.request;
    const int64_t pieces = d.is_shared ? 1 : (2 * d.threads + r.num_prompts - 1) / r.num_prompts;
    for (int64_t row = 0; row < r.num_rows;) {
        int64_t end = row;
        while (end < r.num_rows && r.prompt_of[end] == r.prompt_of[row]) end++;
        const int64_t some = (end - row + pieces - 1) / pieces;
        for (; row < end; row += some) d.units.push_back({r.prompt_of[row], row, std::min(some, end - row)});
        row = end;
    }
}

// Sixteen columns of a row-major matrix at a time, so that a line of the cache is read once.
void pack_strip(const float* w, int64_t num_columns, int64_t depth, int64_t strip, float* packed) {
    float* const to = packed + strip * depth * STRIP;
    const int64_t first = strip * STRIP;
    for (int64_t k = 0; k < depth; k += 16)
        for (int64_t n = 0; n < STRIP; n++)
            for (int64_t i = k; i < std::min(k + 16, depth); i++)
                to[i * STRIP + n] = first + n < num_columns ? w[(first + n) * depth + i] : 0.0f;
}

}  // namespace

extern "C" {

// w [num_columns, depth] to packed [strips][depth][STRIP]; large pages where the system gives them.
void grpoforge_pack(const float* w, int64_t num_columns, int64_t depth, float* packed, int32_t num_threads) {
    const int64_t strips = rounded(num_columns, STRIP) / STRIP;
#ifdef __linux__
    const uintptr_t large = uintptr_t{1} << 21, from = (reinterpret_cast<uintptr_t>(packed) + large - 1) & ~(large - 1);
    const uintptr_t to = reinterpret_cast<uintptr_t>(packed + strips * depth * STRIP) & ~(large - 1);
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t strip = 0; strip < strips; strip++) pack_strip(w, num_columns, depth, strip, packed);
}

// c = a b, c += a b or the gated product, for tests: the decoder's arithmetic by itself.
void grpoforge_decode_product(
    const float* a, const float* packed, const float* bias, int64_t rows, int64_t depth, int64_t columns, float* c,
    int64_t c_row, int64_t mode) {
    arithmetic.product({a, depth, packed, bias, rows, depth, columns, c, c_row, mode}, 0, rounded(columns, STRIP) / STRIP);
}

// sizes: layers, hidden, heads, kv_heads, d, ffn, vocabulary. tensors: LAYER_TENSORS for each layer, then embedding, norm,
// head, head_bias, cosine, sine. request: as in Request. What they point at must live until `grpoforge_decode_end`.
void* grpoforge_decode_begin(
    const int64_t* sizes, float eps, const float* const* tensors, const Request* request, int64_t num_threads,
    int64_t is_shared) {
    auto d = std::make_unique<Decoding>();
    const float* const* rest = tensors + sizes[0] * LAYER_TENSORS;
    d->layers.resize(static_cast<size_t>(sizes[0]));
    std::memcpy(static_cast<void*>(d->layers.data()), tensors, static_cast<size_t>(sizes[0]) * sizeof(Layer));
    d->model = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], eps,
                rest[0], rest[1], rest[2], rest[3], rest[4], rest[5], d->layers.data()};
    d->request = *request;
    d->threads = num_threads;
    d->is_shared = is_shared != 0;
    d->ended.resize(static_cast<size_t>(request->num_rows));
    make_units(*d);
    const int64_t slots = std::min(request->slots, request->num_rows);
    const int64_t engines = d->is_shared ? 1 : std::min<int64_t>({num_threads, slots, static_cast<int64_t>(d->units.size())});
    for (int64_t e = 0; e < engines; e++) {
        const int64_t own = slots * (e + 1) / engines - slots * e / engines;
        d->engines.push_back(std::make_unique<Engine>(
            d->model, d->request, d->next, d->units, d->ended, own, d->is_shared ? num_threads : 1));
    }
    return d.release();
}

// Goes on for at most `steps` tokens of each row; whether any row is left.
int32_t grpoforge_decode_run(void* decoding, int64_t steps) {
    Decoding& d = *static_cast<Decoding*>(decoding);
    std::atomic<int32_t> left{0};
    if (d.is_shared) {
#pragma omp parallel num_threads(d.threads) if (d.threads > 1)
        {
#ifdef _OPENMP
            const Team team = {omp_get_thread_num(), omp_get_num_threads()};
#else
            const Team team = {0, 1};
#endif
            const bool is_left = d.engines[0]->run(team, steps);
            if (team.rank == 0) left = is_left;
        }
        return left;
    }
#pragma omp parallel for schedule(static, 1) num_threads(d.engines.size()) if (d.engines.size() > 1)
    for (size_t e = 0; e < d.engines.size(); e++)
        if (d.engines[e]->run({0, 1}, steps)) left = 1;
    return left;
}

// Ends a row between two runs.
void grpoforge_decode_stop(void* decoding, int64_t row) {
    static_cast<Decoding*>(decoding)->ended[static_cast<size_t>(row)] = 1;
}

void grpoforge_decode_end(void* decoding) { delete static_cast<Decoding*>(decoding); }

}  // extern "C"
