// SPDX-License-Identifier: Apache-2.0
/* Numbers as they lie in memory, and as the kernels compute with them. */

#pragma once

#include <stdint.h>

#include "abi.h"

#define INLINE static inline __attribute__((always_inline))
#define WIDTH 8 /* of a vector of floats */

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef floats unaligned_floats __attribute__((aligned(4)));
typedef int32_t integers __attribute__((vector_size(4 * WIDTH)));

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

typedef union {
    float value;
    uint32_t bits;
} Float;

INLINE uint32_t bits_of(float value) { return ((Float){value}).bits; }
INLINE float of_bits(uint32_t bits) { return ((Float){.bits = bits}).value; }

INLINE float load(const void *from, int dtype, int64_t index) {
    if (dtype == FLOAT32) return ((const float *)from)[index];
    return of_bits((uint32_t)((const uint16_t *)from)[index] << 16);
}

/* The nearest, of two the even one; what is not a number stays so */
INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value), rounded = bits + 0x7fff + (bits >> 16 & 1);
    return value == value ? (uint16_t)(rounded >> 16) : 0x7fc0;
}

INLINE void store(void *to, int dtype, int64_t index, float value) {
    if (dtype == FLOAT32)
        ((float *)to)[index] = value;
    else
        ((uint16_t *)to)[index] = to_bfloat16(value);
}

INLINE float sum_of(floats v) {
    float total = 0;
    for (int lane = 0; lane < WIDTH; lane++) total += v[lane];
    return total;
}

/* e^x for x <= 0, off by 2^-22 of it at most, 0 below -87: 2^n times a polynomial (Cephes' expf) */
INLINE floats exponential(floats x) {
    const integers small = x < -87.0f;
    x = (floats)((integers)x & ~small);
    const floats n = x * 1.44269504f - 0.5f;
    const integers whole = __builtin_convertvector(n, integers); /* towards 0, which for n <= 0 is up: to the nearest */
    const floats up = __builtin_convertvector(whole, floats);
    const floats r = x - up * 0.693359375f + up * 2.12194440e-4f;
    floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    y *= (floats)((whole + 127) << 23);
    return (floats)((integers)y & ~small);
}
