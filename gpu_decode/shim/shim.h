// Runs kernels of qmoe_gpu_decode on the host, to test them where there is no GPU.
//
// A block's threads are fibers: each runs until it comes to a barrier or a collective of its warp, and the next goes
// on; so a run is always the same. Blocks follow each other. It stops with a message where a kernel would be at fault
// on a GPU without showing it: lanes that meet at different collectives, threads that leave while others wait, vector
// accesses that are not aligned, writes behind the shared memory that was asked for. Built with
// -fsanitize=address,undefined it also finds every access outside of a buffer.
//
// SHIM_EXIT_IS_ARRIVAL 1: as on a GPU, a barrier does not wait for threads that left; others' kernels rely on it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef SHIM_EXIT_IS_ARRIVAL
#define SHIM_EXIT_IS_ARRIVAL 0
#endif
#define QMOE_HOST 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define DYNAMIC_SHARED(name) u8 *name = shim::shared_memory

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef int8_t i8;
typedef int32_t i32;

struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

struct dim3 {
    u32 x, y, z;
};

[[noreturn]] inline void shim_fail(const char *what) {
    std::fprintf(stderr, "shim: %s\n", what);
    std::fflush(stderr);
    std::abort();
}

inline void shim_check_aligned(const void *address, size_t size) {
    if (reinterpret_cast<uintptr_t>(address) % size) {
        shim_fail("an access that is not aligned");
    }
}

namespace shim {

constexpr size_t STACK = 96 << 10;
constexpr u32 LANES = 32;
constexpr u32 MOST_THREADS = 1024;

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
// Saves the registers that a call preserves, and the stack; ucontext would ask the system each time.
struct Context {
    void *stack;
};
extern "C" void shim_switch(Context *from, Context *to);
asm(".text\n.globl shim_switch\n.type shim_switch,@function\nshim_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq (%rsi),%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size shim_switch,.-shim_switch\n");
inline void prepare(Context &context, char *stack, void (*entry)()) {
    void **top = reinterpret_cast<void **>(stack + STACK);
    *--top = nullptr; // where the entry would return to; it never does
    *--top = reinterpret_cast<void *>(entry);
    top -= 6;
    context.stack = top;
}
inline void switch_to(Context &from, Context &to) { shim_switch(&from, &to); }
#else
struct Context {
    ucontext_t context;
};
inline void prepare(Context &context, char *stack, void (*entry)()) {
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = stack;
    context.context.uc_stack.ss_size = STACK;
    context.context.uc_link = nullptr;
    makecontext(&context.context, entry, 0);
}
inline void switch_to(Context &from, Context &to) { swapcontext(&from.context, &to.context); }
#endif

enum State { READY, WAITS_WARP, WAITS_BLOCK, DONE };

struct Fiber {
    Context context;
    State state;
    u32 thread;
    const char *what;   // the collective that it waits at
    u32 value, argument;
    u32 seen[LANES];    // what the lanes of the warp gave
    char *stack;
#if defined(__SANITIZE_ADDRESS__)
    void *fake = nullptr;
#endif
};

struct Launch {
    void (*body)(void *);
    void *arguments;
};

inline std::vector<Fiber> fibers;
inline Fiber *current;
inline Context scheduler;
inline Launch launch;
inline u8 *shared_memory;
inline dim3 block_index, block_size, grid_size;
#if defined(__SANITIZE_ADDRESS__)
inline const void *scheduler_stack;
inline size_t scheduler_stack_size;
#endif

inline void leave(bool for_good) {
    Fiber &mine = *current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &mine.fake, scheduler_stack, scheduler_stack_size);
#else
    (void)for_good;
#endif
    switch_to(mine.context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(mine.fake, &scheduler_stack, &scheduler_stack_size);
#endif
}

inline void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
    launch.body(launch.arguments);
    current->state = DONE;
    leave(true);
    shim_fail("a thread came back after its end");
}

inline void enter(Fiber &fiber) {
    current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack, STACK);
#endif
    switch_to(scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// A collective of the warp: every lane gives a value and sees those of all.
inline void meet(const char *what, u32 mask, u32 value) {
    if (mask != 0xffffffffu) {
        shim_fail("a collective of a part of a warp");
    }
    Fiber &mine = *current;
    mine.what = what;
    mine.value = value;
    mine.state = WAITS_WARP;
    leave(false);
}

inline void release_warp(u32 first) {
    Fiber *lanes = &fibers[first];
    for (u32 lane = 0; lane < LANES; lane++) {
        if (lanes[lane].state != WAITS_WARP || lanes[lane].what != lanes[0].what) {
            shim_fail("the lanes of a warp are at different places");
        }
    }
    for (u32 lane = 0; lane < LANES; lane++) {
        for (u32 other = 0; other < LANES; other++) {
            lanes[lane].seen[other] = lanes[other].value;
        }
        lanes[lane].state = READY;
    }
}

inline void run_block() {
    const u32 threads = block_size.x;
    for (u32 i = 0; i < threads; i++) {
        fibers[i].state = READY;
        fibers[i].thread = i;
        prepare(fibers[i].context, fibers[i].stack, fiber_entry);
    }
    for (;;) {
        u32 done = 0, at_barrier = 0;
        for (u32 first = 0; first < threads; first += LANES) {
            for (;;) { // a warp goes on until its threads are done or at the block's barrier
                u32 in_warp = 0;
                for (u32 i = first; i < first + LANES; i++) {
                    if (fibers[i].state == READY) {
                        enter(fibers[i]);
                    }
                    in_warp += fibers[i].state == WAITS_WARP;
                }
                if (in_warp == 0) {
                    break;
                }
                release_warp(first);
            }
            for (u32 i = first; i < first + LANES; i++) {
                done += fibers[i].state == DONE;
                at_barrier += fibers[i].state == WAITS_BLOCK;
            }
        }
        if (done == threads) {
            return;
        }
        if (at_barrier + (SHIM_EXIT_IS_ARRIVAL ? done : 0) != threads) {
            shim_fail("some threads of a block left while others wait at a barrier");
        }
        for (u32 i = 0; i < threads; i++) {
            fibers[i].state = fibers[i].state == DONE ? DONE : READY;
        }
    }
}

inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, Launch what) {
    if (block.x == 0 || block.x % LANES || block.x > MOST_THREADS || block.y != 1 || block.z != 1) {
        shim_fail("a size of block that is not whole warps in one dimension");
    }
    if (grid.x == 0 || grid.y == 0 || grid.z != 1 || grid.y > 65535) {
        shim_fail("a size of grid that a GPU refuses");
    }
    fibers.resize(MOST_THREADS);
    for (u32 i = 0; i < block.x; i++) {
        if (!fibers[i].stack) {
            fibers[i].stack = static_cast<char *>(std::malloc(STACK));
        }
    }
    launch = what;
    grid_size = grid;
    block_size = block;
#if defined(__SANITIZE_ADDRESS__)
    const size_t room = shared_bytes; // the sanitizer guards it
#else
    const size_t room = shared_bytes + 256; // a guard behind it
#endif
    u8 *memory = static_cast<u8 *>(std::aligned_alloc(16, (room + 15) / 16 * 16 + 16));
    for (u32 y = 0; y < grid.y; y++) {
        for (u32 x = 0; x < grid.x; x++) {
            block_index = {x, y, 0};
            std::memset(memory, 0xa5, room); // nothing is there before the kernel writes it
            shared_memory = memory;
            run_block();
            for (size_t i = shared_bytes; i < room; i++) {
                if (memory[i] != 0xa5) {
                    shim_fail("a write behind the shared memory");
                }
            }
        }
    }
    std::free(memory);
}

// Calls a kernel with arguments given by address, as cuLaunchKernel takes them.
template <class... A> struct Call {
    void (*kernel)(A...);
    void **arguments;
    template <size_t... I> void with(std::index_sequence<I...>) { kernel(*static_cast<A *>(arguments[I])...); }
    static void body(void *self) { static_cast<Call *>(self)->with(std::index_sequence_for<A...>()); }
};

template <class... A>
int call(void (*kernel)(A...), dim3 grid, dim3 block, size_t shared_bytes, void **arguments, const u32 *sizes, u32 count) {
    const u32 expected[] = {sizeof(A)...};
    if (count != sizeof...(A)) {
        return 1;
    }
    for (u32 i = 0; i < count; i++) {
        if (sizes[i] != expected[i]) {
            return 2;
        }
    }
    Call<A...> call = {kernel, arguments};
    run_grid(grid, block, shared_bytes, {Call<A...>::body, &call});
    return 0;
}

} // namespace shim

#define threadIdx (dim3{shim::current->thread, 0, 0})
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)

#define SHIM_PLACE_(line) #line
#define SHIM_PLACE(line) SHIM_PLACE_(line)

inline void __syncthreads() {
    shim::current->state = shim::WAITS_BLOCK;
    shim::leave(false);
}
inline void __syncwarp() { shim::meet("__syncwarp", 0xffffffffu, 0); }

template <class T> inline u32 shim_bits(T value) {
    static_assert(sizeof(T) == 4, "collectives take 32 bits");
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
template <class T> inline T shim_value(u32 bits) {
    T value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline u32 shim_lane() { return shim::current->thread % shim::LANES; }

template <class T> inline T __shfl_sync(u32 mask, T value, u32 lane) {
    shim::meet("__shfl_sync", mask, shim_bits(value));
    return shim_value<T>(shim::current->seen[lane % shim::LANES]);
}
template <class T> inline T __shfl_up_sync(u32 mask, T value, u32 distance) {
    shim::meet("__shfl_up_sync", mask, shim_bits(value));
    u32 lane = shim_lane();
    return shim_value<T>(shim::current->seen[lane >= distance ? lane - distance : lane]);
}
template <class T> inline T __shfl_down_sync(u32 mask, T value, u32 distance) {
    shim::meet("__shfl_down_sync", mask, shim_bits(value));
    u32 lane = shim_lane();
    return shim_value<T>(shim::current->seen[lane + distance < shim::LANES ? lane + distance : lane]);
}
template <class T> inline T __shfl_xor_sync(u32 mask, T value, u32 distance) {
    shim::meet("__shfl_xor_sync", mask, shim_bits(value));
    return shim_value<T>(shim::current->seen[(shim_lane() ^ distance) % shim::LANES]);
}
inline u32 __ballot_sync(u32 mask, bool value) {
    shim::meet("__ballot_sync", mask, value);
    u32 bits = 0;
    for (u32 lane = 0; lane < shim::LANES; lane++) {
        bits |= shim::current->seen[lane] << lane;
    }
    return bits;
}

inline u32 atomicAdd(u32 *address, u32 value) { u32 old = *address; *address += value; return old; }
inline u32 atomicOr(u32 *address, u32 value) { u32 old = *address; *address |= value; return old; }
inline u32 atomicXor(u32 *address, u32 value) { u32 old = *address; *address ^= value; return old; }
inline u32 atomicMax(u32 *address, u32 value) { u32 old = *address; *address = value > old ? value : old; return old; }
inline u32 atomicMin(u32 *address, u32 value) { u32 old = *address; *address = value < old ? value : old; return old; }

inline u32 __funnelshift_r(u32 low, u32 high, u32 shift) {
    return u32(((u64(high) << 32) | low) >> (shift & 31));
}
inline int __popc(u32 value) { return __builtin_popcount(value); }
inline int __clz(u32 value) { return value ? __builtin_clz(value) : 32; }
inline u32 __float_as_uint(float value) { return shim_bits(value); }
inline float __uint_as_float(u32 bits) { return shim_value<float>(bits); }

inline float float16_to_float(u32 bits) {
    u32 sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                      : exponent     ? std::ldexp(float(1024 + fraction), int(exponent) - 25)
                                     : std::ldexp(float(fraction), -24);
    return __uint_as_float(__float_as_uint(magnitude) | sign);
}
inline u32 float_to_float16(float value) {
    u32 sign = __float_as_uint(value) >> 16 & 0x8000;
    float magnitude = std::fabs(value);
    if (!(magnitude < 65520.0f)) {
        return sign | (value != value ? 0x7e00 : 0x7c00);
    }
    if (magnitude == 0.0f) {
        return sign;
    }
    int exponent = 0;
    std::frexp(magnitude, &exponent); // magnitude = f * 2^exponent, f in [0.5, 1)
    int step = exponent < -13 ? -24 : exponent - 11;
    u32 steps = u32(std::nearbyint(std::ldexp(magnitude, -step))); // ties to even
    return sign | (step == -24 ? steps : steps + (u32(step + 24) << 10)); // a carry goes into the exponent
}
