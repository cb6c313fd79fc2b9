// SPDX-License-Identifier: Apache-2.0
/* Compares kernels of the levels of ARM with the portable ones, bit for bit, on drawn shapes. Ends with 1 at a difference.
   Built by a cross compiler and run by qemu-user: see test_cross.py. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "abi.h"

#define OTHER(RESULT, NAME, ...)          \
    RESULT NAME##_neon_dot(__VA_ARGS__); \
    RESULT NAME##_i8mm(__VA_ARGS__);
FUNCTIONS(OTHER)

static uint64_t state = 1;

static int64_t below(int64_t count) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)((state >> 33) % (uint64_t)count);
}

static float number(void) { return (float)(below(4001) - 2000) / 1024.0f; }

static void *memory(int64_t bytes) {
    void *made = aligned_alloc(64, (size_t)(bytes + 127) / 64 * 64);
    memset(made, 0xa5, (size_t)(bytes + 127) / 64 * 64);
    return made;
}

typedef void Linear(const Weight *, const void *, int64_t, const void *, void *, int64_t, int64_t, void *);
typedef void Gemm(const Weight *, int64_t, const void *, int64_t, const void *, void *, int64_t, int64_t, void *);
typedef int64_t Scratch(const Weight *, int64_t, int64_t, int64_t);

static const struct {
    const char *name;
    int64_t level;
    Linear *linear;
    Gemm *gemm;
    Scratch *scratch;
} LEVEL_KERNELS[] = {
    {"portable", PORTABLE, lowbit_linear_portable, lowbit_gemm_portable, lowbit_gemm_scratch_portable},
    {"neon_dot", NEON_DOT, lowbit_linear_neon_dot, lowbit_gemm_neon_dot, lowbit_gemm_scratch_neon_dot},
    {"i8mm", I8MM, lowbit_linear_i8mm, lowbit_gemm_i8mm, lowbit_gemm_scratch_i8mm},
};

static int compare(const char *what, const char *level, const Weight *w, const void *found, const void *wanted, int64_t bytes) {
    if (!memcmp(found, wanted, (size_t)bytes)) return 0;
    printf("%s of %s differs: %d bits, [%d, %d], groups of %d\n", what, level, (int)w->bits, (int)w->out_features,
           (int)w->in_features, (int)w->group_size);
    return 1;
}

/* One drawn weight on all levels. Returns how many differ. */
static int one_case(void) {
    static const int64_t bits_of_case[] = {2, 4, 8}, groups_of_case[] = {32, 64, 128, 256};
    const int64_t bits = bits_of_case[below(3)], group = groups_of_case[below(4)], rows = 1 + below(13);
    const int64_t in = group * (1 + below(4)), out = 1 + below(40), groups = in / group, chunk = 16 / bits * LANES;
    const int64_t chunks = (in + chunk - 1) / chunk, blocks = (out + ROWS - 1) / ROWS, dtype = below(2);
    uint8_t *codes = memory(out * in);
    float *scales = memory(blocks * groups * ROWS * 4), *zeros = below(2) ? memory(blocks * groups * ROWS * 4) : 0;
    for (int64_t i = 0; i < out * in; i++) codes[i] = (uint8_t)below(1 << bits);
    for (int64_t i = 0; i < blocks * groups * ROWS; i++) {
        scales[i] = number();
        if (zeros) zeros[i] = (float)below(1 << bits);
    }
    void *packed = memory(blocks * chunks * ROWS * 2 * LANES);
    const Weight w = {packed, scales, zeros, bits, out, in, group, 0};
    lowbit_pack_portable(&w, codes, packed);
    void *x = memory(rows * in * 4), *y = memory(rows * out * 4), *wanted = memory(rows * out * 4);
    for (int64_t i = 0; i < rows * in; i++) {
        const float value = number();
        uint32_t word;
        memcpy(&word, &value, 4);
        if (dtype == FLOAT32)
            ((float *)x)[i] = value;
        else
            ((uint16_t *)x)[i] = (uint16_t)(word >> 16);
    }
    void *scratch = memory(lowbit_linear_scratch_portable(&w, rows));
    int differ = 0;
    static const char *const names[] = {"the product of few rows", "int8", "bf16"};
    for (int what = 0; what < 3; what++) {
        if (what == 2 && dtype == FLOAT32) continue;
        for (int level = 0; level < 3; level++) {
            if (!lowbit_runs(LEVEL_KERNELS[level].level)) continue;
            void *to = level ? y : wanted;
            const int64_t arithmetic = what == 1 ? INT8 : BF16;
            if (what) {
                void *tiles = memory(LEVEL_KERNELS[level].scratch(&w, arithmetic, rows, 2));
                LEVEL_KERNELS[level].gemm(&w, arithmetic, x, dtype, 0, to, rows, 2, tiles);
                free(tiles);
            } else {
                LEVEL_KERNELS[level].linear(&w, x, dtype, 0, to, rows, dtype == FLOAT32 ? 2 : 1, scratch);
            }
            if (level) differ += compare(names[what], LEVEL_KERNELS[level].name, &w, to, wanted, rows * out * (dtype == FLOAT32 ? 4 : 2));
        }
    }
    free(codes), free(scales), free(zeros), free(packed), free(x), free(y), free(wanted), free(scratch);
    return differ;
}

/* Primitives at the limits of what they are given. Returns how many differ. */
static int primitives(void) {
    int differ = 0;
    for (int round = 0; round < 200; round++)
        for (int bits = 2; bits <= 8; bits *= 2)
            for (int64_t primitive = DOT_S16; primitive <= FMA_F32; primitive++) {
                char a[PRIMITIVE_BYTES], b[PRIMITIVE_BYTES], sums[PRIMITIVE_BYTES], made[3][PRIMITIVE_BYTES];
                for (int i = 0; i < PRIMITIVE_BYTES; i++) {
                    a[i] = (char)below(1 << bits);
                    b[i] = (char)(below(255) - 127);
                }
                if (primitive == DOT_S16)
                    for (int i = 1; i < PRIMITIVE_BYTES; i += 2) a[i] = 0;
                for (int i = 0; i < PRIMITIVE_BYTES / 4; i++) ((float *)(void *)sums)[i] = number();
                if (primitive == FMA_F32 || primitive == DOT_BF16)
                    for (int i = 0; i < PRIMITIVE_BYTES / 4; i++)
                        ((float *)(void *)a)[i] = number(), ((float *)(void *)b)[i] = number();
                memset(made, 0, sizeof made);
                lowbit_primitive_portable(primitive, bits, a, b, sums, made[0]);
                lowbit_primitive_neon_dot(primitive, bits, a, b, sums, made[1]);
                if (lowbit_runs(I8MM)) lowbit_primitive_i8mm(primitive, bits, a, b, sums, made[2]);
                for (int level = 1; level < 2 + (int)lowbit_runs(I8MM); level++)
                    if (memcmp(made[level], made[0], PRIMITIVE_BYTES)) {
                        printf("primitive %d of %s differs at %d bits\n", (int)primitive, LEVEL_KERNELS[level].name, bits);
                        differ++;
                    }
            }
    return differ;
}

int main(int count, char **arguments) {
    const int cases = count > 1 ? atoi(arguments[1]) : 100;
    if (!lowbit_runs(NEON_DOT)) return puts("this processor has no dot products"), 2;
    int differ = primitives();
    for (int i = 0; i < cases; i++) differ += one_case();
    printf("%d cases, dot products%s: %d differ\n", cases, lowbit_runs(I8MM) ? " and i8mm" : "", differ);
    return differ != 0;
}
