// Matrix frames where they lie (spec 4): a descriptor of each, its levels, and where a row's codewords are.
//
// A descriptor is made on the host from a checked header and is trusted. The frame's body is not: whatever it holds,
// nothing is read outside the frame and no loop runs longer than the descriptor allows.
#pragma once
#include "common.cuh"

constexpr u32 CODEC_RAW = 0;
constexpr u32 LEVELS_FLOAT32 = 0, LEVELS_BFLOAT16 = 1, LEVELS_FLOAT16 = 2;
constexpr u32 LEVELS_START = 64, BLOCK_ROWS = 32, DICTIONARIES = 4;

struct alignas(16) Matrix {     // 128 bytes; descriptors.py has the same
    const u8 *frame;            // a multiple of 16
    u64 row_index_start, counts_start, selectors_start, codewords_start, frame_size;
    u32 rows, columns;
    u32 codec, bits;
    u32 level_format;
    i32 level_exponent;
    u32 count_bits, count_minimum, codeword_count;
    u32 selector_bits, dictionary_count;
    u32 thresholds[DICTIONARIES];
    u32 tables[DICTIONARIES];   // where each dictionary's words start in the array of all tables
    u32 unused;
};
static_assert(sizeof(Matrix) == 128, "descriptors.py has another size");

// Bring a descriptor to shared memory, by the whole block; __syncthreads() has to follow. A copy in registers would be
// indexed by a row's dictionary, and so end in local memory.
__device__ inline void load_descriptor(Matrix &shared, const Matrix &matrix) {
    if (threadIdx.x < sizeof(Matrix) / 16) {
        store<uint4>((u8 *)&shared + threadIdx.x * 16, load<uint4>((const u8 *)&matrix + threadIdx.x * 16));
    }
}

// Words of one dictionary in the array of all tables: T0, then T1. Those of 16 bits have T0 alone.
__device__ inline u32 table_words(u32 bits) { return bits == 16 ? 1u << 16 : 2u << bits; }

// Element of a packed array that starts at a multiple of 4 and has 4 readable bytes behind it; width <= 24.
__device__ inline u32 packed_element(const u8 *array, u32 index, u32 width) {
    if (width == 0) {
        return 0;
    }
    u64 bit = (u64)index * width;
    const u8 *word = array + (bit >> 5) * 4;
    return __funnelshift_r(load<u32>(word), load<u32>(word + 4), (u32)bit & 31) & ((1u << width) - 1);
}

struct Levels {
    float low, high;
};

// Magnitude of an e4m4 byte: always a normal float, or zero.
__device__ inline float from_e4m4(u32 byte, i32 exponent) {
    return byte ? __uint_as_float((u32)((i32)(byte >> 4) + exponent + 127) << 23 | (byte & 15) << 19) : 0.0f;
}

__device__ inline Levels row_levels(const Matrix &matrix, u32 row) {
    const u8 *levels = matrix.frame + LEVELS_START;
    if (matrix.level_format == LEVELS_FLOAT32) {
        uint2 pair = load<uint2>(levels + (u64)row * 8);
        return {__uint_as_float(pair.x), __uint_as_float(pair.y)};
    }
    if (matrix.level_format == LEVELS_BFLOAT16) {
        u32 pair = load<u32>(levels + (u64)row * 4);
        return {bfloat16_to_float(pair & 0xffff), bfloat16_to_float(pair >> 16)};
    }
    if (matrix.level_format == LEVELS_FLOAT16) {
        u32 pair = load<u32>(levels + (u64)row * 4);
        return {float16_to_float(pair & 0xffff), float16_to_float(pair >> 16)};
    }
    u32 pair = load<u16>(levels + (u64)row * 2);
    return {0.0f - from_e4m4(pair & 0xff, matrix.level_exponent), from_e4m4(pair >> 8, matrix.level_exponent)};
}

struct Row {
    u64 first;              // number of its first codeword
    u32 count, dictionary;
};

// Where a row's codewords are, by one warp. All of the block's counts are read at once, a lane each.
__device__ inline Row locate_row(const Matrix &matrix, u32 row, u32 lane) {
    u32 block = row / BLOCK_ROWS, other = block * BLOCK_ROWS + lane, count = 0;
    if (other < matrix.rows) {
        count = matrix.count_minimum +
                packed_element(matrix.frame + matrix.counts_start, other, matrix.count_bits);
    }
    Row found;
    found.first = (u64)load<u32>(matrix.frame + matrix.row_index_start + (u64)block * 4) +
                  warp_sum(other < row ? count : 0u);
    found.count = __shfl_sync(ALL_LANES, count, row % BLOCK_ROWS);
    u32 selector = packed_element(matrix.frame + matrix.selectors_start, row, matrix.selector_bits);
    found.dictionary = selector < matrix.dictionary_count ? selector : 0;
    // The bytes may have changed since they were checked: never walk past the codewords, nor for ever.
    if (found.count > matrix.columns || found.first > matrix.codeword_count ||
        found.count > matrix.codeword_count - found.first) {
        found.count = 0;
    }
    return found;
}
