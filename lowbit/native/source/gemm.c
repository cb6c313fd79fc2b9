// SPDX-License-Identifier: Apache-2.0
/* y = x W^T for many rows of x: a tile of W, TILE rows of it, is unpacked once and multiplied by all rows of x.

   INT8: the CHUNK inputs of a block share a scale, x = x_scale * x_code with codes from -127 to 127, and
       y[m, n] = sum over steps of  scale[n] * (of_codes - zero[n] * of_inputs)
       of_codes  = sum over blocks of the step of  x_scale[m] * (sum in the block of code * x_code)
       of_inputs = sum over blocks of the step of  x_scale[m] * (sum in the block of x_code).
   Sums in a block are exact integers: codes of W are unsigned and those of x signed, as VNNI multiplies them. A step, at
   most STEP inputs of a group, adds no more than float32 holds exactly if all x_scale are alike.

   BF16: x is bfloat16, code - zero is one exactly, and
       y[m, n] = sum over groups of  scale[n] * (sum in the group of (code - zero) * x)
   in float32: neither x nor W is rounded.

   A lane of a vector is a row of W, so no sum runs across lanes. A tile has for each part of K, four inputs of a byte or
   two of bfloat16, VECTORS vectors; that part of a row of x, 32 bits, is repeated in all lanes:

       part 0   row 0 | row 1 | ... | row TILE - 1          times   x[m, part 0] | x[m, part 0] | ...
       part 1   row 0 | row 1 | ...

   The sums of a tile and of COLUMNS rows of x are in registers: a part of x is repeated once for all vectors. */

#include <math.h>
#include <omp.h>
#include <string.h>

#include "packed.h"

#define STEP 256 /* 256 * 255 * 127 < 2^24 */
#define COLUMNS 4 /* rows of x whose sums are in registers */
#define VECTORS 2 /* of rows of W, the same */
#define TILE (VECTORS * WIDE)
#define SMALLEST 0x1p-80f /* the largest input of a block, or its inverse would not be finite */
#define ALIGNMENT 64

/* x as it is multiplied: rows of `width` numbers, zeros behind the inputs. INT8: the scale of each block, and for each
   step minus the sum of what its codes stand for. */
typedef struct {
    char *codes;
    float *scales, *sums;
    int64_t row_bytes, blocks, steps, parts;
} Inputs;

/* Of TILE rows of W from row n on: parts [parts][VECTORS], scales and zeros [groups][VECTORS] */
typedef struct {
    vector_u32 *parts;
    vector_f32 *scales, *zeros;
    int64_t n;
} Tile;

INLINE int64_t aligned(int64_t bytes) { return ceil_div(bytes, ALIGNMENT) * ALIGNMENT; }

/* Of a group, of which it is a whole part where there are several */
INLINE int64_t step_of(const Weight *w) {
    int64_t step = smaller(w->group_size, STEP);
    while (groups_of(w) > 1 && w->group_size % step) step -= CHUNK;
    return step;
}

INLINE int64_t code_size(int64_t arithmetic) { return arithmetic == INT8 ? 1 : 2; }

/* Where inputs are in the scratch. Returns their bytes. */
static int64_t place_inputs(const Weight *w, int64_t arithmetic, int64_t rows, char *scratch, Inputs *to) {
    /* not a power of two apart, or rows of x would share the sets of a cache */
    const int64_t row_bytes = width_of(w) * code_size(arithmetic) + ALIGNMENT;
    const int64_t blocks = arithmetic == INT8 ? ceil_div(w->in_features, CHUNK) : 0;
    const int64_t steps = arithmetic == INT8 ? ceil_div(w->in_features, step_of(w)) : 0;
    const int64_t parts = width_of(w) * code_size(arithmetic) / 4;
    const int64_t codes = aligned(rows * row_bytes), scales = aligned(rows * blocks * 4);
    *to = (Inputs){scratch, (float *)(scratch + codes), (float *)(scratch + codes + scales), row_bytes, blocks, steps, parts};
    return codes + scales + aligned(rows * steps * 4);
}

/* The same for the tile of one thread */
static int64_t place_tile(const Weight *w, int64_t arithmetic, char *scratch, Tile *to) {
    const int64_t parts = width_of(w) * code_size(arithmetic) / 4 * VECTORS * VECTOR;
    const int64_t numbers = groups_of(w) * VECTORS * VECTOR;
    *to = (Tile){(vector_u32 *)scratch, (vector_f32 *)(scratch + parts), (vector_f32 *)(scratch + parts + numbers), 0};
    return aligned(parts + 2 * numbers);
}

int64_t KERNEL(lowbit_gemm_scratch)(const Weight *w, int64_t arithmetic, int64_t rows, int64_t threads) {
    Inputs inputs;
    Tile tile;
    return place_inputs(w, arithmetic, rows, 0, &inputs) + threads * place_tile(w, arithmetic, 0, &tile);
}

/* One block of x as codes. Returns their sum. */
static int32_t to_bytes(const float *x, int8_t *codes, float *scale) {
    uint32_t bits = bits_of(SMALLEST); /* as bits, what is not a number is the largest */
    for (int64_t k = 0; k < CHUNK; k++) {
        const uint32_t magnitude = bits_of(x[k]) & 0x7fffffff;
        bits = magnitude > bits ? magnitude : bits;
    }
    if (bits >= bits_of(INFINITY)) { /* an input that is not finite makes y NaN */
        memset(codes, 0, CHUNK), *scale = NAN;
        return 0;
    }
    const float largest = of_bits(bits), inverse = 127.0f / largest;
    int32_t sum = 0;
    for (int64_t k = 0; k < CHUNK; k++) sum += codes[k] = (int8_t)(int32_t)rintf(x[k] * inverse);
    *scale = largest / 127.0f;
    return sum;
}

static __attribute__((noinline)) void to_inputs(const Weight *w, int64_t arithmetic, const void *x, int dtype, int64_t m, Inputs to) {
    const int64_t size = w->in_features, first = m * size, step_blocks = step_of(w) / CHUNK;
    char *row = to.codes + m * to.row_bytes;
    if (arithmetic == BF16) {
        memcpy(row, (const uint16_t *)x + first, (size_t)size * 2);
        memset(row + size * 2, 0, (size_t)(to.row_bytes - size * 2));
        return;
    }
    float *scales = to.scales + m * to.blocks, *sums = to.sums + m * to.steps;
    for (int64_t block = 0; block < to.blocks; block++) {
        const int64_t start = block * CHUNK, count = smaller(CHUNK, size - start);
        float wide[CHUNK] = {0};
        if (count == CHUNK)
            for (int64_t k = 0; k < CHUNK; k += WIDE) {
                const vector_f32 lanes = load_lanes(x, dtype, first + start + k, WIDE);
                memcpy(wide + k, &lanes, VECTOR);
            }
        else
            for (int64_t k = 0; k < count; k++) wide[k] = load(x, dtype, first + start + k);
        const float sum = (float)to_bytes(wide, (int8_t *)row + start, scales + block);
        float *of_step = sums + block / step_blocks;
        *of_step = __builtin_fmaf(-sum, scales[block], block % step_blocks ? *of_step : 0);
    }
}

/* Vector v of a tile. bits and arithmetic are constants. */
INLINE void unpack_rows(const Weight *w, int arithmetic, int bits, int v, Tile to) {
    const int64_t slices = slices_of(w), fields = 8 / bits, group_slices = w->group_size / (fields * PART);
    const int64_t n = smaller(to.n + v * WIDE, blocks_of(w) * ROWS - WIDE); /* behind the last row any is as good */
    const uint32_t *words = words_of(w, n);
    vector_u32 *part = to.parts + v;
    for (int64_t group = 0, slice = 0; group < groups_of(w); group++) {
        const int64_t number = number_of(w, n, group), end = group + 1 < groups_of(w) ? slice + group_slices : slices;
        const vector_s32 zeros = zeros_at(w, number);
        to.scales[group * VECTORS + v] = scales_at(w, number);
        to.zeros[group * VECTORS + v] = __builtin_convertvector(zeros, vector_f32);
        for (; slice < end; slice++, words += ROWS) {
            vector_u8 word;
            memcpy(&word, words, VECTOR);
#pragma GCC unroll 4
            for (int f = 0; f < fields; f++) {
                const vector_u8 codes = (vector_u8)((vector_u16)word >> bits * f) & (uint8_t)((1 << bits) - 1);
                if (arithmetic == INT8) {
                    *part = (vector_u32)codes, part += VECTORS;
                } else {
                    part[0] = pair_bf16(codes, zeros, 0), part[VECTORS] = pair_bf16(codes, zeros, 1);
                    part += 2 * VECTORS;
                }
            }
        }
    }
}

static __attribute__((noinline)) void unpack_tile(const Weight *w, int arithmetic, Tile to) {
#define CASE(ARITHMETIC, BITS) \
    if (arithmetic == ARITHMETIC && w->bits == BITS) \
        for (int v = 0; v < VECTORS; v++) unpack_rows(w, ARITHMETIC, BITS, v, to);
    CASE(INT8, 2) CASE(INT8, 4) CASE(INT8, 8) CASE(BF16, 2) CASE(BF16, 4) CASE(BF16, 8)
#undef CASE
}

typedef vector_f32 Totals[COLUMNS][VECTORS];

/* For each row of x and vector of the tile */
#define EACH_SUM _Pragma("GCC unroll 8") for (int m = 0; m < columns; m++) _Pragma("GCC unroll 2") for (int v = 0; v < VECTORS; v++)

/* A block of the tile times `columns` rows of x, added to `of_step`. bits is a constant, which stands for all that are
   not more. */
INLINE void multiply_block(int bits, int columns, const vector_u32 *parts, Inputs x, int64_t block, Totals of_step) {
    Partial sums[COLUMNS][VECTORS];
    EACH_SUM sums[m][v] = (Partial){0};
#pragma GCC unroll 8
    for (int part = 0; part < CHUNK / 4; part++)
#pragma GCC unroll 8
        for (int m = 0; m < columns; m++) {
            const vector_s8 inputs = (vector_s8)everywhere(x.codes + m * x.row_bytes + block * CHUNK + part * 4);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++)
                sums[m][v] = dot_u8s8(sums[m][v], (vector_u8)parts[part * VECTORS + v], inputs, bits);
        }
    EACH_SUM {
        const vector_f32 exact = __builtin_convertvector(sums_of(sums[m][v], bits), vector_f32);
        of_step[m][v] = fma_f32(exact, (vector_f32)everywhere(x.scales + m * x.blocks + block), of_step[m][v]);
    }
}

INLINE void multiply_int8(int64_t step_blocks, int64_t group_steps, int bits, int columns, Tile tile, Inputs x, Totals total) {
    const vector_f32 *scale = tile.scales, *zero = tile.zeros;
    int64_t in_group = 0, block = 0;
    for (int64_t step = 0; step < x.steps; step++) {
        Totals of_step;
        EACH_SUM of_step[m][v] = zero[v] * x.sums[m * x.steps + step];
        for (const int64_t end = smaller(block + step_blocks, x.blocks); block < end; block++)
            multiply_block(bits, columns, tile.parts + block * (CHUNK / 4) * VECTORS, x, block, of_step);
        EACH_SUM total[m][v] = fma_f32(of_step[m][v], scale[v], total[m][v]);
        if (++in_group == group_steps) in_group = 0, scale += VECTORS, zero += VECTORS;
    }
}

INLINE void multiply_bf16(int64_t group_parts, int columns, Tile tile, Inputs x, Totals total) {
    const vector_f32 *scale = tile.scales;
    for (int64_t part = 0; part < x.parts; scale += VECTORS) {
        Totals sums;
        EACH_SUM sums[m][v] = (vector_f32){0};
        for (const int64_t end = smaller(part + group_parts, x.parts); part < end; part++)
#pragma GCC unroll 8
            for (int m = 0; m < columns; m++) {
                const vector_u32 inputs = (vector_u32)everywhere(x.codes + m * x.row_bytes + part * 4);
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++) sums[m][v] = dot_bf16(sums[m][v], tile.parts[part * VECTORS + v], inputs);
            }
        EACH_SUM total[m][v] = fma_f32(sums[m][v], scale[v], total[m][v]);
    }
}

typedef struct {
    void *y;
    const void *bias;
    int dtype;
} Outputs;

/* Where a row of x is multiplied with a tile: all that its kernels need to know */
typedef struct {
    Tile tile;
    Inputs x;
    int64_t step_blocks, group_steps, group_parts;
} Product;

/* `columns` rows of x times the tile. Each a function of its own, with constants: sums have all registers. */
typedef void Multiply(const Product *, Totals to);
#define MULTIPLY(NAME, COLUMNS_, CALL)                                              \
    static __attribute__((noinline)) void NAME(const Product *p, Totals to) {       \
        enum { columns = COLUMNS_ };                                                \
        Totals total;                                                               \
        EACH_SUM total[m][v] = (vector_f32){0};                                     \
        CALL;                                                                       \
        EACH_SUM to[m][v] = total[m][v];                                            \
    }
#define MULTIPLY_ALL(NAME, CALL) \
    MULTIPLY(NAME##_1, 1, CALL)  \
    MULTIPLY(NAME##_2, 2, CALL)  \
    MULTIPLY(NAME##_4, 4, CALL)  \
    static Multiply *const NAME[] = {NAME##_1, NAME##_2, NAME##_4};
MULTIPLY_ALL(bytes_of_4_bits, multiply_int8(p->step_blocks, p->group_steps, 4, columns, p->tile, p->x, total))
MULTIPLY_ALL(bytes_of_8_bits, multiply_int8(p->step_blocks, p->group_steps, 8, columns, p->tile, p->x, total))
MULTIPLY_ALL(halves, multiply_bf16(p->group_parts, columns, p->tile, p->x, total))

/* y of `columns` rows of x from row `first` on */
static void finish(const Weight *w, int64_t n, int64_t first, int columns, Totals total, Outputs to) {
    EACH_SUM {
        const int64_t row = n + v * WIDE, count = smaller(WIDE, w->out_features - row);
        if (count <= 0) continue;
        if (to.bias) total[m][v] += load_lanes(to.bias, to.dtype, row, count);
        store_lanes(to.y, to.dtype, (first + m) * w->out_features + row, count, total[m][v]);
    }
}

/* All rows of x times a tile */
static void multiply_rows(const Weight *w, int arithmetic, Tile tile, Inputs x, int64_t rows, Outputs to) {
    Multiply *const *function = arithmetic == BF16 ? halves : w->bits <= 4 ? bytes_of_4_bits : bytes_of_8_bits;
    Product p = {tile, x, step_of(w) / CHUNK, ceil_div(w->group_size, step_of(w)), w->group_size / 2};
    const int few = arithmetic == INT8 && sums_for((int)w->bits) > 1; /* no registers for more than two rows */
    for (int64_t m = 0, many; m < rows; m += many) {
        const int power = rows - m >= 4 && !few ? 2 : rows - m >= 2;
        Totals total;
        many = 1 << power;
        function[power](&p, total);
        finish(w, tile.n, m, (int)many, total, to);
        p.x.codes += many * x.row_bytes, p.x.scales += many * x.blocks, p.x.sums += many * x.steps;
    }
}

/* All rows of x that a weight has, which are those from `first` on of x and y */
INLINE void multiply_weight(const Weight *w, int arithmetic, Tile tile, Inputs x, int64_t first, int64_t rows, Outputs to) {
    x.codes += first * x.row_bytes, x.scales += first * x.blocks, x.sums += first * x.steps;
    to.y = row_at(to.y, to.dtype, first, w->out_features);
#pragma omp for schedule(dynamic) nowait
    for (int64_t n = 0; n < w->out_features; n += TILE) {
        tile.n = n;
        unpack_tile(w, arithmetic, tile);
        multiply_rows(w, arithmetic, tile, x, rows, to);
    }
}

/* For several weights, whose rows of y are written; bias [e->count, out_features] or NULL; otherwise as lowbit_gemm */
void KERNEL(lowbit_gemm_experts)(const Weight *w, const Experts *e, int64_t arithmetic, const void *x, int64_t dtype,
                                 const void *bias, void *y, int64_t rows, int64_t threads, void *scratch) {
    Inputs inputs;
    char *tiles = (char *)scratch + place_inputs(w, arithmetic, rows, scratch, &inputs);
#pragma omp parallel num_threads((int)smaller(threads, omp_get_max_threads())) /* fewer, where cores are taken */
    {
        Tile tile;
        const int64_t bytes = place_tile(w, arithmetic, 0, &tile);
        place_tile(w, arithmetic, tiles + omp_get_thread_num() * bytes, &tile);
        for (int64_t i = 0; i < e->count; i++) {
            const int64_t first = e->start[i], end = first + rows_of(e, i);
#pragma omp for schedule(static) nowait
            for (int64_t m = first; m < end; m++) to_inputs(w, arithmetic, x, (int)dtype, m, inputs);
        }
#pragma omp barrier
        for (int64_t i = 0; i < e->count; i++) {
            const Weight one = weight_of(w, i);
            const Outputs to = {y, bias ? row_at(bias, (int)dtype, i, w->out_features) : 0, (int)dtype};
            if (rows_of(e, i)) multiply_weight(&one, (int)arithmetic, tile, inputs, e->start[i], rows_of(e, i), to);
        }
    }
}

/* y [rows, out_features] = x W^T + bias, which may be NULL; all three of `dtype`, which is bfloat16 for BF16. CHUNK
   divides the group size. scratch has lowbit_gemm_scratch bytes, aligned to 64. */
void KERNEL(lowbit_gemm)(const Weight *w, int64_t arithmetic, const void *x, int64_t dtype, const void *bias, void *y,
                         int64_t rows, int64_t threads, void *scratch) {
    const int32_t start[2] = {0, (int32_t)rows};
    const Experts one = {start, 1, 1, rows};
    KERNEL(lowbit_gemm_experts)(w, &one, arithmetic, x, dtype, bias, y, rows, threads, scratch);
}
