// SPDX-License-Identifier: Apache-2.0
/* The primitives of plain.h for AVX2, AVX-VNNI and AVX-512 with VNNI, which may have bf16 dot products too */
#pragma once

#include <immintrin.h>

#define HAS_FMA
#define HAS_DOT_S16

#if VECTOR == 64
#define MM(NAME) _mm512_##NAME
#define DOTS(NAME) _mm512_##NAME##_epi32
typedef __m512i register_int;
typedef __m512 register_float;
#else
#define MM(NAME) _mm256_##NAME
#if defined(__AVXVNNI__)
#define DOTS(NAME) _mm256_##NAME##_avx_epi32
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define DOTS(NAME) _mm256_##NAME##_epi32
#endif
typedef __m256i register_int;
typedef __m256 register_float;
#endif

INLINE vector_f32 fma_f32(vector_f32 a, vector_f32 b, vector_f32 c) {
    return (vector_f32)MM(fmadd_ps)((register_float)a, (register_float)b, (register_float)c);
}

#if defined(DOTS)
INLINE vector_s32 dot_s16(vector_s32 sums, vector_s16 a, vector_s16 b) {
    return (vector_s32)DOTS(dpwssd)((register_int)sums, (register_int)a, (register_int)b);
}

#define HAS_DOT_BYTES
INLINE vector_s32 dot_bytes(vector_s32 sums, vector_u8 codes, vector_s8 x) {
    return (vector_s32)DOTS(dpbusd)((register_int)sums, (register_int)codes, (register_int)x);
}

#define HAS_BYTES
INLINE int takes_bytes(int bits) { return bits <= 4; }

/* A lower byte has no sign; codes are below 2^7 */
INLINE vector_s32 dot_lower(vector_s32 sums, vector_u8 lower, vector_u8 codes) {
    return dot_bytes(sums, lower, (vector_s8)codes);
}

INLINE vector_s32 dot_upper(vector_s32 sums, vector_u8 codes, vector_s8 upper) { return dot_bytes(sums, codes, upper); }
#else
/* Keeps sums where they are: compilers would make all products of a loop that is unrolled first, in registers that they
   do not have, and add them later. */
#define IN_REGISTER(SUMS) __asm__("" : "+x"(SUMS))

INLINE vector_s32 dot_s16(vector_s32 sums, vector_s16 a, vector_s16 b) {
    sums += (vector_s32)MM(madd_epi16)((register_int)a, (register_int)b);
    IN_REGISTER(sums);
    return sums;
}

#define HAS_DOT_U8S8
/* Without VNNI the products of four bits stay in 16 bits until `sums_of`, 16 * 15 * 127 < 2^15, and the upper four of
   eight have sums of their own. */
typedef struct {
    vector_s32 sums, upper;
} Partial;

INLINE int sums_for(int bits) { return bits > 4 ? 2 : 1; }

INLINE vector_s32 add_products(vector_s32 sums, vector_u8 codes, vector_s8 x) {
    sums = (vector_s32)((vector_s16)sums + (vector_s16)MM(maddubs_epi16)((register_int)codes, (register_int)x));
    IN_REGISTER(sums);
    return sums;
}

INLINE Partial dot_u8s8(Partial partial, vector_u8 codes, vector_s8 x, int bits) {
    partial.sums = add_products(partial.sums, bits > 4 ? codes & 15 : codes, x);
    if (bits > 4) partial.upper = add_products(partial.upper, (vector_u8)((vector_u16)codes >> 4) & 15, x);
    return partial;
}

INLINE vector_s32 sums_of(Partial partial, int bits) {
    const vector_s16 one = (vector_s16){0} + 1;
    const vector_s32 sums = dot_s16((vector_s32){0}, (vector_s16)partial.sums, one);
    return bits > 4 ? dot_s16(sums, (vector_s16)partial.upper, one * 16) : sums;
}
#endif

#if defined(__AVX512BF16__)
#define HAS_DOT_BF16
INLINE vector_f32 dot_bf16(vector_f32 sums, vector_u32 a, vector_u32 b) {
    return (vector_f32)MM(dpbf16_ps)((register_float)sums, (__m512bh)a, (__m512bh)b);
}
#endif
