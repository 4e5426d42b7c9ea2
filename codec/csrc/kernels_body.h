/*
 * The hot loops. Included by kernels_<variant>.c, which names the table KERNELS and is compiled for its instruction
 * set; vectors are those of the compiler (GCC and Clang), so that one text serves every processor.
 *
 * Finding a phrase takes only its codeword and whether the codeword before it is >= threshold, so all indices of a
 * chunk are found first, side by side. What is serial is the position, one addition per phrase.
 */
#include "internal.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

/* ---- indices of phrases ---- */

/* Room before the first index of a chunk, since four codewords fill whole bytes: so up to three come along. */
enum { LEAD = 4 };

/* Bytes between the codewords that are read and those that are fetched for later: a few rows. */
enum { AHEAD = 2048 };

typedef struct {
    uint16_t found[LEAD + CHUNK + 16]; /* the indices of the chunk's phrases from LEAD on */
    uint16_t before; /* the codeword before the chunk; it decides on the table of the chunk's first phrase */
} chunk_buffer;

#if defined(__AVX2__)
/*
 * Unpacks codewords eight at a time, from `bits` bytes each. A codeword lies in two bytes: they go to a lane of 16
 * bits, where a multiplication shifts out what is above and a shift what is below.
 */
typedef struct {
    __m128i pick, factor, shift;
} unpacking;

static inline unpacking unpacking_of(uint32_t bits) {
    static const int8_t picks[5][16] = {
        {0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1, 6, -1, 7, -1},
        {0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 6, 7, 7, 8, 8, 9},
        {0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11},
        {0},
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    };
    static const int16_t factors[5][8] = {
        {256, 256, 256, 256, 256, 256, 256, 256},
        {64, 16, 4, 1, 64, 16, 4, 1},
        {16, 1, 16, 1, 16, 1, 16, 1},
        {0},
        {1, 1, 1, 1, 1, 1, 1, 1},
    };
    uint32_t width = bits / 2 - 4;
    return (unpacking){_mm_loadu_si128((const __m128i *)(const void *)picks[width]),
                       _mm_loadu_si128((const __m128i *)(const void *)factors[width]),
                       _mm_cvtsi32_si128((int)(16 - bits))};
}

/* Eight codewords, the first of which begins with the first of `bytes`; 16 of these are read. */
static inline __m128i unpack_eight(const unpacking *how, const uint8_t *bytes) {
    __m128i lanes = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)bytes), how->pick);
    return _mm_srl_epi16(_mm_mullo_epi16(lanes, how->factor), how->shift);
}

/*
 * Indices from a codeword on that begins with the first of `bytes`, sixteen at a time, while they can be loaded.
 * Returns how many were found. The codeword before the first is taken to be 0.
 */
static inline uint32_t find_sixteens(const codeword_source *source, const uint8_t *bytes, uint32_t count,
                                     uint32_t table, uint16_t *indices) {
    const uint32_t bits = source->bits;
    const unpacking how = unpacking_of(bits);
    const __m256i pick = _mm256_broadcastsi128_si256(how.pick), factor = _mm256_broadcastsi128_si256(how.factor);
    const __m256i threshold = _mm256_set1_epi16((int16_t)source->threshold), tables = _mm256_set1_epi16((int16_t)table);
    __m256i last = _mm256_setzero_si256();
    uint32_t i = 0;
    for (; i < count && source->limit - bytes >= 16 + (int64_t)bits; i += 16, bytes += 2 * bits) {
        __builtin_prefetch(bytes + AHEAD);
        __m256i lanes = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)bytes));
        lanes = _mm256_inserti128_si256(lanes, _mm_loadu_si128((const __m128i *)(const void *)(bytes + bits)), 1);
        lanes = _mm256_mullo_epi16(_mm256_shuffle_epi8(lanes, pick), factor);
        __m256i codewords = _mm256_srl_epi16(lanes, how.shift);
        __m256i before = _mm256_permute2x128_si256(last, codewords, 0x21); /* high half of last, low half of these */
        before = _mm256_alignr_epi8(codewords, before, 14);
        last = codewords;
        __m256i second = _mm256_cmpeq_epi16(_mm256_max_epu16(before, threshold), before);
        codewords = _mm256_or_si256(codewords, _mm256_and_si256(second, tables));
        _mm256_storeu_si256((__m256i *)(void *)(indices + i), codewords);
    }
    return i;
}
#endif

/* Indices of the `count` <= CHUNK phrases from codeword number `done` of the row on; count is not 0. */
static inline void find_phrases(const codeword_source *source, uint32_t done, uint32_t count, chunk_buffer *buffer) {
    const uint32_t bits = source->bits, threshold = source->threshold;
    const uint32_t table = threshold >> bits ? 0 : 1u << bits; /* 0: no codeword leads to T1 */
    const uint64_t first = source->first + done;
    uint16_t *indices = buffer->found + LEAD;
    uint32_t before = buffer->before, found = 0;
#if defined(__AVX2__)
    uint32_t lead = (uint32_t)(first % 4);
    const uint8_t *bytes = source->array + (first - lead) * bits / 8;
    found = find_sixteens(source, bytes, count + lead, table, indices - lead);
    if (found > lead) {
        found = found - lead < count ? found - lead : count;
        const uint32_t mask = (1u << bits) - 1;
        indices[0] = (uint16_t)((indices[0] & mask) | (before >= threshold ? table : 0));
        before = indices[found - 1] & mask;
    } else {
        found = 0;
    }
#endif
    for (uint32_t i = found; i < count; i++) {
        indices[i] = (uint16_t)packed_wide(source->array, first + i, bits);
    }
    if (found < count) { /* from the end on, so that many can be taken at a time */
        buffer->before = indices[count - 1];
        for (uint32_t i = count - 1; i > found; i--) {
            indices[i] = (uint16_t)(indices[i] | (indices[i - 1] >= (uint16_t)threshold ? table : 0));
        }
        indices[found] = (uint16_t)(indices[found] | (before >= threshold ? table : 0));
    } else {
        buffer->before = (uint16_t)before;
    }
}

/* ---- lengths ---- */

#if defined(__AVX512VBMI__)
#include "measure_vbmi.h"
#endif

/* What has been measured of a row: the sum of its lengths, and bits of UNUSED if a codeword is. */
typedef struct {
    uint32_t total, seen; /* of at most 2^24 lengths of at most 126 */
} row_measure;

static inline void add_measure(row_measure *row, uint32_t measure) {
    row->total += measure;
    row->seen |= measure;
}

#if defined(__AVX2__)
/* Where a walk over a row's codewords is. */
typedef struct {
    const uint8_t *bytes; /* of the next codeword */
    uint32_t lead;        /* codewords of the row before that come first */
    uint32_t before;      /* the codeword before */
} row_place;

static inline row_place place_of(const codeword_source *source) {
    uint32_t lead = (uint32_t)(source->first % 4); /* four codewords fill whole bytes, whatever their width */
    return (row_place){source->array + (source->first - lead) * source->bits / 8, lead, 0};
}

/* Whether there are bytes enough to find so many indices. */
static inline bool can_find_indices(const codeword_source *source, const row_place *place, uint64_t count) {
    return (uint64_t)(source->limit - place->bytes) >= (count - 1) / 8 * source->bits + 16;
}

/* Indices of `count` codewords, and of up to 7 that follow. */
static inline void find_indices(const codeword_source *source, uint32_t count, uint32_t table, row_place *place,
                                uint16_t *indices) {
    const __m128i lanes = _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7);
    const __m128i threshold = _mm_set1_epi16((int16_t)source->threshold), tables = _mm_set1_epi16((int16_t)table);
    const unpacking unpack = unpacking_of(source->bits);
    __m128i outside = _mm_cmpgt_epi16(_mm_set1_epi16((int16_t)place->lead), lanes);
    __m128i last = _mm_insert_epi16(_mm_setzero_si128(), (int)place->before, 7);
    for (uint32_t i = 0; i < count; i += 8, place->bytes += source->bits) {
        /* Zero before the row, so that it begins with T0. */
        __m128i codewords = _mm_andnot_si128(outside, unpack_eight(&unpack, place->bytes));
        __m128i previous = _mm_alignr_epi8(codewords, last, 14);
        __m128i second = _mm_cmpeq_epi16(_mm_max_epu16(previous, threshold), previous);
        __m128i found = _mm_or_si128(codewords, _mm_and_si128(second, tables));
        _mm_storeu_si128((__m128i *)(void *)(indices + i), found);
        last = codewords;
        outside = _mm_setzero_si128();
    }
    place->before = (uint16_t)_mm_extract_epi16(last, 7);
}

/* The sum of eight phrases' measures: at most 8 UNUSED. A load and an addition for each are faster than a gather. */
static inline uint16_t measure_eight(const uint16_t *indices, const uint16_t *measures) {
    uint16_t sum = 0;
    for (unsigned k = 0; k < 8; k++) {
        sum = (uint16_t)(sum + measures[indices[k]]);
    }
    __asm__("" : "+r"(sum)); /* or compilers would put vectors together, which takes several times as long */
    return sum;
}

/*
 * From a whole byte on: so up to three codewords of the row before come along, and some of the row behind. In the
 * place of these, one of the row is measured, and taken off again: a branch that is guessed wrong costs more.
 */
static inline uint32_t measure_chunks(const codeword_source *source, uint32_t count, const uint16_t *measures,
                                      uint32_t table, row_measure *row) {
    row_place place = place_of(source);
    uint64_t left = (uint64_t)count + place.lead;
    if (!can_find_indices(source, &place, left)) {
        return 0;
    }
    uint16_t indices[CHUNK + 8];
    while (left) {
        uint32_t some = left < CHUNK ? (uint32_t)left : CHUNK;
        find_indices(source, some, table, &place, indices);
        uint16_t one = indices[place.lead];
        for (uint32_t i = 0; i < 3; i++) {
            indices[i] = i < place.lead ? one : indices[i];
        }
        _mm_storeu_si128((__m128i *)(void *)(indices + some), _mm_set1_epi16((int16_t)one));
        row->total -= (place.lead + -some % 8) * measures[one];
        for (uint32_t i = 0; i < some; i += 8) {
            add_measure(row, measure_eight(indices + i, measures));
        }
        left -= some;
        place.lead = 0;
    }
    return count;
}
#endif

/* Nothing waits for the position here, so this runs several times as fast as decoding does. */
static uint64_t measure_row(const codeword_source *source, uint32_t count, const phrase_tables *phrases) {
    const uint16_t *measures = phrases->measures;
    uint32_t bits = source->bits, table = source->threshold >> bits ? 0 : 1u << bits;
#if defined(__AVX512VBMI__)
    if (bits == 8) {
        return measure_row_8(source, count, phrases->lengths);
    }
    if (bits == 10) {
        return measure_row_10(source, count, phrases->lengths);
    }
#endif
    row_measure row = {0, 0};
    uint32_t before = 0, i = 0; /* `before`: the codeword before; no threshold is 0, so T0 */
#if defined(__AVX2__)
    i = measure_chunks(source, count, measures, table, &row);
#endif
    for (; i < count; i++) {
        uint32_t codeword = packed_wide(source->array, source->first + i, bits);
        add_measure(&row, measures[codeword | (before >= source->threshold ? table : 0)]);
        before = codeword;
    }
    return row.seen >= UNUSED ? UINT64_MAX : row.total;
}

#if defined(__AVX2__)
enum { WALK = 6144, BEHIND = 256 };

/* Codewords `first` on as 16 lanes; the second eight begin `bits` bytes after the first. */
static inline __m256i unpack_sixteen(const uint8_t *bytes, uint32_t bits, __m256i pick, __m256i factor,
                                     __m128i shift) {
    __m128i low = _mm_loadu_si128((const __m128i *)(const void *)bytes);
    __m128i high = _mm_loadu_si128((const __m128i *)(const void *)(bytes + bits));
    __m256i lanes = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), pick);
    return _mm256_srl_epi16(_mm256_mullo_epi16(lanes, factor), shift);
}

/*
 * All rows as one walk, whose length hardly changes from one block of rows to the next: row by row, the end of each
 * would be guessed wrong. Lengths are added up while indices further on are found, since loads do one and vectors
 * the other; BEHIND, so that the indices have left the queue of stores. False if the rows are too long, or a codeword
 * may be unused.
 */
static bool measure_together(const codeword_source *source, uint32_t rows, const uint32_t *counts,
                             const phrase_tables *phrases, uint64_t *totals) {
    const uint16_t *measures = phrases->measures;
    uint32_t bits = source->bits;
    row_place place = place_of(source);
    uint64_t end = place.lead;
    for (uint32_t row = 0; row < rows; row++) {
        end += counts[row];
    }
    if (end > WALK || end == place.lead || !can_find_indices(source, &place, end + 8)) {
        return false;
    }
    uint16_t indices[WALK + 16];
    uint16_t starts[WALK / 16 + 1]; /* a bit for each codeword of T0 because a row starts */
    uint32_t before[WALK / 8 + 3];  /* the sum of all eights before */
    memset(starts, 0, sizeof starts[0] * (size_t)(end / 16 + 1));
    for (uint32_t row = 0, at = place.lead; row <= rows; at += row < rows ? counts[row] : 0, row++) {
        starts[at / 16] |= (uint16_t)(1u << at % 16);
    }
    const unpacking unpack = unpacking_of(bits);
    const __m256i pick = _mm256_broadcastsi128_si256(unpack.pick), factor = _mm256_broadcastsi128_si256(unpack.factor);
    const __m256i threshold = _mm256_set1_epi16((int16_t)source->threshold);
    const __m256i table = _mm256_set1_epi16((int16_t)(source->threshold >> bits ? 0 : 1u << bits));
    const __m256i lanes = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m256i lane_bits = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
                                                INT16_MIN);
    /* Codewords of the row before are taken for 0, which hardly any dictionary leaves unused. */
    __m256i outside = _mm256_cmpgt_epi16(_mm256_set1_epi16((int16_t)place.lead), lanes);
    __m256i last = _mm256_setzero_si256();
    row_measure all = {0, 0};
    uint32_t found = 0, added = 0;
    while (added < end) {
        if (found < end) {
            __m256i codewords = unpack_sixteen(place.bytes, bits, pick, factor, unpack.shift);
            codewords = _mm256_andnot_si256(outside, codewords);
            __m256i between = _mm256_permute2x128_si256(last, codewords, 0x21);
            __m256i previous = _mm256_alignr_epi8(codewords, between, 14);
            __m256i second = _mm256_cmpeq_epi16(_mm256_max_epu16(previous, threshold), previous);
            __m256i start = _mm256_and_si256(_mm256_set1_epi16((int16_t)starts[found / 16]), lane_bits);
            second = _mm256_andnot_si256(_mm256_cmpeq_epi16(start, lane_bits), _mm256_and_si256(second, table));
            _mm256_storeu_si256((__m256i *)(void *)(indices + found), _mm256_or_si256(codewords, second));
            last = codewords;
            outside = _mm256_setzero_si256();
            place.bytes += 2 * bits;
            found += 16;
            if (found <= BEHIND && found < end) {
                continue;
            }
        }
        for (uint32_t k = 0; k < 16; k += 8, added += 8) {
            before[added / 8] = all.total;
            add_measure(&all, measure_eight(indices + added, measures));
        }
    }
    before[added / 8] = all.total;
    uint32_t at = place.lead, passed = 0;
    for (uint32_t k = 0; k < place.lead; k++) {
        passed += measures[indices[k]];
    }
    for (uint32_t row = 0; row < rows; row++) {
        at += counts[row];
        uint32_t sum = before[at / 8];
        const uint16_t *eight = indices + at / 8 * 8;
        for (uint32_t k = 0; k < 8; k++) {
            sum += k < at % 8 ? measures[eight[k]] : 0u;
        }
        totals[row] = sum - passed;
        passed = sum;
    }
    return all.seen < UNUSED;
}
#endif

static void measure_rows(const codeword_source *source, uint32_t rows, const uint32_t *counts,
                         const phrase_tables *phrases, uint64_t *totals) {
#if defined(__AVX512VBMI__)
    bool together = source->bits > 10; /* or tables in registers are faster */
#elif defined(__AVX2__)
    bool together = true;
#endif
#if defined(__AVX2__)
    if (together && rows > 1 && measure_together(source, rows, counts, phrases, totals)) {
        return;
    }
#endif
    codeword_source row_source = *source;
    for (uint32_t row = 0; row < rows; row_source.first += counts[row++]) {
        totals[row] = counts[row] ? measure_row(&row_source, counts[row], phrases) : 0;
    }
}

/* ---- trits ---- */

enum { FIRST_PART = 32 };

/* Few phrases are longer than the first part of their block, so that the rest is copied only then. */
static inline uint32_t copy_phrases(const chunk_buffer *buffer, uint32_t count, const phrase_tables *phrases,
                                    size_t block, uint32_t columns, uint32_t column, int8_t *row) {
    for (uint32_t i = 0; i < count && column < columns; i++) {
        size_t index = buffer->found[LEAD + i];
        const int8_t *phrase = phrases->blocks + index * block;
        uint32_t length = phrases->lengths[index];
        memcpy(row + column, phrase, FIRST_PART);
        if (block > FIRST_PART && length > FIRST_PART) {
            memcpy(row + column + FIRST_PART, phrase + FIRST_PART, block - FIRST_PART);
        }
        column += length;
    }
    return column;
}

static void decode_row(const codeword_source *source, uint32_t count, const phrase_tables *phrases, uint32_t columns,
                       int8_t *row) {
    chunk_buffer buffer;
    buffer.before = 0; /* T0 */
    uint32_t column = 0;
    for (uint32_t done = 0; done < count && column < columns; done += CHUNK) {
        uint32_t some = count - done < CHUNK ? count - done : CHUNK;
        find_phrases(source, done, some, &buffer);
        if (phrases->block == 32) {
            column = copy_phrases(&buffer, some, phrases, 32, columns, column, row);
        } else if (phrases->block == 64) {
            column = copy_phrases(&buffer, some, phrases, 64, columns, column, row);
        } else {
            column = copy_phrases(&buffer, some, phrases, 128, columns, column, row);
        }
    }
    if (column < columns) {
        memset(row + column, 0, columns - column);
    }
}

/* ---- one token ---- */

/*
 * Two floats, which lie in no more than eight bytes: a longer load would cross lines of the cache too often. Two of
 * them make a quad.
 */
#if defined(__SSE2__)
typedef __m128 pair, quad;
static inline pair load_pair(const char *address) {
    double value;
    memcpy(&value, address, sizeof value);
    return _mm_castpd_ps(_mm_set_sd(value));
}
static inline quad load_pairs(const char *first, const char *second) {
    return _mm_loadh_pi(load_pair(first), (const __m64 *)(const void *)second);
}
#else
typedef float pair __attribute__((vector_size(8)));
typedef float quad __attribute__((vector_size(16)));
static inline pair load_pair(const char *address) {
    pair value;
    memcpy(&value, address, sizeof value);
    return value;
}
static inline quad load_pairs(const char *first, const char *second) {
    pair low = load_pair(first), high = load_pair(second);
    return (quad){low[0], low[1], high[0], high[1]};
}
#endif

/* Where a row's walk is, the phrase that it takes next, and its sums so far. */
typedef struct {
    const char *x;
    uint64_t phrase;
    quad sums;
    pair third;
} row_walk;

static inline uint64_t load_phrase(const phrase_sums *phrase) {
    uint64_t packed;
    memcpy(&packed, phrase, sizeof packed);
    return packed;
}

/*
 * Adds a phrase, and loads the one after it. So what a phrase says is there when the turn comes to it again; if it had
 * to be waited for, the instructions that wait would fill the processor's schedulers. The empty statement keeps the
 * compiler from moving additions behind other rows', where it runs out of registers.
 */
static inline void add_phrase(row_walk *walk, const phrase_sums *next) {
    uint64_t phrase = walk->phrase;
    walk->sums += load_pairs(walk->x + (uint16_t)phrase, walk->x + (uint16_t)(phrase >> 16));
    walk->third += load_pair(walk->x + (uint16_t)(phrase >> 32));
    walk->x += phrase >> 48;
    walk->phrase = load_phrase(next);
#if defined(__SSE2__)
    __asm__ volatile("" : "+r"(walk->x), "+x"(walk->sums), "+x"(walk->third));
#endif
}

/*
 * Walks TOGETHER rows side by side while at least UNCHECKED of `count` phrases are left and all are before the end;
 * returns how many it took of each. Written out, since the walks have to stay in registers.
 */
static uint32_t walk_together(row_walk *walks, const chunk_buffer *buffers, const phrase_sums *table, uint32_t count,
                              const char *end) {
    row_walk first = walks[0], second = walks[1], third = walks[2], fourth = walks[3];
    uint32_t i = 0;
    for (bool inside = true; inside && i + UNCHECKED <= count;) {
        for (unsigned k = 0; k < UNCHECKED; k++) {
            i++;
            add_phrase(&first, table + buffers[0].found[LEAD + i]);
            add_phrase(&second, table + buffers[1].found[LEAD + i]);
            add_phrase(&third, table + buffers[2].found[LEAD + i]);
            add_phrase(&fourth, table + buffers[3].found[LEAD + i]);
        }
        inside = first.x < end && second.x < end && third.x < end && fourth.x < end;
    }
    walks[0] = first, walks[1] = second, walks[2] = third, walks[3] = fourth;
    return i;
}

/*
 * Sums of `rows` rows of one dictionary, 1 or TOGETHER. Rows that are walked side by side are at about the same column,
 * so that x comes from the nearest cache, and do not wait for each other. Shorter rows are filled up with phrases of no
 * length, unless all 16 bits of an index are taken. A walk is asked where it is after UNCHECKED phrases.
 */
static inline void sum_rows(unsigned rows, const codeword_source *sources, const uint32_t *counts,
                            const phrase_tables *phrases, uint32_t columns, const float *triples, float (*sums)[2]) {
    chunk_buffer buffers[TOGETHER];
    row_walk walks[TOGETHER];
    const phrase_sums *table = phrases->sums;
    /* A row that has ended waits for the others at most a phrase behind its last column. */
    const char *end = (const char *)triples + (size_t)(columns + SLACK) * TRIPLE * sizeof(float);
    const bool fill = phrases->entries <= UINT16_MAX;
    uint32_t most = 0;
    for (unsigned row = 0; row < rows; row++) {
        buffers[row].before = 0; /* T0 */
        walks[row] = (row_walk){.x = (const char *)triples};
        most = counts[row] > most ? counts[row] : most;
    }
    for (uint32_t done = 0; done < most; done += CHUNK) {
        uint32_t some[TOGETHER], shortest = CHUNK, longest = 0, i = 0;
        for (unsigned row = 0; row < rows; row++) {
            uint32_t left = counts[row] > done ? counts[row] - done : 0;
            some[row] = left < CHUNK ? left : CHUNK;
            shortest = some[row] < shortest ? some[row] : shortest;
            longest = some[row] > longest ? some[row] : longest;
            if (some[row]) {
                find_phrases(sources + row, done, some[row], buffers + row);
            }
        }
        const uint32_t shared = fill ? (uint32_t)round_up(longest, UNCHECKED) : shortest;
        bool inside = true;
        for (unsigned row = 0; row < rows; row++) {
            uint16_t *indices = buffers[row].found + LEAD;
            for (; fill && some[row] < shared; some[row]++) {
                indices[some[row]] = (uint16_t)phrases->entries;
            }
            indices[some[row]] = 0; /* loaded, but not added */
            walks[row].phrase = load_phrase(table + indices[0]);
            inside = inside && walks[row].x < end;
        }
        if (inside && rows == TOGETHER) {
            i = walk_together(walks, buffers, table, shared, end);
        }
        for (unsigned row = 0; row < rows; row++) {
            for (uint32_t k = i; k < some[row] && walks[row].x < end; k++) {
                add_phrase(walks + row, table + buffers[row].found[LEAD + k + 1]);
            }
        }
    }
    for (unsigned row = 0; row < rows; row++) {
        quad total = walks[row].sums;
        sums[row][1] = total[0] + total[2] + walks[row].third[0]; /* pairs that start at x */
        sums[row][0] = total[1] + total[3] + walks[row].third[1]; /* pairs that end at x */
    }
}

static void rows_sum(unsigned rows, const codeword_source *sources, const uint32_t *counts,
                     const phrase_tables *const *phrases, uint32_t columns, const float *x, float (*sums)[2]) {
    unsigned row = 0;
    for (; row + TOGETHER <= rows; row += TOGETHER) {
        const phrase_tables *const *own = phrases + row;
        if (own[0] != own[1] || own[0] != own[2] || own[0] != own[3]) {
            for (unsigned k = row; k < row + TOGETHER; k++) {
                sum_rows(1, sources + k, counts + k, phrases[k], columns, x, sums + k);
            }
        } else {
            sum_rows(TOGETHER, sources + row, counts + row, own[0], columns, x, sums + row);
        }
    }
    for (; row < rows; row++) {
        sum_rows(1, sources + row, counts + row, phrases[row], columns, x, sums + row);
    }
}

#if defined(__AVX512VBMI2__)
#include "token_vbmi.h"
#endif

/* ---- many tokens ---- */

static void list_row(const codeword_source *source, uint32_t count, const phrase_tables *phrases, uint32_t columns,
                     row_lists *lists) {
    chunk_buffer buffer;
    buffer.before = 0; /* T0 */
    char *highs = (char *)lists->highs, *lows = (char *)lists->lows;
    uint64_t column = 0; /* in three lanes of 16 bits */
    for (uint32_t done = 0; done < count && (column & 0xFFFF) < columns; done += CHUNK) {
        uint32_t some = count - done < CHUNK ? count - done : CHUNK;
        find_phrases(source, done, some, &buffer);
        for (uint32_t i = 0; i < some && (column & 0xFFFF) < columns; i++) {
            const phrase_lists *phrase = phrases->lists + buffer.found[LEAD + i];
            uint64_t positions;
            memcpy(&positions, phrase->positions, sizeof positions);
            positions += column; /* the counts in the highest lane stay as they are, and are not looked at */
            memcpy(highs, &positions, sizeof positions);
            positions >>= 8 * phrase->highs;
            memcpy(lows, &positions, sizeof positions);
            highs += phrase->highs;
            lows += phrase->lows;
            column += phrase->advance;
        }
    }
    lists->high_count = (uint32_t)((uint16_t *)(void *)highs - lists->highs);
    lists->low_count = (uint32_t)((uint16_t *)(void *)lows - lists->lows);
}

static void masks(const int8_t *trits, uint64_t *nonzero, uint64_t *negative);

/* Append the columns of a mask's bits to a list. */
static inline uint32_t append_bits(uint64_t mask, uint32_t first, uint16_t *list, uint32_t count) {
    for (; mask; mask &= mask - 1) {
        list[count++] = (uint16_t)(first + (uint32_t)__builtin_ctzll(mask));
    }
    return count;
}

static void list_trits(const int8_t *trits, uint32_t columns, row_lists *lists) {
    lists->high_count = lists->low_count = 0;
    for (uint32_t first = 0; first < columns; first += 64) {
        uint64_t nonzero, negative, used = columns - first >= 64 ? ~UINT64_C(0) : (UINT64_C(1) << (columns - first)) - 1;
        masks(trits + first, &nonzero, &negative);
        nonzero &= used;
        lists->high_count = append_bits(nonzero & ~negative, first, lists->highs, lists->high_count);
        lists->low_count = append_bits(nonzero & negative, first, lists->lows, lists->low_count);
    }
}

/* Floats in the processor's widest vector; wider ones would be taken apart badly. */
#if defined(__AVX512F__)
enum { WIDEST = 16 };
#elif defined(__AVX__)
enum { WIDEST = 8 };
#else
enum { WIDEST = 4 };
#endif

/* Sums of WIDTH tokens over both lists, x having `stride` tokens to a column. */
#define DEFINE_LIST_SUM(WIDTH)                                                                                       \
    typedef float vector##WIDTH __attribute__((vector_size(4 * WIDTH)));                                             \
    static inline vector##WIDTH sum_columns_##WIDTH(const uint16_t *columns, uint32_t count, const float *x,         \
                                                    size_t stride) {                                                 \
        vector##WIDTH lanes[4] = {{0}}, value;                                                                       \
        uint32_t i = 0;                                                                                              \
        for (; i + 4 <= count; i += 4) {                                                                             \
            for (unsigned lane = 0; lane < 4; lane++) {                                                              \
                memcpy(&value, x + columns[i + lane] * stride, sizeof value);                                        \
                lanes[lane] += value;                                                                                \
            }                                                                                                        \
        }                                                                                                            \
        for (; i < count; i++) {                                                                                     \
            memcpy(&value, x + columns[i] * stride, sizeof value);                                                   \
            lanes[0] += value;                                                                                       \
        }                                                                                                            \
        return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);                                                        \
    }                                                                                                                \
    static inline void list_sum_##WIDTH(const row_lists *lists, const float *x, size_t stride,                       \
                                        const float levels[2], float *sums) {                                        \
        vector##WIDTH high = sum_columns_##WIDTH(lists->highs, lists->high_count, x, stride);                        \
        vector##WIDTH low = sum_columns_##WIDTH(lists->lows, lists->low_count, x, stride);                           \
        high = high * levels[1] + low * levels[0];                                                                   \
        memcpy(sums, &high, sizeof high);                                                                            \
    }

DEFINE_LIST_SUM(4)
#if defined(__AVX__)
DEFINE_LIST_SUM(8)
#endif
#if defined(__AVX512F__)
DEFINE_LIST_SUM(16)
#endif

static void list_sum(const row_lists *lists, const float *x, unsigned width, const float levels[2], float *sums) {
    unsigned step = width < WIDEST ? width : WIDEST;
    for (unsigned lane = 0; lane < width; lane += step) {
#if defined(__AVX512F__)
        if (step == 16) {
            list_sum_16(lists, x, width, levels, sums);
            continue;
        }
#endif
#if defined(__AVX__)
        if (step == 8) {
            list_sum_8(lists, x + lane, width, levels, sums + lane);
            continue;
        }
#endif
        list_sum_4(lists, x + lane, width, levels, sums + lane);
    }
}

/* ---- weights ---- */

static void dequantize_32(const int8_t *trits, uint32_t columns, const uint32_t levels[2], uint32_t *weights) {
    uint32_t low = levels[0], high = levels[1];
    for (uint32_t column = 0; column < columns; column++) {
        uint32_t negative = trits[column] < 0 ? low : 0, positive = trits[column] > 0 ? high : 0;
        weights[column] = negative | positive;
    }
}

static void dequantize_16(const int8_t *trits, uint32_t columns, const uint16_t levels[2], uint16_t *weights) {
    uint16_t low = levels[0], high = levels[1];
    for (uint32_t column = 0; column < columns; column++) {
        uint16_t negative = trits[column] < 0 ? low : 0, positive = trits[column] > 0 ? high : 0;
        weights[column] = negative | positive;
    }
}

/* ---- non-zeros ---- */

static void masks(const int8_t *trits, uint64_t *nonzero, uint64_t *negative) {
#if defined(__AVX512BW__)
    __m512i all = _mm512_loadu_si512(trits);
    *nonzero = _mm512_test_epi8_mask(all, all);
    *negative = _mm512_movepi8_mask(all);
#elif defined(__AVX2__)
    const __m256i *halves = (const __m256i *)(const void *)trits;
    __m256i low = _mm256_loadu_si256(halves), high = _mm256_loadu_si256(halves + 1);
    uint32_t zero_low = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(low, _mm256_setzero_si256()));
    uint32_t zero_high = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(high, _mm256_setzero_si256()));
    *nonzero = ~((uint64_t)zero_high << 32 | zero_low);
    *negative = (uint64_t)(uint32_t)_mm256_movemask_epi8(high) << 32 | (uint32_t)_mm256_movemask_epi8(low);
#else
    uint64_t some = 0, minus = 0;
    for (unsigned byte = 0; byte < 8; byte++) {
        uint64_t eight = load64((const uint8_t *)trits + 8 * byte);
        /* A trit is 00, 01 or FF: bit 0 says whether it is not zero, bit 7 whether it is negative. One bit of
           each byte is brought together by a multiplication. */
        uint64_t gather = UINT64_C(0x0102040810204080);
        some |= ((eight & UINT64_C(0x0101010101010101)) * gather >> 56) << (8 * byte);
        minus |= ((eight >> 7 & UINT64_C(0x0101010101010101)) * gather >> 56) << (8 * byte);
    }
    *nonzero = some;
    *negative = minus;
#endif
}

const qmoe_kernels KERNELS = {
    .name = KERNELS_NAME,
    .measure_rows = measure_rows,
    .decode_row = decode_row,
    .rows_sum = rows_sum,
#if defined(__AVX512VBMI2__)
    .rows_sum_pairs = rows_sum_pairs,
#endif
    .list_row = list_row,
    .list_trits = list_trits,
    .list_sum = list_sum,
    .dequantize_32 = dequantize_32,
    .dequantize_16 = dequantize_16,
    .masks = masks,
};
