// The blocks of a Transformer on x86 CPUs: what layers.Block computes, without a framework between.
//
// Many sequences are shared out to the threads, and each takes its own through all layers while they stay in its
// cache; few tokens are computed by all threads together, each with its part of every matrix.
//
// Legend: T tokens, D model width, H heads, E = D / H head width, F inner width, L tokens of a sequence.

#include <numeric>

#include <omp.h>

#include "attention.h"

namespace {

constexpr int CHUNK = 128;  // tokens that a thread takes through the layers at once, or one sequence
constexpr int LARGE_LAYER = 4 << 20;  // bytes of a layer that stays in no near cache: then it is read for twice as many tokens

thread_local Arena own_arena;

// work(A) with an activation that the compiler knows.
template <class Work>
void with_activation(int activation, Work work) {
    each<ACTIVATIONS>([&](auto A) {
        if (activation == A) work(A);
    });
}

// ---------------------------------------------------------------- a block

void normalise(const Norm &norm, const float *x, float *out, int width) {
    V total = set(0.0f), squares = set(0.0f);
    for (int i = 0; i < width; i += LANES) total += load(x + i);
    float mean = sum(total) / width;
    for (int i = 0; i < width; i += LANES) squares += (load(x + i) - mean) * (load(x + i) - mean);
    float rate = 1 / std::sqrt(sum(squares) / width + norm.eps);
    for (int i = 0; i < width; i += LANES)
        store(out + i, (load(x + i) - mean) * rate * load(norm.weight + i) + load(norm.bias + i));
}

class Computation {  // some sequences of a batch on their way through the layers
    const Stack &stack;
    const Batch &batch;
    int from, to, rows;    // sequences, and their tokens
    int64_t first_row;     // of their tokens among all
    float *x, *answer, *scores, *input_scale;
    char *inputs, *wide, *inner;
    int32_t *seen;
    int score_width;
    std::vector<Attention> attentions;  // one for each thread

public:
    Computation(const Stack &stack, const Batch &batch, int from, int to, int64_t first_row, int rows, int threads, Arena &arena)
        : stack(stack), batch(batch), from(from), to(to), rows(rows), first_row(first_row), attentions(threads) {
        x = batch.x + first_row * stack.dim;
        int whole = stack.precision == INT8 ? stack.mlp_dim : 0;  // of the inner layer
        int in = std::max(stack.dim, whole);
        int longest = 1;
        for (int i = from; i < to; i++) {
            longest = std::max(longest, batch.keys ? batch.key_lengths[i] : batch.lengths[i]);
            if (batch.memory_keys) longest = std::max(longest, batch.memory_lengths[i]);
        }
        score_width = longest + 16;  // softmax writes whole vectors
        arena.lay([&] {
            with(stack.precision, [&](auto P) { wide = arena.take<char>((size_t)rows * std::max(3 * stack.dim * bytes_of(ATTENTION<P>), whole * 4)); });
            answer = arena.take<float>(stack.precision == INT8 ? (size_t)rows * stack.dim : 0);
            inputs = arena.take<char>(whole_tiles(rows) * stride_of(steps_of(stack.precision, in)));
            with(stack.precision, [&](auto P) { inner = arena.take<char>(P == INT8 ? 0 : whole_tiles(rows) * stride_of(steps_of(P, inner_at_once<P>()))); });
            input_scale = arena.take<float>(rows);
            scores = arena.take<float>((size_t)threads * stack.heads * score_width);
            seen = arena.take<int32_t>((size_t)threads * score_width);
            for (Attention &one : attentions) {
                with(stack.precision, [&](auto P) { one.lay<ATTENTION<P>>(arena, longest, stack.dim / stack.heads); });
            }
        });
    }

    template <int P>
    void run(Team team) {
        const Norm *norm = nullptr;  // post-norm: what is still to be done to x
        for (int l = batch.first; l < batch.last; l++) {
            const Layer &layer = stack.layers[l];
            int D = stack.dim;
            bool shown = l + 1 == batch.last;
            prepare<P>(team, layer.attention, norm, layer.qkv);
            project<P>(team, layer.qkv, projected<P>(3 * D));
            attend<P>(team, l);
            if (shown && batch.seen_qkv) show(team, projected<P>(3 * D), 3 * D, batch.seen_qkv);
            if (shown && batch.seen_answer) show(team, answers<P>(), D, batch.seen_answer);
            join<P>(team, layer.out);
            norm = &layer.attention;
            if (layer.cross_query.weight) {
                prepare<P>(team, layer.cross, norm, layer.cross_query);
                project<P>(team, layer.cross_query, projected<P>(D));
                read_memory<P>(team, l);
                if (shown && batch.seen_query) show(team, projected<P>(D), D, batch.seen_query);
                if (shown && batch.seen_cross) show(team, answers<P>(), D, batch.seen_cross);
                join<P>(team, layer.cross_out);
                norm = &layer.cross;
            }
            prepare<P>(team, layer.mlp, norm, layer.up);
            with_activation(stack.activation, [&](auto A) { feed_forward<P, A>(team, layer.up, layer.down); });
            norm = &layer.mlp;
        }
        if (!stack.norm_first && norm)
            each_row(team, [&](int row) { normalise(*norm, x + (int64_t)row * stack.dim, x + (int64_t)row * stack.dim, stack.dim); });
    }

private:
    template <class Do>
    void each_row(Team team, Do work) {
        for (int row = rows * team.rank / team.size; row < rows * (team.rank + 1) / team.size; row++) work(row);
    }

    template <int P>
    int inner_at_once() const { return rows <= HEIGHT<P> ? stack.mlp_dim : std::min(DEEP<P>, stack.mlp_dim); }

    // Where rows are laid to be multiplied by a matrix.
    template <int P>
    Rows input(const Matrix &matrix) const {
        return {inputs, steps_of(P, matrix.in), input_scale, &matrix};
    }

    // What the queries, keys and values of a layer are, or only its queries for another's.
    template <int P>
    Table<ATTENTION<P>> projected(int width) const {
        return {wide, width};
    }

    // What attention answers: where its output projection reads it, but for int8, which has to see a row as a whole.
    template <int P>
    auto answers() const {
        if constexpr (P == INT8) return Table<FP32>{(char *)answer, stack.dim};
        else return Table<P>{inputs, stride_of(steps_of(P, stack.dim)) / bytes_of(P)};
    }

    // The input of a sub-layer. Pre-norm: its norm of x. Post-norm: x, once the norm before it is done.
    template <int P>
    void prepare(Team team, const Norm &own, const Norm *before, const Matrix &matrix) {
        int D = stack.dim;
        Rows to = input<P>(matrix);
        each_row(team, [&](int row) {
            float *line = x + (int64_t)row * D;
            if (stack.norm_first) {
                float normed[8192];
                normalise(own, line, normed, D);
                convert<P>(normed, D, to, row);
            } else {
                if (before) normalise(*before, line, line, D);
                convert<P>(line, D, to, row);
            }
        });
        team.wait();
    }

    // What is prepared W^T + bias.
    template <int P, int O>
    void project(Team team, const Matrix &matrix, Table<O> out) {
        multiply<P>(matrix, input<P>(matrix), rows, team, [&](int row, int column, V value, int) { out.put(row, column, value); });
        team.wait();
    }

    // Numbers (rows, in) to where they are multiplied by a matrix.
    template <int P>
    void lay(Team team, const Matrix &matrix, const float *numbers) {
        Rows to = input<P>(matrix);
        each_row(team, [&](int row) { convert<P>(numbers + (int64_t)row * matrix.in, matrix.in, to, row); });
        team.wait();
    }

    // x += answers W^T + bias
    template <int P>
    void join(Team team, const Matrix &matrix) {
        if constexpr (P == INT8) lay<P>(team, matrix, answer);
        add_product_to_x<P>(team, matrix, input<P>(matrix));
    }

    template <int P>
    void add_product_to_x(Team team, const Matrix &matrix, const Rows &from) {
        multiply<P>(matrix, from, rows, team, [&](int row, int column, V value, int) {
            float *sum = x + (int64_t)row * stack.dim + column;
            store(sum, load(sum) + value);
        });
        team.wait();
    }

    // x += activation(what is prepared, by `up`) by `down`. Many rows take a part of the inner layer at a time, which
    // stays near; int8 has to see a row of it as a whole.
    template <int P, int A>
    void feed_forward(Team team, const Matrix &up, const Matrix &down) {
        if constexpr (P == INT8) {
            float *made = (float *)wide;
            multiply<P>(up, input<P>(up), rows, team, [&](int row, int column, V value, int) {
                store(made + (int64_t)row * stack.mlp_dim + column, activate<A, P != FP32>(value));
            });
            team.wait();
            lay<P>(team, down, made);
            add_product_to_x<P>(team, down, input<P>(down));
        } else {
            int most = inner_at_once<P>();
            for (int first = 0; first < stack.mlp_dim; first += most) {
                int count = std::min(most, stack.mlp_dim - first);
                Rows made{inner, steps_of(P, count)};
                multiply<P>(columns<P>(up, first, count), input<P>(up), rows, team, [&](int row, int column, V value, int) {
                    put<P>(made.row(row), column, activate<A, P != FP32>(value));
                });
                each_row(team, [&](int row) { pad<P>(made, row, count); });
                team.wait();
                add_product_to_x<P>(team, inputs_from<P>(down, first), made);
            }
        }
    }

    template <int P>
    void show(Team team, Table<P> made, int width, float *out) {
        each_row(team, [&](int row) {
            for (int i = 0; i < width; i += LANES) store(out + (first_row + row) * width + i, made.get(row, i));
        });
        team.wait();
    }

    // Of one sequence, some heads from the first of the queries, keys and answers on.
    template <int Q, int O>
    void attend_with(Team team, Table<Q> queries, int count, Keys keys, int heads, int causal, const uint8_t *mask, Table<O> out) {
        int E = stack.dim / stack.heads;
        if (count < 4 || mask || !keys.count) {
            auto rows = keys.half ? attend_rows<true, Q, O> : attend_rows<false, Q, O>;
            int32_t *index = seen + (int64_t)team.rank * score_width;
            float *own = scores + (int64_t)team.rank * stack.heads * score_width;
            rows(queries, count, keys, heads, E, causal, mask, out, index, own, score_width);
        } else {
            for (int h = 0; h < heads; h++)
                attentions[team.rank].attend(queries.from(0, h * E), count, keys.from(h * E), E, causal, out.from(0, h * E));
        }
    }

    // work(sequence, its first row, first head, heads), shared out to the threads.
    template <class Do>
    void each_head(Team team, Do work) {
        int busy = to - from - std::count(batch.lengths + from, batch.lengths + to, 0), item = 0, row = 0;
        int parts = busy >= 4 * team.size ? 1 : std::min(team.size, (int)stack.heads);
        for (int i = from; i < to; row += batch.lengths[i], i++)
            for (int part = 0; batch.lengths[i] && part < parts; part++) {
                int head = stack.heads * part / parts, end = stack.heads * (part + 1) / parts;
                if (item++ % team.size == team.rank) work(i, row, head, end - head);
            }
        team.wait();
    }

    // Self-attention of each sequence over its own keys, and those in the cache, to which it adds its own.
    template <int P>
    void attend(Team team, int l) {
        const Layer &layer = stack.layers[l];
        int D = stack.dim, E = D / stack.heads;
        each_head(team, [&](int i, int row, int head, int heads) {
            int count = batch.lengths[i];
            auto query = projected<P>(3 * D).from(row, head * E), key = query.from(0, D), value = query.from(0, 2 * D);
            Keys keys{key.data, value.data, count, 3 * D, ATTENTION<P> == BF16};
            for (int t = 0; t < count; t++)
                for (int h = 0; h < heads; h++) {
                    turn(layer.query, query.from(t, h * E), first_row + row + t);
                    turn(layer.key, key.from(t, h * E), first_row + row + t);
                }
            if (batch.keys) {
                Keys slots{batch.keys[l], batch.values[l], batch.key_lengths[i], D, batch.half};
                for (int t = 0; t < count; t++) {
                    Keys place = slots.from(batch.places[first_row + row + t] * D + head * E);
                    for (int e = 0; e < heads * E; e += LANES) {
                        keep((char *)place.key, e, key.get(t, e));
                        keep((char *)place.value, e, value.get(t, e));
                    }
                }
                keys = slots.from((int64_t)i * batch.capacity * D + head * E);
            }
            const uint8_t *mask = batch.masks ? batch.masks[i] : nullptr;
            attend_with(team, query, count, keys, heads, batch.causal, mask, answers<P>().from(row, head * E));
        });
    }

    void keep(char *row, int e, V x) {  // in the cache
        if (batch.half) put<BF16>(row, e, x);
        else put<FP32>(row, e, x);
    }

    // The norm of one head's query or key, and its rotation.
    template <int P>
    void turn(const Norm &norm, Table<P> vector, int64_t token) {
        if (!norm.weight && !batch.cosine) return;
        int E = stack.dim / stack.heads, half = E / 2;
        alignas(64) float v[256];
        for (int e = 0; e < E; e += LANES) store(v + e, vector.get(0, e));
        if (norm.weight) normalise(norm, v, v, E);
        if (batch.cosine) {
            const float *cosine = batch.cosine + token * E, *sine = batch.sine + token * E;
            for (int e = 0; e < half; e++) {
                float a = v[e], b = v[e + half];
                v[e] = a * cosine[e] - b * sine[e];
                v[e + half] = b * cosine[e + half] + a * sine[e + half];
            }
        }
        for (int e = 0; e < E; e += LANES) vector.put(0, e, load(v + e));
    }

    template <int P>
    void read_memory(Team team, int l) {
        int D = stack.dim, E = D / stack.heads;
        each_head(team, [&](int i, int row, int head, int heads) {
            Keys all{batch.memory_keys[l], batch.memory_values[l], batch.memory_lengths[i], batch.memory_stride, batch.memory_half};
            Keys keys = all.from(batch.memory_starts[i] * batch.memory_stride + head * E);
            attend_with(team, projected<P>(D).from(row, head * E), batch.lengths[i], keys, heads, 0, nullptr, answers<P>().from(row, head * E));
        });
    }
};

void run(Computation &computation, int precision, Team team) {
    with(precision, [&](auto P) {
        Tiles tiles(TILED<P>);
        computation.run<P>(team);
    });
}

// ---------------------------------------------------------------- a linear map alone

constexpr int NEAR = 256;  // rows that stay in the cache while all panels pass by

// x (T, in) times W by all threads: take(thread, row, column, a vector, how many of its numbers there are).
template <class Take>
void multiply_by_all(const Matrix &w, int precision, const float *x, int T, int threads, Take take) {
    int steps = steps_of(precision, w.in), most = std::min(T, NEAR);
    Rows rows{nullptr, steps, nullptr, &w};
    Arena &arena = own_arena;
    arena.lay([&] {
        rows.data = arena.take<char>(whole_tiles(most) * stride_of(steps));
        rows.scale = arena.take<float>(most);
    });
    Barrier barrier;
    auto part = [&](auto P, Team team) {
        for (int first = 0; first < T; first += NEAR) {
            int count = std::min(NEAR, T - first);
            for (int t = count * team.rank / team.size; t < count * (team.rank + 1) / team.size; t++)
                convert<P>(x + (int64_t)(first + t) * w.in, w.in, rows, t);
            team.wait();
            multiply<P>(w, rows, count, team, [&](int row, int column, V value, int left) {
                take(team.rank, first + row, column, value, left);
            });
            team.wait();
        }
    };
#pragma omp parallel num_threads(threads)
    {
        Team team{omp_get_thread_num(), omp_get_num_threads(), &barrier};
        with(precision, [&](auto P) {
            Tiles tiles(TILED<P>);
            part(P, team);
        });
    }
}

struct Best {  // the largest numbers of a row that comes in pieces, and, if asked for, the sum of all exponentials
    std::vector<float> scores;
    std::vector<int64_t> ids;
    bool summed;
    float most = -INFINITY;
    V total = set(0.0f);  // of exp(x - most)

    Best(int count, bool summed) : scores(count, -INFINITY), ids(count), summed(summed) { std::iota(ids.begin(), ids.end(), 0); }

    void add(int column, V values, int count) {
        alignas(64) float each[LANES];
        if (count < LANES) {
            store(each, values);
            values = load(each, count, -INFINITY);
        }
        if (summed) {
            if (any_above(values, most)) raise(largest(values));
            if (most > -INFINITY) total += exp(values - most);
        }
        if (any_above(values, scores.back())) {
            store(each, values);
            for (int i = 0; i < count; i++) insert(each[i], column + i);
        }
    }

    void add(const Best &other) {
        raise(other.most);
        if (other.most > -INFINITY) total += other.total * std::exp(other.most - most);
        for (size_t i = 0; i < scores.size(); i++) insert(other.scores[i], other.ids[i]);
    }

    float log_sum() const { return most + std::log(sum(total)); }

private:
    void raise(float to) {
        if (to <= most) return;
        if (most > -INFINITY) total *= std::exp(most - to);
        most = to;
    }

    void insert(float score, int64_t id) {  // ties: the one that came first, which has the smaller id
        if (!(score > scores.back())) return;
        size_t i = scores.size() - 1;
        for (; i > 0 && score > scores[i - 1]; i--) scores[i] = scores[i - 1], ids[i] = ids[i - 1];
        scores[i] = score, ids[i] = id;
    }
};

template <int P>
void pack(const float *weight, int out, int in, float floor, char *packed, float *scales, int32_t *starts, int threads) {
    int steps = steps_of(P, in);
#pragma omp parallel for num_threads(threads)
    for (int p = 0; p < panels_of<P>(out); p++) {
        std::vector<int32_t> line(steps);
        for (int j = 0; j < WIDTH<P>; j++) {
            int column = p * WIDTH<P> + j;
            const float *own = weight + (int64_t)std::min(column, out - 1) * in;  // there may be none
            std::fill(line.begin(), line.end(), 0);
            if constexpr (P == INT8) {
                auto *bytes = (int8_t *)line.data();
                scales[column] = column < out ? quantise([=](int i) { return load(own + i); }, in, 127, 0, (char *)bytes) : 0;
                starts[column] = floor > -INFINITY ? 0 : -ZERO * std::accumulate(bytes, bytes + in, 0);
            } else if (column < out) {
                convert<P>(own, in, {(char *)line.data(), steps}, 0);
            }
            scatter<P>(line.data(), steps, (int32_t *)(packed + p * panel_bytes<P>(steps)) + j);
        }
    }
}

template <int P>
void unpack(const Matrix &w, const int64_t *ids, int count, float *out, int threads) {
    constexpr int FEW_TO_SHARE = 64;
    int steps = steps_of(P, w.in);
#pragma omp parallel for num_threads(count > FEW_TO_SHARE ? threads : 1)
    for (int i = 0; i < count; i++) {
        alignas(64) int32_t line[8192];
        const char *bytes = (char *)line;
        gather<P>((int32_t *)(w.weight + ids[i] / WIDTH<P> * panel_bytes<P>(steps)) + ids[i] % WIDTH<P>, steps, line);
        for (int e = 0; e < w.in; e += LANES) {
            V x;
            if constexpr (P == INT8) x = __builtin_convertvector(read<Vector<int8_t, LANES>>(bytes + e), V) * w.scale[ids[i]] * load(w.ease + e);
            else x = number<P>(bytes, e);
            store(out + (int64_t)i * w.in + e, x);
        }
    }
}

}  // namespace

// ---------------------------------------------------------------- the doors

extern "C" {

// Whether the system lets this process use what the code was compiled for; to be asked before all else.
int qkv_allowed() { return tiles_allowed(); }

// To be asked for before anything is written there.
void qkv_huge_pages(char *memory, int64_t size) { ask_for_huge_pages(memory, size); }

// Bytes of a packed matrix, and the number of its scales, and of its starts.
int64_t qkv_packed_bytes(int precision, int out, int in) {
    int64_t bytes;
    with(precision, [&](auto P) { bytes = panels_of<P>(out) * panel_bytes<P>(steps_of(P, in)); });
    return bytes;
}
int64_t qkv_scales(int precision, int out) { return precision == INT8 ? (int64_t)panels_of<INT8>(out) * WIDTH<INT8> : 0; }

// Weights (out, in) in the order of the products. `in` is a multiple of 16; floor as of a Matrix.
void qkv_pack(int precision, const float *weight, int out, int in, float floor, char *packed, float *scales, int32_t *starts, int threads) {
    with(precision, [&](auto P) { pack<P>(weight, out, in, floor, packed, scales, starts, threads); });
}

// Of each id below matrix.out the weights from which that column was packed, as near as the precision is: (T, in).
void qkv_unpack(const Matrix *matrix, int precision, const int64_t *ids, int T, float *out, int threads) {
    with(precision, [&](auto P) { unpack<P>(*matrix, ids, T, out, threads); });
}

// x (T, in) -> out (T, matrix.out).
void qkv_linear(const Matrix *matrix, int precision, const float *x, int T, float *out, int threads) {
    multiply_by_all(*matrix, precision, x, T, threads, [&](int, int row, int column, V value, int left) {
        store(out + (int64_t)row * matrix->out + column, value, left);
    });
}

// The `count` largest of each row of log_softmax(x W^T + bias), best first: scores, unless null, and ids (T, count). No
// row is ever written as a whole.
void qkv_likeliest(const Matrix *matrix, int precision, const float *x, int T, int count, float *scores, int64_t *ids, int threads) {
    std::vector<Best> found((size_t)threads * T, Best(count, scores));
    multiply_by_all(*matrix, precision, x, T, threads, [&](int rank, int row, int column, V value, int left) {
        found[(size_t)rank * T + row].add(column, value, left);
    });
    for (int row = 0; row < T; row++) {
        Best &all = found[row];
        for (int rank = 1; rank < threads; rank++) all.add(found[(size_t)rank * T + row]);
        std::copy(all.ids.begin(), all.ids.end(), ids + (size_t)row * count);
        if (!scores) continue;
        float normaliser = all.log_sum();
        for (int i = 0; i < count; i++) scores[(size_t)row * count + i] = all.scores[i] - normaliser;
    }
}

// The batch's tokens through layers `first` to `last`.
void qkv_forward(const Stack *stack, const Batch *batch) {
    struct Chunk { int from, to; int64_t row; int rows; };
    std::vector<Chunk> chunks;
    int64_t row = 0, tokens = std::accumulate(batch->lengths, batch->lengths + batch->sequences, (int64_t)0);
    int64_t layer = (int64_t)stack->dim * (4 * stack->dim + 2 * stack->mlp_dim) * bytes_of(stack->precision);
    int most = std::clamp<int64_t>(tokens / (2 * batch->threads), CHUNK, layer > LARGE_LAYER ? 2 * CHUNK : CHUNK);
    int64_t usual = most - std::min<int64_t>(most, tokens / std::max(1, batch->sequences)) / 2;  // half a sequence stays free
    int64_t filled = tokens / usual, parts = (filled / batch->threads + 1) * batch->threads;  // alike in size, as many for each thread
    for (int i = 0; i < batch->sequences; i++) {
        int length = batch->lengths[i];
        auto full = [&] { return chunks.back().rows + length > most || row + length / 2 > tokens * (int64_t)chunks.size() / parts; };
        if (chunks.empty() || (length && full())) chunks.push_back({i, i, row, 0});
        chunks.back().to = i + 1;
        chunks.back().rows += length;
        row += length;
    }
    if (!row) return;
    int threads = batch->threads;
    if (std::min<int64_t>(filled, chunks.size()) >= 2 * threads || threads == 1) {
        std::atomic<int> next{0};
#pragma omp parallel num_threads(threads)
        for (int c; (c = next++) < (int)chunks.size();) {
            Chunk &chunk = chunks[c];
            Computation computation(*stack, *batch, chunk.from, chunk.to, chunk.row, chunk.rows, 1, own_arena);
            run(computation, stack->precision, {0, 1, nullptr});
        }
    } else {
        Computation computation(*stack, *batch, 0, batch->sequences, 0, (int)row, threads, own_arena);
        Barrier barrier;
#pragma omp parallel num_threads(threads)
        run(computation, stack->precision, {omp_get_thread_num(), omp_get_num_threads(), &barrier});
    }
}
}
