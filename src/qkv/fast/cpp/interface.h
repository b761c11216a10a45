// What Python hands over: the same structures as in native.py.
//
// Legend: T tokens, N sequences, D model width, H heads, E = D / H head width.

#pragma once

#include <cstdint>

struct Matrix {            // packed by qkv_pack; the bias may be null
    const char *weight;    // (panels, steps, WIDTH, n) with n elements in four bytes, a step
    const float *scale;    // (panels, WIDTH) in int8
    const int32_t *start;  // (panels, WIDTH) in int8: what a sum of products begins with
    const float *ease;     // (in) in int8: by what inputs are multiplied before they are rounded
    const float *bias;     // (out)
    float floor;           // what no input is below, or -infinity; the bias knows of it
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

