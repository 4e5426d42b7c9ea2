"""Where a flipped bit lies, told by how CRC-32C differs.

CRC-32C is linear: a flip of bit i among n changes it by x^(32 + n - 1 - i) modulo its polynomial, whatever
the data. The powers of x come back only after 2^31 - 1, so among fewer bits the change belongs to one place.
The place is a discrete logarithm, found with about 2 sqrt(n) steps (Shanks, 1971).
"""

from __future__ import annotations

import math

_POLYNOMIAL = 0x82F63B78  # reflected: bit 31 is x^0; the value itself is x^32
_PERIOD = (1 << 31) - 1


def _times_x(value: int, count: int) -> int:
    for _ in range(count):
        value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
    return value


def flipped_bit(size: int, stored: int, computed: int) -> int | None:
    """The one bit whose flip makes a CRC-32C differ.

    Parameters
    ----------
    size : int
        Bytes that the CRC covers.
    stored, computed : int
        The CRC-32C that was expected, and that of the bytes as they are.

    Returns
    -------
    int or None
        Number of the bit, from 0 as in the spec (bit 0 of byte 0 first). None where the two are equal,
        more than one bit differs, or there are so many bits that the place is not certain.
    """
    bits, change = 8 * size, stored ^ computed
    if change == 0 or not 0 < bits < _PERIOD:
        return None
    step = math.isqrt(bits) + 1
    small: dict[int, int] = {}  # change · x^k -> k
    value = change
    for k in range(step):
        small[value] = k
        value = _times_x(value, 1)
    # One step of x^step is linear, hence a sum over the bits of a value: a table for each of its bytes.
    images = [_times_x(1 << bit, step) for bit in range(32)]
    tables = [[0] * 256 for _ in range(4)]
    for place, table in enumerate(tables):
        for byte in range(1, 256):
            low = byte & -byte
            table[byte] = table[byte ^ low] ^ images[8 * place + low.bit_length() - 1]
    value = _POLYNOMIAL  # x^(32 + power)
    for power in range(0, bits + step, step):
        found = small.get(value)
        if found is not None and 0 <= power - found < bits:
            return bits - 1 - (power - found)
        value = (
            tables[0][value & 255]
            ^ tables[1][value >> 8 & 255]
            ^ tables[2][value >> 16 & 255]
            ^ tables[3][value >> 24]
        )
    return None
