/*
 * One token, with AVX-512 (VBMI, VBMI2): eight phrases at a time become a list of places in x, the lists of a few rows
 * are made before they are added up, and all loops of these rows run equally often. So nothing waits, and hardly a
 * branch is guessed wrong.
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
    /* Rows whose lists are made before they are added up, so that what is read has left the queue of stores. */
    LISTED_ROWS = 4,
    /* Phrases of each at a time: some 2,000 columns, so that their x stays in the nearest cache. */
    PART = 144,
    /* Phrases of a step, places kept for each step, and those that are always added up: hardly any step has more. */
    STEP = 8,
    ROOM = 32,
    FEW = 18
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

static inline uint32_t lanes_below_32(uint32_t count) {
    return count < 32 ? (UINT32_C(1) << count) - 1 : UINT32_MAX;
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
 * Indices of `count` phrases from number `first` on, and behind them up to `room` the index of none. `second`: whether
 * the first is of T1. Returns whether the one behind them is.
 */
static inline bool indices_of_part(const codeword_source *source, uint64_t first, uint32_t count, uint32_t room,
                                   const codeword_lanes starts[4], bool second, uint16_t none, uint16_t *indices) {
    const uint32_t bits = source->bits, table = source->threshold >> bits ? 0 : 1u << bits;
    const codeword_lanes *lanes = starts + first * bits % 8 / 2;
    const uint8_t *bytes = source->array + first * bits / 8;
    const __m512i field = _mm512_set1_epi16((int16_t)((1u << bits) - 1));
    const __m512i threshold = _mm512_set1_epi16((int16_t)source->threshold);
    const __m512i tables = _mm512_set1_epi16((int16_t)table), nones = _mm512_set1_epi16((int16_t)none);
    uint32_t carry = second;
    for (uint32_t i = 0; i < room; i += 32, bytes += 4 * (size_t)bits) {
        __builtin_prefetch(bytes + AHEAD);
        __m512i codewords = _mm512_permutexvar_epi8(lanes->bytes, bytes_before(bytes, source->limit));
        codewords = _mm512_and_si512(_mm512_srlv_epi16(codewords, lanes->shift), field);
        uint32_t above = _mm512_cmpge_epu16_mask(codewords, threshold);
        __m512i found = _mm512_or_si512(codewords, _mm512_maskz_mov_epi16(above << 1 | carry, tables));
        carry = above >> 31;
        if (count < i + 32) {
            found = _mm512_mask_mov_epi16(found, ~lanes_below_32(count > i ? count - i : 0), nones);
        }
        _mm512_storeu_si512(indices + i, found);
    }
    return count && (indices[count - 1] & ((1u << bits) - 1)) >= source->threshold;
}

/* Entries of four phrases, four bytes each. */
static inline __m128i four_slots(const phrase_slots *table, const uint16_t *indices) {
    int32_t entries[4];
    for (unsigned k = 0; k < 4; k++) {
        memcpy(entries + k, table + indices[k], sizeof entries[k]);
    }
    __m128i four = _mm_cvtsi32_si128(entries[0]);
    four = _mm_insert_epi32(four, entries[1], 1);
    four = _mm_insert_epi32(four, entries[2], 2);
    return _mm_insert_epi32(four, entries[3], 3);
}

/* Two floats of x from each place on; what follows them is added too, and not looked at. */
static inline __m128 add_place(__m128 sums, const float *x, size_t place) {
    return _mm_add_ps(sums, _mm_loadu_ps(x + place));
}

/*
 * Lists the places of the non-zeros of `count` phrases, a multiple of STEP: those of a step from a multiple of ROOM on,
 * zeros behind them. What a step has beyond FEW is added to the sums, unless it lies behind `limit`. `place` is that of
 * the first phrase's first column; returns that of the column after the last.
 */
static inline uint16_t list_places(const uint16_t *indices, uint32_t count, const phrase_slots *table, uint16_t place,
                                   const float *x, uint32_t limit, uint16_t *list, __m128 *sums) {
    /* The lengths of the phrases up to the own one, for each of eight phrases: the last byte of every entry. */
    const __m512i ends = _mm512_set1_epi64(INT64_C(0x1F1B17130F0B0703));
    const __mmask64 up_to_own = UINT64_C(0xFF7F3F1F0F070301);
    const __m512i spread = _mm512_set4_epi32(0x09080908, 0x09080908, 0x01000100, 0x01000100);
    const __m512i last = _mm512_set1_epi64(7), positions = _mm512_set1_epi64(INT64_C(0x0000FFFFFFFFFFFF));
    __m512i start = _mm512_set1_epi16((int16_t)place);
    for (uint32_t i = 0; i < count; i += STEP, indices += STEP, list += ROOM) {
        __m256i entries = _mm256_set_m128i(four_slots(table, indices + 4), four_slots(table, indices));
        __m512i lengths = _mm512_maskz_permutexvar_epi8(up_to_own, ends, _mm512_castsi256_si512(entries));
        __m512i passed = _mm512_shuffle_epi8(_mm512_sad_epu8(lengths, _mm512_setzero_si512()), spread);
        __m512i end = _mm512_add_epi16(start, passed), back = _mm512_cvtepu8_epi16(entries);
        start = _mm512_permutexvar_epi64(last, end);
        __mmask32 nonzero = _mm512_test_epi16_mask(back, positions);
        _mm512_store_si512(list, _mm512_maskz_compress_epi16(nonzero, _mm512_sub_epi16(end, back)));
        uint32_t found = (uint32_t)__builtin_popcount(nonzero);
        for (uint32_t k = FEW; __builtin_expect(k < found, 0); k++) {
            *sums = add_place(*sums, x, list[k] <= limit ? list[k] : 0);
        }
    }
    return (uint16_t)_mm_cvtsi128_si32(_mm512_castsi512_si128(start));
}

/* Sums over the first FEW places of each step: in named variables, two places a load, so that few loads wait. */
static inline __m128 sum_places(const uint16_t *list, uint32_t steps, const float *x) {
    __m128 a = _mm_setzero_ps(), b = a, c = a, d = a, e = a, f = a, g = a, h = a;
    for (uint32_t step = 0; step < steps; step++, list += ROOM) {
#define ADD_TWO(FROM, FIRST, SECOND)                                                                                 \
    do {                                                                                                             \
        uint32_t two;                                                                                                \
        memcpy(&two, list + (FROM), sizeof two);                                                                     \
        __asm__("" : "+r"(two)); /* or it would be taken apart into two loads */                                     \
        FIRST = add_place(FIRST, x, (uint16_t)two);                                                                  \
        SECOND = add_place(SECOND, x, two >> 16);                                                                    \
    } while (0)
        ADD_TWO(0, a, b);
        ADD_TWO(2, c, d);
        ADD_TWO(4, e, f);
        ADD_TWO(6, g, h);
        __asm__ volatile("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d), "+x"(e), "+x"(f), "+x"(g), "+x"(h));
        ADD_TWO(8, a, b);
        ADD_TWO(10, c, d);
        ADD_TWO(12, e, f);
        ADD_TWO(14, g, h);
        __asm__ volatile("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d), "+x"(e), "+x"(f), "+x"(g), "+x"(h));
        ADD_TWO(16, a, b);
#undef ADD_TWO
    }
    return _mm_add_ps(_mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)), _mm_add_ps(_mm_add_ps(e, f), _mm_add_ps(g, h)));
}

/* Sums of up to LISTED_ROWS rows, part by part. */
static inline void sum_listed(unsigned rows, const codeword_source *sources, const uint32_t *counts,
                              const phrase_tables *const *phrases, const codeword_lanes starts[4], uint32_t columns,
                              const float *x, float (*sums)[2]) {
    _Alignas(64) uint16_t lists[LISTED_ROWS][PART / STEP * ROOM + ROOM]; /* not all at the same lines of the cache */
    uint16_t indices[LISTED_ROWS][PART + 32], places[LISTED_ROWS];
    bool second[LISTED_ROWS];
    __m128 added[LISTED_ROWS];
    _Static_assert(PAIR * (1 + PAIR_COLUMNS + SLACK + PART * MAXIMUM_PHRASE) <= UINT16_MAX, "places have 16 bits");
    uint32_t most = 0;
    for (unsigned row = 0; row < rows; row++) {
        most = counts[row] > most ? counts[row] : most;
        places[row] = PAIR;
        second[row] = false;
        added[row] = _mm_setzero_ps();
    }
    const uint32_t limit = PAIR * (1 + columns + SLACK), parts = (most + PART - 1) / PART;
    const uint32_t size = parts ? (uint32_t)round_up((most + parts - 1) / parts, STEP) : 0;
    for (uint32_t done = 0; done < most; done += size) {
        for (unsigned row = 0; row < rows; row++) {
            uint32_t left = counts[row] > done ? counts[row] - done : 0;
            /* A damaged row that has left x is over: so no part comes round to its beginning again. */
            left = places[row] <= limit ? left : 0;
            second[row] = indices_of_part(sources + row, sources[row].first + done, left < size ? left : size, size,
                                          starts, second[row], (uint16_t)phrases[row]->entries, indices[row]);
        }
        for (unsigned row = 0; row < rows; row++) {
            places[row] = list_places(indices[row], size, phrases[row]->slots, places[row], x, limit, lists[row],
                                      added + row);
        }
        for (unsigned row = 0; row < rows; row++) {
            for (uint32_t i = 0; __builtin_expect(places[row] > limit, 0) && i < size / STEP * ROOM; i++) {
                lists[row][i] = lists[row][i] <= limit ? lists[row][i] : 0; /* of a damaged row, what has left x */
            }
            added[row] = _mm_add_ps(added[row], sum_places(lists[row], size / STEP, x));
        }
    }
    for (unsigned row = 0; row < rows; row++) {
        _mm_storel_pi((__m64 *)(void *)sums[row], added[row]);
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
