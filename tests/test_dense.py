"""Dense frames: lossless, bounded, and every fault of spec 5 told apart."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from qmoe_codec import crc32c

from qmoe_format import (
    ArgumentError,
    ChecksumError,
    FormatError,
    HeaderError,
    MagicError,
    PayloadError,
    SizeError,
    TruncatedError,
    VersionError,
)
from qmoe_format.dense import HEADER, can_encode, decode_dense, encode_dense, read_dense_header

SIZES = {"BOOL": 1, "U8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "I64": 8, "C64": 8}


@given(
    dtype=st.sampled_from(sorted(SIZES)),
    shape=st.lists(st.integers(0, 6), max_size=8).map(tuple),
    data=st.data(),
)
def test_round_trip(dtype: str, shape: tuple[int, ...], data: st.DataObject) -> None:
    size = math.prod(shape) * SIZES[dtype]
    content = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 4, size, np.uint8).tobytes()
    frame = encode_dense(dtype, shape, content)
    assert decode_dense(frame) == (dtype, shape, content)
    header = read_dense_header(frame)
    assert (header.nbytes, header.frame_size) == (size, len(frame))


def test_planes_are_what_the_spec_says() -> None:
    frame = encode_dense("BF16", (2, 2), bytes(range(8)))
    first, second = struct.unpack_from("<2Q", frame, 88)
    assert zstandard.decompress(frame[160 : 160 + first]) == bytes([0, 2, 4, 6])
    assert zstandard.decompress(frame[160 + first : 160 + first + second]) == bytes([1, 3, 5, 7])
    assert frame[12:20] == b"BF16\0\0\0\0"
    assert struct.unpack_from("<I", frame, 20) == (crc32c(bytes(range(8))),)
    assert len(frame) == 160 + first + second


def test_trained_weights_get_smaller() -> None:
    weights = np.random.default_rng(0).normal(0, 0.02, 50_000).astype("<f4")
    bf16 = (weights.view("<u4") >> 16).astype("<u2").tobytes()
    assert len(encode_dense("BF16", (50_000,), bf16)) < 0.75 * len(bf16)


def test_refuses_to_encode() -> None:
    with pytest.raises(ArgumentError, match="data"):
        encode_dense("BF16", (3,), bytes(5))
    with pytest.raises(ArgumentError, match="dtype"):
        encode_dense("F4", (4,), bytes(2))
    with pytest.raises(ArgumentError, match="dtype"):
        encode_dense("float", (4,), bytes(2))
    with pytest.raises(ArgumentError, match="dense frame"):
        encode_dense("U8", (1,) * 9, bytes(1))
    assert not can_encode("F8_E4M3FNUZ", (2,))  # its name has more than eight letters
    assert not can_encode("U8", (1 << 20, 1 << 20))


CONTENT = np.random.default_rng(3).integers(0, 3, 96, np.uint8).tobytes()
SHAPE = (6, 4)


def build(planes: list[bytes] | None = None, content: bytes = CONTENT, **change: object) -> bytes:
    """A frame of float32 [6, 4] with some fields of the header set otherwise, its checksum right."""
    if planes is None:
        planes = [zstandard.compress(content[plane::4]) for plane in range(4)]
    fields: dict[str, object] = {
        "magic": b"QMXZ", "major": 1, "minor": 0, "element_size": 4, "dimension_count": 2, "flags": 0,
        "dtype": b"F32", "content_crc32c": crc32c(content), "shape": [*SHAPE, *[0] * 6],
        "plane_sizes": [*map(len, planes), *[0] * 4], "reserved": 0,
    }  # fmt: skip
    assert change.keys() <= fields.keys()
    flat = [
        x for value in (fields | change).values() for x in (value if isinstance(value, list) else [value])
    ]
    header = HEADER.pack(*flat, 0)[:-4]
    return header + struct.pack("<I", crc32c(header)) + b"".join(planes)


def plane(size: int = 24) -> bytes:
    return zstandard.compress(bytes(size))


def untold(size: int) -> bytes:
    """A plane that does not say its size."""
    return zstandard.ZstdCompressor(write_content_size=False).compress(bytes(size))


def planes(last: bytes) -> list[bytes]:
    return [zstandard.compress(CONTENT[number::4]) for number in range(3)] + [last]


FAULTS: dict[str, tuple[Callable[[], bytes], type[FormatError]]] = {
    "empty": (lambda: b"", TruncatedError),
    "half a header": (lambda: build()[:159], TruncatedError),
    "magic": (lambda: build(magic=b"QMXM"), MagicError),
    "major version": (lambda: build(major=2), VersionError),
    "header checksum": (lambda: build()[:156] + b"\0\0\0\0" + build()[160:], ChecksumError),
    "flags": (lambda: build(flags=1), VersionError),
    "element size 3": (lambda: build(element_size=3), HeaderError),
    "element size 0": (lambda: build(element_size=0), HeaderError),
    "nine dimensions": (lambda: build(dimension_count=9), HeaderError),
    "unknown dtype": (lambda: build(dtype=b"Q32"), HeaderError),
    "dtype of another size": (lambda: build(dtype=b"BF16"), HeaderError),
    "dtype with a zero inside": (lambda: build(dtype=b"F3\0002"), HeaderError),
    "dtype not ASCII": (lambda: build(dtype=b"\xff32"), HeaderError),
    "dimension beyond the count": (lambda: build(shape=[6, 4, 1, 0, 0, 0, 0, 0]), HeaderError),
    "2^40 elements": (lambda: build(shape=[1 << 20, 1 << 20, *[0] * 6]), HeaderError),
    "elements that wrap to 24": (lambda: build(shape=[(1 << 63) + 12, 2, *[0] * 6]), HeaderError),
    "plane beyond the element size": (lambda: build(plane_sizes=[1, 1, 1, 1, 1, 0, 0, 0]), HeaderError),
    "reserved": (lambda: build(reserved=1), HeaderError),
    "planes cut": (lambda: build()[:-1], TruncatedError),
    "huge plane": (lambda: build(plane_sizes=[(1 << 64) - 1, 1, 1, 1, 0, 0, 0, 0]), TruncatedError),
    "byte after the planes": (lambda: build() + b"\0", SizeError),
    "plane not Zstandard": (lambda: build(planes(b"nonsense" * 4)), PayloadError),
    "empty plane": (lambda: build(planes(b"")), PayloadError),
    "plane cut": (lambda: build(planes(plane()[:-1])), PayloadError),
    "plane too short": (lambda: build(planes(plane(23))), PayloadError),
    "plane too long": (lambda: build(planes(plane(25))), PayloadError),
    "plane too long, size untold": (lambda: build(planes(untold(1 << 20))), PayloadError),
    "plane too short, size untold": (lambda: build(planes(untold(9))), PayloadError),
    "two frames in a plane": (lambda: build(planes(plane() + plane(0))), PayloadError),
    "more elements than bytes can give": (
        lambda: build([b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 39) + b"\1\0\0"] * 4,
                      shape=[1 << 39, 1, *[0] * 6]),
        PayloadError,
    ),
    "content checksum": (lambda: build(content_crc32c=1), ChecksumError),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_refuses(fault: str) -> None:
    make, error = FAULTS[fault]
    with pytest.raises(FormatError) as caught:
        decode_dense(make())
    assert type(caught.value) is error, str(caught.value)
    assert caught.value.field


def test_accepts_other_frames_that_are_legal() -> None:
    assert decode_dense(build()) == ("F32", SHAPE, CONTENT)
    assert decode_dense(build(minor=9)) == ("F32", SHAPE, CONTENT)
    other = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True)
    frame = build([other.compress(CONTENT[number::4]) for number in range(4)])
    assert decode_dense(frame) == ("F32", SHAPE, CONTENT)


def test_every_truncation_and_every_flipped_bit_is_noticed() -> None:
    frame = encode_dense("BF16", (5, 3), CONTENT[:30])
    for size in range(len(frame)):
        with pytest.raises(TruncatedError):
            decode_dense(frame[:size])
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            _, _, data = decode_dense(damaged)
        except FormatError:
            continue
        # A bit that Zstandard does not use may change; the content may not.
        assert data == CONTENT[:30]
        assert bit // 8 >= 160


@given(st.binary(max_size=400))
def test_any_bytes_give_a_typed_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_dense(data)
    with pytest.raises(FormatError):
        decode_dense(build(planes(data)))
