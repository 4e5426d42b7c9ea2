/* JSON: a strict check, and walks over what has been checked. */
#include "json.h"

#include <stdlib.h>

/* ---- strings ---- */

static unsigned hexadecimal(uint8_t digit) {
    if (digit >= '0' && digit <= '9') {
        return digit - '0' + 0u;
    }
    uint8_t letter = digit | 0x20;
    return letter >= 'a' && letter <= 'f' ? letter - 'a' + 10u : 16;
}

/* Four hexadecimal digits; 0x10000 or more if they are none. */
static uint32_t code_unit(const uint8_t *digits) {
    uint32_t unit = 0;
    for (unsigned i = 0; i < 4; i++) {
        unsigned digit = hexadecimal(digits[i]);
        unit = digit < 16 ? unit << 4 | digit : UINT32_C(0x10000000);
        if (digit > 15) {
            break;
        }
    }
    return unit;
}

static unsigned utf8(uint32_t point, uint8_t bytes[4]) {
    if (point < 0x80) {
        bytes[0] = (uint8_t)point;
        return 1;
    }
    if (point < 0x800) {
        bytes[0] = (uint8_t)(0xC0 | point >> 6);
        bytes[1] = (uint8_t)(0x80 | (point & 0x3F));
        return 2;
    }
    if (point < 0x10000) {
        bytes[0] = (uint8_t)(0xE0 | point >> 12);
        bytes[1] = (uint8_t)(0x80 | (point >> 6 & 0x3F));
        bytes[2] = (uint8_t)(0x80 | (point & 0x3F));
        return 3;
    }
    bytes[0] = (uint8_t)(0xF0 | point >> 18);
    bytes[1] = (uint8_t)(0x80 | (point >> 12 & 0x3F));
    bytes[2] = (uint8_t)(0x80 | (point >> 6 & 0x3F));
    bytes[3] = (uint8_t)(0x80 | (point & 0x3F));
    return 4;
}

/*
 * The next byte, or the bytes of the next escape, of a checked string; 0 at its end. Half a surrogate pair becomes
 * the three bytes that UTF-8 would have for it, which no text that was checked holds otherwise.
 */
static unsigned next_bytes(const uint8_t **at, uint8_t bytes[4]) {
    const uint8_t *text = *at;
    if (*text == '"') {
        return 0;
    }
    if (*text != '\\') {
        bytes[0] = *text;
        *at = text + 1;
        return 1;
    }
    static const char escapes[] = "b\bf\fn\nr\rt\t";
    for (const char *escape = escapes; *escape; escape += 2) {
        if (text[1] == (uint8_t)escape[0]) {
            bytes[0] = (uint8_t)escape[1];
            *at = text + 2;
            return 1;
        }
    }
    if (text[1] != 'u') {
        bytes[0] = text[1];
        *at = text + 2;
        return 1;
    }
    uint32_t point = code_unit(text + 2);
    text += 6;
    if (point >> 10 == 0xD800 >> 10 && text[0] == '\\' && text[1] == 'u') {
        uint32_t low = code_unit(text + 2);
        if (low >> 10 == 0xDC00 >> 10) {
            point = 0x10000 + ((point & 0x3FF) << 10 | (low & 0x3FF));
            text += 6;
        }
    }
    *at = text;
    return utf8(point, bytes);
}

/* Strings that were checked, from behind their quotation marks, in the order of their bytes. */
static int compare_strings(const uint8_t *a, const uint8_t *b) {
    while (*a == *b && *a != '\\') {
        if (*a == '"') {
            return 0;
        }
        a++;
        b++;
    }
    uint8_t bytes_a[4], bytes_b[4];
    unsigned count_a = 0, count_b = 0, done_a = 0, done_b = 0;
    for (;;) {
        if (done_a == count_a) {
            count_a = next_bytes(&a, bytes_a);
            done_a = 0;
        }
        if (done_b == count_b) {
            count_b = next_bytes(&b, bytes_b);
            done_b = 0;
        }
        if (!count_a || !count_b) {
            return (count_a > 0) - (count_b > 0);
        }
        int difference = bytes_a[done_a++] - bytes_b[done_b++];
        if (difference) {
            return difference;
        }
    }
}

/* For qsort: pointers to strings. */
static int compare_keys(const void *a, const void *b) {
    return compare_strings(*(const uint8_t *const *)a + 1, *(const uint8_t *const *)b + 1);
}

/* ---- the check ---- */

typedef struct {
    const uint8_t *text, *at, *end;
    const uint8_t **keys; /* of all objects that are open; those of the innermost come last */
    size_t key_count, key_room;
    qmoe_error *error;
} checker;

static qmoe_status refuse(const checker *check, const char *expected) {
    return qmoe_fail(check->error, QMOE_HEADER, "JSON, at byte", check->at - check->text, expected);
}

static bool is_continuation(const uint8_t *at, const uint8_t *end) { return at < end && *at >> 6 == 2; }

static qmoe_status check_utf8(checker *check) {
    while (check->at < check->end) {
        const uint8_t *at = check->at;
        uint32_t lead = *at++, least = 0, point = 0;
        unsigned more = 0;
        if (lead >= 0xF0) {
            more = 3, least = 0x10000, point = lead & 7;
        } else if (lead >= 0xE0) {
            more = 2, least = 0x800, point = lead & 15;
        } else if (lead >= 0xC0) {
            more = 1, least = 0x80, point = lead & 31;
        } else if (lead >= 0x80) {
            return refuse(check, "UTF-8");
        }
        for (unsigned i = 0; i < more; i++, at++) {
            if (!is_continuation(at, check->end)) {
                return refuse(check, "UTF-8");
            }
            point = point << 6 | (*at & 0x3F);
        }
        if (lead >= 0xF8 || point < least || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) {
            return refuse(check, "UTF-8");
        }
        check->at = at;
    }
    check->at = check->text;
    return QMOE_OK;
}

static bool is_space(uint8_t byte) { return byte == ' ' || byte == '\n' || byte == '\r' || byte == '\t'; }

static void skip_space(checker *check) {
    while (check->at < check->end && is_space(*check->at)) {
        check->at++;
    }
}

static bool take(checker *check, char wanted) {
    if (check->at < check->end && *check->at == (uint8_t)wanted) {
        check->at++;
        return true;
    }
    return false;
}

static bool take_word(checker *check, const char *word) {
    size_t size = strlen(word);
    if ((size_t)(check->end - check->at) < size || memcmp(check->at, word, size) != 0) {
        return false;
    }
    check->at += size;
    return true;
}

static qmoe_status check_string(checker *check) {
    if (!take(check, '"')) {
        return refuse(check, "a string");
    }
    while (check->at < check->end) {
        uint8_t byte = *check->at;
        size_t left = (size_t)(check->end - check->at);
        if (byte < 0x20) {
            return refuse(check, "no control character in a string");
        }
        if (byte == '\\') {
            bool known = left > 1 && check->at[1] && strchr("\"\\/bfnrt", check->at[1]);
            bool unit = left > 5 && check->at[1] == 'u' && code_unit(check->at + 2) < 0x10000;
            if (!known && !unit) {
                return refuse(check, "a known escape");
            }
            check->at += known ? 2 : 6;
            continue;
        }
        check->at++;
        if (byte == '"') {
            return QMOE_OK;
        }
    }
    return refuse(check, "the end of a string");
}

static bool take_digits(checker *check) {
    const uint8_t *start = check->at;
    while (check->at < check->end && *check->at >= '0' && *check->at <= '9') {
        check->at++;
    }
    return check->at > start;
}

static qmoe_status check_number(checker *check) {
    if (take_word(check, "NaN") || take_word(check, "Infinity") || take_word(check, "-Infinity")) {
        return QMOE_OK;
    }
    (void)take(check, '-');
    if (!take(check, '0') && !take_digits(check)) {
        return refuse(check, "a value");
    }
    if (take(check, '.') && !take_digits(check)) {
        return refuse(check, "digits");
    }
    if (take(check, 'e') || take(check, 'E')) {
        (void)(take(check, '+') || take(check, '-'));
        if (!take_digits(check)) {
            return refuse(check, "digits");
        }
    }
    return QMOE_OK;
}

static qmoe_status add_key(checker *check) {
    if (check->key_count == check->key_room) {
        size_t more = check->key_room ? 2 * check->key_room : 64;
        const uint8_t **keys = realloc(check->keys, more * sizeof *keys);
        if (!keys) {
            return qmoe_fail(check->error, QMOE_MEMORY, "JSON", (int64_t)more, "enough memory for the keys");
        }
        check->keys = keys;
        check->key_room = more;
    }
    check->keys[check->key_count++] = check->at;
    return QMOE_OK;
}

/* Keys from number `first` on are those of an object that ends. */
static qmoe_status check_keys(checker *check, size_t first) {
    size_t count = check->key_count - first;
    if (count > 1) {
        qsort(check->keys + first, count, sizeof *check->keys, compare_keys);
    }
    for (size_t i = first + 1; i < check->key_count; i++) {
        if (compare_keys(check->keys + i - 1, check->keys + i) == 0) {
            check->at = check->keys[i];
            return refuse(check, "no key twice");
        }
    }
    check->key_count = first;
    return QMOE_OK;
}

static qmoe_status check_value(checker *check, unsigned depth);

static qmoe_status check_object(checker *check, unsigned depth) {
    size_t first = check->key_count;
    qmoe_status status = QMOE_OK;
    skip_space(check);
    if (take(check, '}')) {
        return QMOE_OK;
    }
    do {
        skip_space(check);
        if ((status = add_key(check)) != QMOE_OK || (status = check_string(check)) != QMOE_OK) {
            return status;
        }
        skip_space(check);
        if (!take(check, ':')) {
            return refuse(check, "a colon");
        }
        if ((status = check_value(check, depth)) != QMOE_OK) {
            return status;
        }
    } while (take(check, ','));
    return take(check, '}') ? check_keys(check, first) : refuse(check, "a comma or a brace");
}

static qmoe_status check_array(checker *check, unsigned depth) {
    qmoe_status status;
    skip_space(check);
    if (take(check, ']')) {
        return QMOE_OK;
    }
    do {
        if ((status = check_value(check, depth)) != QMOE_OK) {
            return status;
        }
    } while (take(check, ','));
    return take(check, ']') ? QMOE_OK : refuse(check, "a comma or a bracket");
}

/* A value and the space around it, inside `depth` arrays and objects. */
static qmoe_status check_value(checker *check, unsigned depth) {
    qmoe_status status;
    skip_space(check);
    if (check->at == check->end) {
        return refuse(check, "a value");
    }
    bool nests = *check->at == '{' || *check->at == '[';
    if (nests && depth == JSON_DEPTH) {
        return refuse(check, "at most 128 levels");
    }
    if (take(check, '{')) {
        status = check_object(check, depth + 1);
    } else if (take(check, '[')) {
        status = check_array(check, depth + 1);
    } else if (*check->at == '"') {
        status = check_string(check);
    } else if (take_word(check, "true") || take_word(check, "false") || take_word(check, "null")) {
        status = QMOE_OK;
    } else {
        status = check_number(check);
    }
    skip_space(check);
    return status;
}

static void skip_value(const uint8_t **at);

qmoe_status qmoe_json_check(const uint8_t *text, size_t size, json_value *value, qmoe_error *error) {
    checker check = {.text = text, .at = text, .end = text + size, .error = error};
    qmoe_status status = check_utf8(&check);
    if (status == QMOE_OK) {
        status = check_value(&check, 0);
    }
    if (status == QMOE_OK && check.at < check.end) {
        status = refuse(&check, "nothing after the value");
    }
    free(check.keys);
    if (status == QMOE_OK) {
        while (is_space(*text)) {
            text++;
        }
        *value = (json_value){text, check.end};
        while (is_space(value->end[-1])) {
            value->end--;
        }
    }
    return status;
}

/* ---- walks ---- */

static void skip_string(const uint8_t **at) {
    const uint8_t *text = *at + 1;
    while (*text != '"') {
        text += *text == '\\' ? 2 : 1;
    }
    *at = text + 1;
}

/* To behind a value, which something else follows: only the outermost value may end with the text. */
static void skip_value(const uint8_t **at) {
    const uint8_t *text = *at;
    size_t depth = 0;
    do {
        switch (*text) {
        case '"':
            skip_string(&text);
            break;
        case '{':
        case '[':
            depth++;
            text++;
            break;
        case '}':
        case ']':
            depth--;
            text++;
            break;
        default:
            text++;
            while (!depth && *text != ',' && *text != '}' && *text != ']' && !is_space(*text)) {
                text++;
            }
        }
    } while (depth);
    *at = text;
}

/* To the next member or element; false at the end. */
static bool advance(json_value *rest) {
    const uint8_t *text = rest->start;
    if (text == rest->end) {
        return false;
    }
    do { /* the brace, or the comma */
        text++;
    } while (text < rest->end && is_space(*text));
    if (text == rest->end || *text == '}' || *text == ']') {
        rest->start = rest->end;
        return false;
    }
    rest->start = text;
    return true;
}

static json_value take_value(json_value *rest) {
    json_value value = {rest->start, rest->start};
    skip_value(&value.end);
    rest->start = value.end;
    while (is_space(*rest->start)) {
        rest->start++;
    }
    return value;
}

bool qmoe_json_member(json_value *rest, json_value *key, json_value *value) {
    if (!advance(rest)) {
        return false;
    }
    *key = take_value(rest);
    do { /* the colon */
        rest->start++;
    } while (is_space(*rest->start));
    *value = take_value(rest);
    return true;
}

bool qmoe_json_element(json_value *rest, json_value *value) {
    if (!advance(rest)) {
        return false;
    }
    *value = take_value(rest);
    return true;
}

size_t qmoe_json_count(json_value container) {
    json_value key, value;
    size_t count = 0;
    if (json_is_object(container)) {
        while (qmoe_json_member(&container, &key, &value)) {
            count++;
        }
    } else {
        while (qmoe_json_element(&container, &value)) {
            count++;
        }
    }
    return count;
}

bool qmoe_json_get(json_value object, const char *key, json_value *value) {
    json_value name;
    while (qmoe_json_member(&object, &name, value)) {
        if (qmoe_json_equals(name, key)) {
            return true;
        }
    }
    return false;
}

bool qmoe_json_integer(json_value value, int64_t *integer) {
    const uint8_t *at = value.start;
    bool negative = *at == '-';
    uint64_t magnitude = 0, limit = (uint64_t)INT64_MAX + negative;
    at += negative;
    if (at == value.end) {
        return false;
    }
    for (; at < value.end; at++) {
        if (*at < '0' || *at > '9') {
            return false;
        }
        uint64_t digit = *at - '0' + UINT64_C(0);
        if (magnitude > (limit - digit) / 10) {
            return false;
        }
        magnitude = 10 * magnitude + digit;
    }
    *integer = negative ? (magnitude > INT64_MAX ? INT64_MIN : -(int64_t)magnitude) : (int64_t)magnitude;
    return true;
}

size_t qmoe_json_bytes(json_value string, uint8_t *bytes) {
    const uint8_t *at = string.start + 1;
    uint8_t some[4];
    size_t size = 0;
    for (unsigned count; (count = next_bytes(&at, some)) > 0; size += count) {
        if (bytes) {
            memcpy(bytes + size, some, count);
        }
    }
    return size;
}

bool qmoe_json_equals(json_value value, const char *text) {
    if (!json_is_string(value)) {
        return false;
    }
    const uint8_t *at = value.start + 1;
    uint8_t some[4];
    for (unsigned count; (count = next_bytes(&at, some)) > 0; text += count) {
        for (unsigned i = 0; i < count; i++) { /* text[i] is only looked at while all before was equal, and not 0 */
            if (text[i] == 0 || (uint8_t)text[i] != some[i]) {
                return false;
            }
        }
    }
    return *text == 0;
}
