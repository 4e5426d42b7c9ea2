// hidden[pair] = act(gate(x)) * up(x): the experts' first half; experts.cuh says what for.
//
// -DTOKENS, -DWARPS, -DRESIDENT, -DX_KIND; -DGATED: whether there is a gate
// -DACTIVATION: 0 none, 1 SiLU, 2 GELU, 3 GELU by tanh, 4 ReLU, 5 the clamped SwiGLU, of gate and up together
#include "experts.cuh"

// What the first half adds to the products, or does with them.
struct Inner {
    const float *up_biases, *gate_biases;
    float alpha, limit; // of the clamped SwiGLU
};

__device__ inline float activation(float value) {
#if ACTIVATION == 1
    return value / (1.0f + expf(-value));
#elif ACTIVATION == 2
    return 0.5f * value * (1.0f + erff(value * 0.70710678118654752f));
#elif ACTIVATION == 3
    return 0.5f * value * (1.0f + tanhf(0.79788456080286536f * (value + 0.044715f * value * value * value)));
#elif ACTIVATION == 4
    return value > 0.0f ? value : 0.0f;
#else
    return value;
#endif
}

__device__ inline float gated(float gate, float up, const Inner &inner) {
#if ACTIVATION == 5 // comparisons that NaN passes through
    gate = gate > inner.limit ? inner.limit : gate;
    up = up > inner.limit ? inner.limit : up < -inner.limit ? -inner.limit : up;
    return (up + 1.0f) * (gate / (1.0f + expf(-inner.alpha * gate)));
#else
    (void)inner;
    return activation(gate) * up;
#endif
}

// grid: x rows, y tiles. matrices [experts][projections]: number `up` and, with a gate, number `gate`.
template <u32 COUNT>
__device__ inline void enter_tile(const Matrix &matrix, const Matrix &gates, const u32 *all_tables, Tile tile,
                                  const RoutedTile &routed, const Inner &inner, float *hidden, u8 *shared,
                                  u32 table_bytes, u8 *staged, u32 x_bytes) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 step = gridDim.x * WARPS;
    u32 row = blockIdx.x * WARPS + warp;
    Asked next = ask_row(matrix, row, lane);
    if (warp == 0) {
        prefetch_rows(matrix, row, lane);
    }
#if GATED
    Asked next_gate = ask_row(gates, row, lane);
    if (warp == 1 % WARPS) {
        prefetch_rows(gates, row - warp, lane);
    }
#endif
    load_tables(matrix, all_tables, shared);
    if (GATED) {
        load_tables(gates, all_tables, shared + table_bytes);
    }
    stage_tile<COUNT>(tile, staged);
    __syncthreads();
    const Tables tables = open_tables(all_tables, shared);
#if GATED
    const Tables gate_tables = open_tables(all_tables, shared + table_bytes);
#endif
    tile.staged = shared_at(staged);
    const SharedAt list = tile.staged + x_bytes + (TOKENS > 1 ? warp * LIST_BYTES : 0);
    for (; row < matrix.rows; row += step) {
        const Asked asked = next;
        next = ask_row(matrix, row + step, lane);
#if GATED
        const Asked asked_gate = next_gate;
        next_gate = ask_row(gates, row + step, lane);
#endif
        const Product product = Multiplication<COUNT>::row(matrix, row, asked, tables, tile, list, lane);
        float value = product.value + bias_of(inner.up_biases, routed.expert, matrix.rows, row);
#if GATED
        const float gate = Multiplication<COUNT>::row(gates, row, asked_gate, gate_tables, tile, list, lane).value;
        value = gated(gate + bias_of(inner.gate_biases, routed.expert, matrix.rows, row), value, inner);
#else
        value = activation(value);
#endif
        if (product.stores && product.token < routed.count) {
            hidden[(u64)(routed.first + product.token) * matrix.rows + row] = value;
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT / WARPS)
    enter(const Matrix *matrices, u32 projections, u32 gate, u32 up, const u32 *all_tables, const u8 *x,
          const u32 *order, u32 choices, const RoutedTile *tiles, const float *up_biases, const float *gate_biases,
          float alpha, float limit, float *hidden, u32 table_bytes, u32 x_bytes) {
    DYNAMIC_SHARED(shared);
    __shared__ u32 numbers[TOKENS];
    const RoutedTile routed = tiles[blockIdx.y];
    if (routed.count == 0) {
        return;
    }
    __shared__ Matrix matrix, gates;
    matrices += (u64)routed.expert * projections;
    load_descriptor(matrix, matrices[up]);
    if (GATED) {
        load_descriptor(gates, matrices[gate]);
    }
    fill_numbers(routed, order, choices, false, numbers);
    u8 *staged = shared + (GATED ? 2 : 1) * table_bytes;
    const Tile tile = {x, 0, numbers, matrix.columns};
    const Inner inner = {up_biases, gate_biases, alpha, limit};
#if TOKENS > 1
    if (routed.count > 1) {
        enter_tile<TOKENS>(matrix, GATED ? gates : matrix, all_tables, tile, routed, inner, hidden, shared, table_bytes,
                           staged, x_bytes);
        return;
    }
#endif
    enter_tile<1>(matrix, GATED ? gates : matrix, all_tables, tile, routed, inner, hidden, shared, table_bytes, staged,
                  x_bytes);
}
