// The threads of a computation, and its memory.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include <immintrin.h>
#include <sched.h>
#include <sys/mman.h>

namespace {

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

constexpr size_t HUGE_PAGE = 2 << 20;

// Weights and scratch are read in long runs, for which small pages take longer to be found than to be read.
void ask_for_huge_pages(char *memory, size_t size) {
#ifdef MADV_HUGEPAGE
    auto from = ((uintptr_t)memory + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, to = ((uintptr_t)memory + size) / HUGE_PAGE * HUGE_PAGE;
    if (from < to) madvise((void *)from, to - from, MADV_HUGEPAGE);
#endif
}

class Arena {  // scratch that grows to what is asked of it and is kept
    char *memory = nullptr;
    size_t size = 0, used = 0;

    void release() { ::operator delete(memory, std::align_val_t{HUGE_PAGE}); }

public:
    Arena() = default;
    Arena(const Arena &) = delete;
    ~Arena() { release(); }

    template <class X>
    X *take(size_t count) {
        size_t at = used;
        used += (count * sizeof(X) + 63) / 64 * 64;
        return memory ? (X *)(memory + at) : nullptr;
    }
    template <class Lay>
    void lay(Lay take_all) {  // once to measure, once in memory of that size
        char *old = memory;
        memory = nullptr, used = 0;
        take_all();
        memory = old;
        if (size < used) {
            release();
            size = (used + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
            memory = (char *)::operator new(size, std::align_val_t{HUGE_PAGE});
            ask_for_huge_pages(memory, size);
        }
        used = 0;
        take_all();
    }
};

}  // namespace
