/*
 * What the parts of the library share. Layering: common, crc32c, kernels < dictionary, phrases < frame < decode,
 * encode < matmul, which ask parallel and scratch; file, json < safetensors < container < model, which asks frame and
 * dictionary.
 */
#ifndef QMOE_INTERNAL_H
#define QMOE_INTERNAL_H

#include "kernels.h"
#include "phrases.h"
#include "qmoe.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "libqmoe reads the format in place and needs a little-endian machine"
#endif

/* Spec 2. */
enum {
    MAXIMUM_SIDE = 1 << 24,
    MAXIMUM_PHRASE = 126,
    MAXIMUM_NONZEROS = 3,
    MAXIMUM_DICTIONARIES = 4,
    BLOCK_ROWS = 32
};
#define MAXIMUM_WEIGHTS (UINT64_C(1) << 36)

enum { DICTIONARY_HEADER_SIZE = 32, FRAME_HEADER_SIZE = 64 };
enum { KIND_TABLE = 0, KIND_TREES = 1 };
enum { CODEC_RAW = 0, CODEC_DICTIONARY = 1 };
enum { LEVELS_FLOAT32 = 0, LEVELS_BFLOAT16 = 1, LEVELS_FLOAT16 = 2, LEVELS_E4M4 = 3 };

/* Fill `error` (which may be NULL) and return `status`. */
qmoe_status qmoe_fail(qmoe_error *error, qmoe_status status, const char *field, int64_t value, const char *expected);

static inline uint16_t load16(const uint8_t *bytes) {
    uint16_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static inline uint32_t load32(const uint8_t *bytes) {
    uint32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static inline uint64_t load64(const uint8_t *bytes) {
    uint64_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static inline uint64_t round_up(uint64_t number, uint64_t multiple) {
    return (number + multiple - 1) / multiple * multiple;
}

static inline float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float qmoe_from_bfloat16(uint16_t bits) { return float_from_bits((uint32_t)bits << 16); }
float qmoe_from_float16(uint16_t bits);
uint16_t qmoe_to_bfloat16(float value);
uint16_t qmoe_to_float16(float value);

/* ---- dictionaries ---- */

/* A table word (spec 3.3). */
static inline uint32_t word_length(uint32_t word) { return word & 127; }
static inline uint32_t word_position(uint32_t word, unsigned k) { return (word >> (7 + 7 * k)) & 127; }
static inline bool word_negative(uint32_t word, unsigned k) { return (word >> (28 + k)) & 1; }
enum { NO_POSITION = 127 };

/*
 * The phrases as a tree for encoding, nodes in preorder with the child for 0 first: the node that `z` zeros lead to
 * from node n is n + z, for z <= zeros of n.
 */
typedef struct {
    int32_t codeword;  /* -1 if none */
    uint32_t child[2]; /* for +1 and -1; 0 if none */
    uint32_t zeros;    /* how many zeros can follow */
} encoder_node;

/* What a non-zero does to the walk along a pair of parse trees: the codewords that it emits, and the node after. */
typedef struct {
    uint16_t codewords[2];
    uint16_t emitted, node;
} encoder_jump;

typedef struct {
    uint32_t root[2], node_count;
    const encoder_jump *jumps; /* [node_count][2], for +1 and -1; NULL for a table */
    encoder_node nodes[];
} encoder_tree;

struct qmoe_dictionary {
    qmoe_dictionary_info info;
    uint32_t kind;
    _Atomic(encoder_tree *) encoder; /* both made when first needed */
    _Atomic(phrase_tables *) phrases;
    uint32_t words[];                /* [tables][2^bits] */
};

/* The dictionary's encoder tree, or NULL if memory is short. */
const encoder_tree *qmoe_dictionary_encoder(const qmoe_dictionary *dictionary);

/* The dictionary's tables for decoding, or NULL if memory is short. */
const phrase_tables *qmoe_dictionary_phrases(const qmoe_dictionary *dictionary);

/* ---- frames ---- */

/* Header of a matrix frame and where its sections lie (spec 4, 4.2). */
typedef struct {
    uint32_t codec, level_format, rows, columns, bits, dictionary_count, count_bits, count_minimum, codeword_count;
    int32_t level_exponent;
    uint32_t dictionary_ids[MAXIMUM_DICTIONARIES];
    uint32_t body_crc32c;
    uint32_t selector_bits;
    uint64_t row_index_start, counts_start, selectors_start, row_index_end, codewords_start, codewords_end, frame_size;
} frame_layout;

/* Read the header at `frame`, of which `size` bytes are there, in the order of checks of spec 4, without the rest. */
qmoe_status qmoe_frame_header(const uint8_t *frame, uint64_t size, frame_layout *layout, qmoe_error *error);

/* Compute what follows from the header's fields: everything from selector_bits on. */
void qmoe_frame_geometry(frame_layout *layout);

struct qmoe_matrix {
    frame_layout layout;
    const uint8_t *frame;
    const qmoe_dictionary *dictionaries[MAXIMUM_DICTIONARIES];
    const phrase_tables *phrases[MAXIMUM_DICTIONARIES]; /* of these dictionaries */
};

/* Bytes of a row's two levels. */
uint32_t qmoe_level_size(uint32_t level_format);
/* Levels of one row, and of several: low, high. */
void qmoe_row_levels(const qmoe_matrix *matrix, uint32_t row, float levels[2]);
void qmoe_rows_levels(const qmoe_matrix *matrix, uint32_t first_row, uint32_t row_count, float (*levels)[2]);

/* Element of a packed array; needs 8 readable bytes at its first byte, as codewords have (spec 4.2). */
static inline uint32_t packed_wide(const uint8_t *array, uint64_t index, uint32_t width) {
    uint64_t bit = index * width;
    return (uint32_t)(load64(array + bit / 8) >> (bit % 8)) & ((1u << width) - 1);
}

/* Where a row's codewords are. */
typedef struct {
    uint64_t first;
    uint32_t count, dictionary_number;
    const qmoe_dictionary *dictionary;
} row_codewords;

/* Walks over the rows of a frame with codec 1 from `row` on. */
typedef struct {
    const qmoe_matrix *matrix;
    uint32_t row;
    uint64_t first;
} row_cursor;

row_cursor qmoe_rows_from(const qmoe_matrix *matrix, uint32_t row);
row_codewords qmoe_next_row(row_cursor *cursor);

/* Check every codeword, or every byte of a raw frame (spec 4.3, 4.4). */
qmoe_status qmoe_check_rows(const qmoe_matrix *matrix, qmoe_error *error);
qmoe_status qmoe_check_raw(const qmoe_matrix *matrix, qmoe_error *error);

/* Trits of a raw frame from number `first` on, with up to 7 bytes written after the last. */
void qmoe_decode_raw(const qmoe_matrix *matrix, uint64_t first, uint32_t count, int8_t *trits);

/* A row's codewords in the form that the kernels take. */
codeword_source qmoe_row_source(const qmoe_matrix *matrix, const row_codewords *codewords);

/* The same of several rows, with their numbers of codewords and their dictionaries' tables. */
void qmoe_row_sources(const qmoe_matrix *matrix, uint32_t first_row, uint32_t row_count, codeword_source *sources,
                      uint32_t *counts, const phrase_tables **phrases);

/* Decode rows one after the other into `scratch` [columns + SLACK], and give each to `use`. */
typedef void decoded_row(void *context, const qmoe_matrix *matrix, uint32_t row, const int8_t *trits);
void qmoe_decode_rows(const qmoe_matrix *matrix, uint32_t first_row, uint32_t row_count, decoded_row *use,
                      void *context, int8_t *scratch);

#endif
