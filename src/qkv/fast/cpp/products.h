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

// M rows from `row` on times N vectors of columns of a slice, or of a WHOLE panel. The first slice sets out, rows
// `out_stride` numbers apart, and others go on from there, so that slices give what the whole panel gives.
template <int P, int M, int N, bool WHOLE>
[[gnu::flatten]] void block(const Rows &rows, int row, const char *panel, const Slice &slice, float *out, int out_stride) {
    const char *x = rows.row(row), *ahead = slice.ahead;
    int64_t stride = rows.steps * 4;
    I total[M * N], weight[N];
    each<M * N>([&](auto i) {
        if (slice.first) total[i] = (I)load(out + i / N * out_stride + i % N * LANES);
        else total[i] = set(0);
    });
    for (int s = slice.first; s < slice.last; s++) {
        if (WHOLE) ahead = panel + (int64_t)(s + 16) * WIDTH * 4;
        each<WHOLE ? N : 2>([&](auto n) { __builtin_prefetch(ahead + n * LANES * 4); });
        if (!WHOLE) ahead += slice.pace;
        each<PARTS<P>>([&](auto p) {
            each<N>([&](auto n) { weight[n] = part<P, p, int16_t>(read<I>(panel + ((int64_t)s * WIDTH + n * LANES) * 4)); });
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
    Slice whole{0, steps, nullptr, 0};
    if constexpr (TILED<P>) multiply_tiles<P>(rows, row, height, panel, vectors, whole, out, out_stride);
    else each<HEIGHT<P>>([&](auto m) {
        if (height == m + 1) each<WIDTH / LANES>([&](auto n) {
            if (vectors == n + 1) block<P, m + 1, n + 1, true>(rows, row, panel, whole, out, out_stride);
        });
    });
}

// The same of a slice. Without AMX it takes all columns that a panel can have: fewer sizes of blocks to be compiled.
template <int P>
void product(const Rows &rows, int row, int height, const char *panel, int vectors, const Slice &slice, float *out, int out_stride) {
    if constexpr (TILED<P>) multiply_tiles<P>(rows, row, height, panel, vectors, slice, out, out_stride);
    else each<HEIGHT<P>>([&](auto m) {
        if (height == m + 1) block<P, m + 1, WIDTH / LANES, false>(rows, row, panel, slice, out, out_stride);
    });
}

// ---------------------------------------------------------------- rows times a matrix

// Columns of x W^T + bias, a part of them for each thread: take(row, column, a vector, how many of its numbers there are).
// Few rows wait for weights from memory, which come while they compute only if they are fetched in an even flow.
template <int P, class Take>
void multiply(const Matrix &w, const Rows &rows, int count, Team team, Take take) {
    constexpr int HIGH = HEIGHT<P>;
    int panels = panels_of(w.out), steps = steps_of(P, w.in);
    alignas(64) float out[FEW<P> * WIDTH];
    for (int p = panels * team.rank / team.size; p < panels * (team.rank + 1) / team.size; p++) {
        const char *panel = w.weight + p * panel_bytes(steps);
        int vectors = vectors_of(w.out - p * WIDTH);
        auto give = [&](int row, int height) {
            for (int n = 0; n < vectors; n++) {
                int column = p * WIDTH + n * LANES, left = std::min(LANES, w.out - column);
                V bias = w.bias ? load(w.bias + column, left) : set(0.0f);
                for (int m = 0; m < height; m++) {
                    V sum = load(out + m * WIDTH + n * LANES);
                    if constexpr (P == INT8)
                        sum = __builtin_convertvector((I)sum + read<I>(w.start + column), V) * (rows.scale[row + m] * load(w.scale + column));
                    take(row + m, column, sum + bias, left);
                }
            }
        };
        if constexpr (!TILED<P>) {
            bool whole = count <= HIGH || count > FEW<P>;
            for (int row = 0; whole && row < count; row += HIGH) {
                int height = std::min(HIGH, count - row);
                product<P>(rows, row, height, panel, steps, vectors, out, WIDTH);
                give(row, height);
            }
            if (whole) continue;
        }
        for (int row = 0; row < count; row += FEW<P>) {
            constexpr int AT_ONCE = TILED<P> ? TILE * TILE * 4 : WIDTH * 4;  // bytes of a tile, or of a step
            int height = std::min(FEW<P>, count - row), turns = (height + HIGH - 1) / HIGH;
            for (int first = 0, last; first < steps; first = last) {
                last = std::min(steps, first + SLICE<P>);
                for (int t = 0; t < turns; t++) {  // all rows have their turn, and each fetches a part of the next slice
                    Slice slice{first, last, panel + panel_bytes(last) + panel_bytes(last - first) * t / turns, AT_ONCE / turns};
                    product<P>(rows, row + t * HIGH, std::min(HIGH, height - t * HIGH), panel, vectors, slice, out + t * HIGH * WIDTH, WIDTH);
                }
            }
            give(row, height);
        }
    }
}

}  // namespace
