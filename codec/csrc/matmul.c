/*
 * Multiplication with a packed matrix: y = x W^T, a row of W at a time.
 *
 * A row becomes two lists of columns, those of its +1 and those of its -1. An output is then
 * high * (sum of x over the first list) + low * (sum of x over the second): one addition per non-zero weight,
 * and two multiplications per row.
 */
#include "internal.h"

#include <stdlib.h>

/* Columns of a row's non-zeros; each list has room for `columns` entries. */
typedef struct {
    uint32_t *columns[2]; /* of +1, of -1 */
    uint32_t count[2];
} row_nonzeros;

static qmoe_status list_coded(const qmoe_matrix *matrix, const row_codewords *row, row_nonzeros *list,
                              qmoe_error *error) {
    const uint8_t *array = matrix->frame + matrix->layout.codewords_start;
    const qmoe_dictionary *dictionary = row->dictionary;
    uint32_t columns = matrix->layout.columns, bits = matrix->layout.bits;
    uint32_t column = 0, table = 0;
    list->count[0] = list->count[1] = 0;
    for (uint32_t i = 0; i < row->count; i++) {
        uint32_t codeword = packed_wide(array, row->first + i, bits);
        uint32_t word = dictionary->words[table << bits | codeword];
        for (unsigned k = 0; k < MAXIMUM_NONZEROS && word_position(word, k) != NO_POSITION && word; k++) {
            uint32_t position = column + word_position(word, k);
            if (position >= columns) {
                return qmoe_fail(error, QMOE_PAYLOAD, "codewords", position, "no non-zero beyond the row");
            }
            bool negative = word_negative(word, k);
            list->columns[negative][list->count[negative]++] = position;
        }
        column += word_length(word);
        table = codeword >= dictionary->info.threshold;
    }
    return QMOE_OK;
}

static qmoe_status list_raw(const qmoe_matrix *matrix, uint32_t row, int8_t *trits, row_nonzeros *list,
                            qmoe_error *error) {
    uint32_t columns = matrix->layout.columns;
    qmoe_status status = qmoe_decode_raw(matrix, (uint64_t)row * columns, columns, trits, error);
    list->count[0] = list->count[1] = 0;
    for (uint32_t column = 0; status == QMOE_OK && column < columns; column++) {
        if (trits[column]) {
            bool negative = trits[column] < 0;
            list->columns[negative][list->count[negative]++] = column;
        }
    }
    return status;
}

/* Sum of x over some columns, in four lanes so that additions do not wait for each other. */
static float sum_over(const float *x, const uint32_t *columns, uint32_t count) {
    float lanes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    uint32_t i = 0;
    for (; i + 4 <= count; i += 4) {
        for (unsigned lane = 0; lane < 4; lane++) {
            lanes[lane] += x[columns[i + lane]];
        }
    }
    for (; i < count; i++) {
        lanes[0] += x[columns[i]];
    }
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

qmoe_status qmoe_matrix_matmul(const qmoe_matrix *matrix, const float *x, size_t tokens, float *y, unsigned threads,
                               qmoe_error *error) {
    uint32_t rows = matrix->layout.rows, columns = matrix->layout.columns;
    if (threads == 0) {
        return qmoe_fail(error, QMOE_ARGUMENT, "threads", threads, "at least 1");
    }
    uint8_t *scratch = malloc((size_t)columns * (2 * sizeof(uint32_t) + 1) + 1);
    if (!scratch) {
        return qmoe_fail(error, QMOE_MEMORY, "columns", columns, "enough memory");
    }
    row_nonzeros list = {.columns = {(uint32_t *)(void *)scratch, (uint32_t *)(void *)scratch + columns}};
    int8_t *trits = (int8_t *)((uint32_t *)(void *)scratch + 2 * (size_t)columns);
    bool raw = matrix->layout.codec == CODEC_RAW;
    row_cursor cursor = raw ? (row_cursor){0} : qmoe_rows_from(matrix, 0);
    qmoe_status status = QMOE_OK;
    for (uint32_t row = 0; row < rows; row++) {
        if (raw) {
            status = list_raw(matrix, row, trits, &list, error);
        } else {
            row_codewords codewords = qmoe_next_row(&cursor);
            status = list_coded(matrix, &codewords, &list, error);
        }
        if (status != QMOE_OK) {
            break;
        }
        float levels[2];
        qmoe_row_levels(matrix, row, levels);
        for (size_t token = 0; token < tokens; token++) {
            const float *input = x + token * columns;
            y[token * rows + row] = levels[1] * sum_over(input, list.columns[0], list.count[0]) +
                                    levels[0] * sum_over(input, list.columns[1], list.count[1]);
        }
    }
    free(scratch);
    return status;
}
