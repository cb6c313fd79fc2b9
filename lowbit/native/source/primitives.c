// SPDX-License-Identifier: Apache-2.0
/* The primitives of vectors.h on PRIMITIVE_BYTES of each operand, for the tests that compare instruction sets. */

#include "vectors.h"

/* The sums of a block whose eight parts are alike */
INLINE vector_s32 block_u8s8(vector_s32 codes, vector_s32 x, int bits) {
    Partial sums = {0};
    for (int part = 0; part < 8; part++) sums = dot_u8s8(sums, (vector_u8)codes, (vector_s8)x, bits);
    return sums_of(sums, bits);
}

/* Four inputs, of which all lanes have the same */
INLINE vector_s32 once_u8s16(vector_s32 codes, const void *x, int bits) {
    uint64_t four;
    memcpy(&four, x, sizeof four);
    four = arranged(four, bits);
    return total_of(dot_u8s16((Wide){{0}, {0}}, (vector_u8)codes, &four, bits), bits);
}

/* sums + what `primitive` makes of a and b, which hold numbers of its kind. bits: of the codes in a. */
void KERNEL(lowbit_primitive)(int64_t primitive, int64_t bits, const void *a, const void *b, const void *sums, void *to) {
    for (int64_t at = 0; at < PRIMITIVE_BYTES; at += VECTOR) {
        vector_s32 left, right, sum;
        memcpy(&left, (const char *)a + at, VECTOR);
        memcpy(&right, (const char *)b + at, VECTOR);
        memcpy(&sum, (const char *)sums + at, VECTOR);
        switch (primitive) {
        case DOT_S16: sum = dot_s16(sum, (vector_s16)left, (vector_s16)right); break;
        case DOT_U8S16: sum += bits <= 4 ? once_u8s16(left, b, 4) : once_u8s16(left, b, 8); break;
        case DOT_U8S8: sum += bits <= 4 ? block_u8s8(left, right, 4) : block_u8s8(left, right, 8); break;
        case DOT_BF16: sum = (vector_s32)dot_bf16((vector_f32)sum, (vector_u32)left, (vector_u32)right); break;
        case FMA_F32: sum = (vector_s32)fma_f32((vector_f32)left, (vector_f32)right, (vector_f32)sum); break;
        }
        memcpy((char *)to + at, &sum, VECTOR);
    }
}
