// The matrix product in three precisions: four bytes of an activation (one float32, two bfloat16, four int8) are
// broadcast and multiplied with the same four bytes of as many columns as a vector has numbers, by FMA, VDPBF16PS or
// VPDPBUSD. A CPU without the latter two multiplies the halves of the four bytes, one after the other.
//
// int8 is dynamic: groups of 128 inputs of a token, and of a column, have a scale each.

#pragma once

#include <algorithm>
#include <utility>

#include "interface.h"
#include "threads.h"
#include "vectors.h"

#if LANES == 16
#define VPDPBUSD "vpdpbusd"
#else
#define VPDPBUSD "%{vex%} vpdpbusd"  // the only encoding that AVX-VNNI has
#endif

namespace {

enum Precision { FP32, BF16, INT8 };

constexpr int WIDTH = LANES == 16 ? 64 : 16;  // columns of a panel: four vectors, or two
constexpr int HEIGHT = 6;                     // rows of a tile: 24 accumulators of 32 registers, or 12 of 16
constexpr int FEW = 11 * HEIGHT;              // at most so many rows take a panel in slices
constexpr int GROUP = 128;                    // inputs that share a scale in int8
constexpr int STEPS = GROUP / 4;              // of a slice, and of a group in int8: 8 KB or 2, which the nearest cache holds

int bytes_of(int precision) { return precision == FP32 ? 4 : precision == BF16 ? 2 : 1; }
int groups_of(int precision, int in) { return precision == INT8 ? (in + GROUP - 1) / GROUP : 1; }
int panels_of(int out) { return (out + WIDTH - 1) / WIDTH; }
int vectors_of(int out) { return (std::min(WIDTH, out) + LANES - 1) / LANES; }

// ---------------------------------------------------------------- rows in a precision

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
        V most = set(0.0f), odd = set(0.0f);
        for (int i = 0; i < size; i += LANES) {
            most = larger(most, absolute(load(in + i)));
            odd += load(in + i) * 0.0f;  // NaN for what is not finite, which `larger` may lose
        }
        float scale = largest(most) / 127 + sum(odd);
        float rate = scale > 0 ? 1 / scale : 0;
        I total = set(0);
        for (int i = 0; i < size; i += LANES) {
            I q = nearest(load(in + i) * rate);
            total += q;
            write(rows.row(row) + g * GROUP + i, __builtin_convertvector(q, Bytes));
        }
        rows.scale[row * rows.groups + g] = scale;
        rows.start[row * rows.groups + g] = -128 * sum(total);
    }
}

template <int P>
void convert(const float *x, int width, const Rows &rows, int row) {
    if constexpr (P == INT8) {
        quantise(x, width, rows, row);
    } else if constexpr (P == FP32) {
        for (int i = 0; i < width; i += LANES) write(rows.row(row) + i * 4, load(x + i));
    } else {
        for (int i = 0; i < width; i += LANES) write(rows.row(row) + i * 2, to_bf16(load(x + i)));
    }
}

template <class X>
void scatter(const X *line, int steps, X *column) {  // one column of a panel
    for (int s = 0; s < steps; s++) column[s * WIDTH] = line[s];
}

// ---------------------------------------------------------------- four bytes times four bytes

template <int P>
constexpr int ELEMENTS = P == FP32 ? 1 : P == BF16 ? 2 : 4;

// In how many parts: one where this CPU has an instruction for it.
template <int P>
constexpr int PARTS = 2;
template <>
constexpr int PARTS<FP32> = 1;
#if defined(__AVX512BF16__)
template <>
constexpr int PARTS<BF16> = 1;
#endif
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && LANES == 8)
template <>
constexpr int PARTS<INT8> = 1;
#endif

// The first or second part: one of two bfloat16 as float32, or two of four int8 as int16.
template <int P, int PART, class Short>
[[gnu::always_inline]] inline I part(I four) {
    if constexpr (PARTS<P> == 1) return four;
    else if constexpr (P == BF16) return PART ? four & set((int32_t)0xFFFF0000) : four << 16;
    else return PART ? (I)((Vector<Short, 2 * LANES>)four >> 8) : (I)((Vector<Short, 2 * LANES>)(four << 8) >> 8);
}

// total + weight * x. As text, since GCC would copy the sums of intrinsics from register to register.
template <int P>
[[gnu::always_inline]] inline I add_product(I total, I weight, I x) {
    if constexpr (PARTS<P> == 1 && P == INT8) asm(VPDPBUSD " %2, %1, %0" : "+v"(total) : "v"(weight), "v"(x));
    else if constexpr (PARTS<P> == 1 && P == BF16) asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(weight), "v"(x));
    else if constexpr (P == INT8) asm("vpaddd %1, %0, %0" : "+v"(total) : "v"(sums_of_pairs(weight, x)));
    else asm("vfmadd231ps %2, %1, %0" : "+v"(total) : "v"(weight), "v"(x));
    return total;
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

struct Slice {  // of a panel: steps `first` to `last`
    int first, last;
    const char *ahead;  // what is fetched meanwhile: from here,
    int pace;           // and so many bytes further with each step
};

// M rows from `row` on times N vectors of columns of a slice, or of a WHOLE panel. The first slice sets out, rows
// `out_stride` numbers apart, and others go on from there, so that slices give what the whole panel gives.
template <int P, int M, int N, bool WHOLE>
[[gnu::flatten]] void tile(const Rows &rows, int row, const char *panel, const float *scale, const Slice &slice, float *out, int out_stride) {
    const char *x = rows.row(row), *ahead = slice.ahead;
    int64_t stride = rows.stride;
    for (int from = slice.first, to; from < slice.last; from = to) {
        int g = from / STEPS;
        to = P == INT8 ? std::min(slice.last, from + STEPS) : slice.last;
        I total[M * N], weight[N];
        each<M * N>([&](auto i) {
            if (P == INT8) total[i] = set(rows.start[(row + i / N) * rows.groups + g]);
            else total[i] = g ? (I)load(out + i / N * out_stride + i % N * LANES) : set(0);
        });
        for (int s = from; s < to; s++) {
            if (WHOLE) ahead = panel + (int64_t)(s + 16) * WIDTH * 4;
            each<WHOLE ? N : 2>([&](auto n) { __builtin_prefetch(ahead + n * LANES * 4); });
            if (!WHOLE) ahead += slice.pace;
            each<PARTS<P>>([&](auto p) {
                each<N>([&](auto n) { weight[n] = part<P, p, uint16_t>(read<I>(panel + ((int64_t)s * WIDTH + n * LANES) * 4)); });
                each<M>([&](auto m) {
                    I one = part<P, p, int16_t>(set(read<int32_t>(x + m * stride + s * 4)));
                    each<N>([&](auto n) { total[m * N + n] = add_product<P>(total[m * N + n], weight[n], one); });
                });
            });
        }
        each<M * N>([&](auto i) {
            constexpr int m = i / N, n = i % N;
            float *sum = out + m * out_stride + n * LANES;
            if constexpr (P == INT8) {  // in one expression, which compilers round in one way
                V scales = rows.scale[(row + m) * rows.groups + g] * load(scale + g * WIDTH + n * LANES);
                store(sum, __builtin_convertvector(total[i], V) * scales + (g ? load(sum) : set(0.0f)));
            } else {
                store(sum, (V)total[i]);
            }
        });
    }
}

template <int P>
void product(const Rows &rows, int row, int height, const char *panel, const float *scale, int in, int vectors, float *out, int out_stride) {
    int steps = in / ELEMENTS<P>;
    each<HEIGHT>([&](auto m) {
        if (height == m + 1) each<WIDTH / LANES>([&](auto n) {
            if (vectors == n + 1) tile<P, m + 1, n + 1, true>(rows, row, panel, scale, {0, steps, nullptr, 0}, out, out_stride);
        });
    });
}

// With all columns of a panel, which the last one may lack: fewer sizes of tiles to be compiled.
template <int P>
void product(const Rows &rows, int row, int height, const char *panel, const float *scale, const Slice &slice, float *out, int out_stride) {
    each<HEIGHT>([&](auto m) {
        if (height == m + 1) tile<P, m + 1, WIDTH / LANES, false>(rows, row, panel, scale, slice, out, out_stride);
    });
}

// work(P) with a precision that the compiler knows.
template <class Work>
void with(int precision, Work work) {
    if (precision == INT8) work(std::integral_constant<int, INT8>{});
    else if (precision == BF16) work(std::integral_constant<int, BF16>{});
    else work(std::integral_constant<int, FP32>{});
}

// ---------------------------------------------------------------- rows times a matrix

// Columns of x W^T + bias, a part of them for each thread: take(row, column, a vector, how many of its numbers there are).
// Few rows wait for weights from memory, which come while they compute only if they are fetched in an even flow.
template <int P, class Take>
void multiply(const Matrix &w, const Rows &rows, int count, Team team, Take take) {
    int panels = panels_of(w.out), groups = groups_of(P, w.in), steps = w.in / ELEMENTS<P>;
    int tiles = (count + HEIGHT - 1) / HEIGHT;
    int64_t size = (int64_t)w.in * WIDTH * bytes_of(P);
    alignas(64) float out[FEW * WIDTH];
    for (int p = panels * team.rank / team.size; p < panels * (team.rank + 1) / team.size; p++) {
        const char *panel = w.weight + p * size;
        const float *scale = w.scale + (int64_t)p * groups * WIDTH;
        int vectors = vectors_of(w.out - p * WIDTH);
        auto give = [&](int row, int height) {
            for (int n = 0; n < vectors; n++) {
                int column = p * WIDTH + n * LANES, left = std::min(LANES, w.out - column);
                V bias = w.bias ? load(w.bias + column, left) : set(0.0f);
                for (int m = 0; m < height; m++)
                    take(row + m, column, load(out + m * WIDTH + n * LANES) + bias, left);
            }
        };
        if (tiles == 1 || count > FEW) {
            for (int row = 0; row < count; row += HEIGHT) {
                int height = std::min(HEIGHT, count - row);
                product<P>(rows, row, height, panel, scale, w.in, vectors, out, WIDTH);
                give(row, height);
            }
        } else {  // all tiles have their turn with a slice, and each fetches a part of the next one
            for (int first = 0, last; first < steps; first = last) {
                last = std::min(steps, first + STEPS);
                for (int t = 0; t < tiles; t++) {
                    const char *ahead = panel + (int64_t)(last + (last - first) * t / tiles) * WIDTH * 4;
                    Slice slice{first, last, ahead, WIDTH * 4 / tiles};
                    product<P>(rows, t * HEIGHT, std::min(HEIGHT, count - t * HEIGHT), panel, scale, slice, out + t * HEIGHT * WIDTH, WIDTH);
                }
            }
            give(0, count);
        }
    }
}

}  // namespace
