// SPDX-License-Identifier: Apache-2.0
/* What C and Python agree on: constants, enumerators, structures and functions.

   Each list is written once, here. C makes its types and declarations of it, and abi.c the table `lowbit_abi`, which
   abi.py reads when it loads the library: constants, enumerators and the types of arguments are taken from the table,
   structures are compared with it. */
#pragma once

#include <stdint.h>

/* Layout of a packed weight: see linear.c */
#define ROWS 4
#define LANES 16
/* The most rows of x in one call of lowbit_matmul */
#define MATMUL_ROWS 4
/* The most numbers of a head in lowbit_attention */
#define LONGEST_HEAD 512
/* Of an operand in lowbit_run */
#define DIMENSIONS 4

#define CONSTANTS(CONSTANT) \
    CONSTANT(ROWS) CONSTANT(LANES) CONSTANT(MATMUL_ROWS) CONSTANT(LONGEST_HEAD) CONSTANT(DIMENSIONS)

#define DTYPES(ENUMERATOR) ENUMERATOR(FLOAT32) ENUMERATOR(BFLOAT16)
#define OPERATIONS(ENUMERATOR)                                                                                  \
    ENUMERATOR(COPY) ENUMERATOR(ADD) ENUMERATOR(SUBTRACT) ENUMERATOR(MULTIPLY) ENUMERATOR(DIVIDE)               \
    ENUMERATOR(NEGATE) ENUMERATOR(SQUARE) ENUMERATOR(CUBE) ENUMERATOR(RSQRT) ENUMERATOR(SIGMOID)                \
    ENUMERATOR(SILU) ENUMERATOR(TANH) ENUMERATOR(GELU) ENUMERATOR(GELU_TANH) ENUMERATOR(MEAN)

/* A packed weight. group_size: inputs that share a scale; integer_inputs: whether x holds integers below 256. */
#define WEIGHT(FIELD)                                                                           \
    FIELD(Weight, const void *, codes)   /* vectors of LANES words [blocks, chunks, ROWS] */    \
    FIELD(Weight, const float *, scales) /* [blocks, groups, ROWS] */                           \
    FIELD(Weight, const float *, zeros)  /* [blocks, groups, ROWS]; NULL: the middle code */    \
    FIELD(Weight, int64_t, bits)                                                                \
    FIELD(Weight, int64_t, out_features)                                                        \
    FIELD(Weight, int64_t, in_features)                                                         \
    FIELD(Weight, int64_t, group_size)                                                          \
    FIELD(Weight, int64_t, integer_inputs)

/* A tensor of four dimensions, whose numbers lie one behind the other in the last one; strides of the others */
#define STRIDED(FIELD)                   \
    FIELD(Strided, const void *, data)   \
    FIELD(Strided, int64_t, batch)       \
    FIELD(Strided, int64_t, head)        \
    FIELD(Strided, int64_t, token)

/* query [B, heads, queries, D], out the same with head_dim of the values; key, value [B, heads / group, keys, D].
   mask: bytes [B, heads, queries, keys], 0 for what is not seen, NULL: everything is; `last`: the stride of its keys. */
#define ATTENTION(FIELD)                 \
    FIELD(Attention, Strided, query)     \
    FIELD(Attention, Strided, key)       \
    FIELD(Attention, Strided, value)     \
    FIELD(Attention, Strided, mask)      \
    FIELD(Attention, Strided, out)       \
    FIELD(Attention, int64_t, batch)     \
    FIELD(Attention, int64_t, heads)     \
    FIELD(Attention, int64_t, group)     \
    FIELD(Attention, int64_t, queries)   \
    FIELD(Attention, int64_t, keys)      \
    FIELD(Attention, int64_t, head_dim)  \
    FIELD(Attention, int64_t, value_dim) \
    FIELD(Attention, int64_t, dtype)     \
    FIELD(Attention, int64_t, last)      \
    FIELD(Attention, float, scale)

/* data NULL: the number `value` */
#define OPERAND(FIELD)                            \
    FIELD(Operand, const void *, data)            \
    FIELD(Operand, int64_t, strides, [DIMENSIONS]) \
    FIELD(Operand, int64_t, dtype)                \
    FIELD(Operand, float, value)

/* out = operation(a, b); MEAN is that of the last dimension of a. index: NULL, or what tells by how many `step` out lies
   further on. */
#define INSTRUCTION(FIELD)                           \
    FIELD(Instruction, int64_t, operation)           \
    FIELD(Instruction, int64_t, sizes, [DIMENSIONS]) \
    FIELD(Instruction, Operand, out)                 \
    FIELD(Instruction, Operand, a)                   \
    FIELD(Instruction, Operand, b)                   \
    FIELD(Instruction, const int64_t *, index)       \
    FIELD(Instruction, int64_t, step)

/* Each behind those that are fields of it */
#define STRUCTURES(STRUCTURE)                                                                          \
    STRUCTURE(Weight, WEIGHT) STRUCTURE(Strided, STRIDED) STRUCTURE(Attention, ATTENTION)              \
    STRUCTURE(Operand, OPERAND) STRUCTURE(Instruction, INSTRUCTION)

#define FUNCTIONS(FUNCTION)                                                                                         \
    FUNCTION(int64_t, lowbit_linear_scratch, const Weight *w, int64_t rows)                                         \
    FUNCTION(void, lowbit_linear, const Weight *w, const void *x, int64_t dtype, const void *bias, void *y,         \
             int64_t rows, int64_t pieces, void *scratch)                                                           \
    FUNCTION(int64_t, lowbit_pack, const Weight *w, const uint8_t *codes, void *packed)                             \
    FUNCTION(void, lowbit_unpack, const Weight *w, int64_t start, int64_t stop, uint8_t *codes, float *weights)     \
    FUNCTION(void, lowbit_matmul, const void *x, const void *weight, void *y, int64_t dtype, int64_t rows,          \
             int64_t out_features, int64_t in_features, float *wide)                                                \
    FUNCTION(void, lowbit_attention, const Attention *a)                                                            \
    FUNCTION(void, lowbit_run, const Instruction *program, int64_t count)

#define ENUMERATOR(NAME) NAME,
#define FIELD(STRUCTURE, TYPE, NAME, ...) TYPE NAME __VA_ARGS__;
#define STRUCTURE(NAME, FIELDS) typedef struct { FIELDS(FIELD) } NAME;
#define FUNCTION(RESULT, NAME, ...) RESULT NAME(__VA_ARGS__);
enum Dtype { DTYPES(ENUMERATOR) };
enum Operation { OPERATIONS(ENUMERATOR) };
STRUCTURES(STRUCTURE)
FUNCTIONS(FUNCTION)
#undef ENUMERATOR
#undef FIELD
#undef STRUCTURE
#undef FUNCTION
