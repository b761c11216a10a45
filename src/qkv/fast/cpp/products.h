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
constexpr int GROUP = 128;                    // inputs that share a scale in int8

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

// M rows from `row` on times N vectors of columns of a panel, over `in` inputs -> out, rows `out_stride` numbers apart.
template <int P, int M, int N>
[[gnu::flatten]] void tile(const Rows &rows, int row, const char *panel, const float *scale, int in, float *out, int out_stride) {
    int steps = in / ELEMENTS<P>, group = P == INT8 ? GROUP / ELEMENTS<P> : steps;
    const char *x = rows.row(row);
    int64_t stride = rows.stride;
    for (int g = 0; g * group < steps; g++) {
        I total[M * N], weight[N];
        each<M * N>([&](auto i) {
            total[i] = set(P == INT8 ? rows.start[(row + i / N) * rows.groups + g] : 0);
        });
#pragma GCC unroll 4
        for (int s = g * group; s < std::min(steps, (g + 1) * group); s++) {
            // Few rows wait for memory, which gives more if it is told what comes.
            each<N>([&](auto n) { __builtin_prefetch(panel + ((int64_t)(s + 16) * WIDTH + n * LANES) * 4); });
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
            float *to = out + m * out_stride + n * LANES;
            V done = (V)total[i];
            if constexpr (P == INT8) {
                done = __builtin_convertvector(total[i], V) * rows.scale[(row + m) * rows.groups + g] * load(scale + g * WIDTH + n * LANES);
                if (g) done += load(to);
            }
            store(to, done);
        });
    }
}

template <int P>
void product(const Rows &rows, int row, int height, const char *panel, const float *scale, int in, int vectors, float *out, int out_stride) {
    each<HEIGHT>([&](auto m) {
        if (height == m + 1) each<WIDTH / LANES>([&](auto n) {
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

// ---------------------------------------------------------------- rows times a matrix

// Columns of x W^T + bias, a part of them for each thread: take(row, column, a vector, how many of its numbers there are).
template <int P, class Take>
void multiply(const Matrix &w, const Rows &rows, int count, Team team, Take take) {
    int panels = panels_of(w.out), groups = groups_of(P, w.in);
    int64_t size = (int64_t)w.in * WIDTH * bytes_of(P);
    alignas(64) float out[HEIGHT * WIDTH];
    for (int p = panels * team.rank / team.size; p < panels * (team.rank + 1) / team.size; p++) {
        int vectors = vectors_of(w.out - p * WIDTH);
        for (int row = 0; row < count; row += HEIGHT) {
            int height = std::min(HEIGHT, count - row);
            product<P>(rows, row, height, w.weight + p * size, w.scale + (int64_t)p * groups * WIDTH, w.in, vectors, out, WIDTH);
            for (int n = 0; n < vectors; n++) {
                int column = p * WIDTH + n * LANES, left = std::min(LANES, w.out - column);
                V bias = w.bias ? load(w.bias + column, left) : set(0.0f);
                for (int m = 0; m < height; m++)
                    take(row + m, column, load(out + m * WIDTH + n * LANES) + bias, left);
            }
        }
    }
}

}  // namespace
