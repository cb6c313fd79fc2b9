/* y = x W^T for a group-wise quantized W, in integers: compiled by build.py for the processor it runs on.

   Inputs become 16-bit integers. The inputs of a step, at most STEP of a group, share a power of two, chosen so that the
   largest of them takes 15 bits: an input down to 1/128 of it, if it was a bfloat16, is kept exactly, others are off by
   2^-16 of it at most, far below the rounding of y. float32 takes two such integers, of the input and of what the first
   has left. Products of codes and integers are summed exactly, and a step adds
       scale * 2^exponent * (sum of code x - zero * sum of x)    with w = (code - zero) * scale.

   Integer activations (integer_inputs) are what they are, below 256: a step may be as long as INTEGER_STEP, has the
   exponent 0, and is rounded once, when it becomes a float.

   Layout of W [N, K]: blocks of ROWS rows; in a block, one after the other, the chunks of K; in a chunk, a vector of
   16-bit words for each row. Field f (of `bits` bits) of lane l of a word is the code of input f * LANES + l of the
   chunk. Scales and zeros are [N / ROWS, groups, ROWS]. N and K are padded with zeros to whole blocks and chunks. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define ROWS 4
#define COLUMNS 4 /* rows of x that share the unpacking of a code, where there are as many */
#define STEP 256  /* 256 * 255 * 2^15 < 2^31 */
#define INTEGER_STEP (1 << 15) /* 2^15 * 255 * 255 < 2^31 */
#define INLINE static inline __attribute__((always_inline))

#define LANES 16

typedef uint16_t words __attribute__((vector_size(32)));
typedef int16_t shorts __attribute__((vector_size(32)));
typedef int32_t integers __attribute__((vector_size(32)));
typedef float floats __attribute__((vector_size(32)));

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

typedef struct {
    const words *codes;          /* [blocks, chunks, ROWS] */
    const float *scales, *zeros; /* [blocks, groups, ROWS]; zeros NULL: the middle code */
    int64_t bits, out_features, in_features, group_size, integer_inputs;
} Weight;

/* x [rows, in_features] as integers: codes [rows, chunks, fields], and for each step 2^exponent and the sums of lanes */
typedef struct {
    shorts *codes;
    integers *sums;
    float *scales;
} Inputs;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t fields_of(const Weight *w) { return 16 / w->bits; }
INLINE int64_t chunk_of(const Weight *w) { return fields_of(w) * LANES; }
INLINE int64_t chunks_of(const Weight *w) { return ceil_div(w->in_features, chunk_of(w)); }
INLINE int64_t groups_of(const Weight *w) { return ceil_div(w->in_features, w->group_size); }
INLINE int64_t step_of(const Weight *w) { return smaller(w->group_size, w->integer_inputs ? INTEGER_STEP : STEP); }
INLINE int64_t steps_of(const Weight *w) { return ceil_div(w->in_features, step_of(w)); }

INLINE int32_t sum_of(integers v) {
    int32_t total = 0;
    for (int lane = 0; lane < LANES / 2; lane++) total += v[lane];
    return total;
}

/* Rows [first, first + rows) of a block times `columns` rows of x. chunk_steps: steps in a chunk, 1 where a step has
   whole chunks. */
INLINE void block(const Weight *w, int bits, int chunk_steps, int rows, int columns, int64_t index, int first, Inputs x,
                  float *y) {
    const int fields = 16 / bits, step_fields = fields / chunk_steps;
    const int64_t chunks = chunks_of(w), groups = groups_of(w), steps = steps_of(w);
    const int64_t step_chunks = ceil_div(step_of(w), chunk_of(w)), group_steps = ceil_div(w->group_size, step_of(w));
    const words *codes = w->codes + index * chunks * ROWS + first;
    const float *scales = w->scales + index * groups * ROWS + first;
    const float *zeros = w->zeros ? w->zeros + index * groups * ROWS + first : 0;
    floats total[ROWS][COLUMNS] = {0};
    int64_t step = 0;
    for (int64_t start = 0; start < chunks; start += step_chunks) {
        const int64_t end = smaller(start + step_chunks, chunks);
#pragma GCC unroll 16
        for (int part = 0; part < chunk_steps; part++) {
            if (chunk_steps > 1 && step == steps) break; /* the rest of the chunk is padding */
            integers sums[ROWS][COLUMNS] = {0};
            for (int64_t chunk = start; chunk < end; chunk++) {
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
            const int64_t group = step / group_steps;
            for (int r = 0; r < rows; r++) {
                const float scale = scales[group * ROWS + r];
                const int32_t zero = zeros ? (int32_t)zeros[group * ROWS + r] : 1 << (bits - 1);
                for (int m = 0; m < columns; m++) {
                    const integers sum = sums[r][m] - zero * x.sums[m * steps + step];
                    if (w->integer_inputs)
                        total[r][m][0] += scale * x.scales[m * steps + step] * (float)sum_of(sum);
                    else
                        total[r][m] += scale * x.scales[m * steps + step] * __builtin_convertvector(sum, floats);
                }
            }
            step++;
        }
    }
    for (int r = 0; r < rows; r++) {
        const int64_t row = index * ROWS + first + r;
        if (row < w->out_features)
            for (int m = 0; m < columns; m++) {
                float all = 0;
                for (int lane = 0; lane < LANES / 2; lane++) all += total[r][m][lane];
                y[m * w->out_features + row] += all;
            }
    }
}

/* One block times all rows of x */
INLINE void block_columns(const Weight *w, int bits, int chunk_steps, int64_t index, Inputs x, float *y, int64_t columns) {
    const int64_t codes = chunks_of(w) * (16 / bits), steps = steps_of(w);
    int64_t m = 0;
#define FROM_M (Inputs){x.codes + m * codes, x.sums + m * steps, x.scales + m * steps}, y + m * w->out_features
    for (; m + COLUMNS <= columns; m += COLUMNS)
        for (int first = 0; first < ROWS; first += 2) /* as many sums as there are registers */
            block(w, bits, chunk_steps, 2, COLUMNS, index, first, FROM_M);
    for (; m < columns; m++) block(w, bits, chunk_steps, ROWS, 1, index, 0, FROM_M);
#undef FROM_M
}

typedef void Kernel(const Weight *, int64_t index, Inputs x, float *y, int64_t columns);

/* A kernel for each (bits, steps in a chunk): both are constants in it */
#define KERNELS(_) \
    _(2, 1) _(2, 2) _(2, 4) _(2, 8) _(4, 1) _(4, 2) _(4, 4) _(8, 1) _(8, 2)
#define DEFINE(BITS, STEPS)                                                                              \
    static void kernel_##BITS##_##STEPS(const Weight *w, int64_t index, Inputs x, float *y, int64_t columns) { \
        block_columns(w, BITS, STEPS, index, x, y, columns);                                             \
    }
KERNELS(DEFINE)

static Kernel *kernel_for(int64_t bits, int64_t chunk_steps) {
#define CASE(BITS, STEPS) \
    if (bits == BITS && chunk_steps == STEPS) return kernel_##BITS##_##STEPS;
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
        float largest = 0x1p-80f, nothing = 0;
        for (int64_t k = start; k < end; k++) {
            largest = fabsf(x[k]) > largest ? fabsf(x[k]) : largest;
            nothing += x[k] * 0.0f;
        }
        to.scales[step] = NAN; /* an input that is not finite makes y NaN */
        if (nothing != 0.0f) continue;
        const int exponent = w->integer_inputs ? 0 : ilogbf(largest) - 14;
        const float scale = ldexpf(1.0f, exponent), inverse = ldexpf(1.0f, -exponent);
        for (int64_t k = start; k < end; k++) {
            float code = rintf(x[k] * inverse);
            code = code > 32767.0f ? 32767.0f : code;
            codes[k] = (int16_t)code;
            x[k] -= code * scale;
        }
        integers sums = {0};
        for (int64_t v = start / LANES; v < ceil_div(end, LANES); v++)
            sums += multiply_add((words){0} + 1, to.codes[v]);
        to.sums[step] = sums;
        to.scales[step] = scale;
    }
}

/* y [rows, out_features] += x W^T. x [rows, in_features] is used up; pieces: 16-bit integers for each of it. scratch has
   rows * (padded in_features * 2 + steps * 36) bytes, aligned to 32. Returns 0 if there is no kernel. */
int lowbit_linear(const Weight *w, float *x, float *y, int64_t rows, int64_t pieces, char *scratch) {
    const int64_t codes = chunks_of(w) * fields_of(w), steps = steps_of(w), blocks = ceil_div(w->out_features, ROWS);
    Kernel *kernel = kernel_for(w->bits, step_of(w) < chunk_of(w) ? chunk_of(w) / step_of(w) : 1);
    if (!kernel) return 0;
    Inputs inputs = {(shorts *)scratch, (integers *)scratch + rows * codes, 0};
    inputs.scales = (float *)(inputs.sums + rows * steps);
#pragma omp parallel
    for (int64_t piece = 0; piece < pieces; piece++) {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m++)
            to_integers(w, x + m * w->in_features,
                        (Inputs){inputs.codes + m * codes, inputs.sums + m * steps, inputs.scales + m * steps});
#pragma omp for schedule(static)
        for (int64_t index = 0; index < blocks; index++) kernel(w, index, inputs, y, rows);
    }
    return 1;
}

/* Where the code of row n, input k is: the vector of words, then lane and field as above */
INLINE int64_t vector_of(const Weight *w, int64_t n, int64_t chunk) {
    return (n / ROWS * chunks_of(w) + chunk) * ROWS + n % ROWS;
}

/* codes [out_features, in_features] -> packed, which begins as zeros */
void lowbit_pack(const Weight *w, const uint8_t *codes, words *packed) {
    const int64_t chunk_size = chunk_of(w), fields = fields_of(w);
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < w->out_features; n++)
        for (int64_t v = 0; v < ceil_div(w->in_features, LANES); v++) {
            uint16_t *word = (uint16_t *)(packed + vector_of(w, n, v * LANES / chunk_size));
            const uint8_t *from = codes + n * w->in_features + v * LANES;
            const int64_t shift = v % fields * w->bits, lanes = smaller(LANES, w->in_features - v * LANES);
            for (int64_t lane = 0; lane < lanes; lane++) word[lane] |= (uint16_t)(from[lane] << shift);
        }
}

/* Rows [start, stop): their codes [stop - start, in_features], or, with weights, (code - zero) * scale */
void lowbit_unpack(const Weight *w, int64_t start, int64_t stop, uint8_t *codes, float *weights) {
    const int64_t chunk_size = chunk_of(w), fields = fields_of(w), groups = groups_of(w);
#pragma omp parallel for schedule(static)
    for (int64_t n = start; n < stop; n++)
        for (int64_t v = 0; v < ceil_div(w->in_features, LANES); v++) {
            const uint16_t *word = (const uint16_t *)(w->codes + vector_of(w, n, v * LANES / chunk_size));
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
