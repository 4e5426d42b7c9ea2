// The walk of a warp along a row (spec 4.3, 4.4).
//
// In a step each lane takes up to SHARE codewords that follow each other, looks them up, and a scan over the warp of
// the phrases' lengths gives each lane the column where its first phrase starts. What to do with the phrases is the
// kernel's: it is called once a step, by all lanes, as
//
//     use(words, share, column)    words[k]: the phrase in the form of spec 3.3, for k < share (the same in all lanes)
//                                  column: of words[0]; each next one starts where the one before ends
//
// A phrase that is not there has length 0 and no non-zeros. Columns may lie behind the row's end, never before it;
// `use` has to cut them.
//
// -DCODECS: which codecs occur, as a set of bits: 1 raw, 2, 4, 8, 16 dictionaries of 8, 10, 12, 16 bits.
#pragma once
#include "frame.cuh"

constexpr u32 SHARE = 8;
constexpr u32 NONZEROS = 3, NO_POSITION = 127;
constexpr u32 STEP_NONZEROS = WARP * SHARE * NONZEROS;
constexpr u32 EMPTY_WORD = NO_POSITION << 7 | NO_POSITION << 14 | NO_POSITION << 21;

__device__ inline u32 word_length(u32 word) { return word & 127; }
__device__ inline u32 word_position(u32 word, u32 k) { return word >> (7 + 7 * k) & 127; }
__device__ inline bool word_negative(u32 word, u32 k) { return word >> (28 + k) & 1; }

// How many codewords (or bytes) each lane takes a step, so that all steps of a row are equally full.
__device__ inline u32 even_share(u32 count, u32 most) {
    u32 steps = (count + WARP * most - 1) / (WARP * most);
    return steps ? (count + WARP * steps - 1) / (WARP * steps) : 1;
}

template <int BITS, class Use>
__device__ inline void walk_codewords(const Matrix &matrix, const Row &row, const u32 *table, u32 lane, Use &use) {
    // Words of 32 bits that SHARE codewords can touch, from any bit on.
    constexpr u32 READ = (SHARE * BITS + 31) / 32 + (SHARE * BITS % 32 == 1 ? 0 : 1);
    const u32 threshold = matrix.thresholds[row.dictionary];
    const u32 *array = (const u32 *)(const void *)(matrix.frame + matrix.codewords_start);
    const u64 last = (matrix.frame_size - matrix.codewords_start) / 4 - 1;
    const u32 share = even_share(row.count, SHARE);
    u32 column = 0, carry = 0; // a row starts in T0, as after a codeword of 0
    for (u32 done = 0; done < row.count; done += WARP * share) {
        u32 begin = done + lane * share;
        u32 mine = begin < row.count ? smaller(share, row.count - begin) : 0;
        u64 bit = (row.first + smaller(begin, row.count)) * BITS;
        u32 raw[READ], words[SHARE], codewords[SHARE];
#pragma unroll
        for (u32 i = 0; i < READ; i++) {
            u64 word = (bit >> 5) + i;
            raw[i] = load<u32>(array + (word < last ? word : last));
        }
        u32 shift = (u32)bit & 31, latest = 0;
#pragma unroll
        for (u32 i = 0; i + 1 < READ; i++) {
            raw[i] = __funnelshift_r(raw[i], raw[i + 1], shift);
        }
        raw[READ - 1] >>= shift;
#pragma unroll
        for (u32 k = 0; k < SHARE; k++) {
            const u32 at = k * BITS / 32, from = k * BITS % 32;
            u32 next = at + 1 < READ ? raw[at + 1 < READ ? at + 1 : at] : 0;
            u32 value = from + BITS <= 32 ? raw[at] >> from : __funnelshift_r(raw[at], next, from);
            codewords[k] = value & ((1u << BITS) - 1);
            latest = k < share ? codewords[k] : latest;
        }
        // The table of a lane's first codeword depends on the last one of the lane before.
        u32 before = __shfl_up_sync(ALL_LANES, latest, 1);
        before = lane ? before : carry;
        carry = __shfl_sync(ALL_LANES, latest, WARP - 1);
        u32 length = 0;
#pragma unroll
        for (u32 k = 0; k < SHARE; k++) {
            words[k] = EMPTY_WORD;
            if (k < mine) {
                words[k] = table[(before >= threshold ? 1u << BITS : 0u) + codewords[k]];
                before = codewords[k];
            }
            length += word_length(words[k]);
        }
        u32 end = column + warp_scan(length, lane);
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
    const u32 share = even_share(count, SHARE / 2);
    for (u32 done = 0; done < count; done += WARP * share) {
        u32 begin = done + lane * share;
        u32 words[SHARE];
        u64 trit = (first_byte + begin) * 5;
        u32 column = trit < first ? 0 : begin < count ? (u32)(trit - first) : matrix.columns;
#pragma unroll
        for (u32 k = 0; k < SHARE / 2; k++) {
            words[2 * k] = words[2 * k + 1] = EMPTY_WORD;
            if (k < share && begin + k < count) {
                u32 byte = load<u8>(matrix.frame + matrix.codewords_start + first_byte + begin + k);
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

// A row by whatever codec the matrix has. `tables`: those of the matrix, as load_tables() left them.
template <class Use>
__device__ inline void walk_row(const Matrix &matrix, u32 row, const u32 *tables, u32 lane, Use &use) {
#if CODECS & 1
    if (matrix.codec == CODEC_RAW) {
        walk_raw(matrix, row, lane, use);
        return;
    }
#endif
    (void)tables;
#if CODECS & 30
    Row found = locate_row(matrix, row, lane);
#if TABLES_SHARED
    const u32 *table = tables + found.dictionary * table_words(matrix.bits);
#else
    const u32 *table = tables + matrix.tables[found.dictionary];
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

// Copy a matrix's dictionaries to shared memory, by the whole block; __syncthreads() has to follow.
// -DTABLES_SHARED=0 where they do not fit: then they are read where they lie, through the caches.
__device__ inline const u32 *load_tables(const Matrix &matrix, const u32 *all_tables, u8 *shared) {
#if TABLES_SHARED
    u32 words = matrix.dictionary_count ? table_words(matrix.bits) : 0;
    for (u32 d = 0; d < matrix.dictionary_count; d++) {
        const u32 *from = all_tables + matrix.tables[d];
        u8 *to = shared + (u64)d * words * 4;
        for (u32 i = threadIdx.x * 4; i < words; i += blockDim.x * 4) {
            store<uint4>(to + i * 4, load<uint4>(from + i));
        }
    }
    return (const u32 *)(const void *)shared;
#else
    (void)matrix;
    (void)shared;
    return all_tables;
#endif
}
