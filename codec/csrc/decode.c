/* Decoding of rows, to trits and to weights (spec 4.3, 4.4). */
#include "internal.h"

#include <stdlib.h>

qmoe_status qmoe_decode_row(const qmoe_matrix *matrix, const row_codewords *row, int8_t *trits, qmoe_error *error) {
    const uint8_t *array = matrix->frame + matrix->layout.codewords_start;
    const qmoe_dictionary *dictionary = row->dictionary;
    uint32_t columns = matrix->layout.columns, bits = matrix->layout.bits;
    uint32_t column = 0, table = 0;
    if (trits) {
        memset(trits, 0, columns);
    }
    for (uint32_t i = 0; i < row->count; i++) {
        uint32_t codeword = packed_wide(array, row->first + i, bits);
        uint32_t word = dictionary->words[table << bits | codeword];
        if (column >= columns) {
            return qmoe_fail(error, QMOE_PAYLOAD, "codewords", column, "a phrase that starts within the row");
        }
        if (!word) {
            return qmoe_fail(error, QMOE_PAYLOAD, "codewords", codeword, "a codeword that the dictionary uses");
        }
        for (unsigned k = 0; k < MAXIMUM_NONZEROS && word_position(word, k) != NO_POSITION; k++) {
            uint32_t position = column + word_position(word, k);
            if (position >= columns) {
                return qmoe_fail(error, QMOE_PAYLOAD, "codewords", position, "no non-zero beyond the row");
            }
            if (trits) {
                trits[position] = word_negative(word, k) ? -1 : 1;
            }
        }
        column += word_length(word);
        table = codeword >= dictionary->info.threshold;
    }
    return QMOE_OK;
}

qmoe_status qmoe_decode_raw(const qmoe_matrix *matrix, uint64_t first, uint64_t count, int8_t *trits,
                            qmoe_error *error) {
    const uint8_t *array = matrix->frame + matrix->layout.codewords_start;
    uint64_t weights = (uint64_t)matrix->layout.rows * matrix->layout.columns;
    for (uint64_t index = first / 5 * 5; index < first + count; index += 5) {
        uint32_t byte = array[index / 5];
        if (byte > 242) {
            return qmoe_fail(error, QMOE_PAYLOAD, "trits", byte, "a byte of at most 242");
        }
        for (uint64_t i = index; i < index + 5; i++, byte /= 3) {
            if (i >= weights && byte % 3) {
                return qmoe_fail(error, QMOE_PAYLOAD, "trits", byte, "digit 0 after the last trit");
            }
            if (trits && i >= first && i < first + count) {
                trits[i - first] = (int8_t)(byte % 3) - 1;
            }
        }
    }
    return QMOE_OK;
}

static qmoe_status check_range(const qmoe_matrix *matrix, uint32_t first_row, uint32_t row_count, qmoe_error *error) {
    uint32_t rows = matrix->layout.rows;
    if (first_row > rows || row_count > rows - first_row) {
        return qmoe_fail(error, QMOE_ARGUMENT, "first_row", (int64_t)first_row + row_count, "rows of the matrix");
    }
    return QMOE_OK;
}

qmoe_status qmoe_matrix_decode(const qmoe_matrix *matrix, uint32_t first_row, uint32_t row_count, int8_t *trits,
                               qmoe_error *error) {
    qmoe_status status = check_range(matrix, first_row, row_count, error);
    if (status != QMOE_OK) {
        return status;
    }
    uint64_t columns = matrix->layout.columns;
    if (matrix->layout.codec == CODEC_RAW) {
        return qmoe_decode_raw(matrix, first_row * columns, row_count * columns, trits, error);
    }
    row_cursor cursor = qmoe_rows_from(matrix, first_row);
    for (uint32_t row = 0; status == QMOE_OK && row < row_count; row++) {
        row_codewords codewords = qmoe_next_row(&cursor);
        status = qmoe_decode_row(matrix, &codewords, trits + row * columns, error);
    }
    return status;
}

static void dequantize_float32(const int8_t *trits, uint32_t columns, const float levels[2], float *weights) {
    const float values[3] = {levels[0], 0.0f, levels[1]};
    for (uint32_t column = 0; column < columns; column++) {
        weights[column] = values[trits[column] + 1];
    }
}

static void dequantize_16(const int8_t *trits, uint32_t columns, uint16_t low, uint16_t high, uint16_t *weights) {
    const uint16_t values[3] = {low, 0, high};
    for (uint32_t column = 0; column < columns; column++) {
        weights[column] = values[trits[column] + 1];
    }
}

qmoe_status qmoe_matrix_dequantize(const qmoe_matrix *matrix, uint32_t first_row, uint32_t row_count,
                                   qmoe_dtype dtype, void *weights, qmoe_error *error) {
    qmoe_status status = check_range(matrix, first_row, row_count, error);
    if (status != QMOE_OK) {
        return status;
    }
    uint32_t columns = matrix->layout.columns;
    int8_t *trits = malloc(columns ? columns : 1);
    if (!trits) {
        return qmoe_fail(error, QMOE_MEMORY, "columns", columns, "enough memory");
    }
    for (uint32_t row = 0; row < row_count; row++) {
        status = qmoe_matrix_decode(matrix, first_row + row, 1, trits, error);
        if (status != QMOE_OK) {
            break;
        }
        float levels[2];
        qmoe_row_levels(matrix, first_row + row, levels);
        size_t start = (size_t)row * columns;
        if (dtype == QMOE_FLOAT32) {
            dequantize_float32(trits, columns, levels, (float *)weights + start);
        } else if (dtype == QMOE_BFLOAT16) {
            dequantize_16(trits, columns, qmoe_to_bfloat16(levels[0]), qmoe_to_bfloat16(levels[1]),
                          (uint16_t *)weights + start);
        } else {
            dequantize_16(trits, columns, qmoe_to_float16(levels[0]), qmoe_to_float16(levels[1]),
                          (uint16_t *)weights + start);
        }
    }
    free(trits);
    return status;
}
