// SPDX-License-Identifier: Apache-2.0
/* Two levels of instructions in one program, for processors that only an emulator has here: every result of LEFT has the
   bits of RIGHT's. Prints how many were compared, or the first that differs. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LEVEL portable
#include "abi.h"

#define OTHER(RESULT, NAME, ...) RESULT WITH_LEVEL(NAME, neon)(__VA_ARGS__);
FUNCTIONS(OTHER)

static uint64_t state = 88172645463325252ull;
static long compared;

static uint32_t drawn(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 16);
}

static float number(void) { return (float)((int32_t)drawn() % 4096) / 512.0f; }

static void *memory(int64_t bytes) { return aligned_alloc(64, (size_t)((bytes + 127) / 64 * 64)); }

static void compare(const char *what, const Weight *w, int64_t rows, const void *left, const void *right, int64_t bytes) {
    compared++;
    if (!memcmp(left, right, (size_t)bytes)) return;
    printf("%s differs: %d bits, %d x %d, groups of %d, zeros %d, %d rows\n", what, (int)w->bits, (int)w->out_features,
           (int)w->in_features, (int)w->group_size, w->zeros != 0, (int)rows);
    exit(1);
}

static void fill(void *to, int64_t dtype, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const float value = number();
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if (dtype == FLOAT32) ((float *)to)[i] = value;
        else ((uint16_t *)to)[i] = (uint16_t)(bits >> 16);
    }
}

static void products(const Weight *w, int64_t rows, int64_t dtype) {
    const int64_t size = dtype == FLOAT32 ? 4 : 2, bytes = rows * w->out_features * size, threads = 2;
    void *x = memory(rows * w->in_features * size), *bias = memory(w->out_features * size);
    void *left = memory(bytes), *right = memory(bytes);
    fill(x, dtype, rows * w->in_features), fill(bias, dtype, w->out_features);
    void *scratch = memory(lowbit_linear_scratch_portable(w, rows) + lowbit_linear_scratch_neon(w, rows));
    lowbit_linear_portable(w, x, dtype, bias, left, rows, dtype == FLOAT32 ? 2 : 1, scratch);
    lowbit_linear_neon(w, x, dtype, bias, right, rows, dtype == FLOAT32 ? 2 : 1, scratch);
    compare("lowbit_linear", w, rows, left, right, bytes);
    free(scratch);
    for (int64_t arithmetic = INT8; arithmetic <= BF16 && w->group_size % CHUNK == 0; arithmetic++) {
        if (arithmetic == BF16 && dtype == FLOAT32) continue;
        scratch = memory(lowbit_gemm_scratch_portable(w, arithmetic, rows, threads) +
                         lowbit_gemm_scratch_neon(w, arithmetic, rows, threads));
        lowbit_gemm_portable(w, arithmetic, x, dtype, bias, left, rows, threads, scratch);
        lowbit_gemm_neon(w, arithmetic, x, dtype, bias, right, rows, threads, scratch);
        compare("lowbit_gemm", w, rows, left, right, bytes);
        free(scratch);
    }
    free(x), free(bias), free(left), free(right);
}

static void weight(int64_t bits, int64_t out_features, int64_t in_features, int64_t group_size, int with_zeros) {
    const int64_t width = (in_features + CHUNK - 1) / CHUNK * CHUNK, blocks = (out_features + ROWS - 1) / ROWS;
    const int64_t group = group_size ? group_size : width, groups = (in_features + group - 1) / group;
    uint8_t *codes = memory(out_features * in_features), *zeros = memory(blocks * groups * ROWS);
    float *scales = memory(blocks * groups * ROWS * 4);
    const int64_t packed_bytes = blocks * ROWS * width * bits / 8;
    void *packed = memory(packed_bytes), *again = memory(packed_bytes);
    for (int64_t i = 0; i < out_features * in_features; i++) codes[i] = drawn() & ((1 << bits) - 1);
    for (int64_t i = 0; i < blocks * groups * ROWS; i++) zeros[i] = drawn() & ((1 << bits) - 1), scales[i] = number();
    const Weight w = {packed, scales, with_zeros ? zeros : 0, FLOAT32, bits, out_features, in_features, group, 0};
    lowbit_pack_portable(&w, codes, packed), lowbit_pack_neon(&w, codes, again);
    compare("lowbit_pack", &w, 0, packed, again, packed_bytes);
    float *left = memory(out_features * in_features * 4), *right = memory(out_features * in_features * 4);
    lowbit_unpack_portable(&w, 0, out_features, 0, left), lowbit_unpack_neon(&w, 0, out_features, 0, right);
    compare("lowbit_unpack", &w, 0, left, right, out_features * in_features * 4);
    for (int64_t rows = 1; rows <= 9; rows += 1 + rows / 4)
        for (int64_t dtype = FLOAT32; dtype <= BFLOAT16; dtype++) products(&w, rows, dtype);
    free(codes), free(zeros), free(scales), free(packed), free(again), free(left), free(right);
}

int main(void) {
    if (!lowbit_runs(NEON)) return puts("this processor does not run neon"), 1;
    const int64_t groups[] = {16, 32, 96, 128, 0}, shapes[][2] = {{37, 384}, {16, 1152}, {1, 100}, {70, 31}};
    for (int64_t bits = 2; bits <= 8; bits *= 2)
        for (int g = 0; g < 5; g++)
            for (int s = 0; s < 4; s++)
                for (int zeros = 0; zeros < 2; zeros++)
                    if (!groups[g] || shapes[s][1] % groups[g] == 0)
                        weight(bits, shapes[s][0], shapes[s][1], groups[g], zeros);
    printf("%ld results are the same\n", compared);
    return 0;
}
