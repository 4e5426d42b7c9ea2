/*
 * libqmoe: dictionary-coded ternary matrices and models packed with them, format 1.0 (spec/qmoe-format-v1.md).
 *
 *     qmoe_model *model;
 *     qmoe_expert *expert;
 *     qmoe_error error;
 *     if (qmoe_model_open("packed", 0, 0, &model, &error) != QMOE_OK ||
 *         qmoe_expert_open(model, layer, number, 0, &expert, &error) != QMOE_OK ||
 *         qmoe_matrix_matmul(qmoe_expert_matrix(expert, 0), x, QMOE_FLOAT32, tokens, y, threads, &error) != QMOE_OK) {
 *         char message[QMOE_MESSAGE_SIZE];
 *         fprintf(stderr, "%s\n", qmoe_error_message(&error, message, sizeof message));
 *     }
 *
 * Every function that can fail returns a status and, where `error` is not NULL, says what was wrong; it then sets
 * none of its results. Nothing is global: objects may be used from any number of threads at once as long as none
 * closes them. The library never trusts the bytes it reads: whatever a file holds, it reads and writes within bounds.
 *
 * On Linux the symbols have the version QMOE_1.0. Functions may be added, under a newer version; none of these
 * changes its meaning, and no structure its layout, within libqmoe.so.1.
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

/* Kinds of fault: those of spec 1.1; an argument that cannot be meant; no memory; what the system refused. */
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
    QMOE_MEMORY = 11,
    QMOE_SYSTEM = 12
} qmoe_status;

/*
 * What was wrong: the field by the spec's name, what it held (its number, where it is one; for QMOE_SYSTEM errno) and
 * what was expected; and the place: file, layer, expert, projection as far as they are known, or "".
 */
typedef struct qmoe_error {
    qmoe_status status;
    int64_t value;
    char field[24];
    char expected[72];
    char place[256];
} qmoe_error;

/* Write "PLACE: FIELD: STATUS (found VALUE, expected EXPECTED)", one line, to `message`, cut to its size; returns it. */
#define QMOE_MESSAGE_SIZE 512
QMOE_API char *qmoe_error_message(const qmoe_error *error, char *message, size_t size);

/* The spec's word for a status, such as "truncated". */
QMOE_API const char *qmoe_status_name(qmoe_status status);

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

/* ---- packed models ---- */

/*
 * A packed model (spec 6), or one shard of it. It is not changed by anything but qmoe_model_close; so threads may share
 * it without locks. All pointers that it gives stay valid until it is closed.
 */
typedef struct qmoe_model qmoe_model;

/* The matrices of one expert. */
typedef struct qmoe_expert qmoe_expert;

/* Do not map the files: read each record into memory when its expert is opened. */
#define QMOE_READ 2u

/*
 * Open the directory of a packed model, or a single shard (a .safetensors file). Checked at once are the manifest, the
 * sizes of all files, config.json and the index, the headers of all shards to the last byte (no key twice, no overlap,
 * hole or rest), the layers' tensors and indices, and the dictionaries. Frames are checked when an expert is opened;
 * the SHA-256 of the manifest are left to qmoe-verify. A shard alone has no names for its projections: `name`, `role`,
 * `tensor` and the layer's `dtype` are "", and their shapes are those of the layer's first expert.
 *
 * options: 0, or QMOE_READ, which keeps a file descriptor for each shard open.
 * memory_limit: most bytes for headers, indices and dictionaries with their tables, mapped files not counted;
 *     QMOE_MEMORY if more are needed. 0 for no limit.
 *
 * Files are mapped read-only. Whoever changes one of them meanwhile makes results wrong, but nothing is read or
 * written out of bounds. Whoever SHORTENS a mapped file, though, has the system end the process with SIGBUS as soon
 * as the part that is gone is touched; where files are not to be trusted so far, use QMOE_READ, with which that is
 * QMOE_TRUNCATED. (qmoe-pack never writes into a finished model: it renames a new directory over it.)
 *
 * Beyond the spec, a name with a zero byte in it is refused (QMOE_HEADER), and so is JSON nested more than 128 deep.
 */
QMOE_API qmoe_status qmoe_model_open(const char *path, unsigned options, uint64_t memory_limit, qmoe_model **model,
                                     qmoe_error *error);
/* Close all experts before. */
QMOE_API void qmoe_model_close(qmoe_model *model);

/* One MoE layer. */
typedef struct qmoe_layer_info {
    const char *prefix;       /* name of its experts in the original checkpoint */
    const char *dtype;        /* their dtype there, as safetensors calls it */
    uint32_t experts;         /* at least 1 */
    uint32_t projections;     /* 1 to 3 */
    uint64_t store_size;      /* bytes of all records */
    uint64_t largest_record;  /* bytes */
} qmoe_layer_info;

/* One matrix of each expert of a layer, in the order of the frames in a record (spec 6.3). */
typedef struct qmoe_projection_info {
    const char *name;   /* such as "gate_proj" */
    const char *role;   /* "gate", "up" or "down": y = down(act(gate(x)) * up(x)), or down(act(up(x))) */
    const char *tensor; /* name in the original checkpoint, with {expert} for the number, or fused */
    uint32_t rows, columns;
} qmoe_projection_info;

/* Where an expert's record lies. */
typedef struct qmoe_record_info {
    uint64_t offset, size; /* in the layer's store */
    int64_t tokens;        /* seen in calibration, or -1 */
} qmoe_record_info;

/* Layers are numbered from 0, in the order of their prefixes, with layer 10 after layer 2. */
QMOE_API size_t qmoe_model_layer_count(const qmoe_model *model);
QMOE_API qmoe_status qmoe_model_layer(const qmoe_model *model, size_t layer, qmoe_layer_info *info, qmoe_error *error);
QMOE_API qmoe_status qmoe_model_find_layer(const qmoe_model *model, const char *prefix, size_t *layer,
                                           qmoe_error *error);
QMOE_API qmoe_status qmoe_model_projection(const qmoe_model *model, size_t layer, uint32_t projection,
                                           qmoe_projection_info *info, qmoe_error *error);
/*
 * A layer's entry in config.json, as it stands there: what the structs above do not have. The fields that matter for
 * computing are `bias` of a projection, a tensor whose values are added to the product, and `gating` of the layer, which
 * says what comes between the projections (spec 6.3). Without `gating` that is act(gate) * up or act(up), with the
 * activation that the model's own configuration names. `gating` itself is left to its user to check. "" for a shard
 * alone. NULL if there is no such layer.
 */
QMOE_API const char *qmoe_model_layer_json(const qmoe_model *model, size_t layer);
QMOE_API qmoe_status qmoe_model_record(const qmoe_model *model, size_t layer, uint32_t expert, qmoe_record_info *info,
                                       qmoe_error *error);

/*
 * Open an expert: its record as it lies in the map (or read, with QMOE_READ), its frames checked against the layer, and
 * every matrix ready to multiply with. `options`: 0, or QMOE_SKIP_BODY for records that were checked before.
 */
QMOE_API qmoe_status qmoe_expert_open(const qmoe_model *model, size_t layer, uint32_t expert, unsigned options,
                                      qmoe_expert **result, qmoe_error *error);
QMOE_API void qmoe_expert_close(qmoe_expert *expert);

/* The matrix of a projection, by its number; NULL if there is none. It belongs to the expert. */
QMOE_API const qmoe_matrix *qmoe_expert_matrix(const qmoe_expert *expert, uint32_t projection);

/* The record: the frames, one after the other. `size` may be NULL. */
QMOE_API const uint8_t *qmoe_expert_record(const qmoe_expert *expert, uint64_t *size);

/*
 * A tensor as it is stored; one that was compressed has the ending ".qmoe_zstd" and holds a dense frame (spec 5). Other
 * endings ".qmoe_…" are the format's own, now or later (spec 1.2): leave what you do not know aside.
 */
typedef struct qmoe_tensor_info {
    const char *name;
    const char *dtype; /* as safetensors calls it */
    const char *shard; /* name of the file */
    const uint64_t *shape;
    uint32_t dimensions;
    uint64_t offset, size; /* bytes, from the start of the file */
} qmoe_tensor_info;

/* All tensors of all shards, in the order of their names. */
QMOE_API size_t qmoe_model_tensor_count(const qmoe_model *model);
QMOE_API qmoe_status qmoe_model_tensor(const qmoe_model *model, size_t tensor, qmoe_tensor_info *info,
                                       qmoe_error *error);
QMOE_API qmoe_status qmoe_model_find_tensor(const qmoe_model *model, const char *name, size_t *tensor,
                                            qmoe_error *error);
/* Copy `size` bytes of a tensor, from byte `offset` of it on. */
QMOE_API qmoe_status qmoe_model_read_tensor(const qmoe_model *model, size_t tensor, uint64_t offset, void *buffer,
                                            size_t size, qmoe_error *error);

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
