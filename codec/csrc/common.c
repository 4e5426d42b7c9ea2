/* Errors and number formats. */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>

const char *qmoe_version(void) { return "0.1.0"; }

void qmoe_free(void *memory) { free(memory); }

qmoe_status qmoe_fail(qmoe_error *error, qmoe_status status, const char *field, int64_t value, const char *expected) {
    if (error) {
        error->status = status;
        error->value = value;
        snprintf(error->field, sizeof error->field, "%s", field);
        snprintf(error->expected, sizeof error->expected, "%s", expected);
        error->place[0] = 0;
    }
    return status;
}

const char *qmoe_status_name(qmoe_status status) {
    static const char *const names[] = {"ok",   "truncated",  "magic", "version", "checksum", "header", "size",
                                        "dictionary", "index", "payload", "argument", "memory", "system"};
    return (size_t)status < sizeof names / sizeof *names ? names[status] : "unknown";
}

char *qmoe_error_message(const qmoe_error *error, char *message, size_t size) {
    const char *gap = error->place[0] ? ": " : "";
    if (error->status == QMOE_SYSTEM) { /* `expected` is then what the system says */
        snprintf(message, size, "%s%s%s: %s (error %lld)", error->place, gap, error->field, error->expected,
                 (long long)error->value);
    } else {
        snprintf(message, size, "%s%s%s: %s (found %lld, expected %s)", error->place, gap, error->field,
                 qmoe_status_name(error->status), (long long)error->value, error->expected);
    }
    return message;
}

static uint32_t bits_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

float qmoe_from_float16(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16;
    uint32_t rest = bits & 0x7FFF;
    if (rest < 0x0400) { /* zero or subnormal: exact as a multiple of 2^-24 */
        float magnitude = (float)rest * 0x1p-24f;
        return float_from_bits(bits_from_float(magnitude) | sign);
    }
    uint32_t exponent = rest >= 0x7C00 ? 0x7F800000u : (rest >> 10 << 23) + (112u << 23);
    return float_from_bits(sign | exponent | (rest & 0x3FF) << 13);
}

uint16_t qmoe_to_bfloat16(float value) {
    uint32_t bits = bits_from_float(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) {
        return (uint16_t)(bits >> 16 | 0x40); /* stays not-a-number */
    }
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

uint16_t qmoe_to_float16(float value) {
    uint32_t bits = bits_from_float(value);
    uint32_t sign = bits >> 16 & 0x8000;
    uint32_t rest = bits & 0x7FFFFFFF;
    if (rest >= 0x7F800000) {
        return (uint16_t)(sign | 0x7C00 | (rest > 0x7F800000 ? 0x200 : 0));
    }
    if (rest >= 0x477FF000) { /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7C00);
    }
    if (rest < 0x38800000) { /* below 2^-14: adding 0.5 rounds to a multiple of 2^-24 */
        return (uint16_t)(sign | (bits_from_float(float_from_bits(rest) + 0.5f) - bits_from_float(0.5f)));
    }
    return (uint16_t)(sign | ((rest - (112u << 23) + 0xFFF + (rest >> 13 & 1)) >> 13));
}
