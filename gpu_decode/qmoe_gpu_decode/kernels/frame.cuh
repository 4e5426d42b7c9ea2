// Matrix frames where they lie (spec 4): a descriptor of each, its levels, and where a row's codewords are.
//
// A descriptor is made on the host from a checked header and is trusted. The frame's body is not: whatever it holds,
// nothing is read outside the frame and no loop runs longer than the descriptor allows.
#pragma once
#include "common.cuh"

constexpr u32 CODEC_RAW = 0;
constexpr u32 LEVELS_FLOAT32 = 0, LEVELS_BFLOAT16 = 1, LEVELS_FLOAT16 = 2;
constexpr u32 BLOCK_ROWS = 32, DICTIONARIES = 4;

struct alignas(16) Matrix {     // 128 bytes; matrices.py has the same
    const u8 *levels, *bases, *counts, *selectors, *codewords; // where they lie; bases, codewords: multiples of 16
    u32 codewords_words;        // of 32 bits, from `codewords` to the end of the frame
    u32 rows, columns;
    u32 codec, bits;
    u32 level_format;
    i32 level_exponent;
    u32 count_bits, count_minimum, codeword_count;
    u32 selector_bits, dictionary_count;
    u32 thresholds[DICTIONARIES];
    u32 tables[DICTIONARIES];   // where each dictionary's words start in the array of all tables
    u32 unused[2];
};
static_assert(sizeof(Matrix) == 128, "matrices.py has another size");

// Bring a descriptor to shared memory, by the whole block; __syncthreads() has to follow. A copy in registers would be
// indexed by a row's dictionary, and so end in local memory.
__device__ inline void load_descriptor(Matrix &shared, const Matrix &matrix) {
    if (threadIdx.x < sizeof(Matrix) / 16) {
        store<uint4>((u8 *)&shared + threadIdx.x * 16, load_global<uint4>((const u8 *)&matrix + threadIdx.x * 16));
    }
}

// Words of one dictionary in the array of all tables: T0, then T1. Those of 16 bits have T0 alone.
__device__ inline u32 table_words(u32 bits) { return bits == 16 ? 1u << 16 : 2u << bits; }

// Element of a packed array that starts at a multiple of 4 and has 4 readable bytes behind it; width <= 24.
__device__ inline u32 packed_element(const u8 *array, u32 index, u32 width) {
    if (width == 0) {
        return 0;
    }
    const u32 bit = index * width; // rows are at most 2^24
    const u8 *word = array + (u64)(bit >> 5) * 4;
    return __funnelshift_r(load_global<u32>(word), load_global<u32>(word + 4), bit & 31) & ((1u << width) - 1);
}

struct Levels {
    float low, high;
};

// Magnitude of an e4m4 byte: always a normal float, or zero.
__device__ inline float from_e4m4(u32 byte, i32 exponent) {
    return byte ? __uint_as_float((u32)((i32)(byte >> 4) + exponent + 127) << 23 | (byte & 15) << 19) : 0.0f;
}

__device__ inline Levels row_levels(const Matrix &matrix, u32 row) {
    const u8 *levels = matrix.levels;
    if (matrix.level_format == LEVELS_FLOAT32) {
        uint2 pair = load_global<uint2>(levels + (u64)row * 8);
        return {__uint_as_float(pair.x), __uint_as_float(pair.y)};
    }
    if (matrix.level_format == LEVELS_BFLOAT16) {
        u32 pair = load_global<u32>(levels + (u64)row * 4);
        return {bfloat16_to_float(pair & 0xffff), bfloat16_to_float(pair >> 16)};
    }
    if (matrix.level_format == LEVELS_FLOAT16) {
        u32 pair = load_global<u32>(levels + (u64)row * 4);
        return {float16_to_float(pair & 0xffff), float16_to_float(pair >> 16)};
    }
    u32 pair = load_global<u16>(levels + (u64)row * 2);
    return {0.0f - from_e4m4(pair & 0xff, matrix.level_exponent), from_e4m4(pair >> 8, matrix.level_exponent)};
}

// What a warp reads of the row index for a row: asked for long before it is needed, to wait for memory but once.
struct Asked {
    u32 base, count, selector; // of the block's first row; of the lane's row in the block; of the row
};

__device__ inline Asked ask_row(const Matrix &matrix, u32 row, u32 lane) {
    const u32 block = row / BLOCK_ROWS, other = block * BLOCK_ROWS + lane;
    Asked asked = {0, 0, 0};
    if (matrix.codec == CODEC_RAW) { // which has none
        return asked;
    }
    if (row < matrix.rows) {
        asked.base = load_global<u32>(matrix.bases + (u64)block * 4);
        asked.selector = packed_element(matrix.selectors, row, matrix.selector_bits);
    }
    if (other < matrix.rows) {
        asked.count = matrix.count_minimum + packed_element(matrix.counts, other, matrix.count_bits);
    }
    return asked;
}

struct Row {
    u32 first, count, dictionary; // number of its first codeword; how many
};

// Where a row's codewords are, by one warp: each lane has the count of one row of the block.
__device__ inline Row locate_row(const Matrix &matrix, const Asked &asked, u32 row, u32 lane) {
    const u32 in_block = row % BLOCK_ROWS;
    const u64 first = (u64)asked.base + warp_sum(lane < in_block ? asked.count : 0u);
    Row found;
    found.first = (u32)first;
    found.count = __shfl_sync(ALL_LANES, asked.count, in_block);
    found.dictionary = asked.selector < matrix.dictionary_count ? asked.selector : 0;
    // The bytes may have changed since they were checked: never walk past the codewords, nor for ever.
    if (found.count > matrix.columns || first + found.count > matrix.codeword_count) {
        found.first = found.count = 0;
    }
    return found;
}
