/*
 * Uses one dictionary and its matrices from several threads at once, and from children forked meanwhile.
 *
 *     threads DICTIONARY CHILDREN
 *
 * Built with the thread sanitizer (cmake -DQMOE_SANITIZE=thread) it reports races. What the library makes when first
 * needed (the choice of kernels, a dictionary's tables, helpers) is needed first by all at once here. Sanitizers take
 * no forks of several threads (their own locks stay held in the child), so children are for an ordinary build.
 */
#define _POSIX_C_SOURCE 200809L
#include "qmoe.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { USERS = 4, TURNS = 60, ROWS = 200, COLUMNS = 300, TOKENS = 5 };

static qmoe_dictionary *dictionary;
static pthread_barrier_t everybody;
static atomic_bool forked; /* all children are there */
static int8_t trits[ROWS][COLUMNS];
static float levels[ROWS][2], x[TOKENS][COLUMNS], expected[TOKENS][ROWS];

static void require(bool condition, const char *what) {
    if (!condition) {
        fprintf(stderr, "threads: %s failed\n", what);
        _exit(1);
    }
}

/* x and the levels are small whole numbers: every sum is exact, whatever its order. */
static void make_data(void) {
    uint32_t random = 1;
    for (int row = 0; row < ROWS; row++) {
        levels[row][0] = -(float)(1 + row % 3);
        levels[row][1] = (float)(1 + row % 5);
        for (int column = 0; column < COLUMNS; column++) {
            random = random * 1664525 + 1013904223;
            trits[row][column] = (int8_t)(random >> 28 == 0 ? 1 : random >> 28 == 1 ? -1 : 0);
        }
    }
    for (int token = 0; token < TOKENS; token++) {
        for (int column = 0; column < COLUMNS; column++) {
            x[token][column] = (float)((token + 3 * column) % 17 - 8);
        }
        for (int row = 0; row < ROWS; row++) {
            for (int column = 0; column < COLUMNS; column++) {
                int8_t trit = trits[row][column];
                expected[token][row] += trit ? levels[row][trit > 0] * x[token][column] : 0;
            }
        }
    }
}

static void multiply(const qmoe_matrix *matrix, unsigned turn) {
    float y[TOKENS][ROWS];
    uint64_t tokens = turn % 2 ? TOKENS : 1;
    require(qmoe_matrix_matmul(matrix, x, QMOE_FLOAT32, tokens, y[0], 1 + turn % 4, NULL) == QMOE_OK, "matmul");
    require(memcmp(y, expected, tokens * sizeof y[0]) == 0, "comparison of products");
}

static void *use(void *number) {
    pthread_barrier_wait(&everybody);
    uint8_t *frame;
    uint64_t size;
    const qmoe_dictionary *usable = dictionary;
    require(qmoe_encode(trits[0], levels[0], ROWS, COLUMNS, &usable, 1, NULL, 0, &frame, &size, NULL) == QMOE_OK,
            "encoding");
    qmoe_matrix *matrix;
    require(qmoe_matrix_open(frame, size, &usable, 1, 0, &matrix, NULL) == QMOE_OK, "opening");
    int8_t *decoded = malloc(sizeof trits);
    for (unsigned turn = 0; turn < TURNS || !atomic_load(&forked); turn++) {
        multiply(matrix, turn + *(unsigned *)number);
        require(qmoe_matrix_decode(matrix, 0, ROWS, decoded, 1 + turn % 3, NULL) == QMOE_OK, "decoding");
        require(memcmp(decoded, trits, sizeof trits) == 0, "comparison of trits");
    }
    free(decoded);
    qmoe_matrix_close(matrix);
    qmoe_free(frame);
    return NULL;
}

static void fork_and_use(const qmoe_matrix *matrix) {
    pid_t child = fork();
    require(child >= 0, "fork");
    if (child == 0) {
        alarm(60);
        for (unsigned turn = 0; turn < 4; turn++) {
            multiply(matrix, turn);
        }
        _exit(0);
    }
    int status;
    require(waitpid(child, &status, 0) == child, "waiting for a forked child");
    if (status) {
        fprintf(stderr, "threads: a forked child ended with status %#x\n", (unsigned)status);
        _exit(1);
    }
}

int main(int argument_count, char **arguments) {
    static uint8_t content[1 << 16];
    FILE *file = argument_count == 3 ? fopen(arguments[1], "rb") : NULL;
    if (!file) {
        fprintf(stderr, "usage: threads DICTIONARY CHILDREN\n");
        return 2;
    }
    size_t size = fread(content, 1, sizeof content, file);
    fclose(file);
    require(qmoe_dictionary_open(content, size, &dictionary, NULL) == QMOE_OK, "opening the dictionary");
    make_data();

    pthread_t users[USERS];
    unsigned numbers[USERS];
    pthread_barrier_init(&everybody, NULL, USERS + 1);
    for (unsigned i = 0; i < USERS; i++) {
        numbers[i] = i;
        require(pthread_create(users + i, NULL, use, numbers + i) == 0, "a thread");
    }
    pthread_barrier_wait(&everybody);
    uint8_t *frame;
    uint64_t frame_size;
    const qmoe_dictionary *usable = dictionary;
    require(qmoe_encode(trits[0], levels[0], ROWS, COLUMNS, &usable, 1, NULL, 0, &frame, &frame_size, NULL) == QMOE_OK,
            "encoding");
    qmoe_matrix *matrix;
    require(qmoe_matrix_open(frame, frame_size, &usable, 1, 0, &matrix, NULL) == QMOE_OK, "opening");
    for (long left = strtol(arguments[2], NULL, 10); left > 0; left--) {
        fork_and_use(matrix);
    }
    atomic_store(&forked, true);
    for (unsigned i = 0; i < USERS; i++) {
        pthread_join(users[i], NULL);
    }
    multiply(matrix, 3);
    qmoe_matrix_close(matrix);
    qmoe_free(frame);
    qmoe_dictionary_close(dictionary);
    printf("threads: no fault (%s kernels)\n", qmoe_kernels_name());
    return 0;
}
