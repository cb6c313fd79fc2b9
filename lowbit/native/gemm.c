// SPDX-License-Identifier: Apache-2.0
/* y = x W^T for many rows of x: a tile of W, WIDE rows of it, is unpacked once and multiplied by all rows of x.

   INT8: BLOCK inputs share a scale, x = x_scale * x_code with codes from -127 to 127, and
       y[m, n] = sum over blocks of  scale[n] * x_scale[m] * (sum in the block of (code - zero) * x_code).
   The inner sum is an exact integer: codes of W are unsigned and those of x signed, as VNNI multiplies them, and
   zero * (sum of x_code) is subtracted by one product more.

   BF16: x is bfloat16, code - zero is one exactly, and
       y[m, n] = sum over groups of  scale[n] * (sum in the group of (code - zero) * x)
   in float32: neither x nor W is rounded.

   A lane of a vector is a row of W, so no sum runs across lanes. A tile has for each part of K, four inputs of a byte or
   two of bfloat16, one vector; that part of a row of x, 32 bits, is repeated in all lanes:

       part 0   row 0 | row 1 | ... | row WIDE - 1          times   x[m, part 0] | x[m, part 0] | ...
       part 1   row 0 | row 1 | ...                           */

#include <math.h>
#include <omp.h>
#include <string.h>

#include "packed.h"
#include "vectors.h"

#define BLOCK 32 /* inputs that share a scale; GEMM_GROUP of abi.h divides a group for it to have one of W */
#define COLUMNS (VECTOR == 64 ? 8 : 4) /* rows of x whose sums are in registers */
#define SMALLEST 0x1p-80f /* the largest input of a block, or its inverse would not be finite */
#define ALIGNMENT 64

/* x as it is multiplied: rows of `width` numbers, zeros behind the inputs. INT8: for each block, its scale and, in the
   lower 16 bits, minus the sum of its codes. */
typedef struct {
    char *codes;
    float *scales;
    int32_t *sums;
    int64_t row_bytes, blocks;
} Inputs;

typedef struct {
    vector_u32 *parts;
    vector_f32 *scales; /* [groups] */
    vector_s32 *zeros;  /* [groups] */
} Tile;

INLINE int64_t aligned(int64_t bytes) { return ceil_div(bytes, ALIGNMENT) * ALIGNMENT; }
INLINE int64_t width_of(const Weight *w) { return chunks_of(w) * chunk_of(w); }
INLINE int64_t size_of(int64_t arithmetic) { return arithmetic == INT8 ? 1 : 2; }

/* Where inputs are in the scratch. Returns their bytes. */
static int64_t place_inputs(const Weight *w, int64_t arithmetic, int64_t rows, char *scratch, Inputs *to) {
    const int64_t blocks = arithmetic == INT8 ? width_of(w) / BLOCK : 0, row_bytes = width_of(w) * size_of(arithmetic);
    const int64_t codes = aligned(rows * row_bytes), numbers = aligned(rows * blocks * 4);
    *to = (Inputs){scratch, (float *)(scratch + codes), (int32_t *)(scratch + codes + numbers), row_bytes, blocks};
    return codes + 2 * numbers;
}

/* The same for the tile of one thread */
static int64_t place_tile(const Weight *w, int64_t arithmetic, char *scratch, Tile *to) {
    const int64_t parts = width_of(w) * size_of(arithmetic) / 4 * VECTOR, numbers = groups_of(w) * VECTOR;
    *to = (Tile){(vector_u32 *)scratch, (vector_f32 *)(scratch + parts), (vector_s32 *)(scratch + parts + numbers)};
    return aligned(parts + 2 * numbers);
}

int64_t KERNEL(lowbit_gemm_scratch)(const Weight *w, int64_t arithmetic, int64_t rows, int64_t threads) {
    Inputs inputs;
    Tile tile;
    return place_inputs(w, arithmetic, rows, 0, &inputs) + threads * place_tile(w, arithmetic, 0, &tile);
}

/* One block of x, of which `count` inputs are there, as codes */
static void to_bytes(const float *x, int64_t count, int8_t *codes, float *scale, int32_t *sum) {
    uint32_t bits = bits_of(SMALLEST); /* as bits, what is not a number is the largest */
    for (int64_t k = 0; k < count; k++) {
        const uint32_t magnitude = bits_of(x[k]) & 0x7fffffff;
        bits = magnitude > bits ? magnitude : bits;
    }
    memset(codes, 0, BLOCK);
    *scale = NAN, *sum = 0; /* an input that is not finite makes y NaN */
    if (bits >= bits_of(INFINITY)) return;
    const float largest = of_bits(bits), inverse = 127.0f / largest;
    int32_t total = 0;
    for (int64_t k = 0; k < count; k++) total += codes[k] = (int8_t)(int32_t)rintf(x[k] * inverse);
    *scale = largest / 127.0f, *sum = -total & 0xffff;
}

static void to_inputs(const Weight *w, int64_t arithmetic, const void *x, int dtype, int64_t m, Inputs to) {
    const int64_t size = w->in_features, first = m * size;
    char *row = to.codes + m * to.row_bytes;
    if (arithmetic == BF16) {
        memcpy(row, (const uint16_t *)x + first, (size_t)size * 2);
        memset(row + size * 2, 0, (size_t)(to.row_bytes - size * 2));
        return;
    }
    for (int64_t block = 0; block < to.blocks; block++) {
        const int64_t start = block * BLOCK, there = size - start, count = there < 0 ? 0 : smaller(BLOCK, there);
        float wide[BLOCK];
        for (int64_t k = 0; k < count; k++) wide[k] = load(x, dtype, first + start + k);
        to_bytes(wide, count, (int8_t *)row + start, to.scales + m * to.blocks + block, to.sums + m * to.blocks + block);
    }
}

/* Field f of chunk `chunk` of the block of W that has row n, LANES inputs of ROWS rows, into the lanes of a tile */
INLINE void unpack_field(const Weight *w, int arithmetic, int64_t n, int64_t chunk, int64_t f, uint32_t *lanes) {
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
    typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
    typedef float wide_floats __attribute__((vector_size(4 * LANES)));
    typedef uint32_t wide_bits __attribute__((vector_size(4 * LANES)));
    const int64_t k = chunk * chunk_of(w) + f * LANES;
    uint32_t rows[2][ROWS][4];
    for (int r = 0; r < ROWS; r++) {
        const words word = ((const words *)w->codes)[vector_of(w, n + r, chunk)];
        const words codes = word >> (uint16_t)(f * w->bits) & (uint16_t)((1 << w->bits) - 1);
        if (arithmetic == INT8) {
            const bytes narrow = __builtin_convertvector(codes, bytes);
            memcpy(rows[0][r], &narrow, sizeof narrow);
        } else {
            const int16_t zero = k < w->in_features ? (int16_t)zero_of(w, scale_of(w, n + r, k)) : 0;
            const wide_floats values = __builtin_convertvector((shorts)codes - zero, wide_floats);
            const words upper = __builtin_convertvector((wide_bits)values >> 16, words);
            memcpy(rows[0][r], &upper, 16);
            memcpy(rows[1][r], (const char *)&upper + 16, 16);
        }
    }
    for (int half = 0; half < (arithmetic == INT8 ? 1 : 2); half++)
        transpose((const uint32_t (*)[4])rows[half], lanes + half * 4 * WIDE, WIDE);
}

/* Rows [n, n + WIDE) of W; zeros where there are none */
static void unpack_tile(const Weight *w, int arithmetic, int64_t n, Tile to) {
    const int64_t chunks = chunks_of(w), fields = fields_of(w), groups = groups_of(w);
    const int64_t parts = LANES * size_of(arithmetic) / 4, there = blocks_of(w) * ROWS - n;
    if (there < WIDE) {
        memset(to.parts, 0, (size_t)(chunks * fields * parts * VECTOR));
        memset(to.scales, 0, (size_t)(groups * VECTOR));
        memset(to.zeros, 0, (size_t)(groups * VECTOR));
    }
    for (int64_t r = 0; r < smaller(WIDE, there); r += ROWS) {
        for (int64_t field = 0; field < chunks * fields; field++) {
            uint32_t *lanes = (uint32_t *)(to.parts + field * parts) + r;
            if (arithmetic == INT8) unpack_field(w, INT8, n + r, field / fields, field % fields, lanes);
            if (arithmetic == BF16) unpack_field(w, BF16, n + r, field / fields, field % fields, lanes);
        }
        for (int64_t group = 0; group < groups; group++)
            for (int row = 0; row < ROWS; row++) {
                const int64_t from = scale_of(w, n + r, group * w->group_size) + row;
                ((float *)(to.scales + group))[r + row] = w->scales[from];
                ((int32_t *)(to.zeros + group))[r + row] = (int32_t)zero_of(w, from);
            }
    }
}

/* The tile times `columns` rows of x. bits is a constant, which stands for all that are not more. */
INLINE void multiply_int8(const Weight *w, int bits, int columns, Tile tile, Inputs x, vector_f32 *total) {
    const int64_t group_blocks = w->group_size / BLOCK, groups = groups_of(w);
    for (int64_t group = 0; group < groups; group++)
        for (int64_t block = group * group_blocks; block < smaller((group + 1) * group_blocks, x.blocks); block++) {
            vector_s32 sums[COLUMNS];
#pragma GCC unroll 8
            for (int m = 0; m < columns; m++) sums[m] = (vector_s32){0};
#pragma GCC unroll 8
            for (int part = 0; part < BLOCK / 4; part++) {
                const vector_u8 codes = (vector_u8)tile.parts[block * (BLOCK / 4) + part];
#pragma GCC unroll 8
                for (int m = 0; m < columns; m++) {
                    const char *inputs = x.codes + m * x.row_bytes + block * BLOCK + part * 4;
                    sums[m] = dot_u8s8(sums[m], codes, (vector_s8)everywhere(inputs), bits);
                }
            }
#pragma GCC unroll 8
            for (int m = 0; m < columns; m++) {
                const vector_s16 minus_sum = (vector_s16)everywhere(x.sums + m * x.blocks + block);
                const vector_s32 exact = dot_s16(sums_of(sums[m], bits), (vector_s16)tile.zeros[group], minus_sum);
                const vector_f32 scale = tile.scales[group] * x.scales[m * x.blocks + block];
                total[m] = fma_f32(__builtin_convertvector(exact, vector_f32), scale, total[m]);
            }
        }
}

INLINE void multiply_bf16(const Weight *w, int columns, Tile tile, Inputs x, vector_f32 *total) {
    const int64_t parts = width_of(w) / 2, group_parts = w->group_size / 2, groups = groups_of(w);
    for (int64_t group = 0; group < groups; group++) {
        vector_f32 sums[COLUMNS];
#pragma GCC unroll 8
        for (int m = 0; m < columns; m++) sums[m] = (vector_f32){0};
        for (int64_t part = group * group_parts; part < smaller((group + 1) * group_parts, parts); part++)
#pragma GCC unroll 8
            for (int m = 0; m < columns; m++)
                sums[m] = dot_bf16(sums[m], tile.parts[part], (vector_u32)everywhere(x.codes + m * x.row_bytes + part * 4));
#pragma GCC unroll 8
        for (int m = 0; m < columns; m++) total[m] = fma_f32(sums[m], tile.scales[group], total[m]);
    }
}

typedef struct {
    void *y;
    const void *bias;
    int dtype;
} Outputs;

/* Rows [m, m + columns) of x times the tile of the rows of W from n on */
INLINE void multiply(const Weight *w, int arithmetic, int bits, int columns, Tile tile, Inputs x, int64_t n, int64_t m,
                     Outputs to) {
    vector_f32 total[COLUMNS];
#pragma GCC unroll 8
    for (int i = 0; i < columns; i++) total[i] = (vector_f32){0};
    x.codes += m * x.row_bytes, x.scales += m * x.blocks, x.sums += m * x.blocks;
    if (arithmetic == INT8)
        multiply_int8(w, bits, columns, tile, x, total);
    else
        multiply_bf16(w, columns, tile, x, total);
    const int64_t there = smaller(WIDE, w->out_features - n);
    for (int i = 0; i < columns; i++)
        for (int64_t r = 0; r < there; r++)
            store(to.y, to.dtype, (m + i) * w->out_features + n + r,
                  total[i][r] + (to.bias ? load(to.bias, to.dtype, n + r) : 0));
}

/* All rows of x */
INLINE void multiply_rows(const Weight *w, int arithmetic, int bits, Tile tile, Inputs x, int64_t n, int64_t rows,
                          Outputs to) {
    int64_t m = 0;
    for (; m + COLUMNS <= rows; m += COLUMNS) multiply(w, arithmetic, bits, COLUMNS, tile, x, n, m, to);
    for (; m + 2 <= rows; m += 2) multiply(w, arithmetic, bits, 2, tile, x, n, m, to);
    for (; m < rows; m++) multiply(w, arithmetic, bits, 1, tile, x, n, m, to);
}

/* y [rows, out_features] = x W^T + bias, which may be NULL; all three of `dtype`, which is bfloat16 for BF16. GEMM_GROUP
   divides the group size. scratch has lowbit_gemm_scratch bytes, aligned to 64. */
void KERNEL(lowbit_gemm)(const Weight *w, int64_t arithmetic, const void *x, int64_t dtype, const void *bias, void *y,
                         int64_t rows, int64_t threads, void *scratch) {
    const Outputs outputs = {y, bias, (int)dtype};
    Inputs inputs;
    char *tiles = (char *)scratch + place_inputs(w, arithmetic, rows, scratch, &inputs);
#pragma omp parallel num_threads((int)threads)
    {
        Tile tile;
        const int64_t bytes = place_tile(w, arithmetic, 0, &tile);
        place_tile(w, arithmetic, tiles + omp_get_thread_num() * bytes, &tile);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m++) to_inputs(w, arithmetic, x, (int)dtype, m, inputs);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < w->out_features; n += WIDE) {
            unpack_tile(w, (int)arithmetic, n, tile);
            if (arithmetic == BF16)
                multiply_rows(w, BF16, 0, tile, inputs, n, rows, outputs);
            else if (w->bits <= 4)
                multiply_rows(w, INT8, 4, tile, inputs, n, rows, outputs);
            else
                multiply_rows(w, INT8, 8, tile, inputs, n, rows, outputs);
        }
    }
}
