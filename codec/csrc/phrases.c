/* Builds the tables that the kernels read, once per dictionary, when first needed. */
#include "internal.h"

#include <stdlib.h>

static void fill_sums(uint32_t word, phrase_sums *sums) {
    for (unsigned k = 0; k < MAXIMUM_NONZEROS; k++) {
        uint32_t position = word_position(word, k);
        bool present = word && position != NO_POSITION;
        uint32_t place = !present ? 2 : word_negative(word, k) ? 0 : 1;
        sums->offsets[k] = (uint16_t)(((present ? position : 0) * TRIPLE + place) * sizeof(float));
    }
    sums->advance = (uint16_t)(word_length(word) * TRIPLE * sizeof(float));
}

static void fill_slots(uint32_t word, phrase_slots *slots) {
    slots->advance = (uint8_t)(PAIR * word_length(word));
    for (unsigned k = 0, next = 0; word && k < MAXIMUM_NONZEROS; k++) {
        if (word_position(word, k) != NO_POSITION) {
            uint32_t place = PAIR * word_position(word, k) + word_negative(word, k);
            slots->back[next++] = (uint8_t)(PAIR * word_length(word) - place);
        }
    }
}

static void fill_lists(uint32_t word, phrase_lists *lists) {
    unsigned next = 0;
    for (unsigned negative = 0; negative < 2; negative++) {
        unsigned first = next;
        for (unsigned k = 0; word && k < MAXIMUM_NONZEROS; k++) {
            if (word_position(word, k) != NO_POSITION && word_negative(word, k) == (negative != 0)) {
                lists->positions[next++] = (uint16_t)word_position(word, k);
            }
        }
        *(negative ? &lists->lows : &lists->highs) = (uint8_t)(2 * (next - first));
    }
    lists->advance = word_length(word) * UINT64_C(0x000100010001);
}

static void fill_block(uint32_t word, int8_t *block) {
    for (unsigned k = 0; word && k < MAXIMUM_NONZEROS; k++) {
        if (word_position(word, k) != NO_POSITION) {
            block[word_position(word, k)] = word_negative(word, k) ? -1 : 1;
        }
    }
}

static phrase_tables *build_phrases(const qmoe_dictionary *dictionary) {
    size_t entries = (size_t)dictionary->info.tables << dictionary->info.bits;
    uint32_t longest = 0, used = 0, nonzeros = 0;
    for (size_t i = 0; i < entries; i++) {
        uint32_t word = dictionary->words[i], length = word_length(word);
        longest = length > longest ? length : longest;
        used += word != 0;
        for (unsigned k = 0; word && k < MAXIMUM_NONZEROS; k++) {
            nonzeros += word_position(word, k) != NO_POSITION;
        }
    }
    uint32_t block = longest <= 32 ? 32 : longest <= 64 ? 64 : 128;
    /* Lines of 64 bytes hold whole entries; the tables follow each other from the largest alignment on. */
    size_t sizes[6] = {entries * block, entries * sizeof(phrase_lists), (entries + 1) * sizeof(phrase_sums),
                       entries * sizeof(phrase_slots), 2 * entries, entries};
    size_t header = round_up(sizeof(phrase_tables), 64);
    size_t total = round_up(header + sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4] + sizes[5], 64);
    uint8_t *memory = aligned_alloc(64, total);
    if (!memory) {
        return NULL;
    }
    memset(memory, 0, total);
    phrase_tables *tables = (phrase_tables *)(void *)memory;
    int8_t *blocks = (int8_t *)(memory + header);
    phrase_lists *lists = (phrase_lists *)(void *)(memory + header + sizes[0]);
    phrase_sums *sums = (phrase_sums *)(void *)(memory + header + sizes[0] + sizes[1]);
    phrase_slots *slots = (phrase_slots *)(void *)(memory + header + sizes[0] + sizes[1] + sizes[2]);
    uint16_t *measures = (uint16_t *)(void *)(memory + header + sizes[0] + sizes[1] + sizes[2] + sizes[3]);
    uint8_t *lengths = memory + header + sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4];
    for (size_t i = 0; i < entries; i++) {
        uint32_t word = dictionary->words[i];
        lengths[i] = (uint8_t)word_length(word);
        measures[i] = (uint16_t)(word ? word_length(word) : UNUSED);
        fill_sums(word, sums + i);
        fill_slots(word, slots + i);
        fill_lists(word, lists + i);
        fill_block(word, blocks + i * block);
    }
    fill_sums(0, sums + entries);
    *tables = (phrase_tables){.entries = (uint32_t)entries,
                              .block = block,
                              .crowded = nonzeros > 2 * used,
                              .lengths = lengths,
                              .measures = measures,
                              .sums = sums,
                              .slots = slots,
                              .lists = lists,
                              .blocks = blocks};
    return tables;
}

const phrase_tables *qmoe_dictionary_phrases(const qmoe_dictionary *dictionary) {
    _Atomic(phrase_tables *) *slot = (_Atomic(phrase_tables *) *)(uintptr_t)&dictionary->phrases;
    phrase_tables *tables = atomic_load(slot);
    if (!tables) {
        tables = build_phrases(dictionary);
        phrase_tables *other = NULL;
        if (tables && !atomic_compare_exchange_strong(slot, &other, tables)) {
            free(tables);
            tables = other;
        }
    }
    return tables;
}
