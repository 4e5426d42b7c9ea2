/*
 * Fuzzes the reader of packed models: whole directories, and shards alone, that nobody vouches for.
 *
 *     fuzz_model SECONDS SEED DICTIONARY   mutate a model made with that dictionary frame for so long
 *     fuzz_model replay FINDING...         run inputs that were kept
 *     fuzz_model threads DICTIONARY        share a model among threads; for the thread sanitizer
 *
 * CMake builds it where QMOE_SANITIZE is set. Files are written below TMPDIR. Checked is also what the library
 * promises: mapped or read, a model is the same; messages are one line; every matrix has the shape that the layer says;
 * a memory limit only ever leads to QMOE_MEMORY.
 *
 * For libFuzzer: clang -DQMOE_LIBFUZZER -fsanitize=fuzzer,address,undefined, with the library's sources.
 */
#define _POSIX_C_SOURCE 200809L
#include "qmoe.h"

#define PROGRAM "fuzz_model"
#include "program.h"

#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MANIFEST, CONFIG, INDEX, SHARD, FILES };
static const char *const file_names[FILES] = {"manifest.json", "config.json", "model.safetensors.index.json",
                                              "model-00001-of-00001.safetensors"};

enum { MOST_WEIGHTS = 1 << 14, MOST_OPENED = 64, CAPACITY = 1 << 17 };

/* An input: this, then the files. */
typedef struct {
    uint32_t sign; /* bring the sizes in the manifest up to date: it is then written anew, and not taken */
    uint32_t limit; /* of memory, for another attempt */
    uint32_t sizes[FILES];
} input_header;

static struct {
    uint64_t opened, shards, refused, limited;
} counts;
static atomic_uint_fast64_t experts; /* opened; by threads too */

static char folder[4096];

static void file_path(char *path, size_t size, const char *name) {
    require(snprintf(path, size, "%s/%s", folder, name) < (int)size, "a path fits");
}

static void write_file(const char *name, const void *data, size_t size) {
    char path[sizeof folder + 64];
    file_path(path, sizeof path, name);
    unlink(path); /* some file systems flush a file that is cut short and written anew, which takes long */
    FILE *file = fopen(path, "wb");
    require(file && fwrite(data, 1, size, file) == size, "a file can be written");
    fclose(file);
}

/* ---- what is done with a model ---- */

static qmoe_status note(qmoe_status status, const qmoe_error *error) {
    if (status != QMOE_OK) {
        char message[QMOE_MESSAGE_SIZE];
        require(error->status == status, "the error has the status");
        require(memchr(error->place, 0, sizeof error->place) && memchr(error->field, 0, sizeof error->field) &&
                    memchr(error->expected, 0, sizeof error->expected),
                "strings in errors end");
        qmoe_error_message(error, message, sizeof message);
        require(!strpbrk(message, "\n\r\t") && message[0], "a message is one line");
    }
    return status;
}

static bool is_text(const char *text) { return text && strlen(text) < CAPACITY; }

static void use_matrix(const qmoe_matrix *matrix) {
    size_t rows = qmoe_matrix_rows(matrix), columns = qmoe_matrix_columns(matrix);
    if (rows * columns > MOST_WEIGHTS || columns > MOST_WEIGHTS || rows > MOST_WEIGHTS) {
        return;
    }
    int8_t *trits = room(rows * columns);
    require(qmoe_matrix_decode(matrix, 0, (uint32_t)rows, trits, 1, NULL) == QMOE_OK, "a matrix decodes");
    for (size_t i = 0; i < rows * columns; i++) {
        require(trits[i] >= -1 && trits[i] <= 1, "trits are -1, 0 or 1");
    }
    float *x = room(columns * sizeof *x), *y = room(rows * sizeof *y);
    for (size_t i = 0; i < columns; i++) {
        x[i] = 1;
    }
    require(qmoe_matrix_matmul(matrix, x, QMOE_FLOAT32, 1, y, 1, NULL) == QMOE_OK, "a matrix multiplies");
    free(trits);
    free(x);
    free(y);
}

static void use_expert(const qmoe_model *model, size_t layer, uint32_t number, unsigned options) {
    qmoe_error error;
    qmoe_expert *expert = NULL;
    qmoe_record_info record;
    require(qmoe_model_record(model, layer, number, &record, NULL) == QMOE_OK, "an expert has a record");
    if (note(qmoe_expert_open(model, layer, number, options, &expert, &error), &error) != QMOE_OK) {
        require(!expert, "nothing is set by a failure");
        return;
    }
    atomic_fetch_add(&experts, 1);
    uint64_t size;
    const uint8_t *bytes = qmoe_expert_record(expert, &size);
    require(size == record.size, "the record has its size");
    uint8_t *copy = room((size_t)size); /* every byte can be read */
    memcpy(copy, bytes, (size_t)size);
    free(copy);
    uint32_t i = 0;
    for (const qmoe_matrix *matrix; (matrix = qmoe_expert_matrix(expert, i)); i++) {
        qmoe_projection_info info;
        require(qmoe_model_projection(model, layer, i, &info, NULL) == QMOE_OK, "a matrix has a projection");
        require(qmoe_matrix_rows(matrix) == info.rows && qmoe_matrix_columns(matrix) == info.columns,
                "a matrix has the projection's shape");
        use_matrix(matrix);
    }
    require(qmoe_model_projection(model, layer, i, &(qmoe_projection_info){0}, NULL) == QMOE_ARGUMENT,
            "every projection has a matrix");
    qmoe_expert_close(expert);
}

static void use_tensors(const qmoe_model *model) {
    size_t number;
    for (size_t i = 0; i < qmoe_model_tensor_count(model); i++) {
        qmoe_tensor_info info;
        require(qmoe_model_tensor(model, i, &info, NULL) == QMOE_OK, "a tensor is listed");
        require(is_text(info.name) && is_text(info.dtype) && is_text(info.shard), "names are strings");
        require(qmoe_model_find_tensor(model, info.name, &number, NULL) == QMOE_OK && number == i,
                "a tensor is found by its name");
        uint64_t sum = 0;
        for (uint32_t k = 0; k < info.dimensions; k++) {
            sum += info.shape[k];
        }
        uint8_t *bytes = room((size_t)info.size + (sum & 1));
        require(qmoe_model_read_tensor(model, i, 0, bytes, (size_t)info.size, NULL) == QMOE_OK, "a tensor is read");
        require(qmoe_model_read_tensor(model, i, info.size, bytes, 1, NULL) == QMOE_ARGUMENT, "and no byte more");
        free(bytes);
    }
}

static void use_model(const qmoe_model *model) {
    unsigned opened = 0;
    size_t number;
    for (size_t i = 0; i < qmoe_model_layer_count(model); i++) {
        qmoe_layer_info layer;
        require(qmoe_model_layer(model, i, &layer, NULL) == QMOE_OK && layer.experts && layer.projections,
                "a layer has experts and projections");
        require(is_text(layer.prefix) && is_text(layer.dtype) && layer.largest_record <= layer.store_size,
                "a layer is described");
        require(qmoe_model_find_layer(model, layer.prefix, &number, NULL) == QMOE_OK && number == i,
                "a layer is found by its prefix");
        for (uint32_t k = 0; k < layer.projections; k++) {
            qmoe_projection_info info;
            require(qmoe_model_projection(model, i, k, &info, NULL) == QMOE_OK, "a projection is listed");
            require(is_text(info.name) && is_text(info.role) && is_text(info.tensor), "and described");
        }
        for (uint32_t k = 0; k < layer.experts && opened < MOST_OPENED; k++, opened++) {
            use_expert(model, i, k, 0);
            use_expert(model, i, k, QMOE_SKIP_BODY);
        }
    }
    use_tensors(model);
}

static qmoe_status open_and_use(const char *path, unsigned options, uint64_t limit) {
    qmoe_error error;
    qmoe_model *model = NULL;
    qmoe_status status = note(qmoe_model_open(path, options, limit, &model, &error), &error);
    require(status == QMOE_OK || !model, "nothing is set by a failure");
    if (status == QMOE_OK) {
        use_model(model);
        qmoe_model_close(model);
    }
    return status;
}

static void write_manifest(const uint32_t *sizes) {
    char text[1024];
    int size = snprintf(text, sizeof text, "{\"format\": \"qmoe\", \"version\": \"1.0\", \"files\": {");
    for (int i = CONFIG; i < FILES; i++) {
        size += snprintf(text + size, sizeof text - (size_t)size, "%s\"%s\": {\"bytes\": %u, \"sha256\": \"%064d\"}",
                         i > CONFIG ? ", " : "", file_names[i], sizes[i], 0);
    }
    size += snprintf(text + size, sizeof text - (size_t)size, "}}");
    write_file(file_names[MANIFEST], text, (size_t)size);
}

static void make_folder(void) {
    const char *place = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/qmoe-fuzz-XXXXXX", place && strlen(place) < 3000 ? place : "/tmp");
    require(mkdtemp(folder), "a folder can be made below TMPDIR");
}

static void remove_folder(void) {
    char path[sizeof folder + 64];
    for (int i = 0; i < FILES; i++) {
        file_path(path, sizeof path, file_names[i]);
        unlink(path);
    }
    rmdir(folder);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input_header header;
    current.data = data;
    current.size = size;
    executions++;
    if (size < sizeof header) {
        return 0;
    }
    memcpy(&header, data, sizeof header);
    size_t position = sizeof header;
    for (int i = 0; i < FILES; i++) {
        size_t rest = size - position, some = i + 1 == FILES || header.sizes[i] > rest ? rest : header.sizes[i];
        header.sizes[i] = (uint32_t)some;
        position += some;
    }
    if (!folder[0]) {
        make_folder();
        atexit(remove_folder);
    }
    position = sizeof header;
    for (int i = 0; i < FILES; i++) {
        write_file(file_names[i], data + position, header.sizes[i]);
        position += header.sizes[i];
    }
    if (header.sign) {
        write_manifest(header.sizes);
    }
    qmoe_status status = open_and_use(folder, 0, 0);
    counts.opened += status == QMOE_OK;
    counts.refused += status != QMOE_OK;
    require(open_and_use(folder, QMOE_READ, 0) == status, "a model that is read is the one that is mapped");
    if (header.limit) {
        qmoe_status limited = open_and_use(folder, QMOE_READ, header.limit);
        require(limited == status || limited == QMOE_MEMORY, "a limit changes nothing else");
        counts.limited += limited == QMOE_MEMORY;
    }
    char path[sizeof folder + 64];
    file_path(path, sizeof path, file_names[SHARD]);
    qmoe_status alone = open_and_use(path, 0, 0);
    require(open_and_use(path, QMOE_READ, 0) == alone, "a shard that is read is the one that is mapped");
    counts.shards += alone == QMOE_OK;
    current.size = 0;
    return 0;
}

#ifndef QMOE_LIBFUZZER

/* ---- a model ---- */

enum { LAYERS = 2, EXPERTS = 3, MOST_TENSORS = 3 * LAYERS + 2 };

static struct {
    uint8_t *data;
    size_t size;
} files[FILES];
static size_t index_starts[LAYERS]; /* in the shard, behind its header */

/* Text or bytes that grow. */
typedef struct {
    uint8_t *data;
    size_t size;
} growing;

static void add_bytes(growing *to, const void *data, size_t size) {
    require(to->size + size <= CAPACITY, "a file fits");
    memcpy(to->data + to->size, data, size);
    to->size += size;
}

static void add_text(growing *to, const char *text) { add_bytes(to, text, strlen(text)); }

static void add_number(growing *to, const char *before, uint64_t number, const char *after) {
    char text[256];
    snprintf(text, sizeof text, "%s%" PRIu64 "%s", before, number, after);
    add_text(to, text);
}

static void align(growing *to, size_t multiple, char filling) {
    while (to->size % multiple) {
        add_bytes(to, &filling, 1);
    }
}

static growing new_file(void) { return (growing){room(CAPACITY), 0}; }

static void add_frame(growing *to, uint32_t rows, uint32_t columns, const qmoe_dictionary *dictionary, bool raw,
                      uint64_t *random) {
    int8_t trits[32 * 64];
    float levels[2 * 32];
    for (uint32_t i = 0; i < rows * columns; i++) {
        uint32_t kind = below(random, 8);
        trits[i] = (int8_t)(kind > 1 ? 0 : kind == 1 ? 1 : -1);
    }
    for (uint32_t i = 0; i < 2 * rows; i++) {
        levels[i] = (i % 2 ? 1.0f : -1.0f) * (float)(1 + i % 5);
    }
    uint8_t *frame;
    uint64_t size;
    require(qmoe_encode(trits, levels, rows, columns, &dictionary, raw ? 0 : 1, NULL, 1, &frame, &size, NULL) == QMOE_OK,
            "a matrix is encoded");
    add_bytes(to, frame, (size_t)size);
    qmoe_free(frame);
}

/* A model of two layers, the second without gates, and a dense tensor, plain and as what stands for a dense frame. */
static void make_model(const uint8_t *dictionary_frame, size_t dictionary_size, uint64_t *random) {
    qmoe_dictionary *dictionary;
    require(qmoe_dictionary_open(dictionary_frame, dictionary_size, &dictionary, NULL) == QMOE_OK, "a dictionary opens");
    growing config = new_file(), index = new_file(), header = new_file(), body = new_file(), shard = new_file();
    add_text(&config, "{\"model_type\": \"olmoe\", \"other\": [1.5e3, {\"a\": null}, NaN, true], \"quantization_config\": "
                      "{\"quant_method\": \"qmoe\", \"version\": \"1.0\", \"layers\": {");
    add_text(&index, "{\"metadata\": {}, \"weight_map\": {");
    add_text(&header, "{\"__metadata__\": {\"format\": \"pt\"}");
    for (int layer = 0; layer < LAYERS; layer++) {
        static const char *const roles[] = {"gate", "up", "down"};
        static const char *const endings[] = {"store", "index", "dictionaries"};
        int first = layer ? 1 : 0;
        size_t starts[4];
        int64_t table[EXPERTS][3];
        align(&body, 256, 0);
        starts[0] = body.size;
        for (int expert = 0; expert < EXPERTS; expert++) {
            align(&body, 256, 0);
            table[expert][0] = (int64_t)(body.size - starts[0]);
            for (int role = first; role < 3; role++) {
                add_frame(&body, role == 2 ? 19 : 23, role == 2 ? 23 : 19, dictionary, (expert + role) % 3 == 0, random);
            }
            table[expert][1] = (int64_t)(body.size - starts[0]) - table[expert][0];
            table[expert][2] = expert - 1;
        }
        align(&body, 256, 0);
        starts[1] = index_starts[layer] = body.size;
        add_bytes(&body, table, sizeof table);
        starts[2] = body.size;
        add_bytes(&body, dictionary_frame, dictionary_size);
        align(&body, 8, 0);
        body.size -= (body.size - starts[2]) - dictionary_size; /* the tensor ends where the frame does */
        starts[3] = body.size;
        for (int i = 0; i < 3; i++) {
            char name[64];
            snprintf(name, sizeof name, "l.%d.e.qmoe_%s", layer, endings[i]);
            add_text(&header, ", \"");
            add_text(&header, name);
            add_number(&header, i == 1 ? "\": {\"dtype\": \"I64\", \"shape\": [" : "\": {\"dtype\": \"U8\", \"shape\": [",
                       i == 1 ? EXPERTS : starts[i + 1] - starts[i], i == 1 ? ", 3], " : "], ");
            add_number(&header, "\"data_offsets\": [", starts[i], ", ");
            add_number(&header, "", starts[i + 1], "]}");
            add_text(&index, "\"");
            add_text(&index, name);
            add_text(&index, "\": \"model-00001-of-00001.safetensors\", ");
        }
        add_number(&config, layer ? ", \"l." : "\"l.", (uint64_t)layer, ".e\": {\"experts\": 3, \"projections\": [");
        for (int role = first; role < 3; role++) {
            char text[256];
            snprintf(text, sizeof text,
                     "%s{\"name\": \"%s\", \"role\": \"%s\", \"tensor\": \"l.{expert}.%s\", \"rows\": %d, \"columns\": %d}",
                     role > first ? ", " : "", roles[role], roles[role], roles[role], role == 2 ? 19 : 23,
                     role == 2 ? 23 : 19);
            add_text(&config, text);
        }
        add_number(&config, "], \"dtype\": \"BF16\", \"store_bytes\": ", starts[1] - starts[0], "");
        add_number(&config, ", \"dictionaries_bytes\": ", dictionary_size, "}");
        if (layer + 1 < LAYERS) { /* up to the next store's alignment: a tensor, since there may be no hole */
            size_t start = body.size;
            align(&body, 256, 1);
            add_number(&header, ", \"norm\": {\"dtype\": \"U8\", \"shape\": [1, ", body.size - start, "], ");
            add_number(&header, "\"data_offsets\": [", start, ", ");
            add_number(&header, "", body.size, "]}");
        }
    }
    size_t start = body.size;
    add_text(&body, "dense frame");
    add_number(&header, ", \"embed.qmoe_zstd\": {\"dtype\": \"U8\", \"shape\": [11], \"data_offsets\": [", start, ", ");
    add_number(&header, "", body.size, "]}}");
    add_text(&index, "\"norm\": \"model-00001-of-00001.safetensors\", "
                     "\"embed.qmoe_zstd\": \"model-00001-of-00001.safetensors\"}}");
    add_text(&config, "}, \"dense_zstd\": {\"embed\": 11}}}");
    header.size += 8; /* the size comes first */
    memmove(header.data + 8, header.data, header.size - 8);
    align(&header, 256, ' ');
    uint64_t header_size = header.size - 8;
    memcpy(header.data, &header_size, 8);
    add_bytes(&shard, header.data, header.size);
    add_bytes(&shard, body.data, body.size);
    free(header.data);
    free(body.data);
    qmoe_dictionary_close(dictionary);
    const growing made[FILES] = {{room(CAPACITY), 0}, config, index, shard};
    for (int i = 0; i < FILES; i++) {
        files[i].data = made[i].data;
        files[i].size = made[i].size;
    }
}

/* The manifest, as write_manifest has it on disk. */
static void make_manifest(void) {
    uint32_t sizes[FILES];
    for (int i = 0; i < FILES; i++) {
        sizes[i] = (uint32_t)files[i].size;
    }
    write_manifest(sizes);
    char path[sizeof folder + 64];
    file_path(path, sizeof path, file_names[MANIFEST]);
    FILE *file = fopen(path, "rb");
    require(file, "the manifest is there");
    files[MANIFEST].size = fread(files[MANIFEST].data, 1, CAPACITY, file);
    fclose(file);
}

/* ---- mutations ---- */

/* Put `new` in the place of `gone` bytes at `at`; gives the size afterwards. */
static size_t splice(uint8_t *data, size_t size, size_t at, size_t gone, const void *new, size_t added) {
    if (at > size || gone > size - at || size - gone + added > CAPACITY) {
        return size;
    }
    uint8_t *copy = room(added);
    memcpy(copy, new, added);
    memmove(data + at + added, data + at + gone, size - at - gone);
    memcpy(data + at, copy, added);
    free(copy);
    return size - gone + added;
}

static bool is_word(uint8_t byte) { /* of a number or a bare word */
    return (byte >= '0' && byte <= '9') || byte == '-' || byte == '.' || (byte >= 'a' && byte <= 'z');
}

static size_t mutate_json(uint8_t *text, size_t size, uint64_t *random) {
    static const char *const pieces[] = {"0", "-1", "1", "2", "3", "255", "256", "1e2", "1.0", "-0", "16777217",
                                         "9223372036854775807", "9223372036854775808", "18446744073709551616", "null",
                                         "true", "NaN", "Infinity", "{}", "[]", "[0]", "\"\"", "\"a\"", "\"U8\"", "\"F4\"",
                                         "\"gate\"", "\"\\u0061\"", "\"\\ud83d\\ude00\"", "\"\\ud83d\"", "\\u0000", "\\",
                                         "\"", "{", "}", "[", "]", ",", ":", " ", "\n", "\xC3\xA9", "\xED\xA0\x80", "\xFF",
                                         "\"1.9\"", "\"2.0\"", "../", "..", "/", ".qmoe_store", ".qmoe_zstd"};
    const char *piece = pieces[below(random, sizeof pieces / sizeof *pieces)];
    size_t at = below(random, size + 1), gone = below(random, 1u << below(random, 6));
    switch (below(random, 9)) {
    case 0:
        if (at < size) {
            text[at] ^= (uint8_t)(1u << below(random, 8));
        }
        return size;
    case 1: /* a number or a word */
    case 2:
    case 3: {
        while (at < size && !is_word(text[at])) {
            at++;
        }
        while (at > 0 && is_word(text[at - 1])) {
            at--;
        }
        for (gone = 0; at + gone < size && is_word(text[at + gone]); gone++) {
        }
        return splice(text, size, at, gone, piece, strlen(piece));
    }
    case 4:
        return splice(text, size, at, gone, "", 0);
    case 5: { /* a piece from elsewhere */
        size_t from = below(random, size), some = 1 + below(random, 120);
        some = some < size - from ? some : size - from;
        return splice(text, size, at, below(random, 2) ? 0 : gone, text + from, some);
    }
    case 6: {
        char nested[512];
        size_t depth = below(random, sizeof nested);
        memset(nested, below(random, 2) ? '[' : '{', sizeof nested);
        return splice(text, size, at, 0, nested, depth);
    }
    case 7:
        return below(random, 4) ? splice(text, size, at, 0, piece, strlen(piece)) : at;
    default:
        return splice(text, size, at, gone < strlen(piece) ? gone : strlen(piece), piece, strlen(piece));
    }
}

/* A field of a frame, with checksums that fit afterwards; or any word; or the length. */
static size_t mutate_body(uint8_t *data, size_t start, size_t size, uint64_t *random) {
    static const int64_t numbers[] = {0, 1, -1, -2, 255, 256, 512, INT64_MAX, INT64_MIN, INT64_C(1) << 40};
    size_t at = start + below(random, size - start) / 8 * 8;
    uint32_t kind = below(random, 8);
    if (kind < 3) { /* the next frame */
        for (; at + 64 <= size; at += 8) {
            if (memcmp(data + at, "QMXM", 4) == 0) {
                uint64_t body;
                data[at + 4 + below(random, 56)] ^= (uint8_t)(1u << below(random, 8));
                memcpy(&body, data + at + 32, 8);
                if (body <= size - at - 64) {
                    if (kind == 1 && body) {
                        data[at + 64 + below(random, body)] ^= (uint8_t)(1u << below(random, 8));
                    }
                    uint32_t crc = qmoe_crc32c(0, data + at + 64, (size_t)body);
                    memcpy(data + at + 56, &crc, 4);
                }
                uint32_t crc = qmoe_crc32c(0, data + at, 60);
                memcpy(data + at + 60, &crc, 4);
                return size;
            }
        }
        return size;
    }
    if (kind < 5) { /* an expert's offset, size or tokens */
        at = start + index_starts[below(random, LAYERS)] + 8 * below(random, 3 * EXPERTS);
    }
    if (kind < 6 && at + 8 <= size) {
        int64_t number = numbers[below(random, sizeof numbers / sizeof *numbers)];
        if (below(random, 2)) {
            memcpy(&number, data + at, 8);
            number = (int64_t)((uint64_t)number + below(random, 1025) - 512);
        }
        memcpy(data + at, &number, 8);
        return size;
    }
    if (kind == 6) {
        return start + below(random, size - start + 1);
    }
    return splice(data, size, at, 0, data, below(random, 300));
}

static size_t mutate_shard(uint8_t *data, size_t size, uint64_t *random) {
    uint64_t header_size;
    memcpy(&header_size, data, 8);
    if (header_size > size - 8) {
        return size;
    }
    if (below(random, 3) == 0) {
        return mutate_body(data, 8 + (size_t)header_size, size, random);
    }
    uint8_t *header = room(CAPACITY);
    memcpy(header, data + 8, (size_t)header_size);
    size_t after = (size_t)header_size;
    while (after && header[after - 1] == ' ') {
        after--;
    }
    after = mutate_json(header, after, random);
    while (after < CAPACITY && (8 + after) % 256 && below(random, 1000)) {
        header[after++] = ' ';
    }
    size = splice(data, size, 8, (size_t)header_size, header, after);
    header_size = below(random, 50) ? after : draw(random) >> below(random, 64);
    memcpy(data, &header_size, 8);
    free(header);
    return size;
}

static size_t make_input(uint8_t *input, uint64_t *random) {
    input_header header = {.sign = below(random, 6) > 0, .limit = below(random, 4) ? 0 : 1 + below(random, 1u << below(random, 22))};
    size_t size = sizeof header;
    uint32_t chosen = below(random, 7), turns = below(random, 16) ? 1 + below(random, 2) : 0;
    uint32_t target = chosen == 0 ? MANIFEST : chosen < 3 ? CONFIG : chosen == 3 ? INDEX : SHARD;
    header.sign = target == MANIFEST ? 0 : header.sign;
    for (uint32_t i = 0; i < FILES; i++) {
        memcpy(input + size, files[i].data, files[i].size);
        size_t after = files[i].size;
        for (uint32_t turn = 0; i == target && turn < turns; turn++) {
            after = i == SHARD ? (after < 8 ? after : mutate_shard(input + size, after, random))
                               : mutate_json(input + size, after, random);
        }
        header.sizes[i] = (uint32_t)after;
        size += after;
    }
    memcpy(input, &header, sizeof header);
    return size;
}

/* ---- threads ---- */

enum { USERS = 4, TURNS = 40 };

static void *use_shared(void *model) {
    for (int turn = 0; turn < TURNS; turn++) {
        use_model(model);
    }
    return NULL;
}

static void share_among_threads(void) {
    for (unsigned options = 0; options <= QMOE_READ; options += QMOE_READ) {
        qmoe_model *model;
        require(qmoe_model_open(folder, options, 0, &model, NULL) == QMOE_OK, "the model opens");
        pthread_t users[USERS];
        for (int i = 0; i < USERS; i++) {
            require(pthread_create(users + i, NULL, use_shared, model) == 0, "a thread starts");
        }
        for (int i = 0; i < USERS; i++) {
            pthread_join(users[i], NULL);
        }
        qmoe_model_close(model);
    }
}

/* ---- the program ---- */

static size_t read_file(const char *path, uint8_t *data, size_t most) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        fprintf(stderr, "fuzz_model: %s cannot be read\n", path);
        exit(2);
    }
    size_t size = fread(data, 1, most, file);
    fclose(file);
    return size;
}

int main(int argument_count, char **arguments) {
    bool replay = argument_count > 2 && strcmp(arguments[1], "replay") == 0;
    bool threads = argument_count == 3 && strcmp(arguments[1], "threads") == 0;
    if (!replay && !threads && argument_count != 4) {
        fprintf(stderr, "usage: fuzz_model SECONDS SEED DICTIONARY | replay FINDING... | threads DICTIONARY\n");
        return 2;
    }
    signal(SIGALRM, hangs);
    signal(SIGABRT, keep_input);
    signal(SIGBUS, keep_input);
    enum { MOST_INPUT = (FILES + 2) * CAPACITY };
    uint8_t *input = room(MOST_INPUT);
    if (replay) {
        for (int i = 2; i < argument_count; i++) {
            LLVMFuzzerTestOneInput(input, read_file(arguments[i], input, MOST_INPUT));
        }
        free(input);
        return 0;
    }
    double start = seconds(), limit = threads ? 0 : strtod(arguments[1], NULL);
    uint64_t random = threads ? 1 : strtoull(arguments[2], NULL, 10);
    size_t dictionary_size = read_file(arguments[argument_count - 1], input, CAPACITY / 4);
    make_folder();
    atexit(remove_folder);
    make_model(input, dictionary_size, &random);
    make_manifest();
    for (int i = 0; i < FILES; i++) {
        write_file(file_names[i], files[i].data, files[i].size);
    }
    /* Sound before it is changed: or nothing is tested. */
    require(open_and_use(folder, 0, 0) == QMOE_OK && experts == 2 * LAYERS * EXPERTS, "the model is sound");
    if (threads) {
        share_among_threads();
        printf("fuzz_model: no fault among threads\n");
    }
    memset(&counts, 0, sizeof counts);
    executions = 0;
    experts = 0;
    while (seconds() - start < limit) {
        alarm(HANG_SECONDS);
        size_t size = make_input(input, &random);
        uint8_t *exact = room(size);
        memcpy(exact, input, size);
        LLVMFuzzerTestOneInput(exact, size);
        free(exact);
    }
    alarm(0);
    free(input);
    for (int i = 0; i < FILES; i++) {
        free(files[i].data);
    }
    if (!threads) {
        printf("{\"seconds\": %.0f, \"executions\": %" PRIu64 ", \"opened\": %" PRIu64 ", \"refused\": %" PRIu64
               ", \"shards\": %" PRIu64 ", \"experts\": %" PRIu64 ", \"limited\": %" PRIu64 "}\n",
               seconds() - start, executions, counts.opened, counts.refused, counts.shards, (uint64_t)experts,
               counts.limited);
    }
    return 0;
}

#endif
