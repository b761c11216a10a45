// Rows and columns in a precision, as products take them: four bytes (one float32, two bfloat16, four int8) are a step.
//
// int8 is dynamic: each token has a scale, as each column has. Tokens are unsigned: 0 stands for the least that an input can
// be, where that is known, or else 128 for nothing. Inputs are eased first, by factors by which their columns were divided,
// so that one large input does not cost the others their precision.

#pragma once

#include <algorithm>
#include <utility>

#include "interface.h"
#include "vectors.h"

namespace {

enum Precision { FP32, BF16, INT8 };

constexpr bool tiled(int precision) { return AMX && precision != FP32; }  // multiplied by AMX, in tiles of 16 rows of 64 bytes
template <int P>
constexpr bool TILED = tiled(P);
constexpr int TILE = 16;  // rows of a tile, and steps

constexpr int bytes_of(int precision) { return precision == FP32 ? 4 : precision == BF16 ? 2 : 1; }
template <int P>
constexpr int ELEMENTS = 4 / bytes_of(P);  // of a step

template <int P>
constexpr int WIDTH = TILED<P> ? 2 * TILE : LANES == 16 ? 64 : 16;  // columns of a panel: two tiles, or four vectors, or two
template <int P>
constexpr int HEIGHT = TILED<P> ? 2 * TILE : 6;  // rows at once: two tiles, or 24 accumulators of 32 registers, or 12 of 16
template <int P>
constexpr int FEW = TILED<P> ? 256 : 11 * HEIGHT<P>;  // rows that take a panel in slices: by AMX so many at a time, else no more
constexpr int ZERO = 128;                             // in int8, where inputs are of both signs
template <int P>
constexpr int DEEP = 512 * ELEMENTS<P>;  // numbers of the inner layer that many rows have at a time
template <int P>
constexpr int SLICE = TILED<P> ? 192 : 32;  // steps of a slice: 24 KB, 8 or 2, for the nearest cache

template <int P>
int panels_of(int out) { return (out + WIDTH<P> - 1) / WIDTH<P>; }
template <int P>
int vectors_of(int out) { return (std::min(WIDTH<P>, out) + LANES - 1) / LANES; }
template <int P>
int64_t panel_bytes(int steps) { return (int64_t)steps * WIDTH<P> * 4; }
int64_t whole_tiles(int rows) { return (rows + TILE - 1) / TILE * TILE; }  // AMX reads rows that are not there, to no effect

int steps_of(int precision, int in) {  // for AMX whole tiles, which are filled up with zeros
    int line = tiled(precision) ? TILE : 1, count = line * 4 / bytes_of(precision);
    return (in + count - 1) / count * line;
}

// From row to row: an odd number of cache lines, so that those of one step do not fall into a few places of a cache.
int64_t stride_of(int steps) { return ((steps * 4 + 63) / 64 | 1) * 64; }

struct Rows {  // activations in a precision, ready to be multiplied
    char *data;
    int steps;
    float *scale = nullptr;          // (rows) in int8
    const Matrix *matrix = nullptr;  // by which they are multiplied, in int8

    int64_t stride() const { return stride_of(steps); }
    char *row(int i) const { return data + i * stride(); }
};

// Numbers at(0), at(LANES), ... as bytes, the largest of them as `most` above or below `zero`; returns the scale.
template <class At>
float quantise(At at, int width, float most, float zero, char *to) {
    I largest_yet = set(0);  // as integers numbers have the same order, and NaN comes last
    for (int i = 0; i < width; i += LANES) largest_yet = larger(largest_yet, (I)absolute(at(i)));
    int32_t bits = largest(largest_yet);
    float scale = read<float>(&bits) / most;
    scale += scale * 0;  // NaN for infinity, too
    float rate = scale > 0 ? 1 / scale : 0;
    for (int i = 0; i < width; i += LANES) write(to + i, __builtin_convertvector(nearest(at(i) * rate + zero), Bytes));
    return scale;
}

float quantise(const float *x, int width, const Matrix &matrix, char *to) {
    float floor = matrix.floor;
    const float *ease = matrix.ease;
    bool above = floor > -INFINITY;  // then zero is 0, and numbers go up to 255
    auto with = [&](auto at) { return quantise(at, width, above ? 255 : 127, above ? 0 : ZERO, to); };
    if (above) return with([=](int i) { return (load(x + i) - floor) * load(ease + i); });
    return with([=](int i) { return load(x + i) * load(ease + i); });
}

// Some numbers of a row, in a precision that needs no scale.
template <int P>
V number(const char *row, int i) {
    if constexpr (P == FP32) return read<V>(row + i * 4);
    else return from_bf16(read<Half>(row + i * 2));
}
template <int P>
void put(char *row, int i, V x) {
    if constexpr (P == FP32) write(row + i * 4, x);
    else write(row + i * 2, to_bf16(x));
}

template <int P>
struct Table {  // such numbers, rows `stride` of them apart
    char *data;
    int64_t stride;

    char *row(int i) const { return data + i * stride * bytes_of(P); }
    V get(int row, int i) const { return number<P>(this->row(row), i); }
    void put(int row, int i, V x) const { ::put<P>(this->row(row), i, x); }
    Table from(int64_t row, int column) const { return {data + (row * stride + column) * bytes_of(P), stride}; }
};

// Zeros after the numbers of a row, up to a whole tile.
template <int P>
void pad(const Rows &rows, int row, int width) {
    int bytes = width * bytes_of(P), beyond = steps_of(P, width) * 4 - bytes;
    if (beyond) std::memset(rows.row(row) + bytes, 0, beyond);
}

template <int P>
void convert(const float *x, int width, const Rows &rows, int row) {
    if constexpr (P == INT8) rows.scale[row] = quantise(x, width, *rows.matrix, rows.row(row));
    else for (int i = 0; i < width; i += LANES) put<P>(rows.row(row), i, load(x + i));
    pad<P>(rows, row, width);
}

template <int P>
void scatter(const int32_t *line, int steps, int32_t *column) {  // one column of a panel
    for (int s = 0; s < steps; s++) column[s * WIDTH<P>] = line[s];
}

template <int P>
void gather(const int32_t *column, int steps, int32_t *line) {
    for (int s = 0; s < steps; s++) line[s] = column[s * WIDTH<P>];
}

// Some columns of a matrix, which has no scales; the first of them begins a panel.
template <int P>
Matrix columns(Matrix w, int first, int count) {
    w.weight += first / WIDTH<P> * panel_bytes<P>(steps_of(P, w.in));
    if (w.bias) w.bias += first;
    w.out = count;
    return w;
}

// A matrix from one of its inputs on, for rows that begin with it. The bias is added once, by the first part.
template <int P>
Matrix inputs_from(Matrix w, int first) {
    w.weight += panel_bytes<P>(first / ELEMENTS<P>);
    if (first) w.bias = nullptr;
    return w;
}

// ---------------------------------------------------------------- numbers that the compiler knows

// work(0), work(1), ...: in a loop it would keep arrays of vectors in memory.
template <class Work, int... I>
[[gnu::always_inline]] inline void each_of(Work work, std::integer_sequence<int, I...>) {
    (work(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, class Work>
[[gnu::always_inline]] inline void each(Work work) {
    each_of(work, std::make_integer_sequence<int, COUNT>{});
}

// work(P) with a precision.
template <class Work>
void with(int precision, Work work) {
    if (precision == INT8) work(std::integral_constant<int, INT8>{});
    else if (precision == BF16) work(std::integral_constant<int, BF16>{});
    else work(std::integral_constant<int, FP32>{});
}

}  // namespace
