// SPDX-License-Identifier: Apache-2.0
/* The primitives of the products, for the instruction set that a file is compiled for.

   Each has a definition in plain C, which any compiler takes and which the others are tested against: of integers, and
   of fused multiply-adds, every bit is the same; a bf16 dot product of the hardware may round on the way. A vector has
   VECTOR bytes, 32 unless the processor has more; -DPLAIN_C and -DVECTOR=64 give the definitions of any width. */
#pragma once

#include <string.h>

#include "numbers.h"

#if !defined(PLAIN_C) && !defined(__AVX2__)
#define PLAIN_C
#endif
#ifndef PLAIN_C
#include <immintrin.h>
#endif
#ifndef VECTOR
#if !defined(PLAIN_C) && defined(__AVX512VNNI__)
#define VECTOR 64
#else
#define VECTOR 32
#endif
#endif

#if !defined(PLAIN_C) && VECTOR == 64
#define MM(NAME) _mm512_##NAME
#define DOTS(NAME) _mm512_##NAME##_epi32
#elif !defined(PLAIN_C)
#define MM(NAME) _mm256_##NAME
#if defined(__AVXVNNI__)
#define DOTS(NAME) _mm256_##NAME##_avx_epi32
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define DOTS(NAME) _mm256_##NAME##_epi32
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
#ifndef PLAIN_C
#if VECTOR == 64
typedef __m512i register_int;
typedef __m512 register_float;
#else
typedef __m256i register_int;
typedef __m256 register_float;
#endif
#endif

/* a * b + c, rounded once */
#ifndef PLAIN_C
INLINE vector_f32 fma_f32(vector_f32 a, vector_f32 b, vector_f32 c) {
    return (vector_f32)MM(fmadd_ps)((register_float)a, (register_float)b, (register_float)c);
}
#else /* a function of its own: without an instruction for it, each lane is a call */
static __attribute__((noinline, unused)) vector_f32 fma_f32(vector_f32 a, vector_f32 b, vector_f32 c) {
    for (int lane = 0; lane < WIDE; lane++) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
}
#endif

/* Keeps sums where they are: compilers would make all products of a loop that is unrolled first, in registers that they
   do not have, and add them later. */
#if !defined(PLAIN_C)
#define IN_REGISTER(SUMS) __asm__("" : "+x"(SUMS))
#endif

/* One number of 32 bits, whatever it is, in each lane */
INLINE vector_s32 everywhere(const void *from) {
    int32_t number;
    memcpy(&number, from, sizeof number);
    return (vector_s32){0} + number;
}

/* sums[l] + a[2l] b[2l] + a[2l + 1] b[2l + 1] */
INLINE vector_s32 dot_s16(vector_s32 sums, vector_s16 a, vector_s16 b) {
#if defined(DOTS)
    return (vector_s32)DOTS(dpwssd)((register_int)sums, (register_int)a, (register_int)b);
#elif !defined(PLAIN_C)
    sums += (vector_s32)MM(madd_epi16)((register_int)a, (register_int)b);
    IN_REGISTER(sums);
    return sums;
#else
    const vector_s32 even_a = (vector_s32)a << 16 >> 16, even_b = (vector_s32)b << 16 >> 16;
    return sums + even_a * even_b + ((vector_s32)a >> 16) * ((vector_s32)b >> 16);
#endif
}

/* Sums over 32 inputs, in each lane four of them at a time: from zero on, `dot_u8s8` for each of the eight parts, then
   `sums_of`. codes have `bits` bits, x is at least -127. Without VNNI the products of four bits stay in 16 bits until
   then, 16 * 15 * 127 < 2^15, and the upper four of eight have sums of their own. */
typedef struct {
    vector_s32 sums, upper;
} Partial;

/* Vectors of a Partial that are in use */
INLINE int sums_for(int bits) {
#if !defined(PLAIN_C) && !defined(DOTS)
    return bits > 4 ? 2 : 1;
#else
    (void)bits;
    return 1;
#endif
}

INLINE Partial dot_u8s8(Partial partial, vector_u8 codes, vector_s8 x, int bits) {
#if defined(DOTS)
    (void)bits;
    partial.sums = (vector_s32)DOTS(dpbusd)((register_int)partial.sums, (register_int)codes, (register_int)x);
#elif !defined(PLAIN_C)
    const vector_u8 low = bits > 4 ? codes & 15 : codes;
    partial.sums = (vector_s32)((vector_s16)partial.sums + (vector_s16)MM(maddubs_epi16)((register_int)low, (register_int)x));
    IN_REGISTER(partial.sums);
    if (bits > 4) {
        const vector_u8 high = (vector_u8)((vector_u16)codes >> 4) & 15;
        const vector_s16 products = (vector_s16)MM(maddubs_epi16)((register_int)high, (register_int)x);
        partial.upper = (vector_s32)((vector_s16)partial.upper + products);
        IN_REGISTER(partial.upper);
    }
#else
    (void)bits;
    for (int byte = 0; byte < 4; byte++)
        partial.sums += ((vector_s32)codes >> 8 * byte & 0xff) * ((vector_s32)x << (24 - 8 * byte) >> 24);
#endif
    return partial;
}

INLINE vector_s32 sums_of(Partial part, int bits) {
#if !defined(PLAIN_C) && !defined(DOTS)
    const vector_s16 one = (vector_s16){0} + 1;
    const vector_s32 sums = dot_s16((vector_s32){0}, (vector_s16)part.sums, one);
    return bits > 4 ? dot_s16(sums, (vector_s16)part.upper, one * 16) : sums;
#else
    (void)bits;
    return part.sums;
#endif
}

/* Whether VNNI multiplies codes with the two bytes of a 16-bit integer, one after the other */
INLINE int takes_bytes(int bits) {
#if defined(DOTS)
    return bits <= 4;
#else
    (void)bits;
    return 0;
#endif
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
#if defined(DOTS)
    if (takes_bytes(bits)) { /* a lower byte has no sign; codes are below 2^7 */
        sums.first = (vector_s32)DOTS(dpbusd)((register_int)sums.first, (register_int)first, (register_int)codes);
        sums.second = (vector_s32)DOTS(dpbusd)((register_int)sums.second, (register_int)codes, (register_int)second);
        return sums;
    }
#else
    (void)bits;
#endif
    sums.first = dot_s16(sums.first, (vector_s16)((vector_u16)codes & 0xff), (vector_s16)first);
    sums.second = dot_s16(sums.second, (vector_s16)((vector_u16)codes >> 8), (vector_s16)second);
    return sums;
}

INLINE vector_s32 total_of(Wide sums, int bits) {
    return sums.first + (takes_bytes(bits) ? sums.second << 8 : sums.second);
}

/* sums[l] + a[2l + 1] b[2l + 1] + a[2l] b[2l] of bfloat16, added in this order */
INLINE vector_f32 dot_bf16(vector_f32 sums, vector_u32 a, vector_u32 b) {
#if !defined(PLAIN_C) && defined(__AVX512BF16__)
    return (vector_f32)MM(dpbf16_ps)((register_float)sums, (__m512bh)a, (__m512bh)b);
#else
    const uint32_t upper = 0xffff0000;
    sums = fma_f32((vector_f32)(a & upper), (vector_f32)(b & upper), sums);
    return fma_f32((vector_f32)(a << 16), (vector_f32)(b << 16), sums);
#endif
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
