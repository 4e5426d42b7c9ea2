// The walk of a warp along a row (spec 4.3, 4.4).
//
// In a step each lane takes up to SHARE codewords that follow each other, looks them up, and a scan over the warp of
// the phrases' lengths gives each lane the column where its first phrase starts. What to do with the phrases is the
// kernel's: it is called once a step, by all lanes, as
//
//     use(words, share, column)    words[k]: the phrase in the form of spec 3.3, until NO_MORE(k) (the same in all lanes)
//                                  column: of words[0]; each next one starts where the one before ends
//
// A phrase that is not there has length 0 and no non-zeros. Columns may lie behind the row's end, never before it;
// `use` has to cut them.
//
// -DSHARE: codewords that a lane takes in a step at most
// -DTOGETHER: how many of them pass between two looks whether there are more: fewer looks, or less done in vain
// -DCODECS: which codecs occur, as a set of bits: 1 raw, 2, 4, 8, 16 dictionaries of 8, 10, 12, 16 bits.
#pragma once
#include "frame.cuh"

#ifndef SHARE
#define SHARE 8
#endif
#ifndef TOGETHER
#define TOGETHER 1
#endif
static_assert(SHARE % 2 == 0 && SHARE % TOGETHER == 0, "whole pairs and groups");

// Whether a loop over a lane's codewords can end before number k. Those of a group whose number is not below `share` are
// empty phrases.
#define NO_MORE(k) ((k) % TOGETHER == 0 && (k) >= share)
constexpr u32 NONZEROS = 3, NO_POSITION = 127, SIGNS = 28;
constexpr u32 STEP_NONZEROS = WARP * SHARE * NONZEROS;
constexpr u32 EMPTY_WORD = NO_POSITION << 7 | NO_POSITION << 14 | NO_POSITION << 21;

__device__ inline u32 word_length(u32 word) { return word & 127; }
__device__ inline u32 word_position(u32 word, u32 k) { return word >> (7 + 7 * k) & 127; }
__device__ inline bool word_negative(u32 word, u32 k) { return word >> (SIGNS + k) & 1; }

// How many codewords (or bytes) each lane takes in the next step, of so many that are left.
__device__ inline u32 next_share(u32 left, u32 most) { return smaller((left + WARP - 1) / WARP, most); }

// The dictionaries of a matrix. -DTABLES_SHARED=0 where they do not fit into shared memory: then they are read where
// they lie, through the caches.
#if TABLES_SHARED
typedef SharedAt Tables;

__device__ inline u32 look_up(Tables table, u32 codeword) { return shared_load<u32>(table + 4 * codeword); }
__device__ inline Tables later(Tables table, u32 words) { return table + 4 * words; }
#else
typedef const u32 *Tables;

__device__ inline u32 look_up(Tables table, u32 codeword) { return load_global<u32>(table + codeword); }
__device__ inline Tables later(Tables table, u32 words) { return table + words; }
#endif

template <int BITS, class Use>
__device__ inline void walk_codewords(const Matrix &matrix, const Row &row, Tables table, u32 lane, Use &use) {
    // A lane reads the codeword before its first one too, whose value says which table the first is looked up in; before
    // a frame's first codeword there are other bytes of the frame. READ words hold SHARE + 1 codewords, from any bit
    // where one can start on.
    constexpr u32 STARTS = BITS % 16 == 0 ? 16 : BITS % 8 == 0 ? 8 : BITS % 4 == 0 ? 4 : 2;
    constexpr u32 READ = ((SHARE + 1) * BITS + 32 - STARTS + 31) / 32;
    const u32 threshold = matrix.thresholds[row.dictionary];
    const Tables table_1 = BITS == 16 ? table : later(table, 1u << BITS); // those of 16 bits have T0 alone
    const u64 first_bit = (u64)row.first * BITS + 32 - BITS;               // in the words from the one before the codewords on
    const u32 first_word = (u32)(first_bit >> 5), row_bit = (u32)first_bit & 31;
    const u32 last = matrix.codewords_words - first_word; // of the frame
    const u8 *array = opaque(matrix.codewords - 4 + (u64)first_word * 4);
    u32 column = 0;
    for (u32 done = 0, share; done < row.count; done += WARP * share) {
        share = next_share(row.count - done, SHARE);
        const u32 begin = done + lane * share, bit = row_bit + begin * BITS;
        const u32 mine = begin < row.count ? smaller(share, row.count - begin) : 0;
        u32 raw[READ], length = 0;
#ifdef QMOE_HOST
        u32 words[SHARE] = {};
#else
        u32 words[SHARE]; // not written from NO_MORE on
#endif
#pragma unroll
        for (u32 i = 0; i < READ; i++) {
            raw[i] = load_global<u32>(array + (u64)smaller((bit >> 5) + i, last) * 4);
        }
#pragma unroll
        for (u32 i = 0; i + 1 < READ; i++) {
            raw[i] = __funnelshift_r(raw[i], raw[i + 1], bit & 31);
        }
        raw[READ - 1] >>= bit & 31;
        auto codeword = [&](u32 k) { // number k of the lane's, from the one before on
            const u32 at = k * BITS / 32, from = k * BITS % 32;
            const u32 next = at + 1 < READ ? raw[at + 1 < READ ? at + 1 : at] : 0;
            const u32 value = from + BITS <= 32 ? raw[at] >> from : __funnelshift_r(raw[at], next, from);
            return value & ((1u << BITS) - 1);
        };
        u32 before = begin ? codeword(0) : 0; // a row starts in T0, as after a codeword of 0
#pragma unroll
        for (u32 k = 0; k < SHARE; k++) {
            if (NO_MORE(k)) {
                break;
            }
            const u32 value = codeword(k + 1), word = look_up(before >= threshold ? table_1 : table, value);
            words[k] = k < mine ? word : EMPTY_WORD;
            before = value;
            length += word_length(words[k]);
        }
        const u32 end = column + warp_scan(length, lane);
        use(words, share, end - length);
        column = __shfl_sync(ALL_LANES, end, WARP - 1);
    }
}

// The word of three trits at most, given as base-3 digits; `count` of them count.
__device__ inline u32 word_of_digits(u32 digits, u32 count) {
    u32 word = EMPTY_WORD + count, k = 0;
#pragma unroll
    for (u32 position = 0; position < NONZEROS; position++) {
        u32 digit = digits % 3;
        digits /= 3;
        if (position < count && digit != 1) {
            word ^= (NO_POSITION ^ position) << (7 + 7 * k);
            word |= (digit == 0 ? 1u : 0u) << (28 + k);
            k++;
        }
    }
    return word;
}

// A byte of five trits becomes two phrases. Rows begin anywhere in a byte: its trits of the row before are left out.
template <class Use> __device__ inline void walk_raw(const Matrix &matrix, u32 row, u32 lane, Use &use) {
    const u64 first = (u64)row * matrix.columns, end = first + matrix.columns;
    const u64 first_byte = first / 5;
    const u32 count = matrix.columns ? (u32)((end + 4) / 5 - first_byte) : 0;
    for (u32 done = 0, share; done < count; done += WARP * share) {
        share = next_share(count - done, SHARE / 2);
        u32 begin = done + lane * share;
        u32 words[SHARE];
        u64 trit = (first_byte + begin) * 5;
        u32 column = trit < first ? 0 : begin < count ? (u32)(trit - first) : matrix.columns;
#pragma unroll
        for (u32 k = 0; k < SHARE / 2; k++) {
            words[2 * k] = words[2 * k + 1] = EMPTY_WORD;
            if (k < share && begin + k < count) {
                u32 byte = load_global<u8>(matrix.codewords + first_byte + begin + k);
                byte = byte < 243 ? byte : 121; // five zeros
                u32 length = 5;
                for (u64 before = trit + 5 * k; before < first; before++) {
                    byte /= 3;
                    length--;
                }
                words[2 * k] = word_of_digits(byte, smaller(length, 3));
                words[2 * k + 1] = word_of_digits(byte / 27, length < 3 ? 0 : length - 3);
            }
        }
        use(words, 2 * share, column);
    }
}

// A row by whatever codec the matrix has. `asked`: of this row; `tables`: those of the matrix, by open_tables().
template <class Use>
__device__ inline void walk_row(const Matrix &matrix, u32 row, const Asked &asked, Tables tables, u32 lane, Use &use) {
#if CODECS & 1
    if (matrix.codec == CODEC_RAW) {
        walk_raw(matrix, row, lane, use);
        return;
    }
#endif
    (void)tables;
    (void)asked;
#if CODECS & 30
    const Row found = locate_row(matrix, asked, row, lane);
#if TABLES_SHARED
    const Tables table = later(tables, found.dictionary * table_words(matrix.bits));
#else
    const Tables table = later(tables, matrix.tables[found.dictionary]);
#endif
    switch (matrix.bits) {
#if CODECS & 2
    case 8: walk_codewords<8>(matrix, found, table, lane, use); break;
#endif
#if CODECS & 4
    case 10: walk_codewords<10>(matrix, found, table, lane, use); break;
#endif
#if CODECS & 8
    case 12: walk_codewords<12>(matrix, found, table, lane, use); break;
#endif
#if CODECS & 16
    case 16: walk_codewords<16>(matrix, found, table, lane, use); break;
#endif
    }
#endif
}

// Ask for the bytes where rows from `row` on probably are, while the row index that says so is on its way. By one warp.
// -DPREFETCH=0: do not.
__device__ inline void prefetch_rows(const Matrix &matrix, u32 row, u32 lane) {
#if PREFETCH
    constexpr float BEFORE = 1024; // rows differ
    const float size = 4.0f * (float)matrix.codewords_words, guess = size * ((float)row / (float)matrix.rows) - BEFORE;
    const float at = (guess > 0 ? guess : 0) + 128.0f * (float)lane;
    if (row < matrix.rows && at < size) {
        prefetch(matrix.codewords + (u64)at);
    }
#else
    (void)matrix;
    (void)row;
    (void)lane;
#endif
}

// Copy a matrix's dictionaries to shared memory, by the whole block; __syncthreads() has to follow.
__device__ inline void load_tables(const Matrix &matrix, const u32 *all_tables, u8 *shared) {
#if TABLES_SHARED
    u32 words = matrix.dictionary_count ? table_words(matrix.bits) : 0;
    for (u32 d = 0; d < matrix.dictionary_count; d++) {
        const u32 *from = all_tables + matrix.tables[d];
        u8 *to = shared + (u64)d * words * 4;
        for (u32 i = threadIdx.x * 4; i < words; i += blockDim.x * 4) {
            store<uint4>(to + i * 4, load_global<uint4>(from + i));
        }
    }
#else
    (void)matrix;
    (void)all_tables;
    (void)shared;
#endif
}

// After load_tables() and the barrier.
__device__ inline Tables open_tables(const u32 *all_tables, const u8 *shared) {
#if TABLES_SHARED
    (void)all_tables;
    return shared_at(shared);
#else
    (void)shared;
    return all_tables;
#endif
}
