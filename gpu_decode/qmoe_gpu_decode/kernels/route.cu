// The router's choices, before and after the experts; experts.cuh says what for.
//
// -DTOKENS: tokens of a tile at most; -DINDEX_SIZE: bytes of an index, 4 or 8; -DWEIGHT_KIND: dtype of the weights
// -DOUT_KIND: dtype of y
#include "routing.cuh"

__device__ inline u32 chosen_expert(const u8 *index, u64 pair, u32 experts) {
    u64 value = INDEX_SIZE == 8 ? load<u64>(index + 8 * pair) : load<u32>(index + 4 * pair);
    return value < experts ? (u32)value : experts; // negative ones are large here
}

// One block. shared: u32 [experts + 1]. order [pairs]: the pair at each sorted place.
// tiles [limit]: those not needed have count 0.
extern "C" __global__ void __launch_bounds__(1024)
    route(const u8 *index, u32 pairs, u32 experts, u32 *order, RoutedTile *tiles, u32 limit) {
    DYNAMIC_SHARED(shared);
    u32 *starts = (u32 *)(void *)shared;
    __shared__ u32 tile_count;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    for (u32 expert = warp; expert < experts; expert += warps) {
        u32 count = 0;
        for (u32 first = 0; first < pairs; first += WARP) {
            u32 pair = first + lane;
            bool mine = pair < pairs && chosen_expert(index, pair, experts) == expert;
            count += __popc(__ballot_sync(ALL_LANES, mine));
        }
        if (lane == 0) {
            starts[expert] = count;
        }
    }
    __syncthreads();
    if (warp == 0) { // counts become starts; tiles follow
        u32 before = 0, tiles_before = 0;
        for (u32 first = 0; first < experts; first += WARP) {
            u32 expert = first + lane, count = expert < experts ? starts[expert] : 0;
            u32 needed = (count + TOKENS - 1) / TOKENS;
            u32 end = before + warp_scan(count, lane), tile_end = tiles_before + warp_scan(needed, lane);
            for (u32 i = 0; i < needed; i++) {
                u32 tile = tile_end - needed + i;
                if (tile < limit) {
                    tiles[tile] = {expert, end - count + i * TOKENS, smaller(TOKENS, count - i * TOKENS), 0};
                }
            }
            if (expert < experts) {
                starts[expert] = end - count;
            }
            before = __shfl_sync(ALL_LANES, end, WARP - 1);
            tiles_before = __shfl_sync(ALL_LANES, tile_end, WARP - 1);
        }
        if (lane == 0) {
            tile_count = tiles_before;
        }
    }
    __syncthreads();
    for (u32 tile = tile_count + threadIdx.x; tile < limit; tile += blockDim.x) {
        tiles[tile] = {0, 0, 0, 0};
    }
    for (u32 expert = warp; expert < experts; expert += warps) {
        u32 next = starts[expert];
        for (u32 first = 0; first < pairs; first += WARP) {
            u32 pair = first + lane;
            bool mine = pair < pairs && chosen_expert(index, pair, experts) == expert;
            u32 found = __ballot_sync(ALL_LANES, mine);
            if (mine) {
                order[next + __popc(found & ((1u << lane) - 1))] = pair;
            }
            next += __popc(found);
        }
    }
}

// A thread an output.
extern "C" __global__ void __launch_bounds__(256)
    combine(const float *result, const u8 *index, const u8 *weights, u8 *y, u64 outputs, u32 columns, u32 choices,
            u32 experts) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < outputs; i += (u64)gridDim.x * blockDim.x) {
        const u64 token = i / columns, column = i % columns;
        float sum = 0.0f;
        for (u32 choice = 0; choice < choices; choice++) {
            const u64 pair = token * choices + choice;
            if (chosen_expert(index, pair, experts) < experts) {
                sum += to_float<WEIGHT_KIND>(load_bits<WEIGHT_KIND>(weights, pair)) * result[pair * columns + column];
            }
        }
        store_bits<OUT_KIND>(y, i, from_float<OUT_KIND>(sum));
    }
}
