// SPDX-License-Identifier: Apache-2.0
/* y = x W^T for few rows of x and a dense W, which is read once: the time of this is the time of reading. */

#include "numbers.h"

#define SUMS 4    /* additions wait for each other only within a sum */

/* Row n of W times `columns` rows of x [rows, K], which are float32 and share what is read of W */
INLINE void row(const void *weight, int dtype, int64_t n, int64_t size, const float *x, int columns, void *y,
                int64_t stride) {
    floats sums[MATMUL_ROWS][SUMS] = {0};
    float rest[MATMUL_ROWS] = {0};
    int64_t k = 0;
    for (; k + SUMS * WIDTH <= size; k += SUMS * WIDTH)
#pragma GCC unroll 4
        for (int s = 0; s < SUMS; s++) {
            floats w;
            for (int lane = 0; lane < WIDTH; lane++) w[lane] = load(weight, dtype, n * size + k + s * WIDTH + lane);
#pragma GCC unroll 4
            for (int m = 0; m < columns; m++)
                sums[m][s] += w * *(const unaligned_floats *)(x + m * size + k + s * WIDTH);
        }
    for (; k < size; k++)
        for (int m = 0; m < columns; m++) rest[m] += load(weight, dtype, n * size + k) * x[m * size + k];
    for (int m = 0; m < columns; m++)
        store(y, dtype, m * stride + n, sum_of(sums[m][0] + sums[m][1] + (sums[m][2] + sums[m][3])) + rest[m]);
}

#define ROW(DTYPE, M) \
    case DTYPE * (MATMUL_ROWS + 1) + M: row(weight, DTYPE, n, in_features, wide, M, y, out_features); break;

/* x [rows, in_features], rows <= MATMUL_ROWS; weight [out_features, in_features]; y [rows, out_features]; all contiguous.
   wide: as many floats as x has numbers. */
void KERNEL(lowbit_matmul)(const void *x, const void *weight, void *y, int64_t dtype, int64_t rows, int64_t out_features,
                  int64_t in_features, float *wide) {
    for (int64_t i = 0; i < rows * in_features; i++) wide[i] = load(x, (int)dtype, i);
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < out_features; n++)
        switch (dtype * (MATMUL_ROWS + 1) + rows) { /* both are constants in `row` */
            ROW(FLOAT32, 1) ROW(FLOAT32, 2) ROW(FLOAT32, 3) ROW(FLOAT32, 4)
            ROW(BFLOAT16, 1) ROW(BFLOAT16, 2) ROW(BFLOAT16, 3) ROW(BFLOAT16, 4)
        }
}
