/* Compares the chosen kernels' measure_rows with a walk over one codeword after the other, on random rows, a block of them at a time. */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>

static uint32_t state = 1;

static uint32_t below(uint32_t bound) {
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state % bound;
}

static uint64_t walk(const codeword_source *source, uint32_t count, const uint8_t *lengths) {
    uint64_t total = 0;
    uint32_t second = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t codeword = packed_wide(source->array, source->first + i, source->bits);
        uint32_t length = lengths[second << source->bits | codeword];
        if (length == 0) {
            return UINT64_MAX;
        }
        total += length;
        second = codeword >= source->threshold;
    }
    return total;
}

static void compare(uint32_t bits, uint32_t tables, bool all_used) {
    size_t entries = (size_t)tables << bits;
    uint8_t *lengths = malloc(entries);
    uint16_t *measures = malloc(2 * entries);
    if (!lengths || !measures) {
        abort();
    }
    for (size_t i = 0; i < entries; i++) {
        lengths[i] = (uint8_t)(all_used || below(1000) ? 1 + below(126) : 0);
        measures[i] = lengths[i] ? lengths[i] : UNUSED;
    }
    phrase_tables phrases = {.lengths = lengths, .measures = measures};
    for (unsigned round = 0; round < 2000; round++) {
        uint32_t codewords = 1 + below(round % 4 == 3 ? 9000 : round % 2 ? 40 : 700);
        size_t size = ((size_t)codewords * bits + 7) / 8 + 8; /* the room that a frame has at least */
        uint8_t *bytes = malloc(size);
        if (!bytes) {
            abort();
        }
        for (size_t i = 0; i < size; i++) {
            bytes[i] = (uint8_t)below(256);
        }
        codeword_source source = {.array = bytes,
                                  .limit = bytes + size,
                                  .first = below(codewords),
                                  .bits = bits,
                                  .threshold = tables == 1 ? 1u << bits : 1 + below((1u << bits) - 1)};
        uint32_t rows = 1 + below(32), left = codewords - (uint32_t)source.first, counts[32];
        uint64_t found[32];
        for (uint32_t row = 0; row < rows; row++) {
            counts[row] = row + 1 == rows ? below(left + 1) : below(2 * left / (rows - row) + 1);
            left -= counts[row];
        }
        qmoe_chosen_kernels()->measure_rows(&source, rows, counts, &phrases, found);
        for (uint32_t row = 0; row < rows; row++) {
            uint64_t expected = walk(&source, counts[row], lengths);
            if (found[row] != expected) {
                printf("%s: %u bits, %u tables, threshold %u, %u codewords from %u on: %lld instead of %lld\n",
                       qmoe_chosen_kernels()->name, bits, tables, source.threshold, counts[row],
                       (uint32_t)source.first, (long long)found[row], (long long)expected);
                exit(1);
            }
            source.first += counts[row];
        }
        free(bytes);
    }
    free(lengths);
    free(measures);
}

int main(void) {
    static const uint32_t widths[4] = {8, 10, 12, 16};
    for (unsigned i = 0; i < 4; i++) {
        for (uint32_t tables = 1; tables <= (widths[i] < 16 ? 2 : 1); tables++) {
            compare(widths[i], tables, true);
            compare(widths[i], tables, false);
        }
    }
    printf("%s: measured as walked\n", qmoe_chosen_kernels()->name);
    return 0;
}
