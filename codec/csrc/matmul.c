/*
 * Multiplication with packed matrices: y = x W^T, a row of W at a time, the weights never unpacked.
 *
 * An output is high * (sum of x where the row has +1) + low * (sum of x where it has -1): one addition per non-zero
 * weight and two multiplications per row. One token adds along the phrases; for more, each row becomes two
 * lists of columns, which then serve all tokens, up to sixteen at a time.
 *
 * Work comes in groups, each some tokens for one matrix, as the experts of a layer get them. Groups are cut into
 * pieces of at most PIECE_TOKENS tokens, so that the copy of x in the kernels' layout stays small.
 */
#include "internal.h"
#include "parallel.h"
#include "scratch.h"

enum {
    ROWS_PER_UNIT = 32,
    PIECE_TOKENS = 256,
    /* Pieces are taken together until their copies of x take this much. */
    BATCH_BYTES = 16 << 20
};

typedef struct {
    const qmoe_matrix *matrix;
    const char *x; /* [tokens][columns] */
    float *y;      /* [tokens][rows] */
    size_t tokens;
    float *packed;       /* x in the kernels' layout */
    unsigned first_unit; /* of the batch's units of rows */
} piece;

typedef struct {
    const qmoe_kernels *kernels;
    int dtype;
    piece *pieces;
    unsigned piece_count, unit_count;
    uint8_t *scratch;
    size_t scratch_size; /* of one thread */
} batch;

static size_t dtype_size(int dtype) { return dtype == QMOE_FLOAT32 ? 4 : 2; }

/* Narrowest vector for this many tokens. */
static unsigned block_width(size_t tokens) { return tokens <= 4 ? 4 : tokens <= 8 ? 8 : TOKEN_BLOCK; }

/* One token of a coded matrix is multiplied along the phrases. */
static bool is_single(const piece *work) {
    return work->tokens == 1 && work->matrix->layout.codec == CODEC_DICTIONARY;
}

/* Whether its x then lies in pairs, not in triples. */
static bool takes_pairs(const qmoe_kernels *kernels, const qmoe_matrix *matrix) {
    bool crowded = false;
    for (uint32_t i = 0; i < matrix->layout.dictionary_count; i++) {
        crowded |= matrix->phrases[i]->crowded;
    }
    return kernels->rows_sum_pairs && matrix->layout.bits < 16 && matrix->layout.columns <= PAIR_COLUMNS && !crowded;
}

/* Floats that a piece's x takes in the kernels' layout. */
static size_t packed_floats(const qmoe_kernels *kernels, const piece *work) {
    size_t columns = work->matrix->layout.columns;
    if (is_single(work)) {
        unsigned stride = takes_pairs(kernels, work->matrix) ? PAIR : TRIPLE;
        return (size_t)round_up((columns + SUM_SLACK + 1) * stride, TOKEN_BLOCK);
    }
    size_t whole = work->tokens / TOKEN_BLOCK, rest = work->tokens % TOKEN_BLOCK;
    size_t floats = (columns + SLACK) * (whole * TOKEN_BLOCK + (rest ? block_width(rest) : 0));
    return (size_t)round_up(floats, TOKEN_BLOCK); /* whole lines of the cache */
}

static float element(const char *x, size_t index, int dtype) {
    if (dtype == QMOE_FLOAT32) {
        float value;
        memcpy(&value, x + 4 * index, sizeof value);
        return value;
    }
    uint16_t bits = load16((const uint8_t *)x + 2 * index);
    return dtype == QMOE_BFLOAT16 ? qmoe_from_bfloat16(bits) : qmoe_from_float16(bits);
}

/* x of one token: triples (0, x, 0), or pairs (0, x) after one of zeros. */
static void pack_single(const qmoe_kernels *kernels, const piece *work, int dtype) {
    size_t columns = work->matrix->layout.columns;
    bool pairs = takes_pairs(kernels, work->matrix);
    memset(work->packed, 0, packed_floats(kernels, work) * sizeof *work->packed);
    float *place = work->packed + (pairs ? PAIR : 0) + 1;
    for (size_t column = 0; column < columns; column++, place += pairs ? PAIR : TRIPLE) {
        *place = element(work->x, column, dtype);
    }
}

static void pack_block(const piece *work, int dtype, size_t first, float *block) {
    size_t columns = work->matrix->layout.columns;
    size_t tokens = work->tokens - first < TOKEN_BLOCK ? work->tokens - first : TOKEN_BLOCK;
    unsigned width = block_width(tokens);
    if (tokens < width) {
        memset(block, 0, columns * width * sizeof *block);
    }
    for (size_t token = 0; token < tokens; token++) {
        const char *x = work->x + (first + token) * columns * dtype_size(dtype);
        for (size_t column = 0; column < columns; column++) {
            block[column * width + token] = element(x, column, dtype);
        }
    }
    memset(block + columns * width, 0, SLACK * width * sizeof *block);
}

static void pack_unit(void *context, unsigned unit, unsigned thread) {
    (void)thread;
    const batch *all = context;
    const piece *work = all->pieces + unit;
    if (is_single(work)) {
        pack_single(all->kernels, work, all->dtype);
        return;
    }
    float *block = work->packed;
    for (size_t first = 0; first < work->tokens; first += TOKEN_BLOCK) {
        pack_block(work, all->dtype, first, block);
        block += ((size_t)work->matrix->layout.columns + SLACK) * TOKEN_BLOCK;
    }
}

/* ---- one token ---- */

static void multiply_token(const qmoe_kernels *kernels, const piece *work, uint32_t first_row, uint32_t row_count) {
    const qmoe_matrix *matrix = work->matrix;
    codeword_source sources[ROWS_PER_UNIT];
    const phrase_tables *phrases[ROWS_PER_UNIT];
    uint32_t counts[ROWS_PER_UNIT];
    float sums[ROWS_PER_UNIT][2], levels[ROWS_PER_UNIT][2];
    qmoe_row_sources(matrix, first_row, row_count, sources, counts, phrases);
    (takes_pairs(kernels, matrix) ? kernels->rows_sum_pairs : kernels->rows_sum)(
        row_count, sources, counts, phrases, matrix->layout.columns, work->packed, sums);
    qmoe_rows_levels(matrix, first_row, row_count, levels);
    for (uint32_t row = 0; row < row_count; row++) {
        work->y[first_row + row] = levels[row][1] * sums[row][1] + levels[row][0] * sums[row][0];
    }
}

/* ---- many tokens ---- */

/* Lists of one row for each row of a unit, in a thread's scratch. */
static row_lists lists_of(uint8_t *scratch, uint32_t number, uint32_t columns) {
    size_t room = (size_t)columns + SLACK;
    uint16_t *highs = (uint16_t *)(void *)scratch + number * 2 * room;
    return (row_lists){.highs = highs, .lows = highs + room};
}

static void sum_lists(const qmoe_kernels *kernels, const piece *work, uint32_t first_row, const row_lists *lists,
                      uint32_t row_count) {
    uint32_t rows = work->matrix->layout.rows, columns = work->matrix->layout.columns;
    const float *block = work->packed;
    for (size_t first = 0; first < work->tokens; first += TOKEN_BLOCK) {
        size_t tokens = work->tokens - first < TOKEN_BLOCK ? work->tokens - first : TOKEN_BLOCK;
        for (uint32_t row = 0; row < row_count; row++) {
            float levels[2], sums[TOKEN_BLOCK];
            qmoe_row_levels(work->matrix, first_row + row, levels);
            kernels->list_sum(lists + row, block, block_width(tokens), levels, sums);
            for (size_t token = 0; token < tokens; token++) {
                work->y[(first + token) * rows + first_row + row] = sums[token];
            }
        }
        block += ((size_t)columns + SLACK) * TOKEN_BLOCK;
    }
}

static void multiply_tokens(const qmoe_kernels *kernels, const piece *work, uint32_t first_row, uint32_t row_count,
                            uint8_t *scratch) {
    const qmoe_matrix *matrix = work->matrix;
    uint32_t columns = matrix->layout.columns;
    /* With one block of tokens a list is used at once, while it is in the nearest cache. */
    uint32_t together = work->tokens <= TOKEN_BLOCK ? 1 : ROWS_PER_UNIT;
    bool raw = matrix->layout.codec == CODEC_RAW;
    row_cursor cursor = raw ? (row_cursor){0} : qmoe_rows_from(matrix, first_row);
    row_lists lists[ROWS_PER_UNIT];
    for (uint32_t done = 0; done < row_count; done += together) {
        uint32_t some = row_count - done < together ? row_count - done : together;
        for (uint32_t row = 0; row < some; row++) {
            lists[row] = lists_of(scratch, row, columns);
            if (raw) {
                int8_t *trits = (int8_t *)lists_of(scratch, ROWS_PER_UNIT, columns).highs;
                qmoe_decode_raw(matrix, (uint64_t)(first_row + done + row) * columns, columns, trits);
                kernels->list_trits(trits, columns, lists + row);
                continue;
            }
            row_codewords codewords = qmoe_next_row(&cursor);
            codeword_source source = qmoe_row_source(matrix, &codewords);
            kernels->list_row(&source, codewords.count, matrix->phrases[codewords.dictionary_number], columns,
                              lists + row);
        }
        sum_lists(kernels, work, first_row + done, lists, some);
    }
}

/* ---- rows too long for lists ---- */

static void multiply_trits(void *context, const qmoe_matrix *matrix, uint32_t row, const int8_t *trits) {
    const piece *work = context;
    uint32_t columns = matrix->layout.columns;
    float levels[2];
    qmoe_row_levels(matrix, row, levels);
    for (size_t first = 0; first < work->tokens; first += TOKEN_BLOCK) {
        size_t tokens = work->tokens - first < TOKEN_BLOCK ? work->tokens - first : TOKEN_BLOCK;
        unsigned width = block_width(tokens);
        const float *block = work->packed + ((size_t)columns + SLACK) * first;
        float sums[2][TOKEN_BLOCK] = {{0}};
        for (uint32_t column = 0; column < columns; column++) {
            if (trits[column]) {
                float *sum = sums[trits[column] > 0];
                for (size_t token = 0; token < tokens; token++) {
                    sum[token] += block[(size_t)column * width + token];
                }
            }
        }
        for (size_t token = 0; token < tokens; token++) {
            work->y[(first + token) * matrix->layout.rows + row] = levels[1] * sums[1][token] + levels[0] * sums[0][token];
        }
    }
}

static void multiply_unit(void *context, unsigned unit, unsigned thread) {
    batch *all = context;
    unsigned number = 0;
    while (number + 1 < all->piece_count && all->pieces[number + 1].first_unit <= unit) {
        number++;
    }
    piece *work = all->pieces + number;
    const frame_layout *layout = &work->matrix->layout;
    uint32_t first_row = (unit - work->first_unit) * ROWS_PER_UNIT;
    uint32_t row_count = layout->rows - first_row < ROWS_PER_UNIT ? layout->rows - first_row : ROWS_PER_UNIT;
    uint8_t *scratch = all->scratch + thread * all->scratch_size;
    if (is_single(work)) {
        multiply_token(all->kernels, work, first_row, row_count);
    } else if (layout->columns <= LIST_COLUMNS) {
        multiply_tokens(all->kernels, work, first_row, row_count, scratch);
    } else {
        qmoe_decode_rows(work->matrix, first_row, row_count, multiply_trits, work, (int8_t *)scratch);
    }
}

static bool run_batch(batch *all, unsigned threads) {
    size_t floats = 0, room = 0;
    all->unit_count = 0;
    for (unsigned i = 0; i < all->piece_count; i++) {
        piece *work = all->pieces + i;
        size_t columns = work->matrix->layout.columns;
        floats += packed_floats(all->kernels, work);
        /* Nothing; or two lists for each row of a unit, and a row of trits behind them; or a row of trits alone. */
        size_t needed = (columns + SLACK) * (columns <= LIST_COLUMNS ? (ROWS_PER_UNIT + 1) * 2 * sizeof(uint16_t) : 1);
        needed = is_single(work) ? 0 : needed;
        room = needed > room ? needed : room;
        work->first_unit = all->unit_count;
        all->unit_count += (work->matrix->layout.rows + ROWS_PER_UNIT - 1) / ROWS_PER_UNIT;
    }
    threads = threads < all->unit_count ? threads : all->unit_count;
    all->scratch_size = (size_t)round_up(room, 64);
    float *packed = qmoe_scratch(SCRATCH_FLOATS, floats * sizeof *packed);
    all->scratch = qmoe_scratch(SCRATCH_ROWS, (threads ? threads : 1) * all->scratch_size);
    bool enough = packed && all->scratch;
    if (enough) {
        float *next = packed;
        for (unsigned i = 0; i < all->piece_count; i++) {
            all->pieces[i].packed = next;
            next += packed_floats(all->kernels, all->pieces + i);
        }
        qmoe_parallel(threads, all->piece_count, pack_unit, all);
        qmoe_parallel(threads, all->unit_count, multiply_unit, all);
    }
    return enough;
}

qmoe_status qmoe_grouped_matmul(const qmoe_matrix *const *matrices, const uint64_t *group_ends, size_t group_count,
                                const void *x, qmoe_dtype dtype, float *y, unsigned threads, qmoe_error *error) {
    if (threads == 0 || threads > MAXIMUM_THREADS) {
        return qmoe_fail(error, QMOE_ARGUMENT, "threads", threads, "1 to 256");
    }
    if (dtype != QMOE_FLOAT32 && dtype != QMOE_BFLOAT16 && dtype != QMOE_FLOAT16) {
        return qmoe_fail(error, QMOE_ARGUMENT, "dtype", (int64_t)dtype, "float32, bfloat16 or float16");
    }
    uint64_t tokens = 0;
    for (size_t group = 0; group < group_count; group++) {
        if (group_ends[group] < tokens) {
            return qmoe_fail(error, QMOE_ARGUMENT, "group_ends", (int64_t)group, "ends that do not fall");
        }
        const frame_layout *layout = &matrices[group]->layout, *first = &matrices[0]->layout;
        if (layout->rows != first->rows || layout->columns != first->columns) {
            return qmoe_fail(error, QMOE_ARGUMENT, "matrices", (int64_t)group, "matrices of one shape");
        }
        tokens = group_ends[group];
    }
    size_t piece_limit = group_count + (size_t)(tokens / PIECE_TOKENS);
    batch all = {.kernels = qmoe_chosen_kernels(),
                 .dtype = (int)dtype,
                 .pieces = qmoe_scratch(SCRATCH_PIECES, piece_limit * sizeof(piece))};
    bool enough = all.pieces != NULL;
    uint64_t token = 0;
    size_t bytes = 0;
    for (size_t group = 0; enough && group < group_count; group++) {
        const qmoe_matrix *matrix = matrices[group];
        while (enough && token < group_ends[group]) {
            uint64_t some = group_ends[group] - token < PIECE_TOKENS ? group_ends[group] - token : PIECE_TOKENS;
            piece *work = all.pieces + all.piece_count++;
            *work = (piece){.matrix = matrix,
                            .x = (const char *)x + token * matrix->layout.columns * dtype_size((int)dtype),
                            .y = y + token * matrix->layout.rows,
                            .tokens = (size_t)some};
            token += some;
            bytes += packed_floats(all.kernels, work) * sizeof(float);
            if (bytes >= BATCH_BYTES) {
                enough = run_batch(&all, threads);
                all.piece_count = 0;
                bytes = 0;
            }
        }
    }
    if (enough && all.piece_count) {
        enough = run_batch(&all, threads);
    }
    qmoe_scratch_done();
    return enough ? QMOE_OK : qmoe_fail(error, QMOE_MEMORY, "x", (int64_t)tokens, "enough memory");
}

qmoe_status qmoe_matrix_matmul(const qmoe_matrix *matrix, const void *x, qmoe_dtype dtype, uint64_t tokens, float *y,
                               unsigned threads, qmoe_error *error) {
    return qmoe_grouped_matmul(&matrix, &tokens, 1, x, dtype, y, threads, error);
}
