/* Files that are read and never trusted, memory that lives as long as a model, and the place in messages. */
#ifndef QMOE_FILE_H
#define QMOE_FILE_H

#include "internal.h"

/* Put a place in front of the one that `error` names already; returns `status`. Call it for failures alone. */
qmoe_status qmoe_at(qmoe_error *error, qmoe_status status, const char *place);
/* The same with the name of `size` bytes, which anything may be in. */
qmoe_status qmoe_at_name(qmoe_error *error, qmoe_status status, const char *name, size_t size);

/* ---- memory that is freed all at once ---- */

typedef struct arena_block arena_block;

typedef struct {
    arena_block *blocks;
    size_t left;          /* of the newest block */
    uint64_t used, limit; /* bytes; what is charged beside counts too */
} arena;

/* Count `size` bytes that are taken elsewhere: QMOE_MEMORY if they are beyond the limit. */
qmoe_status qmoe_arena_charge(arena *memory, uint64_t size, qmoe_error *error);

/* `count` zeroed things of `size` bytes; NULL if memory is short (`error` then says so). */
void *qmoe_arena_take(arena *memory, size_t count, size_t size, qmoe_error *error);
void qmoe_arena_free(arena *memory);

/* ---- files ---- */

typedef struct {
    int descriptor;
    uint64_t size;
    const uint8_t *map; /* NULL unless mapped */
} qmoe_file;

/* Open a regular file: QMOE_TRUNCATED if it is missing, QMOE_HEADER if it is something else, else QMOE_SYSTEM. */
qmoe_status qmoe_file_open(const char *path, qmoe_file *file, qmoe_error *error);
/* Read exactly `size` bytes, or QMOE_TRUNCATED. */
qmoe_status qmoe_file_read(const qmoe_file *file, uint64_t offset, void *buffer, size_t size, qmoe_error *error);
/* Map the whole of a file that is not empty; the descriptor is closed, and reads go on from the map. */
qmoe_status qmoe_file_map(qmoe_file *file, qmoe_error *error);
void qmoe_file_close(qmoe_file *file);

/* Whether there is room for a JSON text of `size` bytes while it is read. */
qmoe_status qmoe_text_fits(const arena *memory, uint64_t size, qmoe_error *error);

/* The bytes of a small file (at most 100 MB), which the caller frees and which the arena does not count. */
qmoe_status qmoe_file_text(const char *path, arena *memory, uint8_t **text, size_t *size, qmoe_error *error);

/* "directory/name" in `memory`; NULL if memory is short. */
char *qmoe_join_path(arena *memory, const char *directory, const char *name, qmoe_error *error);

#endif
