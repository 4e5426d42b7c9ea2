/* Fuzzes the decoder beside it: the program as it is, its errors caught instead of ending the process.
 *
 *     fuzz_reference SECONDS SEED VECTOR...   mutate these files for so long, the same way for a seed
 *     fuzz_reference replay FINDING...        run inputs that were kept
 *
 *     cc -std=c11 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -o fuzz_reference fuzz_reference.c
 *     clang -DQMOE_LIBFUZZER -O1 -g -fsanitize=fuzzer,address,undefined -o fuzz_reference fuzz_reference.c
 *
 * An input is a byte (1: make the checksums fit), the u32 size of a dictionary frame, that frame, and a frame of any
 * kind. Every buffer has its exact size, so that the address sanitizer sees each byte that is touched beside it.
 */
#define _POSIX_C_SOURCE 200809L
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Noreturn void caught_exit(int code);
static void *kept_calloc(size_t count, size_t size);
static int silent_printf(const char *format, ...) {
    (void)format;
    return 0;
}

/* In what is included, and nowhere else: */
#define main reference_main
#define exit caught_exit
#define calloc kept_calloc
#define printf silent_printf
#undef putchar
#define putchar(c) ((void)(c))
#include "qmoe_reference.c"
#undef main
#undef exit
#undef calloc
#undef printf

#include <signal.h>
#include <time.h>
#include <unistd.h>

enum { MOST_BLOCKS = 64, MOST_FILES = 512, CAPACITY = 1 << 20, PREFIX = 5, HANG_SECONDS = 60 };

static jmp_buf refused;
static void *blocks[MOST_BLOCKS];
static int block_count;
static struct {
    unsigned long long executions, refused, decoded;
} counts;
static struct {
    const uint8_t *data;
    size_t size;
} current;

static _Noreturn void caught_exit(int code) { longjmp(refused, code); }

static void *kept_calloc(size_t count, size_t size) {
    if (block_count == MOST_BLOCKS)
        abort(); /* a frame takes a handful */
    if (count * size > (size_t)1 << 26)
        caught_exit(EXIT_RUNTIME); /* as where there is less memory */
    return blocks[block_count++] = calloc(count, size);
}

static uint8_t *copy_of(const uint8_t *data, size_t size) {
    uint8_t *copy = malloc(size > 0 ? size : 1);
    if (copy == NULL)
        abort();
    memcpy(copy, data, size);
    return copy;
}

static void store_crc(uint8_t *frame, uint64_t at, uint32_t crc) {
    for (int i = 0; i < 4; i++)
        frame[at + (uint64_t)i] = (uint8_t)(crc >> (8 * i));
}

static void reseal(uint8_t *data, size_t size) {
    Bytes frame = {data, size};
    if (size >= 64 && memcmp(data, "QMXM", 4) == 0) {
        store_crc(data, 56, crc32c(frame, 64, size));
        store_crc(data, 60, crc32c(frame, 0, 60));
    } else if (size >= 160 && memcmp(data, "QMXZ", 4) == 0) {
        store_crc(data, 156, crc32c(frame, 0, 156));
    } else if (size >= 32) {
        store_crc(data, 28, crc32c_part(crc32c_part(CRC_START, frame, 0, 28), frame, 32, size) ^ 0xFFFFFFFF);
    }
}

/* All that the program does with its files, written to no file. */
static void decode_everything(Bytes dictionary_frame, Bytes frame) {
    if (frame.size >= 4 && memcmp(frame.data, "QMXD", 4) == 0) {
        read_dictionary(frame);
    } else if (frame.size >= 4 && memcmp(frame.data, "QMXZ", 4) == 0) {
        read_dense(frame);
    } else {
        Dictionary dictionary;
        int count = 0;
        if (dictionary_frame.size > 0) {
            dictionary = read_dictionary(dictionary_frame);
            count = 1;
        }
        Matrix m = read_matrix(frame, &dictionary, count);
        decode_rows(&m, NULL, NULL);
        for (uint32_t row = 0; row < m.rows; row++)
            for (unsigned which = 0; which < 2; which++)
                read_level(&m, row, which);
        if ((uint64_t)m.rows * m.columns <= 1 << 18) {
            static FILE *nowhere;
            if (nowhere == NULL)
                nowhere = fopen("/dev/null", "wb");
            decode_rows(&m, allocate(m.columns), nowhere);
        }
    }
}

/* Whether the frame is legal; by itself, so that no local variable outlives a jump. */
static bool is_decoded(Bytes dictionary, Bytes frame) {
    if (setjmp(refused) != 0)
        return false;
    decode_everything(dictionary, frame);
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < PREFIX)
        return 0;
    current.data = data;
    current.size = size;
    counts.executions++;
    bool fit = data[0] & 1;
    uint32_t part = (uint32_t)read_integer((Bytes){data, size}, 1, 4);
    data += PREFIX;
    size -= PREFIX;
    if (part > size)
        part = (uint32_t)size;
    uint8_t *dictionary = copy_of(data, part), *frame = copy_of(data + part, size - part);
    if (fit) {
        reseal(dictionary, part);
        if (size - part >= 64 && part >= 32 && frame[22] > 0)
            memcpy(frame + 40, dictionary + 28, 4);
        reseal(frame, size - part);
    }
    block_count = 0;
    if (is_decoded((Bytes){dictionary, part}, (Bytes){frame, size - part}))
        counts.decoded++;
    else
        counts.refused++;
    for (int i = 0; i < block_count; i++)
        free(blocks[i]);
    free(dictionary);
    free(frame);
    return 0;
}

#if !defined(QMOE_LIBFUZZER)

static struct {
    uint8_t *data;
    size_t size;
} files[MOST_FILES];
static size_t file_count;

static uint64_t draw(uint64_t *random) { /* splitmix64 */
    uint64_t z = *random += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

static size_t below(uint64_t *random, size_t limit) { return limit > 0 ? (size_t)(draw(random) % limit) : 0; }

/* Change a frame of at least a byte in place, as often in its header as in all of it; or change its size by a bit. */
static size_t mutate(uint8_t *frame, size_t size, uint64_t *random) {
    static const uint8_t bytes[] = {0, 1, 2, 31, 32, 127, 128, 242, 243, 255};
    size_t header = size < 160 ? size : 160;
    for (size_t turns = 1 + below(random, 4); turns > 0; turns--) {
        size_t at = below(random, below(random, 2) ? header : size);
        switch (below(random, 4)) {
        case 0:
            frame[at] = (uint8_t)draw(random);
            break;
        case 1:
            frame[at] = bytes[below(random, sizeof bytes)];
            break;
        default:
            frame[at] ^= (uint8_t)(1u << below(random, 8));
        }
    }
    size_t change = below(random, 16);
    if (change == 0 && size > 1)
        return size - 1 - below(random, size - 1);
    if (change == 1) {
        memset(frame + size, (int)below(random, 2), 16);
        return size + 16;
    }
    return size;
}

static size_t append(uint8_t *input, size_t at, size_t number, bool change, uint64_t *random) {
    memcpy(input + at, files[number].data, files[number].size);
    return change ? mutate(input + at, files[number].size, random) : files[number].size;
}

static bool is_named_by(size_t dictionary, size_t matrix) {
    return files[dictionary].size >= 32 && memcmp(files[dictionary].data, "QMXD", 4) == 0 && files[matrix].size >= 64 &&
           memcmp(files[matrix].data + 40, files[dictionary].data + 28, 4) == 0;
}

static size_t make_input(uint8_t *input, uint64_t *random) {
    size_t number = below(random, file_count), size = PREFIX, dictionary = file_count;
    for (size_t i = 0; i < file_count; i++)
        if (is_named_by(i, number))
            dictionary = i;
    if (dictionary < file_count)
        size += append(input, size, dictionary, below(random, 8) == 0, random);
    input[0] = below(random, 4) > 0;
    for (int i = 0; i < 4; i++)
        input[1 + i] = (uint8_t)((size - PREFIX) >> (8 * i));
    return size + append(input, size, number, below(random, 16) > 0, random);
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void keep_input(int signal_number) {
    (void)signal_number;
    char name[64];
    snprintf(name, sizeof name, "finding-reference-%ld-%llu.bin", (long)getpid(), counts.executions);
    FILE *file = fopen(name, "wb");
    if (file != NULL) {
        fwrite(current.data, 1, current.size, file);
        fclose(file);
        fprintf(stderr, "fuzz_reference: this input was kept as %s\n", name);
    }
}

static void hangs(int signal_number) {
    (void)signal_number;
    fprintf(stderr, "fuzz_reference: an input takes longer than a minute\n");
    abort();
}

/* The sanitizers ask for these. */
const char *__asan_default_options(void);
const char *__ubsan_default_options(void);
const char *__asan_default_options(void) { return "abort_on_error=1"; }
const char *__ubsan_default_options(void) { return "abort_on_error=1:print_stacktrace=1"; }

int main(int argc, char **argv) {
    if (argc < 3) {
        fputs("usage: fuzz_reference SECONDS SEED VECTOR... | fuzz_reference replay FINDING...\n", stderr);
        return 2;
    }
    signal(SIGALRM, hangs);
    signal(SIGABRT, keep_input);
    bool replay = strcmp(argv[1], "replay") == 0;
    for (int i = replay ? 2 : 3; i < argc && file_count < MOST_FILES; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (file == NULL) {
            perror(argv[i]);
            return 2;
        }
        files[file_count].data = malloc(CAPACITY);
        if (files[file_count].data == NULL)
            return 1;
        files[file_count].size = fread(files[file_count].data, 1, CAPACITY, file);
        fclose(file);
        if (files[file_count].size > 0)
            file_count++;
        else
            free(files[file_count].data);
    }
    if (replay) {
        for (size_t i = 0; i < file_count; i++)
            LLVMFuzzerTestOneInput(files[i].data, files[i].size);
    } else {
        uint8_t *input = malloc(PREFIX + 2 * (CAPACITY + 16));
        double start = seconds(), limit = strtod(argv[1], NULL);
        uint64_t random = strtoull(argv[2], NULL, 10);
        while (input != NULL && file_count > 0 && seconds() - start < limit) {
            alarm(HANG_SECONDS);
            size_t size = make_input(input, &random);
            LLVMFuzzerTestOneInput(input, size);
        }
        free(input);
        printf("{\"seconds\": %.0f, \"executions\": %llu, \"decoded\": %llu, \"refused\": %llu}\n", seconds() - start,
               counts.executions, counts.decoded, counts.refused);
    }
    for (size_t i = 0; i < file_count; i++)
        free(files[i].data);
    return 0;
}

#endif
