// SPDX-License-Identifier: Apache-2.0
/* The primitives of the products, for the instruction set that a file is compiled for.

   Each has a definition in plain C, which any compiler takes and which the others are tested against: of integers, and
   of fused multiply-adds, every bit is the same; a bf16 dot product of the hardware may round on the way. A vector has
   VECTOR bytes, as the processor has them; -DPLAIN_C and -DVECTOR=64 give the definitions of any width. */
#pragma once

#include <string.h>

#include "numbers.h"

#if !defined(PLAIN_C) && !defined(__AVX2__) && !defined(__ARM_FEATURE_DOTPROD)
#define PLAIN_C
#endif
#ifndef VECTOR
#if defined(PLAIN_C)
#define VECTOR 32
#elif defined(__ARM_FEATURE_DOTPROD)
#define VECTOR 16
#elif defined(__AVX512VNNI__)
#define VECTOR 64
#else
#define VECTOR 32
#endif
#endif

#define WIDE (VECTOR / 4) /* numbers of 32 bits in a vector */

typedef uint8_t vector_u8 __attribute__((vector_size(VECTOR)));
typedef int8_t vector_s8 __attribute__((vector_size(VECTOR)));
typedef uint16_t vector_u16 __attribute__((vector_size(VECTOR)));
typedef int16_t vector_s16 __attribute__((vector_size(VECTOR)));
typedef uint32_t vector_u32 __attribute__((vector_size(VECTOR)));
typedef int32_t vector_s32 __attribute__((vector_size(VECTOR)));
typedef float vector_f32 __attribute__((vector_size(VECTOR)));
typedef uint16_t lanes_u16 __attribute__((vector_size(2 * WIDE))); /* as many numbers as a vector has of 32 bits */
typedef uint8_t lanes_u8 __attribute__((vector_size(WIDE)));

#if defined(PLAIN_C) /* nothing else */
#elif defined(__ARM_FEATURE_DOTPROD)
#include "arm.h"
#else
#include "x86.h"
#endif
#include "plain.h"

/* One number of 32 bits, whatever it is, in each lane */
INLINE vector_s32 everywhere(const void *from) {
    int32_t number;
    memcpy(&number, from, sizeof number);
    return (vector_s32){0} + number;
}

/* Four 16-bit integers as `dot_u8s16` takes them: (0, 2) and (1, 3), or all lower bytes and all upper ones */
INLINE uint64_t arranged(uint64_t x, int bits) {
    if (takes_bytes(bits)) {
        const uint64_t even = 0x0000ff000000ff00;
        x = (x & ~(even | even << 8)) | (x >> 8 & even) | (x & even) << 8;
    }
    return (x & 0xffff00000000ffff) | (x >> 16 & 0xffff0000) | (x & 0xffff0000) << 16;
}

/* Sums of codes times 16-bit integers, PART of each lane at a time: from zero on, `dot_u8s16`, and then `total_of` */
typedef struct {
    vector_s32 first, second;
} Wide;

/* x: what `arranged` made, the same for all lanes */
INLINE Wide dot_u8s16(Wide sums, vector_u8 codes, const uint64_t *x, int bits) {
    const vector_s32 first = everywhere(x), second = everywhere((const uint32_t *)x + 1);
    if (takes_bytes(bits))
        return (Wide){dot_lower(sums.first, (vector_u8)first, codes), dot_upper(sums.second, codes, (vector_s8)second)};
    const vector_s16 even = (vector_s16)((vector_u16)codes & 0xff), odd = (vector_s16)((vector_u16)codes >> 8);
    return (Wide){dot_s16(sums.first, even, (vector_s16)first), dot_s16(sums.second, odd, (vector_s16)second)};
}

INLINE vector_s32 total_of(Wide sums, int bits) {
    return sums.first + (takes_bytes(bits) ? sums.second << 8 : sums.second);
}

/* Codes less their zeros, PART of each lane, as bfloat16: the first two of them, and the other two */
INLINE vector_u32 pair_bf16(vector_u8 codes, vector_s32 zeros, int pair) {
    const vector_s32 first = (vector_s32)codes >> 16 * pair & 0xff, second = (vector_s32)codes >> (16 * pair + 8) & 0xff;
    const vector_u32 low = (vector_u32)__builtin_convertvector(first - zeros, vector_f32) >> 16;
    return low | (vector_u32)__builtin_convertvector(second - zeros, vector_f32); /* below 2^8: nothing in the lower half */
}

/* Numbers [at, at + count) as floats, zeros in the other lanes */
INLINE vector_f32 load_lanes(const void *from, int dtype, int64_t at, int64_t count) {
    vector_f32 values = {0};
    lanes_u16 halves = {0};
    if (dtype == FLOAT32) {
        memcpy(&values, (const float *)from + at, count < WIDE ? (size_t)count * 4 : sizeof values);
        return values;
    }
    memcpy(&halves, (const uint16_t *)from + at, count < WIDE ? (size_t)count * 2 : sizeof halves);
    return (vector_f32)(__builtin_convertvector(halves, vector_u32) << 16);
}

/* The first `count` lanes as numbers [at, at + count), rounded as `to_bfloat16` does */
INLINE void store_lanes(void *to, int dtype, int64_t at, int64_t count, vector_f32 values) {
    if (dtype == FLOAT32) {
        memcpy((float *)to + at, &values, count < WIDE ? (size_t)count * 4 : sizeof values);
        return;
    }
    const vector_u32 bits = (vector_u32)values, is_number = (vector_u32)(values == values);
    const vector_u32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const lanes_u16 halves = __builtin_convertvector((rounded & is_number) | (0x7fc0 & ~is_number), lanes_u16);
    memcpy((uint16_t *)to + at, &halves, count < WIDE ? (size_t)count * 2 : sizeof halves);
}
