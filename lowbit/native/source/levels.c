// SPDX-License-Identifier: Apache-2.0
/* Which levels of instructions this machine runs: CPUID says what the processor has, XCR0 which of its registers the
   system saves. Compiled for any processor. */

#include "abi.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>

#define BIT(WORD, NUMBER) ((WORD) >> (NUMBER) & 1)
#define VECTORS_SAVED 0x06 /* SSE and AVX */
#define MASKS_SAVED 0xe0   /* of AVX-512: masks, upper halves, upper registers */

static int saves(uint32_t state) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & state) == state;
}

int64_t lowbit_runs(int64_t level) {
    uint32_t a, b, c, d, features, extended, unused, more = 0;
    if (level == PORTABLE) return 1;
    if (!__get_cpuid(1, &a, &b, &features, &d) || !__get_cpuid_count(7, 0, &a, &extended, &c, &d)) return 0;
    const int vnni512 = BIT(c, 11);
    if (a >= 1) __get_cpuid_count(7, 1, &more, &b, &unused, &d);
    const int has_osxsave = BIT(features, 27);
    if (!has_osxsave || !saves(VECTORS_SAVED)) return 0;
    const int avx2 = BIT(features, 12) /* FMA */ && BIT(features, 28) /* AVX */ && BIT(extended, 5);
    const int avx512 = avx2 && saves(VECTORS_SAVED | MASKS_SAVED) && BIT(extended, 16) /* F */ &&
                       BIT(extended, 17) /* DQ */ && BIT(extended, 30) /* BW */ && BIT(extended, 31) /* VL */ && vnni512;
    switch (level) {
    case AVX2: return avx2;
    case AVXVNNI: return avx2 && BIT(more, 4);
    case AVX512: return avx512;
    case AVX512BF16: return avx512 && BIT(more, 5);
    default: return 0;
    }
}
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

#define DOT_PRODUCTS (1ul << 20) /* HWCAP_ASIMDDP */

int64_t lowbit_runs(int64_t level) {
    return level == PORTABLE || (level == NEON && getauxval(AT_HWCAP) & DOT_PRODUCTS);
}
#elif defined(__aarch64__) && defined(__APPLE__)
int64_t lowbit_runs(int64_t level) { return level == PORTABLE || level == NEON; } /* all of Apple's have dot products */
#else
int64_t lowbit_runs(int64_t level) { return level == PORTABLE; }
#endif
