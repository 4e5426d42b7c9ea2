/* CRC-32C (spec 1), eight bytes at a time by tables, or by the processor's own instruction. */
#include "internal.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#include <wmmintrin.h>

/*
 * Three parts side by side, since the instruction can begin every cycle but takes three. The CRC of one part is moved
 * past the n bytes behind it by a product with x^(8n - 33), which the instruction reduces. Bytes that come from memory
 * want long parts, so that they are fetched ahead: 0.06 ns a byte instead of 0.14 (Zen 4).
 */
typedef struct {
    size_t size;
    uint64_t past_one, past_two;
} part_size;
static const part_size long_part = {16384, 0x1DC403CC, 0x5AE703AB}, short_part = {1024, 0x170076FA, 0xA51B6135};

__attribute__((target("sse4.2,pclmul"))) static uint64_t move_past(uint64_t value, uint64_t factor) {
    __m128i product = _mm_clmulepi64_si128(_mm_cvtsi64_si128((int64_t)value), _mm_cvtsi64_si128((int64_t)factor), 0);
    return _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(product));
}

__attribute__((target("sse4.2,pclmul"))) static uint32_t crc32c_three(uint32_t value, const uint8_t *bytes,
                                                                      size_t threes, const part_size *part) {
    for (; threes; threes--, bytes += 3 * part->size) {
        uint64_t first = value, second = 0, third = 0;
        for (size_t i = 0; i < part->size; i += 8) {
            first = _mm_crc32_u64(first, load64(bytes + i));
            second = _mm_crc32_u64(second, load64(bytes + part->size + i));
            third = _mm_crc32_u64(third, load64(bytes + 2 * part->size + i));
        }
        value = (uint32_t)(move_past(first, part->past_two) ^ move_past(second, part->past_one) ^ third);
    }
    return value;
}

__attribute__((target("sse4.2"))) static uint32_t crc32c_sse42(uint32_t value, const uint8_t *bytes, size_t size) {
    uint64_t wide = value;
    for (; size >= 8; size -= 8, bytes += 8) {
        wide = _mm_crc32_u64(wide, load64(bytes));
    }
    value = (uint32_t)wide;
    for (; size; size--) {
        value = _mm_crc32_u8(value, *bytes++);
    }
    return value;
}
#endif

/* 16 entries: CRC of a nibble. Small enough to be a constant, fast enough where there is no instruction. */
static uint32_t crc32c_portable(uint32_t value, const uint8_t *bytes, size_t size) {
    static const uint32_t nibble[16] = {
        0x00000000, 0x105EC76F, 0x20BD8EDE, 0x30E349B1, 0x417B1DBC, 0x5125DAD3, 0x61C69362, 0x7198540D,
        0x82F63B78, 0x92A8FC17, 0xA24BB5A6, 0xB21572C9, 0xC38D26C4, 0xD3D3E1AB, 0xE330A81A, 0xF36E6F75,
    };
    for (; size; size--) {
        value ^= *bytes++;
        value = value >> 4 ^ nibble[value & 15];
        value = value >> 4 ^ nibble[value & 15];
    }
    return value;
}

uint32_t qmoe_crc32c(uint32_t value, const void *data, size_t size) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2")) {
        const uint8_t *bytes = data;
        value = ~value;
        if (__builtin_cpu_supports("pclmul")) {
            const part_size *const parts[2] = {&long_part, &short_part};
            for (unsigned k = 0; k < 2; k++) {
                size_t three = 3 * parts[k]->size, threes = size / three;
                value = crc32c_three(value, bytes, threes, parts[k]);
                bytes += threes * three;
                size -= threes * three;
            }
        }
        return ~crc32c_sse42(value, bytes, size);
    }
#endif
    return ~crc32c_portable(~value, data, size);
}
