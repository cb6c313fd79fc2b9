// SPDX-License-Identifier: Apache-2.0
/* The table of what Python has to know of the library: abi.h lists it, abi.py reads it. */

#include <stddef.h>

#include "abi.h"

/* A constant: its value. An enumerator: its number. A structure: its size. A field: its offset and size. A function: its
   type alone. */
typedef struct {
    const char *kind, *name, *type;
    int64_t value, size;
} Entry;

#define CONSTANT(NAME) {"constant", #NAME, "", NAME, 0},
#define LEVEL_(NAME) {"level", #NAME, "", NAME, 0},
#define FIELD(STRUCTURE, TYPE, NAME, ...) \
    {"field", #STRUCTURE "." #NAME, #TYPE, offsetof(STRUCTURE, NAME), sizeof(((STRUCTURE *)0)->NAME)},
#define STRUCTURE(NAME, FIELDS) {"structure", #NAME, "", sizeof(NAME), 0}, FIELDS(FIELD)
#define FUNCTION(RESULT, NAME, ...) {"function", #NAME, #RESULT "(" #__VA_ARGS__ ")", 0, 0},

const Entry lowbit_abi[] = {
    CONSTANTS(CONSTANT) DTYPES(CONSTANT) OPERATIONS(CONSTANT) ARITHMETICS(CONSTANT) PRIMITIVES(CONSTANT) LEVELS(LEVEL_)
    STRUCTURES(STRUCTURE) FUNCTIONS(FUNCTION) {0},
};
