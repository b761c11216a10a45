// Vectors as wide as the registers of this CPU, 16 numbers with AVX-512 and 8 with AVX2, and functions of them.
//
// Operators compute on all numbers of a vector at once; what has no operator is written here.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#else
#error "needs AVX-512 with BW, or AVX2 with FMA"
#endif

#if !defined(AMX) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__)
#define AMX 1
#elif !defined(AMX)
#define AMX 0
#endif

namespace {

template <class Number, int COUNT>
using Vector [[gnu::vector_size(COUNT * sizeof(Number))]] = Number;

using V = Vector<float, LANES>;
using I = Vector<int32_t, LANES>;
using U = Vector<uint32_t, LANES>;
using Half = Vector<uint16_t, LANES>;  // bfloat16
using Bytes = Vector<int8_t, LANES>;

// ---------------------------------------------------------------- what differs between CPUs

template <int S>
V swapped(V x) {  // number i in the place of number i ^ S
    constexpr int order = S == 8 || S == 2 ? 0b01001110 : 0b10110001;
#if LANES == 16
    return S >= 4 ? _mm512_shuffle_f32x4(x, x, order) : _mm512_permute_ps(x, order);
#else
    return S == 4 ? _mm256_permute2f128_ps(x, x, 1) : _mm256_permute_ps(x, order);
#endif
}

#if LANES == 16
V set(float x) { return _mm512_set1_ps(x); }
I set(int32_t x) { return (I)_mm512_set1_epi32(x); }
V larger(V a, V b) { return _mm512_max_ps(a, b); }
I larger(I a, I b) { return (I)_mm512_max_epi32((__m512i)a, (__m512i)b); }
V near_inverse(V x) { return _mm512_rcp14_ps(x); }
I nearest(V x) { return (I)_mm512_cvtps_epi32(x); }
float sum(V x) { return _mm512_reduce_add_ps(x); }
float largest(V x) { return _mm512_reduce_max_ps(x); }
int32_t largest(I x) { return _mm512_reduce_max_epi32((__m512i)x); }
bool any_above(V x, float limit) { return _mm512_cmp_ps_mask(x, set(limit), _CMP_GT_OQ); }
I sums_of_pairs(I a, I b) { return (I)_mm512_madd_epi16((__m512i)a, (__m512i)b); }  // of products of 16 bits
#else
V set(float x) { return _mm256_set1_ps(x); }
I set(int32_t x) { return (I)_mm256_set1_epi32(x); }
V larger(V a, V b) { return _mm256_max_ps(a, b); }
I larger(I a, I b) { return (I)_mm256_max_epi32((__m256i)a, (__m256i)b); }
V near_inverse(V x) { return _mm256_rcp_ps(x); }
I nearest(V x) { return (I)_mm256_cvtps_epi32(x); }
bool any_above(V x, float limit) { return _mm256_movemask_ps(_mm256_cmp_ps(x, set(limit), _CMP_GT_OQ)); }
I sums_of_pairs(I a, I b) { return (I)_mm256_madd_epi16((__m256i)a, (__m256i)b); }

template <class X, class Join>
auto joined(X x, Join join) {  // all numbers of a vector into one, by halves
    x = join(x, (X)swapped<4>((V)x));
    x = join(x, (X)swapped<2>((V)x));
    return join(x, (X)swapped<1>((V)x))[0];
}
float sum(V x) { return joined(x, [](V a, V b) { return a + b; }); }
float largest(V x) { return joined(x, [](V a, V b) { return larger(a, b); }); }
int32_t largest(I x) { return joined(x, [](I a, I b) { return larger(a, b); }); }
#endif

// ---------------------------------------------------------------- memory

template <class X>
X read(const void *from) {
    X x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <class X>
void write(void *to, X x) {
    std::memcpy(to, &x, sizeof x);
}

V load(const float *from) { return read<V>(from); }
void store(float *to, V x) { write(to, x); }

V load(const float *from, int count, float rest = 0) {  // as many as there are, the others `rest`
    if (count >= LANES) return load(from);
    V x = set(rest);
    std::memcpy(&x, from, count * sizeof(float));
    return x;
}

void store(float *to, V x, int count) {
    if (count >= LANES) store(to, x);
    else std::memcpy(to, &x, count * sizeof(float));
}

V from_bf16(Half x) { return (V)(__builtin_convertvector(x, U) << 16); }

Half to_bf16(V x) {  // to the nearest, of two the even one
#if defined(__AVX512BF16__)
    return (Half)_mm512_cvtneps_pbh(x);
#else
    U bits = (U)x, near = bits + 0x7FFF + (bits >> 16 & 1);
    return __builtin_convertvector((x == x ? near : bits | 1 << 22) >> 16, Half);  // NaN stays NaN
#endif
}

// ---------------------------------------------------------------- functions

I indices() {  // 0, 1, ...
    I number;
    for (int i = 0; i < LANES; i++) number[i] = i;
    return number;
}

template <int S = LANES / 2>
[[gnu::always_inline]] inline V sums(V *x) {  // the sum of each of as many vectors as one has numbers
    auto second = (indices() & S) != 0;
#pragma GCC unroll 8
    for (int i = 0; i < S; i++) x[i] = (second ? x[i + S] : x[i]) + swapped<S>(second ? x[i] : x[i + S]);
    if constexpr (S > 1) return sums<S / 2>(x);
    else return x[0];
}

V absolute(V x) { return (V)((U)x & 0x7FFFFFFF); }

V inverse(V x) {  // 1 / x for x from 1 to 2^126, by one of Newton's steps
    V near = near_inverse(x);
    return near * (2.0f - x * near);
}

V exp(V x) {  // Cephes' expf: 2^n times a polynomial of the rest; between 1e-38, below which it is 0, and 1e38
    auto none = x < -87.3f;  // not NaN, which stays
    x = x > 87.3f ? set(87.3f) : x;
    I whole = nearest(x * 1.44269504f);
    V n = __builtin_convertvector(whole, V), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    V p = set(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
    return none ? set(0.0f) : (V)((I)(p * r * r + r + 1.0f) + (whole << 23));
}

V gelu(V x) {  // x/2 (1 + erf(x/sqrt(2))), erf by Abramowitz and Stegun 7.1.26
    V z = absolute(x) * 0.70710678f;
    V t = inverse(z * 0.3275911f + 1.0f);
    V p = set(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + c;
    V rest = p * t * exp(-z * z);  // 1 - erf(z)
    V half = x * 0.5f;
    return x < 0.0f ? half * rest : x - half * rest;
}

V near_gelu(V x) {  // within 6e-5, a hundredth of what bfloat16 rounds of 1: x (1/2 + z P(z^2)) with z no further than 4.25
    V z = x > 4.25f ? set(4.25f) : x < -4.25f ? set(-4.25f) : x, square = z * z;
    V p = set(6.0172873e-11f);
    for (float c : {-5.6884646e-9f, 2.3747921e-7f, -5.8383086e-6f, 9.5593957e-5f, -1.1215237e-3f, 9.8584745e-3f, -6.6411341e-2f, 3.9893778e-1f})
        p = p * square + c;
    return x * (z * p + 0.5f);
}

enum Activation { RELU, RELU2, GELU, GELU_TANH, SILU, ACTIVATIONS };

template <int A, bool NEAR>  // NEAR: as exact as bfloat16 and int8 need it
V activate(V x) {
    if constexpr (A == RELU) return larger(set(0.0f), x);  // NaN stays NaN
    else if constexpr (A == RELU2) return activate<RELU, NEAR>(x) * activate<RELU, NEAR>(x);
    else if constexpr (A == GELU) return NEAR ? near_gelu(x) : gelu(x);
    else if constexpr (A == GELU_TANH) return x * inverse(1.0f + exp(x * (x * x * 0.044715f + 1.0f) * (-2 * 0.79788456f)));
    else return x * inverse(1.0f + exp(-x));
}

void softmax(float *x, int count) {  // what follows, up to a whole vector, is written over
    int whole = count / LANES * LANES;
    if (whole < count) store(x + whole, indices() < count - whole ? load(x + whole) : set(-INFINITY));
    V most = set(-INFINITY), total = set(0.0f);
    for (int j = 0; j < count; j += LANES) most = larger(most, load(x + j));
    float highest = largest(most);
    for (int j = 0; j < count; j += LANES) {
        V p = exp(load(x + j) - highest);
        store(x + j, p);
        total += p;
    }
    float share = count ? 1 / sum(total) : 0;
    for (int j = 0; j < count; j += LANES) store(x + j, load(x + j) * share);
}

}  // namespace
