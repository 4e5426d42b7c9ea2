// y [tokens][rows] = x [tokens][columns] times a packed matrix, transposed.
//
// -DTOKENS: tokens of a tile: 1, 2, 4, 8, 16 or 32
// -DX_KIND, -DOUT_KIND: dtypes of x and y: 0 float32, 1 bfloat16, 2 float16
// -DWARPS: rows at once in a block; -DRESIDENT: warps that a multiprocessor shall hold
// -DPREFETCH: see walk.cuh; -DOVERLAP: see common.cuh
#include "multiply.cuh"

// grid: x rows, y tiles of tokens.
extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT / WARPS)
    matmul(const __grid_constant__ Matrix matrix, const u32 *all_tables, const u8 *x, u8 *y, u32 tokens,
           u32 table_bytes, u32 x_bytes) {
    DYNAMIC_SHARED(shared);
    __shared__ u32 numbers[TOKENS];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, first = blockIdx.y * TOKENS;
    const u32 step = gridDim.x * WARPS;
    u32 row = blockIdx.x * WARPS + warp;
    let_the_next_begin();
    Asked next = ask_row(matrix, row, lane);
    if (warp == 0) {
        prefetch_rows(matrix, row, lane);
    }
    if (threadIdx.x < TOKENS) {
        u32 number = first + threadIdx.x;
        numbers[threadIdx.x] = number < tokens ? number : NO_TOKEN;
    }
    __syncthreads();
    load_tables(matrix, all_tables, shared);
    u8 *staged = shared + table_bytes;
    wait_for_the_last();
    Tile tile = {x, 0, numbers, matrix.columns};
    stage_tile<TOKENS>(tile, staged);
    __syncthreads();
    const Tables tables = open_tables(all_tables, shared);
    tile.staged = shared_at(staged);
    const SharedAt list = tile.staged + x_bytes + (TOKENS > 1 ? warp * LIST_BYTES : 0);
    for (; row < matrix.rows; row += step) {
        const Asked asked = next;
        next = ask_row(matrix, row + step, lane);
        const Product product = Multiplication<TOKENS>::row(matrix, row, asked, tables, tile, list, lane);
        if (product.stores && first + product.token < tokens) {
            store_bits<OUT_KIND>(y, (u64)(first + product.token) * matrix.rows + row,
                                 from_float<OUT_KIND>(product.value));
        }
    }
}
