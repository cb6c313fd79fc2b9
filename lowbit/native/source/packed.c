// SPDX-License-Identifier: Apache-2.0
/* Packs codes into the layout of packed.h, and takes them out of it. */

#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "packed.h"

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

/* PART codes from input k on, as bytes; those behind the last input are zero */
INLINE uint32_t part_of(const uint8_t *row, int64_t k, int64_t size) {
    uint32_t part = 0;
    if (k + PART <= size)
        memcpy(&part, row + k, PART);
    else if (k < size)
        memcpy(&part, row + k, (size_t)(size - k));
    return part;
}

/* codes [out_features, in_features] -> packed, which holds nothing yet */
void KERNEL(lowbit_pack)(const Weight *given, const uint8_t *codes, void *packed) {
    in_large_pages(packed, blocks_of(given) * slices_of(given) * ROWS * (int64_t)sizeof(uint32_t));
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks_of(given); block++) {
        const Weight weight = *given, *w = &weight; /* as in lowbit_unpack */
        const int64_t slices = slices_of(w), fields = fields_of(w), size = w->in_features;
        const int64_t rows = smaller(ROWS, w->out_features - block * ROWS);
        uint32_t *to = (uint32_t *)packed + block * slices * ROWS;
        for (int64_t slice = 0; slice < slices; slice++, to += ROWS) {
            uint32_t words[ROWS] = {0};
            for (int64_t f = 0; f < fields; f++)
                for (int64_t r = 0; r < rows; r++)
                    words[r] |= part_of(codes + (block * ROWS + r) * size, (slice * fields + f) * PART, size) << f * w->bits;
            memcpy(to, words, sizeof words);
        }
    }
}

/* Rows [start, stop): their codes [stop - start, in_features], or, with weights, (code - zero) * scale */
void KERNEL(lowbit_unpack)(const Weight *given, int64_t start, int64_t stop, uint8_t *codes, float *weights) {
#pragma omp parallel for schedule(static)
    for (int64_t n = start; n < stop; n++) {
        /* a copy that no store of bytes can change: what is computed of it is computed once a row */
        const Weight weight = *given, *w = &weight;
        const int64_t size = w->in_features, fields = fields_of(w), to = (n - start) * size;
        const uint32_t *words = words_of(w, n), mask = 0x01010101u * ((1u << w->bits) - 1);
        float scale = 0, zero = 0;
        for (int64_t k = 0, field = 0, left = 0; k < size; k += PART) {
            const uint32_t part = *words >> field * w->bits & mask;
            const int64_t count = smaller(PART, size - k);
            if (++field == fields) field = 0, words += ROWS;
            if (codes) memcpy(codes + to + k, &part, (size_t)count);
            if (!weights) continue;
            if (!left) {
                const int64_t number = number_of(w, n, k / w->group_size);
                scale = load(w->scales, (int)w->scale_dtype, number), left = w->group_size;
                zero = w->zeros ? (float)w->zeros[number] : (float)(1 << (w->bits - 1));
            }
            left -= PART;
            for (int64_t i = 0; i < count; i++) weights[to + k + i] = ((float)(part >> 8 * i & 0xff) - zero) * scale;
        }
    }
}
