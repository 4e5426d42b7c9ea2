// A packed row times a tile of tokens, by one warp. The row is never unpacked.
//
// x lies in shared memory as [column][token], in its own dtype, with zeros for NO_POSITION + 1 columns
// behind the last, so that a phrase that reaches past the row's end adds nothing; no address needs a check of its own.
//
// One token: each lane gathers the x of its own phrases' non-zeros into two accumulators, by sign; the two levels are
// applied once a row.
// More: the non-zeros of a step become a list of columns in shared memory, with the sign on top; then the lanes share it
// out, each loading 16 bytes of x (up to eight tokens) for a non-zero.
//
// -DX_KIND: dtype of x: 0 float32, 1 bfloat16, 2 float16
// -DX_SHARED=0: x does not fit into shared memory and is read where it lies, through the caches
#pragma once
#include "walk.cuh"

constexpr u32 X_SIZE = kind_size(X_KIND);
constexpr u32 X_ROOM = NO_POSITION + 1; // columns of zeros behind the last

constexpr u32 LIST_BYTES = 4 * STEP_NONZEROS; // of a warp, for more than one token
constexpr u32 NEGATIVE = 1u << 31;            // of an entry; columns are at most 2^24 + 127

// The tokens of a tile: number `t` is row tokens[t] of x [..., columns]; those not there have number NO_TOKEN.
constexpr u32 NO_TOKEN = 0xffffffffu;

struct Tile {
    const u8 *x;     // in global memory
    SharedAt staged; // in shared memory, once it is there
    const u32 *tokens;
    u32 columns;
};

__device__ inline u32 token_bits(const Tile &tile, u32 token, u32 column) {
    u32 number = tile.tokens[token];
    return number == NO_TOKEN || column >= tile.columns
               ? 0
               : load_bits<X_KIND>(tile.x, (u64)number * tile.columns + column);
}

// How a tile of TILE tokens is loaded: PARTS lanes load a column, WORDS words of 32 bits each, of EACH tokens.
template <u32 TILE> struct Shape {
    static constexpr u32 BYTES = TILE * X_SIZE;
    static constexpr u32 VECTOR = BYTES < 16 ? BYTES : 16;
    static constexpr u32 PARTS = BYTES / VECTOR;
    static constexpr u32 WORDS = VECTOR < 4 ? 1 : VECTOR / 4;
    static constexpr u32 EACH = VECTOR / X_SIZE;
    static constexpr u32 GROUPS = WARP / PARTS;
};

// One vector of a staged column: 4, 8 or 16 bytes.
template <u32 TILE> __device__ inline void store_vector(u8 *to, const u32 (&words)[Shape<TILE>::WORDS]) {
    using S = Shape<TILE>;
    if (S::WORDS == 4) {
        store<uint4>(to, make_uint4(words[0], words[1 % S::WORDS], words[2 % S::WORDS], words[3 % S::WORDS]));
    } else if (S::WORDS == 2) {
        store<uint2>(to, make_uint2(words[0], words[1 % S::WORDS]));
    } else {
        store<u32>(to, words[0]);
    }
}

// One token as it is, 16 bytes at once.
__device__ inline void stage_token(const Tile &tile, u8 *staged) {
    const u32 size = tile.columns * X_SIZE;
    const u8 *from = tile.x + (u64)tile.tokens[0] * size;
    for (u32 i = threadIdx.x * 16; i < size + X_ROOM * X_SIZE; i += blockDim.x * 16) {
        store<uint4>(staged + i, i < size ? load<uint4>(from + i) : make_uint4(0, 0, 0, 0));
    }
}

// Two columns at once, of 16-bit numbers.
template <u32 TILE> __device__ inline void stage_pairs(const Tile &tile, u8 *staged) {
    using S = Shape<TILE>;
    const u32 vectors = (tile.columns + X_ROOM) / 2 * S::PARTS;
    for (u32 i = threadIdx.x; i < vectors; i += blockDim.x) {
        const u32 column = i / S::PARTS * 2, part = i % S::PARTS;
        u32 left[S::WORDS], right[S::WORDS];
#pragma unroll
        for (u32 w = 0; w < S::WORDS; w++) {
            u32 pairs[2];
#pragma unroll
            for (u32 k = 0; k < 2; k++) {
                const u32 number = tile.tokens[part * S::EACH + 2 * w + k];
                pairs[k] = number == NO_TOKEN || column >= tile.columns
                               ? 0
                               : load<u32>(tile.x + 2 * ((u64)number * tile.columns + column));
            }
            left[w] = (pairs[0] & 0xffff) | pairs[1] << 16;
            right[w] = pairs[0] >> 16 | (pairs[1] & 0xffff0000);
        }
        u8 *to = staged + ((u64)column * S::PARTS + part) * S::VECTOR;
        store_vector<TILE>(to, left);
        store_vector<TILE>(to + S::BYTES, right);
    }
}

// Bring a tile's x to shared memory, by the whole block; __syncthreads() has to follow.
template <u32 TILE> __device__ inline void stage_tile(const Tile &tile, u8 *staged) {
#if X_SHARED
    using S = Shape<TILE>;
    const u64 at = (u64)(size_t)tile.x;
    if constexpr (TILE == 1) {
        if (at % 16 == 0 && tile.columns * X_SIZE % 16 == 0 && tile.tokens[0] != NO_TOKEN) {
            stage_token(tile, staged);
            return;
        }
    } else if constexpr (X_SIZE == 2) {
        if (at % 4 == 0 && tile.columns % 2 == 0) {
            stage_pairs<TILE>(tile, staged);
            return;
        }
    }
    const u32 vectors = (tile.columns + X_ROOM) * S::PARTS;
    for (u32 i = threadIdx.x; i < vectors; i += blockDim.x) {
        const u32 column = i / S::PARTS, first = i % S::PARTS * S::EACH;
        u8 *to = staged + (u64)i * S::VECTOR;
        if constexpr (S::VECTOR == 2) {
            store<u16>(to, (u16)token_bits(tile, 0, column));
        } else {
            u32 words[S::WORDS];
#pragma unroll
            for (u32 w = 0; w < S::WORDS; w++) {
                words[w] = X_SIZE == 4 ? token_bits(tile, first + w, column)
                                       : token_bits(tile, first + 2 * w, column) |
                                             token_bits(tile, first + 2 * w + 1, column) << 16;
            }
            store_vector<TILE>(to, words);
        }
    }
#else
    (void)tile;
    (void)staged;
#endif
}

// The only token's x where a phrase that starts at column `start` has its non-zero `n`, or zero if it has none.
__device__ inline float load_token(const Tile &tile, u32 start, u32 word, u32 n) {
#if X_SHARED
    // The position as bytes, by one shift.
    constexpr u32 SHIFT = X_SIZE == 4 ? 2 : 1;
    const u32 offset = word >> (7 + 7 * n - SHIFT) & (NO_POSITION << SHIFT);
    const SharedAt from = tile.staged + start * X_SIZE + offset;
    return to_float<X_KIND>(X_SIZE == 4 ? shared_load_if<u32>(from, offset, NO_POSITION << SHIFT)
                                        : shared_load_if<u16>(from, offset, NO_POSITION << SHIFT));
#else
    const u32 position = word_position(word, n);
    return to_float<X_KIND>(position == NO_POSITION ? 0 : token_bits(tile, 0, start + position));
#endif
}

// Tokens part * EACH … of a column, as floats.
template <u32 TILE> __device__ inline void load_tokens(const Tile &tile, u32 column, u32 part, float *values) {
    using S = Shape<TILE>;
#if X_SHARED
    const SharedAt from = tile.staged + (column * S::PARTS + part) * S::VECTOR;
    u32 words[4];
    if (S::WORDS == 4) {
        uint4 all = shared_load<uint4>(from);
        words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    } else if (S::WORDS == 2) {
        uint2 all = shared_load<uint2>(from);
        words[0] = all.x, words[1] = all.y;
    } else {
        words[0] = shared_load<u32>(from);
    }
#pragma unroll
    for (u32 t = 0; t < S::EACH; t++) {
        values[t] = to_float<X_KIND>(X_SIZE == 4 ? words[t] : words[t / 2] >> (t % 2 * 16) & 0xffff);
    }
#else
#pragma unroll
    for (u32 t = 0; t < S::EACH; t++) {
        values[t] = to_float<X_KIND>(token_bits(tile, part * S::EACH + t, column));
    }
#endif
}

// Sum of values[0 … COUNT - 1] over the lanes whose number differs in the bits from STEP up. Halving: each exchange
// leaves a lane with half of the values; `kept` says which one is left at the end.
template <u32 COUNT, u32 STEP> __device__ inline float spread_sum(float *values, u32 lane, u32 &kept) {
    kept = 0;
    u32 count = COUNT;
#pragma unroll
    for (u32 distance = WARP / 2; distance >= STEP && distance; distance /= 2) {
        if (count > 1) {
            bool upper = lane & distance;
            count /= 2;
            kept += upper ? count : 0;
#pragma unroll
            for (u32 i = 0; i < COUNT / 2; i++) {
                if (i < count) {
                    float mine = upper ? values[i + count] : values[i];
                    float other = upper ? values[i] : values[i + count];
                    values[i] = mine + __shfl_xor_sync(ALL_LANES, other, distance);
                }
            }
        } else {
            values[0] += __shfl_xor_sync(ALL_LANES, values[0], distance);
        }
    }
    return values[0];
}

// What a lane has at the end of a row: the output of one token, and whether it is the one to store it.
struct Product {
    float value;
    u32 token;
    bool stores;
};

template <u32 TILE> struct Multiplication;

// ---- one token ----

template <> struct Multiplication<1> {
    static __device__ inline Product row(const Matrix &matrix, u32 row, const Asked &asked, Tables tables,
                                         const Tile &tile, SharedAt list, u32 lane) {
        (void)list;
        float low = 0.0f, high = 0.0f;
        auto gather = [&](const u32(&words)[SHARE], u32 share, u32 column) {
#pragma unroll
            for (u32 k = 0; k < SHARE; k++) {
                if (NO_MORE(k)) {
                    return;
                }
                const u32 start = smaller(column, tile.columns); // then start + position lies in x and the zeros behind
#pragma unroll
                for (u32 n = 0; n < NONZEROS; n++) {
                    add_by_bit(low, high, load_token(tile, start, words[k], n), words[k], SIGNS + n);
                }
                column += word_length(words[k]);
            }
        };
        walk_row(matrix, row, asked, tables, lane, gather);
        Levels levels = row_levels(matrix, row);
        return {warp_sum(levels.high * high + levels.low * low), 0, lane == 0};
    }
};

// ---- more tokens ----

template <u32 TILE> struct Multiplication {
    static __device__ inline Product row(const Matrix &matrix, u32 row, const Asked &asked, Tables tables,
                                         const Tile &tile, SharedAt list, u32 lane) {
        using S = Shape<TILE>;
        const u32 part = lane % S::PARTS, group = lane / S::PARTS;
        const Levels levels = row_levels(matrix, row);
        float sums[S::EACH];
#pragma unroll
        for (u32 t = 0; t < S::EACH; t++) {
            sums[t] = 0.0f;
        }
        auto add_list = [&](const u32(&words)[SHARE], u32 share, u32 column) {
            u32 count = 0;
#pragma unroll
            for (u32 k = 0; k < SHARE; k++) {
                if (NO_MORE(k)) {
                    break;
                }
#pragma unroll
                for (u32 n = 0; n < NONZEROS; n++) {
                    count += word_position(words[k], n) != NO_POSITION ? 1 : 0;
                }
            }
            const u32 end = warp_scan(count, lane), total = __shfl_sync(ALL_LANES, end, WARP - 1);
            SharedAt next = list + 4 * (end - count);
#pragma unroll
            for (u32 k = 0; k < SHARE; k++) {
                if (NO_MORE(k)) {
                    break;
                }
                const u32 start = smaller(column, tile.columns);
#pragma unroll
                for (u32 n = 0; n < NONZEROS; n++) {
                    const u32 position = word_position(words[k], n), sign = words[k] << (31 - SIGNS - n) & NEGATIVE;
                    shared_store_if(next, position, NO_POSITION, (start + position) | sign);
                    next += position != NO_POSITION ? 4 : 0;
                }
                column += word_length(words[k]);
            }
            __syncwarp();
#pragma unroll 2
            for (u32 i = group; i < total; i += S::GROUPS) {
                const u32 entry = shared_load_now(list + 4 * i);
                const float weight = entry & NEGATIVE ? levels.low : levels.high;
                float values[S::EACH];
                load_tokens<TILE>(tile, entry & ~NEGATIVE, part, values);
#pragma unroll
                for (u32 t = 0; t < S::EACH; t++) {
                    sums[t] += weight * values[t];
                }
            }
            __syncwarp();
        };
        walk_row(matrix, row, asked, tables, lane, add_list);
        u32 kept;
        float value = spread_sum<S::EACH, S::PARTS>(sums, lane, kept);
        // Of the lanes of a part, EACH have a token each; the bits below those that chose it are zero in one of them.
        constexpr u32 REST = S::GROUPS / S::EACH;
        return {value, part * S::EACH + kept, group % REST == 0};
    }
};
