// SPDX-License-Identifier: Apache-2.0
/* The primitives of the products in plain C: the definitions that those of x86.h and arm.h are tested against, and what
   these lack (each says what it HAS). */
#pragma once

#ifndef HAS_FMA
/* a * b + c, rounded once. A function of its own: without an instruction for it, each lane is a call */
static __attribute__((noinline, unused)) vector_f32 fma_f32(vector_f32 a, vector_f32 b, vector_f32 c) {
    for (int lane = 0; lane < WIDE; lane++) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
}
#endif

#ifndef HAS_DOT_S16
/* sums[l] + a[2l] b[2l] + a[2l + 1] b[2l + 1] */
INLINE vector_s32 dot_s16(vector_s32 sums, vector_s16 a, vector_s16 b) {
    const vector_s32 even_a = (vector_s32)a << 16 >> 16, even_b = (vector_s32)b << 16 >> 16;
    return sums + even_a * even_b + ((vector_s32)a >> 16) * ((vector_s32)b >> 16);
}
#endif

#ifndef HAS_DOT_BYTES
/* sums[l] + the four products of bytes in lane l */
INLINE vector_s32 dot_bytes(vector_s32 sums, vector_u8 codes, vector_s8 x) {
    for (int byte = 0; byte < 4; byte++)
        sums += ((vector_s32)codes >> 8 * byte & 0xff) * ((vector_s32)x << (24 - 8 * byte) >> 24);
    return sums;
}
#endif

#ifndef HAS_DOT_U8S8
/* Sums over 32 inputs, in each lane four of them at a time: from zero on, `dot_u8s8` for each of the eight parts, then
   `sums_of`. codes have `bits` bits, x is at least -127. */
typedef struct {
    vector_s32 sums;
} Partial;

/* Vectors of a Partial that are in use */
INLINE int sums_for(int bits) {
    (void)bits;
    return 1;
}

INLINE Partial dot_u8s8(Partial partial, vector_u8 codes, vector_s8 x, int bits) {
    (void)bits;
    return (Partial){dot_bytes(partial.sums, codes, x)};
}

INLINE vector_s32 sums_of(Partial partial, int bits) {
    (void)bits;
    return partial.sums;
}
#endif

#ifndef HAS_BYTES
/* Whether 16-bit integers are multiplied byte by byte with codes, by `dot_lower` and `dot_upper` */
INLINE int takes_bytes(int bits) {
    (void)bits;
    return 0;
}

INLINE vector_s32 dot_lower(vector_s32 sums, vector_u8 lower, vector_u8 codes) {
    (void)lower, (void)codes;
    return sums;
}

INLINE vector_s32 dot_upper(vector_s32 sums, vector_u8 codes, vector_s8 upper) {
    (void)upper, (void)codes;
    return sums;
}
#endif

#ifndef HAS_DOT_BF16
/* sums[l] + a[2l + 1] b[2l + 1] + a[2l] b[2l] of bfloat16, added in this order */
INLINE vector_f32 dot_bf16(vector_f32 sums, vector_u32 a, vector_u32 b) {
    const uint32_t upper = 0xffff0000;
    sums = fma_f32((vector_f32)(a & upper), (vector_f32)(b & upper), sums);
    return fma_f32((vector_f32)(a << 16), (vector_f32)(b << 16), sums);
}
#endif
