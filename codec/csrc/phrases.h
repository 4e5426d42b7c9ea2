/* A dictionary's phrases in the forms that the kernels read. Entry i of every table is the phrase of index i. */
#ifndef QMOE_PHRASES_H
#define QMOE_PHRASES_H

#include <stdbool.h>
#include <stdint.h>

/*
 * The index of a codeword is the codeword itself in T0, and 2^bits + the codeword in T1. An unused codeword has
 * length 0 and no non-zeros, so that a walk over any bytes at all stays where it is.
 *
 * blocks   the trits, `block` bytes each: 32, 64 or 128, whichever holds the longest phrase
 * lengths  its length in trits
 * measures the same, and UNUSED where there is none: so that eight of them can be added before one looks for it
 * sums     for one token: where to add x up. See rows_sum. One more than `entries`: the last is of no length.
 * slots    the same in half the bytes, for x in pairs. See token_vbmi.h.
 * lists    for many tokens: where the non-zeros are. See list_row.
 */

/*
 * Each weight of x is stored as three floats (0, x, 0). Adding the pair that starts at float 0, 1 or 2 of the triple
 * adds x to the second sum, to the first, or to neither: so a phrase always takes three additions of pairs.
 */
enum { TRIPLE = 3 };
typedef struct {
    uint16_t offsets[3]; /* in bytes, from the phrase's first triple */
    uint16_t advance;    /* in bytes, to the next phrase's first triple */
} phrase_sums;

/*
 * Or as two, (0, x): then the pair that starts at float 0 or 1 adds x to the second sum or the first. A phrase's places
 * are counted back from its end, in floats; 0 is none.
 */
enum { PAIR = 2 };
typedef struct {
    uint8_t back[3];
    uint8_t advance; /* in floats */
} phrase_slots;

typedef struct {
    uint16_t positions[3]; /* those of +1 first, then those of -1 */
    uint8_t highs, lows;   /* how many of each, times 2: bytes that they take in a list */
    uint64_t advance;      /* the length, in each of the lanes of `positions` */
} phrase_lists;

enum { UNUSED = 4096 };

typedef struct {
    uint32_t entries, block;
    bool crowded; /* words have more than two non-zeros in the mean */
    const uint8_t *lengths;
    const uint16_t *measures;
    const phrase_sums *sums;
    const phrase_slots *slots;
    const phrase_lists *lists;
    const int8_t *blocks;
} phrase_tables;

#endif
