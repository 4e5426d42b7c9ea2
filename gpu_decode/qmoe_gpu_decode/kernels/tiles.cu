// y [tokens][rows] = x [tokens][columns] times a packed matrix, transposed, by tensor cores, for more tokens than
// `matmul` is made for: a block unpacks 16 rows to shared memory as trits, a warp a row, and multiplies them with 32
// tokens; then each warp has the sum over its columns, and the sums are added up.
//
// Weights are rounded to the dtype of x, as where a matrix is unpacked for cuBLAS.
//
// -DX_KIND: dtype of x and y: 1 bfloat16, 2 float16
// -DPREFETCH: see walk.cuh
#include "walk.cuh"

constexpr u32 ROWS = 16, TILE = 32, PARTS = TILE / 8, DEPTH = 16; // of an mma: 16 rows, 8 tokens, 16 columns

struct Operands {
    u32 a[4], b[2]; // pairs of 16-bit floats, in the order of mma.m16n8k16 (PTX ISA, "Matrix fragments")
};

__device__ inline void multiply_accumulate(float (&sums)[4], const Operands &in) {
#ifdef QMOE_HOST
    u32 all[6][WARP];
    for (u32 i = 0; i < 6; i++) {
        for (u32 lane = 0; lane < WARP; lane++) {
            all[i][lane] = __shfl_sync(ALL_LANES, i < 4 ? in.a[i] : in.b[i - 4], lane);
        }
    }
    for (u32 i = 0; i < 4; i++) {
        const u32 row = shim_lane() / 4 + i / 2 * 8, token = shim_lane() % 4 * 2 + i % 2;
        for (u32 k = 0; k < DEPTH; k++) {
            const u32 shift = k % 2 * 16, pair = k % 8 / 2;
            const u32 a = all[row / 8 + k / 8 * 2][row % 8 * 4 + pair], b = all[4 + k / 8][token * 4 + pair];
            sums[i] += to_float<X_KIND>(a >> shift & 0xffff) * to_float<X_KIND>(b >> shift & 0xffff);
        }
    }
#else
#if X_KIND == 1
#define QMOE_MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
#define QMOE_MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
    asm volatile(QMOE_MMA "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(in.a[0]), "r"(in.a[1]), "r"(in.a[2]), "r"(in.a[3]), "r"(in.b[0]), "r"(in.b[1]));
#endif
}

// Two columns of a token, from an even one on; zeros where there are none.
__device__ inline u32 load_pair(const u8 *x, u32 token, u32 tokens, u32 column, u32 columns, bool whole) {
    if (token >= tokens || column >= columns) {
        return 0;
    }
    const u64 at = (u64)token * columns + column;
    if (whole) {
        return load<u32>(x + 2 * at);
    }
    return load<u16>(x + 2 * at) | (column + 1 < columns ? (u32)load<u16>(x + 2 * at + 2) << 16 : 0);
}

// grid: x blocks of 16 rows; y blocks that share out the tiles of tokens. 16 warps. shared: tables; 16 rows of `pitch`
// trits; sums [warp][row][token].
extern "C" __global__ void __launch_bounds__(ROWS * WARP, 1)
    tiles(const __grid_constant__ Matrix matrix, const u32 *all_tables, const u8 *x, u8 *y, u32 tokens, u32 table_bytes,
          u32 pitch) {
    DYNAMIC_SHARED(shared);
    __shared__ u32 level_bits[ROWS][2];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, row = blockIdx.x * ROWS + warp;
    const Asked asked = ask_row(matrix, row, lane);
    if (warp == 0) {
        prefetch_rows(matrix, row, lane);
    }
    load_tables(matrix, all_tables, shared);
    u8 *trits = shared + table_bytes;
    for (u32 i = threadIdx.x * 16; i < ROWS * pitch; i += blockDim.x * 16) {
        store<uint4>(trits + i, make_uint4(0, 0, 0, 0));
    }
    __syncthreads();
    const Tables tables = open_tables(all_tables, shared);
    if (row < matrix.rows) {
        u8 *mine = trits + warp * pitch;
        auto scatter = [&](const u32(&words)[SHARE], u32 share, u32 column) {
#pragma unroll
            for (u32 k = 0; k < SHARE; k++) {
                if (NO_MORE(k)) {
                    return;
                }
#pragma unroll
                for (u32 n = 0; n < NONZEROS; n++) {
                    const u32 position = word_position(words[k], n), place = column + position;
                    if (position != NO_POSITION && place < matrix.columns) {
                        mine[place] = word_negative(words[k], n) ? 2 : 1;
                    }
                }
                column += word_length(words[k]);
            }
        };
        walk_row(matrix, row, asked, tables, lane, scatter);
        if (lane == 0) {
            const Levels levels = row_levels(matrix, row);
            level_bits[warp][0] = from_float<X_KIND>(levels.high);
            level_bits[warp][1] = from_float<X_KIND>(levels.low);
        }
    }
    __syncthreads();
    const u32 group = lane / 4, pair = lane % 4 * 2;
    const bool whole = matrix.columns % 2 == 0 && (u64)(size_t)x % 4 == 0;
    float *partial = (float *)(void *)(trits + ROWS * pitch);
    for (u32 first = blockIdx.y * TILE; first < tokens; first += gridDim.y * TILE) {
        float sums[PARTS][4];
#pragma unroll
        for (u32 p = 0; p < PARTS; p++) {
            sums[p][0] = sums[p][1] = sums[p][2] = sums[p][3] = 0.0f;
        }
        for (u32 start = warp * DEPTH; start < matrix.columns; start += ROWS * DEPTH) {
            Operands in;
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 place = group + i % 2 * 8, two = load<u16>(trits + place * pitch + start + pair + i / 2 * 8);
                const u32 left = two & 0xff, right = two >> 8;
                in.a[i] = (left ? level_bits[place][left - 1] : 0) | (right ? level_bits[place][right - 1] : 0) << 16;
            }
#pragma unroll
            for (u32 p = 0; p < PARTS; p++) {
                const u32 token = first + p * 8 + group;
                in.b[0] = load_pair(x, token, tokens, start + pair, matrix.columns, whole);
                in.b[1] = load_pair(x, token, tokens, start + pair + 8, matrix.columns, whole);
                multiply_accumulate(sums[p], in);
            }
        }
#pragma unroll
        for (u32 p = 0; p < PARTS; p++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                partial[(warp * ROWS + group + i / 2 * 8) * TILE + p * 8 + pair + i % 2] = sums[p][i];
            }
        }
        __syncthreads();
        const u32 token = threadIdx.x / ROWS, out = threadIdx.x % ROWS; // 512 threads, as many sums
        float sum = 0.0f;
        for (u32 w = 0; w < ROWS; w++) {
            sum += partial[(w * ROWS + out) * TILE + token];
        }
        if (first + token < tokens && blockIdx.x * ROWS + out < matrix.rows) {
            store_bits<X_KIND>(y, (u64)(first + token) * matrix.rows + blockIdx.x * ROWS + out, from_float<X_KIND>(sum));
        }
        __syncthreads();
    }
}
