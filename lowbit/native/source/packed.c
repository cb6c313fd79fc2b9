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

typedef uint8_t bytes __attribute__((vector_size(LANES)));

/* Codes of a row that `lanes` of a field have, the others are zero */
INLINE words field_of(const uint8_t *from, int64_t lanes) {
    bytes field = {0};
    if (lanes >= LANES)
        memcpy(&field, from, LANES);
    else
        memcpy(&field, from, (size_t)(lanes > 0 ? lanes : 0));
    return __builtin_convertvector(field, words);
}

/* codes [out_features, in_features] -> packed, which holds nothing yet */
void KERNEL(lowbit_pack)(const Weight *given, const uint8_t *codes, void *packed) {
    const int64_t total = blocks_of(given) * ROWS;
    in_large_pages(packed, total * chunks_of(given) * (int64_t)sizeof(words));
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < total; n++) {
        const Weight weight = *given, *w = &weight; /* as in lowbit_unpack */
        const int64_t chunk_size = chunk_of(w), fields = fields_of(w), chunks = chunks_of(w);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            words word = {0};
            for (int64_t f = 0; f < fields && n < w->out_features; f++) {
                const int64_t k = chunk * chunk_size + f * LANES;
                word |= field_of(codes + n * w->in_features + k, w->in_features - k) << (uint16_t)(f * w->bits);
            }
            memcpy((words *)packed + vector_of(w, n, chunk), &word, sizeof word);
        }
    }
}

/* Rows [start, stop): their codes [stop - start, in_features], or, with weights, (code - zero) * scale */
void KERNEL(lowbit_unpack)(const Weight *given, int64_t start, int64_t stop, uint8_t *codes, float *weights) {
#pragma omp parallel for schedule(static)
    for (int64_t n = start; n < stop; n++) {
        /* a copy that no store of bytes can change: what is computed of it is computed once a row */
        const Weight weight = *given, *w = &weight;
        const int64_t chunk_size = chunk_of(w), fields = fields_of(w);
        for (int64_t v = 0; v < ceil_div(w->in_features, LANES); v++) {
            const uint16_t *word = (const uint16_t *)((const words *)w->codes + vector_of(w, n, v * LANES / chunk_size));
            const int64_t shift = v % fields * w->bits, lanes = smaller(LANES, w->in_features - v * LANES);
            const int64_t to = (n - start) * w->in_features + v * LANES, mask = (1 << w->bits) - 1;
            if (codes)
                for (int64_t lane = 0; lane < lanes; lane++) codes[to + lane] = (uint8_t)(word[lane] >> shift & mask);
            if (weights) {
                const int64_t of_scale = scale_of(w, n, v * LANES);
                const float scale = w->scales[of_scale], zero = zero_of(w, of_scale);
                for (int64_t lane = 0; lane < lanes; lane++)
                    weights[to + lane] = ((float)(word[lane] >> shift & mask) - zero) * scale;
            }
        }
    }
}
