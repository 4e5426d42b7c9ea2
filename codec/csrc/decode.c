/* Decoding of rows, to trits and to weights (spec 4.3, 4.4). */
#include "internal.h"
#include "parallel.h"
#include "scratch.h"

/* Whether a word's non-zeros lie before `end`, which is counted from the phrase's start. */
static bool nonzeros_before(uint32_t word, uint32_t end) {
    bool inside = true; /* without a way out: how many a word has is nothing that a processor could guess */
    for (unsigned k = 0; k < MAXIMUM_NONZEROS; k++) {
        inside &= (word_position(word, k) < end) | (word_position(word, k) == NO_POSITION);
    }
    return inside;
}

/* Phrase by phrase, to say what is wrong. */
static qmoe_status walk_row(const qmoe_matrix *matrix, const row_codewords *row, qmoe_error *error) {
    const uint8_t *array = matrix->frame + matrix->layout.codewords_start;
    const qmoe_dictionary *dictionary = row->dictionary;
    uint32_t columns = matrix->layout.columns, bits = matrix->layout.bits;
    uint32_t column = 0, table = 0;
    for (uint32_t i = 0; i < row->count; i++) {
        uint32_t codeword = packed_wide(array, row->first + i, bits);
        uint32_t word = dictionary->words[table << bits | codeword];
        if (column >= columns) {
            return qmoe_fail(error, QMOE_PAYLOAD, "codewords", column, "a phrase that starts within the row");
        }
        if (!word) {
            return qmoe_fail(error, QMOE_PAYLOAD, "codewords", codeword, "a codeword that the dictionary uses");
        }
        if (!nonzeros_before(word, columns - column)) {
            return qmoe_fail(error, QMOE_PAYLOAD, "codewords", codeword, "no non-zero beyond the row");
        }
        column += word_length(word);
        table = codeword >= dictionary->info.threshold;
    }
    return QMOE_OK;
}

/* Whether the phrases of a row, whose lengths sum up to `total`, are as they should be. */
static inline bool row_fits(const codeword_source *source, const row_codewords *row, uint64_t total,
                            uint32_t columns) {
    if (total <= columns) {
        return true; /* a phrase's non-zeros lie within it */
    }
    if (total == UINT64_MAX) {
        return false;
    }
    /* Lengths are at least 1: so if the last phrase starts within the row, all do, and it alone can reach beyond. */
    uint64_t last = row->first + row->count - 1;
    uint32_t codeword = packed_wide(source->array, last, source->bits);
    uint32_t table = row->count > 1 && packed_wide(source->array, last - 1, source->bits) >= source->threshold;
    uint32_t word = row->dictionary->words[table << source->bits | codeword];
    uint64_t start = total - word_length(word);
    return start < columns && nonzeros_before(word, columns - (uint32_t)start);
}

qmoe_status qmoe_check_rows(const qmoe_matrix *matrix, qmoe_error *error) {
    uint32_t left = matrix->layout.rows;
    row_cursor cursor = qmoe_rows_from(matrix, 0);
    while (left) {
        row_codewords rows[BLOCK_ROWS];
        uint32_t counts[BLOCK_ROWS];
        uint64_t totals[BLOCK_ROWS];
        uint32_t block = left < BLOCK_ROWS ? left : BLOCK_ROWS;
        for (uint32_t i = 0; i < block; i++) {
            rows[i] = qmoe_next_row(&cursor);
            counts[i] = rows[i].count;
        }
        for (uint32_t first = 0, end; first < block; first = end) {
            codeword_source source = qmoe_row_source(matrix, rows + first);
            for (end = first + 1; end < block && rows[end].dictionary == rows[first].dictionary; end++) {
            }
            qmoe_chosen_kernels()->measure_rows(&source, end - first, counts + first,
                                                matrix->phrases[rows[first].dictionary_number], totals + first);
            for (uint32_t i = first; i < end; i++) {
                qmoe_status status = QMOE_OK;
                if (!row_fits(&source, rows + i, totals[i], matrix->layout.columns) &&
                    (status = walk_row(matrix, rows + i, error)) != QMOE_OK) {
                    return status;
                }
            }
        }
        left -= block;
    }
    return QMOE_OK;
}

qmoe_status qmoe_check_raw(const qmoe_matrix *matrix, qmoe_error *error) {
    const uint8_t *array = matrix->frame + matrix->layout.codewords_start;
    uint64_t weights = (uint64_t)matrix->layout.rows * matrix->layout.columns;
    uint64_t bytes = matrix->layout.codewords_end - matrix->layout.codewords_start;
    uint8_t largest = 0; /* without a way out, so that the compiler takes many bytes at a time */
    for (uint64_t i = 0; i < bytes; i++) {
        largest = array[i] > largest ? array[i] : largest;
    }
    if (largest > 242) {
        return qmoe_fail(error, QMOE_PAYLOAD, "trits", largest, "a byte of at most 242");
    }
    static const uint8_t powers[5] = {243, 3, 9, 27, 81}; /* of the digits that are used, by weights mod 5 */
    if (bytes && array[bytes - 1] >= powers[weights % 5]) {
        return qmoe_fail(error, QMOE_PAYLOAD, "trits", array[bytes - 1], "digit 0 after the last trit");
    }
    return QMOE_OK;
}

/* The five trits of each legal byte of a raw frame, and three bytes so that they can be copied as one word. */
#define TRITS_1(n) {(n) % 3 - 1, (n) / 3 % 3 - 1, (n) / 9 % 3 - 1, (n) / 27 % 3 - 1, (n) / 81 - 1}
#define TRITS_3(n) TRITS_1(n), TRITS_1((n) + 1), TRITS_1((n) + 2)
#define TRITS_9(n) TRITS_3(n), TRITS_3((n) + 3), TRITS_3((n) + 6)
#define TRITS_27(n) TRITS_9(n), TRITS_9((n) + 9), TRITS_9((n) + 18)
#define TRITS_81(n) TRITS_27(n), TRITS_27((n) + 27), TRITS_27((n) + 54)
static const int8_t raw_trits[243][8] = {TRITS_81(0), TRITS_81(81), TRITS_81(162)};

void qmoe_decode_raw(const qmoe_matrix *matrix, uint64_t first, uint32_t count, int8_t *trits) {
    const uint8_t *byte = matrix->frame + matrix->layout.codewords_start + first / 5;
    uint32_t skip = (uint32_t)(first % 5), done = 0;
    if (skip && count) {
        const int8_t *five = raw_trits[*byte < 243 ? *byte : 0];
        byte++;
        memcpy(trits, five + skip, 5 - skip);
        done = 5 - skip;
    }
    for (; done < count; done += 5, byte++) {
        memcpy(trits + done, raw_trits[*byte < 243 ? *byte : 0], 8);
    }
}

void qmoe_decode_rows(const qmoe_matrix *matrix, uint32_t first_row, uint32_t row_count, decoded_row *use,
                      void *context, int8_t *scratch) {
    const qmoe_kernels *kernels = qmoe_chosen_kernels();
    uint32_t columns = matrix->layout.columns;
    bool raw = matrix->layout.codec == CODEC_RAW;
    row_cursor cursor = raw ? (row_cursor){0} : qmoe_rows_from(matrix, first_row);
    for (uint32_t row = first_row; row < first_row + row_count; row++) {
        if (raw) {
            qmoe_decode_raw(matrix, (uint64_t)row * columns, columns, scratch);
        } else {
            row_codewords codewords = qmoe_next_row(&cursor);
            codeword_source source = qmoe_row_source(matrix, &codewords);
            kernels->decode_row(&source, codewords.count, matrix->phrases[codewords.dictionary_number], columns,
                                scratch);
        }
        use(context, matrix, row, scratch);
    }
}

/* ---- all rows of a range, shared out ---- */

enum { ROWS_PER_UNIT = 32 };

typedef struct {
    const qmoe_matrix *matrix;
    uint32_t first_row, row_count;
    int8_t *scratch; /* [threads][columns + SLACK] */
    decoded_row *use;
    int dtype;
    void *output;
} decoding;

static void use_trits(void *context, const qmoe_matrix *matrix, uint32_t row, const int8_t *trits) {
    const decoding *work = context;
    size_t columns = matrix->layout.columns;
    memcpy((int8_t *)work->output + (row - work->first_row) * columns, trits, columns);
}

static void use_weights(void *context, const qmoe_matrix *matrix, uint32_t row, const int8_t *trits) {
    const decoding *work = context;
    const qmoe_kernels *kernels = qmoe_chosen_kernels();
    uint32_t columns = matrix->layout.columns;
    size_t start = (size_t)(row - work->first_row) * columns;
    float levels[2];
    qmoe_row_levels(matrix, row, levels);
    if (work->dtype == QMOE_FLOAT32) {
        uint32_t bits[2];
        memcpy(bits, levels, sizeof bits);
        kernels->dequantize_32(trits, columns, bits, (uint32_t *)work->output + start);
        return;
    }
    uint16_t (*narrow)(float) = work->dtype == QMOE_BFLOAT16 ? qmoe_to_bfloat16 : qmoe_to_float16;
    const uint16_t bits[2] = {narrow(levels[0]), narrow(levels[1])};
    kernels->dequantize_16(trits, columns, bits, (uint16_t *)work->output + start);
}

static void decode_unit(void *context, unsigned unit, unsigned thread) {
    decoding *work = context;
    uint32_t done = unit * ROWS_PER_UNIT;
    uint32_t some = work->row_count - done < ROWS_PER_UNIT ? work->row_count - done : ROWS_PER_UNIT;
    int8_t *scratch = work->scratch + thread * ((size_t)work->matrix->layout.columns + SLACK);
    qmoe_decode_rows(work->matrix, work->first_row + done, some, work->use, work, scratch);
}

static qmoe_status decode_all(decoding *work, unsigned threads, qmoe_error *error) {
    const frame_layout *layout = &work->matrix->layout;
    if (work->first_row > layout->rows || work->row_count > layout->rows - work->first_row) {
        return qmoe_fail(error, QMOE_ARGUMENT, "first_row", (int64_t)work->first_row + work->row_count,
                         "rows of the matrix");
    }
    if (threads == 0 || threads > MAXIMUM_THREADS) {
        return qmoe_fail(error, QMOE_ARGUMENT, "threads", threads, "1 to 256");
    }
    unsigned units = (work->row_count + ROWS_PER_UNIT - 1) / ROWS_PER_UNIT;
    threads = threads < units ? threads : units;
    work->scratch = qmoe_scratch(SCRATCH_ROWS, (threads ? threads : 1) * ((size_t)layout->columns + SLACK));
    if (!work->scratch) {
        return qmoe_fail(error, QMOE_MEMORY, "columns", layout->columns, "enough memory");
    }
    qmoe_parallel(threads, units, 0, decode_unit, work);
    qmoe_scratch_done();
    return QMOE_OK;
}

qmoe_status qmoe_matrix_decode(const qmoe_matrix *matrix, uint32_t first_row, uint32_t row_count, int8_t *trits,
                               unsigned threads, qmoe_error *error) {
    decoding work = {.matrix = matrix,
                     .first_row = first_row,
                     .row_count = row_count,
                     .use = use_trits,
                     .output = trits};
    return decode_all(&work, threads, error);
}

qmoe_status qmoe_matrix_dequantize(const qmoe_matrix *matrix, uint32_t first_row, uint32_t row_count,
                                   qmoe_dtype dtype, void *weights, unsigned threads, qmoe_error *error) {
    decoding work = {.matrix = matrix,
                     .first_row = first_row,
                     .row_count = row_count,
                     .use = use_weights,
                     .dtype = (int)dtype,
                     .output = weights};
    if (dtype != QMOE_FLOAT32 && dtype != QMOE_BFLOAT16 && dtype != QMOE_FLOAT16) {
        return qmoe_fail(error, QMOE_ARGUMENT, "dtype", (int64_t)dtype, "float32, bfloat16 or float16");
    }
    return decode_all(&work, threads, error);
}
