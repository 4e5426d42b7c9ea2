/* Safetensors files: a strict reader (spec 6.1). */
#ifndef QMOE_SAFETENSORS_H
#define QMOE_SAFETENSORS_H

#include "file.h"
#include "json.h"

/* A name of any bytes but zero, with a zero behind it. */
typedef struct {
    const char *bytes;
    size_t size;
} qmoe_name;

typedef struct {
    qmoe_name name;
    const char *dtype;
    const uint64_t *shape;
    uint64_t start, end; /* in the file */
    uint32_t dimensions, shard;
} qmoe_tensor;

typedef struct {
    qmoe_file file;
    qmoe_name name; /* of the file, without its directory */
    const char *path;
    qmoe_tensor *tensors; /* by name */
    size_t tensor_count;
} qmoe_shard;

/* Bits of an element of a dtype by its name in safetensors, of which `known` is the one that stays; or 0. */
uint32_t qmoe_dtype_bits(json_value name, const char **known);

int qmoe_name_compare(qmoe_name a, qmoe_name b);
/* A string of JSON in `memory`: QMOE_HEADER if there is a zero byte in it, which C cannot hold. */
qmoe_status qmoe_name_from(arena *memory, json_value string, qmoe_name *name, qmoe_error *error);

/* The tensor of a name, in order of names, or NULL. */
const qmoe_tensor *qmoe_find_tensor(const qmoe_tensor *tensors, size_t count, qmoe_name name);

/* Open the file at `path`, and check its header in full. `path` must stay. Close the file even after a failure. */
qmoe_status qmoe_shard_open(qmoe_shard *shard, const char *path, arena *memory, qmoe_error *error);

#endif
