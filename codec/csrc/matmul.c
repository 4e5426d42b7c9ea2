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
    /* Of more than a block of tokens, whose x then comes from far caches half as often, if there are units enough. */
    ROWS_PER_TALL_UNIT = 64,
    UNITS_PER_THREAD = 4,
    PIECE_TOKENS = 256,
    /* Pieces are taken together until their copies of x take this much. */
    BATCH_BYTES = 16 << 20,
    /* Columns of a block of tokens that are laid out together. */
    PACK_COLUMNS = 64,
    /* Units with many tokens that are left to the thread that has their x in its caches: to fetch it takes that long. */
    KEPT_UNITS = 2
};

typedef struct {
    const qmoe_matrix *matrix;
    const char *x; /* [tokens][columns] */
    float *y;      /* [tokens][rows] */
    size_t tokens;
    unsigned stride; /* floats that each element of x takes where one token is multiplied along the phrases, else 0 */
    float *packed;   /* x in the kernels' layout, if stride is 0 */
    uint32_t unit_rows;
    unsigned first_block, first_unit; /* of the batch's blocks of tokens, and of its units of rows */
} piece;

typedef struct {
    const qmoe_kernels *kernels;
    int dtype;
    piece *pieces;
    unsigned piece_count, block_count, unit_count;
    uint8_t *scratch;
    size_t scratch_size;                   /* of one thread */
    const piece *laid_out[MAXIMUM_THREADS]; /* the piece of one token whose x each thread has in its scratch */
} batch;

static size_t dtype_size(int dtype) { return dtype == QMOE_FLOAT32 ? 4 : 2; }

/* Narrowest vector for this many tokens. */
static unsigned block_width(size_t tokens) { return tokens <= 4 ? 4 : tokens <= 8 ? 8 : TOKEN_BLOCK; }

/* One token of a coded matrix is multiplied along the phrases. Its x then lies in pairs where it can, or in triples. */
static unsigned place_stride(const qmoe_kernels *kernels, const qmoe_matrix *matrix, uint64_t tokens) {
    if (tokens != 1 || matrix->layout.codec != CODEC_DICTIONARY) {
        return 0;
    }
    bool crowded = false;
    for (uint32_t i = 0; i < matrix->layout.dictionary_count; i++) {
        crowded |= matrix->phrases[i]->crowded;
    }
    bool pairs = kernels->rows_sum_pairs && matrix->layout.bits < 16 && matrix->layout.columns <= PAIR_COLUMNS;
    return pairs && !crowded ? PAIR : TRIPLE;
}

/* Floats that a piece's x takes in the kernels' layout. */
static size_t packed_floats(const piece *work) {
    size_t columns = work->matrix->layout.columns;
    if (work->stride) {
        return (size_t)round_up((columns + SUM_SLACK + 1) * work->stride, TOKEN_BLOCK);
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

/* Elements of x, each with zeros around it: (0, x), or (0, x, 0). Inlined, so that the loop is made for each stride. */
static inline void spread(const char *x, size_t columns, int dtype, unsigned stride, float *places) {
    for (size_t column = 0; column < columns; column++) {
        for (unsigned k = 0; k < stride; k++) {
            places[column * stride + k] = k == 1 ? element(x, column, dtype) : 0;
        }
    }
}

/* x of one token: triples, or pairs after one of zeros. */
static void pack_single(const piece *work, int dtype, float *packed) {
    size_t columns = work->matrix->layout.columns;
    float *end = packed + packed_floats(work);
    if (work->stride == PAIR) {
        memset(packed, 0, PAIR * sizeof *packed);
        packed += PAIR;
        spread(work->x, columns, dtype, PAIR, packed);
    } else {
        spread(work->x, columns, dtype, TRIPLE, packed);
    }
    packed += columns * work->stride;
    memset(packed, 0, (size_t)(end - packed) * sizeof *packed);
}

static void pack_block(const piece *work, int dtype, size_t first, float *block) {
    size_t columns = work->matrix->layout.columns;
    size_t tokens = work->tokens - first < TOKEN_BLOCK ? work->tokens - first : TOKEN_BLOCK;
    unsigned width = block_width(tokens);
    if (tokens < width) {
        memset(block, 0, columns * width * sizeof *block);
    }
    /* Some columns of all tokens after the other, so that what is written stays in the nearest cache. */
    for (size_t done = 0; done < columns; done += PACK_COLUMNS) {
        size_t end = columns - done < PACK_COLUMNS ? columns : done + PACK_COLUMNS;
        for (size_t token = 0; token < tokens; token++) {
            const char *x = work->x + (first + token) * columns * dtype_size(dtype);
            for (size_t column = done; column < end; column++) {
                block[column * width + token] = element(x, column, dtype);
            }
        }
    }
    memset(block + columns * width, 0, SLACK * width * sizeof *block);
}

static void pack_unit(void *context, unsigned unit, unsigned thread) {
    (void)thread;
    const batch *all = context;
    unsigned number = 0;
    while (number + 1 < all->piece_count && all->pieces[number + 1].first_block <= unit) {
        number++;
    }
    const piece *work = all->pieces + number;
    size_t first = (size_t)(unit - work->first_block) * TOKEN_BLOCK;
    pack_block(work, all->dtype, first, work->packed + ((size_t)work->matrix->layout.columns + SLACK) * first);
}

/* ---- one token ---- */

static void multiply_token(const qmoe_kernels *kernels, const piece *work, const float *x, uint32_t first_row,
                           uint32_t row_count) {
    const qmoe_matrix *matrix = work->matrix;
    codeword_source sources[ROWS_PER_UNIT];
    const phrase_tables *phrases[ROWS_PER_UNIT];
    uint32_t counts[ROWS_PER_UNIT];
    float sums[ROWS_PER_UNIT][2], levels[ROWS_PER_UNIT][2];
    qmoe_row_sources(matrix, first_row, row_count, sources, counts, phrases);
    (work->stride == PAIR ? kernels->rows_sum_pairs : kernels->rows_sum)(row_count, sources, counts, phrases,
                                                                         matrix->layout.columns, x, sums);
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
    /* Lines of y lie whole rows apart, mostly in few sets of the cache: so each is written once, not row by row. */
    float tile[TOKEN_BLOCK][ROWS_PER_TALL_UNIT];
    for (size_t first = 0; first < work->tokens; first += TOKEN_BLOCK) {
        size_t tokens = work->tokens - first < TOKEN_BLOCK ? work->tokens - first : TOKEN_BLOCK;
        for (uint32_t row = 0; row < row_count; row++) {
            float levels[2], sums[TOKEN_BLOCK];
            qmoe_row_levels(work->matrix, first_row + row, levels);
            kernels->list_sum(lists + row, block, block_width(tokens), levels, sums);
            for (size_t token = 0; token < tokens; token++) {
                tile[token][row] = sums[token];
            }
        }
        for (size_t token = 0; token < tokens; token++) {
            memcpy(work->y + (first + token) * rows + first_row, tile[token], row_count * sizeof(float));
        }
        block += ((size_t)columns + SLACK) * TOKEN_BLOCK;
    }
}

static void multiply_tokens(const qmoe_kernels *kernels, const piece *work, uint32_t first_row, uint32_t row_count,
                            uint8_t *scratch) {
    const qmoe_matrix *matrix = work->matrix;
    uint32_t columns = matrix->layout.columns;
    /* With one block of tokens a list is used at once, while it is in the nearest cache. */
    uint32_t together = work->tokens <= TOKEN_BLOCK ? 1 : work->unit_rows;
    bool raw = matrix->layout.codec == CODEC_RAW;
    row_cursor cursor = raw ? (row_cursor){0} : qmoe_rows_from(matrix, first_row);
    row_lists lists[ROWS_PER_TALL_UNIT];
    for (uint32_t done = 0; done < row_count; done += together) {
        uint32_t some = row_count - done < together ? row_count - done : together;
        for (uint32_t row = 0; row < some; row++) {
            lists[row] = lists_of(scratch, row, columns);
            if (raw) {
                int8_t *trits = (int8_t *)lists_of(scratch, work->unit_rows, columns).highs;
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
    uint32_t first_row = (unit - work->first_unit) * work->unit_rows;
    uint32_t row_count = layout->rows - first_row < work->unit_rows ? layout->rows - first_row : work->unit_rows;
    uint8_t *scratch = all->scratch + thread * all->scratch_size;
    if (work->stride) {
        /* Each thread lays x out for itself: what another has just written takes longer to fetch than to make. */
        float *x = (float *)(void *)scratch;
        if (all->laid_out[thread] != work) {
            pack_single(work, all->dtype, x);
            all->laid_out[thread] = work;
        }
        multiply_token(all->kernels, work, x, first_row, row_count);
        return;
    }
    all->laid_out[thread] = NULL; /* lists and trits go where it lay */
    if (layout->columns <= LIST_COLUMNS) {
        multiply_tokens(all->kernels, work, first_row, row_count, scratch);
    } else {
        qmoe_decode_rows(work->matrix, first_row, row_count, multiply_trits, work, (int8_t *)scratch);
    }
}

static bool run_batch(batch *all, unsigned threads) {
    size_t floats = 0, room = 0;
    all->block_count = all->unit_count = 0;
    for (unsigned i = 0; i < all->piece_count; i++) {
        piece *work = all->pieces + i;
        size_t rows = work->matrix->layout.rows, columns = work->matrix->layout.columns, needed;
        bool tall = work->tokens > TOKEN_BLOCK && rows / ROWS_PER_TALL_UNIT >= (size_t)threads * UNITS_PER_THREAD;
        work->unit_rows = tall ? ROWS_PER_TALL_UNIT : ROWS_PER_UNIT;
        work->first_block = all->block_count;
        work->first_unit = all->unit_count;
        all->unit_count += (unsigned)((rows + work->unit_rows - 1) / work->unit_rows);
        if (work->stride) {
            needed = packed_floats(work) * sizeof(float);
        } else {
            /* Two lists for each row of a unit, and a row of trits behind them; or a row of trits alone. */
            size_t each = columns <= LIST_COLUMNS ? ((size_t)work->unit_rows + 1) * 2 * sizeof(uint16_t) : 1;
            needed = (columns + SLACK) * each;
            floats += packed_floats(work);
            all->block_count += (unsigned)((work->tokens + TOKEN_BLOCK - 1) / TOKEN_BLOCK);
        }
        room = needed > room ? needed : room;
    }
    threads = threads < all->unit_count ? threads : all->unit_count;
    all->scratch_size = (size_t)round_up(room, 64);
    float *packed = qmoe_scratch(SCRATCH_FLOATS, floats * sizeof *packed);
    all->scratch = qmoe_scratch(SCRATCH_ROWS, (threads ? threads : 1) * all->scratch_size);
    bool enough = packed && all->scratch;
    if (enough) {
        for (unsigned i = 0; i < all->piece_count; i++) {
            all->pieces[i].packed = packed;
            packed += all->pieces[i].stride ? 0 : packed_floats(all->pieces + i);
        }
        memset(all->laid_out, 0, threads * sizeof *all->laid_out);
        /* A thread lays out x for the rows that it will have. */
        unsigned kept = all->piece_count > 1 && all->block_count > all->piece_count ? KEPT_UNITS : 0;
        qmoe_parallel(threads, all->block_count, kept ? all->block_count : 0, pack_unit, all);
        qmoe_parallel(threads, all->unit_count, kept, multiply_unit, all);
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
    _Alignas(PAIR_OF_LINES) batch all = {.kernels = qmoe_chosen_kernels(),
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
                            .tokens = (size_t)some,
                            .stride = place_stride(all.kernels, matrix, some)};
            token += some;
            bytes += work->stride ? 0 : packed_floats(work) * sizeof(float);
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
