/*
 * Lengths of 64 phrases at a time, for dictionaries of 8 and 10 bits: one instruction looks up 64 bytes in a table of
 * 128 (VBMI), so that a table of lengths is a few of these, of which the codeword's higher bits choose.
 *
 * Codewords are held as two vectors of bytes: their low 8 bits, and for 10 bits what is above bit 6.
 */
#ifndef QMOE_MEASURE_VBMI_H
#define QMOE_MEASURE_VBMI_H

#include "kernels.h"

#include <immintrin.h>
#include <stdbool.h>

/* What has been measured of a row. */
typedef struct {
    __m512i sums;
    __mmask64 unused; /* lanes in which a length was 0 */
    uint64_t carry;   /* whether the codeword before the next one is >= threshold */
} measured;

static inline __m512i load_table(const uint8_t *lengths, unsigned k) {
    return _mm512_loadu_si512((const void *)(lengths + 64 * (size_t)k));
}

/* Lengths by the low 7 bits of `low` and by `bit7`. */
static inline __m512i look_up_256(const uint8_t *lengths, __m512i low, __mmask64 bit7) {
    __m512i zeros = _mm512_permutex2var_epi8(load_table(lengths, 0), low, load_table(lengths, 1));
    __m512i ones = _mm512_permutex2var_epi8(load_table(lengths, 2), low, load_table(lengths, 3));
    return _mm512_mask_blend_epi8(bit7, zeros, ones);
}

static inline __m512i look_up_1024(const uint8_t *lengths, __m512i low, __mmask64 bit7, __mmask64 bit8,
                                   __mmask64 bit9) {
    __m512i zeros = _mm512_mask_blend_epi8(bit8, look_up_256(lengths, low, bit7), look_up_256(lengths + 256, low, bit7));
    __m512i ones =
        _mm512_mask_blend_epi8(bit8, look_up_256(lengths + 512, low, bit7), look_up_256(lengths + 768, low, bit7));
    return _mm512_mask_blend_epi8(bit9, zeros, ones);
}

/* Lanes whose phrase is in T1, from those whose codeword is >= threshold. */
static inline __mmask64 second_table(measured *so_far, __mmask64 leads_to_second) {
    __mmask64 second = leads_to_second << 1 | so_far->carry;
    so_far->carry = leads_to_second >> 63;
    return second;
}

static inline void add_lengths(measured *so_far, __m512i lengths, __mmask64 ours) {
    so_far->unused |= _mm512_mask_testn_epi8_mask(ours, lengths, lengths);
    lengths = _mm512_maskz_mov_epi8(ours, lengths);
    so_far->sums = _mm512_add_epi64(so_far->sums, _mm512_sad_epu8(lengths, _mm512_setzero_si512()));
}

static inline __mmask64 lanes_below(uint64_t count) {
    return count < 64 ? (UINT64_C(1) << count) - 1 : ~UINT64_C(0);
}

static inline uint64_t measured_total(const measured *row) {
    return row->unused ? UINT64_MAX : (uint64_t)_mm512_reduce_add_epi64(row->sums);
}

static uint64_t measure_row_8(const codeword_source *source, uint32_t count, const uint8_t *lengths) {
    const uint8_t *bytes = source->array + source->first;
    const __m512i threshold = _mm512_set1_epi8((char)source->threshold);
    bool two = source->threshold < 256;
    measured row = {_mm512_setzero_si512(), 0, 0};
    for (uint32_t at = 0; at < count; at += 64) {
        __mmask64 ours = lanes_below(count - at);
        __m512i codewords = _mm512_maskz_loadu_epi8(ours, bytes + at);
        __mmask64 bit7 = _mm512_movepi8_mask(codewords);
        __m512i found = look_up_256(lengths, codewords, bit7);
        if (two) {
            __mmask64 second = second_table(&row, _mm512_cmpge_epu8_mask(codewords, threshold));
            found = _mm512_mask_blend_epi8(second, found, look_up_256(lengths + 256, codewords, bit7));
        }
        add_lengths(&row, found, ours);
    }
    return measured_total(&row);
}

/* The 64 bytes from bytes[skip] on, zero where they are not among the `available` ones. */
static inline __m512i load_available(const uint8_t *bytes, uint64_t skip, uint64_t available) {
    return available > skip ? _mm512_maskz_loadu_epi8(lanes_below(available - skip), bytes + skip)
                            : _mm512_setzero_si512();
}

static uint64_t measure_row_10(const codeword_source *source, uint32_t count, const uint8_t *lengths) {
    /* Eight bytes for each four codewords, which lie in five. */
    const __m512i pick =
        _mm512_add_epi8(_mm512_set1_epi64(0x0706050403020100),
                        _mm512_setr_epi64(0, 0x0505050505050505, 0x0A0A0A0A0A0A0A0A, 0x0F0F0F0F0F0F0F0F,
                                          0x1414141414141414, 0x1919191919191919, 0x1E1E1E1E1E1E1E1E,
                                          0x2323232323232323));
    /* The bits of the eight from which a byte is taken: 0, 10, 20, 30, then 7, 17, 27, 37. */
    const __m512i starts = _mm512_set1_epi64(0x251B11071E140A00);
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    const __m512i bit_1 = _mm512_set1_epi8(2), bit_2 = _mm512_set1_epi8(4), bits_1_2 = _mm512_set1_epi8(6);
    const __m512i threshold_low = _mm512_set1_epi8((char)source->threshold);
    const __m512i threshold_high = _mm512_set1_epi8((char)(source->threshold >> 8 << 1));
    bool two = source->threshold < 1024;
    /* Up to three codewords of the row before come along. */
    uint64_t lead = source->first % 4, end = count + lead;
    const uint8_t *bytes = source->array + (source->first - lead) / 4 * 5;
    __mmask64 ours = ~UINT64_C(0) << lead;
    measured row = {_mm512_setzero_si512(), 0, 0};
    for (uint64_t at = 0; at < end; at += 64, bytes += 80, ours = ~UINT64_C(0)) {
        uint64_t available = (uint64_t)(source->limit - bytes);
        ours &= lanes_below(end - at);
        __m512i first = _mm512_permutexvar_epi8(pick, load_available(bytes, 0, available));
        __m512i last = _mm512_permutexvar_epi8(pick, load_available(bytes, 40, available));
        first = _mm512_multishift_epi64_epi8(starts, first);
        last = _mm512_multishift_epi64_epi8(starts, last);
        __m512i low = _mm512_permutex2var_epi32(first, evens, last);
        __m512i high = _mm512_permutex2var_epi32(first, odds, last);
        __mmask64 bit7 = _mm512_movepi8_mask(low);
        __mmask64 bit8 = _mm512_test_epi8_mask(high, bit_1), bit9 = _mm512_test_epi8_mask(high, bit_2);
        __m512i found = look_up_1024(lengths, low, bit7, bit8, bit9);
        if (two) {
            high = _mm512_and_si512(high, bits_1_2);
            __mmask64 equal = _mm512_cmpeq_epi8_mask(high, threshold_high);
            __mmask64 above = _mm512_cmpgt_epu8_mask(high, threshold_high) |
                              _mm512_mask_cmpge_epu8_mask(equal, low, threshold_low);
            __mmask64 second = second_table(&row, above & ours);
            found = _mm512_mask_blend_epi8(second, found, look_up_1024(lengths + 1024, low, bit7, bit8, bit9));
        }
        add_lengths(&row, found, ours);
    }
    return measured_total(&row);
}

#endif
