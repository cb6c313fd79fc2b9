// SPDX-License-Identifier: Apache-2.0
/* What C and Python agree on: constants, enumerators, structures and functions.

   Each list is written once, here. C makes its types and declarations of it, and abi.c the table `lowbit_abi`, which
   abi.py reads when it loads the library: constants, enumerators and the types of arguments are taken from the table,
   structures are compared with it. */
#pragma once

#include <stdint.h>

/* Layout of a packed weight: see packed.h. Inputs of lowbit_gemm that share a scale are a chunk, too. */
#define ROWS 16
#define PART 4
#define CHUNK 32
/* The most rows of x in one call of lowbit_matmul */
#define MATMUL_ROWS 4
/* The most numbers of a head in lowbit_attention */
#define LONGEST_HEAD 512
/* Of an operand in lowbit_run */
#define DIMENSIONS 4
/* Of an operand of lowbit_primitive */
#define PRIMITIVE_BYTES 64

#define CONSTANTS(CONSTANT) \
    CONSTANT(ROWS) CONSTANT(PART) CONSTANT(CHUNK) CONSTANT(MATMUL_ROWS) CONSTANT(LONGEST_HEAD) CONSTANT(DIMENSIONS) \
    CONSTANT(PRIMITIVE_BYTES)

/* Instruction sets: x86 with 256 or 512 bits, whose names end with what multiplies, each with all that those before it
   have, but for AVXVNNI; and ARM's with dot products of bytes. build.py has the flags, levels.c says which a machine runs. */
#define LEVELS(ENUMERATOR)                                                                                        \
    ENUMERATOR(PORTABLE) ENUMERATOR(AVX2) ENUMERATOR(AVXVNNI) ENUMERATOR(AVX512) ENUMERATOR(AVX512BF16) ENUMERATOR(NEON)

#define DTYPES(ENUMERATOR) ENUMERATOR(FLOAT32) ENUMERATOR(BFLOAT16)
#define OPERATIONS(ENUMERATOR)                                                                                  \
    ENUMERATOR(COPY) ENUMERATOR(ADD) ENUMERATOR(SUBTRACT) ENUMERATOR(MULTIPLY) ENUMERATOR(DIVIDE)               \
    ENUMERATOR(NEGATE) ENUMERATOR(SQUARE) ENUMERATOR(CUBE) ENUMERATOR(RSQRT) ENUMERATOR(SIGMOID)                \
    ENUMERATOR(SILU) ENUMERATOR(TANH) ENUMERATOR(GELU) ENUMERATOR(GELU_TANH) ENUMERATOR(MEAN)

/* How lowbit_gemm multiplies */
#define ARITHMETICS(ENUMERATOR) ENUMERATOR(INT8) ENUMERATOR(BF16)
#define PRIMITIVES(ENUMERATOR) ENUMERATOR(DOT_S16) ENUMERATOR(DOT_U8S16) ENUMERATOR(DOT_U8S8) ENUMERATOR(DOT_BF16) ENUMERATOR(FMA_F32)

/* A packed weight. group_size: inputs that share a scale; integer_inputs: whether x holds integers below 256. */
#define WEIGHT(FIELD)                                                                           \
    FIELD(Weight, const void *, codes)    /* words [blocks, slices, ROWS] */                    \
    FIELD(Weight, const void *, scales)   /* [blocks, groups, ROWS] */                          \
    FIELD(Weight, const uint8_t *, zeros) /* [blocks, groups, ROWS]; NULL: the middle code */   \
    FIELD(Weight, int64_t, scale_dtype)                                                         \
    FIELD(Weight, int64_t, bits)                                                                \
    FIELD(Weight, int64_t, out_features)                                                        \
    FIELD(Weight, int64_t, in_features)                                                         \
    FIELD(Weight, int64_t, group_size)                                                          \
    FIELD(Weight, int64_t, integer_inputs)

/* Which rows of x belong to which of several weights of one form, that lie one behind the other: those of weight i are
   [start[i], start[i + 1]). Only weights that have `least` rows to `most` are multiplied. */
#define EXPERTS(FIELD)                       \
    FIELD(Experts, const int32_t *, start)   \
    FIELD(Experts, int64_t, count)           \
    FIELD(Experts, int64_t, least)           \
    FIELD(Experts, int64_t, most)

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
    STRUCTURE(Weight, WEIGHT) STRUCTURE(Experts, EXPERTS) STRUCTURE(Strided, STRIDED)                  \
    STRUCTURE(Attention, ATTENTION)                                                                    \
    STRUCTURE(Operand, OPERAND) STRUCTURE(Instruction, INSTRUCTION)

/* One of each for every level, with its name behind their own: KERNEL(lowbit_linear) is lowbit_linear_avx2 */
#define FUNCTIONS(FUNCTION)                                                                                         \
    FUNCTION(int64_t, lowbit_linear_scratch, const Weight *w, int64_t rows)                                         \
    FUNCTION(void, lowbit_linear, const Weight *w, const void *x, int64_t dtype, const void *bias, void *y,         \
             int64_t rows, int64_t pieces, void *scratch)                                                           \
    FUNCTION(void, lowbit_linear_experts, const Weight *w, const Experts *e, const void *x, int64_t dtype,         \
             const void *bias, void *y, int64_t rows, int64_t pieces, void *scratch)                                \
    FUNCTION(int64_t, lowbit_linear_knows, const Weight *w)                                                         \
    FUNCTION(int64_t, lowbit_gemm_scratch, const Weight *w, int64_t arithmetic, int64_t rows, int64_t threads)      \
    FUNCTION(void, lowbit_gemm, const Weight *w, int64_t arithmetic, const void *x, int64_t dtype, const void *bias, \
             void *y, int64_t rows, int64_t threads, void *scratch)                                                 \
    FUNCTION(void, lowbit_gemm_experts, const Weight *w, const Experts *e, int64_t arithmetic, const void *x,       \
             int64_t dtype, const void *bias, void *y, int64_t rows, int64_t threads, void *scratch)                \
    FUNCTION(void, lowbit_pack, const Weight *w, const uint8_t *codes, void *packed)                             \
    FUNCTION(void, lowbit_unpack, const Weight *w, int64_t start, int64_t stop, uint8_t *codes, float *weights)     \
    FUNCTION(void, lowbit_matmul, const void *x, const void *weight, void *y, int64_t dtype, int64_t rows,          \
             int64_t out_features, int64_t in_features, float *wide)                                                \
    FUNCTION(void, lowbit_attention, const Attention *a)                                                            \
    FUNCTION(void, lowbit_run, const Instruction *program, int64_t count)                                           \
    FUNCTION(int64_t, lowbit_round_scratch, int64_t length, int64_t threads)                                        \
    FUNCTION(void, lowbit_round_columns, const float *target, int64_t length, int64_t rows, const float *feedback,  \
             const float *costs, const float *scales, const float *zeros, int64_t candidates, int64_t levels,       \
             float *codes, float *grid_scales, float *grid_zeros, float *cost, int64_t threads, void *scratch)      \
    FUNCTION(void, lowbit_descend, const float *codes, int64_t length, int64_t rows, const float *scales,           \
             const float *zeros, const float *descent, const float *hessian, int64_t levels, float *found,          \
             float *change, float *gain, int64_t threads)                                                           \
    FUNCTION(int64_t, lowbit_outer_scratch, int64_t rows, int64_t columns)                                          \
    FUNCTION(void, lowbit_add_outer, const void *a, int64_t rows, const void *b, int64_t columns, int64_t tokens,   \
             float *sums, int64_t threads, void *scratch)                                                           \
    FUNCTION(void, lowbit_primitive, int64_t primitive, int64_t bits, const void *a, const void *b, const void *sums, \
             void *to)

/* Whether this machine runs a level */
int64_t lowbit_runs(int64_t level);

#ifndef LEVEL
#define LEVEL portable
#endif
#define JOINED(NAME, LEVEL) NAME##_##LEVEL
#define WITH_LEVEL(NAME, LEVEL) JOINED(NAME, LEVEL)
#define KERNEL(NAME) WITH_LEVEL(NAME, LEVEL)

#define ENUMERATOR(NAME) NAME,
#define FIELD(STRUCTURE, TYPE, NAME, ...) TYPE NAME __VA_ARGS__;
#define STRUCTURE(NAME, FIELDS) typedef struct { FIELDS(FIELD) } NAME;
#define FUNCTION(RESULT, NAME, ...) RESULT KERNEL(NAME)(__VA_ARGS__);
enum Dtype { DTYPES(ENUMERATOR) };
enum Operation { OPERATIONS(ENUMERATOR) };
enum Level { LEVELS(ENUMERATOR) };
enum Arithmetic { ARITHMETICS(ENUMERATOR) };
enum Primitive { PRIMITIVES(ENUMERATOR) };
STRUCTURES(STRUCTURE)
FUNCTIONS(FUNCTION)
#undef ENUMERATOR
#undef FIELD
#undef STRUCTURE
#undef FUNCTION
