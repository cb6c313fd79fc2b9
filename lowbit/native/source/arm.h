// SPDX-License-Identifier: Apache-2.0
/* The primitives of plain.h for NEON with the dot products of bytes (FEAT_DotProd), whose operands have both a sign or
   both none */
#pragma once

#include <arm_neon.h>

#define HAS_FMA
#define HAS_DOT_S16
#define HAS_DOT_U8S8
#define HAS_BYTES

INLINE vector_f32 fma_f32(vector_f32 a, vector_f32 b, vector_f32 c) {
    return (vector_f32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

INLINE vector_s32 dot_s16(vector_s32 sums, vector_s16 a, vector_s16 b) {
    const int16x8_t left = (int16x8_t)a, right = (int16x8_t)b;
    const int32x4_t low = vmull_s16(vget_low_s16(left), vget_low_s16(right)), high = vmull_high_s16(left, right);
    return sums + (vector_s32)vpaddq_s32(low, high);
}

INLINE vector_s32 dot_s8(vector_s32 sums, vector_u8 a, vector_s8 b) {
    return (vector_s32)vdotq_s32((int32x4_t)sums, (int8x16_t)a, (int8x16_t)b);
}

/* Codes of eight bits have no place beside a sign: their upper four bits have sums of their own. */
typedef struct {
    vector_s32 sums, upper;
} Partial;

INLINE int sums_for(int bits) { return bits > 4 ? 2 : 1; }

INLINE Partial dot_u8s8(Partial partial, vector_u8 codes, vector_s8 x, int bits) {
    partial.sums = dot_s8(partial.sums, bits > 4 ? codes & 15 : codes, x);
    if (bits > 4) partial.upper = dot_s8(partial.upper, codes >> 4, x);
    return partial;
}

INLINE vector_s32 sums_of(Partial partial, int bits) {
    return bits > 4 ? partial.sums + (partial.upper << 4) : partial.sums;
}

INLINE int takes_bytes(int bits) { return bits <= 4; }

INLINE vector_s32 dot_lower(vector_s32 sums, vector_u8 lower, vector_u8 codes) {
    return (vector_s32)vdotq_u32((uint32x4_t)sums, (uint8x16_t)lower, (uint8x16_t)codes);
}

INLINE vector_s32 dot_upper(vector_s32 sums, vector_u8 codes, vector_s8 upper) { return dot_s8(sums, codes, upper); }
