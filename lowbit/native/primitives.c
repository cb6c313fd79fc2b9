// SPDX-License-Identifier: Apache-2.0
/* The primitives of vectors.h on PRIMITIVE_BYTES of each operand, for the tests that compare instruction sets. */

#include "vectors.h"

/* sums + what `primitive` makes of a and b, which hold numbers of its kind. bits: of the codes in a. */
void KERNEL(lowbit_primitive)(int64_t primitive, int64_t bits, const void *a, const void *b, const void *sums, void *to) {
    for (int64_t at = 0; at < PRIMITIVE_BYTES; at += VECTOR) {
        vector_s32 left, right, sum;
        memcpy(&left, (const char *)a + at, VECTOR);
        memcpy(&right, (const char *)b + at, VECTOR);
        memcpy(&sum, (const char *)sums + at, VECTOR);
        switch (primitive) {
        case DOT_S16: sum = dot_s16(sum, (vector_s16)left, (vector_s16)right); break;
        case DOT_U8S8: /* of a whole block, whose eight parts are alike */
            left = (vector_s32){0};
            memcpy(&right, (const char *)b + at, VECTOR);
            for (int part = 0; part < 8; part++) {
                vector_u8 codes;
                memcpy(&codes, (const char *)a + at, VECTOR);
                left = bits <= 4 ? dot_u8s8(left, codes, (vector_s8)right, 4) : dot_u8s8(left, codes, (vector_s8)right, 8);
            }
            sum += bits <= 4 ? sums_of(left, 4) : sums_of(left, 8);
            break;
        case DOT_BF16: sum = (vector_s32)dot_bf16((vector_f32)sum, (vector_u32)left, (vector_u32)right); break;
        case FMA_F32: sum = (vector_s32)fma_f32((vector_f32)left, (vector_f32)right, (vector_f32)sum); break;
        }
        memcpy((char *)to + at, &sum, VECTOR);
    }
}
