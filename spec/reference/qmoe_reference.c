/* A decoder of the qmoe format, version 1.0, to be read beside ../qmoe-format-v1.md.
 *
 * It follows the specification section by section (the § numbers are its own) and does everything the plain
 * way: one bit, one trit and one check at a time. It shares no code with the codec of this repository, so
 * that the two, and the specification, can be held against each other. It is not fast and not a library.
 *
 * It is meant to be safe on any input: every offset is checked before it is used, no sum or product wraps,
 * and it takes no more than MEMORY_LIMIT for a file or a dense tensor, and 16 MiB for a row of a matrix.
 *
 * Left out: Zstandard itself. A dense frame (§5) is decoded when its planes are made of stored or run-length
 * blocks; one with compressed blocks is checked up to there and reported as needing a Zstandard decoder.
 *
 *     cc -std=c11 -O2 -o qmoe_reference qmoe_reference.c
 */

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef MEMORY_LIMIT /* or cc -DMEMORY_LIMIT=… */
#define MEMORY_LIMIT ((uint64_t)1 << 30)
#endif

enum { EXIT_RUNTIME = 1, EXIT_USAGE = 2, EXIT_REFUSED = 3, EXIT_VERSION = 4 };

/* What is not the file's fault: no such file, no memory, no Zstandard. */
static _Noreturn void give_up(const char *reason, const char *what) {
    fprintf(stderr, "qmoe_reference: %s: %s\n", what, reason);
    exit(EXIT_RUNTIME);
}

static void *allocate(uint64_t size) {
    if (size > MEMORY_LIMIT)
        give_up("needs more memory than this decoder takes", "memory");
    void *memory = calloc(size > 0 ? (size_t)size : 1, 1);
    if (memory == NULL)
        give_up("out of memory", "memory");
    return memory;
}

/* === 1. Conventions ===================================================================================== */

/* A file in memory. Whoever reads it has checked the offset; `byte_at` makes sure of that. */
typedef struct {
    const uint8_t *data;
    uint64_t size;
} Bytes;

static uint8_t byte_at(Bytes bytes, uint64_t offset) {
    if (offset >= bytes.size)
        abort(); /* a fault of this program, whatever the file holds */
    return bytes.data[offset];
}

/* All integers are little-endian. */
static uint64_t read_integer(Bytes bytes, uint64_t offset, int size) {
    uint64_t value = 0;
    for (int i = size - 1; i >= 0; i--)
        value = value << 8 | byte_at(bytes, offset + (uint64_t)i);
    return value;
}

static uint8_t read_u8(Bytes bytes, uint64_t offset) { return byte_at(bytes, offset); }
static uint32_t read_u32(Bytes bytes, uint64_t offset) { return (uint32_t)read_integer(bytes, offset, 4); }
static uint64_t read_u64(Bytes bytes, uint64_t offset) { return read_integer(bytes, offset, 8); }

static int read_i8(Bytes bytes, uint64_t offset) {
    int value = byte_at(bytes, offset);
    return value < 128 ? value : value - 256;
}

static uint64_t ceil_div(uint64_t n, uint64_t k) { return n / k + (n % k != 0); }
static uint64_t round_up(uint64_t n, uint64_t k) { return ceil_div(n, k) * k; }

/* Bit k of the bytes that begin at `start`. */
static uint32_t bit_at(Bytes bytes, uint64_t start, uint64_t k) {
    return (uint32_t)byte_at(bytes, start + k / 8) >> (k % 8) & 1;
}

/* Element i of a packed array of elements of w bits. */
static uint32_t packed_element(Bytes bytes, uint64_t start, unsigned w, uint64_t i) {
    uint32_t value = 0;
    for (unsigned k = 0; k < w; k++)
        value |= bit_at(bytes, start, i * w + k) << k;
    return value;
}

/* Padding must be zero: all bits of [start, end) but the first `used`. */
static bool is_zero_after(Bytes bytes, uint64_t start, uint64_t used, uint64_t end) {
    for (uint64_t k = used; k < (end - start) * 8; k++)
        if (bit_at(bytes, start, k) != 0)
            return false;
    return true;
}

static const uint32_t CRC_START = 0xFFFFFFFF;

static uint32_t crc32c_add(uint32_t crc, uint8_t byte) {
    crc ^= byte;
    for (int k = 0; k < 8; k++)
        crc = crc & 1 ? crc >> 1 ^ 0x82F63B78 : crc >> 1;
    return crc;
}

/* The CRC over [start, end), before its final xor; `crc` is CRC_START or what an earlier part gave. */
static uint32_t crc32c_part(uint32_t crc, Bytes bytes, uint64_t start, uint64_t end) {
    for (uint64_t i = start; i < end; i++)
        crc = crc32c_add(crc, byte_at(bytes, i));
    return crc;
}

static uint32_t crc32c(Bytes bytes, uint64_t start, uint64_t end) {
    return crc32c_part(CRC_START, bytes, start, end) ^ 0xFFFFFFFF;
}

/* --- 1.1 Errors: one line on stdout, and an end. Nothing of the content has been written by then. ------- */

static _Noreturn void refuse(const char *kind, const char *field) {
    printf("{\"error\": \"%s\", \"field\": \"%s\"}\n", kind, field);
    exit(strcmp(kind, "version") == 0 ? EXIT_VERSION : EXIT_REFUSED);
}

static void check(bool legal, const char *kind, const char *field) {
    if (!legal)
        refuse(kind, field);
}

/* The first checks of every frame. */
static void check_magic_and_version(Bytes frame, uint64_t header_size, const char *magic) {
    check(frame.size >= header_size, "truncated", "frame");
    check(memcmp(frame.data, magic, 4) == 0, "magic", "magic");
    check(read_u8(frame, 4) == 1, "version", "version_major"); /* §1.2; any version_minor will do */
}

/* === 2. Limits ========================================================================================== */

enum {
    MAX_SIDE = 1 << 24, /* rows, columns; their product: MAX_WEIGHTS */
    MAX_PHRASE = 126,
    MAX_NONZEROS = 3,
    MAX_DICTIONARIES = 4
};
static const uint64_t MAX_WEIGHTS = (uint64_t)1 << 36;

/* === 3. Dictionaries ==================================================================================== */

/* A phrase as a word of §3.3; 0 is no phrase. */
typedef uint32_t Word;

enum { NO_POSITION = 127 };

static unsigned word_length(Word word) { return word & 127; }
static unsigned word_position(Word word, unsigned k) { return word >> (7 + 7 * k) & 127; }
static unsigned word_sign(Word word, unsigned k) { return word >> (28 + k) & 1; }

typedef struct {
    uint32_t id;
    unsigned bits;
    uint32_t threshold;
    unsigned tables;  /* 1 (kind table) or 2 (kind trees) */
    Word *words[2];   /* T0 and T1, 2^bits words each */
} Dictionary;

static void read_trees(Bytes frame, uint32_t entry_count, uint32_t payload_size, Dictionary *dictionary);
static void read_table(Bytes frame, Dictionary *dictionary);

/* --- 3.1 Dictionary frame ------------------------------------------------------------------------------- */

static Dictionary read_dictionary(Bytes frame) {
    check_magic_and_version(frame, 32, "QMXD");
    check(read_u32(frame, 8) == 0, "version", "flags");

    unsigned kind = read_u8(frame, 6);
    check(kind <= 1, "header", "kind");
    bool trees = kind == 1;

    unsigned bits = read_u8(frame, 7);
    check(bits == 8 || bits == 10 || bits == 12 || (bits == 16 && !trees), "header", "bits");
    uint32_t codewords = (uint32_t)1 << bits;

    uint32_t threshold = read_u32(frame, 12);
    check(trees ? threshold >= 1 && threshold <= codewords : threshold == codewords, "header", "threshold");

    uint32_t entry_count = read_u32(frame, 16);
    check(trees ? entry_count >= 5 && entry_count <= 4 * codewords : entry_count == codewords, "header",
          "entry_count");

    uint32_t payload_size = read_u32(frame, 20);
    check(payload_size == (trees ? (entry_count + 3) / 4 : 4 * entry_count), "header", "payload_size");
    check(read_u32(frame, 24) == 0, "header", "reserved");

    check(frame.size >= 32 + (uint64_t)payload_size, "truncated", "payload");
    check(frame.size == 32 + (uint64_t)payload_size, "size", "frame");

    uint32_t crc = crc32c_part(crc32c_part(CRC_START, frame, 0, 28), frame, 32, frame.size) ^ 0xFFFFFFFF;
    check(read_u32(frame, 28) == crc, "checksum", "dictionary_id");

    Dictionary dictionary = {.id = crc, .bits = bits, .threshold = threshold, .tables = trees ? 2 : 1};
    for (unsigned table = 0; table < dictionary.tables; table++)
        dictionary.words[table] = allocate(codewords * sizeof(Word));
    if (trees)
        read_trees(frame, entry_count, payload_size, &dictionary);
    else
        read_table(frame, &dictionary);
    return dictionary;
}

/* --- 3.2 Trees ------------------------------------------------------------------------------------------ */

enum { LEAF = 0, INCOMPLETE = 1, COMPLETE = 2 };

typedef struct {
    unsigned length, nonzeros;
    unsigned position[MAX_NONZEROS];
    int trit[MAX_NONZEROS];
} Phrase;

typedef struct {
    Bytes frame;
    uint32_t node_count, next_node;
    uint32_t threshold, codewords;
    uint32_t leaves, incomplete; /* of the present tree */
    Word *words;                 /* of the present tree */
} Trees;

static Phrase extended(Phrase phrase, int trit) {
    if (trit != 0) {
        check(phrase.nonzeros < MAX_NONZEROS, "payload", "nonzeros");
        phrase.position[phrase.nonzeros] = phrase.length;
        phrase.trit[phrase.nonzeros] = trit;
        phrase.nonzeros++;
    }
    phrase.length++;
    check(phrase.length <= MAX_PHRASE, "payload", "length");
    return phrase;
}

static Word phrase_word(Phrase phrase) {
    Word word = phrase.length;
    for (unsigned k = 0; k < MAX_NONZEROS; k++) {
        bool present = k < phrase.nonzeros;
        word |= (present ? phrase.position[k] : NO_POSITION) << (7 + 7 * k);
        word |= (Word)(present && phrase.trit[k] < 0) << (28 + k);
    }
    return word;
}

/* One node and everything below it, in preorder. As deep as a phrase is long: 126 at most. */
static void read_node(Trees *trees, Phrase phrase) {
    check(trees->next_node < trees->node_count, "payload", "node");
    uint32_t code = packed_element(trees->frame, 32, 2, trees->next_node++);
    switch (code) {
    case LEAF:
        check(trees->leaves < trees->threshold, "payload", "leaves");
        trees->words[trees->leaves++] = phrase_word(phrase);
        break;
    case INCOMPLETE:
        check(trees->incomplete < trees->codewords - trees->threshold, "payload", "incomplete");
        trees->words[trees->threshold + trees->incomplete++] = phrase_word(phrase);
        read_node(trees, extended(phrase, 0));
        break;
    case COMPLETE:
        read_node(trees, extended(phrase, 0));
        read_node(trees, extended(phrase, +1));
        read_node(trees, extended(phrase, -1));
        break;
    default:
        refuse("payload", "node");
    }
}

static void read_trees(Bytes frame, uint32_t entry_count, uint32_t payload_size, Dictionary *dictionary) {
    Trees trees = {.frame = frame,
                   .node_count = entry_count,
                   .threshold = dictionary->threshold,
                   .codewords = (uint32_t)1 << dictionary->bits};
    const Phrase root = {0};

    trees.words = dictionary->words[0];
    read_node(&trees, extended(root, 0));
    read_node(&trees, extended(root, +1));
    read_node(&trees, extended(root, -1));

    trees.words = dictionary->words[1];
    trees.leaves = trees.incomplete = 0;
    read_node(&trees, extended(root, +1));
    read_node(&trees, extended(root, -1));

    check(trees.next_node == entry_count, "payload", "node");
    uint64_t used = 2 * (uint64_t)entry_count, end = 32 + (uint64_t)payload_size;
    check(is_zero_after(frame, 32, used, end), "payload", "node");
}

/* --- 3.3 Table ------------------------------------------------------------------------------------------ */

static bool is_legal_word(Word word) {
    if (word == 0)
        return true; /* unused */
    unsigned length = word_length(word);
    if (length < 1 || length > MAX_PHRASE || word >> 31 != 0)
        return false;
    for (unsigned k = 0; k < MAX_NONZEROS; k++) {
        unsigned position = word_position(word, k);
        if (position == NO_POSITION) {
            if (word_sign(word, k) != 0)
                return false;
        } else {
            if (position >= length)
                return false;
            /* Rising, and those present come first: 127, none, is never below a position. */
            if (k > 0 && word_position(word, k - 1) >= position)
                return false;
        }
    }
    return true;
}

static void read_table(Bytes frame, Dictionary *dictionary) {
    for (uint32_t codeword = 0; codeword < (uint32_t)1 << dictionary->bits; codeword++) {
        Word word = read_u32(frame, 32 + 4 * (uint64_t)codeword);
        check(is_legal_word(word), "payload", "word");
        dictionary->words[0][codeword] = word;
    }
}

/* === 4. Matrix frame ==================================================================================== */

enum { RAW = 0, DICTIONARY = 1 };

typedef struct {
    Bytes frame;
    unsigned codec, level_format, bits, dictionary_count, count_bits;
    int level_exponent;
    uint32_t rows, columns, count_minimum, codeword_count;
    uint64_t body_size;
    const Dictionary *dictionaries[MAX_DICTIONARIES];
    /* §4.2: offsets in the frame */
    uint64_t levels, levels_end;
    uint64_t row_index, counts, selectors, row_index_end;
    uint64_t codewords, codewords_end; /* codec 0: `trits` */
    uint64_t end;
} Matrix;

static void lay_out(Matrix *m);
static void check_padding(const Matrix *m);
static void check_levels(const Matrix *m);
static void check_row_index(const Matrix *m);
static void check_selectors(const Matrix *m);
static uint64_t decode_rows(const Matrix *m, int8_t *row, FILE *out);

static Matrix read_matrix(Bytes frame, const Dictionary *at_hand, int at_hand_count) {
    Matrix m = {.frame = frame};

    check_magic_and_version(frame, 64, "QMXM");
    check(read_u32(frame, 60) == crc32c(frame, 0, 60), "checksum", "header_crc32c");
    check(read_u32(frame, 8) == 0, "version", "flags");

    m.codec = read_u8(frame, 6);
    check(m.codec <= 1, "header", "codec");
    bool coded = m.codec == DICTIONARY;
    m.level_format = read_u8(frame, 7);
    check(m.level_format <= 3, "header", "level_format");
    m.rows = read_u32(frame, 12);
    check(m.rows <= MAX_SIDE, "header", "rows");
    m.columns = read_u32(frame, 16);
    check(m.columns <= MAX_SIDE && (uint64_t)m.rows * m.columns <= MAX_WEIGHTS, "header", "columns");
    m.level_exponent = read_i8(frame, 20);
    check(m.level_format == 3 ? m.level_exponent >= -126 && m.level_exponent <= 112 : m.level_exponent == 0,
          "header", "level_exponent");
    m.bits = read_u8(frame, 21);
    check(coded ? m.bits == 8 || m.bits == 10 || m.bits == 12 || m.bits == 16 : m.bits == 0, "header",
          "bits");
    m.dictionary_count = read_u8(frame, 22);
    check(coded ? m.dictionary_count >= 1 && m.dictionary_count <= MAX_DICTIONARIES : m.dictionary_count == 0,
          "header", "dictionary_count");
    m.count_bits = read_u8(frame, 23);
    check(coded ? m.count_bits <= 24 : m.count_bits == 0, "header", "count_bits");
    m.count_minimum = read_u32(frame, 24);
    check(coded ? m.count_minimum <= m.columns : m.count_minimum == 0, "header", "count_minimum");
    m.codeword_count = read_u32(frame, 28);
    check(coded || m.codeword_count == 0, "header", "codeword_count");

    lay_out(&m);
    m.body_size = read_u64(frame, 32);
    check(m.body_size == m.end - 64, "size", "body_size");

    uint32_t ids[MAX_DICTIONARIES];
    for (unsigned k = 0; k < MAX_DICTIONARIES; k++) {
        ids[k] = read_u32(frame, 40 + 4 * k);
        check(k < m.dictionary_count || ids[k] == 0, "header", "dictionary_ids");
        for (unsigned j = 0; j < k && k < m.dictionary_count; j++)
            check(ids[j] != ids[k], "header", "dictionary_ids");
    }

    check(frame.size >= m.end, "truncated", "frame");
    check(frame.size == m.end, "size", "frame");
    check(read_u32(frame, 56) == crc32c(frame, 64, m.end), "checksum", "body_crc32c");
    check_padding(&m);
    check_levels(&m);

    for (unsigned k = 0; k < m.dictionary_count; k++) {
        for (int i = 0; i < at_hand_count; i++)
            if (at_hand[i].id == ids[k])
                m.dictionaries[k] = &at_hand[i];
        check(m.dictionaries[k] != NULL && m.dictionaries[k]->bits == m.bits, "dictionary", "dictionary_ids");
    }
    if (coded) {
        check_row_index(&m);
        check_selectors(&m);
    }
    return m; /* what is left to check is checked by decode_rows */
}

/* --- 4.1 Levels ----------------------------------------------------------------------------------------- */

static unsigned level_size(const Matrix *m) {
    static const unsigned sizes[4] = {4, 2, 2, 1};
    return sizes[m->level_format];
}

/* The bits of a float32 of value ±(1 + mantissa / 2^23) · 2^exponent. */
static uint32_t float32_bits(uint32_t sign, int exponent, uint32_t mantissa) {
    return sign << 31 | (uint32_t)(exponent + 127) << 23 | mantissa;
}

static uint32_t float32_from_float16(uint32_t half) {
    uint32_t sign = half >> 15, mantissa = half & 0x3FF;
    int exponent = (int)(half >> 10 & 31);
    if (exponent == 0 && mantissa == 0)
        return sign << 31;
    if (exponent == 0) { /* subnormal: mantissa · 2^-24 */
        exponent = 1;
        while ((mantissa & 0x400) == 0) {
            mantissa <<= 1;
            exponent--;
        }
        mantissa &= 0x3FF;
    }
    return float32_bits(sign, exponent - 15, mantissa << 13);
}

/* Level `which` (0 low, 1 high) of a row, as the bits of a float32. */
static uint32_t read_level(const Matrix *m, uint32_t row, unsigned which) {
    uint64_t offset = m->levels + (2 * (uint64_t)row + which) * level_size(m);
    uint32_t level = (uint32_t)read_integer(m->frame, offset, (int)level_size(m));
    switch (m->level_format) {
    case 0:
        return level;
    case 1:
        return level << 16;
    case 2:
        if ((level >> 10 & 31) == 31)
            return 0x7F800000; /* infinite or not a number: not finite, which is all that matters */
        return float32_from_float16(level);
    default: {
        uint32_t sign = which == 0;
        if (level == 0)
            return 0; /* +0, for low too */
        return float32_bits(sign, (int)(level / 16) + m->level_exponent, level % 16 << 19);
    }
    }
}

static void check_levels(const Matrix *m) {
    for (uint32_t row = 0; row < m->rows; row++)
        for (unsigned which = 0; which < 2; which++)
            check((read_level(m, row, which) >> 23 & 255) != 255, "payload", "levels");
}

/* --- 4.2 Sections of the body --------------------------------------------------------------------------- */

static unsigned selector_bits(const Matrix *m) {
    static const unsigned bits[MAX_DICTIONARIES + 1] = {0, 0, 1, 2, 2};
    return bits[m->dictionary_count];
}

/* By the limits of §2 no sum here comes near 2^64. */
static void lay_out(Matrix *m) {
    uint64_t rows = m->rows;
    m->levels = 64;
    m->levels_end = m->levels + rows * 2 * level_size(m);
    uint64_t next = round_up(m->levels_end, 16);
    if (m->codec == RAW) {
        m->codewords = next;
        m->codewords_end = m->codewords + ceil_div(rows * m->columns, 5);
        m->end = round_up(m->codewords_end, 16);
    } else {
        m->row_index = next;
        m->counts = m->row_index + 4 * ceil_div(rows, 32);
        m->selectors = m->counts + round_up(ceil_div(rows * m->count_bits, 8), 4);
        m->row_index_end = m->selectors + round_up(ceil_div(rows * selector_bits(m), 8), 4);
        m->codewords = round_up(m->row_index_end, 16);
        m->codewords_end = m->codewords + ceil_div((uint64_t)m->codeword_count * m->bits, 8);
        m->end = round_up(m->codewords_end + 8, 16);
    }
}

/* The padding between and after the sections; that of a packed array is checked with the array. */
static void check_padding(const Matrix *m) {
    if (m->codec == RAW) {
        check(is_zero_after(m->frame, m->levels_end, 0, m->codewords), "payload", "padding");
    } else {
        check(is_zero_after(m->frame, m->levels_end, 0, m->row_index), "payload", "padding");
        check(is_zero_after(m->frame, m->row_index_end, 0, m->codewords), "payload", "padding");
    }
    check(is_zero_after(m->frame, m->codewords_end, 0, m->end), "payload", "padding");
}

/* --- 4.3 Codec 1: dictionary ---------------------------------------------------------------------------- */

static uint32_t row_count(const Matrix *m, uint32_t row) {
    return m->count_minimum + packed_element(m->frame, m->counts, m->count_bits, row);
}

static unsigned row_selector(const Matrix *m, uint32_t row) {
    return packed_element(m->frame, m->selectors, selector_bits(m), row);
}

static void check_row_index(const Matrix *m) {
    uint64_t used = (uint64_t)m->rows * m->count_bits;
    check(is_zero_after(m->frame, m->counts, used, m->selectors), "payload", "counts");
    uint64_t sum = 0; /* of the counts of all rows before */
    for (uint32_t row = 0; row < m->rows; row++) {
        if (row % 32 == 0)
            check(read_u32(m->frame, m->row_index + 4 * (uint64_t)(row / 32)) == sum, "index", "bases");
        check(row_count(m, row) <= m->columns, "index", "counts");
        sum += row_count(m, row);
    }
    check(sum == m->codeword_count, "index", "codeword_count");
}

static void check_selectors(const Matrix *m) {
    uint64_t used = (uint64_t)m->rows * selector_bits(m);
    check(is_zero_after(m->frame, m->selectors, used, m->row_index_end), "payload", "selectors");
    for (uint32_t row = 0; row < m->rows; row++)
        check(row_selector(m, row) < m->dictionary_count, "payload", "selectors");
}

static void check_codeword_padding(const Matrix *m) {
    uint64_t used = (uint64_t)m->codeword_count * m->bits;
    check(is_zero_after(m->frame, m->codewords, used, m->codewords_end), "payload", "codewords");
}

/* Decodes the row whose first codeword is number `codeword`; `trits` is NULL when it is only to be checked.
 * Gives the number of non-zeros. */
static uint64_t decode_row(const Matrix *m, uint32_t row, uint64_t codeword, int8_t *trits) {
    const Dictionary *dictionary = m->dictionaries[row_selector(m, row)];
    uint64_t column = 0, nonzeros = 0;
    unsigned table = 0;
    for (uint32_t left = row_count(m, row); left > 0; left--) {
        check(column < m->columns, "payload", "codewords");
        uint32_t code = packed_element(m->frame, m->codewords, m->bits, codeword++);
        Word word = dictionary->words[table][code];
        check(word != 0, "payload", "codewords");
        for (unsigned k = 0; k < MAX_NONZEROS && word_position(word, k) != NO_POSITION; k++) {
            uint64_t place = column + word_position(word, k);
            check(place < m->columns, "payload", "codewords");
            if (trits != NULL)
                trits[place] = word_sign(word, k) ? -1 : 1;
            nonzeros++;
        }
        column += word_length(word);
        table = code >= dictionary->threshold ? 1 : 0;
    }
    return nonzeros;
}

/* --- 4.4 Codec 0: raw ----------------------------------------------------------------------------------- */

/* Trit number n of the matrix, or what stands in its place after the last one. */
static int raw_digit(const Matrix *m, uint64_t n) {
    static const int powers[5] = {1, 3, 9, 27, 81};
    return read_u8(m->frame, m->codewords + n / 5) / powers[n % 5] % 3;
}

static void check_raw(const Matrix *m) {
    for (uint64_t at = m->codewords; at < m->codewords_end; at++)
        check(read_u8(m->frame, at) <= 242, "payload", "trits");
    for (uint64_t n = (uint64_t)m->rows * m->columns; n % 5 != 0; n++)
        check(raw_digit(m, n) == 0, "payload", "trits");
}

static uint64_t decode_raw_row(const Matrix *m, uint32_t row, int8_t *trits) {
    uint64_t nonzeros = 0;
    for (uint32_t column = 0; column < m->columns; column++) {
        int trit = raw_digit(m, (uint64_t)row * m->columns + column) - 1;
        if (trits != NULL)
            trits[column] = (int8_t)trit;
        nonzeros += trit != 0;
    }
    return nonzeros;
}

/* Every row in turn: checked only, when `row` and `out` are NULL, otherwise also decoded to `row` and written
 * to `out`. Gives the number of non-zeros. */
static uint64_t decode_rows(const Matrix *m, int8_t *row, FILE *out) {
    uint64_t nonzeros = 0, codeword = 0;
    if (m->codec == RAW)
        check_raw(m);
    else
        check_codeword_padding(m);
    for (uint32_t r = 0; r < m->rows; r++) {
        if (row != NULL)
            memset(row, 0, m->columns);
        if (m->codec == RAW) {
            nonzeros += decode_raw_row(m, r, row);
        } else {
            nonzeros += decode_row(m, r, codeword, row);
            codeword += row_count(m, r);
        }
        if (row != NULL && fwrite(row, 1, m->columns, out) != m->columns)
            give_up("cannot be written", "stdout");
    }
    return nonzeros;
}

/* === 5. Dense frame ===================================================================================== */

typedef struct {
    uint64_t elements;
    unsigned element_size, dimension_count;
    char dtype[9];
    uint64_t shape[8];
    uint8_t *content;
} Dense;

static unsigned dtype_size(const char *dtype) {
    static const struct {
        const char *name;
        unsigned size;
    } dtypes[] = {{"BOOL", 1},    {"U8", 1},      {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1},
                  {"F8_E8M0", 1}, {"I16", 2},     {"U16", 2}, {"F16", 2},     {"BF16", 2},
                  {"I32", 4},     {"U32", 4},     {"F32", 4}, {"I64", 8},     {"U64", 8},
                  {"F64", 8},     {"C64", 8}};
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++)
        if (strcmp(dtype, dtypes[i].name) == 0)
            return dtypes[i].size;
    return 0;
}

/* A Zstandard frame (RFC 8878, §3.1.1) of stored and run-length blocks that fills [start, end) and gives
 * exactly `elements` bytes, which go to every `stride`-th byte of `content`. */
static void read_plane(Bytes bytes, uint64_t start, uint64_t end, uint64_t elements, uint8_t *content,
                       unsigned stride, const char *plane) {
    check(end - start >= 5 && read_u32(bytes, start) == 0xFD2FB528, "payload", plane);
    unsigned descriptor = read_u8(bytes, start + 4);
    bool single_segment = descriptor >> 5 & 1;
    check((descriptor >> 3 & 1) == 0, "payload", plane);
    if ((descriptor & 4) != 0)
        give_up("has a checksum: needs a Zstandard decoder", plane);
    static const int id_bytes[4] = {0, 1, 2, 4}, size_bytes[4] = {0, 2, 4, 8};
    int window_size = single_segment ? 0 : 1; /* of no interest here */
    int id_size = id_bytes[descriptor & 3];
    int size_size = descriptor >> 6 == 0 && single_segment ? 1 : size_bytes[descriptor >> 6];
    uint64_t at = start + 5;
    check(end - at >= (uint64_t)(window_size + id_size + size_size), "payload", plane);
    at += (uint64_t)window_size;
    check(read_integer(bytes, at, id_size) == 0, "payload", plane); /* no dictionary */
    at += (uint64_t)id_size;
    if (size_size > 0)
        check(read_integer(bytes, at, size_size) + (size_size == 2 ? 256 : 0) == elements, "payload", plane);
    at += (uint64_t)size_size;

    uint64_t given = 0;
    for (bool last = false; !last;) {
        check(end - at >= 3, "payload", plane);
        uint32_t block = (uint32_t)read_integer(bytes, at, 3);
        at += 3;
        last = block & 1;
        unsigned type = block >> 1 & 3;
        uint32_t size = block >> 3;
        if (type == 2)
            give_up("has a compressed block: needs a Zstandard decoder", plane);
        uint64_t stored = type == 0 ? size : 1;
        check(type != 3 && size <= 1 << 17 && end - at >= stored, "payload", plane);
        check(size <= elements - given, "payload", plane);
        for (uint32_t i = 0; i < size; i++)
            content[(given + i) * stride] = read_u8(bytes, at + (type == 0 ? i : 0));
        at += stored;
        given += size;
    }
    check(at == end && given == elements, "payload", plane);
}

static Dense read_dense(Bytes frame) {
    Dense d = {0};
    check_magic_and_version(frame, 160, "QMXZ");
    check(read_u32(frame, 156) == crc32c(frame, 0, 156), "checksum", "header_crc32c");
    check(read_u32(frame, 8) == 0, "version", "flags");

    d.element_size = read_u8(frame, 6);
    check(d.element_size == 1 || d.element_size == 2 || d.element_size == 4 || d.element_size == 8, "header",
          "element_size");
    d.dimension_count = read_u8(frame, 7);
    check(d.dimension_count <= 8, "header", "dimension_count");
    memcpy(d.dtype, frame.data + 12, 8);
    check(dtype_size(d.dtype) == d.element_size, "header", "dtype");
    check(is_zero_after(frame, 12, 8 * strlen(d.dtype), 20), "header", "dtype");

    bool empty = false;
    for (unsigned k = 0; k < 8; k++) {
        d.shape[k] = read_u64(frame, 24 + 8 * k);
        check(k < d.dimension_count || d.shape[k] == 0, "header", "shape");
        empty = empty || (k < d.dimension_count && d.shape[k] == 0);
    }
    d.elements = empty ? 0 : 1;
    for (unsigned k = 0; k < d.dimension_count && !empty; k++) {
        check(d.shape[k] <= (((uint64_t)1 << 40) - 1) / d.elements, "header", "shape");
        d.elements *= d.shape[k];
    }

    uint64_t plane_sizes[8];
    for (unsigned k = 0; k < 8; k++) {
        plane_sizes[k] = read_u64(frame, 88 + 8 * k);
        check(k < d.element_size || plane_sizes[k] == 0, "header", "plane_sizes");
    }
    check(read_u32(frame, 152) == 0, "header", "reserved");

    uint64_t end = 160;
    for (unsigned k = 0; k < d.element_size; k++) {
        check(plane_sizes[k] <= frame.size - end, "truncated", "planes");
        end += plane_sizes[k];
    }
    check(frame.size == end, "size", "planes");

    static const char *const names[8] = {"plane 0", "plane 1", "plane 2", "plane 3",
                                         "plane 4", "plane 5", "plane 6", "plane 7"};
    for (unsigned k = 0; k < d.element_size; k++)
        check(ceil_div(d.elements, 32768) <= plane_sizes[k], "payload", names[k]);
    d.content = allocate(d.elements * d.element_size);
    uint64_t at = 160;
    for (unsigned k = 0; k < d.element_size; k++) {
        read_plane(frame, at, at + plane_sizes[k], d.elements, d.content + (d.elements > 0 ? k : 0),
                   d.element_size, names[k]);
        at += plane_sizes[k];
    }
    Bytes content = {d.content, d.elements * d.element_size};
    check(read_u32(frame, 20) == crc32c(content, 0, content.size), "checksum", "content_crc32c");
    return d;
}

/* === The program ======================================================================================== */

static const char USAGE[] =
    "usage: qmoe_reference dictionary [--words] FILE\n"
    "       qmoe_reference matrix [--levels] [--trits] FILE [DICTIONARY_FILE...]\n"
    "       qmoe_reference dense [--content] FILE\n"
    "Prints a line of JSON: what the file holds, or {\"error\": kind, \"field\": name} with exit code 3\n"
    "(4 for a version). With an option, writes that content instead, little-endian: words u32, T0 then T1; levels\n"
    "float32, low and high of each row; trits int8, row by row; the bytes of a dense tensor.\n";

static Bytes read_file(const char *name) {
    FILE *file = fopen(name, "rb");
    if (file == NULL)
        give_up("cannot be opened", name);
    if (fseek(file, 0, SEEK_END) != 0)
        give_up("cannot be read", name);
    long size = ftell(file);
    if (size < 0 || (unsigned long)size > MEMORY_LIMIT)
        give_up("cannot be read, or is larger than this decoder takes", name);
    rewind(file);
    uint8_t *data = allocate((uint64_t)size);
    if (fread(data, 1, (size_t)size, file) != (size_t)size)
        give_up("cannot be read", name);
    fclose(file);
    return (Bytes){data, (uint64_t)size};
}

static void write_u32(uint32_t value) {
    for (int i = 0; i < 4; i++)
        putchar((int)(value >> (8 * i) & 255));
}

static int show_dictionary(const char *file, bool words) {
    Dictionary d = read_dictionary(read_file(file));
    if (words) {
        for (unsigned table = 0; table < d.tables; table++)
            for (uint32_t codeword = 0; codeword < (uint32_t)1 << d.bits; codeword++)
                write_u32(d.words[table][codeword]);
    } else {
        printf("{\"dictionary_id\": %lu, \"bits\": %u, \"tables\": %u, \"threshold\": %lu}\n",
               (unsigned long)d.id, d.bits, d.tables, (unsigned long)d.threshold);
    }
    return 0;
}

static int show_matrix(char **files, int count, bool levels, bool trits) {
    Dictionary *dictionaries = allocate((uint64_t)count * sizeof(Dictionary));
    for (int i = 1; i < count; i++)
        dictionaries[i - 1] = read_dictionary(read_file(files[i]));
    Matrix m = read_matrix(read_file(files[0]), dictionaries, count - 1);
    uint64_t nonzeros = decode_rows(&m, NULL, NULL); /* the last checks, before anything is written */
    if (levels)
        for (uint32_t row = 0; row < m.rows; row++)
            for (unsigned which = 0; which < 2; which++)
                write_u32(read_level(&m, row, which));
    if (trits)
        decode_rows(&m, allocate(m.columns), stdout);
    if (!levels && !trits)
        printf("{\"rows\": %lu, \"columns\": %lu, \"nonzeros\": %llu}\n", (unsigned long)m.rows,
               (unsigned long)m.columns, (unsigned long long)nonzeros);
    return 0;
}

static int show_dense(const char *file, bool content) {
    Dense d = read_dense(read_file(file));
    if (content) {
        fwrite(d.content, 1, (size_t)(d.elements * d.element_size), stdout);
        return 0;
    }
    printf("{\"dtype\": \"%s\", \"shape\": [", d.dtype);
    for (unsigned k = 0; k < d.dimension_count; k++)
        printf("%s%llu", k > 0 ? ", " : "", (unsigned long long)d.shape[k]);
    printf("]}\n");
    return 0;
}

int main(int argc, char **argv) {
    bool words = false, levels = false, trits = false, content = false;
    int first = 2;
    for (; first < argc && strncmp(argv[first], "--", 2) == 0; first++) {
        if (strcmp(argv[first], "--words") == 0)
            words = true;
        else if (strcmp(argv[first], "--levels") == 0)
            levels = true;
        else if (strcmp(argv[first], "--trits") == 0)
            trits = true;
        else if (strcmp(argv[first], "--content") == 0)
            content = true;
        else
            first = argc; /* an unknown option leaves no file, and that is wrong usage */
    }
    int files = argc - first;
    int code = EXIT_USAGE;
    if (files == 1 && strcmp(argv[1], "dictionary") == 0 && !levels && !trits && !content)
        code = show_dictionary(argv[first], words);
    else if (files >= 1 && strcmp(argv[1], "matrix") == 0 && !words && !content)
        code = show_matrix(argv + first, files, levels, trits);
    else if (files == 1 && strcmp(argv[1], "dense") == 0 && !words && !levels && !trits)
        code = show_dense(argv[first], content);
    else
        fputs(USAGE, stderr);
    if (fflush(stdout) != 0 || ferror(stdout))
        give_up("cannot be written", "stdout");
    return code;
}
