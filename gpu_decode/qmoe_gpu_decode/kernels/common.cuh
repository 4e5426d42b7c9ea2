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

// From global memory that nothing writes while the kernel runs.
template <class T> __device__ inline T load_global(const void *address) {
#ifdef QMOE_HOST
    return load<T>(address);
#else
    return __ldg(static_cast<const T *>(address));
#endif
}

// Have the L2 fetch the 128 bytes around an address of global memory.
__device__ inline void prefetch(const void *address) {
#ifndef QMOE_HOST
    asm volatile("prefetch.global.L2 [%0];" : : "l"(address));
#endif
    (void)address;
}

// An address that the compiler does not take apart again.
__device__ inline const u8 *opaque(const u8 *address) {
#ifndef QMOE_HOST
    asm("" : "+l"(address));
#endif
    return address;
}

template <class T> __device__ inline void store(void *address, T value) {
#ifdef QMOE_HOST
    shim_check_aligned(address, sizeof(T));
#endif
    *static_cast<T *>(address) = value;
}

// ---- launches that overlap ----
//
// -DOVERLAP=1: a kernel may begin before the launch in front of it in the stream has ended, if it was launched so. Until
// it has waited, it must not touch what others write, nor write itself.

#if defined(OVERLAP) && OVERLAP && !defined(QMOE_HOST) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline void let_the_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ inline void wait_for_the_last() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
__device__ inline void let_the_next_begin() {}
__device__ inline void wait_for_the_last() {}
#endif

// ---- shared memory by address ----
//
// An array in shared memory that is only read from here on, as where it begins, in a register. By a pointer, sm_90 looks
// up the window of shared memory at every access, and a load under a condition becomes a branch.

#ifdef QMOE_HOST
typedef const u8 *SharedAt;

// Take it after the barrier that follows the writes.
inline SharedAt shared_at(const void *array) { return static_cast<SharedAt>(array); }

template <class T> inline T shared_load(SharedAt at) { return load<T>(at); }

// What lies there if a < b, else 0.
template <class T> inline u32 shared_load_if(SharedAt at, u32 a, u32 b) { return a < b ? load<T>(at) : 0; }

// Where what lies there changes: these stay in their order.
inline void shared_store_if(SharedAt at, u32 a, u32 b, u32 value) {
    if (a < b) {
        store<u32>(const_cast<u8 *>(at), value);
    }
}
inline u32 shared_load_now(SharedAt at) { return load<u32>(at); }
#else
typedef u32 SharedAt;

__device__ inline SharedAt shared_at(const void *array) {
    // By way of a lane, so that it cannot be computed anew for each use, nor before the barrier.
    return __shfl_sync(ALL_LANES, (u32)__cvta_generic_to_shared(array), 0);
}

template <class T> __device__ inline T shared_load(SharedAt at);
template <> __device__ inline u16 shared_load<u16>(SharedAt at) {
    u16 value;
    asm("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(at));
    return value;
}
template <> __device__ inline u32 shared_load<u32>(SharedAt at) {
    u32 value;
    asm("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at));
    return value;
}
template <> __device__ inline uint2 shared_load<uint2>(SharedAt at) {
    uint2 value;
    asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(at));
    return value;
}
template <> __device__ inline uint4 shared_load<uint4>(SharedAt at) {
    uint4 value;
    asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "r"(at));
    return value;
}

template <class T> __device__ inline u32 shared_load_if(SharedAt at, u32 a, u32 b);
template <> __device__ inline u32 shared_load_if<u16>(SharedAt at, u32 a, u32 b) {
    u32 value = 0;
    asm("{ .reg .pred p; setp.lt.u32 p, %2, %3; @p ld.shared.u16 %0, [%1]; }" : "+r"(value) : "r"(at), "r"(a), "r"(b));
    return value;
}
template <> __device__ inline u32 shared_load_if<u32>(SharedAt at, u32 a, u32 b) {
    u32 value = 0;
    asm("{ .reg .pred p; setp.lt.u32 p, %2, %3; @p ld.shared.u32 %0, [%1]; }" : "+r"(value) : "r"(at), "r"(a), "r"(b));
    return value;
}

__device__ inline void shared_store_if(SharedAt at, u32 a, u32 b, u32 value) {
    asm volatile("{ .reg .pred p; setp.lt.u32 p, %2, %3; @p st.shared.u32 [%0], %1; }"
                 :
                 : "r"(at), "r"(value), "r"(a), "r"(b)
                 : "memory");
}
__device__ inline u32 shared_load_now(SharedAt at) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
    return value;
}
#endif

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

// ---- sums of two signs ----

// Add to `low` if word has the bit, else to `high`.
__device__ inline void add_by_bit(float &low, float &high, float value, u32 word, u32 bit) {
#ifdef QMOE_HOST
    (word >> bit & 1 ? low : high) += value;
#else // two additions under a predicate; the compiler makes two selections more of it
    asm("{ .reg .pred p; .reg .u32 t; and.b32 t, %3, %4; setp.ne.u32 p, t, 0; @p add.f32 %0, %0, %2; @!p add.f32 %1, %1, %2; }"
        : "+f"(low), "+f"(high)
        : "f"(value), "r"(word), "r"(1u << bit));
#endif
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
