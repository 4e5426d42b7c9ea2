/*
 * JSON (RFC 8259, and NaN, Infinity and -Infinity, which Python writes) checked once as a whole and then walked in
 * place: nothing is copied, so memory stays below twice the text's size whatever it holds.
 */
#ifndef QMOE_JSON_H
#define QMOE_JSON_H

#include "internal.h"

/* Deepest nesting of arrays and objects; that of the safetensors library's parser. */
enum { JSON_DEPTH = 128 };

/* A value as it stands in the text, quotation marks and braces included. */
typedef struct {
    const uint8_t *start, *end;
} json_value;

/*
 * Check that `text` is UTF-8 and one JSON value, and that no object in it has a key twice (QMOE_HEADER).
 * The functions below are for what has been checked.
 */
qmoe_status qmoe_json_check(const uint8_t *text, size_t size, json_value *value, qmoe_error *error);

static inline bool json_is_object(json_value value) { return *value.start == '{'; }
static inline bool json_is_array(json_value value) { return *value.start == '['; }
static inline bool json_is_string(json_value value) { return *value.start == '"'; }

/* A walk over an object or an array: `json_value rest = container; while (qmoe_json_member(&rest, …))`. */
bool qmoe_json_member(json_value *rest, json_value *key, json_value *value);
bool qmoe_json_element(json_value *rest, json_value *value);
size_t qmoe_json_count(json_value container); /* members or elements */

/* The value of a key of an object; false if it has none. */
bool qmoe_json_get(json_value object, const char *key, json_value *value);

/* Whether a value is an integer, without fraction or exponent, of 64 bits. */
bool qmoe_json_integer(json_value value, int64_t *integer);

/* A string's bytes, unescaped, in UTF-8: their number, at most that of the value. `bytes` may be NULL. */
size_t qmoe_json_bytes(json_value string, uint8_t *bytes);
bool qmoe_json_equals(json_value value, const char *text); /* false if it is no string */

#endif
