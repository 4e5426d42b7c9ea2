/* Chooses the kernels, once. */
#include "internal.h"

#include <stdlib.h>

static const qmoe_kernels *choose(void) {
    const qmoe_kernels *usable[4];
    unsigned count = 0;
    usable[count++] = &qmoe_kernels_portable;
#if QMOE_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
        usable[count++] = &qmoe_kernels_avx2;
    }
#endif
#if QMOE_HAVE_AVX512
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        usable[count++] = &qmoe_kernels_avx512;
#if QMOE_HAVE_AVX512VBMI
        if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
            __builtin_cpu_supports("avx512ifma")) {
            usable[count++] = &qmoe_kernels_avx512vbmi;
        }
#endif
    }
#endif
    const char *wanted = getenv("QMOE_KERNELS"); /* for tests and measurements */
    for (unsigned i = 0; wanted && i < count; i++) {
        if (strcmp(wanted, usable[i]->name) == 0) {
            return usable[i];
        }
    }
    return usable[count - 1];
}

const qmoe_kernels *qmoe_chosen_kernels(void) {
    static _Atomic(const qmoe_kernels *) chosen;
    const qmoe_kernels *kernels = atomic_load_explicit(&chosen, memory_order_acquire);
    if (!kernels) {
        kernels = choose();
        atomic_store_explicit(&chosen, kernels, memory_order_release);
    }
    return kernels;
}

const char *qmoe_kernels_name(void) { return qmoe_chosen_kernels()->name; }
