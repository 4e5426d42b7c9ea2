/*
 * The hot loops, compiled once for each instruction set from kernels_body.h and chosen once, in dispatch.c.
 *
 * Kernels take what the callers have laid out: indices of phrases, x in the layout that they say, scratch with room
 * to read and write past the end. They trust sizes, never contents.
 */
#ifndef QMOE_KERNELS_H
#define QMOE_KERNELS_H

#include "phrases.h"

#include <stddef.h>

enum {
    /* Codewords that are looked up at a time. */
    CHUNK = 256,
    /* Columns that a walk may reach past a row's end: a phrase, or a block, whichever is more. */
    SLACK = 128,
    /* Rows of up to this many columns have positions in 16 bits. */
    LIST_COLUMNS = 65536 - SLACK,
    /* Rows that are walked side by side, and phrases of each until one asks whether the row is at its end. */
    TOGETHER = 4,
    UNCHECKED = 4,
    /* Columns that a walk may reach past the end: a phrase, those not asked about, and the last's non-zeros. */
    SUM_SLACK = (UNCHECKED + 2) * SLACK,
    /* Rows of up to this many columns can have x in pairs: so places have 16 bits. */
    PAIR_COLUMNS = 14000,
    /* Tokens that list_sum takes at a time. */
    TOKEN_BLOCK = 16
};

/* Codewords of a row as phrase indices, from `first` on. `limit` ends the packed array's readable bytes. */
typedef struct {
    const uint8_t *array, *limit;
    uint64_t first;
    uint32_t bits, threshold;
} codeword_source;

/* Columns of a row's non-zeros, each list with room for SLACK more. */
typedef struct {
    uint16_t *highs, *lows;
    uint32_t high_count, low_count;
} row_lists;

typedef struct {
    const char *name;
    /* Of each of `rows` rows that follow each other, with counts[row] phrases of one dictionary: the sum of the
     * phrases' lengths, or UINT64_MAX where a codeword is unused. */
    void (*measure_rows)(const codeword_source *source, uint32_t rows, const uint32_t *counts,
                         const phrase_tables *phrases, uint64_t *totals);
    /* Trits of a row from `count` codewords into row[0 … columns + SLACK); what follows the phrases is zeroed. */
    void (*decode_row)(const codeword_source *source, uint32_t count, const phrase_tables *phrases, uint32_t columns,
                       int8_t *row);
    /* Sums of x over the -1 and the +1 of rows. x: columns + SUM_SLACK triples. */
    void (*rows_sum)(unsigned rows, const codeword_source *sources, const uint32_t *counts,
                     const phrase_tables *const *phrases, uint32_t columns, const float *x, float (*sums)[2]);
    /* The same faster, or NULL, for codewords of less than 16 bits, no crowded phrases, and up to PAIR_COLUMNS columns.
     * x: a pair of zeros and columns + SUM_SLACK pairs. */
    void (*rows_sum_pairs)(unsigned rows, const codeword_source *sources, const uint32_t *counts,
                           const phrase_tables *const *phrases, uint32_t columns, const float *x, float (*sums)[2]);
    /* Lists of the row's non-zeros. */
    void (*list_row)(const codeword_source *source, uint32_t count, const phrase_tables *phrases, uint32_t columns,
                     row_lists *lists);
    /* Lists of the non-zeros of a row of trits, of which columns + 63 can be read. */
    void (*list_trits)(const int8_t *trits, uint32_t columns, row_lists *lists);
    /* high * (sum of x over highs) + low * (sum over lows), x [columns + SLACK][width], width 4, 8 or 16, aligned. */
    void (*list_sum)(const row_lists *lists, const float *x, unsigned width, const float levels[2], float *sums);
    /* Weights of a row of trits. */
    void (*dequantize_32)(const int8_t *trits, uint32_t columns, const uint32_t levels[2], uint32_t *weights);
    void (*dequantize_16)(const int8_t *trits, uint32_t columns, const uint16_t levels[2], uint16_t *weights);
    /* Bit masks of the non-zeros and of the negative ones among 64 trits. */
    void (*masks)(const int8_t *trits, uint64_t *nonzero, uint64_t *negative);
} qmoe_kernels;

extern const qmoe_kernels qmoe_kernels_portable;
#if QMOE_HAVE_AVX2
extern const qmoe_kernels qmoe_kernels_avx2;
#endif
#if QMOE_HAVE_AVX512
extern const qmoe_kernels qmoe_kernels_avx512;
#endif
#if QMOE_HAVE_AVX512VBMI
extern const qmoe_kernels qmoe_kernels_avx512vbmi;
#endif

/* The best kernels that this processor has. */
const qmoe_kernels *qmoe_chosen_kernels(void);

#endif
