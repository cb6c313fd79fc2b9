// SPDX-License-Identifier: Apache-2.0
/* Scaled dot product attention of few queries: one pass over keys and values, which skips those that are masked.

   The softmax is that of the keys so far (Milakov and Gimelshein, 2018; Dao et al., 2022): BLOCK keys at a time, what
   was summed before is scaled to the new maximum. Everything is computed in float32, but for bfloat16 the weights of the
   values are rounded to that, as in torch's own kernel: the tokens of a model are to be the same with either. */

#include <math.h>
#include <string.h>

#include "numbers.h"

#define QUERIES 8 /* that share the conversion of a key to floats */
#define BLOCK 512 /* keys, as in torch */

/* A row as floats, zeros behind it up to a whole vector */
static void widen(const void *from, int dtype, int64_t first, int64_t count, floats *to) {
    float *row = (float *)to;
    if (dtype == FLOAT32)
        for (int64_t i = 0; i < count; i++) row[i] = load(from, FLOAT32, first + i);
    else
        for (int64_t i = 0; i < count; i++) row[i] = load(from, BFLOAT16, first + i);
    for (int64_t i = count; i < ceil_div(count, WIDTH) * WIDTH; i++) row[i] = 0;
}

INLINE int64_t row_of(const Strided *rows, int64_t batch, int64_t head, int64_t token) {
    return batch * rows->batch + head * rows->head + token * rows->token;
}

/* Which of the keys [start, end) are seen by somebody */
INLINE void add_seen(const uint8_t *seen, int64_t start, int64_t end, int64_t stride, uint8_t *any) {
    if (!seen)
        memset(any, 1, (size_t)(end - start));
    else if (stride == 1)
        for (int64_t k = start; k < end; k++) any[k - start] |= seen[k];
    else
        for (int64_t k = start; k < end; k++) any[k - start] |= seen[k * stride];
}

/* `count` queries, from number `first` of those that share key head `head` of `batch` */
static void attend(const Attention *a, int64_t batch, int64_t head, int64_t first, int count) {
    const int64_t vectors = ceil_div(a->head_dim, WIDTH), value_vectors = ceil_div(a->value_dim, WIDTH);
    floats query[QUERIES][LONGEST_HEAD / WIDTH], total[QUERIES][LONGEST_HEAD / WIDTH] = {0}, wide[LONGEST_HEAD / WIDTH];
    float largest[QUERIES], weights[QUERIES] = {0};
    union {
        float of[BLOCK];
        floats vectors[BLOCK / WIDTH];
    } scores[QUERIES];
    const uint8_t *seen[QUERIES];
    int64_t query_head[QUERIES], token[QUERIES];
    for (int q = 0; q < count; q++) {
        query_head[q] = head * a->group + (first + q) / a->queries, token[q] = (first + q) % a->queries;
        widen(a->query.data, (int)a->dtype, row_of(&a->query, batch, query_head[q], token[q]), a->head_dim, query[q]);
        for (int64_t v = 0; v < vectors; v++) query[q][v] *= a->scale;
        seen[q] = a->mask.data ? (const uint8_t *)a->mask.data + row_of(&a->mask, batch, query_head[q], token[q]) : 0;
        largest[q] = -INFINITY;
    }
    for (int64_t start = 0; start < a->keys; start += BLOCK) {
        const int64_t end = smaller(start + BLOCK, a->keys);
        uint8_t any[BLOCK] = {0};
        for (int q = 0; q < count; q++) add_seen(seen[q], start, end, a->last, any);
        int64_t low = 0, high = end - start; /* whole vectors, before and behind which nothing is seen */
        while (high > 0 && !any[high - 1]) high--;
        if (!high) continue;
        while (!any[low]) low++;
        low -= low % WIDTH, high = ceil_div(high, WIDTH) * WIDTH;
        for (int q = 0; q < count; q++)
            for (int64_t k = low; k < high; k++) {
                const int sees = start + k < end && (!seen[q] || seen[q][(start + k) * a->last]);
                scores[q].of[k] = sees ? 0 : -INFINITY;
            }
        for (int64_t k = start; k < end; k++) {
            if (!any[k - start]) continue;
            widen(a->key.data, (int)a->dtype, row_of(&a->key, batch, head, k), a->head_dim, wide);
            for (int q = 0; q < count; q++) {
                floats products = {0};
                for (int64_t v = 0; v < vectors; v++) products += query[q][v] * wide[v];
                scores[q].of[k - start] += sum_of(products);
            }
        }
        for (int q = 0; q < count; q++) {
            float most = largest[q]; /* NaN, once there is one */
            for (int64_t k = low; k < high; k++) {
                const float score = scores[q].of[k];
                most = score > most || score != score ? score : most;
            }
            if (most == -INFINITY) { /* nothing is seen yet */
                for (int64_t k = low; k < high; k++) scores[q].of[k] = 0;
                continue;
            }
            const float before = largest[q] == -INFINITY ? 0 : expf(largest[q] - most);
            floats sums = {0};
            for (int64_t v = low / WIDTH; v < high / WIDTH; v++)
                sums += scores[q].vectors[v] = exponential(scores[q].vectors[v] - most);
            if (a->dtype == BFLOAT16)
                for (int64_t k = low; k < high; k++) scores[q].of[k] = of_bits((uint32_t)to_bfloat16(scores[q].of[k]) << 16);
            weights[q] = weights[q] * before + sum_of(sums);
            for (int64_t v = 0; v < value_vectors; v++) total[q][v] *= before;
            largest[q] = most;
        }
        for (int64_t k = start; k < end; k++) {
            if (!any[k - start]) continue;
            widen(a->value.data, (int)a->dtype, row_of(&a->value, batch, head, k), a->value_dim, wide);
            for (int q = 0; q < count; q++)
                for (int64_t v = 0; v < value_vectors; v++) total[q][v] += scores[q].of[k - start] * wide[v];
        }
    }
    for (int q = 0; q < count; q++) {
        const int64_t to = row_of(&a->out, batch, query_head[q], token[q]);
        for (int64_t d = 0; d < a->value_dim; d++) /* 0 for who sees nothing, as torch has it */
            store((void *)a->out.data, (int)a->dtype, to + d,
                  weights[q] == 0 ? 0 : total[q][d / WIDTH][d % WIDTH] / weights[q]);
    }
}

void KERNEL(lowbit_attention)(const Attention *a) {
    const int64_t key_heads = a->heads / a->group, queries = a->group * a->queries, tiles = ceil_div(queries, QUERIES);
#pragma omp parallel for schedule(static)
    for (int64_t tile = 0; tile < a->batch * key_heads * tiles; tile++) {
        const int64_t first = tile % tiles * QUERIES, head = tile / tiles % key_heads;
        attend(a, tile / tiles / key_heads, head, first, (int)smaller(QUERIES, queries - first));
    }
}
