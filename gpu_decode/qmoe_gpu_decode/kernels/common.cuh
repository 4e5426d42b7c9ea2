// What all kernels share: types, the warp's collectives, 16-bit floats. No header is needed beside this text.
//
// The same text compiles with NVRTC, with nvcc and, under shim/shim.h, with a C++ compiler for the host.
#pragma once

#ifndef QMOE_HOST
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef int i32;
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]
#endif

static_assert(sizeof(u64) == 8 && sizeof(u32) == 4, "sizes of integers");

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// Kinds of numbers in memory: -DX_KIND, -DOUT_KIND.
constexpr int FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, TRITS = 3;

__device__ constexpr u32 kind_size(int kind) { return kind == FLOAT32 ? 4 : kind == TRITS ? 1 : 2; }

__device__ inline u32 smaller(u32 a, u32 b) { return a < b ? a : b; }

// ---- memory: every vector access goes through these, so that the shim can check its alignment ----

template <class T> __device__ inline T load(const void *address) {
#ifdef QMOE_HOST
    shim_check_aligned(address, sizeof(T));
#endif
    return *static_cast<const T *>(address);
}

template <class T> __device__ inline void store(void *address, T value) {
#ifdef QMOE_HOST
    shim_check_aligned(address, sizeof(T));
#endif
    *static_cast<T *>(address) = value;
}

// ---- warps ----

__device__ inline u32 warp_sum(u32 value) {
    for (u32 distance = WARP / 2; distance; distance /= 2) {
        value += __shfl_xor_sync(ALL_LANES, value, distance);
    }
    return value;
}

__device__ inline float warp_sum(float value) {
    for (u32 distance = WARP / 2; distance; distance /= 2) {
        value += __shfl_xor_sync(ALL_LANES, value, distance);
    }
    return value;
}

// Sum of the values of this lane and those before it.
__device__ inline u32 warp_scan(u32 value, u32 lane) {
    for (u32 distance = 1; distance < WARP; distance *= 2) {
        u32 other = __shfl_up_sync(ALL_LANES, value, distance);
        value += lane >= distance ? other : 0;
    }
    return value;
}

// ---- 16-bit floats ----

__device__ inline float bfloat16_to_float(u32 bits) { return __uint_as_float(bits << 16); }

// To nearest, ties to even; the argument is never NaN here, but keep it one.
__device__ inline u32 float_to_bfloat16(float value) {
    u32 bits = __float_as_uint(value);
    return value != value ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

#ifndef QMOE_HOST
__device__ inline float float16_to_float(u32 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
    return value;
}
__device__ inline u32 float_to_float16(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

template <int KIND> __device__ inline float to_float(u32 bits) {
    return KIND == FLOAT32 ? __uint_as_float(bits) : KIND == BFLOAT16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

template <int KIND> __device__ inline u32 from_float(float value) {
    return KIND == FLOAT32 ? __float_as_uint(value) : KIND == BFLOAT16 ? float_to_bfloat16(value) : float_to_float16(value);
}

template <int KIND> __device__ inline u32 load_bits(const u8 *array, u64 index) {
    return kind_size(KIND) == 4 ? load<u32>(array + 4 * index) : load<u16>(array + 2 * index);
}

template <int KIND> __device__ inline void store_bits(u8 *array, u64 index, u32 bits) {
    if (kind_size(KIND) == 4) {
        store<u32>(array + 4 * index, bits);
    } else if (kind_size(KIND) == 2) {
        store<u16>(array + 2 * index, (u16)bits);
    } else {
        store<u8>(array + index, (u8)bits);
    }
}
