// SPDX-License-Identifier: Apache-2.0
/* y = x W^T for a group-wise quantized W, in integers: compiled by build.py for the processor it runs on.

   Inputs become 16-bit integers. The inputs of a step, at most STEP of a group, share a power of two, chosen so that
   the largest of them takes 15 bits: an input down to 1/128 of it, if it was a bfloat16, is kept exactly, others are
   off by 2^-15 of it at most, far below the rounding of y. float32 takes two such integers, of the input and of what
   the first has left. Products of codes and integers are summed exactly, and a step adds
       scale * 2^exponent * (sum of code x - zero * sum of x)    with w = (code - zero) * scale.

   Integer activations (integer_inputs) are what they are, below 256: a step may be as long as INTEGER_STEP, has the
   exponent 0, and is rounded once, when it becomes a float.

   x, y and the bias have one dtype, and y is rounded to it once.

   Layout of W [N, K]: blocks of ROWS rows; in a block, one after the other, the chunks of K; in a chunk, a vector of
   16-bit words for each row. Field f (of `bits` bits) of lane l of a word is the code of input f * LANES + l of the
   chunk. Scales and zeros are [N / ROWS, groups, ROWS]. N and K are padded with zeros to whole blocks and chunks. */

#include <math.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "numbers.h"

#define COLUMNS 4 /* rows of x that share the unpacking of a code, where there are as many */
#define STEP 256  /* 256 * 255 * 2^15 < 2^31 */
#define INTEGER_STEP (1 << 15) /* 2^15 * 255 * 255 < 2^31 */
#define AHEAD 4096 /* bytes, of what is fetched while codes are multiplied */

typedef uint16_t words __attribute__((vector_size(32)));
typedef int16_t shorts __attribute__((vector_size(32)));

enum Mode { SYMMETRIC, ASYMMETRIC, INTEGER };

/* Products of neighbours, added in pairs */
INLINE integers multiply_add(words code, shorts x) {
#ifdef __AVX2__
    return (integers)_mm256_madd_epi16((__m256i)code, (__m256i)x);
#else
    integers sums;
    for (int lane = 0; lane < LANES / 2; lane++)
        sums[lane] = (int16_t)code[2 * lane] * x[2 * lane] + (int16_t)code[2 * lane + 1] * x[2 * lane + 1];
    return sums;
#endif
}

/* x [rows, in_features] as integers: codes [rows, chunks, fields]; for each step, 2^exponent and the sums of lanes */
typedef struct {
    shorts *codes;
    integers *sums;
    float *scales;
} Inputs;

INLINE int64_t fields_of(const Weight *w) { return 16 / w->bits; }
INLINE int64_t chunk_of(const Weight *w) { return fields_of(w) * LANES; }
INLINE int64_t chunks_of(const Weight *w) { return ceil_div(w->in_features, chunk_of(w)); }
INLINE int64_t groups_of(const Weight *w) { return ceil_div(w->in_features, w->group_size); }
INLINE int64_t step_of(const Weight *w) { return smaller(w->group_size, w->integer_inputs ? INTEGER_STEP : STEP); }
INLINE int64_t steps_of(const Weight *w) { return ceil_div(w->in_features, step_of(w)); }

INLINE int32_t total_of(integers v) {
    int32_t total = 0;
    for (int lane = 0; lane < WIDTH; lane++) total += v[lane];
    return total;
}

/* y [rows, out_features], for a second piece of x with what the first has given; bias may be NULL */
typedef struct {
    void *y;
    const void *bias;
    int dtype, second;
} Outputs;

/* Rows [first, first + rows) of a block times `columns` rows of x. chunk_steps: steps in a chunk, 1 where a step has
   whole chunks. */
INLINE void block(const Weight *w, int bits, int mode, int chunk_steps, int rows, int columns, int64_t index, int first,
                  Inputs x, Outputs to) {
    const int fields = 16 / bits, step_fields = fields / chunk_steps;
    const int64_t chunks = chunks_of(w), groups = groups_of(w), steps = steps_of(w);
    const int64_t step_chunks = ceil_div(step_of(w), chunk_of(w)), group_steps = ceil_div(w->group_size, step_of(w));
    const words *codes = (const words *)w->codes + index * chunks * ROWS + first;
    const float *scales = w->scales + index * groups * ROWS + first;
    const float *zeros = w->zeros ? w->zeros + index * groups * ROWS + first : 0;
    floats total[ROWS][COLUMNS] = {0};
    int64_t step = 0, steps_done = 0; /* of all, and of the group */
    for (int64_t start = 0; start < chunks; start += step_chunks) {
        const int64_t end = smaller(start + step_chunks, chunks);
#pragma GCC unroll 16
        for (int part = 0; part < chunk_steps; part++) {
            if (chunk_steps > 1 && step == steps) break; /* the rest of the chunk is padding */
            integers sums[ROWS][COLUMNS];
#pragma GCC unroll 4
            for (int m = 0; m < columns; m++) {
                const integers x_sums = x.sums[m * steps + step], x_middle = x_sums << (bits - 1);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++)
                    sums[r][m] = mode != SYMMETRIC && zeros ? -((int32_t)zeros[r] * x_sums) : -x_middle;
            }
            for (int64_t chunk = start; chunk < end; chunk++) {
                for (int byte = 0; byte < rows * 32; byte += 64) /* the hardware stops at the end of a page */
                    __builtin_prefetch((const char *)(codes + chunk * ROWS) + AHEAD + byte);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    const words word = codes[chunk * ROWS + r];
#pragma GCC unroll 16
                    for (int f = part * step_fields; f < (part + 1) * step_fields; f++) {
                        words code = word >> (bits * f);
                        if (f < fields - 1) code &= (uint16_t)((1 << bits) - 1);
                        for (int m = 0; m < columns; m++)
                            sums[r][m] += multiply_add(code, x.codes[(m * chunks + chunk) * fields + f]);
                    }
                }
            }
#pragma GCC unroll 4
            for (int m = 0; m < columns; m++) {
                const float x_scale = x.scales[m * steps + step];
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    const float scale = scales[r] * x_scale;
                    if (mode == INTEGER)
                        total[r][m][0] += scale * (float)total_of(sums[r][m]);
                    else
                        total[r][m] += scale * __builtin_convertvector(sums[r][m], floats);
                }
            }
            if (++steps_done == group_steps) {
                steps_done = 0, scales += ROWS;
                if (zeros) zeros += ROWS;
            }
            step++;
        }
    }
    for (int r = 0; r < rows; r++) {
        const int64_t row = index * ROWS + first + r;
        if (row < w->out_features)
            for (int m = 0; m < columns; m++) {
                const int64_t at = m * w->out_features + row;
                float all = sum_of(total[r][m]);
                if (to.second)
                    all += load(to.y, to.dtype, at);
                else if (to.bias)
                    all += load(to.bias, to.dtype, row);
                store(to.y, to.dtype, at, all);
            }
    }
}

/* One block times all rows of x */
INLINE void block_columns(const Weight *w, int bits, int mode, int chunk_steps, int64_t index, Inputs x,
                          Outputs to, int64_t columns) {
    const int64_t codes = chunks_of(w) * (16 / bits), steps = steps_of(w);
    int64_t m = 0;
    const int64_t size = w->out_features * (to.dtype == FLOAT32 ? 4 : 2);
#define FROM_M                                                               \
    (Inputs){x.codes + m * codes, x.sums + m * steps, x.scales + m * steps}, \
        (Outputs){(char *)to.y + m * size, to.bias, to.dtype, to.second}
    for (; m + COLUMNS <= columns; m += COLUMNS)
        for (int first = 0; first < ROWS; first += 2) /* as many sums as there are registers */
            block(w, bits, mode, chunk_steps, 2, COLUMNS, index, first, FROM_M);
    for (; m < columns; m++) block(w, bits, mode, chunk_steps, ROWS, 1, index, 0, FROM_M);
#undef FROM_M
}

typedef void Kernel(const Weight *, int64_t index, Inputs x, Outputs to, int64_t columns);

/* A kernel for each (bits, steps in a chunk) and mode: they are constants in it */
#define KERNELS(_, MODE)                                                                                     \
    _(2, 1, MODE) _(2, 2, MODE) _(2, 4, MODE) _(2, 8, MODE) _(4, 1, MODE) _(4, 2, MODE) _(4, 4, MODE)        \
    _(8, 1, MODE) _(8, 2, MODE)
#define DEFINE(BITS, STEPS, MODE)                                                                            \
    static void kernel_##BITS##_##STEPS##_##MODE(const Weight *w, int64_t index, Inputs x, Outputs to,       \
                                                 int64_t columns) {                                          \
        block_columns(w, BITS, MODE, STEPS, index, x, to, columns);                                          \
    }
KERNELS(DEFINE, SYMMETRIC)
KERNELS(DEFINE, ASYMMETRIC)
KERNELS(DEFINE, INTEGER)

static Kernel *kernel_for(const Weight *w) {
    const int64_t chunk_steps = step_of(w) < chunk_of(w) ? chunk_of(w) / step_of(w) : 1;
    const enum Mode mode = w->integer_inputs ? INTEGER : w->zeros ? ASYMMETRIC : SYMMETRIC;
#define CASE(BITS, STEPS, MODE) \
    if (w->bits == BITS && chunk_steps == STEPS && mode == MODE) return kernel_##BITS##_##STEPS##_##MODE;
    KERNELS(CASE, SYMMETRIC)
    KERNELS(CASE, ASYMMETRIC)
    KERNELS(CASE, INTEGER)
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
            sums += multiply_add((words){0} + 1, to.codes[v]);
        to.sums[step] = sums;
        to.scales[step] = scale;
    }
}

/* Bytes of the scratch that lowbit_linear needs: inputs as integers, their sums and scales, and as floats */
int64_t lowbit_linear_scratch(const Weight *w, int64_t rows) {
    const int64_t codes = chunks_of(w) * fields_of(w) * (int64_t)sizeof(shorts);
    const int64_t steps = steps_of(w) * (int64_t)(sizeof(integers) + sizeof(float));
    return rows * (codes + steps + w->in_features * (int64_t)sizeof(float));
}

/* y [rows, out_features] = x W^T + bias, which may be NULL. pieces: 16-bit integers for each of x. scratch is aligned to
   32 bytes. */
void lowbit_linear(const Weight *w, const void *x, int64_t dtype, const void *bias, void *y, int64_t rows,
                   int64_t pieces, void *scratch) {
    const int64_t codes = chunks_of(w) * fields_of(w), steps = steps_of(w), blocks = ceil_div(w->out_features, ROWS);
    Kernel *kernel = kernel_for(w);
    Inputs inputs = {scratch, (integers *)scratch + rows * codes, 0};
    inputs.scales = (float *)(inputs.sums + rows * steps);
    float *wide = inputs.scales + rows * steps;
#pragma omp parallel
    for (int64_t piece = 0; piece < pieces; piece++) {
        const Outputs outputs = {y, bias, (int)dtype, piece > 0};
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m++) {
            float *row = wide + m * w->in_features;
            if (!piece)
                for (int64_t k = 0; k < w->in_features; k++) row[k] = load(x, (int)dtype, m * w->in_features + k);
            to_integers(w, row, (Inputs){inputs.codes + m * codes, inputs.sums + m * steps, inputs.scales + m * steps});
        }
#pragma omp for schedule(static)
        for (int64_t index = 0; index < blocks; index++) kernel(w, index, inputs, outputs, rows);
    }
}

/* Where the code of row n, input k is: the vector of words, then lane and field as above */
INLINE int64_t vector_of(const Weight *w, int64_t n, int64_t chunk) {
    return (n / ROWS * chunks_of(w) + chunk) * ROWS + n % ROWS;
}

/* Asks for transparent huge pages, before first touch: in pages of 4 KiB a weight exceeds the reach of the TLB. */
static void in_large_pages(char *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, first = ((uintptr_t)memory + page - 1) / page * page;
    const int64_t whole = (int64_t)((uintptr_t)memory + (uintptr_t)bytes - first);
    if (whole > 0) madvise((void *)first, (size_t)whole, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

/* codes [out_features, in_features] -> packed, which holds nothing yet. Returns 0 if there is no kernel for them. */
int64_t lowbit_pack(const Weight *w, const uint8_t *codes, void *packed) {
    const int64_t chunk_size = chunk_of(w), fields = fields_of(w);
    const int64_t blocks = ceil_div(w->out_features, ROWS), bytes = chunks_of(w) * ROWS * (int64_t)sizeof(words);
    in_large_pages(packed, blocks * bytes);
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        memset((char *)packed + block * bytes, 0, (size_t)bytes);
        for (int64_t n = block * ROWS; n < smaller(block * ROWS + ROWS, w->out_features); n++)
            for (int64_t v = 0; v < ceil_div(w->in_features, LANES); v++) {
                uint16_t *word = (uint16_t *)((words *)packed + vector_of(w, n, v * LANES / chunk_size));
                const uint8_t *from = codes + n * w->in_features + v * LANES;
                const int64_t shift = v % fields * w->bits, lanes = smaller(LANES, w->in_features - v * LANES);
                for (int64_t lane = 0; lane < lanes; lane++) word[lane] |= (uint16_t)(from[lane] << shift);
            }
    }
    return kernel_for(w) != 0;
}

/* Rows [start, stop): their codes [stop - start, in_features], or, with weights, (code - zero) * scale */
void lowbit_unpack(const Weight *w, int64_t start, int64_t stop, uint8_t *codes, float *weights) {
    const int64_t chunk_size = chunk_of(w), fields = fields_of(w), groups = groups_of(w);
#pragma omp parallel for schedule(static)
    for (int64_t n = start; n < stop; n++)
        for (int64_t v = 0; v < ceil_div(w->in_features, LANES); v++) {
            const uint16_t *word = (const uint16_t *)((const words *)w->codes + vector_of(w, n, v * LANES / chunk_size));
            const int64_t shift = v % fields * w->bits, lanes = smaller(LANES, w->in_features - v * LANES);
            const int64_t to = (n - start) * w->in_features + v * LANES, mask = (1 << w->bits) - 1;
            if (codes)
                for (int64_t lane = 0; lane < lanes; lane++) codes[to + lane] = (uint8_t)(word[lane] >> shift & mask);
            if (weights) {
                const int64_t meta = (n / ROWS * groups + v * LANES / w->group_size) * ROWS + n % ROWS;
                const float scale = w->scales[meta], zero = w->zeros ? w->zeros[meta] : (float)(1 << (w->bits - 1));
                for (int64_t lane = 0; lane < lanes; lane++)
                    weights[to + lane] = ((float)(word[lane] >> shift & mask) - zero) * scale;
            }
        }
}
