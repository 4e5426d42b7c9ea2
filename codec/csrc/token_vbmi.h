/*
 * One token, with AVX-512 (VBMI, VBMI2, IFMA): eight phrases at a time become places in x, which are put one behind the
 * other in a list for each row. The lists of a few rows are made before they are added up, side by side, so that what is
 * read has left the queue of stores, and the end of a loop is guessed wrong once for all of them.
 *
 * x lies in pairs: behind a pair of zeros, column c is the floats 0 and x[c] at place 2 (c + 1). Two floats from that
 * place on add x[c] to the second of two sums, from the place behind it to the first. Place 0 adds nothing.
 */
#ifndef QMOE_TOKEN_VBMI_H
#define QMOE_TOKEN_VBMI_H

#include "kernels.h"

#include <immintrin.h>
#include <stdbool.h>
#include <string.h>

enum {
    /* Rows side by side. The sums are written out for four. */
    LISTED_ROWS = 4,
    /* Phrases of each at a time: some 2,000 columns, so that their x stays in the nearest cache. */
    PART = 144,
    /* Phrases of a step, places that a step stores, and places of a row that are added up together. */
    STEP = 8,
    STORED = 32,
    TAKEN = 4,
    /* Room for the places of a part, and for zeros behind them. */
    LIST = 3 * PART + 2 * STORED,
    /* What addresses are compared by, and how far behind x the lists seem to begin by that. */
    ALIAS = 4096,
    APART = 768
};

/* Where 32 codewords lie in the bytes from the first one's on. */
typedef struct {
    __m512i bytes, shift;
} codeword_lanes;

static inline codeword_lanes lanes_from(uint32_t bits, uint32_t first_bit) {
    const __m512i counted = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13,
                                             12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i bit = _mm512_mullo_epi16(counted, _mm512_set1_epi16((int16_t)bits));
    bit = _mm512_add_epi16(bit, _mm512_set1_epi16((int16_t)first_bit));
    __m512i low = _mm512_srli_epi16(bit, 3), high = _mm512_add_epi16(low, _mm512_set1_epi16(1));
    return (codeword_lanes){_mm512_or_si512(low, _mm512_slli_epi16(high, 8)),
                            _mm512_and_si512(bit, _mm512_set1_epi16(7))};
}

/* 64 bytes, and zeros for those at or behind the limit. */
static inline __m512i bytes_before(const uint8_t *bytes, const uint8_t *limit) {
    int64_t left = limit - bytes;
    if (__builtin_expect(left >= 64, 1)) {
        return _mm512_loadu_si512(bytes);
    }
    return left > 0 ? _mm512_maskz_loadu_epi8((UINT64_C(1) << left) - 1, bytes) : _mm512_setzero_si512();
}

/*
 * Indices of `count` codewords from number `first` on, 32 at a time: so behind them those of up to 31 others.
 * `second`: whether the first is of T1. Returns whether the one behind the last is.
 */
static inline bool list_indices(const codeword_source *source, uint64_t first, uint32_t count,
                                const codeword_lanes starts[4], bool second, uint16_t *indices) {
    const uint32_t bits = source->bits, table = source->threshold >> bits ? 0 : 1u << bits;
    const codeword_lanes *lanes = starts + first * bits % 8 / 2;
    const uint8_t *bytes = source->array + first * bits / 8;
    const __m512i field = _mm512_set1_epi16((int16_t)((1u << bits) - 1));
    const __m512i threshold = _mm512_set1_epi16((int16_t)source->threshold);
    const __m512i tables = _mm512_set1_epi16((int16_t)table);
    uint32_t above = (uint32_t)second << 31;
    for (uint32_t i = 0; i < count; i += 32, bytes += 4 * (size_t)bits) {
        __builtin_prefetch(bytes + AHEAD);
        __m512i codewords = _mm512_permutexvar_epi8(lanes->bytes, bytes_before(bytes, source->limit));
        codewords = _mm512_and_si512(_mm512_srlv_epi16(codewords, lanes->shift), field);
        uint32_t before = above >> 31;
        above = _mm512_cmpge_epu16_mask(codewords, threshold);
        __m512i found = _mm512_or_si512(codewords, _mm512_maskz_mov_epi16(above << 1 | before, tables));
        _mm512_storeu_si512(indices + i, found);
    }
    return count && (above >> (count - 1) % 32 & 1);
}

/* Entries of four phrases, four bytes each. */
static inline __m128i four_slots(const phrase_slots *table, const uint16_t *indices) {
    int32_t entries[4];
    for (unsigned k = 0; k < 4; k++) {
        memcpy(entries + k, table + indices[k], sizeof entries[k]);
    }
    return _mm_unpacklo_epi64(_mm_insert_epi32(_mm_cvtsi32_si128(entries[0]), entries[1], 1),
                              _mm_insert_epi32(_mm_cvtsi32_si128(entries[2]), entries[3], 1));
}

static inline __m256i eight_slots(const phrase_slots *table, const uint16_t *indices) {
    return _mm256_set_m128i(four_slots(table, indices + 4), four_slots(table, indices));
}

/*
 * The places of eight phrases' non-zeros, zeros behind them; `count` is how many there are. `start` is the place of the
 * first phrase's first column, in three lanes of 16 bits of every 64; it becomes that of the column after the last.
 */
static inline __m512i places_of(__m256i entries, __m512i *start, uint32_t *count) {
    /* The lengths of the phrases up to the own one, for each of eight phrases: the last byte of every entry. */
    const __m512i ends = _mm512_set1_epi64(INT64_C(0x1F1B17130F0B0703));
    const __mmask64 up_to_own = UINT64_C(0xFF7F3F1F0F070301);
    const __m512i wide = _mm512_castsi256_si512(entries);
    entries = _mm512_castsi512_si256(wide); /* or GCC would copy them first */
    __m512i lengths = _mm512_maskz_permutexvar_epi8(up_to_own, ends, wide);
    __m512i passed = _mm512_sad_epu8(lengths, _mm512_setzero_si512());
    /* By a multiplication to the lanes of all three places: shuffles are what limits this. */
    __m512i end = _mm512_madd52lo_epu64(*start, passed, _mm512_set1_epi64(INT64_C(0x000100010001)));
    *start = _mm512_permutexvar_epi64(_mm512_set1_epi64(7), end);
    __mmask32 nonzero = _mm256_test_epi8_mask(entries, _mm256_set1_epi32(0x00FFFFFF));
    *count = (uint32_t)__builtin_popcount(nonzero);
    return _mm512_maskz_compress_epi16(nonzero, _mm512_sub_epi16(end, _mm512_cvtepu8_epi16(entries)));
}

/*
 * A store that waits. Where a step's places go is known late, when those before it have been counted, and a store whose
 * address is not known delays all that comes behind it. So each waits until the third step after its own.
 */
typedef struct {
    __m512i places;
    uint16_t *list;
} waiting_store;

typedef struct {
    waiting_store next, second, third;
} waiting_stores;

static inline void store(waiting_store step) { _mm512_storeu_si512(step.list, step.places); }

/* Lists a step's places at *list, which moves behind them, when those of the third step before have been stored. */
static inline void list_step(__m256i entries, __m512i *start, waiting_store *waiting, uint16_t **list) {
    uint32_t found;
    store(*waiting);
    *waiting = (waiting_store){places_of(entries, start, &found), *list};
    *list += found;
}

/* The same with whichever store is next, which then becomes the third. */
static inline void list_in_turn(__m256i entries, __m512i *start, waiting_stores *waiting, uint16_t **list) {
    list_step(entries, start, &waiting->next, list);
    *waiting = (waiting_stores){waiting->second, waiting->third, waiting->next};
}

/*
 * Lists the places of the non-zeros of `count` phrases; the last stores wait, and may store STORED places behind the
 * list's end. `place` is that of the first phrase's first column; it becomes that of the column after the last. Returns
 * the list's length.
 */
static inline uint32_t list_places(const uint16_t *indices, uint32_t count, const phrase_slots *table, uint16_t *place,
                                   uint16_t *list, waiting_stores *waiting) {
    __m512i start = _mm512_set1_epi16((int16_t)*place);
    waiting_store a = waiting->next, b = waiting->second, c = waiting->third;
    uint16_t *next = list;
    /* Three steps written out, so that what waits stays in its registers. */
    for (; count >= 3 * STEP; count -= 3 * STEP, indices += 3 * STEP) {
        list_step(eight_slots(table, indices), &start, &a, &next);
        list_step(eight_slots(table, indices + STEP), &start, &b, &next);
        list_step(eight_slots(table, indices + 2 * STEP), &start, &c, &next);
    }
    waiting_stores last = {a, b, c};
    for (; count >= STEP; count -= STEP, indices += STEP) {
        list_in_turn(eight_slots(table, indices), &start, &last, &next);
    }
    if (count) {
        __mmask8 ours = (__mmask8)((1u << count) - 1);
        list_in_turn(_mm256_maskz_mov_epi32(ours, eight_slots(table, indices)), &start, &last, &next);
    }
    *waiting = last;
    *place = (uint16_t)_mm_cvtsi128_si32(_mm512_castsi512_si128(start));
    return (uint32_t)(next - list);
}

/*
 * Two floats of x from each of two places on. To add 16 bytes from each would be two instructions instead of three, but
 * they cross a line of the cache three times as often.
 */
static inline __m128 add_places(__m128 sums, const float *x, size_t place, size_t other) {
    __m128 low = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(const void *)(x + place)));
    return _mm_add_ps(sums, _mm_loadh_pi(low, (const __m64 *)(const void *)(x + other)));
}

/* Adds the first `count` places of each list, or up to TAKEN - 1 more, to its row's two pairs of sums. */
static inline void add_lists(uint16_t lists[LISTED_ROWS][LIST], uint32_t count, const float *x, __m128 *sums) {
    __m128 a = sums[0], b = sums[1], c = sums[2], d = sums[3], e = _mm_setzero_ps(), f = e, g = e, h = e;
    const uint16_t *list = lists[0];
    for (const uint16_t *end = list + count; list < end; list += TAKEN) {
#define ADD_FOUR(ROW, FIRST, SECOND)                                                                                 \
    do {                                                                                                             \
        uint64_t four;                                                                                               \
        memcpy(&four, list + (ROW) * LIST, sizeof four);                                                             \
        __asm__("" : "+r"(four)); /* or it would be taken apart into four loads */                                   \
        FIRST = add_places(FIRST, x, (uint16_t)four, _bextr_u64(four, 16, 16));                                      \
        SECOND = add_places(SECOND, x, _bextr_u64(four, 32, 16), four >> 48);                                        \
    } while (0)
        ADD_FOUR(0, a, e);
        ADD_FOUR(1, b, f);
        ADD_FOUR(2, c, g);
        ADD_FOUR(3, d, h);
#undef ADD_FOUR
        __asm__ volatile("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d), "+x"(e), "+x"(f), "+x"(g), "+x"(h));
    }
    sums[0] = _mm_add_ps(a, e);
    sums[1] = _mm_add_ps(b, f);
    sums[2] = _mm_add_ps(c, g);
    sums[3] = _mm_add_ps(d, h);
}

/* Zeros, which add nothing, behind a list's `length` places, up to `needed` and a step more. */
static inline void fill_up(uint16_t *list, uint32_t length, uint32_t needed) {
    uint32_t filled = length + 2 * STORED; /* nearly always enough, so that nothing is to be guessed */
    _mm512_storeu_si512(list + length, _mm512_setzero_si512());
    _mm512_storeu_si512(list + length + STORED, _mm512_setzero_si512());
    for (; __builtin_expect(filled < needed + TAKEN, 0); filled += STORED) {
        _mm512_storeu_si512(list + filled, _mm512_setzero_si512());
    }
}

/* Sums of up to LISTED_ROWS rows, part by part. */
static inline void sum_listed(unsigned rows, const codeword_source *sources, const uint32_t *counts,
                              const phrase_tables *const *phrases, const codeword_lanes starts[4], uint32_t columns,
                              const float *x, float (*sums)[2]) {
    _Alignas(64) uint16_t buffer[LISTED_ROWS * LIST + ALIAS / 2];
    /* A load seems to wait for a store whose address ends in the same twelve bits: so lists are kept apart from x. */
    size_t skipped = ((uintptr_t)x + APART - (uintptr_t)buffer) % ALIAS / 64 * 64;
    uint16_t(*lists)[LIST] = (uint16_t(*)[LIST])(void *)((char *)buffer + skipped);
    uint16_t indices[LISTED_ROWS][PART + 32], nowhere[STORED];
    const uint16_t *own[LISTED_ROWS] = {NULL};
    const phrase_slots *tables[LISTED_ROWS];
    uint16_t places[LISTED_ROWS];
    uint32_t lengths[LISTED_ROWS] = {0}, most = 0, all = 0;
    bool second[LISTED_ROWS], together = true;
    __m128 added[LISTED_ROWS];
    _Static_assert(PAIR * (1 + PAIR_COLUMNS + SLACK + PART * MAXIMUM_PHRASE) <= UINT16_MAX, "places have 16 bits");
    for (unsigned row = 0; row < LISTED_ROWS; row++) {
        places[row] = PAIR;
        second[row] = false;
        added[row] = _mm_setzero_ps();
    }
    for (unsigned row = 0; row < rows; row++) {
        most = counts[row] > most ? counts[row] : most;
        together &= sources[row].first == sources->first + all && sources[row].threshold == sources->threshold;
        all += counts[row];
        tables[row] = phrases[row]->slots;
    }
    const uint32_t limit = PAIR * (1 + columns + SLACK), parts = (most + PART - 1) / PART;
    const uint32_t size = parts ? (uint32_t)round_up((most + parts - 1) / parts, STEP) : 0;
    /* The codewords of short rows follow each other, and are taken as if they were one row's. */
    together &= parts == 1;
    if (together) {
        list_indices(sources, sources->first, all, starts, false, indices[0]);
        memset(indices[0] + all, 0, STEP * sizeof **indices); /* looked at, with the last phrases */
    }
    for (uint32_t done = 0; done < most; done += size) {
        uint32_t some[LISTED_ROWS], longest = 0;
        uint16_t *next = indices[0];
        for (unsigned row = 0; row < rows; row++) {
            uint32_t left = counts[row] > done ? counts[row] - done : 0;
            /* A damaged row that has left x is over: so no part comes round to its beginning again. */
            left = places[row] <= limit ? left : 0;
            some[row] = left < size ? left : size;
            if (together) {
                own[row] = next;
                *next &= (uint16_t)((1u << sources->bits) - 1); /* a row begins in T0 */
                next += counts[row];
            } else {
                own[row] = indices[row];
                second[row] = list_indices(sources + row, sources[row].first + done, some[row], starts, second[row],
                                           indices[row]);
            }
        }
        const waiting_store none = {_mm512_setzero_si512(), nowhere};
        waiting_stores waiting = {none, none, none};
        for (unsigned row = 0; row < rows; row++) {
            lengths[row] = list_places(own[row], some[row], tables[row], places + row, lists[row], &waiting);
            longest = lengths[row] > longest ? lengths[row] : longest;
        }
        store(waiting.next);
        store(waiting.second);
        store(waiting.third);
        for (unsigned row = 0; row < LISTED_ROWS; row++) {
            fill_up(lists[row], lengths[row], longest);
            for (uint32_t i = 0; __builtin_expect(places[row] > limit, 0) && i < lengths[row]; i++) {
                lists[row][i] = lists[row][i] <= limit ? lists[row][i] : 0; /* of a damaged row, what has left x */
            }
        }
        add_lists(lists, longest, x, added);
    }
    for (unsigned row = 0; row < rows; row++) {
        _mm_storel_pi((__m64 *)(void *)sums[row], _mm_add_ps(added[row], _mm_movehl_ps(added[row], added[row])));
    }
}

/* The same of any number of rows. */
static void rows_sum_pairs(unsigned rows, const codeword_source *sources, const uint32_t *counts,
                           const phrase_tables *const *phrases, uint32_t columns, const float *x, float (*sums)[2]) {
    codeword_lanes starts[4]; /* by the first bit, which is even */
    for (uint32_t k = 0; k < 4; k++) {
        starts[k] = lanes_from(sources[0].bits, 2 * k);
    }
    for (unsigned done = 0; done < rows; done += LISTED_ROWS) {
        unsigned some = rows - done < LISTED_ROWS ? rows - done : LISTED_ROWS;
        sum_listed(some, sources + done, counts + done, phrases + done, starts, columns, x, sums + done);
    }
}

#endif
