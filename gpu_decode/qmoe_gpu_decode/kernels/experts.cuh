// A layer of packed experts: y[t] = sum over k of weight[t][k] * down(act(gate(x[t])) * up(x[t])), the experts being
// index[t][k], in four launches whose grids do not depend on what the router chose:
//
//     route      sorts the pairs (token, choice) by expert, keeping their order, and cuts them into tiles
//     enter      hidden[pair] = act(gate(x)) * up(x), act(up(x)) without a gate, or the clamped SwiGLU of spec 6.3;
//                pairs in sorted order
//     leave      result[pair] = down(hidden[pair]), pairs in the router's order
//     combine    y[t] = sum over k of weight[t][k] * result[t][k]
//
// Each projection may have biases [experts][rows], or a null pointer, which are added to its product.
// Nothing is added atomically: the same input gives the same bits. An index that is not an expert's is skipped.
//
// -DTOKENS: tokens of a tile at most: 1, 2, 4, 8
#pragma once
#include "multiply.cuh"
#include "routing.cuh"

__device__ inline float bias_of(const float *biases, u32 expert, u32 rows, u64 row) {
    return biases ? biases[(u64)expert * rows + row] : 0.0f;
}

// The numbers of a tile's tokens in x.
__device__ inline void fill_numbers(const RoutedTile &routed, const u32 *order, u32 choices, bool sorted, u32 *numbers) {
    if (threadIdx.x < TOKENS) {
        u32 place = routed.first + threadIdx.x;
        bool there = threadIdx.x < routed.count;
        numbers[threadIdx.x] = !there ? NO_TOKEN : sorted ? place : order[place] / choices;
    }
    __syncthreads();
}
