// The matrix product by AMX, whose eight registers are tiles of 16 rows of 64 bytes: 16 steps of as many rows, or of 16
// columns step after step, or 16 x 16 sums.

#pragma once

#include "rows.h"

#if AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if AMX

bool tiles_allowed() {  // Linux gives a process the registers when it asks for them
    constexpr int ASK = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}

class Tiles {  // the registers of this thread, while one of these lives, if they are used
    struct alignas(64) Shape {
        uint8_t palette = 1, rest[15] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
    };
    const bool used;

public:
    Tiles(bool used) : used(used) {
        Shape shape;
        if (used) asm volatile("ldtilecfg %0" ::"m"(shape));
    }
    Tiles(const Tiles &) = delete;
    ~Tiles() {
        if (used) asm volatile("tilerelease");
    }
};

template <int T>
void load_tile(const void *from, int64_t stride) { asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory"); }
template <int T>  // the same, past the nearest cache, which is for what is read again soon
void load_tile_once(const void *from, int64_t stride) { asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory"); }
template <int T>
void store_tile(void *to, int64_t stride) { asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory"); }
template <int T>
void clear_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }

template <int P, int SUMS, int ROWS, int COLUMNS>
void add_tiles() {  // SUMS += ROWS times COLUMNS
    if constexpr (P == INT8) asm volatile("tdpbusd %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(COLUMNS), "i"(ROWS), "i"(SUMS));
    else asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(COLUMNS), "i"(ROWS), "i"(SUMS));
}

// One or two tiles of rows, from `row` on, times some vectors of columns of a slice of a panel, steps `first` to `last`;
// meanwhile() is called for each tile of steps. The first slice sets out, and others go on from there: then `out` can be
// read to the end of a tile.
template <int P, int HIGH, class Meanwhile>
[[gnu::flatten]] void multiply_tiles(const Rows &rows, int row, int height, const char *panel, int vectors, int first, int last, float *out, int out_stride, Meanwhile meanwhile) {
    constexpr int WIDE = WIDTH<P> / TILE;  // tiles of columns
    const char *x = rows.row(row);
    int64_t stride = rows.stride();
    each<HIGH>([&](auto r) {
        each<WIDE>([&](auto c) {
            if (first) load_tile<r * WIDE + c>(out + r * TILE * out_stride + c * LANES, out_stride * 4);
            else clear_tile<r * WIDE + c>();
        });
    });
    for (int s = first; s < last; s += TILE) {
        const char *columns = panel + panel_bytes<P>(s);
        each<HIGH>([&](auto r) { load_tile_once<4 + r>(x + r * TILE * stride + s * 4, stride); });
        each<WIDE>([&](auto c) {
            if (c >= vectors) return;
            load_tile<6 + c>(columns + c * LANES * 4, WIDTH<P> * 4);
            each<HIGH>([&](auto r) { add_tiles<P, r * WIDE + c, 4 + r, 6 + c>(); });
        });
        meanwhile();
    }
    each<HIGH>([&](auto r) {
        each<WIDE>([&](auto c) {
            if (c >= vectors) return;
            float *to = out + r * TILE * out_stride + c * LANES;
            if (height >= (r + 1) * TILE) return store_tile<r * WIDE + c>(to, out_stride * 4);
            alignas(64) float sums[TILE * TILE];
            store_tile<r * WIDE + c>(sums, TILE * 4);
            for (int m = 0; m < height - r * TILE; m++) store(to + m * out_stride, load(sums + m * TILE));
        });
    });
}

template <int P, class Meanwhile>
void multiply_tiles(const Rows &rows, int row, int height, const char *panel, int vectors, int first, int last, float *out, int out_stride, Meanwhile meanwhile) {
    if (height > TILE) multiply_tiles<P, 2>(rows, row, height, panel, vectors, first, last, out, out_stride, meanwhile);
    else multiply_tiles<P, 1>(rows, row, height, panel, vectors, first, last, out, out_stride, meanwhile);
}

#else

bool tiles_allowed() { return true; }
struct Tiles {
    Tiles(bool) {}
};
template <int P, class Meanwhile>
void multiply_tiles(const Rows &, int, int, const char *, int, int, int, float *, int, Meanwhile);

#endif

}  // namespace
