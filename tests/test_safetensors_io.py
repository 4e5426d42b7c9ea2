"""The strict reader and the streaming writer of safetensors files."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from packed_models import join

from qmoe_format import (
    ArgumentError,
    ChecksumError,
    FormatError,
    HeaderError,
    QMoEError,
    SizeError,
    TruncatedError,
)
from qmoe_format.safetensors_io import DTYPE_BITS, SafetensorsFile, SafetensorsWriter, tensor_bytes

NUMPY = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1"}


def entry(begin: object, end: object, dtype: object = "U8", shape: object = None) -> dict[str, Any]:
    if shape is None:
        shape = [end - begin]  # type: ignore[operator]
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors = {name: np.arange(6, dtype=kind).reshape(2, 3) for name, kind in NUMPY.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "a", metadata={"format": "np"})
    with SafetensorsFile(tmp_path / "a") as file:
        assert file.metadata == {"format": "np"}
        assert file.tensors.keys() == tensors.keys()
        for name, value in tensors.items():
            assert file.tensors[name].dtype == name
            assert file.tensors[name].shape == (2, 3)
            assert file.data(name) == value.tobytes()
            assert file.data(name).readonly


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(tensors=st.lists(st.tuples(st.sampled_from(sorted(NUMPY)), shapes), max_size=8), data=st.data())
def test_the_safetensors_library_reads_what_the_writer_writes(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[str, tuple[int, ...]]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("files") / "a"
    writer = SafetensorsWriter(path, 2048)
    expected = {}
    for number, (dtype, shape) in enumerate(tensors):
        content = data.draw(
            st.binary(min_size=tensor_bytes(dtype, shape), max_size=tensor_bytes(dtype, shape))
        )
        writer.begin(f"tensor.{number}", len(shape))
        writer.write(content[:3])
        writer.write(content[3:])
        writer.end(dtype, shape)
        expected[f"tensor.{number}"] = (dtype, shape, content)
    record = writer.close()
    assert record.nbytes == path.stat().st_size
    loaded = dict(safetensors.deserialize(path.read_bytes()))
    with SafetensorsFile(path) as file:
        assert file.data_start == 2048
        for name, (dtype, shape, content) in expected.items():
            assert bytes(file.data(name)) == content
            assert (loaded[name]["dtype"], tuple(loaded[name]["shape"])) == (dtype, shape)
            assert bytes(loaded[name]["data"]) == content
        assert loaded.keys() == file.tensors.keys() == expected.keys()


FAULTS: dict[str, tuple[bytes, type[FormatError]]] = {
    "empty": (b"", TruncatedError),
    "seven bytes": (bytes(7), TruncatedError),
    "no header": (bytes(8), HeaderError),
    "header longer than the file": (struct.pack("<Q", 1000) + b"{}", TruncatedError),
    "header longer than allowed": (struct.pack("<Q", 100_000_001) + b"{}", HeaderError),
    "header size of 2^64 - 1": (b"\xff" * 8 + b"{}", HeaderError),
    "not JSON": (join(b"{nonsense}", b""), HeaderError),
    "a list": (join(b"[]", b""), HeaderError),
    "space before the brace": (join(b" {}", b""), HeaderError),
    "not UTF-8": (join(b'{"\xff": 1}', b""), HeaderError),
    "nested without end": (join(b'{"a":' * 100_000, b""), HeaderError),
    "number of 5000 digits": (join(b'{"a": ' + b"9" * 5000 + b"}", b""), HeaderError),
    "duplicate tensor": (
        join(b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 1)).encode(),) * 2), b"x"),
        HeaderError,
    ),
    "duplicate key in a tensor": (
        join(b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"x"),
        HeaderError,
    ),
    "metadata not an object": (join({"__metadata__": ["a"]}, b""), HeaderError),
    "metadata not strings": (join({"__metadata__": {"a": 1}}, b""), HeaderError),
    "entry not an object": (join({"a": 1}, b""), HeaderError),
    "entry without a key": (join({"a": {"dtype": "U8", "shape": [1]}}, b"x"), HeaderError),
    "entry with a key too many": (join({"a": {**entry(0, 1), "stride": 1}}, b"x"), HeaderError),
    "unknown dtype": (join({"a": entry(0, 1, "U9")}, b"x"), HeaderError),
    "dtype in lower case": (join({"a": entry(0, 1, "u8")}, b"x"), HeaderError),
    "dtype not a string": (join({"a": entry(0, 1, ["U8"])}, b"x"), HeaderError),
    "shape not a list": (join({"a": entry(0, 1, shape=1)}, b"x"), HeaderError),
    "negative dimension": (join({"a": entry(0, 1, shape=[-1, -1])}, b"x"), HeaderError),
    "float dimension": (join({"a": entry(0, 1, shape=[1.0])}, b"x"), HeaderError),
    "bool dimension": (join({"a": entry(0, 1, shape=[True])}, b"x"), HeaderError),
    "dimension in a string": (join({"a": entry(0, 1, shape=["1"])}, b"x"), HeaderError),
    "product that wraps to 1": (join({"a": entry(0, 1, shape=[(1 << 64) + 1])}, b"x"), HeaderError),
    "product that wraps to 0": (join({"a": entry(0, 0, shape=[1 << 32, 1 << 32])}, b""), HeaderError),
    "a thousand dimensions": (join({"a": entry(0, 1, shape=[1] * 1000)}, b"x"), HeaderError),
    "half a byte": (join({"a": entry(0, 1, "F4", [1])}, b"x"), HeaderError),
    "three offsets": (join({"a": {**entry(0, 1), "data_offsets": [0, 1, 1]}}, b"x"), HeaderError),
    "offsets not a list": (join({"a": {**entry(0, 1), "data_offsets": "01"}}, b"x"), HeaderError),
    "negative offset": (join({"a": {**entry(0, 1), "data_offsets": [-1, 0]}}, b"x"), HeaderError),
    "float offset": (join({"a": {**entry(0, 1), "data_offsets": [0, 1.0]}}, b"x"), HeaderError),
    "bool offset": (join({"a": {**entry(0, 1), "data_offsets": [False, 1]}}, b"x"), HeaderError),
    "infinite offset": (
        join(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,Infinity]}}', b"x"),
        HeaderError,
    ),
    "offsets that fall": (join({"a": {**entry(0, 1), "data_offsets": [1, 0]}}, b"x"), HeaderError),
    "offset beyond 64 bits": (join({"a": entry(1 << 64, (1 << 64) + 1)}, b"x"), HeaderError),
    "extent unlike the shape": (join({"a": entry(0, 2, shape=[1])}, b"xx"), SizeError),
    "extent unlike the dtype": (join({"a": entry(0, 2, "F32", [1])}, b"xx"), SizeError),
    "overlap": (join({"a": entry(0, 2), "b": entry(1, 3)}, b"xxx"), SizeError),
    "two tensors in one place": (join({"a": entry(0, 2), "b": entry(0, 2)}, b"xx"), SizeError),
    "hole": (join({"a": entry(0, 1), "b": entry(2, 3)}, b"xxx"), SizeError),
    "hole at the start": (join({"a": entry(1, 2)}, b"xx"), SizeError),
    "extent past the end": (join({"a": entry(0, 9)}, b"xx"), TruncatedError),
    "huge extent": (join({"a": entry(0, 1 << 62)}, b"xx"), TruncatedError),
    "trailing byte": (join({"a": entry(0, 1)}, b"xx"), SizeError),
    "trailing byte without tensors": (join({}, b"x"), SizeError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_refuses(tmp_path: Path, fault: str) -> None:
    content, error = FAULTS[fault]
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(tmp_path / "a")
    assert type(caught.value) is error
    assert str(tmp_path / "a") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, error in (("absent", TruncatedError), ("pipe", HeaderError), (".", QMoEError)):
        with pytest.raises(error):
            SafetensorsFile(tmp_path / name)


def example() -> bytes:
    header = {"__metadata__": {"format": "pt"}, "a": entry(0, 6, "F16", [3, 1]), "b": entry(6, 9)}
    return join(header, b"123456789", align=8)


def test_refuses_every_truncation(tmp_path: Path) -> None:
    whole = example()
    for size in range(len(whole)):
        (tmp_path / "a").write_bytes(whole[:size])
        with pytest.raises(TruncatedError):
            SafetensorsFile(tmp_path / "a")


@given(
    flips=st.lists(st.tuples(st.integers(0, len(example()) - 1), st.integers(1, 255)), min_size=1, max_size=4)
)
def test_any_bytes_give_an_error_or_tensors_within_the_file(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(example())
    for place, change in flips:
        content[place] ^= change
    path = tmp_path_factory.mktemp("files") / "a"
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except FormatError:
        return
    assert sum(len(file.data(name)) for name in file.tensors) == len(content) - file.data_start


def test_views_outlive_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(example())
    with SafetensorsFile(tmp_path / "a") as file:
        view = file.data("b")
        with pytest.raises(ArgumentError, match="no such tensor"):
            file.data("c")
    assert view == b"789"
    with pytest.raises(ArgumentError, match="closed"):
        file.data("b")


def test_sizes_of_tensors() -> None:
    assert tensor_bytes("F4", (3, 2)) == 3
    assert tensor_bytes("F6_E2M3", (4,)) == 3
    assert tensor_bytes("BF16", ()) == 2
    assert tensor_bytes("F64", (1 << 62, 0, 1 << 62)) == 0
    assert set(DTYPE_BITS.values()) == {4, 6, 8, 16, 32, 64}


def test_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="header_bytes"):
        SafetensorsWriter(tmp_path / "b", 100)
    writer = SafetensorsWriter(tmp_path / "a", 512)
    writer.add("a", "U8", (2,), b"12")
    with pytest.raises(ArgumentError, match="written twice"):
        writer.add("a", "U8", (2,), b"12")
    with pytest.raises(ArgumentError, match="contradict"):
        writer.add("b", "F32", (2,), b"12")
    assert not writer.has_room("c" * 400, 1)
    with pytest.raises(ArgumentError, match="no room"):
        writer.add("c" * 400, "U8", (2,), b"12")
    writer.abort()
    with pytest.raises(FormatError):
        SafetensorsFile(tmp_path / "a")


def test_writer_will_not_write_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"precious")
    with pytest.raises(QMoEError, match="exists"):
        SafetensorsWriter(tmp_path / "a", 256)
    assert (tmp_path / "a").read_bytes() == b"precious"


@pytest.mark.parametrize("damage", ["flip", "cut", "grow"])
def test_writer_notices_when_the_disk_gives_back_something_else(tmp_path: Path, damage: str) -> None:
    writer = SafetensorsWriter(tmp_path / "a", 256)
    writer.add("a", "U8", (1000,), bytes(1000))
    with open(tmp_path / "a", "r+b") as stream:
        if damage == "flip":
            stream.seek(700)
            stream.write(b"x")
        else:
            stream.truncate(1000 if damage == "cut" else 2000)
    with pytest.raises(ChecksumError, match="the disk gives back"):
        writer.close()
