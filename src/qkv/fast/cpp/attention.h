// Attention of one sequence: few queries over keys as they lie, many by matrix products.

#pragma once

#include <cmath>

#include "products.h"

namespace {

struct Keys {  // of one sequence and some heads: rows `stride` numbers apart, bfloat16 if `half`, else float32
    const char *key, *value;
    int count, stride, half;

    Keys from(int64_t number) const { return {key + number * size(), value + number * size(), count, stride, half}; }
    int size() const { return half ? 2 : 4; }
    V number(const char *row, int e) const { return half ? ::number<BF16>(row, e) : ::number<FP32>(row, e); }
};

// A row in pieces of two vectors, and perhaps of one at the end: use(its first number, how many vectors).
template <class Use>
[[gnu::always_inline]] inline void each_piece(int width, Use use) {
    int e = 0;
    for (; e + 2 * LANES <= width; e += 2 * LANES) use(e, std::integral_constant<int, 2>{});
    if (e < width) use(e, std::integral_constant<int, 1>{});
}

// A piece of keys or values. Of bfloat16 two vectors are the even numbers and the odd ones, which takes the least effort.
template <bool HALF, int N>
[[gnu::always_inline]] inline void piece(const char *row, int e, V *x) {
    if constexpr (HALF && N == 2) {
        I both = read<I>(row + e * 2);
        x[0] = (V)(both << 16);
        x[1] = (V)(both & set((int32_t)0xFFFF0000));
    } else {
        for (int n = 0; n < N; n++) x[n] = number<HALF ? BF16 : FP32>(row, e + n * LANES);
    }
}

// Numbers of a query in the order of a piece, and of an answer back from it.
template <bool HALF, int N>
[[gnu::always_inline]] inline void unzip(const float *from, float *to) {
    for (int i = 0; i < LANES; i++)
        for (int n = 0; n < N; n++) to[n * LANES + i] = from[HALF && N == 2 ? 2 * i + n : n * LANES + i];
}
template <bool HALF, int N>
[[gnu::always_inline]] inline void zip(const float *from, float *to) {
    for (int i = 0; i < LANES; i++)
        for (int n = 0; n < N; n++) to[HALF && N == 2 ? 2 * i + n : n * LANES + i] = from[n * LANES + i];
}

// The keys that one query sees, as they lie, with some heads: all heads of some keys are read while the next come from
// memory. Queries and answers have the numbers of each head as its pieces have them.
template <bool HALF>
struct Seen {
    Keys keys;
    const int32_t *index;  // which of the keys
    int count, heads, E;

    void score(const float *query, float *scores, int width) const {  // (heads, width)
        float rate = 1 / std::sqrt((float)E);
        const char *row[LANES];
        for (int j = 0; j < count; j += LANES) {
            int some = find(keys.key, j, LANES, row);
            for (int h = 0; h < heads; h++) {
                V total[LANES];
#pragma GCC unroll 16
                for (int k = 0; k < LANES; k++) {
                    total[k] = set(0.0f);
                    if (k >= some) continue;
                    fetch(row[k], h, LANES);
                    each_piece(E, [&](int e, auto n) {
                        V x[n];
                        piece<HALF, n>(row[k], h * E + e, x);
                        for (int v = 0; v < n; v++) total[k] += x[v] * load(query + h * E + e + v * LANES);
                    });
                }
                store(scores + h * width + j, sums(total) * rate);
            }
        }
    }

    void add_up(const float *shares, int width, float *answer) const {
        constexpr int SOME = 8;
        const char *row[SOME];
        std::fill(answer, answer + heads * E, 0.0f);
        for (int j = 0; j < count; j += SOME) {
            int some = find(keys.value, j, SOME, row);
            for (int h = 0; h < heads; h++) {
                const float *share = shares + h * width + j;
                for (int k = 0; k < some; k++) fetch(row[k], h, SOME);
                each_piece(E, [&](int e, auto n) {
                    float *to = answer + h * E + e;
                    V total[n], x[n];
                    for (int v = 0; v < n; v++) total[v] = load(to + v * LANES);
#pragma GCC unroll 8
                    for (int k = 0; k < SOME; k++) {
                        if (k >= some) break;
                        piece<HALF, n>(row[k], h * E + e, x);
                        for (int v = 0; v < n; v++) total[v] += x[v] * share[k];
                    }
                    for (int v = 0; v < n; v++) store(to + v * LANES, total[v]);
                });
            }
        }
    }

private:
    int64_t stride() const { return (int64_t)keys.stride * keys.size(); }

    int find(const char *first, int j, int most, const char **row) const {  // keys j on: how many there are
        int some = std::min(most, count - j);
        for (int k = 0; k < some; k++) row[k] = first + index[j + k] * stride();
        return some;
    }

    void fetch(const char *row, int head, int further) const {  // a head of the row so many rows further
        int bytes = E * keys.size();
        for (int i = 0; i < bytes; i += 64) __builtin_prefetch(row + head * bytes + further * stride() + i, 0, 2);
    }
};

// One query after another, for the few of a decoding step. `index` (keys) and `scores` (heads, width) are scratch.
template <bool HALF, int P, int O>
void attend_rows(Table<P> query, int rows, Keys keys, int heads, int E, int causal, const uint8_t *mask, Table<O> out, int32_t *index, float *scores, int width) {
    alignas(64) float line[8192], own[8192];  // as numbers come, and as pieces have them
    for (int i = 0; i < rows; i++) {
        int last = causal && !mask ? keys.count - rows + 1 + i : keys.count, count = 0;
        for (int j = 0; j < last; j++)
            if (!mask || mask[(int64_t)i * keys.count + j]) index[count++] = j;
        Seen<HALF> seen{keys, index, count, heads, E};
        auto each_piece_of_heads = [&](auto work) {
            for (int h = 0; h < heads; h++) each_piece(E, [&](int e, auto n) { work(h * E + e, n); });
        };
        for (int e = 0; e < heads * E; e += LANES) store(line + e, query.get(i, e));
        each_piece_of_heads([&](int e, auto n) { unzip<HALF, n>(line + e, own + e); });
        seen.score(own, scores, width);
        for (int h = 0; h < heads; h++) softmax(scores + h * width, count);
        seen.add_up(scores, width, own);
        each_piece_of_heads([&](int e, auto n) { zip<HALF, n>(own + e, line + e); });
        for (int e = 0; e < heads * E; e += LANES) out.put(i, e, load(line + e));
    }
}

// What it is computed in where the products with weights are in a precision: never in int8, and in bfloat16 only by
// an instruction for it.
template <int P>
constexpr int ATTENTION = P == FP32 || PARTS<BF16> > 1 ? FP32 : BF16;

// Many queries: keys and values are packed as matrices and multiplied, HEIGHT queries at a time.
struct Attention {
    char *keys, *values;  // panels
    float *scores;        // (HEIGHT, keys)
    Rows query, share;

    template <int P>
    void lay(Arena &arena, int longest, int E) {
        constexpr int HIGH = HEIGHT<P>;
        int padded = panels_of<P>(longest) * WIDTH<P>, wide = steps_of(P, E), deep = steps_of(P, padded);
        keys = arena.take<char>(panels_of<P>(longest) * panel_bytes<P>(wide));
        values = arena.take<char>(panels_of<P>(E) * panel_bytes<P>(deep));
        scores = arena.take<float>(HIGH * padded);
        query = {arena.take<char>(HIGH * stride_of(wide)), wide};
        share = {arena.take<char>(HIGH * stride_of(deep)), deep};
    }

    template <int P, int O>
    void attend(Table<P> queries, int rows, Keys from, int E, int causal, Table<O> out) {
        constexpr int HIGH = HEIGHT<P>, MOST = 256;
        int padded = panels_of<P>(from.count) * WIDTH<P>, wide = steps_of(P, E), deep = steps_of(P, padded);
        pack_keys<P>(from, E);
        pack_values<P>(from, E);
        float rate = 1 / std::sqrt((float)E);
        alignas(64) float made[HIGH * MOST];
        for (int i = 0; i < rows; i += HIGH) {
            int height = std::min(HIGH, rows - i);
            int last = causal ? from.count - rows + i + height : from.count;  // keys that the last of them sees
            for (int m = 0; m < height; m++) {
                for (int e = 0; e < E; e += LANES) put<P>(query.row(m), e, queries.get(i + m, e) * rate);
                pad<P>(query, m, E);
            }
            for (int p = 0; p * WIDTH<P> < last; p++) {
                int vectors = vectors_of<P>(last - p * WIDTH<P>);
                product<P>(query, 0, height, keys + p * panel_bytes<P>(wide), wide, vectors, scores + p * WIDTH<P>, padded);
            }
            int inner = (last + LANES - 1) / LANES * LANES;
            for (int m = 0; m < height; m++) {
                float *row = scores + m * padded;
                int seen = causal ? last - height + 1 + m : last;
                softmax(row, seen);
                std::fill(row + seen, row + inner, 0.0f);
                convert<P>(row, inner, share, m);
            }
            for (int p = 0; p * WIDTH<P> < E; p++) {
                int vectors = vectors_of<P>(E - p * WIDTH<P>);
                product<P>(share, 0, height, values + p * panel_bytes<P>(deep), steps_of(P, last), vectors, made + p * WIDTH<P>, MOST);
            }
            for (int m = 0; m < height; m++)
                for (int e = 0; e < E; e += LANES) out.put(i + m, e, load(made + m * MOST + e));
        }
    }

private:
    template <int P>
    void pack_keys(Keys from, int E) {  // (panels, steps of E, WIDTH, n)
        int steps = steps_of(P, E);
        alignas(64) float key[256];
        alignas(64) int32_t packed[256];
        for (int j = 0; j < from.count; j++) {
            const char *row = from.key + (int64_t)j * from.stride * from.size();
            for (int e = 0; e < E; e += LANES) store(key + e, from.number(row, e));
            convert<P>(key, E, {(char *)packed, steps}, 0);
            scatter<P>(packed, steps, (int32_t *)keys + (int64_t)(j / WIDTH<P>) * steps * WIDTH<P> + j % WIDTH<P>);
        }
    }

    template <int P>
    void pack_values(Keys from, int E) {  // (panels, steps of keys, WIDTH, n)
        int steps = steps_of(P, panels_of<P>(from.count) * WIDTH<P>);
        auto value = [&](int j, int e) {
            const char *row = from.value + (int64_t)j * from.stride * from.size();
            return j >= from.count ? set(0.0f) : from.number(row, e);
        };
        for (int j = 0; j < steps_of(P, from.count) * ELEMENTS<P>; j += ELEMENTS<P>)
            for (int e = 0; e < E; e += LANES) {
                auto both = (U)value(j, e);
                if constexpr (P != FP32) {
                    auto one = __builtin_convertvector(to_bf16((V)both), U), next = __builtin_convertvector(to_bf16(value(j + 1, e)), U);
                    both = one | next << 16;
                }
                char *line = values + e / WIDTH<P> * panel_bytes<P>(steps) + panel_bytes<P>(j / ELEMENTS<P>);
                write(line + e % WIDTH<P> * 4, both);
            }
    }
};

}  // namespace
