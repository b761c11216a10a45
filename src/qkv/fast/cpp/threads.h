// The threads of a computation, and its memory.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <immintrin.h>
#include <sched.h>

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

}  // namespace
