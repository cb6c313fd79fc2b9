// SPDX-License-Identifier: Apache-2.0
/* The loops of GPTQ over the columns of a group, which lowbit/quantizers/gptq_loops.py defines. Rows of a weight are
   independent: each lane is one. All matrices of theirs are transposed, [columns, rows]. */

#include "vectors.h"

#define CHAINS 5 /* sums that are worked on at a time: additions wait for each other within one */

INLINE vector_f32 chosen(vector_s32 mask, vector_f32 yes, vector_f32 no) {
    return (vector_f32)(((vector_s32)yes & mask) | ((vector_s32)no & ~mask));
}

/* The nearest integer within bounds that are integers below 2^22, of two the even one */
INLINE vector_f32 nearest(vector_f32 x, vector_f32 lowest, vector_f32 highest) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: what is added to it keeps no fraction */
    x = chosen(x < lowest, lowest, x);
    x = chosen(x > highest, highest, x);
    return (x + shift) - shift;
}

INLINE vector_f32 broadcast(float x) { return (vector_f32){0} + x; }

/* One lane of rows on CHAINS candidates; those beyond `candidates` repeat the last. */
typedef struct {
    vector_f32 cost, scale, zero;
} Best;

INLINE void round_lanes(const float *target, int64_t length, int64_t stride, const float *feedback, const float *costs,
                        const Best *tried, float levels, int64_t count, vector_f32 *errors, vector_f32 *steps,
                        vector_f32 *cost) {
    vector_f32 lowest[CHAINS], highest[CHAINS];
    for (int c = 0; c < CHAINS; c++) {
        lowest[c] = -tried[c].zero;
        highest[c] = levels - 1 - tried[c].zero;
        cost[c] = broadcast(0);
    }
    for (int64_t k = 0; k < length; k++) {
        const vector_f32 wanted = load_lanes(target + k * stride, FLOAT32, 0, count);
        vector_f32 sums[CHAINS];
        for (int c = 0; c < CHAINS; c++) sums[c] = wanted;
        for (int64_t j = 0; j < k; j++) {
            const vector_f32 weight = broadcast(feedback[k * length + j]);
#pragma GCC unroll 5
            for (int c = 0; c < CHAINS; c++) sums[c] = fma_f32(errors[j * CHAINS + c], weight, sums[c]);
        }
        for (int c = 0; c < CHAINS; c++) {
            const vector_f32 step = nearest(sums[c] / tried[c].scale, lowest[c], highest[c]);
            const vector_f32 value = step * tried[c].scale, rounding = sums[c] - value;
            steps[k * CHAINS + c] = step;
            errors[k * CHAINS + c] = wanted - value;
            cost[c] += rounding * rounding * costs[k];
        }
    }
}

int64_t KERNEL(lowbit_round_scratch)(int64_t length, int64_t threads) {
    return (int64_t)sizeof(vector_f32) * (3 * CHAINS) * length * threads;
}

/* target [length, rows]; feedback [length, length], the transposed M of gptq_factor.py; costs [length]; scales, zeros
   [candidates, rows]. Each row keeps the first of its cheapest: codes [length, rows], grid and cost [rows]. */
void KERNEL(lowbit_round_columns)(const float *target, int64_t length, int64_t rows, const float *feedback,
                                  const float *costs, const float *scales, const float *zeros, int64_t candidates,
                                  int64_t levels, float *codes, float *grid_scales, float *grid_zeros, float *cost,
                                  int64_t threads, void *scratch) {
    const int64_t each = KERNEL(lowbit_round_scratch)(length, 1), blocks = ceil_div(rows, WIDE);
    const int64_t share = ceil_div(blocks, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t thread = 0; thread < threads; thread++) {
        vector_f32 *const errors = (vector_f32 *)((char *)scratch + thread * each);
        vector_f32 *const steps = errors + CHAINS * length, *const kept = steps + CHAINS * length;
        for (int64_t block = thread * share; block < smaller((thread + 1) * share, blocks); block++) {
            const int64_t at = block * WIDE, count = smaller(rows - at, WIDE);
            Best best = {{0}};
            for (int64_t first = 0; first < candidates; first += CHAINS) {
                Best tried[CHAINS];
                vector_f32 found[CHAINS];
                for (int c = 0; c < CHAINS; c++) {
                    const int64_t from = smaller(first + c, candidates - 1) * rows + at;
                    tried[c].scale = load_lanes(scales + from, FLOAT32, 0, count);
                    tried[c].zero = load_lanes(zeros + from, FLOAT32, 0, count);
                    for (int64_t lane = count; lane < WIDE; lane++) tried[c].scale[lane] = 1; /* nobody's: no division by 0 */
                }
                round_lanes(target + at, length, rows, feedback, costs, tried, (float)levels, count, errors, steps, found);
                for (int c = 0; c < CHAINS && first + c < candidates; c++) {
                    const vector_s32 better = first + c ? found[c] < best.cost : (vector_s32){0} - 1;
                    best.cost = chosen(better, found[c], best.cost);
                    best.scale = chosen(better, tried[c].scale, best.scale);
                    best.zero = chosen(better, tried[c].zero, best.zero);
                    for (int64_t k = 0; k < length; k++)
                        kept[k] = chosen(better, steps[k * CHAINS + c], first + c ? kept[k] : broadcast(0));
                }
            }
            store_lanes(cost + at, FLOAT32, 0, count, best.cost);
            store_lanes(grid_scales + at, FLOAT32, 0, count, best.scale);
            store_lanes(grid_zeros + at, FLOAT32, 0, count, best.zero);
            for (int64_t k = 0; k < length; k++)
                store_lanes(codes + k * rows + at, FLOAT32, 0, count, kept[k] + best.zero);
        }
    }
}

/* Each code to its best value while all others stay, column after column. codes, descent: [length, rows]; scales, zeros
   [rows]; hessian [length, length]. found: the codes; change: by how much that moves values; both [length, rows].
   gain [rows]: what it takes off the objective. */
void KERNEL(lowbit_descend)(const float *codes, int64_t length, int64_t rows, const float *scales, const float *zeros,
                            const float *descent, const float *hessian, int64_t levels, float *found, float *change,
                            float *gain, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < rows; at += WIDE) {
        const int64_t count = smaller(rows - at, WIDE);
        vector_f32 scale = load_lanes(scales + at, FLOAT32, 0, count), total = {0};
        const vector_f32 zero = load_lanes(zeros + at, FLOAT32, 0, count);
        for (int64_t lane = count; lane < WIDE; lane++) scale[lane] = 1;
        for (int64_t k = 0; k < length; k++) {
            const float *row = hessian + k * length;
            vector_f32 sums[4] = {{0}};
            for (int64_t j = 0; j < k; j++) {
                const vector_f32 moved = load_lanes(change + j * rows + at, FLOAT32, 0, count);
                sums[j % 4] = fma_f32(broadcast(row[j]), moved, sums[j % 4]);
            }
            const vector_f32 force = load_lanes(descent + k * rows + at, FLOAT32, 0, count) -
                                     ((sums[0] + sums[1]) + (sums[2] + sums[3]));
            const vector_f32 code = load_lanes(codes + k * rows + at, FLOAT32, 0, count), now = (code - zero) * scale;
            const vector_f32 best = nearest((now + force / row[k]) / scale, -zero, (float)(levels - 1) - zero);
            const vector_f32 moved = best * scale - now;
            total += moved * (2 * force - row[k] * moved);
            store_lanes(found + k * rows + at, FLOAT32, 0, count, best + zero);
            store_lanes(change + k * rows + at, FLOAT32, 0, count, moved);
        }
        store_lanes(gain + at, FLOAT32, 0, count, total);
    }
}
