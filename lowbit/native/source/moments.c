// SPDX-License-Identifier: Apache-2.0
/* Sums of outer products over tokens, S += A^T B, of bfloat16 with float32 sums: second moments of activations. Products
   of two bfloat16 are exact in float32; sums over a block of tokens begin at zero. */

#include "vectors.h"

#define TOKENS 256            /* of a block, whose panels stay in the caches */
#define PAIRS (TOKENS / 2)
#define VECTORS 3             /* of a tile's columns */
#define PANEL (VECTORS * WIDE) /* columns that lie together: [pairs][PANEL] words of two tokens */
#define TALL (WIDE < 8 ? 4 : 8) /* rows of a tile, which divide a panel */

INLINE int64_t words_of(int64_t features) { return ceil_div(features, PANEL) * PANEL * PAIRS; }

/* Numbers [at, at + count) of a token in the lanes' lower halves, zeros beyond */
INLINE vector_u32 load_token(const uint16_t *x, int64_t at, int64_t count) {
    return (vector_u32)load_lanes(x, BFLOAT16, at, count < 0 ? 0 : count) >> 16;
}

/* A panel of x [tokens, features] as pairs of tokens; zeros beyond its ends */
static void pack(const uint16_t *x, int64_t features, int64_t tokens, int64_t first, uint32_t *panel) {
    for (int64_t token = 0; token < tokens; token += 2)
        for (int64_t k = 0; k < PANEL; k += WIDE, panel += WIDE) {
            const int64_t at = token * features + first + k, count = features - first - k;
            const vector_u32 odd = token + 1 < tokens ? load_token(x, at + features, count) : (vector_u32){0};
            const vector_u32 both = load_token(x, at, count) | odd << 16;
            memcpy(panel, &both, sizeof both);
        }
}

/* sums [rows, columns]: a tile of it, with its corner at (row, column) */
INLINE void add_tile(const uint32_t *a, const uint32_t *b, int64_t pairs, float *sums, int64_t rows, int64_t columns,
                     int64_t row, int64_t column) {
    vector_f32 tile[TALL][VECTORS] = {{{0}}};
    for (int64_t pair = 0; pair < pairs; pair++) {
        vector_u32 right[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) memcpy(right + v, b + pair * PANEL + v * WIDE, sizeof right[v]);
#pragma GCC unroll 8
        for (int r = 0; r < TALL; r++) {
            const vector_u32 left = (vector_u32)everywhere(a + pair * PANEL + r);
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++) tile[r][v] = dot_bf16(tile[r][v], left, right[v]);
        }
    }
    if (row + TALL <= rows && column + PANEL <= columns) {
#pragma GCC unroll 8
        for (int r = 0; r < TALL; r++)
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++) {
                float *to = sums + (row + r) * columns + column + v * WIDE;
                vector_f32 sum;
                memcpy(&sum, to, sizeof sum);
                sum += tile[r][v];
                memcpy(to, &sum, sizeof sum);
            }
        return;
    }
    float edge[TALL][PANEL];
    memcpy(edge, tile, sizeof edge);
    for (int64_t r = 0; r < smaller(TALL, rows - row); r++)
        for (int64_t k = 0; k < smaller(PANEL, columns - column); k++)
            sums[(row + r) * columns + column + k] += edge[r][k];
}

int64_t KERNEL(lowbit_outer_scratch)(int64_t rows, int64_t columns) {
    return (words_of(rows) + words_of(columns)) * (int64_t)sizeof(uint32_t);
}

/* sums [rows, columns] += A^T B with A [tokens, rows] and B [tokens, columns] of bfloat16, all contiguous. Where A is B,
   only the tiles that touch the lower triangle. The result does not depend on the number of threads. */
void KERNEL(lowbit_add_outer)(const void *a, int64_t rows, const void *b, int64_t columns, int64_t tokens, float *sums,
                              int64_t threads, void *scratch) {
    const int lower = a == b;
    uint32_t *const left = scratch, *const right = lower ? left : left + words_of(rows);
#pragma omp parallel num_threads(threads)
    for (int64_t start = 0; start < tokens; start += TOKENS) {
        const int64_t count = smaller(tokens - start, TOKENS), pairs = ceil_div(count, 2);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < rows; first += PANEL)
            pack((const uint16_t *)a + start * rows, rows, count, first, left + first * PAIRS);
        if (!lower) {
#pragma omp for schedule(static)
            for (int64_t first = 0; first < columns; first += PANEL)
                pack((const uint16_t *)b + start * columns, columns, count, first, right + first * PAIRS);
        }
#pragma omp for schedule(dynamic)
        for (int64_t column = 0; column < columns; column += PANEL)
            for (int64_t row = lower ? column : 0; row < rows; row += TALL)
                add_tile(left + row / PANEL * PANEL * PAIRS + row % PANEL, right + column * PAIRS, pairs, sums, rows,
                         columns, row, column);
    }
}
