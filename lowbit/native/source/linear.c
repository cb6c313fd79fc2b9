// SPDX-License-Identifier: Apache-2.0
/* y = x W^T for a group-wise quantized W, in integers: the product of few rows.

   Inputs become 16-bit integers. The inputs of a step, at most STEP of a group, share a power of two, chosen so that
   the largest of them takes 15 bits: an input down to 1/128 of it, if it was a bfloat16, is kept exactly, others are
   off by 2^-15 of it at most, far below the rounding of y. float32 takes two such integers, of the input and of what
   the first has left. Products of codes and integers are summed exactly, and a step adds
       scale * 2^exponent * (sum of code x - zero * sum of x)    with w = (code - zero) * scale.

   Integer activations (integer_inputs) are what they are, below 256: a step may be as long as INTEGER_STEP, has the
   exponent 0, and is rounded once, when it becomes a float.

   x, y and the bias have one dtype, and y is rounded to it once. */

#include <math.h>
#include <string.h>

#include "packed.h"
#include "vectors.h"

#define COLUMNS 4 /* rows of x that share the unpacking of a code, where there are as many */
#define STEP 256  /* 256 * 255 * 2^15 < 2^31 */
#define INTEGER_STEP (1 << 15) /* 2^15 * 255 * 255 < 2^31 */
#define AHEAD 4096 /* bytes, of what is fetched while codes are multiplied */
#define ROW_BYTES (2 * LANES)
#define VECTORS (ROWS * ROW_BYTES / VECTOR) /* of a chunk of a block */
#define VECTOR_ROWS (VECTOR / ROW_BYTES)

typedef int16_t shorts __attribute__((vector_size(ROW_BYTES)));
typedef vector_u16 unaligned_words __attribute__((aligned(2)));

/* x [rows, in_features] as integers: codes [rows, chunks, fields], which are `vectors` for a row; for each of the steps,
   2^exponent and the sums of lanes */
typedef struct {
    shorts *codes;
    integers *sums;
    float *scales;
    int64_t vectors, steps;
} Inputs;

/* Of a step: a lone row of x has two sums for each vector, or a product would wait for the one before it */
typedef vector_s32 Sums[VECTORS][COLUMNS][2];

INLINE int64_t step_of(const Weight *w) { return smaller(w->group_size, w->integer_inputs ? INTEGER_STEP : STEP); }
INLINE int64_t steps_of(const Weight *w) { return ceil_div(w->in_features, step_of(w)); }

INLINE Inputs of_row(Inputs x, int64_t m) {
    return (Inputs){x.codes + m * x.vectors, x.sums + m * x.steps, x.scales + m * x.steps, x.vectors, x.steps};
}

/* y [rows, out_features], for a second piece of x with what the first has given; bias may be NULL */
typedef struct {
    void *y;
    const void *bias;
    int dtype, second;
} Outputs;

/* The sum of a row of W in its first lane, 0 in the others: integers are rounded once, when they become a float */
INLINE vector_s32 row_totals(vector_s32 sums) {
    vector_s32 totals = {0};
    for (int lane = 0; lane < WIDE; lane++) totals[lane / WIDTH * WIDTH] += sums[lane];
    return totals;
}

/* y of the rows of W in `vectors` vectors from number `first` of block `index`, and of `columns` rows of x */
INLINE void finish(const Weight *w, int vectors, int columns, int64_t index, int first, vector_f32 (*total)[COLUMNS],
                   Outputs to) {
    for (int v = 0; v < vectors; v++)
        for (int m = 0; m < columns; m++) {
            floats rows[VECTOR_ROWS];
            memcpy(rows, &total[v][m], VECTOR);
            for (int r = 0; r < VECTOR_ROWS; r++) {
                const int64_t row = index * ROWS + (first + v) * VECTOR_ROWS + r, at = m * w->out_features + row;
                if (row >= w->out_features) continue;
                float all = sum_of(rows[r]);
                if (to.second)
                    all += load(to.y, to.dtype, at);
                else if (to.bias)
                    all += load(to.bias, to.dtype, row);
                store(to.y, to.dtype, at, all);
            }
        }
}

/* The products of zeros and inputs, which those of codes and inputs are added to. zeros NULL: the middle code */
INLINE void begin_step(const float *zeros, int bits, int vectors, int columns, Inputs x, int64_t step, Sums sums) {
#pragma GCC unroll 4
    for (int m = 0; m < columns; m++) {
        const vector_s32 x_sums = (vector_s32)repeated(x.sums + m * x.steps + step);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            sums[v][m][0] = -(x_sums << (bits - 1));
            if (zeros) sums[v][m][0] = -(__builtin_convertvector(spread(zeros + v * VECTOR_ROWS), vector_s32) * x_sums);
            sums[v][m][1] = (vector_s32){0};
        }
    }
}

INLINE void end_step(const Weight *w, const float *scales, int vectors, int columns, Inputs x, int64_t step, Sums sums,
                     vector_f32 (*total)[COLUMNS]) {
#pragma GCC unroll 4
    for (int m = 0; m < columns; m++) {
        const float x_scale = x.scales[m * x.steps + step];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            vector_s32 sum = columns == 1 ? sums[v][m][0] + sums[v][m][1] : sums[v][m][0];
            if (w->integer_inputs) sum = row_totals(sum);
            const vector_f32 scale = spread(scales + v * VECTOR_ROWS) * x_scale;
            total[v][m] = fma_f32(__builtin_convertvector(sum, vector_f32), scale, total[v][m]);
        }
    }
}

/* `vectors` vectors from number `first` of a block times `columns` rows of x. chunk_steps: steps in a chunk, 1 where a
   step has whole chunks. */
INLINE void block(const Weight *w, int bits, int chunk_steps, int vectors, int columns, int64_t index, int first,
                  Inputs x, Outputs to) {
    const int fields = 16 / bits, step_fields = fields / chunk_steps, chains = columns == 1 ? 2 : 1;
    const int64_t chunks = chunks_of(w), groups = groups_of(w);
    const int64_t step_chunks = ceil_div(step_of(w), chunk_of(w)), group_steps = ceil_div(w->group_size, step_of(w));
    const unaligned_words *codes = (const unaligned_words *)w->codes + index * chunks * VECTORS + first;
    const float *scales = w->scales + index * groups * ROWS + first * VECTOR_ROWS;
    const float *zeros = w->zeros ? w->zeros + index * groups * ROWS + first * VECTOR_ROWS : 0;
    vector_f32 total[VECTORS][COLUMNS] = {0};
    int64_t step = 0, steps_done = 0; /* of all, and of the group */
    for (int64_t start = 0; start < chunks; start += step_chunks) {
        const int64_t end = smaller(start + step_chunks, chunks);
#pragma GCC unroll 16
        for (int part = 0; part < chunk_steps; part++) {
            if (chunk_steps > 1 && step == x.steps) break; /* the rest of the chunk is padding */
            Sums sums;
            begin_step(zeros, bits, vectors, columns, x, step, sums);
            for (int64_t chunk = start; chunk < end; chunk++) {
                for (int byte = 0; byte < vectors * VECTOR; byte += 64) /* the hardware stops at the end of a page */
                    __builtin_prefetch((const char *)(codes + chunk * VECTORS) + AHEAD + byte);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) {
                    const vector_u16 word = codes[chunk * VECTORS + v];
#pragma GCC unroll 16
                    for (int f = part * step_fields; f < (part + 1) * step_fields; f++) {
                        vector_u16 code = word >> (bits * f);
                        if (f < fields - 1) code &= (uint16_t)((1 << bits) - 1);
#pragma GCC unroll 4
                        for (int m = 0; m < columns; m++) {
                            vector_s32 *sum = &sums[v][m][f % chains];
                            *sum = dot_s16(*sum, (vector_s16)code, repeated(x.codes + (m * chunks + chunk) * fields + f));
                        }
                    }
                }
            }
            end_step(w, scales, vectors, columns, x, step, sums, total);
            if (++steps_done == group_steps) {
                steps_done = 0, scales += ROWS;
                if (zeros) zeros += ROWS;
            }
            step++;
        }
    }
    finish(w, vectors, columns, index, first, total, to);
}

/* One block times all rows of x */
INLINE void block_columns(const Weight *w, int bits, int chunk_steps, int64_t index, Inputs x, Outputs to,
                          int64_t columns) {
    int64_t m = 0;
#define FROM_M of_row(x, m), (Outputs){row_at(to.y, to.dtype, m, w->out_features), to.bias, to.dtype, to.second}
    for (; m + COLUMNS <= columns; m += COLUMNS)
        for (int first = 0; first < VECTORS; first += 2) /* as many sums as there are registers */
            block(w, bits, chunk_steps, 2, COLUMNS, index, first, FROM_M);
    for (; m < columns; m++) block(w, bits, chunk_steps, VECTORS, 1, index, 0, FROM_M);
#undef FROM_M
}

typedef void Kernel(const Weight *, int64_t index, Inputs x, Outputs to, int64_t columns);

/* A kernel for each (bits, steps in a chunk): they are constants in it */
#define KERNELS(_) _(2, 1) _(2, 2) _(2, 4) _(2, 8) _(4, 1) _(4, 2) _(4, 4) _(8, 1) _(8, 2)
#define DEFINE(BITS, STEPS)                                                                                          \
    static void kernel_##BITS##_##STEPS(const Weight *w, int64_t index, Inputs x, Outputs to, int64_t columns) {     \
        block_columns(w, BITS, STEPS, index, x, to, columns);                                                        \
    }
KERNELS(DEFINE)

static Kernel *kernel_for(const Weight *w) {
    const int64_t chunk_steps = step_of(w) < chunk_of(w) ? chunk_of(w) / step_of(w) : 1;
#define CASE(BITS, STEPS) \
    if (w->bits == BITS && chunk_steps == STEPS) return kernel_##BITS##_##STEPS;
    KERNELS(CASE)
    return 0;
}

/* One row of x as integers; x becomes what they leave of it */
static void to_integers(const Weight *w, float *x, Inputs to) {
    const int64_t step_size = step_of(w);
    memset(to.codes, 0, chunks_of(w) * fields_of(w) * sizeof(shorts));
    for (int64_t step = 0; step < steps_of(w); step++) {
        const int64_t start = step * step_size, end = smaller(start + step_size, w->in_features);
        int16_t *codes = (int16_t *)to.codes;
        uint32_t largest = 0; /* as bits: integers have a maximum that needs no care for what is not a number */
        for (int64_t k = start; k < end; k++) {
            const uint32_t magnitude = bits_of(x[k]) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        to.scales[step] = NAN, to.sums[step] = (integers){0}; /* an input that is not finite makes y NaN */
        if (largest >= bits_of(INFINITY)) continue;
        const int exponent = w->integer_inputs ? 0 : (largest >> 23 > 47 ? (int)(largest >> 23) : 47) - 127 - 14;
        const float scale = ldexpf(1.0f, exponent), inverse = ldexpf(1.0f, -exponent);
        for (int64_t k = start; k < end; k++) {
            const float nearest = x[k] * inverse + 0x1.8p23f - 0x1.8p23f; /* rounds to an integer */
            const float code = nearest > 32767.0f ? 32767.0f : nearest;
            codes[k] = (int16_t)(int32_t)code;
            x[k] -= code * scale;
        }
        integers sums = {0};
        for (int64_t v = start / LANES; v < ceil_div(end, LANES); v++)
            for (int lane = 0; lane < WIDTH; lane++)
                sums[lane] += codes[v * LANES + 2 * lane] + codes[v * LANES + 2 * lane + 1];
        to.sums[step] = sums;
        to.scales[step] = scale;
    }
}

/* Whether there is a kernel for a weight */
int64_t KERNEL(lowbit_linear_knows)(const Weight *w) { return kernel_for(w) != 0; }

/* Bytes of the scratch that lowbit_linear needs: inputs as integers, their sums and scales, and as floats */
int64_t KERNEL(lowbit_linear_scratch)(const Weight *w, int64_t rows) {
    const int64_t codes = chunks_of(w) * fields_of(w) * (int64_t)sizeof(shorts);
    const int64_t steps = steps_of(w) * (int64_t)(sizeof(integers) + sizeof(float));
    return rows * (codes + steps + w->in_features * (int64_t)sizeof(float));
}

/* Rows [first, end) of x as integers, in all threads, which do not wait for each other. wide [rows, in_features]: what
   earlier pieces have left of x, if there were any */
static void to_rows(const Weight *w, const void *x, int dtype, int first_piece, int64_t first, int64_t end, float *wide,
                    Inputs to) {
#pragma omp for schedule(static) nowait
    for (int64_t m = first; m < end; m++) {
        float *row = wide + m * w->in_features;
        if (first_piece)
            for (int64_t k = 0; k < w->in_features; k++) row[k] = load(x, dtype, m * w->in_features + k);
        to_integers(w, row, of_row(to, m));
    }
}

static Inputs place_inputs(const Weight *w, int64_t rows, void *scratch) {
    const int64_t codes = chunks_of(w) * fields_of(w), steps = steps_of(w);
    Inputs to = {scratch, (integers *)scratch + rows * codes, 0, codes, steps};
    to.scales = (float *)(to.sums + rows * steps);
    return to;
}

/* For several weights, whose rows of y are written, and zeros behind those of the last; bias [e->count, out_features] or
   NULL; otherwise as lowbit_linear */
void KERNEL(lowbit_linear_experts)(const Weight *w, const Experts *e, const void *x, int64_t dtype, const void *bias,
                                   void *y, int64_t rows, int64_t pieces, void *scratch) {
    const Inputs inputs = place_inputs(w, rows, scratch);
    float *wide = inputs.scales + rows * inputs.steps;
    Kernel *kernel = kernel_for(w);
    const int64_t used = e->start[e->count];
    char *unused = row_at(y, (int)dtype, used, w->out_features);
    memset(unused, 0, (size_t)(row_at(y, (int)dtype, rows, w->out_features) - unused));
#pragma omp parallel
    for (int64_t piece = 0; piece < pieces; piece++) {
        for (int64_t i = 0; i < e->count; i++)
            to_rows(w, x, (int)dtype, !piece, e->start[i], e->start[i] + rows_of(e, i), wide, inputs);
#pragma omp barrier
        for (int64_t i = 0; i < e->count; i++) {
            const int64_t first = e->start[i], columns = rows_of(e, i);
            if (!columns) continue;
            const Weight one = weight_of(w, i);
            const void *added = bias ? row_at(bias, (int)dtype, i, w->out_features) : 0;
            const Outputs to = {row_at(y, (int)dtype, first, w->out_features), added, (int)dtype, piece > 0};
#pragma omp for schedule(static) nowait
            for (int64_t index = 0; index < blocks_of(w); index++) kernel(&one, index, of_row(inputs, first), to, columns);
        }
#pragma omp barrier
    }
}

/* y [rows, out_features] = x W^T + bias, which may be NULL. pieces: 16-bit integers for each of x. scratch is aligned to
   32 bytes. */
void KERNEL(lowbit_linear)(const Weight *w, const void *x, int64_t dtype, const void *bias, void *y, int64_t rows,
                   int64_t pieces, void *scratch) {
    const int32_t start[2] = {0, (int32_t)rows};
    const Experts one = {start, 1, 1, rows};
    KERNEL(lowbit_linear_experts)(w, &one, x, dtype, bias, y, rows, pieces, scratch);
}
