// The matrix product in three precisions: four bytes of an activation (one float32, two bfloat16, four int8) are
// broadcast and multiplied with the same four bytes of as many columns as a vector has numbers, by FMA, VDPBF16PS or
// VPDPBUSD. A CPU without the latter two multiplies the halves of the four bytes, one after the other, and one with
// AMX multiplies tiles.

#pragma once

#include "threads.h"
#include "tiles.h"

#if LANES == 16
#define VPDPBUSD "vpdpbusd"
#else
#define VPDPBUSD "%{vex%} vpdpbusd"  // the only encoding that AVX-VNNI has
#endif

namespace {

// ---------------------------------------------------------------- four bytes times four bytes

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
    if constexpr (PARTS<P> == 1 && P == INT8) asm(VPDPBUSD " %1, %2, %0" : "+v"(total) : "v"(weight), "v"(x));
    else if constexpr (PARTS<P> == 1 && P == BF16) asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(weight), "v"(x));
    else if constexpr (P == INT8) asm("vpaddd %1, %0, %0" : "+v"(total) : "v"(sums_of_pairs(weight, x)));
    else asm("vfmadd231ps %2, %1, %0" : "+v"(total) : "v"(weight), "v"(x));
    return total;
}

struct Slice {  // of a panel: steps `first` to `last`
    int first, last;
    const char *ahead;  // what is fetched meanwhile: from here,
    int pace;           // and so many bytes further with each step
};

// M rows from `row` on times N vectors of columns of a slice, or of a WHOLE panel. The first slice sets out, rows
// `out_stride` numbers apart, and others go on from there, so that slices give what the whole panel gives.
template <int P, int M, int N, bool WHOLE>
[[gnu::flatten]] void block(const Rows &rows, int row, const char *panel, const Slice &slice, float *out, int out_stride) {
    const char *x = rows.row(row), *ahead = slice.ahead;
    int64_t stride = rows.stride();
    I total[M * N], weight[N];
    each<M * N>([&](auto i) {
        if (slice.first) total[i] = (I)load(out + i / N * out_stride + i % N * LANES);
        else total[i] = set(0);
    });
    for (int s = slice.first; s < slice.last; s++) {
        if (WHOLE) ahead = panel + panel_bytes<P>(s + 16);
        each<WHOLE ? N : 2>([&](auto n) { __builtin_prefetch(ahead + n * LANES * 4); });
        if (!WHOLE) ahead += slice.pace;
        each<PARTS<P>>([&](auto p) {
            each<N>([&](auto n) { weight[n] = part<P, p, int16_t>(read<I>(panel + panel_bytes<P>(s) + n * LANES * 4)); });
            each<M>([&](auto m) {
                I one = part<P, p, uint16_t>(set(read<int32_t>(x + m * stride + s * 4)));
                each<N>([&](auto n) { total[m * N + n] = add_product<P>(total[m * N + n], weight[n], one); });
            });
        });
    }
    each<M * N>([&](auto i) { store(out + i / N * out_stride + i % N * LANES, (V)total[i]); });
}

// At most HEIGHT rows times some vectors of columns of a whole panel.
template <int P>
void product(const Rows &rows, int row, int height, const char *panel, int steps, int vectors, float *out, int out_stride) {
    if constexpr (TILED<P>) multiply_tiles<P>(rows, row, height, panel, vectors, 0, steps, out, out_stride, [] {});
    else each<HEIGHT<P>>([&](auto m) {
        if (height == m + 1) each<WIDTH<P> / LANES>([&](auto n) {
            if (vectors == n + 1) block<P, m + 1, n + 1, true>(rows, row, panel, {0, steps, nullptr, 0}, out, out_stride);
        });
    });
}

// The same of a slice, without AMX. It takes all columns that a panel can have: fewer sizes of blocks to be compiled.
template <int P>
void product(const Rows &rows, int row, int height, const char *panel, const Slice &slice, float *out) {
    each<HEIGHT<P>>([&](auto m) {
        if (height == m + 1) block<P, m + 1, WIDTH<P> / LANES, false>(rows, row, panel, slice, out, WIDTH<P>);
    });
}

// ---------------------------------------------------------------- rows times a matrix

// Sums of products, (rows, WIDTH) of a panel, which are given as columns of x W^T + bias, row by row:
// take(row, column, a vector, how many of its numbers there are).
template <int P, class Take>
class Sums {
    static constexpr int MOST = WIDTH<P> / LANES;  // vectors of a row
    const Matrix &w;
    const Rows &rows;
    Take &take;
    const float *from;
    int row, column, vectors;
    V bias[MOST];

    int some(int n) const { return std::min(LANES, w.out - column - n * LANES); }  // numbers of a vector

public:
    int left = 0;  // rows

    Sums(const Matrix &w, const Rows &rows, Take &take) : w(w), rows(rows), take(take) {}

    void begin(const float *sums, int first_row, int height, int panel) {
        from = sums, row = first_row, left = height, column = panel * WIDTH<P>;
        vectors = vectors_of<P>(w.out - column);
        for (int n = 0; n < vectors; n++) bias[n] = w.bias ? load(w.bias + column + n * LANES, some(n)) : set(0.0f);
    }

    [[gnu::always_inline]] inline void give(int most) {
        for (most = std::min(most, left), left -= most; most > 0; most--, row++, from += WIDTH<P>)
            each<MOST>([&](auto n) {
                if (n >= vectors) return;
                int at = column + n * LANES;
                V sum = load(from + n * LANES);
                if constexpr (P == INT8)
                    sum = __builtin_convertvector((I)sum + read<I>(w.start + at), V) * (rows.scale[row] * load(w.scale + at));
                take(row, at, sum + bias[n], some(n));
            });
    }
};

// Some panels by vectors. Few rows wait for weights from memory, which come while they compute only if they are fetched in
// an even flow.
template <int P, class Take>
void multiply_by_vectors(const Matrix &w, const Rows &rows, int count, int first_panel, int last_panel, Sums<P, Take> &sums) {
    constexpr int HIGH = HEIGHT<P>;
    int steps = rows.steps;
    int64_t size = panel_bytes<P>(steps_of(P, w.in));
    alignas(64) float out[FEW<P> * WIDTH<P>];
    auto give = [&](int row, int height, int panel) {
        sums.begin(out, row, height, panel);
        sums.give(sums.left);
    };
    for (int p = first_panel; p < last_panel; p++) {
        const char *panel = w.weight + p * size, *next = panel + size;
        if (count <= HIGH || count > FEW<P>) {
            for (int row = 0; row < count; row += HIGH) {
                int height = std::min(HIGH, count - row);
                product<P>(rows, row, height, panel, steps, vectors_of<P>(w.out - p * WIDTH<P>), out, WIDTH<P>);
                give(row, height, p);
            }
            continue;
        }
        int turns = (count + HIGH - 1) / HIGH;
        for (int first = 0, last; first < steps; first = last) {
            last = std::min(steps, first + SLICE<P>);
            const char *ahead = last < steps ? panel + panel_bytes<P>(last) : next;
            for (int t = 0; t < turns; t++) {  // all rows have their turn, and each fetches a part of the next slice
                Slice slice{first, last, ahead + panel_bytes<P>(last - first) * t / turns, WIDTH<P> * 4 / turns};
                product<P>(rows, t * HIGH, std::min(HIGH, count - t * HIGH), panel, slice, out + t * HIGH * WIDTH<P>);
            }
        }
        give(0, count, p);
    }
}

// Some panels by AMX. While tiles are multiplied, the sums that the last ones made are given and the next panel is fetched.
template <int P, class Take>
void multiply_by_tiles(const Matrix &w, const Rows &rows, int count, int first_panel, int last_panel, Sums<P, Take> &sums) {
    constexpr int HIGH = HEIGHT<P>, LINE = 64;
    int steps = rows.steps;
    int64_t size = panel_bytes<P>(steps_of(P, w.in));
    alignas(64) float out[FEW<P> * WIDTH<P>];
    for (int p = first_panel; p < last_panel; p++) {
        const char *panel = w.weight + p * size;
        int vectors = vectors_of<P>(w.out - p * WIDTH<P>);
        for (int begin = 0; begin < count; begin += FEW<P>) {
            int end = std::min(count, begin + FEW<P>), turns = (end - begin + HIGH - 1) / HIGH;
            int lines = (TILE * WIDTH<P> * 4 / LINE + turns - 1) / turns;
            for (int first = 0, last; first < steps; first = last) {
                last = std::min(steps, first + SLICE<P>);
                int tiles = (last - first) / TILE, some = (HIGH + tiles - 1) / tiles;
                const char *ahead = panel + size + panel_bytes<P>(first);
                for (int row = begin; row < end; row += HIGH) {
                    int height = std::min(HIGH, end - row);
                    float *made = out + (row - begin) * WIDTH<P>;
                    multiply_tiles<P>(rows, row, height, panel, vectors, first, last, made, WIDTH<P>, [&] {
                        for (int i = 0; i < lines; i++) __builtin_prefetch(ahead + i * LINE, 0, 2);
                        ahead += lines * LINE;
                        sums.give(some);
                    });
                    if (last == steps) sums.begin(made, row, height, p);
                }
            }
        }
    }
    sums.give(sums.left);
}

// Columns of x W^T + bias, a part of them for each thread: take(row, column, a vector, how many of its numbers there are).
template <int P, class Take>
void multiply(const Matrix &w, const Rows &rows, int count, Team team, Take take) {
    int panels = panels_of<P>(w.out), first = panels * team.rank / team.size, last = panels * (team.rank + 1) / team.size;
    Sums<P, Take> sums(w, rows, take);
    if constexpr (TILED<P>) multiply_by_tiles(w, rows, count, first, last, sums);
    else multiply_by_vectors(w, rows, count, first, last, sums);
}

}  // namespace
