/* Packed models: their layers, experts and tensors (spec 6). */
#define _POSIX_C_SOURCE 200809L
#include "container.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

/* Most bytes per entry that a dictionary comes to hold, all its tables together. */
enum { DICTIONARY_ENTRY_BYTES = 160, DICTIONARY_BYTES = 4096 };

static const char store_ending[] = ".qmoe_store", index_ending[] = ".qmoe_index",
                  dictionaries_ending[] = ".qmoe_dictionaries", zstd_ending[] = ".qmoe_zstd";

typedef struct {
    qmoe_layer_spec spec;
    const qmoe_shard *shard;
    uint64_t store_start, store_size, largest_record;
    const int64_t *index; /* [experts][3] */
    const qmoe_dictionary **dictionaries;
    size_t dictionary_count;
} model_layer;

struct qmoe_model {
    arena memory;
    const char *path;
    qmoe_shard *shards;
    size_t shard_count;
    qmoe_tensor *tensors; /* of all shards, by name */
    size_t tensor_count;
    model_layer *layers;
    size_t layer_count;
};

struct qmoe_expert {
    const uint8_t *record;
    uint64_t size;
    uint8_t *own; /* the record, if it was read */
    uint32_t matrix_count;
    qmoe_matrix *matrices[MAXIMUM_PROJECTIONS];
};

static bool ends_with(qmoe_name name, const char *ending) {
    size_t size = strlen(ending);
    return name.size >= size && memcmp(name.bytes + name.size - size, ending, size) == 0;
}

static qmoe_status at(qmoe_error *error, qmoe_status status, qmoe_name name) {
    return qmoe_at_name(error, status, name.bytes, name.size);
}

/* `name` and an ending, or without its last bytes. */
static qmoe_name changed_name(arena *memory, qmoe_name name, const char *ending, size_t without, qmoe_error *error) {
    size_t kept = name.size - without, more = strlen(ending);
    char *bytes = qmoe_arena_take(memory, kept + more + 1, 1, error);
    if (!bytes) {
        return (qmoe_name){NULL, 0};
    }
    memcpy(bytes, name.bytes, kept);
    memcpy(bytes + kept, ending, more + 1);
    return (qmoe_name){bytes, kept + more};
}

/* ---- tensors ---- */

static int compare_names(const void *a, const void *b) {
    return qmoe_name_compare(((const qmoe_tensor *)a)->name, ((const qmoe_tensor *)b)->name);
}

/* All shards' tensors in one list; their names are known to be distinct. */
static qmoe_status collect_tensors(qmoe_model *model, qmoe_error *error) {
    size_t count = 0;
    for (size_t i = 0; i < model->shard_count; i++) {
        count += model->shards[i].tensor_count;
    }
    model->tensors = qmoe_arena_take(&model->memory, count, sizeof *model->tensors, error);
    if (!model->tensors) {
        return QMOE_MEMORY;
    }
    for (size_t i = 0; i < model->shard_count; i++) {
        const qmoe_shard *shard = model->shards + i;
        for (size_t k = 0; k < shard->tensor_count; k++) {
            qmoe_tensor *tensor = model->tensors + model->tensor_count++;
            *tensor = shard->tensors[k];
            tensor->shard = (uint32_t)i;
        }
    }
    qsort(model->tensors, count, sizeof *model->tensors, compare_names);
    return QMOE_OK;
}

static const qmoe_tensor *find(const qmoe_model *model, qmoe_name name) {
    return qmoe_find_tensor(model->tensors, model->tensor_count, name);
}

/* ---- layers ---- */

static qmoe_status fail_shape(qmoe_error *error, const qmoe_tensor *tensor, qmoe_status status, const char *expected) {
    qmoe_fail(error, status, "shape", tensor->dimensions ? (int64_t)tensor->shape[0] : -1, expected);
    return at(error, status, tensor->name);
}

static qmoe_status check_form(const qmoe_tensor *tensor, const char *dtype, uint32_t dimensions,
                              const char *expected, qmoe_error *error) {
    bool fits = strcmp(tensor->dtype, dtype) == 0 && tensor->dimensions == dimensions;
    return fits ? QMOE_OK : fail_shape(error, tensor, QMOE_HEADER, expected);
}

/* The rule of spec 6.1 for the index of a layer. */
static qmoe_status check_index(model_layer *layer, qmoe_error *error) {
    uint64_t expected = 0, total = layer->store_size;
    for (uint32_t expert = 0; expert < layer->spec.experts; expert++) {
        const int64_t *row = layer->index + 3 * (size_t)expert;
        uint64_t offset = (uint64_t)row[0], size = (uint64_t)row[1];
        char place[32];
        snprintf(place, sizeof place, "expert %u", expert);
        if (offset != expected) {
            return qmoe_at(error, qmoe_fail(error, QMOE_INDEX, "offset", row[0], "the next multiple of 256"), place);
        }
        if (offset > total || size > total - offset) {
            return qmoe_at(error, qmoe_fail(error, QMOE_INDEX, "size", row[1], "a record within the store"), place);
        }
        if (row[2] < -1) {
            return qmoe_at(error, qmoe_fail(error, QMOE_INDEX, "tokens", row[2], "-1 or more"), place);
        }
        expected = round_up(offset + size, RECORD_ALIGNMENT);
        layer->largest_record = size > layer->largest_record ? size : layer->largest_record;
    }
    return expected == total ? QMOE_OK
                             : qmoe_fail(error, QMOE_INDEX, "size", (int64_t)total, "records that fill the store");
}

/* The layer's dictionary frames, one after the other. */
static qmoe_status read_dictionaries(model_layer *layer, arena *memory, const uint8_t *frames, size_t size,
                                     qmoe_error *error) {
    size_t most = size / DICTIONARY_HEADER_SIZE, position = 0;
    int64_t last = -1;
    layer->dictionaries = qmoe_arena_take(memory, most, sizeof *layer->dictionaries, error);
    if (!layer->dictionaries) {
        return QMOE_MEMORY;
    }
    while (position < size) {
        const uint8_t *frame = frames + position;
        size_t rest = size - position, frame_size = rest;
        qmoe_status status = QMOE_OK;
        if (rest >= DICTIONARY_HEADER_SIZE) {
            uint32_t bits = frame[7] < 16 ? frame[7] : 16, payload = load32(frame + 20);
            if (payload < rest - DICTIONARY_HEADER_SIZE) {
                frame_size = DICTIONARY_HEADER_SIZE + payload;
            }
            uint64_t entries = UINT64_C(1) << bits << (frame[6] == KIND_TREES);
            status = qmoe_arena_charge(memory, DICTIONARY_BYTES + entries * DICTIONARY_ENTRY_BYTES, error);
        }
        qmoe_dictionary *dictionary;
        if (status == QMOE_OK) {
            status = qmoe_dictionary_open(frame, frame_size, &dictionary, error);
        }
        if (status != QMOE_OK) {
            return status;
        }
        layer->dictionaries[layer->dictionary_count++] = dictionary;
        if (dictionary->info.dictionary_id <= last) {
            return qmoe_fail(error, QMOE_HEADER, "dictionary_id", dictionary->info.dictionary_id, "rising ids");
        }
        last = dictionary->info.dictionary_id;
        position += frame_size;
    }
    return QMOE_OK;
}

static const qmoe_dictionary *find_dictionary(const model_layer *layer, uint32_t identity) {
    size_t low = 0, high = layer->dictionary_count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        uint32_t found = layer->dictionaries[middle]->info.dictionary_id;
        if (found == identity) {
            return layer->dictionaries[middle];
        }
        if (found < identity) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return NULL;
}

/* Index and dictionaries, of tensors whose sizes were checked. They are read, so that they change no more. */
static qmoe_status load_layer(model_layer *layer, arena *memory, const qmoe_tensor *index,
                              const qmoe_tensor *dictionaries, qmoe_error *error) {
    const qmoe_file *file = &layer->shard->file;
    size_t index_size = (size_t)(index->end - index->start), size = (size_t)(dictionaries->end - dictionaries->start);
    int64_t *table = qmoe_arena_take(memory, index_size, 1, error);
    uint8_t *frames = table ? qmoe_arena_take(memory, size, 1, error) : NULL;
    if (!frames) {
        return QMOE_MEMORY;
    }
    layer->index = table;
    qmoe_status status = qmoe_file_read(file, index->start, table, index_size, error);
    if (status == QMOE_OK && (status = check_index(layer, error)) != QMOE_OK) {
        return at(error, status, index->name);
    }
    if (status == QMOE_OK && (status = qmoe_file_read(file, dictionaries->start, frames, size, error)) == QMOE_OK &&
        (status = read_dictionaries(layer, memory, frames, size, error)) != QMOE_OK) {
        at(error, status, dictionaries->name);
    }
    return status;
}

/* What is the same whether or not there is a config.json; `sizes`: whether the layer's sizes are known from there. */
static qmoe_status open_layer(qmoe_model *model, model_layer *layer, bool sizes, qmoe_error *error) {
    static const char *const endings[3] = {store_ending, index_ending, dictionaries_ending};
    const qmoe_tensor *tensors[3];
    qmoe_layer_spec *spec = &layer->spec;
    qmoe_status status;
    for (unsigned i = 0; i < 3; i++) {
        qmoe_name name = changed_name(&model->memory, spec->prefix, endings[i], 0, error);
        if (!name.bytes) {
            return QMOE_MEMORY;
        }
        tensors[i] = find(model, name);
        if (!tensors[i]) {
            return at(error, qmoe_fail(error, QMOE_HEADER, "tensor", 0, "a tensor of this layer"), name);
        }
        if (tensors[i]->shard != tensors[0]->shard) {
            return at(error, qmoe_fail(error, QMOE_HEADER, "tensor", 0, "to be in one shard with the store"), name);
        }
    }
    const qmoe_tensor *store = tensors[0], *index = tensors[1], *dictionaries = tensors[2];
    const qmoe_shard *shard = model->shards + store->shard;
    if (!sizes) { /* what the checks below take for the truth */
        spec->store_bytes = store->end - store->start;
        spec->dictionaries_bytes = dictionaries->end - dictionaries->start;
        uint64_t experts = index->dimensions ? index->shape[0] : 0;
        if (experts < 1 || experts > MAXIMUM_EXPERTS) {
            return fail_shape(error, index, QMOE_HEADER, "1 to 2^24 experts");
        }
        spec->experts = (uint32_t)experts;
    }
    if ((status = check_form(store, "U8", 1, "U8 [bytes]", error)) != QMOE_OK) {
        return status;
    }
    if (store->shape[0] != spec->store_bytes) {
        return fail_shape(error, store, QMOE_SIZE, "store_bytes of config.json");
    }
    if ((status = check_form(index, "I64", 2, "I64 [experts, 3]", error)) != QMOE_OK) {
        return status;
    }
    if (index->shape[0] != spec->experts || index->shape[1] != 3) {
        return fail_shape(error, index, QMOE_SIZE, "[experts, 3]");
    }
    if ((status = check_form(dictionaries, "U8", 1, "U8 [bytes]", error)) != QMOE_OK) {
        return status;
    }
    if (dictionaries->shape[0] != spec->dictionaries_bytes) {
        return fail_shape(error, dictionaries, QMOE_SIZE, "dictionaries_bytes of config.json");
    }
    if (store->start % RECORD_ALIGNMENT) {
        qmoe_fail(error, QMOE_HEADER, "data_offsets", (int64_t)store->start, "a multiple of 256");
        return at(error, QMOE_HEADER, store->name);
    }
    layer->shard = shard;
    layer->store_start = store->start;
    layer->store_size = store->end - store->start;
    return load_layer(layer, &model->memory, index, dictionaries, error);
}

/* The shapes of a layer's projections, where no config.json says them: those of the first expert. */
static qmoe_status find_projections(model_layer *layer, qmoe_error *error) {
    qmoe_layer_spec *spec = &layer->spec;
    uint64_t position = 0, size = (uint64_t)layer->index[1];
    while (position < size) {
        uint8_t header[FRAME_HEADER_SIZE];
        frame_layout layout;
        if (spec->projection_count == MAXIMUM_PROJECTIONS || size - position < sizeof header) {
            return qmoe_fail(error, QMOE_SIZE, "record", (int64_t)size, "one to three frames");
        }
        qmoe_status status =
            qmoe_file_read(&layer->shard->file, layer->store_start + position, header, sizeof header, error);
        if (status != QMOE_OK || (status = qmoe_frame_header(header, sizeof header, &layout, error)) != QMOE_OK) {
            return status;
        }
        if (layout.frame_size > size - position) {
            return qmoe_fail(error, QMOE_SIZE, "body_size", (int64_t)layout.frame_size, "a frame within the record");
        }
        spec->projections[spec->projection_count++] = (qmoe_projection_info){"", "", "", layout.rows, layout.columns};
        position += layout.frame_size;
    }
    return spec->projection_count ? QMOE_OK : qmoe_fail(error, QMOE_SIZE, "record", 0, "one to three frames");
}

/* ---- a shard alone ---- */

static int compare_layers(const void *a, const void *b) {
    const model_layer *one = a, *two = b;
    int order = qmoe_natural_compare(one->spec.prefix, two->spec.prefix);
    return order ? order : qmoe_name_compare(one->spec.prefix, two->spec.prefix);
}

static qmoe_status open_shard_layers(qmoe_model *model, qmoe_error *error) {
    size_t count = 0;
    for (size_t i = 0; i < model->tensor_count; i++) {
        qmoe_name name = model->tensors[i].name;
        count += ends_with(name, store_ending);
        const char *part = ends_with(name, index_ending)          ? index_ending
                           : ends_with(name, dictionaries_ending) ? dictionaries_ending
                                                                  : NULL;
        if (part) {
            qmoe_name store = changed_name(&model->memory, name, store_ending, strlen(part), error);
            if (!store.bytes) {
                return QMOE_MEMORY;
            }
            if (!find(model, store)) {
                return at(error, qmoe_fail(error, QMOE_HEADER, "tensor", 0, "a store that it belongs to"), name);
            }
        }
    }
    model->layers = qmoe_arena_take(&model->memory, count, sizeof *model->layers, error);
    if (!model->layers) {
        return QMOE_MEMORY;
    }
    for (size_t i = 0; i < model->tensor_count; i++) {
        qmoe_name name = model->tensors[i].name;
        if (ends_with(name, store_ending)) {
            model_layer *layer = model->layers + model->layer_count;
            layer->spec.dtype = "";
            layer->spec.prefix = changed_name(&model->memory, name, "", sizeof store_ending - 1, error);
            if (!layer->spec.prefix.bytes) {
                return QMOE_MEMORY;
            }
            if (layer->spec.prefix.size == 0) {
                return at(error, qmoe_fail(error, QMOE_HEADER, "prefix", 0, "the name of a layer's experts"), name);
            }
            model->layer_count++;
            qmoe_status status = open_layer(model, layer, false, error);
            if (status == QMOE_OK && (status = find_projections(layer, error)) != QMOE_OK) {
                at(error, status, layer->spec.prefix);
            }
            if (status != QMOE_OK) {
                return status;
            }
        }
    }
    qsort(model->layers, model->layer_count, sizeof *model->layers, compare_layers);
    return QMOE_OK;
}

static qmoe_status open_shard(qmoe_model *model, qmoe_error *error) {
    model->shards = qmoe_arena_take(&model->memory, 1, sizeof *model->shards, error);
    if (!model->shards) {
        return QMOE_MEMORY;
    }
    model->shard_count = 1;
    qmoe_status status = qmoe_shard_open(model->shards, model->path, &model->memory, error);
    if (status == QMOE_OK && (status = collect_tensors(model, error)) == QMOE_OK &&
        (status = open_shard_layers(model, error)) != QMOE_OK) {
        qmoe_at(error, status, model->path);
    }
    return status;
}

/* ---- a directory ---- */

/* Compare a shard's tensors with those that the index has for it; both are in order, without repetition. */
static qmoe_status check_indexed(const qmoe_shard *shard, const qmoe_index_entry *entries, size_t count,
                                 qmoe_error *error) {
    for (size_t i = 0; i < count || i < shard->tensor_count; i++) {
        int order = i == count                  ? 1
                    : i == shard->tensor_count ? -1
                                                : qmoe_name_compare(entries[i].tensor, shard->tensors[i].name);
        if (order) {
            qmoe_fail(error, QMOE_HEADER, "weight_map", 0,
                      order < 0 ? "a tensor of this shard" : "every tensor of the shard to be named");
            at(error, QMOE_HEADER, order < 0 ? entries[i].tensor : shard->tensors[i].name);
            return qmoe_at(error, QMOE_HEADER, shard->path);
        }
    }
    return QMOE_OK;
}

static qmoe_status open_shards(qmoe_model *model, const qmoe_container *container, qmoe_error *error) {
    const qmoe_index_entry *entries = container->index;
    size_t count = container->index_count, shards = 0;
    for (size_t i = 0; i < count; i++) {
        shards += i == 0 || qmoe_name_compare(entries[i - 1].shard, entries[i].shard) != 0;
    }
    model->shards = qmoe_arena_take(&model->memory, shards, sizeof *model->shards, error);
    if (!model->shards) {
        return QMOE_MEMORY;
    }
    for (size_t i = 0; i < count;) { /* all headers before any comparison, as with every reader */
        qmoe_shard *shard = model->shards + model->shard_count;
        const char *path = qmoe_join_path(&model->memory, model->path, entries[i].shard.bytes, error);
        if (!path) {
            return QMOE_MEMORY;
        }
        model->shard_count++;
        qmoe_status status = qmoe_shard_open(shard, path, &model->memory, error);
        if (status != QMOE_OK) {
            return status;
        }
        for (size_t first = i; i < count && qmoe_name_compare(entries[first].shard, entries[i].shard) == 0;) {
            i++;
        }
    }
    for (size_t i = 0, number = 0; i < count; number++) {
        size_t first = i;
        while (i < count && qmoe_name_compare(entries[first].shard, entries[i].shard) == 0) {
            i++;
        }
        qmoe_status status = check_indexed(model->shards + number, entries + first, i - first, error);
        if (status != QMOE_OK) {
            return status;
        }
    }
    return QMOE_OK;
}

typedef struct {
    qmoe_name name;
    bool frame; /* a name of dense_zstd; otherwise a tensor of a layer */
} owned_name;

static int compare_owned(const void *a, const void *b) {
    return qmoe_name_compare(((const owned_name *)a)->name, ((const owned_name *)b)->name);
}

/* Who a stored tensor belongs to, if to anything in config.json. */
static const owned_name *owner_of(const owned_name *owned, size_t count, qmoe_name name) {
    const owned_name wanted = {.name = name};
    return count ? bsearch(&wanted, owned, count, sizeof *owned, compare_owned) : NULL;
}

/* Whether a name has the ending of a section, known or of a later version (spec 1.2): such are left aside. */
static bool is_section(qmoe_name name) {
    static const char mark[] = ".qmoe_";
    size_t start = name.size;
    while (start && (name.bytes[start - 1] == '_' || (name.bytes[start - 1] >= 'a' && name.bytes[start - 1] <= 'z') ||
                     (name.bytes[start - 1] >= '0' && name.bytes[start - 1] <= '9'))) {
        start--;
    }
    const size_t size = sizeof mark - 1; /* the run began at the dot, or behind it */
    return start && name.size - (start - 1) > size && memcmp(name.bytes + start - 1, mark, size) == 0;
}

/* Tensors that are no experts: nothing stored twice, nothing with a name of ours that config.json does not know. */
static qmoe_status check_dense(qmoe_model *model, const qmoe_container *container, qmoe_error *error) {
    size_t count = 0;
    owned_name *owned =
        qmoe_arena_take(&model->memory, 3 * container->layer_count + container->dense_count, sizeof *owned, error);
    if (!owned) {
        return QMOE_MEMORY;
    }
    static const char *const endings[4] = {store_ending, index_ending, dictionaries_ending, zstd_ending};
    for (size_t i = 0; i < 3 * container->layer_count + container->dense_count; i++) {
        bool frame = i >= 3 * container->layer_count;
        qmoe_name base = frame ? container->dense[i - 3 * container->layer_count].name
                               : container->layers[i / 3].prefix;
        qmoe_name name = changed_name(&model->memory, base, endings[frame ? 3 : i % 3], 0, error);
        if (!name.bytes) {
            return QMOE_MEMORY;
        }
        owned[count++] = (owned_name){name, frame};
    }
    qsort(owned, count, sizeof *owned, compare_owned);
    for (size_t i = 0; i < model->tensor_count; i++) {
        qmoe_name name = model->tensors[i].name;
        const owned_name *owner = owner_of(owned, count, name);
        bool reserved = ends_with(name, store_ending) || ends_with(name, index_ending) ||
                        ends_with(name, dictionaries_ending) || ends_with(name, zstd_ending);
        if (reserved && !owner) {
            return at(error, qmoe_fail(error, QMOE_HEADER, "tensor", 0, "something in config.json"), name);
        }
        if (owner && owner->frame) { /* then the plain name must be no dense tensor */
            qmoe_name plain = changed_name(&model->memory, name, "", sizeof zstd_ending - 1, error);
            if (!plain.bytes) {
                return QMOE_MEMORY;
            }
            if (find(model, plain) && !owner_of(owned, count, plain) && !is_section(plain)) {
                return at(error, qmoe_fail(error, QMOE_HEADER, "dense_zstd", 0, "not both plain and a frame"), plain);
            }
        }
    }
    for (size_t i = 0; i < container->dense_count; i++) {
        qmoe_name name = changed_name(&model->memory, container->dense[i].name, zstd_ending, 0, error);
        if (!name.bytes) {
            return QMOE_MEMORY;
        }
        const qmoe_tensor *tensor = find(model, name);
        if (!tensor) {
            return at(error, qmoe_fail(error, QMOE_HEADER, "dense_zstd", 0, "a tensor that is there"), name);
        }
        qmoe_status status = check_form(tensor, "U8", 1, "U8 [bytes]", error);
        if (status != QMOE_OK) {
            return status;
        }
        if (tensor->shape[0] != container->dense[i].size) {
            return fail_shape(error, tensor, QMOE_SIZE, "the size in dense_zstd");
        }
    }
    return QMOE_OK;
}

static qmoe_status open_directory(qmoe_model *model, qmoe_error *error) {
    qmoe_container container = {0};
    qmoe_status status = qmoe_container_open(model->path, &container, &model->memory, error);
    if (status != QMOE_OK || (status = open_shards(model, &container, error)) != QMOE_OK ||
        (status = collect_tensors(model, error)) != QMOE_OK) {
        return status;
    }
    model->layers = qmoe_arena_take(&model->memory, container.layer_count, sizeof *model->layers, error);
    if (!model->layers) {
        return QMOE_MEMORY;
    }
    for (size_t i = 0; i < container.layer_count; i++) {
        model_layer *layer = model->layers + model->layer_count++;
        layer->spec = container.layers[i];
        if ((status = open_layer(model, layer, true, error)) != QMOE_OK) {
            return qmoe_at(error, status, layer->shard ? layer->shard->path : model->path);
        }
    }
    if ((status = check_dense(model, &container, error)) != QMOE_OK) {
        qmoe_at(error, status, model->path);
    }
    return status;
}

/* ---- models ---- */

static qmoe_status open_path(qmoe_model *model, const char *path, unsigned options, qmoe_error *error) {
    struct stat about;
    size_t size = strlen(path);
    char *copy = qmoe_arena_take(&model->memory, size + 1, 1, error);
    if (!copy) {
        return QMOE_MEMORY;
    }
    memcpy(copy, path, size + 1);
    model->path = copy;
    if (stat(path, &about) != 0) {
        qmoe_fail(error, QMOE_ARGUMENT, "path", 0, "a packed model's directory, or a shard");
        return qmoe_at(error, QMOE_ARGUMENT, path);
    }
    qmoe_status status = S_ISDIR(about.st_mode) ? open_directory(model, error) : open_shard(model, error);
    for (size_t i = 0; status == QMOE_OK && !(options & QMOE_READ) && i < model->shard_count; i++) {
        if ((status = qmoe_file_map(&model->shards[i].file, error)) != QMOE_OK) {
            qmoe_at(error, status, model->shards[i].path);
        }
    }
    return status;
}

qmoe_status qmoe_model_open(const char *path, unsigned options, uint64_t memory_limit, qmoe_model **result,
                            qmoe_error *error) {
    if (options & ~QMOE_READ) {
        return qmoe_fail(error, QMOE_ARGUMENT, "options", options, "0 or QMOE_READ");
    }
    qmoe_model *model = calloc(1, sizeof *model);
    if (!model) {
        return qmoe_fail(error, QMOE_MEMORY, "model", (int64_t)sizeof *model, "enough memory");
    }
    model->memory.limit = memory_limit ? memory_limit : UINT64_MAX;
    qmoe_status status = open_path(model, path, options, error);
    if (status != QMOE_OK) {
        qmoe_model_close(model);
        return status;
    }
    *result = model;
    return QMOE_OK;
}

void qmoe_model_close(qmoe_model *model) {
    if (!model) {
        return;
    }
    for (size_t i = 0; i < model->layer_count; i++) {
        for (size_t k = 0; k < model->layers[i].dictionary_count; k++) {
            qmoe_dictionary_close((qmoe_dictionary *)(uintptr_t)model->layers[i].dictionaries[k]);
        }
    }
    for (size_t i = 0; i < model->shard_count; i++) {
        qmoe_file_close(&model->shards[i].file);
    }
    qmoe_arena_free(&model->memory);
    free(model);
}

/* ---- what a model holds ---- */

/* NULL, and QMOE_ARGUMENT in `error`, if there is none. */
static const model_layer *layer_of(const qmoe_model *model, size_t number, qmoe_error *error) {
    if (number >= model->layer_count) {
        qmoe_fail(error, QMOE_ARGUMENT, "layer", (int64_t)number, "below the number of layers");
        qmoe_at(error, QMOE_ARGUMENT, model->path);
        return NULL;
    }
    return model->layers + number;
}

size_t qmoe_model_layer_count(const qmoe_model *model) { return model->layer_count; }

qmoe_status qmoe_model_layer(const qmoe_model *model, size_t number, qmoe_layer_info *info, qmoe_error *error) {
    const model_layer *layer = layer_of(model, number, error);
    if (!layer) {
        return QMOE_ARGUMENT;
    }
    *info = (qmoe_layer_info){.prefix = layer->spec.prefix.bytes,
                              .dtype = layer->spec.dtype,
                              .experts = layer->spec.experts,
                              .projections = layer->spec.projection_count,
                              .store_size = layer->store_size,
                              .largest_record = layer->largest_record};
    return QMOE_OK;
}

const char *qmoe_model_layer_json(const qmoe_model *model, size_t number) {
    const model_layer *layer = layer_of(model, number, NULL);
    return !layer ? NULL : layer->spec.json ? layer->spec.json : "";
}

qmoe_status qmoe_model_find_layer(const qmoe_model *model, const char *prefix, size_t *number, qmoe_error *error) {
    for (size_t i = 0; i < model->layer_count; i++) {
        if (strcmp(model->layers[i].spec.prefix.bytes, prefix) == 0) {
            *number = i;
            return QMOE_OK;
        }
    }
    qmoe_fail(error, QMOE_ARGUMENT, "prefix", 0, "the name of a layer's experts");
    return qmoe_at(error, qmoe_at(error, QMOE_ARGUMENT, prefix), model->path);
}

qmoe_status qmoe_model_projection(const qmoe_model *model, size_t number, uint32_t projection,
                                  qmoe_projection_info *info, qmoe_error *error) {
    const model_layer *layer = layer_of(model, number, error);
    if (!layer) {
        return QMOE_ARGUMENT;
    }
    if (projection >= layer->spec.projection_count) {
        qmoe_status status = qmoe_fail(error, QMOE_ARGUMENT, "projection", projection, "below the number of projections");
        return qmoe_at(error, at(error, status, layer->spec.prefix), model->path);
    }
    *info = layer->spec.projections[projection];
    return QMOE_OK;
}

qmoe_status qmoe_model_record(const qmoe_model *model, size_t number, uint32_t expert, qmoe_record_info *info,
                              qmoe_error *error) {
    const model_layer *layer = layer_of(model, number, error);
    if (!layer) {
        return QMOE_ARGUMENT;
    }
    if (expert >= layer->spec.experts) {
        qmoe_status status = qmoe_fail(error, QMOE_ARGUMENT, "expert", expert, "below the number of experts");
        return qmoe_at(error, at(error, status, layer->spec.prefix), model->path);
    }
    const int64_t *row = layer->index + 3 * (size_t)expert;
    *info = (qmoe_record_info){(uint64_t)row[0], (uint64_t)row[1], row[2]};
    return QMOE_OK;
}

size_t qmoe_model_tensor_count(const qmoe_model *model) { return model->tensor_count; }

static qmoe_status check_tensor_number(const qmoe_model *model, size_t number, qmoe_error *error) {
    if (number < model->tensor_count) {
        return QMOE_OK;
    }
    qmoe_fail(error, QMOE_ARGUMENT, "tensor", (int64_t)number, "below the number of tensors");
    return qmoe_at(error, QMOE_ARGUMENT, model->path);
}

qmoe_status qmoe_model_tensor(const qmoe_model *model, size_t number, qmoe_tensor_info *info, qmoe_error *error) {
    qmoe_status status = check_tensor_number(model, number, error);
    if (status == QMOE_OK) {
        const qmoe_tensor *tensor = model->tensors + number;
        *info = (qmoe_tensor_info){.name = tensor->name.bytes,
                                   .dtype = tensor->dtype,
                                   .shard = model->shards[tensor->shard].name.bytes,
                                   .shape = tensor->shape,
                                   .dimensions = tensor->dimensions,
                                   .offset = tensor->start,
                                   .size = tensor->end - tensor->start};
    }
    return status;
}

qmoe_status qmoe_model_find_tensor(const qmoe_model *model, const char *name, size_t *number, qmoe_error *error) {
    const qmoe_tensor *tensor = find(model, (qmoe_name){name, strlen(name)});
    if (!tensor) {
        qmoe_fail(error, QMOE_ARGUMENT, "name", 0, "the name of a tensor");
        return qmoe_at(error, qmoe_at(error, QMOE_ARGUMENT, name), model->path);
    }
    *number = (size_t)(tensor - model->tensors);
    return QMOE_OK;
}

qmoe_status qmoe_model_read_tensor(const qmoe_model *model, size_t number, uint64_t offset, void *buffer, size_t size,
                                   qmoe_error *error) {
    qmoe_status status = check_tensor_number(model, number, error);
    if (status != QMOE_OK) {
        return status;
    }
    const qmoe_tensor *tensor = model->tensors + number;
    const qmoe_shard *shard = model->shards + tensor->shard;
    uint64_t all = tensor->end - tensor->start;
    if (offset > all || size > all - offset) {
        status = qmoe_fail(error, QMOE_ARGUMENT, "offset", (int64_t)offset, "bytes within the tensor");
        at(error, status, tensor->name);
    } else {
        status = qmoe_file_read(&shard->file, tensor->start + offset, buffer, size, error);
    }
    return status == QMOE_OK ? status : qmoe_at(error, status, shard->path);
}

/* ---- experts ---- */

/* Headers of all frames of a record against the layer: their sizes. */
static qmoe_status check_frames(const model_layer *layer, const qmoe_expert *expert, uint64_t *sizes,
                                qmoe_error *error) {
    uint64_t position = 0;
    for (uint32_t i = 0; i < layer->spec.projection_count; i++) {
        const qmoe_projection_info *projection = layer->spec.projections + i;
        uint64_t rest = expert->size - position;
        frame_layout layout;
        qmoe_status status;
        if (rest < FRAME_HEADER_SIZE) {
            status = qmoe_fail(error, QMOE_SIZE, "record", (int64_t)expert->size, "one frame per projection");
        } else {
            status = qmoe_frame_header(expert->record + position, rest, &layout, error);
        }
        if (status == QMOE_OK && layout.rows != projection->rows) {
            status = qmoe_fail(error, QMOE_HEADER, "rows", layout.rows, "the projection's");
        } else if (status == QMOE_OK && layout.columns != projection->columns) {
            status = qmoe_fail(error, QMOE_HEADER, "columns", layout.columns, "the projection's");
        } else if (status == QMOE_OK && layout.frame_size > rest) {
            status = qmoe_fail(error, QMOE_SIZE, "body_size", (int64_t)layout.frame_size, "a frame within the record");
        }
        for (uint32_t k = 0; status == QMOE_OK && k < layout.dictionary_count; k++) {
            if (!find_dictionary(layer, layout.dictionary_ids[k])) {
                status = qmoe_fail(error, QMOE_DICTIONARY, "dictionary_ids", layout.dictionary_ids[k],
                                   "a dictionary of the layer");
            }
        }
        if (status != QMOE_OK) {
            return qmoe_at(error, status, projection->name);
        }
        sizes[i] = layout.frame_size;
        position += layout.frame_size;
    }
    return position == expert->size
               ? QMOE_OK
               : qmoe_fail(error, QMOE_SIZE, "record", (int64_t)expert->size, "nothing after the last frame");
}

/* The dictionaries that a frame names, each of which is there; `frame` may have changed since that was seen. */
static size_t named_dictionaries(const model_layer *layer, const uint8_t *frame, const qmoe_dictionary **named) {
    size_t count = 0;
    for (size_t k = 0; k < MAXIMUM_DICTIONARIES; k++) {
        const qmoe_dictionary *dictionary = find_dictionary(layer, load32(frame + 40 + 4 * k));
        if (dictionary) {
            named[count++] = dictionary;
        }
    }
    return count;
}

static qmoe_status open_matrices(const model_layer *layer, qmoe_expert *expert, unsigned options, qmoe_error *error) {
    uint64_t sizes[MAXIMUM_PROJECTIONS], position = 0;
    qmoe_status status = check_frames(layer, expert, sizes, error);
    if (status != QMOE_OK) {
        return status;
    }
    for (uint32_t i = 0; i < layer->spec.projection_count; i++) {
        const qmoe_projection_info *projection = layer->spec.projections + i;
        const qmoe_dictionary *named[MAXIMUM_DICTIONARIES];
        const uint8_t *frame = expert->record + position;
        size_t count = named_dictionaries(layer, frame, named);
        status = qmoe_matrix_open(frame, (size_t)sizes[i], named, count, options, expert->matrices + i, error);
        if (status != QMOE_OK) {
            return qmoe_at(error, status, projection->name);
        }
        expert->matrix_count++;
        const frame_layout *layout = &expert->matrices[i]->layout; /* read again since, and what callers rely on */
        if (layout->rows != projection->rows || layout->columns != projection->columns) {
            return qmoe_at(error, qmoe_fail(error, QMOE_HEADER, "rows", layout->rows, "the projection's"),
                           projection->name);
        }
        position += sizes[i];
    }
    return QMOE_OK;
}

/* The record and the padding after it, in the map or in memory of its own. */
static qmoe_status fetch_record(const model_layer *layer, uint64_t offset, uint64_t room, qmoe_expert *expert,
                                qmoe_error *error) {
    const qmoe_file *file = &layer->shard->file;
    uint64_t start = layer->store_start + offset;
    if (file->map) {
        expert->record = file->map + start;
        return QMOE_OK;
    }
    expert->own = room > SIZE_MAX / 2 ? NULL : malloc(room ? (size_t)room : 1);
    expert->record = expert->own;
    if (!expert->own) {
        return qmoe_fail(error, QMOE_MEMORY, "size", (int64_t)room, "enough memory");
    }
    return qmoe_file_read(file, start, expert->own, (size_t)room, error);
}

static qmoe_status check_padding(const qmoe_expert *expert, uint64_t room, qmoe_error *error) {
    for (uint64_t i = expert->size; i < room; i++) {
        if (expert->record[i]) {
            return qmoe_fail(error, QMOE_PAYLOAD, "padding", expert->record[i], "zero bytes after the record");
        }
    }
    return QMOE_OK;
}

qmoe_status qmoe_expert_open(const qmoe_model *model, size_t number, uint32_t expert, unsigned options,
                             qmoe_expert **result, qmoe_error *error) {
    const model_layer *layer = layer_of(model, number, error);
    qmoe_record_info info;
    qmoe_status status = QMOE_ARGUMENT;
    if (!layer || (status = qmoe_model_record(model, number, expert, &info, error)) != QMOE_OK) {
        return status;
    }
    if (options & ~QMOE_SKIP_BODY) {
        return qmoe_fail(error, QMOE_ARGUMENT, "options", options, "0 or QMOE_SKIP_BODY");
    }
    qmoe_expert *opened = calloc(1, sizeof *opened);
    if (!opened) {
        return qmoe_fail(error, QMOE_MEMORY, "expert", (int64_t)sizeof *opened, "enough memory");
    }
    uint64_t room = round_up(info.offset + info.size, RECORD_ALIGNMENT) - info.offset;
    opened->size = info.size;
    status = fetch_record(layer, info.offset, room, opened, error);
    if (status == QMOE_OK && (status = open_matrices(layer, opened, options, error)) == QMOE_OK &&
        !(options & QMOE_SKIP_BODY)) {
        status = check_padding(opened, room, error);
    }
    if (status != QMOE_OK) {
        char place[32];
        snprintf(place, sizeof place, "expert %u", expert);
        qmoe_expert_close(opened);
        qmoe_at(error, at(error, qmoe_at(error, status, place), layer->spec.prefix), layer->shard->path);
        return status;
    }
    *result = opened;
    return QMOE_OK;
}

void qmoe_expert_close(qmoe_expert *expert) {
    if (expert) {
        for (uint32_t i = 0; i < expert->matrix_count; i++) {
            qmoe_matrix_close(expert->matrices[i]);
        }
        free(expert->own);
        free(expert);
    }
}

const qmoe_matrix *qmoe_expert_matrix(const qmoe_expert *expert, uint32_t projection) {
    return projection < expert->matrix_count ? expert->matrices[projection] : NULL;
}

const uint8_t *qmoe_expert_record(const qmoe_expert *expert, uint64_t *size) {
    if (size) {
        *size = expert->size;
    }
    return expert->record;
}
