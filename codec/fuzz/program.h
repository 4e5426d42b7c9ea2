/*
 * What a fuzzing program needs around its inputs. Included after PROGRAM, its name.
 */
#ifndef QMOE_FUZZ_PROGRAM_H
#define QMOE_FUZZ_PROGRAM_H

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static struct {
    const uint8_t *data;
    size_t size;
} current;
static uint64_t executions;

enum { HANG_SECONDS = 60 };

/* The sanitizers and require() abort. */
static inline void keep_input(int signal_number) {
    (void)signal_number;
    char name[64];
    snprintf(name, sizeof name, "finding-%ld-%" PRIu64 ".bin", (long)getpid(), executions);
    FILE *file = current.size ? fopen(name, "wb") : NULL;
    if (file) {
        fwrite(current.data, 1, current.size, file);
        fclose(file);
        fprintf(stderr, PROGRAM ": this input was kept as %s\n", name);
    }
}

static void require(bool condition, const char *promise) {
    if (!condition) {
        fprintf(stderr, PROGRAM ": broken promise: %s\n", promise);
        abort();
    }
}

static inline void *room(size_t size) {
    void *memory = malloc(size);
    require(memory || size == 0, "there is memory");
    return memory;
}

static inline uint64_t draw(uint64_t *random) { /* splitmix64 */
    uint64_t z = *random += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

static inline uint32_t below(uint64_t *random, uint64_t limit) {
    return limit ? (uint32_t)(draw(random) % limit) : 0;
}

static inline double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

#ifndef QMOE_LIBFUZZER
/* The sanitizers ask for these. */
const char *__asan_default_options(void);
const char *__ubsan_default_options(void);
const char *__asan_default_options(void) { return "abort_on_error=1"; }
const char *__ubsan_default_options(void) { return "abort_on_error=1:print_stacktrace=1"; }
#endif

static inline void hangs(int signal_number) {
    (void)signal_number;
    require(false, "an input takes no longer than a minute");
}

#endif
