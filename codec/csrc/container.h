/* What the JSON files of a packed model say (spec 6.3, 6.4). */
#ifndef QMOE_CONTAINER_H
#define QMOE_CONTAINER_H

#include "safetensors.h"

enum { MAXIMUM_PROJECTIONS = 3, MAXIMUM_EXPERTS = 1 << 24, RECORD_ALIGNMENT = 256 };

/* What `requires` may name: a reader of version 1.1 knows all three. */
enum { FEATURE_FUSED = 1, FEATURE_BIAS = 2, FEATURE_GATING = 4 };

/* How a projection lies in the original checkpoint, beyond qmoe_projection_info. */
typedef struct {
    bool fused, transposed, interleaved;
    const char *bias; /* "" if there is none */
} qmoe_source_layout;

/* An expert layer as config.json has it. */
typedef struct {
    qmoe_source_layout sources[MAXIMUM_PROJECTIONS];
    const char *json; /* its entry in config.json */
    qmoe_name prefix;
    const char *dtype;
    uint32_t experts, projection_count;
    qmoe_projection_info projections[MAXIMUM_PROJECTIONS];
    uint64_t store_bytes, dictionaries_bytes;
    size_t number; /* in config.json */
} qmoe_layer_spec;

typedef struct {
    qmoe_name name;
    uint64_t size;
} qmoe_sized_name;

/* One entry of weight_map. */
typedef struct {
    qmoe_name shard, tensor;
} qmoe_index_entry;

typedef struct {
    qmoe_sized_name *files; /* of the manifest, by name */
    size_t file_count;
    qmoe_layer_spec *layers; /* in natural order: layer 10 after layer 2 */
    size_t layer_count;
    qmoe_sized_name *dense; /* of dense_zstd, in its order */
    size_t dense_count;
    qmoe_index_entry *index; /* by shard, then by tensor */
    size_t index_count;
} qmoe_container;

/* Read manifest.json, compare the sizes of all files, and read config.json and the index. */
qmoe_status qmoe_container_open(const char *directory, qmoe_container *container, arena *memory, qmoe_error *error);

/* Whether a comes before b (below 0) where runs of digits count as numbers. */
int qmoe_natural_compare(qmoe_name a, qmoe_name b);

#endif
