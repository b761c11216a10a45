// The blocks of a Transformer on x86 CPUs with AVX-512: what layers.Block computes, without a framework between.
//
// One matrix product serves three precisions. Four bytes of an activation (one float32, two bfloat16, four int8)
// are broadcast and multiplied with the same four bytes of 16 columns: FMA, VDPBF16PS or VPDPBUSD. Many sequences
// are shared out to the threads, and each takes its own through all layers while they stay in its cache; few tokens
// are computed by all threads together, each with its part of every matrix.
//
// int8 is dynamic: groups of 128 inputs of a token, and of a column, have a scale each.
//
// Legend: T tokens, D model width, H heads, E = D / H head width, F inner width, L tokens of a sequence.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include <omp.h>
#include <sched.h>

#if !defined(__AVX512BW__) || !defined(__AVX512VNNI__) || !defined(__AVX512BF16__)
#error "needs AVX-512 with VNNI and BF16"
#endif

namespace {

enum Precision { FP32, BF16, INT8 };
enum Activation { RELU, RELU2, GELU, GELU_TANH, SILU };

constexpr int WIDTH = 64;   // columns of a panel: four vectors
constexpr int HEIGHT = 6;   // rows of a tile: 24 accumulators of the 32 registers
constexpr int GROUP = 128;  // inputs that share a scale in int8
constexpr int CHUNK = 128;  // tokens that a thread takes through the layers at once, or one sequence

int bytes_of(int precision) { return precision == FP32 ? 4 : precision == BF16 ? 2 : 1; }
int groups_of(int precision, int in) { return precision == INT8 ? (in + GROUP - 1) / GROUP : 1; }
int panels_of(int out) { return (out + WIDTH - 1) / WIDTH; }

}  // namespace

// ---------------------------------------------------------------- what Python hands over

struct Matrix {           // packed by qkv_pack; the bias may be null
    const char *weight;   // (panels, in / n, WIDTH, n) with n elements in four bytes
    const float *scale;   // (panels, groups, WIDTH) in int8
    const float *bias;    // (out)
    int32_t in, out;
};

struct Norm {  // absent where the weight is null
    const float *weight, *bias;
    float eps;
};

struct Layer {
    Matrix qkv, out, cross_query, cross_out, up, down;
    Norm attention, cross, mlp, query, key;
};

struct Stack {
    const Layer *layers;
    int32_t precision, dim, heads, mlp_dim, activation, norm_first;
};

struct Batch {
    float *x;                     // (T, D), replaced by what the layers make of it
    const int32_t *lengths;       // (N)
    int32_t sequences, threads, first, last, causal;
    const float *cosine, *sine;   // (T, E), or null
    char *const *keys;            // a cache: each layer's (N * capacity, D), or null
    char *const *values;
    const int64_t *places;        // (T) which of its rows the new tokens take
    const int32_t *key_lengths;   // (N) rows of each slot that are in use, these among them
    const uint8_t *const *masks;  // (N) or null: for some slots, which rows each new token attends, (new, in use)
    int32_t capacity, half;       // half: the cache is bfloat16, else float32
    int32_t memory_stride, memory_half;
    const char *const *memory_keys;   // what cross-attention reads: each layer's rows, `memory_stride` numbers apart
    const char *const *memory_values;
    const int64_t *memory_starts;     // (N) first row of the source that a sequence reads
    const int32_t *memory_lengths;    // (N)
    float *seen_qkv, *seen_answer;    // of the last layer: (T, 3 D) and (T, D), or null
    float *seen_query, *seen_cross;   // of its cross-attention: (T, D) each, or null
};

namespace {

// ---------------------------------------------------------------- functions of 16 numbers

using V = __m512;  // operators work on all of them

V set(float x) { return _mm512_set1_ps(x); }
V load(const float *x) { return _mm512_loadu_ps(x); }
void store(float *to, V x) { _mm512_storeu_ps(to, x); }

__mmask16 first(int count) {  // of 16: all, or as many as there are
    return count >= 16 ? 0xFFFF : count > 0 ? (1 << count) - 1 : 0;
}

V exp16(V x) {  // Cephes' expf: 2^n times a polynomial of the rest
    x = _mm512_max_ps(x, set(-87.3f));
    V n = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    V r = x - n * 0.693359375f + n * 2.12194440e-4f;
    V p = set(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
    return _mm512_scalef_ps(p * r * r + r + 1.0f, n);
}

V gelu(V x) {  // x/2 (1 + erf(x/sqrt(2))), erf by Abramowitz and Stegun 7.1.26
    V z = _mm512_abs_ps(x) * 0.70710678f;
    V t = 1.0f / (z * 0.3275911f + 1.0f);
    V p = set(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + c;
    V rest = p * t * exp16(-z * z);  // 1 - erf(z)
    V half = x * 0.5f;
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, set(0), _CMP_LT_OQ), x - half * rest, half * rest);
}

V activate(V x, int activation) {
    switch (activation) {
        case RELU: return _mm512_max_ps(x, set(0));
        case RELU2: x = _mm512_max_ps(x, set(0)); return x * x;
        case GELU: return gelu(x);
        case SILU: return x / (1.0f + exp16(-x));
        default: return x / (1.0f + exp16(x * (x * x * 0.044715f + 1.0f) * (-2 * 0.79788456f)));  // GELU_TANH
    }
}

__m512i to_bf16(V x) {  // in the lower halves of 32 bits
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
}

void normalise(const Norm &norm, const float *x, float *out, int width) {
    V sum = set(0), squares = set(0);
    for (int i = 0; i < width; i += 16) sum += load(x + i);
    float mean = _mm512_reduce_add_ps(sum) / width;
    for (int i = 0; i < width; i += 16) squares += (load(x + i) - mean) * (load(x + i) - mean);
    float rate = 1 / std::sqrt(_mm512_reduce_add_ps(squares) / width + norm.eps);
    for (int i = 0; i < width; i += 16)
        store(out + i, (load(x + i) - mean) * rate * load(norm.weight + i) + load(norm.bias + i));
}

void softmax(float *x, int count) {
    V most = set(-INFINITY), total = set(0);
    for (int j = 0; j < count; j += 16) most = _mm512_mask_max_ps(most, first(count - j), most, _mm512_maskz_loadu_ps(first(count - j), x + j));
    float highest = _mm512_reduce_max_ps(most);
    for (int j = 0; j < count; j += 16) {
        V p = _mm512_maskz_mov_ps(first(count - j), exp16(_mm512_maskz_loadu_ps(first(count - j), x + j) - highest));
        _mm512_mask_storeu_ps(x + j, first(count - j), p);
        total += p;
    }
    float share = count ? 1 / _mm512_reduce_add_ps(total) : 0;
    for (int j = 0; j < count; j += 16)
        _mm512_mask_storeu_ps(x + j, first(count - j), _mm512_maskz_loadu_ps(first(count - j), x + j) * share);
}

// ---------------------------------------------------------------- the matrix product

struct Rows {  // activations in a precision, ready to be multiplied
    char *data;
    float *scale;    // (rows, groups) in int8
    int32_t *start;  // (rows, groups) in int8: -128 times the sum of the group, as weights are stored + 128
    int stride, groups;

    char *row(int i) const { return data + (int64_t)i * stride; }
};

void quantise(const float *x, int width, const Rows &rows, int row) {
    for (int g = 0; g < rows.groups; g++) {
        const float *in = x + g * GROUP;
        int size = std::min(GROUP, width - g * GROUP);
        V most = set(0);
        for (int i = 0; i < size; i += 16) most = _mm512_max_ps(most, _mm512_abs_ps(load(in + i)));
        float scale = _mm512_reduce_max_ps(most) / 127;
        float rate = scale > 0 ? 1 / scale : 0;
        __m512i sum = _mm512_setzero_si512();
        for (int i = 0; i < size; i += 16) {
            __m512i q = _mm512_cvtps_epi32(load(in + i) * rate);
            sum = _mm512_add_epi32(sum, q);
            _mm_storeu_si128((__m128i *)(rows.row(row) + g * GROUP + i), _mm512_cvtsepi32_epi8(q));
        }
        rows.scale[row * rows.groups + g] = scale;
        rows.start[row * rows.groups + g] = -128 * _mm512_reduce_add_epi32(sum);
    }
}

template <int P>
void convert(const float *x, int width, const Rows &rows, int row) {
    if constexpr (P == INT8) {
        quantise(x, width, rows, row);
    } else if constexpr (P == FP32) {
        std::memcpy(rows.row(row), x, width * sizeof(float));
    } else {
        auto *out = (__m256i *)rows.row(row);
        for (int i = 0; i < width; i += 16) _mm256_storeu_si256(out + i / 16, (__m256i)_mm512_cvtneps_pbh(load(x + i)));
    }
}

void scatter(const int32_t *line, int steps, int32_t *column) {  // one column of a panel
    for (int s = 0; s < steps; s++) column[s * WIDTH] = line[s];
}

// sum + weight * x. As text, since GCC would copy the sums of intrinsics from register to register.
template <int P>
[[gnu::always_inline]] inline __m512i add_product(__m512i sum, __m512i weight, __m512i x) {
    if constexpr (P == INT8) asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
    else if constexpr (P == BF16) asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
    else asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
    return sum;
}

// work(0), work(1), ... with numbers that the compiler knows: in a loop it would keep arrays of vectors in memory.
template <class Work, int... I>
[[gnu::always_inline]] inline void each_of(Work work, std::integer_sequence<int, I...>) {
    (work(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, class Work>
[[gnu::always_inline]] inline void each(Work work) {
    each_of(work, std::make_integer_sequence<int, COUNT>{});
}

// M rows from `row` on times N vectors of columns of a panel, over `in` inputs -> out, rows `out_stride` numbers apart.
template <int P, int M, int N>
[[gnu::flatten]] void tile(const Rows &rows, int row, const char *panel, const float *scale, int in, float *out, int out_stride) {
    constexpr int ELEMENTS = P == FP32 ? 1 : P == BF16 ? 2 : 4;
    int steps = in / ELEMENTS, group = P == INT8 ? GROUP / ELEMENTS : steps;
    const char *x = rows.row(row);
    int64_t stride = rows.stride;
    for (int g = 0; g * group < steps; g++) {
        __m512i sum[M * N], weight[N];
        each<M * N>([&](auto i) {
            sum[i] = _mm512_set1_epi32(P == INT8 ? rows.start[(row + i / N) * rows.groups + g] : 0);
        });
#pragma GCC unroll 4
        for (int s = g * group; s < std::min(steps, (g + 1) * group); s++) {
            each<N>([&](auto n) { weight[n] = _mm512_loadu_si512(panel + ((int64_t)s * WIDTH + n * 16) * 4); });
            each<M>([&](auto m) {
                __m512i one = _mm512_set1_epi32(*(const int32_t *)(x + m * stride + s * 4));
                each<N>([&](auto n) { sum[m * N + n] = add_product<P>(sum[m * N + n], weight[n], one); });
            });
        }
        each<M * N>([&](auto i) {
            constexpr int m = i / N, n = i % N;
            float *to = out + m * out_stride + n * 16;
            V total = (V)sum[i];
            if constexpr (P == INT8) {
                total = _mm512_cvtepi32_ps(sum[i]) * rows.scale[(row + m) * rows.groups + g] * load(scale + g * WIDTH + n * 16);
                if (g) total += load(to);
            }
            store(to, total);
        });
    }
}

template <int P>
void product(const Rows &rows, int row, int height, const char *panel, const float *scale, int in, int vectors, float *out, int out_stride) {
    each<HEIGHT>([&](auto m) {
        if (height == m + 1) each<WIDTH / 16>([&](auto n) {
            if (vectors == n + 1) tile<P, m + 1, n + 1>(rows, row, panel, scale, in, out, out_stride);
        });
    });
}

// work(P) with a precision that the compiler knows.
template <class Work>
void with(int precision, Work work) {
    if (precision == INT8) work(std::integral_constant<int, INT8>{});
    else if (precision == BF16) work(std::integral_constant<int, BF16>{});
    else work(std::integral_constant<int, FP32>{});
}

class Barrier {  // where another program has the core of a thread that is awaited, the others make room for it
    std::atomic<int> arrived{0}, round{0};

public:
    void wait(int size) {
        int before = round.load();
        if (arrived.fetch_add(1) + 1 == size) {
            arrived.store(0);
            round.store(before + 1);
            return;
        }
        for (int turns = 0; round.load() == before; turns++) {
            if (turns < 2000) _mm_pause();
            else sched_yield();
        }
    }
};

struct Team {  // the threads that compute on the same tokens
    int rank, size;
    Barrier *barrier;

    void wait() const {
        if (size > 1) barrier->wait(size);
    }
};

// Columns of x W^T + bias, a part of them for each thread: take(row, column, 16 values, mask of those there are).
template <int P, class Take>
void multiply(const Matrix &w, const Rows &rows, int count, Team team, Take take) {
    int panels = panels_of(w.out), groups = groups_of(P, w.in);
    int64_t size = (int64_t)w.in * WIDTH * bytes_of(P);
    alignas(64) float out[HEIGHT * WIDTH];
    for (int p = panels * team.rank / team.size; p < panels * (team.rank + 1) / team.size; p++) {
        int vectors = std::min(4, (w.out - p * WIDTH + 15) / 16);
        for (int row = 0; row < count; row += HEIGHT) {
            int height = std::min(HEIGHT, count - row);
            product<P>(rows, row, height, w.weight + p * size, w.scale + (int64_t)p * groups * WIDTH, w.in, vectors, out, WIDTH);
            for (int n = 0; n < vectors; n++) {
                int column = p * WIDTH + n * 16, left = w.out - column;
                V bias = w.bias ? _mm512_maskz_loadu_ps(first(left), w.bias + column) : set(0);
                for (int m = 0; m < height; m++)
                    take(row + m, column, load(out + m * WIDTH + n * 16) + bias, first(left));
            }
        }
    }
}

// ---------------------------------------------------------------- memory of a computation

class Arena {  // scratch that grows to what is asked of it and is kept
    std::vector<char> memory;
    size_t used = 0;

public:
    template <class X>
    X *take(size_t count) {
        size_t at = used;
        used += (count * sizeof(X) + 63) / 64 * 64;
        return memory.empty() ? nullptr : (X *)(((uintptr_t)memory.data() + 63) / 64 * 64 + at);
    }
    template <class Lay>
    void lay(Lay take_all) {  // once to measure, once in memory of that size
        std::vector<char> old;
        old.swap(memory);
        used = 0;
        take_all();
        memory.swap(old);
        if (memory.size() < used + 64) memory.resize(used + 64);
        used = 0;
        take_all();
    }
};

thread_local Arena own_arena, head_arena;

// ---------------------------------------------------------------- attention

struct Keys {  // of one sequence and some heads: rows `stride` numbers apart, bfloat16 if `half`, else float32
    const char *key, *value;
    int count, stride, half;

    Keys from(int64_t number) const { return {key + number * size(), value + number * size(), count, stride, half}; }
    int size() const { return half ? 2 : 4; }
};

template <bool HALF>
V number(const char *row, int e) {
    if constexpr (HALF) return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(row + e * 2))), 16);
    return load((const float *)row + e);
}

// One query after another over keys as they lie, for the few of a decoding step: of each key all heads, as memory gives
// them. `index` (keys) and `scores` (heads, width) are scratch.
template <bool HALF>
void attend_rows(const float *query, int rows, int query_stride, Keys keys, int heads, int E, int causal, const uint8_t *mask,
                 float *out, int out_stride, int32_t *index, float *scores, int width) {
    float rate = 1 / std::sqrt((float)E);
    int64_t stride = (int64_t)keys.stride * keys.size();
    for (int i = 0; i < rows; i++) {
        int last = causal && !mask ? keys.count - rows + 1 + i : keys.count, seen = 0;
        for (int j = 0; j < last; j++)
            if (!mask || mask[(int64_t)i * keys.count + j]) index[seen++] = j;
        const float *q = query + (int64_t)i * query_stride;
        float *to = out + (int64_t)i * out_stride;
        for (int j = 0; j < seen; j++)
            for (int h = 0; h < heads; h++) {
                V sum = set(0);
                for (int e = h * E; e < (h + 1) * E; e += 16) sum += load(q + e) * number<HALF>(keys.key + index[j] * stride, e);
                scores[h * width + j] = _mm512_reduce_add_ps(sum) * rate;
            }
        for (int h = 0; h < heads; h++) softmax(scores + h * width, seen);
        std::fill(to, to + heads * E, 0.0f);
        for (int j = 0; j < seen; j++)
            for (int h = 0; h < heads; h++) {
                float share = scores[h * width + j];
                for (int e = h * E; e < (h + 1) * E; e += 16)
                    store(to + e, load(to + e) + number<HALF>(keys.value + index[j] * stride, e) * share);
            }
    }
}

// Many queries: keys and values are packed as matrices and multiplied, HEIGHT queries at a time.
struct Attention {
    char *keys, *values;  // panels
    float *scores;        // (HEIGHT, keys)
    Rows query, share;

    template <int P>
    void lay(Arena &arena, int longest, int E) {
        int padded = panels_of(longest) * WIDTH;
        keys = arena.take<char>((size_t)padded * E * bytes_of(P));
        values = arena.take<char>((size_t)padded * panels_of(E) * WIDTH * bytes_of(P));
        scores = arena.take<float>(HEIGHT * padded);
        query = {arena.take<char>(HEIGHT * E * bytes_of(P)), nullptr, nullptr, E * bytes_of(P), 1};
        share = {arena.take<char>(HEIGHT * padded * bytes_of(P)), nullptr, nullptr, padded * bytes_of(P), 1};
    }

    template <int P>
    void attend(const float *q, int rows, int query_stride, Keys from, int E, int causal, float *out, int out_stride) {
        constexpr int ELEMENTS = P == FP32 ? 1 : 2;
        int padded = panels_of(from.count) * WIDTH, steps = E / ELEMENTS;
        pack_keys<P>(from, E);
        pack_values<P>(from, E);
        float rate = 1 / std::sqrt((float)E);
        alignas(64) float scaled[256];
        for (int i = 0; i < rows; i += HEIGHT) {
            int height = std::min(HEIGHT, rows - i);
            int last = causal ? from.count - rows + i + height : from.count;  // keys that the last of them sees
            for (int m = 0; m < height; m++) {
                const float *one = q + (int64_t)(i + m) * query_stride;
                for (int e = 0; e < E; e += 16) store(scaled + e, load(one + e) * rate);
                convert<P>(scaled, E, query, m);
            }
            for (int p = 0; p * WIDTH < last; p++) {
                int vectors = std::min(4, (last - p * WIDTH + 15) / 16);
                product<P>(query, 0, height, keys + (int64_t)p * steps * WIDTH * 4, nullptr, E, vectors, scores + p * WIDTH, padded);
            }
            int inner = (last + 15) / 16 * 16;
            for (int m = 0; m < height; m++) {
                float *row = scores + m * padded;
                int seen = causal ? last - height + 1 + m : last;
                softmax(row, seen);
                std::fill(row + seen, row + inner, 0.0f);
                convert<P>(row, inner, share, m);
            }
            inner = (last + ELEMENTS - 1) / ELEMENTS * ELEMENTS;  // values beyond are not packed
            for (int p = 0; p * WIDTH < E; p++) {
                int vectors = std::min(4, (E - p * WIDTH + 15) / 16);
                const char *panel = values + (int64_t)p * (padded / ELEMENTS) * WIDTH * 4;
                product<P>(share, 0, height, panel, nullptr, inner, vectors, out + (int64_t)i * out_stride + p * WIDTH, out_stride);
            }
        }
    }

private:
    template <int P>
    void pack_keys(Keys from, int E) {  // (panels, E / n, WIDTH, n)
        int steps = P == FP32 ? E : E / 2;
        alignas(64) float key[256];
        alignas(64) int32_t packed[256];
        for (int j = 0; j < from.count; j++) {
            const char *row = from.key + (int64_t)j * from.stride * from.size();
            for (int e = 0; e < E; e += 16) store(key + e, from.half ? number<true>(row, e) : number<false>(row, e));
            convert<P>(key, E, {(char *)packed, nullptr, nullptr, 0, 1}, 0);
            scatter(packed, steps, (int32_t *)keys + (int64_t)(j / WIDTH) * steps * WIDTH + j % WIDTH);
        }
    }

    template <int P>
    void pack_values(Keys from, int E) {  // (panels, keys / n, WIDTH, n)
        constexpr int ELEMENTS = P == FP32 ? 1 : 2;
        int padded = panels_of(from.count) * WIDTH;
        auto value = [&](int j, int e) {
            const char *row = from.value + (int64_t)j * from.stride * from.size();
            return j >= from.count ? set(0) : from.half ? number<true>(row, e) : number<false>(row, e);
        };
        for (int j = 0; j < from.count; j += ELEMENTS)
            for (int e = 0; e < E; e += 16) {
                auto both = (__m512i)value(j, e);
                if constexpr (P != FP32) both = _mm512_or_si512(to_bf16((V)both), _mm512_slli_epi32(to_bf16(value(j + 1, e)), 16));
                int64_t line = (int64_t)(e / WIDTH) * padded / ELEMENTS + j / ELEMENTS;
                _mm512_storeu_si512(values + (line * WIDTH + e % WIDTH) * 4, both);
            }
    }
};

// ---------------------------------------------------------------- a block

class Computation {  // some sequences of a batch on their way through the layers
    const Stack &stack;
    const Batch &batch;
    int from, to, rows;    // sequences, and their tokens
    int64_t first_row;     // of their tokens among all
    float *x, *wide, *answer, *scores, *input_scale;
    char *inputs;
    int32_t *input_start, *seen;
    int score_width;
    std::vector<Attention> attentions;  // one for each thread

public:
    Computation(const Stack &stack, const Batch &batch, int from, int to, int64_t first_row, int rows, int threads, Arena &arena)
        : stack(stack), batch(batch), from(from), to(to), rows(rows), first_row(first_row), attentions(threads) {
        x = batch.x + first_row * stack.dim;
        int wide_width = std::max(3 * stack.dim, stack.mlp_dim), in = std::max(stack.dim, stack.mlp_dim);
        int groups = groups_of(stack.precision, in), longest = 1;
        for (int i = from; i < to; i++) {
            longest = std::max(longest, batch.keys ? batch.key_lengths[i] : batch.lengths[i]);
            if (batch.memory_keys) longest = std::max(longest, batch.memory_lengths[i]);
        }
        arena.lay([&] {
            wide = arena.take<float>((size_t)rows * wide_width);
            answer = arena.take<float>((size_t)rows * stack.dim);
            inputs = arena.take<char>((size_t)rows * in * bytes_of(stack.precision));
            input_scale = arena.take<float>((size_t)rows * groups);
            input_start = arena.take<int32_t>((size_t)rows * groups);
            scores = arena.take<float>((size_t)threads * stack.heads * (longest + 16));
            seen = arena.take<int32_t>((size_t)threads * (longest + 16));
            for (Attention &one : attentions) {
                if (stack.precision == FP32) one.lay<FP32>(arena, longest, stack.dim / stack.heads);
                else one.lay<BF16>(arena, longest, stack.dim / stack.heads);
            }
        });
        score_width = longest + 16;
    }

    template <int P>
    void run(Team team) {
        const Norm *norm = nullptr;  // post-norm: what is still to be done to x
        for (int l = batch.first; l < batch.last; l++) {
            const Layer &layer = stack.layers[l];
            int D = stack.dim;
            bool shown = l + 1 == batch.last;
            prepare<P>(team, layer.attention, norm);
            project<P>(team, layer.qkv, [](V value) { return value; });
            attend<P>(team, l);
            if (shown && batch.seen_qkv) show(team, wide, 3 * D, batch.seen_qkv);
            if (shown && batch.seen_answer) show(team, answer, D, batch.seen_answer);
            join<P>(team, layer.out, answer, D);
            norm = &layer.attention;
            if (layer.cross_query.weight) {
                prepare<P>(team, layer.cross, norm);
                project<P>(team, layer.cross_query, [](V value) { return value; });
                read_memory<P>(team, l);
                if (shown && batch.seen_query) show(team, wide, D, batch.seen_query);
                if (shown && batch.seen_cross) show(team, answer, D, batch.seen_cross);
                join<P>(team, layer.cross_out, answer, D);
                norm = &layer.cross;
            }
            prepare<P>(team, layer.mlp, norm);
            project<P>(team, layer.up, [activation = stack.activation](V value) { return activate(value, activation); });
            join<P>(team, layer.down, wide, stack.mlp_dim);
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

    // Where rows of this width are laid to be multiplied.
    template <int P>
    Rows input(int width) const {
        return {inputs, input_scale, input_start, width * bytes_of(P), groups_of(P, width)};
    }

    // The input of a sub-layer. Pre-norm: its norm of x. Post-norm: x, once the norm before it is done.
    template <int P>
    void prepare(Team team, const Norm &own, const Norm *before) {
        int D = stack.dim;
        Rows to = input<P>(D);
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

    // wide = function(what is prepared W^T + bias)
    template <int P, class Function>
    void project(Team team, const Matrix &matrix, Function function) {
        multiply<P>(matrix, input<P>(stack.dim), rows, team, [&](int row, int column, V value, __mmask16) {
            store(wide + (int64_t)row * matrix.out + column, function(value));
        });
        team.wait();
    }

    // x += (what was made, (rows, width)) W^T + bias
    template <int P>
    void join(Team team, const Matrix &matrix, const float *made, int width) {
        Rows to = input<P>(width);
        each_row(team, [&](int row) { convert<P>(made + (int64_t)row * width, width, to, row); });
        team.wait();
        multiply<P>(matrix, to, rows, team, [&](int row, int column, V value, __mmask16) {
            float *sum = x + (int64_t)row * stack.dim + column;
            store(sum, load(sum) + value);
        });
        team.wait();
    }

    void show(Team team, const float *made, int width, float *out) {
        each_row(team, [&](int row) { std::memcpy(out + (first_row + row) * width, made + (int64_t)row * width, width * sizeof(float)); });
        team.wait();
    }

    // Of one sequence, some heads from that of `query` and `keys` on.
    template <int P>
    void attend_with(Team team, const float *query, int count, int query_stride, Keys keys, int heads, int causal, const uint8_t *mask, float *out) {
        int E = stack.dim / stack.heads;
        if (count < 4 || mask) {
            auto rows = keys.half ? attend_rows<true> : attend_rows<false>;
            int32_t *index = seen + (int64_t)team.rank * score_width;
            float *own = scores + (int64_t)team.rank * stack.heads * score_width;
            rows(query, count, query_stride, keys, heads, E, causal, mask, out, stack.dim, index, own, score_width);
        } else {
            constexpr int A = P == FP32 ? FP32 : BF16;
            for (int h = 0; h < heads; h++)
                attentions[team.rank].template attend<A>(query + h * E, count, query_stride, keys.from(h * E), E, causal, out + h * E, stack.dim);
        }
    }

    // work(sequence, its first row, first head, heads), shared out to the threads.
    template <class Do>
    void each_head(Team team, Do work) {
        int parts = to - from >= 4 * team.size ? 1 : std::min(team.size, (int)stack.heads), item = 0, row = 0;
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
            float *query = wide + (int64_t)row * 3 * D + head * E;
            Keys keys{(char *)(query + D), (char *)(query + 2 * D), count, 3 * D, 0};
            for (int t = 0; t < count; t++)
                for (int h = 0; h < heads; h++) turn(layer, query + (int64_t)t * 3 * D + h * E, first_row + row + t);
            if (batch.keys) {
                Keys slots{batch.keys[l], batch.values[l], batch.key_lengths[i], D, batch.half};
                for (int t = 0; t < count; t++) {
                    Keys place = slots.from(batch.places[first_row + row + t] * D + head * E);
                    for (int e = 0; e < heads * E; e += 16) {
                        keep((char *)place.key, e, query + D + (int64_t)t * 3 * D);
                        keep((char *)place.value, e, query + 2 * D + (int64_t)t * 3 * D);
                    }
                }
                keys = slots.from((int64_t)i * batch.capacity * D + head * E);
            }
            const uint8_t *mask = batch.masks ? batch.masks[i] : nullptr;
            attend_with<P>(team, query, count, 3 * D, keys, heads, batch.causal, mask, answer + (int64_t)row * D + head * E);
        });
    }

    void keep(char *row, int e, const float *x) {  // 16 numbers in the cache
        if (batch.half) _mm256_storeu_si256((__m256i *)(row + e * 2), (__m256i)_mm512_cvtneps_pbh(load(x + e)));
        else store((float *)row + e, load(x + e));
    }

    // Norms of one head's query and key, and their rotation.
    void turn(const Layer &layer, float *query, int64_t token) {
        int E = stack.dim / stack.heads, half = E / 2;
        float *key = query + stack.dim;
        if (layer.query.weight) normalise(layer.query, query, query, E);
        if (layer.key.weight) normalise(layer.key, key, key, E);
        if (!batch.cosine) return;
        const float *cosine = batch.cosine + token * E, *sine = batch.sine + token * E;
        for (float *v : {query, key})
            for (int e = 0; e < half; e++) {
                float a = v[e], b = v[e + half];
                v[e] = a * cosine[e] - b * sine[e];
                v[e + half] = b * cosine[e + half] + a * sine[e + half];
            }
    }

    template <int P>
    void read_memory(Team team, int l) {
        int D = stack.dim, E = D / stack.heads;
        each_head(team, [&](int i, int row, int head, int heads) {
            Keys all{batch.memory_keys[l], batch.memory_values[l], batch.memory_lengths[i], batch.memory_stride, batch.memory_half};
            Keys keys = all.from(batch.memory_starts[i] * batch.memory_stride + head * E);
            int64_t at = (int64_t)row * D + head * E;
            attend_with<P>(team, wide + at, batch.lengths[i], D, keys, heads, 0, nullptr, answer + at);
        });
    }
};

void run(Computation &computation, int precision, Team team) {
    with(precision, [&](auto P) { computation.run<P>(team); });
}

// ---------------------------------------------------------------- a linear map alone

// x (T, in) times W by all threads: take(thread, row, column, 16 values, mask of those there are).
template <class Take>
void multiply_by_all(const Matrix &w, int precision, const float *x, int T, int threads, Take take) {
    int groups = groups_of(precision, w.in), stride = w.in * bytes_of(precision);
    Rows rows{nullptr, nullptr, nullptr, stride, groups};
    Arena &arena = head_arena;
    arena.lay([&] {
        rows.data = arena.take<char>((size_t)T * stride);
        rows.scale = arena.take<float>((size_t)T * groups);
        rows.start = arena.take<int32_t>((size_t)T * groups);
    });
    Barrier barrier;
    auto part = [&](auto P, Team team) {
        for (int t = T * team.rank / team.size; t < T * (team.rank + 1) / team.size; t++)
            convert<P>(x + (int64_t)t * w.in, w.in, rows, t);
        team.wait();
        multiply<P>(w, rows, T, team, [&](int row, int column, V value, __mmask16 mask) {
            take(team.rank, row, column, value, mask);
        });
    };
#pragma omp parallel num_threads(threads)
    {
        Team team{omp_get_thread_num(), omp_get_num_threads(), &barrier};
        with(precision, [&](auto P) { part(P, team); });
    }
}

struct Best {  // the largest numbers of a row that comes in pieces, and the sum of all exponentials
    std::vector<float> scores;
    std::vector<int32_t> ids;
    float most = -INFINITY;
    V sum = set(0);  // of exp(x - most)

    explicit Best(int count) : scores(count, -INFINITY), ids(count, 0) {}

    void add(int column, V values, __mmask16 mask) {
        if (!mask) return;
        raise(_mm512_mask_reduce_max_ps(mask, values));
        sum = _mm512_mask_add_ps(sum, mask, sum, exp16(values - most));
        alignas(64) float each[16];
        for (auto left = _mm512_mask_cmp_ps_mask(mask, values, set(scores.back()), _CMP_GT_OQ); left; left &= left - 1) {
            store(each, values);
            int lane = __builtin_ctz(left);
            insert(each[lane], column + lane);
        }
    }

    void add(const Best &other) {
        raise(other.most);
        if (other.most > -INFINITY) sum += other.sum * std::exp(other.most - most);
        for (size_t i = 0; i < scores.size(); i++) insert(other.scores[i], other.ids[i]);
    }

    float log_sum() const { return most + std::log(_mm512_reduce_add_ps(sum)); }

private:
    void raise(float to) {
        if (to <= most) return;
        if (most > -INFINITY) sum *= std::exp(most - to);
        most = to;
    }

    void insert(float score, int32_t id) {  // ties: the one that came first, which has the smaller id
        if (!(score > scores.back())) return;
        size_t i = scores.size() - 1;
        for (; i > 0 && score > scores[i - 1]; i--) scores[i] = scores[i - 1], ids[i] = ids[i - 1];
        scores[i] = score, ids[i] = id;
    }
};

}  // namespace

// ---------------------------------------------------------------- the doors

extern "C" {

// Bytes of a packed matrix, and the number of its scales.
int64_t qkv_packed_bytes(int precision, int out, int in) { return (int64_t)panels_of(out) * WIDTH * in * bytes_of(precision); }
int64_t qkv_scales(int precision, int out, int in) { return precision == INT8 ? (int64_t)panels_of(out) * groups_of(precision, in) * WIDTH : 0; }

// Weights (out, in) in the order of the products. `in` is a multiple of 16.
void qkv_pack(int precision, const float *weight, int out, int in, char *packed, float *scales, int threads) {
    int groups = groups_of(precision, in), steps = in * bytes_of(precision) / 4;
#pragma omp parallel for num_threads(threads)
    for (int p = 0; p < panels_of(out); p++) {
        std::vector<int32_t> line(steps), start(groups);
        std::vector<float> scale(groups);
        Rows one{(char *)line.data(), scale.data(), start.data(), 0, groups};
        for (int j = 0; j < WIDTH; j++) {
            int column = p * WIDTH + j;
            if (column < out) with(precision, [&](auto P) { convert<P>(weight + (int64_t)column * in, in, one, 0); });
            else std::fill(line.begin(), line.end(), 0);
            for (int32_t &four : line) four ^= precision == INT8 ? 0x80808080 : 0;  // + 128: VPDPBUSD takes them unsigned
            scatter(line.data(), steps, (int32_t *)packed + (int64_t)p * steps * WIDTH + j);
            if (precision == INT8) scatter((int32_t *)scale.data(), groups, (int32_t *)scales + (int64_t)p * groups * WIDTH + j);
        }
    }
}

// x (T, in) -> out (T, matrix.out).
void qkv_linear(const Matrix *matrix, int precision, const float *x, int T, float *out, int threads) {
    multiply_by_all(*matrix, precision, x, T, threads, [&](int, int row, int column, V value, __mmask16 mask) {
        _mm512_mask_storeu_ps(out + (int64_t)row * matrix->out + column, mask, value);
    });
}

// The `count` largest of each row of log_softmax(x W^T + bias), best first: scores and ids (T, count). No row is ever
// written as a whole.
void qkv_likeliest(const Matrix *matrix, int precision, const float *x, int T, int count, float *scores, int32_t *ids, int threads) {
    std::vector<Best> found((size_t)threads * T, Best(count));
    multiply_by_all(*matrix, precision, x, T, threads, [&](int rank, int row, int column, V value, __mmask16 mask) {
        found[(size_t)rank * T + row].add(column, value, mask);
    });
    for (int row = 0; row < T; row++) {
        Best &all = found[row];
        for (int rank = 1; rank < threads; rank++) all.add(found[(size_t)rank * T + row]);
        float normaliser = all.log_sum();
        for (int i = 0; i < count; i++) {
            scores[(size_t)row * count + i] = all.scores[i] - normaliser;
            ids[(size_t)row * count + i] = all.ids[i];
        }
    }
}

// The batch's tokens through layers `first` to `last`.
void qkv_forward(const Stack *stack, const Batch *batch) {
    struct Chunk { int from, to; int64_t row; int rows; };
    std::vector<Chunk> chunks;
    int64_t row = 0;
    for (int i = 0; i < batch->sequences; i++) {
        if (chunks.empty() || chunks.back().rows + batch->lengths[i] > CHUNK) chunks.push_back({i, i, row, 0});
        chunks.back().to = i + 1;
        chunks.back().rows += batch->lengths[i];
        row += batch->lengths[i];
    }
    if (!row) return;
    int threads = batch->threads;
    if ((int)chunks.size() >= 2 * threads || threads == 1) {
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
