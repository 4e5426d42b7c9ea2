// y [tokens][rows] = x [tokens][columns] times a packed matrix, transposed.
//
// -DTOKENS: tokens of a tile: 1, 2, 4, 8, 16 or 32
// -DX_KIND, -DOUT_KIND: dtypes of x and y: 0 float32, 1 bfloat16, 2 float16
// -DWARPS: rows at once in a block
#include "multiply.cuh"

// grid: x rows, y tiles of tokens.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 24 / WARPS)
    matmul(const Matrix *matrices, const u32 *all_tables, const u8 *x, u8 *y, u32 tokens, u32 table_bytes,
           u32 x_bytes) {
    DYNAMIC_SHARED(shared);
    __shared__ u32 numbers[TOKENS];
    __shared__ Matrix matrix;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, first = blockIdx.y * TOKENS;
    if (threadIdx.x < TOKENS) {
        u32 number = first + threadIdx.x;
        numbers[threadIdx.x] = number < tokens ? number : NO_TOKEN;
    }
    load_descriptor(matrix, matrices[0]);
    __syncthreads();
    const u32 *tables = load_tables(matrix, all_tables, shared);
    u8 *staged = shared + table_bytes;
    u32 *list = (u32 *)(void *)(staged + x_bytes) + (TOKENS > 1 ? warp * STEP_NONZEROS : 0);
    const Tile tile = {x, staged, numbers, matrix.columns};
    stage_tile<TOKENS>(tile, staged);
    __syncthreads();
    for (u64 row = (u64)blockIdx.x * WARPS + warp; row < matrix.rows; row += (u64)gridDim.x * WARPS) {
        Product product = Multiplication<TOKENS>::row(matrix, (u32)row, tables, tile, list, lane);
        if (product.stores && first + product.token < tokens) {
            store_bits<OUT_KIND>(y, (u64)(first + product.token) * matrix.rows + row,
                                 from_float<OUT_KIND>(product.value));
        }
    }
}
