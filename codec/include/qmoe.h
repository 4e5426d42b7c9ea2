/*
 * libqmoe: dictionary-coded ternary matrices, format 1.0 (spec/qmoe-format-v1.md).
 *
 * Every function that can fail returns a status and, where `error` is not NULL, says what was wrong.
 * Nothing is global: objects may be used from any number of threads at once as long as none closes them.
 * The library never trusts the bytes it reads: whatever a frame holds, it reads and writes within bounds.
 */
#ifndef QMOE_H
#define QMOE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define QMOE_API __declspec(dllexport)
#else
#define QMOE_API __attribute__((visibility("default")))
#endif

/* Kinds of fault: those of spec 1.1, and three of the caller's own. */
typedef enum qmoe_status {
    QMOE_OK = 0,
    QMOE_TRUNCATED = 1,
    QMOE_MAGIC = 2,
    QMOE_VERSION = 3,
    QMOE_CHECKSUM = 4,
    QMOE_HEADER = 5,
    QMOE_SIZE = 6,
    QMOE_DICTIONARY = 7,
    QMOE_INDEX = 8,
    QMOE_PAYLOAD = 9,
    QMOE_ARGUMENT = 10,
    QMOE_MEMORY = 11
} qmoe_status;

/* What was wrong: the field by the spec's name, what it held and what was expected. */
typedef struct qmoe_error {
    qmoe_status status;
    int64_t value;
    char field[24];
    char expected[72];
} qmoe_error;

typedef enum qmoe_dtype { QMOE_FLOAT32 = 0, QMOE_BFLOAT16 = 1, QMOE_FLOAT16 = 2 } qmoe_dtype;

typedef struct qmoe_dictionary qmoe_dictionary;
typedef struct qmoe_matrix qmoe_matrix;

/* Fields of a dictionary frame's header that users need (spec 3.1). */
typedef struct qmoe_dictionary_info {
    uint32_t dictionary_id;
    uint32_t bits;
    uint32_t tables;
    uint32_t threshold;
} qmoe_dictionary_info;

/* Version of the library, "major.minor.patch". */
QMOE_API const char *qmoe_version(void);

/* Which of its inner loops the library chose for this processor: "portable", "avx2" or "avx512". */
QMOE_API const char *qmoe_kernels_name(void);

/* CRC-32C of `size` bytes, continuing from `value` (0 to begin). */
QMOE_API uint32_t qmoe_crc32c(uint32_t value, const void *data, size_t size);

/* ---- dictionaries ---- */

/* Decode the dictionary frame of exactly `size` bytes. The frame's bytes are not needed afterwards. */
QMOE_API qmoe_status qmoe_dictionary_open(const uint8_t *frame, size_t size, qmoe_dictionary **dictionary,
                                          qmoe_error *error);
QMOE_API void qmoe_dictionary_close(qmoe_dictionary *dictionary);
QMOE_API void qmoe_dictionary_get_info(const qmoe_dictionary *dictionary, qmoe_dictionary_info *info);

/* The phrases as table words (spec 3.3): uint32 [tables][2^bits], zero where a codeword is unused. */
QMOE_API const uint32_t *qmoe_dictionary_words(const qmoe_dictionary *dictionary);

/* ---- matrices ---- */

/* Skip the body checksum and the walk over the codewords; the header and the row index are always checked. */
#define QMOE_SKIP_BODY 1u

/*
 * Open the matrix frame of exactly `size` bytes at `frame`, which must stay readable until the matrix is
 * closed, as must the dictionaries. Without QMOE_SKIP_BODY everything that the spec asks for is checked.
 */
QMOE_API qmoe_status qmoe_matrix_open(const uint8_t *frame, size_t size, const qmoe_dictionary *const *dictionaries,
                                      size_t dictionary_count, unsigned options, qmoe_matrix **matrix,
                                      qmoe_error *error);
QMOE_API void qmoe_matrix_close(qmoe_matrix *matrix);
QMOE_API uint32_t qmoe_matrix_rows(const qmoe_matrix *matrix);
QMOE_API uint32_t qmoe_matrix_columns(const qmoe_matrix *matrix);

/* Levels float [rows][2]: low, high. */
QMOE_API void qmoe_matrix_levels(const qmoe_matrix *matrix, float *levels);

/* `threads` below is how many threads may work, the caller among them: 1 to 256. Results do not depend on it. */

/* Trits int8 [row_count][columns] of rows first_row … first_row + row_count - 1. */
QMOE_API qmoe_status qmoe_matrix_decode(const qmoe_matrix *matrix, uint32_t first_row, uint32_t row_count,
                                        int8_t *trits, unsigned threads, qmoe_error *error);

/* Weights [row_count][columns] in `dtype`: low, 0 or high. */
QMOE_API qmoe_status qmoe_matrix_dequantize(const qmoe_matrix *matrix, uint32_t first_row, uint32_t row_count,
                                            qmoe_dtype dtype, void *weights, unsigned threads,
                                            qmoe_error *error);

/*
 * y float [tokens][rows] = x [tokens][columns] times the transposed matrix, both dense, x in `dtype`. The matrix is
 * never unpacked. Computed in float32: |error| <= (columns + 3) * 2^-24 * sum |w| |x|, to first order.
 */
QMOE_API qmoe_status qmoe_matrix_matmul(const qmoe_matrix *matrix, const void *x, qmoe_dtype dtype, uint64_t tokens,
                                        float *y, unsigned threads, qmoe_error *error);

/*
 * The same for the experts of a layer, in one call: tokens group_ends[g - 1] … group_ends[g] - 1 (from 0 for g = 0)
 * are multiplied with matrices[g], all of one shape. A matrix may come more than once, a group be empty.
 */
QMOE_API qmoe_status qmoe_grouped_matmul(const qmoe_matrix *const *matrices, const uint64_t *group_ends,
                                         size_t group_count, const void *x, qmoe_dtype dtype, float *y,
                                         unsigned threads, qmoe_error *error);

/* ---- encoding ---- */

/*
 * Encode trits int8 [rows][columns] and levels float [rows][2] to a matrix frame, allocated for the caller, who
 * frees it with qmoe_free. Without dictionaries the codec is raw. `selectors` [rows] says which dictionary a row
 * uses and may be NULL where there is one at most. `level_format` as in spec 4.1; levels are rounded to nearest.
 */
QMOE_API qmoe_status qmoe_encode(const int8_t *trits, const float *levels, uint32_t rows, uint32_t columns,
                                 const qmoe_dictionary *const *dictionaries, size_t dictionary_count,
                                 const uint8_t *selectors, unsigned level_format, uint8_t **frame, uint64_t *size,
                                 qmoe_error *error);
QMOE_API void qmoe_free(void *memory);

#ifdef __cplusplus
}
#endif

#endif
