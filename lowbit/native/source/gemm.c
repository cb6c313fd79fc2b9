// SPDX-License-Identifier: Apache-2.0
/* y = x W^T for many rows of x: a tile of W, TILE rows of it, is unpacked once and multiplied by all rows of x.

   INT8: BLOCK inputs share a scale, x = x_scale * x_code with codes from -127 to 127, and
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
#include "vectors.h"

#define STEP 256 /* 256 * 255 * 127 < 2^24 */
#define BLOCK 32 /* inputs that share a scale; GEMM_GROUP of abi.h divides a group for it to have one of W */
#define COLUMNS (VECTOR == 64 ? 8 : 4) /* rows of x whose sums are in registers */
#define VECTORS (VECTOR == 64 ? 1 : 2) /* of rows of W, the same */
#define TILE (VECTORS * WIDE)
#define SMALLEST 0x1p-80f /* the largest input of a block, or its inverse would not be finite */
#define ALIGNMENT 64

/* x as it is multiplied: rows of `width` numbers, zeros behind the inputs. INT8: the scale of each block, and for each
   step minus the sum of what its codes stand for. */
typedef struct {
    char *codes;
    float *scales, *sums;
    int64_t row_bytes, blocks, steps;
} Inputs;

typedef struct {
    vector_u32 *parts;
    vector_f32 *scales, *zeros; /* [groups][VECTORS] */
} Tile;

INLINE int64_t aligned(int64_t bytes) { return ceil_div(bytes, ALIGNMENT) * ALIGNMENT; }
INLINE int64_t width_of(const Weight *w) { return chunks_of(w) * chunk_of(w); }
INLINE int64_t step_of(const Weight *w) { return smaller(w->group_size, STEP); }
INLINE int64_t size_of(int64_t arithmetic) { return arithmetic == INT8 ? 1 : 2; }

/* Where inputs are in the scratch. Returns their bytes. */
static int64_t place_inputs(const Weight *w, int64_t arithmetic, int64_t rows, char *scratch, Inputs *to) {
    /* not a power of two apart, or rows of x would share the sets of a cache */
    const int64_t row_bytes = width_of(w) * size_of(arithmetic) + ALIGNMENT;
    const int64_t blocks = arithmetic == INT8 ? ceil_div(w->in_features, BLOCK) : 0;
    const int64_t steps = arithmetic == INT8 ? ceil_div(w->in_features, step_of(w)) : 0;
    const int64_t codes = aligned(rows * row_bytes), scales = aligned(rows * blocks * 4);
    *to = (Inputs){scratch, (float *)(scratch + codes), (float *)(scratch + codes + scales), row_bytes, blocks, steps};
    return codes + scales + aligned(rows * steps * 4);
}

/* The same for the tile of one thread */
static int64_t place_tile(const Weight *w, int64_t arithmetic, char *scratch, Tile *to) {
    const int64_t parts = width_of(w) * size_of(arithmetic) / 4 * VECTORS * VECTOR;
    const int64_t numbers = groups_of(w) * VECTORS * VECTOR;
    *to = (Tile){(vector_u32 *)scratch, (vector_f32 *)(scratch + parts), (vector_f32 *)(scratch + parts + numbers)};
    return aligned(parts + 2 * numbers);
}

int64_t KERNEL(lowbit_gemm_scratch)(const Weight *w, int64_t arithmetic, int64_t rows, int64_t threads) {
    Inputs inputs;
    Tile tile;
    return place_inputs(w, arithmetic, rows, 0, &inputs) + threads * place_tile(w, arithmetic, 0, &tile);
}

/* One block of x, of which `count` inputs are there, as codes. Returns their sum. */
static int32_t to_bytes(const float *x, int64_t count, int8_t *codes, float *scale) {
    uint32_t bits = bits_of(SMALLEST); /* as bits, what is not a number is the largest */
    for (int64_t k = 0; k < count; k++) {
        const uint32_t magnitude = bits_of(x[k]) & 0x7fffffff;
        bits = magnitude > bits ? magnitude : bits;
    }
    memset(codes, 0, BLOCK);
    *scale = NAN; /* an input that is not finite makes y NaN */
    if (bits >= bits_of(INFINITY)) return 0;
    const float largest = of_bits(bits), inverse = 127.0f / largest;
    int32_t sum = 0;
    for (int64_t k = 0; k < count; k++) sum += codes[k] = (int8_t)(int32_t)rintf(x[k] * inverse);
    *scale = largest / 127.0f;
    return sum;
}

static void to_inputs(const Weight *w, int64_t arithmetic, const void *x, int dtype, int64_t m, Inputs to) {
    const int64_t size = w->in_features, first = m * size, step_blocks = step_of(w) / BLOCK;
    char *row = to.codes + m * to.row_bytes;
    if (arithmetic == BF16) {
        memcpy(row, (const uint16_t *)x + first, (size_t)size * 2);
        memset(row + size * 2, 0, (size_t)(to.row_bytes - size * 2));
        return;
    }
    float *scales = to.scales + m * to.blocks, *sums = to.sums + m * to.steps;
    for (int64_t block = 0; block < to.blocks; block++) {
        const int64_t start = block * BLOCK, count = smaller(BLOCK, size - start);
        float wide[BLOCK];
        for (int64_t k = 0; k < count; k++) wide[k] = load(x, dtype, first + start + k);
        const float sum = (float)to_bytes(wide, count, (int8_t *)row + start, scales + block);
        float *of_step = sums + block / step_blocks;
        *of_step = __builtin_fmaf(-sum, scales[block], block % step_blocks ? *of_step : 0);
    }
}

/* The zeros of ROWS rows, [ROWS][4], in the group that is being unpacked: `left` parts of four inputs are left of it, the
   next one has the scales from number `next` on */
typedef struct {
    int64_t next, left;
    int32_t zeros[ROWS * 4];
} Group;

/* A chunk of ROWS rows of W from n on into the lanes of a tile */
INLINE void unpack_chunk(const Weight *w, int arithmetic, int bits, int64_t n, int64_t chunk, Group *group,
                         uint32_t *lanes) {
    enum { PARTS = 16 / 2 * LANES / 4 }; /* of a chunk, at most */
    const int64_t parts = 16 / bits * LANES / 4;
    const void *from = (const words *)w->codes + vector_of(w, n, chunk);
    uint32_t codes[PARTS][ROWS];
    if (arithmetic == INT8) {
        unpack_bytes(from, bits, lanes + chunk * parts * TILE, TILE);
        return;
    }
    unpack_bytes(from, bits, codes[0], ROWS);
    for (int64_t part = 0; part < parts; part++, group->left--) {
        if (!group->left && (chunk * parts + part) * 4 < w->in_features) {
            group->left = w->group_size / 4;
            for (int i = 0; i < 4 * ROWS; i++) group->zeros[i] = (int32_t)zero_of(w, group->next + i / 4);
            group->next += ROWS;
        }
        to_bf16((const uint8_t *)codes[part], group->zeros, lanes + (chunk * parts + part) * 2 * TILE, TILE);
    }
}

/* The codes of rows [n, n + rows) of W, chunk by chunk: a part of a tile is written while it is in the cache */
INLINE void unpack_codes(const Weight *w, int arithmetic, int bits, int64_t n, int64_t rows, Tile to) {
    const int64_t chunks = chunks_of(w);
    Group groups[TILE / ROWS];
    for (int64_t r = 0; r < rows; r += ROWS) groups[r / ROWS] = (Group){.next = scale_of(w, n + r, 0)};
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t r = 0; r < rows; r += ROWS)
            unpack_chunk(w, arithmetic, bits, n + r, chunk, groups + r / ROWS, (uint32_t *)to.parts + r);
}

/* Rows [n, n + TILE) of W; zeros where there are none */
static void unpack_tile(const Weight *w, int arithmetic, int64_t n, Tile to) {
    const int64_t groups = groups_of(w), rows = smaller(TILE, blocks_of(w) * ROWS - n);
    if (rows < TILE) {
        memset(to.parts, 0, (size_t)(width_of(w) * size_of(arithmetic) / 4 * VECTORS * VECTOR));
        memset(to.scales, 0, (size_t)(groups * VECTORS * VECTOR));
        memset(to.zeros, 0, (size_t)(groups * VECTORS * VECTOR));
    }
#define CASE(ARITHMETIC, BITS) \
    if (arithmetic == ARITHMETIC && w->bits == BITS) unpack_codes(w, ARITHMETIC, BITS, n, rows, to);
    CASE(INT8, 2) CASE(INT8, 4) CASE(INT8, 8) CASE(BF16, 2) CASE(BF16, 4) CASE(BF16, 8)
#undef CASE
    for (int64_t r = 0; r < rows; r++)
        for (int64_t group = 0; group < groups; group++) {
            const int64_t from = scale_of(w, n + r, group * w->group_size);
            ((float *)(to.scales + group * VECTORS))[r] = w->scales[from];
            ((float *)(to.zeros + group * VECTORS))[r] = zero_of(w, from);
        }
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
    for (int part = 0; part < BLOCK / 4; part++)
#pragma GCC unroll 8
        for (int m = 0; m < columns; m++) {
            const vector_s8 inputs = (vector_s8)everywhere(x.codes + m * x.row_bytes + block * BLOCK + part * 4);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++)
                sums[m][v] = dot_u8s8(sums[m][v], (vector_u8)parts[part * VECTORS + v], inputs, bits);
        }
    EACH_SUM {
        const vector_f32 exact = __builtin_convertvector(sums_of(sums[m][v], bits), vector_f32);
        of_step[m][v] = fma_f32(exact, (vector_f32)everywhere(x.scales + m * x.blocks + block), of_step[m][v]);
    }
}

INLINE void multiply_int8(const Weight *w, int bits, int columns, Tile tile, Inputs x, Totals total) {
    const int64_t step_blocks = step_of(w) / BLOCK;
    for (int64_t step = 0; step < x.steps; step++) {
        const int64_t group = step * step_of(w) / w->group_size;
        const vector_f32 *scale = tile.scales + group * VECTORS, *zero = tile.zeros + group * VECTORS;
        Totals of_step;
        EACH_SUM of_step[m][v] = zero[v] * x.sums[m * x.steps + step];
        for (int64_t block = step * step_blocks; block < smaller((step + 1) * step_blocks, x.blocks); block++)
            multiply_block(bits, columns, tile.parts + block * (BLOCK / 4) * VECTORS, x, block, of_step);
        EACH_SUM total[m][v] = fma_f32(of_step[m][v], scale[v], total[m][v]);
    }
}

INLINE void multiply_bf16(const Weight *w, int columns, Tile tile, Inputs x, Totals total) {
    const int64_t parts = width_of(w) / 2, group_parts = w->group_size / 2, groups = groups_of(w);
    for (int64_t group = 0; group < groups; group++) {
        Totals sums;
        EACH_SUM sums[m][v] = (vector_f32){0};
        for (int64_t part = group * group_parts; part < smaller((group + 1) * group_parts, parts); part++)
#pragma GCC unroll 8
            for (int m = 0; m < columns; m++) {
                const vector_u32 inputs = (vector_u32)everywhere(x.codes + m * x.row_bytes + part * 4);
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++) sums[m][v] = dot_bf16(sums[m][v], tile.parts[part * VECTORS + v], inputs);
            }
        EACH_SUM total[m][v] = fma_f32(sums[m][v], tile.scales[group * VECTORS + v], total[m][v]);
    }
}

typedef struct {
    void *y;
    const void *bias;
    int dtype;
} Outputs;

/* Rows [first, first + columns) of x times the tile of the rows of W from n on */
INLINE void multiply(const Weight *w, int arithmetic, int bits, int columns, Tile tile, Inputs x, int64_t n, int64_t first,
                     Outputs to) {
    Totals total;
    EACH_SUM total[m][v] = (vector_f32){0};
    x.codes += first * x.row_bytes, x.scales += first * x.blocks, x.sums += first * x.steps;
    if (arithmetic == INT8)
        multiply_int8(w, bits, columns, tile, x, total);
    else
        multiply_bf16(w, columns, tile, x, total);
    const int64_t there = smaller(TILE, w->out_features - n);
    for (int m = 0; m < columns; m++)
        for (int64_t r = 0; r < there; r++)
            store(to.y, to.dtype, (first + m) * w->out_features + n + r,
                  total[m][r / WIDE][r % WIDE] + (to.bias ? load(to.bias, to.dtype, n + r) : 0));
}

/* All rows of x */
INLINE void multiply_rows(const Weight *w, int arithmetic, int bits, Tile tile, Inputs x, int64_t n, int64_t rows,
                          Outputs to) {
    int64_t m = 0;
    if (arithmetic != INT8 || sums_for(bits) == 1) /* others have no registers for more than two rows */
        for (; m + COLUMNS <= rows; m += COLUMNS) multiply(w, arithmetic, bits, COLUMNS, tile, x, n, m, to);
    for (; m + 2 <= rows; m += 2) multiply(w, arithmetic, bits, 2, tile, x, n, m, to);
    for (; m < rows; m++) multiply(w, arithmetic, bits, 1, tile, x, n, m, to);
}

/* All rows of x that a weight has, which are those from `first` on of x and y */
INLINE void multiply_weight(const Weight *w, int arithmetic, Tile tile, Inputs x, int64_t first, int64_t rows, Outputs to) {
    x.codes += first * x.row_bytes, x.scales += first * x.blocks, x.sums += first * x.steps;
    to.y = row_at(to.y, to.dtype, first, w->out_features);
#pragma omp for schedule(dynamic) nowait
    for (int64_t n = 0; n < w->out_features; n += TILE) {
        unpack_tile(w, arithmetic, n, tile);
        if (arithmetic == BF16)
            multiply_rows(w, BF16, 0, tile, x, n, rows, to);
        else if (w->bits <= 4)
            multiply_rows(w, INT8, 4, tile, x, n, rows, to);
        else
            multiply_rows(w, INT8, 8, tile, x, n, rows, to);
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

/* y [rows, out_features] = x W^T + bias, which may be NULL; all three of `dtype`, which is bfloat16 for BF16. GEMM_GROUP
   divides the group size. scratch has lowbit_gemm_scratch bytes, aligned to 64. */
void KERNEL(lowbit_gemm)(const Weight *w, int64_t arithmetic, const void *x, int64_t dtype, const void *bias, void *y,
                         int64_t rows, int64_t threads, void *scratch) {
    const int32_t start[2] = {0, (int32_t)rows};
    const Experts one = {start, 1, 1, rows};
    KERNEL(lowbit_gemm_experts)(w, &one, arithmetic, x, dtype, bias, y, rows, threads, scratch);
}
