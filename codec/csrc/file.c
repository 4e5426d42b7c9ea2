/* Files, an arena, and the place in messages. */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TEXT_LIMIT = 100000000, BLOCK_BYTES = 1 << 14, READ_BYTES = 1 << 30 };

/* ---- messages ---- */

qmoe_status qmoe_at_name(qmoe_error *error, qmoe_status status, const char *name, size_t size) {
    if (error) {
        char *place = error->place;
        const size_t room = sizeof error->place - 1;
        size_t old = strlen(place), gap = old ? 2 : 0;
        if (old + gap >= room) { /* what is there is closer to the fault */
            return status;
        }
        size_t fits = room - old - gap, from = 0;
        if (size > fits) { /* the end of a path says more than its beginning */
            from = size - fits;
            while (from < size && (name[from] & 0xC0) == 0x80) {
                from++;
            }
        }
        size_t kept = size - from;
        memmove(place + kept + gap, place, old + 1);
        memcpy(place + kept, ": ", gap);
        for (size_t i = 0; i < kept; i++) { /* one line, and a C string */
            unsigned char byte = (unsigned char)name[from + i];
            place[i] = byte < 0x20 || byte == 0x7F ? '?' : (char)byte;
        }
    }
    return status;
}

qmoe_status qmoe_at(qmoe_error *error, qmoe_status status, const char *place) {
    return qmoe_at_name(error, status, place, strlen(place));
}

/* What the system says; `errno` is the value. */
static qmoe_status fail_by_system(qmoe_error *error, const char *call) {
    int code = errno;
    char reason[64] = "";
    if (strerror_r(code, reason, sizeof reason) != 0 || !reason[0]) {
        snprintf(reason, sizeof reason, "no error of the system");
    }
    return qmoe_fail(error, QMOE_SYSTEM, call, code, reason);
}

/* ---- memory ---- */

struct arena_block {
    arena_block *next;
    size_t size;
    max_align_t bytes[];
};

qmoe_status qmoe_arena_charge(arena *memory, uint64_t size, qmoe_error *error) {
    if (size > memory->limit - memory->used) {
        return qmoe_fail(error, QMOE_MEMORY, "memory_limit", (int64_t)memory->limit, "a higher limit");
    }
    memory->used += size;
    return QMOE_OK;
}

void *qmoe_arena_take(arena *memory, size_t count, size_t size, qmoe_error *error) {
    const size_t limit = SIZE_MAX / 4;
    if (size && count > limit / size) {
        qmoe_fail(error, QMOE_MEMORY, "memory", INT64_MAX, "enough memory");
        return NULL;
    }
    size_t bytes = count * size;
    size_t wanted = (size_t)round_up(bytes ? bytes : 1, sizeof(max_align_t));
    if (wanted > memory->left) {
        size_t room = wanted > BLOCK_BYTES ? wanted : BLOCK_BYTES;
        if (qmoe_arena_charge(memory, sizeof(arena_block) + room, error) != QMOE_OK) {
            return NULL;
        }
        arena_block *block = calloc(1, sizeof *block + room);
        if (!block) {
            qmoe_fail(error, QMOE_MEMORY, "memory", (int64_t)room, "enough memory");
            return NULL;
        }
        block->size = room;
        block->next = memory->blocks;
        memory->blocks = block;
        memory->left = room;
    }
    arena_block *block = memory->blocks;
    uint8_t *result = (uint8_t *)block->bytes + (block->size - memory->left);
    memory->left -= wanted;
    return result;
}

void qmoe_arena_free(arena *memory) {
    while (memory->blocks) {
        arena_block *block = memory->blocks;
        memory->blocks = block->next;
        free(block);
    }
    memory->left = 0;
}

char *qmoe_join_path(arena *memory, const char *directory, const char *name, qmoe_error *error) {
    size_t before = strlen(directory), after = strlen(name);
    bool slash = before && directory[before - 1] != '/';
    char *path = qmoe_arena_take(memory, before + slash + after + 1, 1, error);
    if (path) {
        memcpy(path, directory, before);
        path[before] = '/';
        memcpy(path + before + slash, name, after + 1);
    }
    return path;
}

/* ---- files ---- */

qmoe_status qmoe_file_open(const char *path, qmoe_file *file, qmoe_error *error) {
    /* Without O_NONBLOCK, opening a pipe would wait for a writer. */
    *file = (qmoe_file){.descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
    if (file->descriptor < 0) {
        qmoe_status status = errno == ENOENT ? qmoe_fail(error, QMOE_TRUNCATED, "file", 0, "a regular file")
                                             : fail_by_system(error, "open");
        return qmoe_at(error, status, path);
    }
    struct stat about;
    qmoe_status status = QMOE_OK;
    if (fstat(file->descriptor, &about) != 0) {
        status = fail_by_system(error, "fstat");
    } else if (!S_ISREG(about.st_mode)) {
        status = qmoe_fail(error, QMOE_HEADER, "file", (int64_t)about.st_mode, "a regular file");
    } else {
        file->size = (uint64_t)about.st_size;
    }
    if (status != QMOE_OK) {
        qmoe_file_close(file);
        return qmoe_at(error, status, path);
    }
    return QMOE_OK;
}

qmoe_status qmoe_file_read(const qmoe_file *file, uint64_t offset, void *buffer, size_t size, qmoe_error *error) {
    if (offset > file->size || size > file->size - offset) {
        return qmoe_fail(error, QMOE_TRUNCATED, "file", (int64_t)file->size, "a longer file");
    }
    if (file->map) {
        memcpy(buffer, file->map + offset, size);
        return QMOE_OK;
    }
    uint8_t *bytes = buffer;
    while (size) {
        ssize_t got = pread(file->descriptor, bytes, size < READ_BYTES ? size : READ_BYTES, (off_t)offset);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return fail_by_system(error, "pread");
        }
        if (got == 0) {
            return qmoe_fail(error, QMOE_TRUNCATED, "file", (int64_t)offset, "no shorter file than it was");
        }
        bytes += got;
        offset += (uint64_t)got;
        size -= (size_t)got;
    }
    return QMOE_OK;
}

qmoe_status qmoe_file_map(qmoe_file *file, qmoe_error *error) {
    if (file->size > SIZE_MAX / 2) {
        return qmoe_fail(error, QMOE_MEMORY, "file", (int64_t)file->size, "a file that can be mapped");
    }
    void *map = mmap(NULL, (size_t)file->size, PROT_READ, MAP_SHARED, file->descriptor, 0);
    if (map == MAP_FAILED) {
        return fail_by_system(error, "mmap");
    }
    file->map = map;
    close(file->descriptor);
    file->descriptor = -1;
    return QMOE_OK;
}

void qmoe_file_close(qmoe_file *file) {
    if (file->map) {
        /* munmap takes no const; the pages are read-only all the same */
        munmap((void *)(uintptr_t)file->map, (size_t)file->size);
    }
    if (file->descriptor >= 0) {
        close(file->descriptor);
    }
    *file = (qmoe_file){.descriptor = -1};
}

qmoe_status qmoe_text_fits(const arena *memory, uint64_t size, qmoe_error *error) {
    arena copy = *memory; /* the text, and at most as much for the keys in it */
    return qmoe_arena_charge(&copy, 2 * size, error);
}

qmoe_status qmoe_file_text(const char *path, arena *memory, uint8_t **text, size_t *size, qmoe_error *error) {
    qmoe_file file;
    *text = NULL;
    qmoe_status status = qmoe_file_open(path, &file, error);
    if (status != QMOE_OK) {
        return status;
    }
    if (file.size > TEXT_LIMIT) {
        status = qmoe_fail(error, QMOE_SIZE, "file", (int64_t)file.size, "at most 100000000 bytes of JSON");
    } else if ((status = qmoe_text_fits(memory, file.size, error)) != QMOE_OK) {
        *text = NULL;
    } else if (!(*text = malloc((size_t)file.size + 1))) {
        status = qmoe_fail(error, QMOE_MEMORY, "file", (int64_t)file.size, "enough memory");
    } else {
        *size = (size_t)file.size;
        status = qmoe_file_read(&file, 0, *text, *size, error);
    }
    qmoe_file_close(&file);
    if (status != QMOE_OK) {
        free(*text);
        *text = NULL;
        return qmoe_at(error, status, path);
    }
    return QMOE_OK;
}
