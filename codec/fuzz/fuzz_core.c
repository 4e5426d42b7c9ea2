/*
 * Fuzzes the C core: every operation, on bytes that nobody vouches for.
 *
 *     fuzz_core SECONDS SEED VECTOR...   mutate these frames (spec/vectors) for so long, the same way for a seed
 *     fuzz_core replay FINDING...        run inputs that were kept
 *
 * CMake builds it where QMOE_SANITIZE is set. Every buffer has its exact size, so that the address sanitizer sees
 * each byte that is touched beside it. Checked is also what the library promises: trits are trits, products are
 * those of the unpacked matrix, threads change nothing, and what was encoded decodes to the same.
 *
 * For libFuzzer: clang -DQMOE_LIBFUZZER -fsanitize=fuzzer,address,undefined, with the library's sources.
 */
#define _POSIX_C_SOURCE 200809L
#include "qmoe.h"

#define PROGRAM "fuzz_core"
#include "program.h"

#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    DICTIONARIES = 4,
    HEADER_SIZE = 64,       /* of a matrix frame */
    MOST_WEIGHTS = 1 << 18, /* of a matrix that is worked with; a legal header may claim far more */
    MOST_COLUMNS = 1 << 17,
    MOST_PRODUCTS = 1 << 23
};

/* An input: this, the dictionary frames, and all that is left is the matrix frame. */
typedef struct {
    uint64_t seed; /* of all choices */
    uint32_t reseal; /* make checksums and ids fit the bytes */
    uint32_t dictionary_count;
    uint32_t dictionary_sizes[DICTIONARIES];
} input_header;

static struct {
    uint64_t dictionaries, checked, unchecked, changed, products, encoded;
} counts;

static uint8_t *copy_of(const uint8_t *data, size_t size) {
    uint8_t *copy = room(size);
    if (size) {
        memcpy(copy, data, size);
    }
    return copy;
}

static void store32(uint8_t *bytes, uint32_t value) { memcpy(bytes, &value, sizeof value); }

static uint32_t load32(const uint8_t *bytes) {
    uint32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

/* ---- what is done with a matrix ---- */

/* Compare products with those of the trits, in float64, by the bound that qmoe.h states. */
static void compare_products(const int8_t *trits, const float *levels, size_t rows, size_t columns, const float *x,
                             size_t tokens, const float *y) {
    for (size_t token = 0; token < tokens; token++) {
        for (size_t row = 0; row < rows; row++) {
            double sum = 0, size = 0;
            for (size_t column = 0; column < columns; column++) {
                int8_t trit = trits[row * columns + column];
                double product = trit ? (double)levels[2 * row + (trit > 0)] * x[token * columns + column] : 0;
                sum += product;
                size += fabs(product);
            }
            /* First order, hence 1 %; and products below the normal numbers are off by their smallest step. */
            double bound = 1.01 * (double)(columns + 3) * (0x1p-24 * size + 0x1p-149);
            if (size < 1e37 && isfinite(levels[2 * row]) && isfinite(levels[2 * row + 1])) {
                require(fabs(y[token * rows + row] - sum) <= bound, "products are within their bound");
            }
        }
    }
}

static void multiply(const qmoe_matrix *matrix, const int8_t *trits, const float *levels, uint64_t *random) {
    static const uint32_t some_tokens[] = {1, 3, 8, 17, 1, 3, 8, 17, 0, 2, 16, 300};
    size_t rows = qmoe_matrix_rows(matrix), columns = qmoe_matrix_columns(matrix);
    size_t tokens = some_tokens[below(random, sizeof some_tokens / sizeof *some_tokens)];
    if (tokens * columns * (rows + 1) > MOST_PRODUCTS) {
        tokens = 1;
    }
    qmoe_dtype dtype = (qmoe_dtype)below(random, 3);
    bool finite = dtype == QMOE_FLOAT32 && below(random, 4);
    size_t elements = tokens * columns, size = elements * (dtype == QMOE_FLOAT32 ? 4 : 2);
    uint8_t *x = room(size);
    if (finite) {
        for (size_t i = 0; i < elements; i++) {
            float value = (float)(int32_t)draw(random) * 0x1p-31f;
            memcpy(x + 4 * i, &value, sizeof value);
        }
    } else {
        for (size_t i = 0; i < size; i++) {
            x[i] = (uint8_t)draw(random);
        }
    }
    const qmoe_matrix *matrices[4];
    uint64_t ends[4];
    size_t groups = 1 + below(random, 4);
    for (size_t group = 0; group < groups; group++) {
        uint64_t before = group ? ends[group - 1] : 0;
        matrices[group] = matrix;
        ends[group] = group + 1 == groups ? tokens : before + below(random, tokens - before + 1);
    }
    float *y = room(tokens * rows * sizeof *y), *again = room(tokens * rows * sizeof *again);
    require(qmoe_grouped_matmul(matrices, ends, groups, x, dtype, y, 1, NULL) == QMOE_OK, "a group multiplies");
    if (finite) {
        compare_products(trits, levels, rows, columns, (const float *)(const void *)x, tokens, y);
    }
    unsigned threads = 1 + below(random, 3);
    require(qmoe_grouped_matmul(matrices, ends, groups, x, dtype, again, threads, NULL) == QMOE_OK, "and again");
    if (finite && tokens && rows) {
        require(memcmp(y, again, tokens * rows * sizeof *y) == 0, "products do not depend on threads");
    }
    require(qmoe_matrix_matmul(matrix, x, dtype, tokens, again, 1, NULL) == QMOE_OK, "a matrix multiplies");
    counts.products++;
    free(x);
    free(y);
    free(again);
}

/* `sound`: the row index says one thing, wherever reading begins. */
static void use_matrix(const qmoe_matrix *matrix, bool sound, uint64_t *random) {
    size_t rows = qmoe_matrix_rows(matrix), columns = qmoe_matrix_columns(matrix);
    if (columns > MOST_COLUMNS || rows * columns > MOST_WEIGHTS) {
        return;
    }
    float *levels = room(2 * rows * sizeof *levels);
    qmoe_matrix_levels(matrix, levels);
    int8_t *trits = room(rows * columns);
    require(qmoe_matrix_decode(matrix, 0, (uint32_t)rows, trits, 1, NULL) == QMOE_OK, "a matrix decodes");
    bool legal = true;
    for (size_t i = 0; i < rows * columns; i++) {
        legal = legal && trits[i] >= -1 && trits[i] <= 1;
    }
    require(legal, "trits are -1, 0 or 1");

    uint32_t first = below(random, rows + 1), count = below(random, rows - first + 1);
    unsigned threads = 1 + below(random, 3);
    size_t weights = count * columns;
    const int8_t *expected = trits + first * columns;
    int8_t *part = room(weights);
    require(qmoe_matrix_decode(matrix, first, count, part, threads, NULL) == QMOE_OK, "rows decode");
    require(!sound || !weights || memcmp(part, expected, weights) == 0, "rows are those of the whole");
    free(part);
    for (int dtype = QMOE_FLOAT32; dtype <= QMOE_FLOAT16; dtype++) {
        uint8_t *unpacked = room(weights * (dtype == QMOE_FLOAT32 ? 4 : 2));
        require(qmoe_matrix_dequantize(matrix, first, count, (qmoe_dtype)dtype, unpacked, threads, NULL) == QMOE_OK,
                "rows dequantize");
        for (size_t i = 0; sound && dtype == QMOE_FLOAT32 && i < weights; i++) {
            float weight = expected[i] ? levels[2 * (first + i / columns) + (expected[i] > 0)] : 0;
            require(memcmp(unpacked + 4 * i, &weight, sizeof weight) == 0, "weights are low, 0 or high");
        }
        free(unpacked);
    }
    require(qmoe_matrix_decode(matrix, first, (uint32_t)rows + 1, NULL, 1, NULL) == QMOE_ARGUMENT, "rows end");
    multiply(matrix, trits, levels, random);
    free(levels);
    free(trits);
}

static void use_frame(uint8_t *frame, size_t size, const qmoe_dictionary *const *dictionaries, size_t count,
                      uint64_t *random) {
    qmoe_matrix *matrix;
    qmoe_error error;
    if (qmoe_matrix_open(frame, size, dictionaries, count, 0, &matrix, &error) == QMOE_OK) {
        counts.checked++;
        use_matrix(matrix, true, random);
        qmoe_matrix_close(matrix);
    }
    if (qmoe_matrix_open(frame, size, dictionaries, count, QMOE_SKIP_BODY, &matrix, &error) == QMOE_OK) {
        counts.unchecked++;
        use_matrix(matrix, true, random);
        /* As when a mapped file is written to after it was opened. */
        size_t start = size - below(random, size - HEADER_SIZE + 1), end = size - below(random, size - start + 1);
        uint32_t keep = below(random, 2) ? 0 : UINT32_MAX;
        uint8_t fill = (uint8_t)draw(random);
        for (size_t i = start; i < end; i++) {
            frame[i] = keep ? (uint8_t)draw(random) : fill;
        }
        counts.changed++;
        use_matrix(matrix, false, random);
        qmoe_matrix_close(matrix);
    }
}

/* ---- encoding ---- */

/* Encode a matrix of this shape, its trits made of bytes; returns the frame, or NULL where the library refused. */
static uint8_t *encode(uint32_t rows, uint32_t columns, const uint8_t *bytes, const qmoe_dictionary *const *dictionaries,
                       size_t count, uint64_t *random, size_t *size) {
    size_t weights = (size_t)rows * columns;
    int8_t *trits = room(weights);
    float *levels = room(2 * (size_t)rows * sizeof *levels);
    uint8_t *selectors = room(rows);
    uint32_t density = 1 + below(random, 255), high = below(random, 256), odd = below(random, 32);
    for (size_t i = 0; i < weights; i++) {
        uint32_t noise = (uint32_t)draw(random);
        int8_t trit = (noise >> 8 & 255) < high ? 1 : -1;
        uint8_t byte = bytes ? bytes[i] : (uint8_t)noise;
        trits[i] = odd == 0 ? (int8_t)byte : byte < density ? trit : 0;
    }
    for (size_t row = 0; row < rows; row++) {
        float scale = ldexpf(1, (int)below(random, 40) - 30);
        levels[2 * row] = -scale * (float)below(random, 1000);
        levels[2 * row + 1] = scale * (float)below(random, 1000);
        if (odd == 1) {
            uint32_t bits = (uint32_t)draw(random);
            memcpy(levels + 2 * row, &bits, sizeof bits);
        }
        selectors[row] = (uint8_t)below(random, count + (odd == 2));
    }
    uint8_t *made = NULL, *frame = NULL;
    uint64_t made_size = 0;
    qmoe_error error;
    unsigned level_format = below(random, odd == 3 ? 6 : 4);
    if (qmoe_encode(trits, levels, rows, columns, dictionaries, count, selectors, level_format, &made, &made_size,
                    &error) == QMOE_OK) {
        counts.encoded++;
        *size = (size_t)made_size;
        frame = copy_of(made, *size);
        qmoe_free(made);
        qmoe_matrix *matrix = NULL;
        require(qmoe_matrix_open(frame, *size, dictionaries, count, 0, &matrix, &error) == QMOE_OK,
                "what was encoded is legal");
        int8_t *decoded = room(weights);
        require(qmoe_matrix_decode(matrix, 0, rows, decoded, 1, NULL) == QMOE_OK, "what was encoded decodes");
        require(!weights || memcmp(decoded, trits, weights) == 0, "decoding gives back what was encoded");
        free(decoded);
        qmoe_matrix_close(matrix);
    }
    free(trits);
    free(levels);
    free(selectors);
    return frame;
}

/* ---- an input ---- */

static void reseal_dictionary(uint8_t *frame, size_t size) {
    if (size >= 32) {
        store32(frame + 28, qmoe_crc32c(qmoe_crc32c(0, frame, 28), frame + 32, size - 32));
    }
}

static void reseal_matrix(uint8_t *frame, size_t size, const qmoe_dictionary *const *dictionaries, size_t count) {
    if (size < HEADER_SIZE) {
        return;
    }
    for (size_t i = 0; i < frame[22] && i < count; i++) {
        qmoe_dictionary_info info;
        qmoe_dictionary_get_info(dictionaries[i], &info);
        store32(frame + 40 + 4 * i, info.dictionary_id);
    }
    store32(frame + 56, qmoe_crc32c(0, frame + HEADER_SIZE, size - HEADER_SIZE));
    store32(frame + 60, qmoe_crc32c(0, frame, 60));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input_header header;
    if (size < sizeof header) {
        return 0;
    }
    current.data = data;
    current.size = size;
    executions++;
    memcpy(&header, data, sizeof header);
    data += sizeof header;
    size -= sizeof header;

    uint64_t random = header.seed;
    qmoe_dictionary *dictionaries[DICTIONARIES];
    size_t count = 0;
    for (uint32_t i = 0; i < header.dictionary_count && i < DICTIONARIES; i++) {
        size_t part = header.dictionary_sizes[i] < size ? header.dictionary_sizes[i] : size;
        uint8_t *frame = copy_of(data, part);
        if (header.reseal) {
            reseal_dictionary(frame, part);
        }
        qmoe_error error;
        if (qmoe_dictionary_open(frame, part, dictionaries + count, &error) == QMOE_OK) {
            count++;
            counts.dictionaries++;
        }
        free(frame);
        data += part;
        size -= part;
    }
    const qmoe_dictionary *const *usable = (const qmoe_dictionary *const *)dictionaries;
    uint8_t *frame = copy_of(data, size);
    if (header.reseal) {
        reseal_matrix(frame, size, usable, count);
    }
    use_frame(frame, size, usable, count, &random);
    free(frame);

    if (size && below(&random, 4) == 0) {
        uint32_t columns = 1 + below(&random, size), rows = (uint32_t)(size / columns);
        size_t made;
        frame = encode(rows, columns, data, usable, count, &random, &made);
        if (frame) {
            use_frame(frame, made, usable, count, &random);
        }
        free(frame);
    }
    for (size_t i = 0; i < count; i++) {
        qmoe_dictionary_close(dictionaries[i]);
    }
    return 0;
}

#if !defined(QMOE_LIBFUZZER)

/* ---- inputs made of mutated frames ---- */

enum { MOST_FILES = 512, CAPACITY = 1 << 22 };

typedef struct {
    uint8_t *data;
    size_t size;
} blob;

static blob matrices[MOST_FILES], frames[MOST_FILES]; /* frames: dictionaries, legal and not */
static qmoe_dictionary *opened[MOST_FILES];           /* of `frames`, or NULL */
static size_t matrix_count, frame_count;

static blob read_file(const char *path) {
    FILE *file = fopen(path, "rb");
    blob content = {room(CAPACITY), 0};
    if (!file) {
        perror(path);
        exit(2);
    }
    content.size = fread(content.data, 1, CAPACITY, file);
    fclose(file);
    content.data = realloc(content.data, content.size ? content.size : 1);
    return content;
}

static void add_dictionary(blob frame) {
    frames[frame_count] = frame;
    if (qmoe_dictionary_open(frame.data, frame.size, opened + frame_count, NULL) != QMOE_OK) {
        opened[frame_count] = NULL;
    }
    frame_count++;
}

/* The golden vectors have no table of 16 bits, so one is made of a table of 8: its codewords, again and again. */
static void add_wide_table(const blob *table) {
    enum { REPEATS = 256 };
    size_t payload = table->size - 32;
    blob wide = {room(32 + REPEATS * payload), 32 + REPEATS * payload};
    memcpy(wide.data, table->data, 32);
    for (size_t i = 0; i < REPEATS; i++) {
        memcpy(wide.data + 32 + i * payload, table->data + 32, payload);
    }
    wide.data[7] = 16;
    store32(wide.data + 12, 1 << 16);
    store32(wide.data + 16, 1 << 16);
    store32(wide.data + 20, (uint32_t)(REPEATS * payload));
    reseal_dictionary(wide.data, wide.size);
    add_dictionary(wide);
}

static void load_vectors(char **paths, int count) {
    for (int i = 0; i < count && matrix_count < MOST_FILES && frame_count < MOST_FILES - 1; i++) {
        blob content = read_file(paths[i]);
        if (content.size >= 4 && memcmp(content.data, "QMXD", 4) == 0) {
            add_dictionary(content);
        } else {
            matrices[matrix_count++] = content;
        }
    }
    for (size_t i = 0; i < frame_count; i++) {
        if (opened[i] && frames[i].data[6] == 0 && frames[i].data[7] == 8) {
            add_wide_table(frames + i);
            return;
        }
    }
}

static blob pick(const blob *from, size_t count, uint64_t *random) {
    return count ? from[below(random, count)] : (blob){NULL, 0};
}

/* Change a frame within its room; `plain` bytes at its beginning are its header. */
static size_t mutate(uint8_t *frame, size_t size, size_t plain, uint64_t *random) {
    static const uint32_t numbers[] = {0, 1, 2, 31, 32, 33, 255, 256, 65407, 65408, 65536, 1 << 24, UINT32_MAX};
    bool in_body = size > plain && below(random, 4);
    size_t low = in_body ? plain : 0, high = in_body || size < plain ? size : plain;
    size_t start = low + below(random, high - low), length = 1 + below(random, 1u << below(random, 12));
    length = length < high - start ? length : high - start;
    uint32_t kind = below(random, 9);
    if (size == 0) {
        kind = 8;
    }
    switch (kind) {
    case 0:
    case 1:
        frame[start] ^= (uint8_t)(1u << below(random, 8));
        break;
    case 2:
        frame[start] = (uint8_t)draw(random);
        break;
    case 3:
        memset(frame + start, (int)draw(random), length);
        break;
    case 4:
        for (size_t i = 0; i < length; i++) {
            frame[start + i] = (uint8_t)draw(random);
        }
        break;
    case 5: { /* a piece of another frame */
        blob other = below(random, 2) ? pick(matrices, matrix_count, random) : pick(frames, frame_count, random);
        size_t from = below(random, other.size), some = other.size - from < length ? other.size - from : length;
        if (some) {
            memcpy(frame + start, other.data + from, some);
        }
        break;
    }
    case 6: { /* a field */
        size_t offset = start / 4 * 4;
        if (offset + 4 <= size) {
            uint32_t number = numbers[below(random, sizeof numbers / sizeof *numbers)];
            store32(frame + offset, below(random, 2) ? number : load32(frame + offset) + below(random, 9) - 4);
        }
        break;
    }
    case 7:
        return size - length;
    default:
        for (size_t i = 0; i < length; i++) {
            frame[size + i] = (uint8_t)(below(random, 2) ? draw(random) : 0);
        }
        return size + length;
    }
    return size;
}

/* A matrix encoded for the purpose, and the numbers of its dictionaries. */
static uint8_t *fresh_matrix(uint64_t *random, size_t *numbers, size_t *count, size_t *size) {
    const qmoe_dictionary *chosen[DICTIONARIES];
    size_t wanted = below(random, 4), first = below(random, frame_count);
    *count = 0;
    for (size_t step = 0; step < frame_count && *count < wanted; step++) {
        size_t i = (first + step) % frame_count;
        bool fits = opened[i] && (frames[i].data[7] != 16 || below(random, 8) == 0);
        for (size_t k = 0; k < *count; k++) { /* of one width, and different */
            fits = fits && frames[i].data[7] == frames[numbers[k]].data[7] &&
                   load32(frames[i].data + 28) != load32(frames[numbers[k]].data + 28);
        }
        if (fits) {
            chosen[*count] = opened[i];
            numbers[(*count)++] = i;
        }
    }
    uint32_t rows = below(random, 40), columns = below(random, below(random, 4) ? 300 : 3000);
    if (below(random, 64) == 0) { /* too long for lists */
        rows = 1 + below(random, 2);
        columns = 65400 + below(random, 200);
    }
    return encode(rows, columns, NULL, chosen, *count, random, size);
}

/* The dictionaries that a matrix of the vectors names, as far as they are there. */
static size_t named_dictionaries(const uint8_t *frame, size_t size, size_t *numbers) {
    size_t count = 0;
    for (size_t k = 0; size >= HEADER_SIZE && k < frame[22] && k < DICTIONARIES; k++) {
        for (size_t i = 0; i < frame_count; i++) {
            if (opened[i] && load32(frames[i].data + 28) == load32(frame + 40 + 4 * k)) {
                numbers[count++] = i;
                break;
            }
        }
    }
    return count;
}

static size_t make_input(uint8_t *input, uint64_t *random) {
    size_t numbers[DICTIONARIES], count = 0, matrix_size = 0;
    uint8_t *matrix = below(random, 2) ? fresh_matrix(random, numbers, &count, &matrix_size) : NULL;
    if (!matrix) {
        blob golden = pick(matrices, matrix_count, random);
        matrix = copy_of(golden.data, matrix_size = golden.size);
        count = named_dictionaries(matrix, matrix_size, numbers);
    }
    if (count == 0 && below(random, 4) == 0) {
        numbers[count++] = below(random, frame_count);
    }
    input_header header = {draw(random), below(random, 4) > 0, (uint32_t)count, {0}};
    size_t size = sizeof header;
    for (size_t i = 0; i < count; i++) {
        const blob *frame = frames + numbers[i];
        memcpy(input + size, frame->data, frame->size);
        size_t after = frame->size;
        for (uint32_t turns = below(random, 4) ? 0 : 1 + below(random, 3); turns; turns--) {
            after = mutate(input + size, after, 32, random);
        }
        header.dictionary_sizes[i] = (uint32_t)after;
        size += after;
    }
    memcpy(input, &header, sizeof header);
    if (matrix_size) {
        memcpy(input + size, matrix, matrix_size);
    }
    for (uint32_t turns = below(random, 8) ? 1 + below(random, 3) : 0; turns; turns--) {
        matrix_size = mutate(input + size, matrix_size, HEADER_SIZE, random);
    }
    free(matrix);
    return size + matrix_size;
}

int main(int argument_count, char **arguments) {
    if (argument_count < 3) {
        fprintf(stderr, "usage: fuzz_core SECONDS SEED VECTOR... | fuzz_core replay FINDING...\n");
        return 2;
    }
    signal(SIGALRM, hangs);
    signal(SIGABRT, keep_input);
    if (strcmp(arguments[1], "replay") == 0) {
        for (int i = 2; i < argument_count; i++) {
            blob input = read_file(arguments[i]);
            LLVMFuzzerTestOneInput(input.data, input.size);
            free(input.data);
        }
        return 0;
    }
    double start = seconds(), limit = strtod(arguments[1], NULL);
    uint64_t random = strtoull(arguments[2], NULL, 10);
    load_vectors(arguments + 3, argument_count - 3);
    uint8_t *input = room(CAPACITY);
    memset(&counts, 0, sizeof counts);
    executions = 0;
    while (seconds() - start < limit) {
        alarm(HANG_SECONDS);
        size_t size = make_input(input, &random);
        LLVMFuzzerTestOneInput(input, size);
    }
    alarm(0);
    free(input);
    for (size_t i = 0; i < matrix_count; i++) {
        free(matrices[i].data);
    }
    for (size_t i = 0; i < frame_count; i++) {
        qmoe_dictionary_close(opened[i]);
        free(frames[i].data);
    }
    printf("{\"kernels\": \"%s\", \"seconds\": %.0f, \"executions\": %" PRIu64 ", \"dictionaries\": %" PRIu64
           ", \"checked\": %" PRIu64 ", \"unchecked\": %" PRIu64 ", \"changed\": %" PRIu64 ", \"products\": %" PRIu64
           ", \"encoded\": %" PRIu64 "}\n",
           qmoe_kernels_name(), seconds() - start, executions, counts.dictionaries, counts.checked,
           counts.unchecked, counts.changed, counts.products, counts.encoded);
    return 0;
}

#endif
