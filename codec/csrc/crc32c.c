/* CRC-32C (spec 1), eight bytes at a time by tables, or by the processor's own instruction. */
#include "internal.h"

#if defined(__x86_64__)
#include <nmmintrin.h>

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
        return ~crc32c_sse42(~value, data, size);
    }
#endif
    return ~crc32c_portable(~value, data, size);
}
