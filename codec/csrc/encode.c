/* Encoding of matrix frames (spec 4.3, encoding a row). */
#include "internal.h"

#include <math.h>
#include <stdlib.h>

/* All codewords of a frame, and how many each row has. */
typedef struct {
    uint16_t *codewords;
    uint64_t count, capacity;
    uint32_t *row_counts;
} codeword_list;

/* Room for one more row, which may emit a codeword for each column and one to finish. */
static bool reserve(codeword_list *list, uint32_t columns) {
    uint64_t needed = list->count + columns + 2;
    if (needed > list->capacity) {
        uint64_t capacity = needed > 2 * list->capacity ? needed : 2 * list->capacity;
        uint16_t *grown = realloc(list->codewords, capacity * sizeof *grown);
        if (!grown) {
            return false;
        }
        list->codewords = grown;
        list->capacity = capacity;
    }
    return true;
}

/* A walk along a pair of parse trees. */
typedef struct {
    uint32_t node;
    uint32_t column; /* up to which the row is taken */
    uint16_t *next;  /* where the next codeword goes */
} walk;

/* Take the zeros up to `column` and the non-zero there. */
static inline void take_nonzero(walk *state, const encoder_tree *tree, uint32_t column, unsigned negative) {
    uint32_t run = column - state->column, node = state->node;
    while (run > tree->nodes[node].zeros) { /* to the leaf at the end of the zeros, and on from T0's root */
        uint32_t zeros = tree->nodes[node].zeros;
        *state->next++ = (uint16_t)tree->nodes[node + zeros].codeword;
        run -= zeros;
        node = tree->root[0];
    }
    const encoder_jump *jump = tree->jumps + 2 * (size_t)(node + run) + negative;
    memcpy(state->next, jump->codewords, sizeof jump->codewords);
    state->next += jump->emitted;
    state->node = jump->node;
    state->column = column + 1;
}

/* Encode a row along trees: a node has a codeword or is complete, so the walk never turns back. */
static uint64_t encode_row_trees(const qmoe_kernels *kernels, const int8_t *trits, uint32_t columns,
                                 const encoder_tree *tree, uint16_t *codewords) {
    walk state = {.node = tree->root[0], .next = codewords};
    for (uint32_t first = 0; first < columns; first += 64) {
        uint64_t nonzero, negative;
        if (columns - first >= 64) {
            kernels->masks(trits + first, &nonzero, &negative);
        } else {
            int8_t last[64] = {0};
            memcpy(last, trits + first, columns - first);
            kernels->masks(last, &nonzero, &negative);
        }
        for (; nonzero; nonzero &= nonzero - 1) {
            unsigned bit = (unsigned)__builtin_ctzll(nonzero);
            take_nonzero(&state, tree, first + bit, negative >> bit & 1);
        }
    }
    if (state.node != tree->root[0]) { /* finish the phrase, with zeros if need be */
        while (tree->nodes[state.node].codeword < 0) {
            state.node++;
        }
        *state.next++ = (uint16_t)tree->nodes[state.node].codeword;
    }
    return (uint64_t)(state.next - codewords);
}

/* Encode a row with a table: the longest phrase that matches, zeros beyond the row's end included. */
static qmoe_status encode_row_table(const int8_t *trits, uint32_t columns, const encoder_tree *tree,
                                    uint16_t *codewords, uint64_t *count, qmoe_error *error) {
    const encoder_node *nodes = tree->nodes;
    uint32_t end = columns, column = 0;
    while (end && trits[end - 1] == 0) {
        end--;
    }
    *count = 0;
    while (column < end) {
        uint32_t node = tree->root[0], length = 0, best_length = 0;
        int32_t best = -1;
        for (;;) {
            int8_t trit = length < columns - column ? trits[column + length] : 0;
            uint32_t child = trit ? nodes[node].child[trit < 0] : nodes[node].zeros ? node + 1 : 0;
            if (!child) {
                break;
            }
            node = child;
            length++;
            if (nodes[node].codeword >= 0) {
                best = nodes[node].codeword;
                best_length = length;
            }
        }
        if (best < 0) {
            return qmoe_fail(error, QMOE_PAYLOAD, "dictionary", column, "a phrase that matches");
        }
        codewords[(*count)++] = (uint16_t)best;
        column = best_length < columns - column ? column + best_length : columns;
    }
    return QMOE_OK;
}

/* ---- levels (spec 4.1) ---- */

/* Nearest e4m4 without its exponent's base: magnitude = steps / 16 * 2^exponent, steps 16 … 31, or 0. */
static void split_e4m4(float level, int *steps, int *exponent) {
    int binary = 0;
    float fraction = frexpf(fabsf(level), &binary); /* in [0.5, 1) */
    *steps = (int)rintf(fraction * 32.0f);
    *exponent = binary - 1;
    if (*steps == 32) {
        *steps = 16;
        *exponent += 1;
    }
}

static int choose_level_exponent(const float *levels, size_t count) {
    int top = -126;
    for (size_t i = 0; i < count; i++) {
        int steps, exponent;
        split_e4m4(levels[i], &steps, &exponent);
        top = steps && exponent > top ? exponent : top;
    }
    int level_exponent = top - 15;
    return level_exponent < -126 ? -126 : level_exponent > 112 ? 112 : level_exponent;
}

static uint8_t to_e4m4(float level, int level_exponent) {
    int steps, exponent;
    split_e4m4(level, &steps, &exponent);
    exponent -= level_exponent;
    exponent = exponent > 15 ? 15 : exponent;
    int byte = exponent * 16 + steps - 16;
    return steps && exponent >= 0 && byte > 0 ? (uint8_t)byte : 0;
}

static void write_levels(const float *levels, size_t count, const frame_layout *layout, uint8_t *section) {
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        switch (layout->level_format) {
        case LEVELS_FLOAT32:
            memcpy(section + 4 * i, levels + i, 4);
            break;
        case LEVELS_BFLOAT16:
        case LEVELS_FLOAT16:
            half = layout->level_format == LEVELS_BFLOAT16 ? qmoe_to_bfloat16(levels[i]) : qmoe_to_float16(levels[i]);
            memcpy(section + 2 * i, &half, 2);
            break;
        default:
            section[i] = to_e4m4(levels[i], layout->level_exponent);
        }
    }
}

/* ---- the frame ---- */

/* Write elements into a zeroed packed array. */
static void pack_element(uint8_t *array, uint64_t index, uint32_t width, uint32_t element) {
    uint64_t bit = index * width;
    uint64_t shifted = (uint64_t)element << (bit % 8);
    for (uint8_t *byte = array + bit / 8; shifted; shifted >>= 8) {
        *byte++ |= (uint8_t)shifted;
    }
}

static void write_raw(const int8_t *trits, uint64_t weights, uint8_t *section) {
    for (uint64_t first = 0; first < weights; first += 5) {
        unsigned byte = 0, power = 1;
        for (uint64_t i = first; i < first + 5 && i < weights; i++, power *= 3) {
            byte += (unsigned)(trits[i] + 1) * power;
        }
        *section++ = (uint8_t)byte;
    }
}

static void write_coded(const codeword_list *list, const frame_layout *layout, const uint8_t *selectors,
                        uint8_t *frame) {
    uint64_t before = 0;
    for (uint32_t row = 0; row < layout->rows; row++) {
        if (row % BLOCK_ROWS == 0) {
            uint32_t base = (uint32_t)before;
            memcpy(frame + layout->row_index_start + row / BLOCK_ROWS * 4, &base, 4);
        }
        before += list->row_counts[row];
        pack_element(frame + layout->counts_start, row, layout->count_bits,
                     list->row_counts[row] - layout->count_minimum);
        if (layout->selector_bits) {
            pack_element(frame + layout->selectors_start, row, layout->selector_bits, selectors[row]);
        }
    }
    /* Whole words of 32 bits go out; the padding after the codewords has room for the last. */
    uint8_t *array = frame + layout->codewords_start;
    uint64_t waiting = 0;
    unsigned filled = 0;
    for (uint64_t i = 0; i < list->count; i++) {
        waiting |= (uint64_t)list->codewords[i] << filled;
        filled += layout->bits;
        if (filled >= 32) {
            uint32_t word = (uint32_t)waiting;
            memcpy(array, &word, sizeof word);
            array += sizeof word;
            waiting >>= 32;
            filled -= 32;
        }
    }
    uint32_t word = (uint32_t)waiting;
    memcpy(array, &word, sizeof word);
}

static void write_header(const frame_layout *layout, uint8_t *frame) {
    memcpy(frame, "QMXM", 4);
    frame[4] = 1;
    frame[6] = (uint8_t)layout->codec;
    frame[7] = (uint8_t)layout->level_format;
    memcpy(frame + 12, &layout->rows, 4);
    memcpy(frame + 16, &layout->columns, 4);
    frame[20] = (uint8_t)(int8_t)layout->level_exponent;
    frame[21] = (uint8_t)layout->bits;
    frame[22] = (uint8_t)layout->dictionary_count;
    frame[23] = (uint8_t)layout->count_bits;
    memcpy(frame + 24, &layout->count_minimum, 4);
    memcpy(frame + 28, &layout->codeword_count, 4);
    uint64_t body_size = layout->frame_size - FRAME_HEADER_SIZE;
    memcpy(frame + 32, &body_size, 8);
    memcpy(frame + 40, layout->dictionary_ids, 4 * sizeof layout->dictionary_ids[0]);
    uint32_t checksum = qmoe_crc32c(0, frame + FRAME_HEADER_SIZE, (size_t)body_size);
    memcpy(frame + 56, &checksum, 4);
    checksum = qmoe_crc32c(0, frame, 60);
    memcpy(frame + 60, &checksum, 4);
}

static uint32_t bit_length(uint32_t value) { return value ? 32 - (uint32_t)__builtin_clz(value) : 0; }

static qmoe_status check_arguments(const int8_t *trits, const float *levels, const frame_layout *layout,
                                   const qmoe_dictionary *const *dictionaries, const uint8_t *selectors,
                                   qmoe_error *error) {
    uint64_t weights = (uint64_t)layout->rows * layout->columns;
    if (layout->rows > MAXIMUM_SIDE || layout->columns > MAXIMUM_SIDE || weights > MAXIMUM_WEIGHTS) {
        return qmoe_fail(error, QMOE_ARGUMENT, "trits", (int64_t)weights, "a shape within the format's limits");
    }
    if (layout->level_format > LEVELS_E4M4) {
        return qmoe_fail(error, QMOE_ARGUMENT, "level_format", layout->level_format, "0 to 3");
    }
    for (uint32_t i = 1; i < layout->dictionary_count; i++) {
        if (dictionaries[i]->info.bits != dictionaries[0]->info.bits) {
            return qmoe_fail(error, QMOE_ARGUMENT, "dictionaries", dictionaries[i]->info.bits, "equal bits");
        }
        for (uint32_t k = 0; k < i; k++) {
            if (dictionaries[k]->info.dictionary_id == dictionaries[i]->info.dictionary_id) {
                return qmoe_fail(error, QMOE_ARGUMENT, "dictionaries", i, "different dictionaries");
            }
        }
    }
    for (uint32_t row = 0; layout->dictionary_count > 1 && row < layout->rows; row++) {
        if (!selectors || selectors[row] >= layout->dictionary_count) {
            return qmoe_fail(error, QMOE_ARGUMENT, "selectors", row, "a dictionary for each row");
        }
    }
    uint8_t illegal = 0;
    for (uint64_t i = 0; i < weights; i++) {
        illegal |= (uint8_t)(trits[i] + 1) > 2;
    }
    if (illegal) {
        return qmoe_fail(error, QMOE_ARGUMENT, "trits", 0, "-1, 0 or 1");
    }
    for (size_t i = 0; i < 2 * (size_t)layout->rows; i++) {
        float level = levels[i];
        bool legal = isfinite(level);
        if (layout->level_format == LEVELS_FLOAT16) {
            legal = legal && fabsf(level) < 65520.0f;
        } else if (layout->level_format == LEVELS_BFLOAT16) {
            legal = legal && isfinite(qmoe_from_bfloat16(qmoe_to_bfloat16(level)));
        } else if (layout->level_format == LEVELS_E4M4) {
            legal = legal && (i % 2 ? level >= 0.0f : level <= 0.0f);
        }
        if (!legal) {
            return qmoe_fail(error, QMOE_ARGUMENT, "levels", (int64_t)i, "levels that level_format can hold");
        }
    }
    return QMOE_OK;
}

static qmoe_status encode_rows(const int8_t *trits, const frame_layout *layout,
                               const qmoe_dictionary *const *dictionaries, const uint8_t *selectors,
                               codeword_list *list, qmoe_error *error) {
    const qmoe_kernels *kernels = qmoe_chosen_kernels();
    const encoder_tree *trees[MAXIMUM_DICTIONARIES];
    for (uint32_t i = 0; i < layout->dictionary_count; i++) {
        trees[i] = qmoe_dictionary_encoder(dictionaries[i]);
        if (!trees[i]) {
            return qmoe_fail(error, QMOE_MEMORY, "dictionary", i, "enough memory");
        }
    }
    for (uint32_t row = 0; row < layout->rows; row++) {
        uint32_t number = layout->dictionary_count > 1 ? selectors[row] : 0;
        const int8_t *row_trits = trits + (size_t)row * layout->columns;
        if (!reserve(list, layout->columns)) {
            return qmoe_fail(error, QMOE_MEMORY, "codewords", row, "enough memory");
        }
        uint16_t *next = list->codewords + list->count;
        uint64_t count = 0;
        if (dictionaries[number]->kind == KIND_TREES) {
            count = encode_row_trees(kernels, row_trits, layout->columns, trees[number], next);
        } else {
            qmoe_status status = encode_row_table(row_trits, layout->columns, trees[number], next, &count, error);
            if (status != QMOE_OK) {
                return status;
            }
        }
        list->row_counts[row] = (uint32_t)count;
        list->count += count;
        if (list->count > UINT32_MAX) {
            return qmoe_fail(error, QMOE_ARGUMENT, "trits", (int64_t)list->count, "fewer than 2^32 codewords");
        }
    }
    return QMOE_OK;
}

qmoe_status qmoe_encode(const int8_t *trits, const float *levels, uint32_t rows, uint32_t columns,
                        const qmoe_dictionary *const *dictionaries, size_t dictionary_count,
                        const uint8_t *selectors, unsigned level_format, uint8_t **result, uint64_t *size,
                        qmoe_error *error) {
    if (dictionary_count > MAXIMUM_DICTIONARIES) {
        return qmoe_fail(error, QMOE_ARGUMENT, "dictionaries", (int64_t)dictionary_count, "at most 4");
    }
    frame_layout layout = {.codec = dictionary_count ? CODEC_DICTIONARY : CODEC_RAW,
                           .level_format = level_format,
                           .rows = rows,
                           .columns = columns,
                           .bits = dictionary_count ? dictionaries[0]->info.bits : 0,
                           .dictionary_count = (uint32_t)dictionary_count};
    qmoe_status status = check_arguments(trits, levels, &layout, dictionaries, selectors, error);
    if (status != QMOE_OK) {
        return status;
    }
    codeword_list list = {.row_counts = malloc(sizeof *list.row_counts * (rows ? rows : 1))};
    uint8_t *frame = NULL;
    if (!list.row_counts) {
        status = qmoe_fail(error, QMOE_MEMORY, "rows", rows, "enough memory");
    } else if (dictionary_count) {
        status = encode_rows(trits, &layout, dictionaries, selectors, &list, error);
    }
    if (status == QMOE_OK) {
        if (level_format == LEVELS_E4M4) {
            layout.level_exponent = choose_level_exponent(levels, 2 * (size_t)rows);
        }
        for (uint32_t i = 0; i < dictionary_count; i++) {
            layout.dictionary_ids[i] = dictionaries[i]->info.dictionary_id;
        }
        if (dictionary_count && rows) {
            uint32_t least = UINT32_MAX, most = 0;
            for (uint32_t row = 0; row < rows; row++) {
                least = list.row_counts[row] < least ? list.row_counts[row] : least;
                most = list.row_counts[row] > most ? list.row_counts[row] : most;
            }
            layout.count_minimum = least;
            layout.count_bits = bit_length(most - least);
            layout.codeword_count = (uint32_t)list.count;
        }
        qmoe_frame_geometry(&layout);
        frame = calloc(1, (size_t)layout.frame_size);
        if (!frame) {
            status = qmoe_fail(error, QMOE_MEMORY, "frame", (int64_t)layout.frame_size, "enough memory");
        }
    }
    if (frame) {
        write_levels(levels, 2 * (size_t)rows, &layout, frame + FRAME_HEADER_SIZE);
        if (dictionary_count) {
            write_coded(&list, &layout, selectors, frame);
        } else {
            write_raw(trits, (uint64_t)rows * columns, frame + layout.codewords_start);
        }
        write_header(&layout, frame);
        *result = frame;
        *size = layout.frame_size;
    }
    free(list.codewords);
    free(list.row_counts);
    return status;
}
