/* manifest.json, config.json and model.safetensors.index.json: strict in all that is used, deaf to the rest. */
#include "container.h"

#include <stdlib.h>

static const char manifest_name[] = "manifest.json", config_name[] = "config.json",
                  index_name[] = "model.safetensors.index.json";

/* ---- values ---- */

static qmoe_status get_object(json_value object, const char *key, json_value *value, qmoe_error *error) {
    if (!qmoe_json_get(object, key, value) || !json_is_object(*value)) {
        return qmoe_fail(error, QMOE_HEADER, key, 0, "an object");
    }
    return QMOE_OK;
}

static qmoe_status get_string(arena *memory, json_value object, const char *key, qmoe_name *name, qmoe_error *error) {
    json_value value;
    if (!qmoe_json_get(object, key, &value) || !json_is_string(value)) {
        return qmoe_fail(error, QMOE_HEADER, key, 0, "a string");
    }
    return qmoe_name_from(memory, value, name, error);
}

static qmoe_status get_integer(json_value object, const char *key, int64_t least, int64_t most, int64_t *integer,
                               const char *expected, qmoe_error *error) {
    json_value value;
    if (!qmoe_json_get(object, key, &value) || !qmoe_json_integer(value, integer)) {
        return qmoe_fail(error, QMOE_HEADER, key, 0, expected);
    }
    if (*integer < least || *integer > most) {
        return qmoe_fail(error, QMOE_HEADER, key, *integer, expected);
    }
    return QMOE_OK;
}

static qmoe_status get_size(json_value object, const char *key, uint64_t *size, qmoe_error *error) {
    int64_t integer = 0;
    qmoe_status status = get_integer(object, key, 0, INT64_MAX, &integer, "a number of bytes", error);
    *size = (uint64_t)integer;
    return status;
}

/* "major.minor": any minor version of major 1. */
static qmoe_status check_version(json_value object, qmoe_error *error) {
    static const char expected[] = "major.minor";
    json_value value;
    if (!qmoe_json_get(object, "version", &value) || !json_is_string(value)) {
        return qmoe_fail(error, QMOE_HEADER, "version", 0, expected);
    }
    uint8_t text[24] = {0};
    if (value.end - value.start > 6 * 19 + 2 || qmoe_json_bytes(value, NULL) > 19) { /* before any byte is written */
        return qmoe_fail(error, QMOE_HEADER, "version", 0, expected);
    }
    size_t size = qmoe_json_bytes(value, text), at = 0;
    int64_t major = 0;
    for (unsigned part = 0; part < 2; part++) {
        size_t first = at;
        for (; at < size && text[at] >= '0' && text[at] <= '9' && at - first < 9; at++) {
            major = part ? major : 10 * major + (text[at] - '0');
        }
        if (at == first || (part == 0 ? text[at++] != '.' : at != size)) {
            return qmoe_fail(error, QMOE_HEADER, "version", 0, expected);
        }
    }
    return major == 1 ? QMOE_OK : qmoe_fail(error, QMOE_VERSION, "version", major, "1.x");
}

/* The name of a file within a directory: nothing that leads out of it, nothing that cannot be printed. */
static bool is_plain_name(qmoe_name name) {
    if (name.size == 0 || strcmp(name.bytes, ".") == 0 || strcmp(name.bytes, "..") == 0) {
        return false;
    }
    for (size_t i = 0; i < name.size; i++) {
        uint8_t byte = (uint8_t)name.bytes[i], next = (uint8_t)name.bytes[i + 1];
        if (byte < 0x20 || byte == 0x7F || byte == '/' || byte == '\\' || (byte == 0xED && next >= 0xA0)) {
            return false; /* the last: half a surrogate pair */
        }
    }
    return true;
}

static qmoe_status read_object(const char *path, arena *memory, uint8_t **text, json_value *object, qmoe_error *error) {
    size_t size;
    qmoe_status status = qmoe_file_text(path, memory, text, &size, error);
    if (status != QMOE_OK) {
        return status;
    }
    status = qmoe_json_check(*text, size, object, error);
    if (status == QMOE_OK && !json_is_object(*object)) {
        status = qmoe_fail(error, QMOE_HEADER, "file", 0, "a JSON object");
    }
    if (status != QMOE_OK) {
        free(*text);
        *text = NULL;
        qmoe_at(error, status, path);
    }
    return status;
}

/* ---- names in order ---- */

static int compare_sized(const void *a, const void *b) {
    return qmoe_name_compare(((const qmoe_sized_name *)a)->name, ((const qmoe_sized_name *)b)->name);
}

static bool is_named(const qmoe_sized_name *names, size_t count, qmoe_name name) {
    const qmoe_sized_name wanted = {.name = name};
    return count && bsearch(&wanted, names, count, sizeof *names, compare_sized);
}

/* The run of digits, or of other bytes, at the beginning. */
static qmoe_name take_run(qmoe_name *rest, bool digits) {
    qmoe_name run = {rest->bytes, 0};
    while (run.size < rest->size && (run.bytes[run.size] >= '0' && run.bytes[run.size] <= '9') == digits) {
        run.size++;
    }
    rest->bytes += run.size;
    rest->size -= run.size;
    return run;
}

static uint64_t number_of(qmoe_name digits) {
    uint64_t number = 0;
    for (size_t i = 0; i < digits.size; i++) {
        number = 10 * number + (uint64_t)(digits.bytes[i] - '0');
    }
    return number;
}

int qmoe_natural_compare(qmoe_name a, qmoe_name b) {
    for (bool digits = false; a.size || b.size; digits = !digits) {
        qmoe_name run_a = take_run(&a, digits), run_b = take_run(&b, digits);
        bool number_a = run_a.size && run_a.size < 20 && digits, number_b = run_b.size && run_b.size < 20 && digits;
        if (number_a != number_b) { /* 20 digits are no number of anything */
            return number_a ? 1 : -1;
        }
        uint64_t one = number_a ? number_of(run_a) : 0, two = number_b ? number_of(run_b) : 0;
        int order = number_a ? (one > two) - (one < two) : qmoe_name_compare(run_a, run_b);
        if (order) {
            return order;
        }
    }
    return 0;
}

static int compare_layers(const void *a, const void *b) {
    const qmoe_layer_spec *one = a, *two = b;
    int order = qmoe_natural_compare(one->prefix, two->prefix);
    return order ? order : (one->number > two->number) - (one->number < two->number);
}

static int compare_entries(const void *a, const void *b) {
    const qmoe_index_entry *one = a, *two = b;
    int order = qmoe_name_compare(one->shard, two->shard);
    return order ? order : qmoe_name_compare(one->tensor, two->tensor);
}

/* ---- manifest.json ---- */

static qmoe_status read_manifest_file(arena *memory, json_value key, json_value entry, qmoe_sized_name *file,
                                      qmoe_error *error) {
    qmoe_status status = qmoe_name_from(memory, key, &file->name, error);
    if (status != QMOE_OK) {
        return status;
    }
    if (!is_plain_name(file->name) || strcmp(file->name.bytes, manifest_name) == 0) {
        qmoe_fail(error, QMOE_HEADER, "files", 0, "plain file names");
    } else if (!json_is_object(entry)) {
        qmoe_fail(error, QMOE_HEADER, "files", 0, "an object");
    } else {
        json_value digest;
        uint8_t text[64];
        bool legal = qmoe_json_get(entry, "sha256", &digest) && json_is_string(digest) &&
                     qmoe_json_bytes(digest, NULL) == sizeof text;
        if (legal) {
            qmoe_json_bytes(digest, text);
        }
        for (size_t i = 0; legal && i < sizeof text; i++) {
            legal = (text[i] >= '0' && text[i] <= '9') || (text[i] >= 'a' && text[i] <= 'f');
        }
        if (!legal) {
            qmoe_fail(error, QMOE_HEADER, "sha256", 0, "64 hexadecimal digits");
        } else if (get_size(entry, "bytes", &file->size, error) == QMOE_OK) {
            return QMOE_OK;
        }
    }
    return qmoe_at_name(error, QMOE_HEADER, file->name.bytes, file->name.size);
}

static qmoe_status parse_manifest(json_value manifest, qmoe_container *container, arena *memory, qmoe_error *error) {
    json_value format, files, key, entry;
    if (!qmoe_json_get(manifest, "format", &format) || !qmoe_json_equals(format, "qmoe")) {
        return qmoe_fail(error, QMOE_HEADER, "format", 0, "\"qmoe\"");
    }
    qmoe_status status = check_version(manifest, error);
    if (status != QMOE_OK || (status = get_object(manifest, "files", &files, error)) != QMOE_OK) {
        return status;
    }
    container->files = qmoe_arena_take(memory, qmoe_json_count(files), sizeof *container->files, error);
    if (!container->files) {
        return QMOE_MEMORY;
    }
    while (qmoe_json_member(&files, &key, &entry)) {
        qmoe_sized_name *file = container->files + container->file_count++;
        if ((status = read_manifest_file(memory, key, entry, file, error)) != QMOE_OK) {
            return status;
        }
    }
    qsort(container->files, container->file_count, sizeof *container->files, compare_sized);
    const qmoe_name needed[] = {{config_name, sizeof config_name - 1}, {index_name, sizeof index_name - 1}};
    for (unsigned i = 0; i < 2; i++) {
        if (!is_named(container->files, container->file_count, needed[i])) {
            return qmoe_at(error, qmoe_fail(error, QMOE_HEADER, "files", 0, "to be named"), needed[i].bytes);
        }
    }
    return QMOE_OK;
}

/* Every file that the manifest names is there, with its size. */
static qmoe_status check_files(const char *directory, const qmoe_container *container, arena *memory,
                               qmoe_error *error) {
    for (size_t i = 0; i < container->file_count; i++) {
        const qmoe_sized_name *named = container->files + i;
        char *path = qmoe_join_path(memory, directory, named->name.bytes, error);
        if (!path) {
            return QMOE_MEMORY;
        }
        qmoe_file file;
        qmoe_status status = qmoe_file_open(path, &file, error);
        if (status != QMOE_OK) {
            return status;
        }
        uint64_t size = file.size;
        qmoe_file_close(&file);
        if (size != named->size) {
            status = size < named->size ? QMOE_TRUNCATED : QMOE_SIZE;
            qmoe_fail(error, status, "file", (int64_t)size, "the size in manifest.json");
            return qmoe_at(error, status, path);
        }
    }
    return QMOE_OK;
}

/* ---- config.json ---- */

static bool equal_text(const char *a, const char *b) { return strcmp(a, b) == 0; }

/* A flag of a projection; false if it is not there, or means nothing in this container. */
static qmoe_status get_flag(json_value entry, const char *key, bool known, bool *flag, qmoe_error *error) {
    json_value value;
    *flag = false;
    if (!known || !qmoe_json_get(entry, key, &value)) {
        return QMOE_OK;
    }
    *flag = *value.start == 't';
    return *flag || *value.start == 'f' ? QMOE_OK : qmoe_fail(error, QMOE_HEADER, key, 0, "true or false");
}

static bool is_null(json_value value) { return *value.start == 'n'; }

/* What version 1.1 may say of a projection (spec 6.3). */
static qmoe_status read_source(arena *memory, json_value entry, unsigned features, const char *tensor,
                               qmoe_source_layout *source, qmoe_error *error) {
    const char *place = strstr(tensor, "{expert}");
    bool may_fuse = features & FEATURE_FUSED;
    json_value value;
    *source = (qmoe_source_layout){.fused = !place, .bias = ""};
    if (!*tensor || (place ? strstr(place + 1, "{expert}") != NULL : !may_fuse)) {
        return qmoe_fail(error, QMOE_HEADER, "tensor", 0, "a name with {expert} in it once");
    }
    qmoe_status status;
    if ((status = get_flag(entry, "transposed", may_fuse, &source->transposed, error)) != QMOE_OK ||
        (status = get_flag(entry, "interleaved", may_fuse, &source->interleaved, error)) != QMOE_OK) {
        return status;
    }
    if (place && (source->transposed || source->interleaved)) {
        return qmoe_fail(error, QMOE_HEADER, "transposed", 0, "false, for a tensor of one expert");
    }
    if (!(features & FEATURE_BIAS) || !qmoe_json_get(entry, "bias", &value) || is_null(value)) {
        return QMOE_OK;
    }
    qmoe_name bias;
    if ((status = get_string(memory, entry, "bias", &bias, error)) != QMOE_OK) {
        return status;
    }
    const char *number = strstr(bias.bytes, "{expert}");
    if (!bias.size || !number != !place || (number && strstr(number + 1, "{expert}"))) {
        return qmoe_fail(error, QMOE_HEADER, "bias", 0, "a name with {expert} in it as often as in the tensor's");
    }
    source->bias = bias.bytes;
    return QMOE_OK;
}

/* Whether two projections do without each other's tensors, or share a fused one that holds both. */
static bool get_along(const qmoe_projection_info *a, const qmoe_source_layout *in_a, const qmoe_projection_info *b,
                      const qmoe_source_layout *in_b) {
    bool same_bias = equal_text(in_a->bias, in_b->bias);
    if (!equal_text(a->tensor, b->tensor)) {
        return !same_bias || !*in_a->bias;
    }
    return in_a->fused && same_bias && a->columns == b->columns && in_a->transposed == in_b->transposed &&
           in_a->interleaved == in_b->interleaved && (!in_a->interleaved || a->rows == b->rows);
}

static qmoe_status read_projection(arena *memory, json_value entry, unsigned features,
                                   qmoe_projection_info *projection, qmoe_source_layout *source, qmoe_error *error) {
    enum { SIDE = MAXIMUM_SIDE };
    qmoe_name name, role, tensor;
    int64_t rows = 0, columns = 0;
    if (!json_is_object(entry)) {
        return qmoe_fail(error, QMOE_HEADER, "projections", 0, "objects");
    }
    qmoe_status status;
    if ((status = get_string(memory, entry, "name", &name, error)) != QMOE_OK ||
        (status = get_string(memory, entry, "role", &role, error)) != QMOE_OK ||
        (status = get_string(memory, entry, "tensor", &tensor, error)) != QMOE_OK ||
        (status = get_integer(entry, "rows", 0, SIDE, &rows, "0 to 2^24", error)) != QMOE_OK ||
        (status = get_integer(entry, "columns", 0, SIDE, &columns, "0 to 2^24", error)) != QMOE_OK) {
        return status;
    }
    if (name.size == 0) {
        return qmoe_fail(error, QMOE_HEADER, "name", 0, "a name");
    }
    if (!equal_text(role.bytes, "gate") && !equal_text(role.bytes, "up") && !equal_text(role.bytes, "down")) {
        return qmoe_fail(error, QMOE_HEADER, "role", 0, "gate, up or down");
    }
    if ((status = read_source(memory, entry, features, tensor.bytes, source, error)) != QMOE_OK) {
        return status;
    }
    if ((uint64_t)rows * (uint64_t)columns > MAXIMUM_WEIGHTS) {
        return qmoe_fail(error, QMOE_HEADER, "columns", columns, "at most 2^36 weights");
    }
    *projection = (qmoe_projection_info){name.bytes, role.bytes, tensor.bytes, (uint32_t)rows, (uint32_t)columns};
    return QMOE_OK;
}

static qmoe_status read_projections(arena *memory, json_value entry, unsigned features, qmoe_layer_spec *layer,
                                    qmoe_error *error) {
    json_value list, item;
    if (!qmoe_json_get(entry, "projections", &list) || !json_is_array(list)) {
        return qmoe_fail(error, QMOE_HEADER, "projections", 0, "a list");
    }
    size_t count = qmoe_json_count(list);
    if (count < 1 || count > MAXIMUM_PROJECTIONS) { /* there are three roles, and each comes once at most */
        return qmoe_fail(error, QMOE_HEADER, "projections", (int64_t)count, "1 to 3 projections");
    }
    while (qmoe_json_element(&list, &item)) {
        qmoe_projection_info *all = layer->projections, *own = all + layer->projection_count;
        qmoe_source_layout *source = layer->sources + layer->projection_count;
        qmoe_status status = read_projection(memory, item, features, own, source, error);
        if (status != QMOE_OK) {
            return status;
        }
        for (const qmoe_projection_info *other = all; other < own; other++) {
            if (equal_text(other->name, own->name) || equal_text(other->role, own->role) ||
                !get_along(other, layer->sources + (other - all), own, source)) {
                return qmoe_fail(error, QMOE_HEADER, "projections", (int64_t)layer->projection_count,
                                 "distinct names, roles and tensors");
            }
        }
        layer->projection_count++;
    }
    return QMOE_OK;
}

static qmoe_status read_layer(arena *memory, json_value entry, unsigned features, qmoe_layer_spec *layer,
                              qmoe_error *error) {
    json_value dtype;
    int64_t experts = 0;
    if (!json_is_object(entry)) {
        return qmoe_fail(error, QMOE_HEADER, "layers", 0, "an object");
    }
    if (layer->prefix.size == 0) {
        return qmoe_fail(error, QMOE_HEADER, "prefix", 0, "the name of a layer's experts");
    }
    qmoe_status status = read_projections(memory, entry, features, layer, error);
    if (status != QMOE_OK || (status = get_integer(entry, "experts", 1, MAXIMUM_EXPERTS, &experts, "1 to 2^24",
                                                   error)) != QMOE_OK) {
        return status;
    }
    layer->experts = (uint32_t)experts;
    size_t length = (size_t)(entry.end - entry.start);
    char *text = qmoe_arena_take(memory, length + 1, 1, error);
    if (!text) {
        return QMOE_MEMORY;
    }
    memcpy(text, entry.start, length);
    text[length] = 0;
    layer->json = text;
    if (!qmoe_json_get(entry, "dtype", &dtype) || !qmoe_dtype_bits(dtype, &layer->dtype)) {
        return qmoe_fail(error, QMOE_HEADER, "dtype", 0, "a dtype of safetensors");
    }
    if ((status = get_size(entry, "store_bytes", &layer->store_bytes, error)) != QMOE_OK) {
        return status;
    }
    return get_size(entry, "dictionaries_bytes", &layer->dictionaries_bytes, error);
}

static qmoe_status read_layers(json_value layers, unsigned features, qmoe_container *container, arena *memory,
                               qmoe_error *error) {
    json_value key, entry;
    container->layers = qmoe_arena_take(memory, qmoe_json_count(layers), sizeof *container->layers, error);
    if (!container->layers) {
        return QMOE_MEMORY;
    }
    while (qmoe_json_member(&layers, &key, &entry)) {
        qmoe_layer_spec *layer = container->layers + container->layer_count;
        qmoe_status status = qmoe_name_from(memory, key, &layer->prefix, error);
        if (status == QMOE_OK && (status = read_layer(memory, entry, features, layer, error)) != QMOE_OK) {
            qmoe_at_name(error, status, layer->prefix.bytes, layer->prefix.size);
        }
        if (status != QMOE_OK) {
            return status;
        }
        layer->number = container->layer_count++;
    }
    qsort(container->layers, container->layer_count, sizeof *container->layers, compare_layers);
    return QMOE_OK;
}

/* What a reader must know beyond version 1.0 (spec 1.2). */
static qmoe_status check_requires(json_value quantization, unsigned *features, qmoe_error *error) {
    json_value requires, name;
    if (!qmoe_json_get(quantization, "requires", &requires)) {
        return QMOE_OK;
    }
    if (!json_is_array(requires)) {
        return qmoe_fail(error, QMOE_HEADER, "requires", 0, "a list of strings");
    }
    bool unknown = false;
    while (qmoe_json_element(&requires, &name)) {
        if (!json_is_string(name)) {
            return qmoe_fail(error, QMOE_HEADER, "requires", 0, "a list of strings");
        }
        if (qmoe_json_equals(name, "fused")) {
            *features |= FEATURE_FUSED;
        } else if (qmoe_json_equals(name, "bias")) {
            *features |= FEATURE_BIAS;
        } else if (qmoe_json_equals(name, "gating")) {
            *features |= FEATURE_GATING;
        } else {
            unknown = true;
        }
    }
    return unknown ? qmoe_fail(error, QMOE_VERSION, "requires", 0, "bias, fused or gating") : QMOE_OK;
}

static qmoe_status parse_config(json_value config, qmoe_container *container, arena *memory, qmoe_error *error) {
    json_value quantization, method, layers, dense, key, size;
    unsigned features = 0;
    qmoe_status status = get_object(config, "quantization_config", &quantization, error);
    if (status != QMOE_OK) {
        return status;
    }
    if (!qmoe_json_get(quantization, "quant_method", &method) || !qmoe_json_equals(method, "qmoe")) {
        return qmoe_fail(error, QMOE_HEADER, "quant_method", 0, "\"qmoe\"");
    }
    if ((status = check_version(quantization, error)) != QMOE_OK ||
        (status = check_requires(quantization, &features, error)) != QMOE_OK ||
        (status = get_object(quantization, "layers", &layers, error)) != QMOE_OK ||
        (status = read_layers(layers, features, container, memory, error)) != QMOE_OK) {
        return status;
    }
    if (!qmoe_json_get(quantization, "dense_zstd", &dense)) {
        return QMOE_OK;
    }
    if (!json_is_object(dense)) {
        return qmoe_fail(error, QMOE_HEADER, "dense_zstd", 0, "an object");
    }
    container->dense = qmoe_arena_take(memory, qmoe_json_count(dense), sizeof *container->dense, error);
    if (!container->dense) {
        return QMOE_MEMORY;
    }
    while (qmoe_json_member(&dense, &key, &size)) {
        qmoe_sized_name *tensor = container->dense + container->dense_count++;
        int64_t integer;
        if ((status = qmoe_name_from(memory, key, &tensor->name, error)) != QMOE_OK) {
            return status;
        }
        if (!qmoe_json_integer(size, &integer) || integer < 0) {
            qmoe_fail(error, QMOE_HEADER, "dense_zstd", 0, "a number of bytes");
            return qmoe_at_name(error, QMOE_HEADER, tensor->name.bytes, tensor->name.size);
        }
        tensor->size = (uint64_t)integer;
    }
    return QMOE_OK;
}

/* ---- model.safetensors.index.json ---- */

static bool ends_with(qmoe_name name, const char *ending) {
    size_t size = strlen(ending);
    return name.size >= size && memcmp(name.bytes + name.size - size, ending, size) == 0;
}

static qmoe_status parse_index(json_value index, qmoe_container *container, arena *memory, qmoe_error *error) {
    json_value map, key, value;
    qmoe_status status = get_object(index, "weight_map", &map, error);
    if (status != QMOE_OK) {
        return status;
    }
    container->index = qmoe_arena_take(memory, qmoe_json_count(map), sizeof *container->index, error);
    if (!container->index) {
        return QMOE_MEMORY;
    }
    while (qmoe_json_member(&map, &key, &value)) {
        qmoe_index_entry *entry = container->index + container->index_count++;
        if ((status = qmoe_name_from(memory, key, &entry->tensor, error)) != QMOE_OK) {
            return status;
        }
        if (!json_is_string(value)) {
            status = qmoe_fail(error, QMOE_HEADER, "weight_map", 0, "the name of a .safetensors file");
        } else if ((status = qmoe_name_from(memory, value, &entry->shard, error)) == QMOE_OK) {
            if (!is_plain_name(entry->shard) || !ends_with(entry->shard, ".safetensors")) {
                status = qmoe_fail(error, QMOE_HEADER, "weight_map", 0, "the name of a .safetensors file");
            } else if (!is_named(container->files, container->file_count, entry->shard)) {
                status = qmoe_fail(error, QMOE_HEADER, "weight_map", 0, "a file of the manifest");
            }
        }
        if (status != QMOE_OK) {
            return qmoe_at_name(error, status, entry->tensor.bytes, entry->tensor.size);
        }
    }
    qsort(container->index, container->index_count, sizeof *container->index, compare_entries);
    return QMOE_OK;
}

/* ---- all of them ---- */

typedef qmoe_status parser(json_value object, qmoe_container *container, arena *memory, qmoe_error *error);

static qmoe_status read_with(parser *parse, const char *directory, const char *name, qmoe_container *container,
                             arena *memory, qmoe_error *error) {
    uint8_t *text;
    json_value object;
    char *path = qmoe_join_path(memory, directory, name, error);
    if (!path) {
        return QMOE_MEMORY;
    }
    qmoe_status status = read_object(path, memory, &text, &object, error);
    if (status != QMOE_OK) {
        return status;
    }
    if ((status = parse(object, container, memory, error)) != QMOE_OK) {
        qmoe_at(error, status, path);
    }
    free(text);
    return status;
}

qmoe_status qmoe_container_open(const char *directory, qmoe_container *container, arena *memory, qmoe_error *error) {
    qmoe_status status;
    if ((status = read_with(parse_manifest, directory, manifest_name, container, memory, error)) != QMOE_OK ||
        (status = check_files(directory, container, memory, error)) != QMOE_OK ||
        (status = read_with(parse_config, directory, config_name, container, memory, error)) != QMOE_OK) {
        return status;
    }
    return read_with(parse_index, directory, index_name, container, memory, error);
}
