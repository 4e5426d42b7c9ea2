/* Matrix frames: header, geometry, levels and row index (spec 4 to 4.3). */
#include "internal.h"

#include <math.h>
#include <stdlib.h>

uint32_t qmoe_level_size(uint32_t level_format) {
    static const uint32_t sizes[4] = {8, 4, 4, 2};
    return sizes[level_format];
}

void qmoe_frame_geometry(frame_layout *layout) {
    static const uint32_t selector_bits[MAXIMUM_DICTIONARIES + 1] = {0, 0, 1, 2, 2};
    uint64_t rows = layout->rows;
    layout->selector_bits = selector_bits[layout->dictionary_count];
    layout->row_index_start = round_up(FRAME_HEADER_SIZE + rows * qmoe_level_size(layout->level_format), 16);
    bool raw = layout->codec == CODEC_RAW;
    uint64_t blocks = raw ? 0 : (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    layout->counts_start = layout->row_index_start + 4 * blocks;
    layout->selectors_start = layout->counts_start + round_up((rows * layout->count_bits + 7) / 8, 4);
    layout->row_index_end = layout->selectors_start + round_up((rows * layout->selector_bits + 7) / 8, 4);
    layout->codewords_start = round_up(layout->row_index_end, 16);
    uint64_t size = raw ? (rows * layout->columns + 4) / 5 : ((uint64_t)layout->codeword_count * layout->bits + 7) / 8;
    layout->codewords_end = layout->codewords_start + size;
    layout->frame_size = round_up(layout->codewords_end + (raw ? 0 : 8), 16);
}

qmoe_status qmoe_frame_header(const uint8_t *frame, uint64_t size, frame_layout *layout, qmoe_error *error) {
    if (size < FRAME_HEADER_SIZE) {
        return qmoe_fail(error, QMOE_TRUNCATED, "frame", (int64_t)size, "at least 64 bytes");
    }
    if (memcmp(frame, "QMXM", 4) != 0) {
        return qmoe_fail(error, QMOE_MAGIC, "magic", load32(frame), "QMXM");
    }
    if (frame[4] != 1) {
        return qmoe_fail(error, QMOE_VERSION, "version_major", frame[4], "1");
    }
    if (qmoe_crc32c(0, frame, 60) != load32(frame + 60)) {
        return qmoe_fail(error, QMOE_CHECKSUM, "header_crc32c", load32(frame + 60), "CRC-32C of the header");
    }
    if (load32(frame + 8)) {
        return qmoe_fail(error, QMOE_VERSION, "flags", load32(frame + 8), "no flag known to version 1.0");
    }
    *layout = (frame_layout){
        .codec = frame[6],
        .level_format = frame[7],
        .rows = load32(frame + 12),
        .columns = load32(frame + 16),
        .level_exponent = (int8_t)frame[20],
        .bits = frame[21],
        .dictionary_count = frame[22],
        .count_bits = frame[23],
        .count_minimum = load32(frame + 24),
        .codeword_count = load32(frame + 28),
        .body_crc32c = load32(frame + 56),
    };
    bool dictionary = layout->codec == CODEC_DICTIONARY;
    if (layout->codec > CODEC_DICTIONARY) {
        return qmoe_fail(error, QMOE_HEADER, "codec", layout->codec, "0 or 1");
    }
    if (layout->level_format > LEVELS_E4M4) {
        return qmoe_fail(error, QMOE_HEADER, "level_format", layout->level_format, "0 to 3");
    }
    if (layout->rows > MAXIMUM_SIDE) {
        return qmoe_fail(error, QMOE_HEADER, "rows", layout->rows, "at most 2^24");
    }
    if (layout->columns > MAXIMUM_SIDE || (uint64_t)layout->rows * layout->columns > MAXIMUM_WEIGHTS) {
        return qmoe_fail(error, QMOE_HEADER, "columns", layout->columns, "at most 2^24, and 2^36 weights");
    }
    if (layout->level_format == LEVELS_E4M4 ? layout->level_exponent < -126 || layout->level_exponent > 112
                                            : layout->level_exponent != 0) {
        return qmoe_fail(error, QMOE_HEADER, "level_exponent", layout->level_exponent, "-126 to 112 for e4m4, else 0");
    }
    uint32_t bits = layout->bits;
    if (dictionary ? bits != 8 && bits != 10 && bits != 12 && bits != 16 : bits != 0) {
        return qmoe_fail(error, QMOE_HEADER, "bits", bits, "8, 10, 12 or 16; raw: 0");
    }
    if (dictionary ? layout->dictionary_count < 1 || layout->dictionary_count > MAXIMUM_DICTIONARIES
                   : layout->dictionary_count != 0) {
        return qmoe_fail(error, QMOE_HEADER, "dictionary_count", layout->dictionary_count, "1 to 4; raw: 0");
    }
    if (layout->count_bits > (dictionary ? 24 : 0)) {
        return qmoe_fail(error, QMOE_HEADER, "count_bits", layout->count_bits, "at most 24; raw: 0");
    }
    if (layout->count_minimum > (dictionary ? layout->columns : 0)) {
        return qmoe_fail(error, QMOE_HEADER, "count_minimum", layout->count_minimum, "at most columns; raw: 0");
    }
    if (!dictionary && layout->codeword_count) {
        return qmoe_fail(error, QMOE_HEADER, "codeword_count", layout->codeword_count, "raw: 0");
    }
    qmoe_frame_geometry(layout);
    uint64_t body_size = load64(frame + 32);
    if (body_size != layout->frame_size - FRAME_HEADER_SIZE) {
        return qmoe_fail(error, QMOE_SIZE, "body_size", (int64_t)body_size, "what the header's fields give");
    }
    for (unsigned i = 0; i < MAXIMUM_DICTIONARIES; i++) {
        uint32_t identity = load32(frame + 40 + 4 * i);
        layout->dictionary_ids[i] = identity;
        bool legal = i < layout->dictionary_count || identity == 0;
        for (unsigned k = 0; k < i && i < layout->dictionary_count; k++) {
            legal = legal && layout->dictionary_ids[k] != identity;
        }
        if (!legal) {
            return qmoe_fail(error, QMOE_HEADER, "dictionary_ids", identity, "distinct ids, then 0");
        }
    }
    return QMOE_OK;
}

/* The header, and that the frame is as long as it says. */
static qmoe_status read_header(const uint8_t *frame, size_t size, frame_layout *layout, qmoe_error *error) {
    qmoe_status status = qmoe_frame_header(frame, size, layout, error);
    if (status != QMOE_OK) {
        return status;
    }
    if (size < layout->frame_size) {
        return qmoe_fail(error, QMOE_TRUNCATED, "frame", (int64_t)size, "64 + body_size bytes");
    }
    if (size > layout->frame_size) {
        return qmoe_fail(error, QMOE_SIZE, "frame", (int64_t)size, "64 + body_size bytes");
    }
    return QMOE_OK;
}

static qmoe_status check_zero(const uint8_t *frame, uint64_t start, uint64_t end, const char *field,
                              qmoe_error *error) {
    for (uint64_t offset = start; offset < end; offset++) {
        if (frame[offset]) {
            return qmoe_fail(error, QMOE_PAYLOAD, field, frame[offset], "zero bytes");
        }
    }
    return QMOE_OK;
}

/* Element of a packed array that ends at `end`; for arrays without room behind them. */
static uint32_t packed_narrow(const uint8_t *frame, uint64_t start, uint64_t end, uint64_t index, uint32_t width) {
    if (width == 0) {
        return 0;
    }
    uint64_t bit = index * width, byte = start + bit / 8;
    uint64_t value = 0;
    if (end - byte >= 8) { /* almost always, and a copy of a known size is one load */
        value = load64(frame + byte);
    } else {
        memcpy(&value, frame + byte, (size_t)(end - byte));
    }
    return (uint32_t)(value >> (bit % 8)) & ((1u << width) - 1);
}

static uint32_t row_count(const qmoe_matrix *matrix, uint32_t row) {
    const frame_layout *layout = &matrix->layout;
    return layout->count_minimum +
           packed_narrow(matrix->frame, layout->counts_start, layout->selectors_start, row, layout->count_bits);
}

/* Bits of a packed array's last bytes that belong to no element. */
static qmoe_status check_unused_bits(const uint8_t *frame, uint64_t start, uint64_t bits, uint64_t end,
                                     const char *field, qmoe_error *error) {
    uint64_t byte = start + bits / 8;
    if (bits % 8 && frame[byte] >> (bits % 8)) {
        return qmoe_fail(error, QMOE_PAYLOAD, field, frame[byte], "zero bits after the last element");
    }
    return check_zero(frame, byte + (bits % 8 != 0), end, field, error);
}

/* Whether all levels are finite: whether none has all bits of its exponent set. */
static bool levels_finite(const qmoe_matrix *matrix) {
    const uint8_t *levels = matrix->frame + FRAME_HEADER_SIZE;
    size_t count = 2 * (size_t)matrix->layout.rows;
    bool infinite = false; /* without a way out, so that the compiler takes many at a time */
    if (matrix->layout.level_format == LEVELS_FLOAT32) {
        for (size_t i = 0; i < count; i++) {
            infinite |= (load32(levels + 4 * i) & 0x7F800000) == 0x7F800000;
        }
    } else if (matrix->layout.level_format != LEVELS_E4M4) {
        uint32_t exponent = matrix->layout.level_format == LEVELS_BFLOAT16 ? 0x7F80 : 0x7C00;
        for (size_t i = 0; i < count; i++) {
            infinite |= (load16(levels + 2 * i) & exponent) == exponent;
        }
    }
    return !infinite;
}

static qmoe_status check_levels(const qmoe_matrix *matrix, qmoe_error *error) {
    if (levels_finite(matrix)) {
        return QMOE_OK;
    }
    for (uint32_t row = 0; row < matrix->layout.rows; row++) {
        float levels[2];
        qmoe_row_levels(matrix, row, levels);
        if (!isfinite(levels[0]) || !isfinite(levels[1])) {
            return qmoe_fail(error, QMOE_PAYLOAD, "levels", row, "finite levels");
        }
    }
    return QMOE_OK;
}

static qmoe_status check_row_index(const qmoe_matrix *matrix, qmoe_error *error) {
    const frame_layout *layout = &matrix->layout;
    const uint8_t *frame = matrix->frame;
    qmoe_status status = check_unused_bits(frame, layout->counts_start, (uint64_t)layout->rows * layout->count_bits,
                                           layout->selectors_start, "counts", error);
    if (status != QMOE_OK) {
        return status;
    }
    uint64_t before = 0;
    for (uint32_t row = 0; row < layout->rows; row++) {
        uint32_t count = row_count(matrix, row);
        if (count > layout->columns) {
            return qmoe_fail(error, QMOE_INDEX, "counts", count, "at most columns");
        }
        if (row % BLOCK_ROWS == 0 && load32(frame + layout->row_index_start + row / BLOCK_ROWS * 4) != before) {
            return qmoe_fail(error, QMOE_INDEX, "bases", (int64_t)before, "the sum of the counts before");
        }
        before += count;
    }
    if (before != layout->codeword_count) {
        return qmoe_fail(error, QMOE_INDEX, "codeword_count", layout->codeword_count, "the sum of the counts");
    }
    status = check_unused_bits(frame, layout->selectors_start, (uint64_t)layout->rows * layout->selector_bits,
                               layout->row_index_end, "selectors", error);
    for (uint32_t row = 0; status == QMOE_OK && row < layout->rows && layout->selector_bits; row++) {
        uint32_t selector = packed_narrow(frame, layout->selectors_start, layout->row_index_end, row,
                                          layout->selector_bits);
        if (selector >= layout->dictionary_count) {
            status = qmoe_fail(error, QMOE_PAYLOAD, "selectors", selector, "below dictionary_count");
        }
    }
    return status;
}

static qmoe_status find_dictionaries(qmoe_matrix *matrix, const qmoe_dictionary *const *dictionaries, size_t count,
                                     qmoe_error *error) {
    for (uint32_t i = 0; i < matrix->layout.dictionary_count; i++) {
        for (size_t k = 0; k < count && !matrix->dictionaries[i]; k++) {
            if (dictionaries[k]->info.dictionary_id == matrix->layout.dictionary_ids[i] &&
                dictionaries[k]->info.bits == matrix->layout.bits) {
                matrix->dictionaries[i] = dictionaries[k];
            }
        }
        if (!matrix->dictionaries[i]) {
            return qmoe_fail(error, QMOE_DICTIONARY, "dictionary_ids", matrix->layout.dictionary_ids[i],
                             "a dictionary at hand, with the frame's bits");
        }
        matrix->phrases[i] = qmoe_dictionary_phrases(matrix->dictionaries[i]);
        if (!matrix->phrases[i]) {
            return qmoe_fail(error, QMOE_MEMORY, "dictionary_ids", i, "enough memory");
        }
    }
    return QMOE_OK;
}

static qmoe_status open_matrix(qmoe_matrix *matrix, size_t size, const qmoe_dictionary *const *dictionaries,
                               size_t dictionary_count, unsigned options, qmoe_error *error) {
    frame_layout *layout = &matrix->layout;
    const uint8_t *frame = matrix->frame;
    qmoe_status status = read_header(frame, size, layout, error);
    if (status != QMOE_OK) {
        return status;
    }
    bool whole = !(options & QMOE_SKIP_BODY);
    if (whole) {
        size_t body_size = (size_t)(layout->frame_size - FRAME_HEADER_SIZE);
        if (qmoe_crc32c(0, frame + FRAME_HEADER_SIZE, body_size) != layout->body_crc32c) {
            return qmoe_fail(error, QMOE_CHECKSUM, "body_crc32c", layout->body_crc32c, "CRC-32C of the body");
        }
    }
    uint64_t levels_end = FRAME_HEADER_SIZE + (uint64_t)layout->rows * qmoe_level_size(layout->level_format);
    if ((status = check_zero(frame, levels_end, layout->row_index_start, "padding", error)) != QMOE_OK ||
        (status = check_zero(frame, layout->row_index_end, layout->codewords_start, "padding", error)) != QMOE_OK ||
        (status = check_zero(frame, layout->codewords_end, layout->frame_size, "padding", error)) != QMOE_OK ||
        (status = check_levels(matrix, error)) != QMOE_OK ||
        (status = find_dictionaries(matrix, dictionaries, dictionary_count, error)) != QMOE_OK) {
        return status;
    }
    if (layout->codec == CODEC_DICTIONARY && (status = check_row_index(matrix, error)) != QMOE_OK) {
        return status;
    }
    uint64_t used = (uint64_t)layout->codeword_count * layout->bits;
    if (used % 8 && frame[layout->codewords_end - 1] >> (used % 8)) {
        return qmoe_fail(error, QMOE_PAYLOAD, "codewords", frame[layout->codewords_end - 1],
                         "zero bits after the last codeword");
    }
    if (!whole) {
        return QMOE_OK;
    }
    return layout->codec == CODEC_RAW ? qmoe_check_raw(matrix, error) : qmoe_check_rows(matrix, error);
}

qmoe_status qmoe_matrix_open(const uint8_t *frame, size_t size, const qmoe_dictionary *const *dictionaries,
                             size_t dictionary_count, unsigned options, qmoe_matrix **result, qmoe_error *error) {
    qmoe_matrix *matrix = calloc(1, sizeof *matrix);
    if (!matrix) {
        return qmoe_fail(error, QMOE_MEMORY, "matrix", (int64_t)sizeof *matrix, "enough memory");
    }
    matrix->frame = frame;
    qmoe_status status = open_matrix(matrix, size, dictionaries, dictionary_count, options, error);
    if (status != QMOE_OK) {
        free(matrix);
        return status;
    }
    *result = matrix;
    return QMOE_OK;
}

void qmoe_matrix_close(qmoe_matrix *matrix) { free(matrix); }

uint32_t qmoe_matrix_rows(const qmoe_matrix *matrix) { return matrix->layout.rows; }

uint32_t qmoe_matrix_columns(const qmoe_matrix *matrix) { return matrix->layout.columns; }

/* (16 + low four bits) * 2^(high four bits + level_exponent - 4), which is always a normal number (spec 4.1). */
static float e4m4(uint8_t byte, int level_exponent) {
    return float_from_bits(byte ? (uint32_t)(127 + byte / 16 + level_exponent) << 23 | (uint32_t)(byte % 16) << 19 : 0);
}

static inline void row_levels(const qmoe_matrix *matrix, uint32_t row, float levels[2]) {
    uint32_t format = matrix->layout.level_format;
    const uint8_t *bytes = matrix->frame + FRAME_HEADER_SIZE + (size_t)row * qmoe_level_size(format);
    switch (format) {
    case LEVELS_FLOAT32:
        memcpy(levels, bytes, 8);
        break;
    case LEVELS_BFLOAT16:
        levels[0] = qmoe_from_bfloat16(load16(bytes));
        levels[1] = qmoe_from_bfloat16(load16(bytes + 2));
        break;
    case LEVELS_FLOAT16:
        levels[0] = qmoe_from_float16(load16(bytes));
        levels[1] = qmoe_from_float16(load16(bytes + 2));
        break;
    default:
        levels[0] = 0.0f - e4m4(bytes[0], matrix->layout.level_exponent); /* zero stays positive */
        levels[1] = e4m4(bytes[1], matrix->layout.level_exponent);
    }
}

void qmoe_row_levels(const qmoe_matrix *matrix, uint32_t row, float levels[2]) { row_levels(matrix, row, levels); }

void qmoe_rows_levels(const qmoe_matrix *matrix, uint32_t first_row, uint32_t row_count, float (*levels)[2]) {
    for (uint32_t i = 0; i < row_count; i++) {
        row_levels(matrix, first_row + i, levels[i]);
    }
}

void qmoe_matrix_levels(const qmoe_matrix *matrix, float *levels) {
    for (uint32_t row = 0; row < matrix->layout.rows; row++) {
        row_levels(matrix, row, levels + 2 * (size_t)row);
    }
}

row_cursor qmoe_rows_from(const qmoe_matrix *matrix, uint32_t row) {
    uint32_t block = row - row % BLOCK_ROWS;
    row_cursor cursor = {matrix, block, 0};
    if (row < matrix->layout.rows) {
        cursor.first = load32(matrix->frame + matrix->layout.row_index_start + block / BLOCK_ROWS * 4);
        while (cursor.row < row) {
            cursor.first += row_count(matrix, cursor.row++);
        }
    }
    return cursor;
}

static inline row_codewords next_row(row_cursor *cursor) {
    const qmoe_matrix *matrix = cursor->matrix;
    const frame_layout *layout = &matrix->layout;
    uint32_t selector = packed_narrow(matrix->frame, layout->selectors_start, layout->row_index_end, cursor->row,
                                      layout->selector_bits);
    /* The frame may have changed since it was checked: never name a dictionary that is not there, ... */
    uint32_t number = selector < layout->dictionary_count ? selector : 0;
    row_codewords row = {cursor->first, row_count(matrix, cursor->row), number, matrix->dictionaries[number]};
    /* ... nor walk past the codewords. */
    if (row.first > layout->codeword_count || row.count > layout->codeword_count - row.first) {
        row.count = 0;
    }
    cursor->first += row.count;
    cursor->row++;
    return row;
}

static inline codeword_source row_source(const qmoe_matrix *matrix, const row_codewords *row) {
    const frame_layout *layout = &matrix->layout;
    return (codeword_source){.array = matrix->frame + layout->codewords_start,
                             .limit = matrix->frame + layout->frame_size,
                             .first = row->first,
                             .bits = layout->bits,
                             .threshold = row->dictionary->info.threshold};
}

void qmoe_row_sources(const qmoe_matrix *matrix, uint32_t first_row, uint32_t row_count, codeword_source *sources,
                      uint32_t *counts, const phrase_tables **phrases) {
    row_cursor cursor = qmoe_rows_from(matrix, first_row);
    for (uint32_t i = 0; i < row_count; i++) {
        const row_codewords row = next_row(&cursor);
        sources[i] = row_source(matrix, &row);
        counts[i] = row.count;
        phrases[i] = matrix->phrases[row.dictionary_number];
    }
}

row_codewords qmoe_next_row(row_cursor *cursor) { return next_row(cursor); }

codeword_source qmoe_row_source(const qmoe_matrix *matrix, const row_codewords *row) { return row_source(matrix, row); }
