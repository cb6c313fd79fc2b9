// SPDX-License-Identifier: Apache-2.0
/* Where the numbers of a packed weight are.

   Layout of W [N, K]: blocks of ROWS rows; in a block, one after the other, the chunks of K; in a chunk, a vector of
   16-bit words for each row. Field f (of `bits` bits) of lane l of a word is the code of input f * LANES + l of the
   chunk. Scales and zeros are [N / ROWS, groups, ROWS]. N and K are padded with zeros to whole blocks and chunks. */
#pragma once

#include "numbers.h"

typedef uint16_t words __attribute__((vector_size(2 * LANES)));

INLINE int64_t fields_of(const Weight *w) { return 16 / w->bits; }
INLINE int64_t chunk_of(const Weight *w) { return fields_of(w) * LANES; }
INLINE int64_t chunks_of(const Weight *w) { return ceil_div(w->in_features, chunk_of(w)); }
INLINE int64_t groups_of(const Weight *w) { return ceil_div(w->in_features, w->group_size); }
INLINE int64_t blocks_of(const Weight *w) { return ceil_div(w->out_features, ROWS); }

/* One of several weights, that lie one behind the other */
INLINE Weight weight_of(const Weight *w, int64_t index) {
    const int64_t numbers = blocks_of(w) * groups_of(w) * ROWS;
    Weight one = *w;
    one.codes = (const words *)w->codes + index * blocks_of(w) * chunks_of(w) * ROWS;
    one.scales += index * numbers;
    if (one.zeros) one.zeros += index * numbers;
    return one;
}

/* How many rows of x a weight has, 0 if it is not to be multiplied */
INLINE int64_t rows_of(const Experts *e, int64_t index) {
    const int64_t rows = e->start[index + 1] - e->start[index];
    return rows >= e->least && rows <= e->most ? rows : 0;
}

/* Row m of what has `size` numbers in a row */
INLINE char *row_at(const void *from, int dtype, int64_t m, int64_t size) {
    return (char *)from + m * size * (dtype == FLOAT32 ? 4 : 2);
}

/* The vector of words of row n in a chunk */
INLINE int64_t vector_of(const Weight *w, int64_t n, int64_t chunk) {
    return (n / ROWS * chunks_of(w) + chunk) * ROWS + n % ROWS;
}

/* The scale and the zero of row n for input k */
INLINE int64_t scale_of(const Weight *w, int64_t n, int64_t k) {
    return (n / ROWS * groups_of(w) + k / w->group_size) * ROWS + n % ROWS;
}

INLINE float zero_of(const Weight *w, int64_t scale) {
    return w->zeros ? w->zeros[scale] : (float)(1 << (w->bits - 1));
}
