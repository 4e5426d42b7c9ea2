// Unpack matrices to trits or weights: a warp a row, through a window of the row in shared memory, so that the row
// leaves in vectors of 16 bytes, whatever the phrases' lengths.
//
// -DOUT_KIND: 0 float32, 1 bfloat16, 2 float16, 3 trits (int8)
// -DWARPS: rows at once in a block; -DRESIDENT: warps that a multiprocessor shall hold
#include "walk.cuh"

constexpr u32 WINDOW = 1024; // trits

struct WeightBits {
    u32 low, high;
};

__device__ inline u32 weight(u32 trit, const WeightBits &bits) {
    return trit == 0 ? 0 : trit == 1 ? bits.high : bits.low;
}

// Send the window's `count` trits to row[first …], and clear it.
__device__ inline void flush_window(u8 *window, u32 count, u8 *out, u64 first, bool vectors, const WeightBits &bits,
                                    u32 lane) {
    constexpr u32 SIZE = kind_size(OUT_KIND), VECTOR = 16 / SIZE;
    if (vectors) { // then count is a multiple of VECTOR
        for (u32 i = lane * VECTOR; i < count; i += WARP * VECTOR) {
            u32 packed[4] = {0, 0, 0, 0};
            if (SIZE == 1) {
                uint4 all = load<uint4>(window + i);
                packed[0] = all.x, packed[1] = all.y, packed[2] = all.z, packed[3] = all.w;
            } else {
#pragma unroll
                for (u32 k = 0; k < VECTOR; k += 4) {
                    u32 four = load<u32>(window + i + k);
#pragma unroll
                    for (u32 j = 0; j < 4; j++) {
                        u32 value = weight(four >> (8 * j) & 0xff, bits);
                        packed[(k + j) * SIZE / 4] |= value << (8 * ((k + j) * SIZE % 4));
                    }
                }
            }
            store<uint4>(out + (first + i) * SIZE, make_uint4(packed[0], packed[1], packed[2], packed[3]));
        }
    } else {
        for (u32 i = lane; i < count; i += WARP) {
            u32 trit = window[i];
            store_bits<OUT_KIND>(out, first + i, SIZE == 1 ? trit : weight(trit, bits));
        }
    }
    __syncwarp();
    for (u32 i = lane * 16; i < WINDOW; i += WARP * 16) {
        store<uint4>(window + i, make_uint4(0, 0, 0, 0));
    }
    __syncwarp();
}

// grid: x rows, y matrices, all of one shape; out [matrices][rows][columns].
extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT / WARPS)
    decode(const Matrix *matrices, const u32 *all_tables, u8 *out, u32 table_bytes) {
    DYNAMIC_SHARED(shared);
    __shared__ Matrix matrix;
    load_descriptor(matrix, matrices[blockIdx.y]);
    __syncthreads();
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, step = gridDim.x * WARPS;
    u32 row = blockIdx.x * WARPS + warp;
    Asked next = ask_row(matrix, row, lane);
    load_tables(matrix, all_tables, shared);
    u8 *window = shared + table_bytes + warp * WINDOW;
    for (u32 i = lane * 16; i < WINDOW; i += WARP * 16) {
        store<uint4>(window + i, make_uint4(0, 0, 0, 0));
    }
    __syncthreads();
    const Tables tables = open_tables(all_tables, shared);
    out += (u64)blockIdx.y * matrix.rows * matrix.columns * kind_size(OUT_KIND);
    const bool vectors = ((u64)matrix.columns * kind_size(OUT_KIND)) % 16 == 0 && (u64)(size_t)out % 16 == 0;
    for (; row < matrix.rows; row += step) {
        const Asked asked = next;
        next = ask_row(matrix, row + step, lane);
        WeightBits bits = {0, 0};
        if (OUT_KIND != TRITS) {
            Levels levels = row_levels(matrix, row);
            bits.low = from_float<OUT_KIND == TRITS ? FLOAT32 : OUT_KIND>(levels.low);
            bits.high = from_float<OUT_KIND == TRITS ? FLOAT32 : OUT_KIND>(levels.high);
        }
        const u64 first = (u64)row * matrix.columns;
        u32 start = 0; // the window's first column
        auto scatter = [&](const u32(&words)[SHARE], u32 share, u32 column) {
            u32 end = column;
#pragma unroll
            for (u32 k = 0; k < SHARE; k++) {
                if (NO_MORE(k)) {
                    break;
                }
                end += word_length(words[k]);
            }
            end = smaller(__shfl_sync(ALL_LANES, end, WARP - 1), matrix.columns);
            for (;;) {
                u32 at = column;
#pragma unroll
                for (u32 k = 0; k < SHARE; k++) {
                    if (NO_MORE(k)) {
                        break;
                    }
#pragma unroll
                    for (u32 n = 0; n < NONZEROS; n++) {
                        u32 position = word_position(words[k], n);
                        u32 place = at + position;
                        if (position != NO_POSITION && place < matrix.columns && place - start < WINDOW) {
                            window[place - start] = word_negative(words[k], n) ? 0xff : 1;
                        }
                    }
                    at += word_length(words[k]);
                }
                if (end - start < WINDOW) { // what follows may still fall into this window
                    break;
                }
                __syncwarp();
                flush_window(window, WINDOW, out, first + start, vectors, bits, lane);
                start += WINDOW;
            }
        };
        walk_row(matrix, row, asked, tables, lane, scatter);
        __syncwarp();
        while (start < matrix.columns) {
            flush_window(window, smaller(WINDOW, matrix.columns - start), out, first + start, vectors, bits, lane);
            start += WINDOW;
        }
    }
}
