/* The header of a safetensors file: every entry, every extent, to the last byte. */
#include "safetensors.h"

#include <stdlib.h>

enum { HEADER_LIMIT = 100000000, DIMENSION_LIMIT = 64 };

static const struct {
    const char *name;
    uint32_t bits;
} dtypes[] = {
    {"F4", 4},       {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"BOOL", 8},        {"U8", 8},          {"I8", 8},
    {"F8_E5M2", 8},  {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"U16", 16},
    {"I16", 16},     {"F16", 16},    {"BF16", 16},   {"U32", 32},        {"I32", 32},        {"F32", 32},
    {"U64", 64},     {"I64", 64},    {"F64", 64},    {"C64", 64},
};

uint32_t qmoe_dtype_bits(json_value name, const char **known) {
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
        if (qmoe_json_equals(name, dtypes[i].name)) {
            *known = dtypes[i].name;
            return dtypes[i].bits;
        }
    }
    return 0;
}

int qmoe_name_compare(qmoe_name a, qmoe_name b) {
    int order = memcmp(a.bytes, b.bytes, a.size < b.size ? a.size : b.size);
    return order ? order : (a.size > b.size) - (a.size < b.size);
}

qmoe_status qmoe_name_from(arena *memory, json_value string, qmoe_name *name, qmoe_error *error) {
    size_t size = qmoe_json_bytes(string, NULL);
    char *bytes = qmoe_arena_take(memory, size + 1, 1, error);
    if (!bytes) {
        return QMOE_MEMORY;
    }
    qmoe_json_bytes(string, (uint8_t *)bytes);
    *name = (qmoe_name){bytes, size};
    if (memchr(bytes, 0, size)) {
        return qmoe_at_name(error, qmoe_fail(error, QMOE_HEADER, "name", 0, "no zero byte in a name"), bytes, size);
    }
    return QMOE_OK;
}

/* Bytes of a tensor (QMOE_HEADER if it cannot be). */
static qmoe_status tensor_bytes(const uint64_t *shape, uint32_t dimensions, uint32_t bits, uint64_t *size,
                                qmoe_error *error) {
    const uint64_t most = INT64_MAX; /* bytes */
    /* Elements that these are: for 6 bits 4/3 of `most`, rounded down. */
    const uint64_t limit = bits == 4 ? 2 * most : bits == 6 ? most / 3 * 4 + most % 3 * 4 / 3 : most / (bits / 8);
    uint64_t elements = 1;
    for (uint32_t i = 0; i < dimensions; i++) {
        if (shape[i] == 0) {
            *size = 0;
            return QMOE_OK;
        }
    }
    for (uint32_t i = 0; i < dimensions; i++) {
        if (elements > limit / shape[i]) {
            return qmoe_fail(error, QMOE_HEADER, "shape", (int64_t)shape[i], "less than 2^63 bytes");
        }
        elements *= shape[i];
    }
    if (bits == 4 ? elements % 2 : bits == 6 ? elements % 4 : 0) {
        return qmoe_fail(error, QMOE_HEADER, "shape", (int64_t)elements, "a whole number of bytes");
    }
    *size = bits == 4 ? elements / 2 : bits == 6 ? elements / 4 * 3 : elements * (bits / 8);
    return QMOE_OK;
}

static qmoe_status read_shape(arena *memory, json_value list, qmoe_tensor *tensor, qmoe_error *error) {
    size_t dimensions = qmoe_json_count(list);
    if (dimensions > DIMENSION_LIMIT) {
        return qmoe_fail(error, QMOE_HEADER, "shape", (int64_t)dimensions, "at most 64 dimensions");
    }
    uint64_t *shape = qmoe_arena_take(memory, dimensions, sizeof *shape, error);
    if (!shape) {
        return QMOE_MEMORY;
    }
    json_value side;
    for (size_t i = 0; qmoe_json_element(&list, &side); i++) {
        int64_t integer;
        if (!qmoe_json_integer(side, &integer) || integer < 0) {
            return qmoe_fail(error, QMOE_HEADER, "shape", (int64_t)i, "integers of 0 to 2^63 - 1");
        }
        shape[i] = (uint64_t)integer;
    }
    tensor->shape = shape;
    tensor->dimensions = (uint32_t)dimensions;
    return QMOE_OK;
}

/* One entry of the header; its extent is not yet compared with the others'. */
static qmoe_status read_tensor(arena *memory, json_value entry, uint64_t data_start, qmoe_tensor *tensor,
                               qmoe_error *error) {
    json_value dtype, shape, offsets;
    if (!json_is_object(entry) || qmoe_json_count(entry) != 3 || !qmoe_json_get(entry, "dtype", &dtype) ||
        !qmoe_json_get(entry, "shape", &shape) || !qmoe_json_get(entry, "data_offsets", &offsets)) {
        return qmoe_fail(error, QMOE_HEADER, "entry", 0, "dtype, shape and data_offsets alone");
    }
    if (!json_is_array(shape)) {
        return qmoe_fail(error, QMOE_HEADER, "shape", 0, "a list");
    }
    uint32_t bits = qmoe_dtype_bits(dtype, &tensor->dtype);
    if (!bits) {
        return qmoe_fail(error, QMOE_HEADER, "dtype", 0, "a dtype of safetensors");
    }
    uint64_t size = 0;
    qmoe_status status = read_shape(memory, shape, tensor, error);
    if (status == QMOE_OK) {
        status = tensor_bytes(tensor->shape, tensor->dimensions, bits, &size, error);
    }
    if (status != QMOE_OK) {
        return status;
    }
    json_value begin, end;
    int64_t first, last;
    if (!json_is_array(offsets) || qmoe_json_count(offsets) != 2 || !qmoe_json_element(&offsets, &begin) ||
        !qmoe_json_element(&offsets, &end) || !qmoe_json_integer(begin, &first) || !qmoe_json_integer(end, &last) ||
        first < 0 || first > last) {
        return qmoe_fail(error, QMOE_HEADER, "data_offsets", 0, "two integers, 0 <= begin <= end");
    }
    if ((uint64_t)(last - first) != size) {
        return qmoe_fail(error, QMOE_SIZE, "data_offsets", last - first, "what dtype and shape give");
    }
    tensor->start = data_start + (uint64_t)first;
    tensor->end = data_start + (uint64_t)last;
    return QMOE_OK;
}

static int compare_extents(const void *a, const void *b) {
    const qmoe_tensor *one = a, *two = b;
    if (one->start != two->start) {
        return one->start < two->start ? -1 : 1;
    }
    return (one->end > two->end) - (one->end < two->end);
}

static int compare_names(const void *a, const void *b) {
    return qmoe_name_compare(((const qmoe_tensor *)a)->name, ((const qmoe_tensor *)b)->name);
}

const qmoe_tensor *qmoe_find_tensor(const qmoe_tensor *tensors, size_t count, qmoe_name name) {
    const qmoe_tensor wanted = {.name = name};
    return count ? bsearch(&wanted, tensors, count, sizeof *tensors, compare_names) : NULL;
}

/* Without overlap, hole or rest, from the header's end to the file's. */
static qmoe_status check_extents(qmoe_shard *shard, uint64_t data_start, qmoe_error *error) {
    uint64_t position = data_start;
    size_t count = shard->tensor_count;
    if (count) {
        qsort(shard->tensors, count, sizeof *shard->tensors, compare_extents);
    }
    for (size_t i = 0; i < count; i++) {
        const qmoe_tensor *tensor = shard->tensors + i;
        if (tensor->start != position) {
            qmoe_fail(error, QMOE_SIZE, "data_offsets", (int64_t)(tensor->start - data_start),
                      tensor->start < position ? "no overlap with the tensor before" : "no hole before the tensor");
            return qmoe_at_name(error, QMOE_SIZE, tensor->name.bytes, tensor->name.size);
        }
        position = tensor->end;
    }
    if (position > shard->file.size) {
        return qmoe_fail(error, QMOE_TRUNCATED, "file", (int64_t)shard->file.size, "all that the header names");
    }
    if (position < shard->file.size) {
        return qmoe_fail(error, QMOE_SIZE, "file", (int64_t)shard->file.size, "no bytes after the last tensor");
    }
    if (count) {
        qsort(shard->tensors, count, sizeof *shard->tensors, compare_names);
    }
    return QMOE_OK;
}

static qmoe_status check_metadata(json_value metadata, qmoe_error *error) {
    json_value key, value;
    bool legal = json_is_object(metadata);
    while (legal && qmoe_json_member(&metadata, &key, &value)) {
        legal = json_is_string(value);
    }
    return legal ? QMOE_OK : qmoe_fail(error, QMOE_HEADER, "__metadata__", 0, "an object of strings");
}

static qmoe_status read_header(qmoe_shard *shard, const uint8_t *text, size_t size, arena *memory,
                               qmoe_error *error) {
    if (size == 0 || *text != '{') {
        return qmoe_fail(error, QMOE_HEADER, "header", size ? *text : -1, "a brace first");
    }
    json_value header, metadata, key, entry;
    qmoe_status status = qmoe_json_check(text, size, &header, error);
    if (status != QMOE_OK) {
        return status;
    }
    bool described = qmoe_json_get(header, "__metadata__", &metadata);
    if (described && (status = check_metadata(metadata, error)) != QMOE_OK) {
        return status;
    }
    size_t count = qmoe_json_count(header) - described;
    shard->tensors = qmoe_arena_take(memory, count, sizeof *shard->tensors, error);
    if (!shard->tensors) {
        return QMOE_MEMORY;
    }
    while (qmoe_json_member(&header, &key, &entry)) {
        qmoe_tensor *tensor = shard->tensors + shard->tensor_count;
        if (qmoe_json_equals(key, "__metadata__")) {
            continue;
        }
        if ((status = qmoe_name_from(memory, key, &tensor->name, error)) != QMOE_OK) {
            return status;
        }
        if ((status = read_tensor(memory, entry, 8 + size, tensor, error)) != QMOE_OK) {
            return qmoe_at_name(error, status, tensor->name.bytes, tensor->name.size);
        }
        shard->tensor_count++;
    }
    return check_extents(shard, 8 + size, error);
}

static qmoe_status read_shard(qmoe_shard *shard, arena *memory, qmoe_error *error) {
    uint8_t length[8];
    if (shard->file.size < sizeof length) {
        return qmoe_fail(error, QMOE_TRUNCATED, "file", (int64_t)shard->file.size, "at least 8 bytes");
    }
    qmoe_status status = qmoe_file_read(&shard->file, 0, length, sizeof length, error);
    if (status != QMOE_OK) {
        return status;
    }
    uint64_t size = load64(length);
    if (size > HEADER_LIMIT) {
        return qmoe_fail(error, QMOE_HEADER, "header size", size > INT64_MAX ? INT64_MAX : (int64_t)size,
                         "at most 100000000");
    }
    if (8 + size > shard->file.size) {
        return qmoe_fail(error, QMOE_TRUNCATED, "file", (int64_t)shard->file.size, "the whole header");
    }
    if ((status = qmoe_text_fits(memory, size, error)) != QMOE_OK) {
        return status;
    }
    /* Read, not mapped: what has been checked must not change any more. */
    uint8_t *text = malloc((size_t)size + 1);
    if (!text) {
        return qmoe_fail(error, QMOE_MEMORY, "header size", (int64_t)size, "enough memory");
    }
    status = qmoe_file_read(&shard->file, 8, text, (size_t)size, error);
    if (status == QMOE_OK) {
        status = read_header(shard, text, (size_t)size, memory, error);
    }
    free(text);
    return status;
}

qmoe_status qmoe_shard_open(qmoe_shard *shard, const char *path, arena *memory, qmoe_error *error) {
    const char *slash = strrchr(path, '/');
    const char *name = slash ? slash + 1 : path;
    *shard = (qmoe_shard){.file = {.descriptor = -1}, .name = {name, strlen(name)}, .path = path};
    qmoe_status status = qmoe_file_open(path, &shard->file, error); /* a failure names the path */
    if (status == QMOE_OK && (status = read_shard(shard, memory, error)) != QMOE_OK) {
        qmoe_at(error, status, path);
    }
    return status;
}
