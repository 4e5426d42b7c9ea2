/* Dictionary frames (spec 3) and the tree that encoding walks along. */
#include "internal.h"

#include <stdlib.h>

enum { NODE_LEAF = 0, NODE_INCOMPLETE = 1, NODE_COMPLETE = 2 };

static const uint32_t EMPTY_WORD = (uint32_t)NO_POSITION << 7 | (uint32_t)NO_POSITION << 14 | (uint32_t)NO_POSITION << 21;

/*
 * The word of the phrase that a legal `word` becomes when one trit (0, +1, -1 as 0, 1, 2) is appended: of length 127
 * if it is too long, 0 if it has too many non-zeros.
 */
static uint32_t append_trit(uint32_t word, unsigned trit) {
    if (trit) {
        uint32_t length = word_length(word);
        unsigned k = 0;
        while (k < MAXIMUM_NONZEROS && word_position(word, k) != NO_POSITION) {
            k++;
        }
        if (k == MAXIMUM_NONZEROS) {
            return 0;
        }
        word ^= (NO_POSITION ^ length) << (7 + 7 * k);
        word |= (uint32_t)(trit == 2) << (28 + k);
    }
    return word + 1;
}

static bool legal_word(uint32_t word) {
    uint32_t length = word_length(word);
    if (length < 1 || length > MAXIMUM_PHRASE || word >> 31) {
        return false;
    }
    uint32_t least = 0;
    bool ended = false;
    for (unsigned k = 0; k < MAXIMUM_NONZEROS; k++) {
        uint32_t position = word_position(word, k);
        ended = ended || position == NO_POSITION;
        if (ended ? position != NO_POSITION || word_negative(word, k) : position < least || position >= length) {
            return false;
        }
        least = position + 1;
    }
    return true;
}

/* Expand the two trees of spec 3.2 into words. The stack holds phrases that wait for their node code. */
static qmoe_status read_trees(qmoe_dictionary *dictionary, const uint8_t *payload, uint32_t entry_count,
                              qmoe_error *error) {
    uint32_t values = 1u << dictionary->info.bits;
    uint32_t node = 0;
    for (unsigned table = 0; table < 2; table++) {
        uint32_t *words = dictionary->words + table * values;
        uint32_t leaves = 0, incomplete = dictionary->info.threshold;
        /* A path of 126 nodes leaves at most two waiting siblings at each depth. */
        uint32_t stack[2 * MAXIMUM_PHRASE + 4];
        unsigned depth = 0;
        stack[depth++] = append_trit(EMPTY_WORD, 2);
        stack[depth++] = append_trit(EMPTY_WORD, 1);
        if (table == 0) {
            stack[depth++] = append_trit(EMPTY_WORD, 0);
        }
        while (depth) {
            uint32_t word = stack[--depth];
            if (!word) {
                return qmoe_fail(error, QMOE_PAYLOAD, "nonzeros", MAXIMUM_NONZEROS + 1, "at most 3");
            }
            if (word_length(word) > MAXIMUM_PHRASE) {
                return qmoe_fail(error, QMOE_PAYLOAD, "length", word_length(word), "at most 126");
            }
            unsigned code = node < entry_count ? payload[node / 4] >> (2 * (node % 4)) & 3 : 3;
            node++;
            if (code > NODE_COMPLETE) {
                return qmoe_fail(error, QMOE_PAYLOAD, "node", node, "a node code 0, 1 or 2");
            }
            if (code == NODE_LEAF) {
                if (leaves == dictionary->info.threshold) {
                    return qmoe_fail(error, QMOE_PAYLOAD, "leaves", leaves + 1, "at most threshold");
                }
                words[leaves++] = word;
                continue;
            }
            if (code == NODE_INCOMPLETE) {
                if (incomplete == values) {
                    return qmoe_fail(error, QMOE_PAYLOAD, "incomplete", incomplete, "room above threshold");
                }
                words[incomplete++] = word;
            } else {
                stack[depth++] = append_trit(word, 2);
                stack[depth++] = append_trit(word, 1);
            }
            stack[depth++] = append_trit(word, 0);
        }
    }
    if (node != entry_count) {
        return qmoe_fail(error, QMOE_PAYLOAD, "node", node, "no node after the second tree");
    }
    if (entry_count % 4 && payload[entry_count / 4] >> (2 * (entry_count % 4))) {
        return qmoe_fail(error, QMOE_PAYLOAD, "node", payload[entry_count / 4], "zero bits after the last node");
    }
    return QMOE_OK;
}

static qmoe_status read_table(qmoe_dictionary *dictionary, const uint8_t *payload, uint32_t entry_count,
                              qmoe_error *error) {
    for (uint32_t codeword = 0; codeword < entry_count; codeword++) {
        uint32_t word = load32(payload + 4 * (size_t)codeword);
        if (word && !legal_word(word)) {
            return qmoe_fail(error, QMOE_PAYLOAD, "word", word, "a legal table word");
        }
        dictionary->words[codeword] = word;
    }
    return QMOE_OK;
}

static bool legal_bits(uint32_t kind, uint32_t bits) {
    return bits == 8 || bits == 10 || bits == 12 || (bits == 16 && kind == KIND_TABLE);
}

qmoe_status qmoe_dictionary_open(const uint8_t *frame, size_t size, qmoe_dictionary **result, qmoe_error *error) {
    if (size < DICTIONARY_HEADER_SIZE) {
        return qmoe_fail(error, QMOE_TRUNCATED, "frame", (int64_t)size, "at least 32 bytes");
    }
    if (memcmp(frame, "QMXD", 4) != 0) {
        return qmoe_fail(error, QMOE_MAGIC, "magic", load32(frame), "QMXD");
    }
    if (frame[4] != 1) {
        return qmoe_fail(error, QMOE_VERSION, "version_major", frame[4], "1");
    }
    if (load32(frame + 8)) {
        return qmoe_fail(error, QMOE_VERSION, "flags", load32(frame + 8), "no flag known to version 1.0");
    }
    uint32_t kind = frame[6], bits = frame[7];
    uint32_t threshold = load32(frame + 12), entry_count = load32(frame + 16), payload_size = load32(frame + 20);
    if (kind > KIND_TREES) {
        return qmoe_fail(error, QMOE_HEADER, "kind", kind, "0 or 1");
    }
    if (!legal_bits(kind, bits)) {
        return qmoe_fail(error, QMOE_HEADER, "bits", bits, "8, 10 or 12; for a table also 16");
    }
    uint32_t values = 1u << bits;
    if (kind == KIND_TREES ? threshold < 1 || threshold > values : threshold != values) {
        return qmoe_fail(error, QMOE_HEADER, "threshold", threshold, "1 to 2^bits; for a table 2^bits");
    }
    if (kind == KIND_TREES ? entry_count < 5 || entry_count > 4 * values : entry_count != values) {
        return qmoe_fail(error, QMOE_HEADER, "entry_count", entry_count, "5 to 4 * 2^bits; for a table 2^bits");
    }
    if (payload_size != (kind == KIND_TREES ? (entry_count + 3) / 4 : 4 * entry_count)) {
        return qmoe_fail(error, QMOE_HEADER, "payload_size", payload_size, "what entry_count needs");
    }
    if (load32(frame + 24)) {
        return qmoe_fail(error, QMOE_HEADER, "reserved", load32(frame + 24), "0");
    }
    if (size < (size_t)DICTIONARY_HEADER_SIZE + payload_size) {
        return qmoe_fail(error, QMOE_TRUNCATED, "payload", (int64_t)size, "32 + payload_size bytes");
    }
    if (size > (size_t)DICTIONARY_HEADER_SIZE + payload_size) {
        return qmoe_fail(error, QMOE_SIZE, "frame", (int64_t)size, "32 + payload_size bytes");
    }
    uint32_t identity = qmoe_crc32c(qmoe_crc32c(0, frame, 28), frame + DICTIONARY_HEADER_SIZE, payload_size);
    if (identity != load32(frame + 28)) {
        return qmoe_fail(error, QMOE_CHECKSUM, "dictionary_id", load32(frame + 28), "CRC-32C of the content");
    }

    uint32_t tables = kind == KIND_TREES ? 2 : 1;
    qmoe_dictionary *dictionary = calloc(1, sizeof *dictionary + sizeof(uint32_t) * tables * values);
    if (!dictionary) {
        return qmoe_fail(error, QMOE_MEMORY, "dictionary", (int64_t)values, "enough memory");
    }
    dictionary->info = (qmoe_dictionary_info){identity, bits, tables, threshold};
    dictionary->kind = kind;
    qmoe_status status = (kind == KIND_TREES ? read_trees : read_table)(dictionary, frame + DICTIONARY_HEADER_SIZE,
                                                                        entry_count, error);
    if (status != QMOE_OK) {
        qmoe_dictionary_close(dictionary);
        return status;
    }
    *result = dictionary;
    return QMOE_OK;
}

void qmoe_dictionary_close(qmoe_dictionary *dictionary) {
    if (dictionary) {
        free(atomic_load(&dictionary->encoder));
        free(atomic_load(&dictionary->phrases));
        free(dictionary);
    }
}

void qmoe_dictionary_get_info(const qmoe_dictionary *dictionary, qmoe_dictionary_info *info) {
    *info = dictionary->info;
}

const uint32_t *qmoe_dictionary_words(const qmoe_dictionary *dictionary) { return dictionary->words; }

/* ---- the encoder's tree ---- */

/* A phrase to be sorted: trits as base-3 digits would not fit, so phrases are compared by their words. */
typedef struct {
    uint32_t word, codeword;
} coded_phrase;

/* Trit of a phrase at a column, as 0, 1 or 2 for 0, +1, -1. */
static unsigned word_trit(uint32_t word, uint32_t column) {
    for (unsigned k = 0; k < MAXIMUM_NONZEROS; k++) {
        if (word_position(word, k) == column) {
            return 1u + word_negative(word, k);
        }
    }
    return 0;
}

/* Preorder with the child for 0 first: a prefix before what it starts, then by the first trit that differs. */
static int compare_phrases(const void *a, const void *b) {
    const coded_phrase *p = a, *q = b;
    uint32_t shorter = word_length(p->word) < word_length(q->word) ? word_length(p->word) : word_length(q->word);
    for (uint32_t column = 0; column < shorter; column++) {
        int difference = (int)word_trit(p->word, column) - (int)word_trit(q->word, column);
        if (difference) {
            return difference;
        }
    }
    if (word_length(p->word) != word_length(q->word)) {
        return word_length(p->word) < word_length(q->word) ? -1 : 1;
    }
    return p->codeword < q->codeword ? -1 : 1;
}

/* Longest common prefix of two phrases, in trits. */
static uint32_t common_prefix(uint32_t a, uint32_t b) {
    uint32_t shorter = word_length(a) < word_length(b) ? word_length(a) : word_length(b);
    uint32_t column = 0;
    while (column < shorter && word_trit(a, column) == word_trit(b, column)) {
        column++;
    }
    return column;
}

/* Lay one table's phrases out as nodes from `next` on; returns the node after the last. With nodes NULL it counts. */
static uint32_t lay_out(const coded_phrase *phrases, uint32_t count, encoder_node *nodes, uint32_t next) {
    uint32_t path[MAXIMUM_PHRASE + 1]; /* node at each depth of the phrase before */
    uint32_t root = next++;
    path[0] = root;
    if (nodes) {
        nodes[root] = (encoder_node){.codeword = -1};
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t word = phrases[i].word;
        uint32_t depth = i ? common_prefix(phrases[i - 1].word, word) : 0;
        for (; depth < word_length(word); depth++) {
            uint32_t node = next++;
            unsigned trit = word_trit(word, depth);
            if (nodes) {
                nodes[node] = (encoder_node){.codeword = -1};
                if (trit) {
                    nodes[path[depth]].child[trit - 1] = node;
                } else {
                    nodes[path[depth]].zeros = 1; /* has a child for 0; lengthened below */
                }
            }
            path[depth + 1] = node;
        }
        if (nodes && nodes[path[depth]].codeword < 0) { /* of equal phrases the lowest codeword is sent */
            nodes[path[depth]].codeword = (int32_t)phrases[i].codeword;
        }
    }
    if (nodes) {
        for (uint32_t node = next; node-- > root;) {
            if (nodes[node].zeros) {
                nodes[node].zeros = nodes[node + 1].zeros + 1;
            }
        }
    }
    return next;
}

/*
 * At a node with a codeword a non-zero first ends the phrase, and the next begins with it. If it leads to a leaf, that
 * phrase ends too, and the walk is back at T0's root.
 */
static encoder_jump jump_from(const encoder_tree *tree, uint32_t threshold, uint32_t node, unsigned negative) {
    encoder_jump jump = {.emitted = 0};
    int32_t codeword = tree->nodes[node].codeword;
    if (codeword >= 0) {
        jump.codewords[jump.emitted++] = (uint16_t)codeword;
        node = tree->root[(uint32_t)codeword >= threshold];
    }
    node = tree->nodes[node].child[negative];
    codeword = tree->nodes[node].codeword;
    if (tree->nodes[node].zeros == 0 && codeword >= 0) {
        jump.codewords[jump.emitted++] = (uint16_t)codeword;
        node = tree->root[0];
    }
    jump.node = (uint16_t)node;
    return jump;
}

static encoder_tree *build_encoder(const qmoe_dictionary *dictionary) {
    uint32_t values = 1u << dictionary->info.bits;
    coded_phrase *phrases = malloc(sizeof *phrases * 2 * values);
    if (!phrases) {
        return NULL;
    }
    uint32_t counts[2] = {0, 0};
    for (unsigned table = 0; table < dictionary->info.tables; table++) {
        coded_phrase *sorted = phrases + table * values;
        for (uint32_t codeword = 0; codeword < values; codeword++) {
            uint32_t word = dictionary->words[table * values + codeword];
            if (word) {
                sorted[counts[table]++] = (coded_phrase){word, codeword};
            }
        }
        qsort(sorted, counts[table], sizeof *sorted, compare_phrases);
    }
    uint32_t second = lay_out(phrases, counts[0], NULL, 0);
    uint32_t total = lay_out(phrases + values, counts[1], NULL, second);
    uint32_t jump_count = dictionary->kind == KIND_TREES ? 2 * total : 0;
    encoder_tree *tree = malloc(sizeof *tree + sizeof *tree->nodes * total + sizeof(encoder_jump) * jump_count);
    if (tree) {
        tree->root[0] = 0;
        tree->root[1] = second;
        tree->node_count = total;
        lay_out(phrases, counts[0], tree->nodes, 0);
        lay_out(phrases + values, counts[1], tree->nodes, second);
        encoder_jump *jumps = (encoder_jump *)(void *)(tree->nodes + total);
        for (uint32_t i = 0; i < jump_count; i++) {
            jumps[i] = jump_from(tree, dictionary->info.threshold, i / 2, i % 2);
        }
        tree->jumps = jump_count ? jumps : NULL;
    }
    free(phrases);
    return tree;
}

const encoder_tree *qmoe_dictionary_encoder(const qmoe_dictionary *dictionary) {
    /* The tree is a cache: making it changes nothing that a caller can see. */
    _Atomic(encoder_tree *) *slot = (_Atomic(encoder_tree *) *)(uintptr_t)&dictionary->encoder;
    encoder_tree *tree = atomic_load(slot);
    if (!tree) {
        tree = build_encoder(dictionary);
        encoder_tree *other = NULL;
        if (tree && !atomic_compare_exchange_strong(slot, &other, tree)) {
            free(tree);
            tree = other;
        }
    }
    return tree;
}
