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

#define STEP 256  /* 256 * 255 * 2^15 < 2^31 */
#define INTEGER_STEP (1 << 15) /* 2^15 * 255 * 255 < 2^31 */
#define AHEAD 4096 /* bytes, of what is fetched while codes are multiplied */
#define REGISTERS (VECTOR == 64 ? 16 : 8) /* for sums */
#define COLUMNS (REGISTERS / 2) /* rows of x that share the unpacking of a code, where there are as many */
#define VECTORS 2 /* of rows of W, that share the repeating of an input, where there are registers */
#define TILE (VECTORS * WIDE)

/* x [rows, in_features] as integers: codes [rows, parts], PART of them as `arranged`; for each of the steps, 2^exponent
   and minus the sum of the integers */
typedef struct {
    uint64_t *codes;
    int32_t *sums;
    float *scales;
    int64_t parts, steps;
} Inputs;

/* Of a step: a lone row of x has two for each vector, or a product would wait for the one before it */
typedef Wide Sums[VECTORS][COLUMNS][2];

INLINE int64_t step_of(const Weight *w) { return smaller(w->group_size, w->integer_inputs ? INTEGER_STEP : STEP); }
INLINE int64_t group_steps_of(const Weight *w) { return ceil_div(w->group_size, step_of(w)); }
INLINE int64_t steps_of(const Weight *w) { return groups_of(w) * group_steps_of(w); }

/* Behind the last input of a step, and before the first one of the next */
INLINE int64_t end_of(const Weight *w, int64_t step) {
    const int64_t group = step / group_steps_of(w), in_group = step % group_steps_of(w) + 1;
    return smaller(group * w->group_size + smaller(in_group * step_of(w), w->group_size), w->in_features);
}

INLINE Inputs of_row(Inputs x, int64_t m) {
    return (Inputs){x.codes + m * x.parts, x.sums + m * x.steps, x.scales + m * x.steps, x.parts, x.steps};
}

/* y [rows, out_features], for a second piece of x with what the first has given; bias may be NULL */
typedef struct {
    void *y;
    const void *bias;
    int dtype, second;
} Outputs;

/* y of WIDE rows of W, from row n on, and one row of x */
INLINE void finish(const Weight *w, int64_t n, int64_t m, vector_f32 total, Outputs to) {
    const int64_t count = smaller(WIDE, w->out_features - n), at = m * w->out_features + n;
    if (count <= 0) return;
    if (to.second)
        total += load_lanes(to.y, to.dtype, at, count);
    else if (to.bias)
        total += load_lanes(to.bias, to.dtype, n, count);
    store_lanes(to.y, to.dtype, at, count, total);
}

/* For each row of x and each vector of rows of W */
#define EACH_SUM _Pragma("GCC unroll 8") for (int m = 0; m < columns; m++) _Pragma("GCC unroll 2") for (int v = 0; v < vectors; v++)

/* Slices [from, end) of W times `columns` rows of x */
INLINE void add_slices(int bits, int vectors, int columns, const uint32_t *const words[VECTORS], Inputs x, int64_t from,
                       int64_t end, Sums sums) {
    const int fields = 8 / bits, chains = columns == 1 ? 2 : 1;
    for (int64_t slice = from; slice < end; slice++) {
        vector_u8 word[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            memcpy(word + v, words[v] + slice * ROWS, VECTOR);
            __builtin_prefetch((const char *)(words[v] + slice * ROWS) + AHEAD); /* hardware stops at the end of a page */
        }
#pragma GCC unroll 4
        for (int f = 0; f < fields; f++)
#pragma GCC unroll 8
            for (int m = 0; m < columns; m++)
#pragma GCC unroll 2
                for (int v = 0; v < vectors; v++) {
                    const vector_u8 codes = (vector_u8)((vector_u16)word[v] >> bits * f) & (uint8_t)((1 << bits) - 1);
                    Wide *sum = &sums[v][m][f % chains];
                    *sum = dot_u8s16(*sum, codes, x.codes + m * x.parts + slice * fields + f, bits);
                }
    }
}

/* `vectors` vectors of rows of W, from row n on, times `columns` rows of x */
INLINE void product(const Weight *w, int bits, int vectors, int columns, int64_t n, Inputs x, Outputs to) {
    const int64_t slice_inputs = PART * 8 / bits, group_steps = group_steps_of(w);
    int64_t number[VECTORS], in_group = 0, slice = 0;
    const uint32_t *words[VECTORS];
    vector_f32 total[VECTORS][COLUMNS] = {0};
    for (int v = 0; v < vectors; v++) {
        const int64_t row = smaller(n + v * WIDE, blocks_of(w) * ROWS - WIDE); /* behind the last any is as good */
        words[v] = words_of(w, row), number[v] = number_of(w, row, 0);
    }
    for (int64_t step = 0; step < x.steps; step++) {
        const int64_t end = ceil_div(end_of(w, step), slice_inputs);
        Sums sums;
        EACH_SUM {
            const vector_s32 x_sums = everywhere(x.sums + m * x.steps + step);
            const vector_s32 middle = x_sums << (bits - 1);
            sums[v][m][0] = (Wide){w->zeros ? zeros_at(w, number[v]) * x_sums : middle, {0}};
            sums[v][m][1] = (Wide){{0}, {0}};
        }
        add_slices(bits, vectors, columns, words, x, slice, end, sums);
        EACH_SUM {
            vector_s32 sum = total_of(sums[v][m][0], bits);
            if (columns == 1) sum += total_of(sums[v][m][1], bits);
            const vector_f32 scale = scales_at(w, number[v]) * (vector_f32)everywhere(x.scales + m * x.steps + step);
            total[v][m] = fma_f32(__builtin_convertvector(sum, vector_f32), scale, total[v][m]);
        }
        slice = end;
        if (++in_group == group_steps) {
            in_group = 0;
            for (int v = 0; v < vectors; v++) number[v] += ROWS;
        }
    }
    EACH_SUM finish(w, n + v * WIDE, m, total[v][m], to);
}

typedef void Kernel(const Weight *, int64_t n, Inputs x, Outputs to);

/* A tile of W times a number of rows of x: a function for each (bits, rows), so that both are constants and sums have all
   registers. */
#define BITS(_) _(2) _(4) _(8)
#define DEFINE(NUMBER, MANY)                                                                                         \
    static __attribute__((noinline)) void kernel_##NUMBER##_##MANY(const Weight *w, int64_t n, Inputs x, Outputs to) { \
        const int columns = MANY < COLUMNS ? MANY : COLUMNS, vectors = columns == COLUMNS ? 1 : VECTORS;             \
        for (int v = 0; v < VECTORS; v += vectors) product(w, NUMBER, vectors, columns, n + v * WIDE, x, to);        \
    }
#define DEFINE_ALL(NUMBER)                                             \
    DEFINE(NUMBER, 1) DEFINE(NUMBER, 2) DEFINE(NUMBER, 4) DEFINE(NUMBER, 8) \
    static Kernel *const kernels_##NUMBER[] = {kernel_##NUMBER##_1, kernel_##NUMBER##_2, kernel_##NUMBER##_4, kernel_##NUMBER##_8};
BITS(DEFINE_ALL)

/* A tile times all rows of x */
static void all_rows(const Weight *w, int64_t n, Inputs x, Outputs to, int64_t rows) {
    Kernel *const *kernels = w->bits == 2 ? kernels_2 : w->bits == 4 ? kernels_4 : kernels_8;
    for (int64_t m = 0, many; m < rows; m += many) {
        int power = COLUMNS == 8 ? 3 : 2;
        while (1 << power > rows - m) power--;
        const Outputs there = {row_at(to.y, to.dtype, m, w->out_features), to.bias, to.dtype, to.second};
        kernels[power](w, n, of_row(x, m), there);
        many = 1 << power;
    }
}

/* The inputs of a step as integers; x becomes what they leave of it */
static void step_to_integers(float *x, int64_t count, int is_integer, int16_t *codes, int32_t *sum, float *scale) {
    uint32_t largest = 0; /* as bits: integers have a maximum that needs no care for what is not a number */
    for (int64_t k = 0; k < count; k++) {
        const uint32_t magnitude = bits_of(x[k]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    *scale = NAN, *sum = 0; /* an input that is not finite makes y NaN */
    if (largest >= bits_of(INFINITY)) {
        memset(codes, 0, (size_t)count * sizeof *codes);
        return;
    }
    const int exponent = is_integer ? 0 : (largest >> 23 > 47 ? (int)(largest >> 23) : 47) - 127 - 14;
    const float inverse = ldexpf(1.0f, -exponent);
    const float unit = ldexpf(1.0f, exponent);
    int32_t total = 0;
    for (int64_t k = 0; k < count; k++) {
        const float nearest = x[k] * inverse + 0x1.8p23f - 0x1.8p23f; /* rounds to an integer */
        const float code = nearest > 32767.0f ? 32767.0f : nearest;
        codes[k] = (int16_t)(int32_t)code;
        total -= (int32_t)code;
        x[k] -= code * unit;
    }
    *sum = total, *scale = unit;
}

/* One row of x; `integers`: its codes one by one, [width] */
static void to_integers(const Weight *w, float *x, int16_t *integers, Inputs to) {
    int64_t start = 0;
    for (int64_t step = 0; step < to.steps; step++) {
        const int64_t end = end_of(w, step);
        step_to_integers(x + start, end - start, w->integer_inputs != 0, integers + start, to.sums + step, to.scales + step);
        start = end;
    }
    memset(integers + start, 0, (size_t)(width_of(w) - start) * sizeof *integers);
    for (int64_t part = 0; part < to.parts; part++) {
        uint64_t four;
        memcpy(&four, integers + part * PART, sizeof four);
        to.codes[part] = arranged(four, (int)w->bits);
    }
}

/* Whether there is a kernel for a weight */
int64_t KERNEL(lowbit_linear_knows)(const Weight *w) {
    const int whole = w->group_size % (PART * fields_of(w)) == 0 || groups_of(w) == 1;
    return (w->bits == 2 || w->bits == 4 || w->bits == 8) && whole;
}

/* Where things are in the scratch: inputs as integers, their sums and scales, and behind them, for each row, what `wide`
   points to: itself as floats, and its integers */
static Inputs place_inputs(const Weight *w, int64_t rows, void *scratch, float **wide) {
    const int64_t parts = width_of(w) / PART, steps = steps_of(w);
    Inputs to = {scratch, (int32_t *)((uint64_t *)scratch + rows * parts), 0, parts, steps};
    to.scales = (float *)(to.sums + rows * steps);
    *wide = to.scales + rows * steps;
    return to;
}

/* Floats of one row that `wide` points to */
INLINE int64_t wide_of(const Weight *w) { return width_of(w) + width_of(w) / 2; }

/* Bytes of the scratch that lowbit_linear needs */
int64_t KERNEL(lowbit_linear_scratch)(const Weight *w, int64_t rows) {
    float *wide;
    place_inputs(w, rows, 0, &wide);
    return (int64_t)(intptr_t)(wide + rows * wide_of(w));
}

/* Rows [first, end) of x as integers, in all threads, which do not wait for each other. What earlier pieces have left of
   x is in `wide`, if there were any. */
static void to_rows(const Weight *w, const void *x, int dtype, int first_piece, int64_t first, int64_t end, float *wide,
                    Inputs to) {
#pragma omp for schedule(static) nowait
    for (int64_t m = first; m < end; m++) {
        float *row = wide + m * wide_of(w);
        if (first_piece)
            for (int64_t k = 0; k < w->in_features; k++) row[k] = load(x, dtype, m * w->in_features + k);
        to_integers(w, row, (int16_t *)(row + width_of(w)), of_row(to, m));
    }
}

/* For several weights, whose rows of y are written, and zeros behind those of the last; bias [e->count, out_features] or
   NULL; otherwise as lowbit_linear */
void KERNEL(lowbit_linear_experts)(const Weight *w, const Experts *e, const void *x, int64_t dtype, const void *bias,
                                   void *y, int64_t rows, int64_t pieces, void *scratch) {
    float *wide;
    const Inputs inputs = place_inputs(w, rows, scratch, &wide);
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
            for (int64_t n = 0; n < w->out_features; n += TILE) all_rows(&one, n, of_row(inputs, first), to, columns);
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
