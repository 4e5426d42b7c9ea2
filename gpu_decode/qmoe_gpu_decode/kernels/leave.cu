// result[pair] = down(hidden[pair]): the experts' second half; experts.cuh says what for.
//
// -DTOKENS, -DWARPS, -DRESIDENT; -DX_KIND=0
#include "experts.cuh"

template <u32 COUNT>
__device__ inline void leave_tile(const Matrix &matrix, const u32 *all_tables, Tile tile,
                                  const RoutedTile &routed, const u32 *order, const float *biases, float *result,
                                  u8 *shared, u8 *staged, u32 x_bytes) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 step = gridDim.x * WARPS;
    u32 row = blockIdx.x * WARPS + warp;
    Asked next = ask_row(matrix, row, lane);
    if (warp == 0) {
        prefetch_rows(matrix, row, lane);
    }
    load_tables(matrix, all_tables, shared);
    stage_tile<COUNT>(tile, staged);
    __syncthreads();
    const Tables tables = open_tables(all_tables, shared);
    tile.staged = shared_at(staged);
    const SharedAt list = tile.staged + x_bytes + (TOKENS > 1 ? warp * LIST_BYTES : 0);
    for (; row < matrix.rows; row += step) {
        const Asked asked = next;
        next = ask_row(matrix, row + step, lane);
        const Product product = Multiplication<COUNT>::row(matrix, row, asked, tables, tile, list, lane);
        if (product.stores && product.token < routed.count) {
            result[(u64)order[routed.first + product.token] * matrix.rows + row] =
                product.value + bias_of(biases, routed.expert, matrix.rows, row);
        }
    }
}

// grid: x rows, y tiles. result [pairs][rows] in the router's order; pairs of no expert stay as they are.
extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT / WARPS)
    leave(const Matrix *matrices, u32 projections, u32 down, const u32 *all_tables, const float *hidden,
          const u32 *order, const RoutedTile *tiles, const float *biases, float *result, u32 table_bytes,
          u32 x_bytes) {
    DYNAMIC_SHARED(shared);
    __shared__ u32 numbers[TOKENS];
    const RoutedTile routed = tiles[blockIdx.y];
    if (routed.count == 0) {
        return;
    }
    __shared__ Matrix matrix;
    load_descriptor(matrix, matrices[(u64)routed.expert * projections + down]);
    fill_numbers(routed, order, 1, true, numbers);
    u8 *staged = shared + table_bytes;
    const Tile tile = {(const u8 *)hidden, 0, numbers, matrix.columns};
#if TOKENS > 1
    if (routed.count > 1) {
        leave_tile<TOKENS>(matrix, all_tables, tile, routed, order, biases, result, shared, staged, x_bytes);
        return;
    }
#endif
    leave_tile<1>(matrix, all_tables, tile, routed, order, biases, result, shared, staged, x_bytes);
}

