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

/* 32 bytes, as often as a vector holds them */
INLINE vector_s16 repeated(const void *from) {
    vector_s16 to;
#if !defined(PLAIN_C) && VECTOR == 64
    to = (vector_s16)_mm512_broadcast_i64x4(_mm256_loadu_si256(from));
#else
    for (int part = 0; part < VECTOR / 32; part++) memcpy((char *)&to + 32 * part, from, 32);
#endif
    return to;
}

/* A number for each 32 bytes */
INLINE vector_f32 spread(const float *from) {
    vector_f32 to;
#if !defined(PLAIN_C) && VECTOR == 64
    to = (vector_f32)_mm512_insertf32x8(_mm512_set1_ps(from[0]), _mm256_set1_ps(from[1]), 1);
#else
    for (int lane = 0; lane < WIDE; lane++) to[lane] = from[lane / 8];
#endif
    return to;
}

/* One number of 32 bits, whatever it is, in each lane */
INLINE vector_s32 everywhere(const void *from) {
    int32_t number;
    memcpy(&number, from, sizeof number);
    return (vector_s32){0} + number;
}

/* Codes of one chunk (packed.h) of ROWS rows as bytes: four inputs of row r, from number 4 * part of the chunk on, are
   to[part * stride + r]. */
INLINE void unpack_bytes(const void *chunk, int bits, uint32_t *to, int64_t stride) {
#ifndef PLAIN_C
    /* lower bytes of words have the first half of the fields, upper ones the second: each to its own side */
    const __m256i sides = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1));
    const int fields = 8 / bits;
    __m256i words[ROWS];
    for (int r = 0; r < ROWS; r++)
        words[r] = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)chunk + r), sides);
    for (int f = 0; f < fields; f++) {
        __m256i codes[ROWS];
        for (int r = 0; r < ROWS; r++) codes[r] = _mm256_and_si256(_mm256_srli_epi16(words[r], bits * f), mask);
        const __m256i low01 = _mm256_unpacklo_epi32(codes[0], codes[1]), low23 = _mm256_unpacklo_epi32(codes[2], codes[3]);
        const __m256i high01 = _mm256_unpackhi_epi32(codes[0], codes[1]), high23 = _mm256_unpackhi_epi32(codes[2], codes[3]);
        const __m256i four[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                                 _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
        for (int q = 0; q < 4; q++) { /* two of the first half and two of the second, for lanes 0 to 7 and 8 to 15 */
            uint32_t *part = to + ((f + q / 2 * fields) * 4 + q % 2) * stride;
            _mm_storeu_si128((__m128i *)part, _mm256_castsi256_si128(four[q]));
            _mm_storeu_si128((__m128i *)(part + 2 * stride), _mm256_extracti128_si256(four[q], 1));
        }
    }
#else
    const uint16_t(*words)[LANES] = chunk;
    for (int r = 0; r < ROWS; r++)
        for (int part = 0; part < 16 / bits * LANES / 4; part++) {
            uint8_t codes[4];
            for (int k = 0; k < 4; k++)
                codes[k] = (uint8_t)(words[r][part * 4 % LANES + k] >> (part * 4 / LANES * bits) & ((1 << bits) - 1));
            memcpy(to + part * stride + r, codes, 4);
        }
#endif
}

/* Four codes of ROWS rows, [ROWS][4], less the zeros, [ROWS][4] as well, as bfloat16: the first two of row r are to[r],
   the other two are to[stride + r]. */
INLINE void to_bf16(const uint8_t *codes, const int32_t *zeros, uint32_t *to, int64_t stride) {
#ifndef PLAIN_C
    __m256i values[2]; /* rows 0 and 1, rows 2 and 3 */
    for (int half = 0; half < 2; half++) {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + 8 * half)));
        const __m256i steps = _mm256_sub_epi32(wide, _mm256_loadu_si256((const __m256i *)(zeros + 8 * half)));
        values[half] = _mm256_srli_epi32(_mm256_castps_si256(_mm256_cvtepi32_ps(steps)), 16);
    }
    const __m256i mixed = _mm256_packus_epi32(values[0], values[1]); /* pairs of rows 0 0 2 2 1 1 3 3 */
    const __m256i pairs = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7));
    _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(pairs));
    _mm_storeu_si128((__m128i *)(to + stride), _mm256_extracti128_si256(pairs, 1));
#else
    for (int r = 0; r < ROWS; r++) {
        uint32_t values[4];
        for (int k = 0; k < 4; k++) values[k] = bits_of((float)(codes[4 * r + k] - zeros[4 * r + k])) >> 16;
        to[r] = values[0] | values[1] << 16, to[stride + r] = values[2] | values[3] << 16;
    }
#endif
}
