// SPDX-License-Identifier: Apache-2.0
/* Small operations, one after the other in one call: each costs less than to have it called.

   An instruction works along the last of four dimensions, on AT_A_TIME numbers at a time: they become floats, then it is
   computed, then the result is rounded to the dtype of `out`. */

#include <math.h>

#include "numbers.h"

#define AT_A_TIME 1024

typedef union {
    float of[AT_A_TIME];
    floats vectors[AT_A_TIME / WIDTH];
} Numbers;

INLINE int64_t first_of(const Operand *x, int64_t i, int64_t j, int64_t k) {
    return i * x->strides[0] + j * x->strides[1] + k * x->strides[2];
}

/* Numbers [start, start + count) of a row */
INLINE void read_as(Numbers *to, const Operand *x, int dtype, int64_t first, int64_t start, int64_t count) {
    const int64_t stride = x->strides[DIMENSIONS - 1];
    if (!x->data || stride == 0) {
        const float value = x->data ? load(x->data, dtype, first) : x->value;
        for (int64_t n = 0; n < count; n++) to->of[n] = value;
    } else if (stride == 1)
        for (int64_t n = 0; n < count; n++) to->of[n] = load(x->data, dtype, first + start + n);
    else
        for (int64_t n = 0; n < count; n++) to->of[n] = load(x->data, dtype, first + (start + n) * stride);
}

INLINE void read(Numbers *to, const Operand *x, int64_t first, int64_t start, int64_t count) {
    if (x->dtype == FLOAT32)
        read_as(to, x, FLOAT32, first, start, count);
    else
        read_as(to, x, BFLOAT16, first, start, count);
}

INLINE floats select(integers where, floats yes, floats no) {
    return (floats)(((integers)yes & where) | ((integers)no & ~where));
}

INLINE floats sigmoid(floats x) {
    const integers positive = x > 0.0f;
    const floats e = exponential(select(positive, -x, x));
    return select(positive, e * 0 + 1.0f, e) / (e + 1.0f);
}

INLINE floats apply(int operation, floats a, floats b) {
    switch (operation) {
    case ADD: return a + b;
    case SUBTRACT: return a - b;
    case MULTIPLY: return a * b;
    case DIVIDE: return a / b;
    case NEGATE: return -a;
    case SQUARE: return a * a;
    case CUBE: return a * a * a;
    case SIGMOID: return sigmoid(a);
    case SILU: return a * sigmoid(a);
    case GELU_TANH: return a * sigmoid((a + a * a * a * 0.044715f) * 1.5957691216f); /* 2 sqrt(2 / pi) */
    case RSQRT:
        for (int lane = 0; lane < WIDTH; lane++) a[lane] = 1.0f / sqrtf(a[lane]);
        return a;
    case TANH:
        for (int lane = 0; lane < WIDTH; lane++) a[lane] = tanhf(a[lane]);
        return a;
    case GELU:
        for (int lane = 0; lane < WIDTH; lane++) a[lane] *= 0.5f + 0.5f * erff(a[lane] * 0.70710678f);
        return a;
    default: return a;
    }
}

/* A loop for each operation, a constant in it */
#define LOOP(OPERATION)                                                                                         \
    case OPERATION:                                                                                             \
        for (int64_t v = 0; v < vectors; v++) a->vectors[v] = apply(OPERATION, a->vectors[v], b->vectors[v]);   \
        break;

static void compute(int64_t operation, Numbers *a, const Numbers *b, int64_t count) {
    const int64_t vectors = ceil_div(count, WIDTH);
    switch (operation) { OPERATIONS(LOOP) }
}

static void run_row(const Instruction *with, int64_t i, int64_t j, int64_t k) {
    const Operand *out = &with->out;
    const int64_t size = with->sizes[DIMENSIONS - 1], stride = out->strides[DIMENSIONS - 1];
    const int64_t to = first_of(out, i, j, k) + (with->index ? *with->index * with->step : 0);
    const int64_t from_a = first_of(&with->a, i, j, k), from_b = first_of(&with->b, i, j, k);
    Numbers a, b;
    float total = 0;
    for (int64_t start = 0; start < size; start += AT_A_TIME) {
        const int64_t count = smaller(AT_A_TIME, size - start);
        read(&a, &with->a, from_a, start, count);
        if (with->operation == MEAN) {
            for (int64_t n = count; n < ceil_div(count, WIDTH) * WIDTH; n++) a.of[n] = 0;
            floats sums = {0};
            for (int64_t v = 0; v < ceil_div(count, WIDTH); v++) sums += a.vectors[v];
            total += sum_of(sums);
            continue;
        }
        read(&b, &with->b, from_b, start, count);
        compute(with->operation, &a, &b, count);
        if (out->dtype == FLOAT32)
            for (int64_t n = 0; n < count; n++) store((void *)out->data, FLOAT32, to + (start + n) * stride, a.of[n]);
        else
            for (int64_t n = 0; n < count; n++) store((void *)out->data, BFLOAT16, to + (start + n) * stride, a.of[n]);
    }
    if (with->operation == MEAN) store((void *)out->data, (int)out->dtype, to, total / (float)size);
}

void KERNEL(lowbit_run)(const Instruction *program, int64_t count) {
    for (const Instruction *with = program; with < program + count; with++)
        for (int64_t i = 0; i < with->sizes[0]; i++)
            for (int64_t j = 0; j < with->sizes[1]; j++)
                for (int64_t k = 0; k < with->sizes[2]; k++) run_row(with, i, j, k);
}
