// SPDX-License-Identifier: Apache-2.0
/* Where the numbers of a packed weight are.

   Layout of W [N, K]: blocks of ROWS rows; in a block, one after the other, slices of K; in a slice, a word of 32 bits
   for each row. Field f (of `bits` bits) of byte b of a word is the code of input f * PART + b of the slice: a shift and
   a mask give PART inputs of all rows. Scales and zeros are [N / ROWS, groups, ROWS]. N is padded with zeros to whole
   blocks, K to whole chunks. */
#pragma once

#include "vectors.h"

INLINE int64_t fields_of(const Weight *w) { return 8 / w->bits; }
INLINE int64_t width_of(const Weight *w) { return ceil_div(w->in_features, CHUNK) * CHUNK; }
INLINE int64_t slices_of(const Weight *w) { return width_of(w) / (PART * fields_of(w)); }
INLINE int64_t groups_of(const Weight *w) { return ceil_div(w->in_features, w->group_size); }
INLINE int64_t blocks_of(const Weight *w) { return ceil_div(w->out_features, ROWS); }
INLINE int64_t size_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* One of several weights, that lie one behind the other */
INLINE Weight weight_of(const Weight *w, int64_t index) {
    const int64_t numbers = index * blocks_of(w) * groups_of(w) * ROWS;
    Weight one = *w;
    one.codes = (const uint32_t *)w->codes + index * blocks_of(w) * slices_of(w) * ROWS;
    one.scales = (const char *)w->scales + numbers * size_of(w->scale_dtype);
    if (one.zeros) one.zeros += numbers;
    return one;
}

/* How many rows of x a weight has, 0 if it is not to be multiplied */
INLINE int64_t rows_of(const Experts *e, int64_t index) {
    const int64_t rows = e->start[index + 1] - e->start[index];
    return rows >= e->least && rows <= e->most ? rows : 0;
}

/* Row m of what has `size` numbers in a row */
INLINE char *row_at(const void *from, int dtype, int64_t m, int64_t size) { return (char *)from + m * size * size_of(dtype); }

/* The word of row n in the first slice; those of the other slices are ROWS words apart */
INLINE const uint32_t *words_of(const Weight *w, int64_t n) {
    return (const uint32_t *)w->codes + n / ROWS * slices_of(w) * ROWS + n % ROWS;
}

/* Where the scale and the zero of row n for a group are; those of the rows behind it, in its block, follow */
INLINE int64_t number_of(const Weight *w, int64_t n, int64_t group) {
    return (n / ROWS * groups_of(w) + group) * ROWS + n % ROWS;
}

/* The same for WIDE rows */
INLINE vector_f32 scales_at(const Weight *w, int64_t number) { return load_lanes(w->scales, (int)w->scale_dtype, number, WIDE); }

INLINE vector_s32 zeros_at(const Weight *w, int64_t number) {
    lanes_u8 zeros = (lanes_u8){0} + (uint8_t)(1 << (w->bits - 1)); /* the middle code */
    if (w->zeros) memcpy(&zeros, w->zeros + number, sizeof zeros);
    return __builtin_convertvector(zeros, vector_s32);
}
