"""The C library as another runtime uses it: what it reads, what it refuses, how it is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qmoe_codec
from c_library import READ, SKIP_BODY, STATUS, Model, RefusalError, function, open_everything
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_models import contents, edit_json, join, layer_spec, restore, sign, split, write_model
from qmoe_codec.core import library
from test_container import CONTAINER_FAULTS, MANIFEST_FAULTS
from test_safetensors_io import FAULTS

import qmoe_format
from qmoe_format import FormatError, QMoEError
from qmoe_format.container import natural_key
from qmoe_format.safetensors_io import SafetensorsFile

ROOT = Path(__file__).parents[1]
HEADER = ROOT / "codec" / "include" / "qmoe.h"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of twelve layers, so that their order shows."""
    return write_model(tmp_path_factory.mktemp("packed") / "model", layers=12, experts=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to be spoilt; whoever does so puts it right again."""
    return write_model(tmp_path_factory.mktemp("small") / "model", layers=2, experts=2)


# ---- what it reads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [0, READ])
def test_it_reads_what_the_python_reader_reads(packed: Path, options: int) -> None:
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    with Model(packed, options) as model, qmoe_format.open(packed) as expected:
        assert [model.layer(i).prefix.decode() for i in range(model.layer_count())] == list(expected.layers)
        assert list(expected.layers)[10].startswith("model.layers.10.")
        for number, (prefix, spec) in enumerate(expected.layers.items()):
            layer, info = expected.layer(prefix), model.layer(number)
            assert model.find_layer(prefix) == number
            assert (info.dtype, info.experts, info.projections) == (b"BF16", spec.experts, 3)
            assert (info.store_size, info.largest_record) == (len(layer.store), layer.index[:, 1].max())
            for k, projection in enumerate(spec.projections):
                got = model.projection(number, k)
                assert (got.name.decode(), got.role.decode(), got.tensor.decode(), got.rows, got.columns) == (
                    projection.name,
                    projection.role,
                    projection.tensor,
                    projection.rows,
                    projection.columns,
                )
            for expert in range(spec.experts):
                record = model.record(number, expert)
                assert [record.offset, record.size, record.tokens] == layer.index[expert].tolist()
                with model.expert(number, expert) as opened:
                    assert opened.record() == bytes(layer.record(expert))
                    for projection, matrix in zip(spec.projections, opened.matrices, strict=True):
                        reference = layer.matrix(expert, projection.name)
                        np.testing.assert_array_equal(matrix.decode(), reference.decode())
                        np.testing.assert_array_equal(matrix.levels(), reference.levels)
                        for dtype in ("float32", "bfloat16", "float16"):
                            weights = reference.dequantize(dtype)
                            if dtype != "float32":
                                weights = weights.view(np.uint16)
                            np.testing.assert_array_equal(matrix.dequantize(dtype), weights)
                        y = matrix.matmul(x[:, : matrix.columns])
                        np.testing.assert_array_equal(y, reference.matmul(x[:, : matrix.columns]))


def test_every_tensor_can_be_listed_and_read(packed: Path) -> None:
    with Model(packed) as model, qmoe_format.open(packed) as expected:
        tensors = {name: file for file in expected.shards.values() for name in file.tensors}
        assert [model.tensor(i).name.decode() for i in range(model.tensor_count())] == sorted(tensors)
        for number, name in enumerate(sorted(tensors)):
            info, file = model.tensor(number), tensors[name]
            assert model.find_tensor(name) == number
            assert info.dtype.decode() == file.tensors[name].dtype
            assert info.shard.decode() == file.path.name
            assert tuple(info.shape[: info.dimensions]) == file.tensors[name].shape
            assert info.offset == file.tensors[name].start
            data = bytes(file.data(name))
            assert model.read_tensor(number, 0, info.size) == data
            assert (
                model.read_tensor(number, info.size // 2, info.size - info.size // 2)
                == data[len(data) // 2 :]
            )
            with pytest.raises(RefusalError, match="bytes within the tensor"):
                model.read_tensor(number, 1, info.size)


@pytest.mark.parametrize("options", [0, READ])
def test_a_shard_can_be_read_alone(packed: Path, options: int) -> None:
    with qmoe_format.open(packed) as expected:
        layer = expected.layer(layer_spec(10).prefix)
        with Model(packed / layer.shard, options) as model:
            assert model.layer_count() == 1
            info = model.layer(0)
            assert (info.prefix.decode(), info.dtype, info.experts, info.projections) == (
                layer.spec.prefix,
                b"",
                2,
                3,
            )
            for number, projection in enumerate(layer.spec.projections):
                got = model.projection(0, number)
                assert (got.name, got.role, got.rows, got.columns) == (
                    b"",
                    b"",
                    projection.rows,
                    projection.columns,
                )
                with model.expert(0, 1) as expert:
                    trits = layer.matrix(1, projection.name).decode()
                    np.testing.assert_array_equal(expert.matrices[number].decode(), trits)


ODD_NAMES = ["a.10", "a.9", "a.010", "a.1²", "²", "٣.1", "10", "9", "a.", "a", "é1", "z9z10", "z9z9",
             "a." + "9" * 19, "a." + "1" * 20, "a." + "9" * 30, "\U0001f600", "\uffff"]  # fmt: skip


def test_layers_come_in_natural_order(small: Path, tmp_path: Path) -> None:
    with qmoe_format.open(small) as model:
        layer = model.layer(layer_spec(0).prefix)
        parts = {
            "qmoe_store": ("U8", bytes(layer.store)),
            "qmoe_index": ("I64", layer.index.tobytes()),
            "qmoe_dictionaries": ("U8", bytes(layer.dictionary_bytes)),
        }
    header, data = {}, b""
    for name in ODD_NAMES:
        data += bytes(-len(data) % 256)
        if len(data) > (start := max((entry["data_offsets"][1] for entry in header.values()), default=0)):
            entry = {"dtype": "U8", "shape": [len(data) - start], "data_offsets": [start, len(data)]}
            header[f"filling{len(header)}"] = entry
        for ending, (dtype, content) in parts.items():
            shape = [len(content)] if dtype == "U8" else [2, 3]
            header[f"{name}.{ending}"] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [len(data), len(data) + len(content)],
            }
            data += content
    (tmp_path / "a.safetensors").write_bytes(join(header, data))
    with Model(tmp_path / "a.safetensors") as model:
        found = [model.layer(i).prefix.decode() for i in range(model.layer_count())]
    assert found == sorted(sorted(ODD_NAMES), key=natural_key)
    assert found.index("a.9") < found.index("a.10") and found.index("z9z9") < found.index("z9z10")


def test_threads_share_a_model(packed: Path) -> None:
    x = np.random.default_rng(1).normal(size=(2, 24)).astype(np.float32)
    with Model(packed) as model:

        def product(turn: int) -> bytes:
            with model.expert(turn % 12, turn % 2) as expert:
                return expert.matrices[0].matmul(x, threads=1 + turn % 3).tobytes()

        expected = [product(turn) for turn in range(24)]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(4):
                assert list(pool.map(product, range(24))) == expected


def test_arguments_that_cannot_be_meant(packed: Path, tmp_path: Path) -> None:
    with Model(packed) as model:
        for wrong in (
            lambda: model.layer(12),
            lambda: model.find_layer("model.layers.0"),
            lambda: model.projection(0, 3),
            lambda: model.record(0, 2),
            lambda: model.expert(0, 2),
            lambda: model.expert(12, 0),
            lambda: model.expert(0, 0, 8),
            lambda: model.tensor(model.tensor_count()),
            lambda: model.find_tensor("model.nothing"),
        ):
            with pytest.raises(RefusalError) as caught:
                wrong()
            assert caught.value.kind == "argument"
    for path in (tmp_path / "nothing", tmp_path / "no\nline"):
        with pytest.raises(RefusalError) as caught:
            Model(path)
        assert caught.value.kind == "argument"
    with pytest.raises(RefusalError, match="QMOE_READ"):
        Model(packed, 1)


def test_status_names_are_the_specs_words() -> None:
    assert [function("qmoe_status_name")(i).decode() for i in range(len(STATUS))] == list(STATUS)
    assert function("qmoe_status_name")(99) == function("qmoe_status_name")(-1) == b"unknown"


# ---- what it refuses --------------------------------------------------------------------------------------


def python_outcome(path: Path) -> str:
    """What the Python reader says of a model, all of it read."""
    try:
        with qmoe_format.open(path) as model:
            for prefix in model.layers:
                assert model.layer(prefix).dictionaries is not None  # they are parsed when asked for
            for prefix, spec in model.layers.items():
                layer = model.layer(prefix)
                for expert in range(spec.experts):
                    layer.frames(expert)
                    for projection in spec.projections:
                        layer.matrix(expert, projection.name)
                    if any(layer.padding(expert)):
                        return "payload"
    except FormatError as error:
        return error.kind
    except QMoEError as error:
        return type(error).__name__
    return "ok"


def c_outcome(path: Path, options: int = 0) -> str:
    try:
        open_everything(path, options)
    except RefusalError as refusal:
        return refusal.kind
    return "ok"


@pytest.mark.parametrize("fault", FAULTS)
def test_refuses_a_safetensors_header(tmp_path: Path, fault: str) -> None:
    content, error = FAULTS[fault]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for options in (0, READ):
        with pytest.raises(RefusalError) as caught:
            Model(path, options)
        assert caught.value.kind == error.kind
        assert caught.value.place.startswith(str(path)) or len(str(path)) > 200


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the lists of faults were written for."""
    return contents(write_model(tmp_path_factory.mktemp("original") / "out"))


def shard_bytes(change: Callable[[bytearray, dict[str, tuple[int, int]]], None]) -> Callable[[Path], None]:
    """Change the bytes of layer 0's shard, given where its tensors lie by their endings."""

    def spoil(out: Path) -> None:
        with qmoe_format.open(out) as model:
            layer = model.layer(layer_spec(0).prefix)
            path = out / layer.shard
            tensors = model.shards[layer.shard].tensors
            places = {
                name.rpartition(".")[2]: (t.start, t.end)
                for name, t in tensors.items()
                if name.startswith(layer.spec.prefix)
            }
            places["record"] = (places["qmoe_store"][0], places["qmoe_store"][0] + int(layer.index[0, 1]))
        data = bytearray(path.read_bytes())
        change(data, places)
        path.write_bytes(data)

    return spoil


def damaged_frame(path: Path) -> None:
    """A bit of the body of layer 1, expert 1, up_proj."""
    with qmoe_format.open(path) as model:
        layer = model.layer(layer_spec(1).prefix)
        offset, _, _ = layer.index[1].tolist()
        start = model.shards[layer.shard].tensors[layer.spec.prefix + ".qmoe_store"].start
        place = start + offset + len(layer.frames(1)[0]) + 100
        shard = path / layer.shard
    data = bytearray(shard.read_bytes())
    data[place] ^= 1
    shard.write_bytes(data)


def padded(data: bytearray, places: dict[str, tuple[int, int]]) -> None:
    assert places["record"][1] % 256, "there is padding"
    data[places["record"][1]] = 1


def shorter(data: bytearray, places: dict[str, tuple[int, int]]) -> None:
    """The record's size cuts its last frame; its end rounds up to the same place."""
    start = places["qmoe_index"][0] + 8
    (size,) = struct.unpack_from("<q", data, start)
    assert size % 256 > 16
    struct.pack_into("<q", data, start, size - 16)


def longer(data: bytearray, places: dict[str, tuple[int, int]]) -> None:
    start = places["qmoe_index"][0] + 8
    (size,) = struct.unpack_from("<q", data, start)
    assert 0 < size % 256 < 240
    struct.pack_into("<q", data, start, size + 16)


def section(name: str, plain: str) -> Callable[[Path], None]:
    """Rename a dense frame to `name`.qmoe_zstd, and a plain tensor, the mask, to `plain`."""

    def spoil(out: Path) -> None:
        names = {"model.embed_tokens.weight.qmoe_zstd": f"{name}.qmoe_zstd", "model.mask": plain}
        for path in out.glob("*.safetensors"):
            header, data = split(path.read_bytes())
            path.write_bytes(join({names.get(key, key): entry for key, entry in header.items()}, data))

        def rename(index: Any) -> None:
            index["weight_map"] = {names.get(key, key): shard for key, shard in index["weight_map"].items()}

        def retell(config: Any) -> None:
            dense = config["quantization_config"]["dense_zstd"]
            dense[name] = dense.pop("model.embed_tokens.weight")

        edit_json(out / "model.safetensors.index.json", rename)
        edit_json(out / "config.json", retell)
        sign(out)

    return spoil


@pytest.mark.parametrize(
    ("name", "plain", "outcome"),
    [
        ("a", "b", "ok"),
        ("a", "a", "header"),
        ("a.qmoe_future", "a.qmoe_future", "ok"),  # the plain one is a section, left aside
        ("a.qmoe_", "a.qmoe_", "header"),
        ("a.qmoe_X", "a.qmoe_X", "header"),
        ("a.qmoe_x.y", "a.qmoe_x.y", "header"),
        (".qmoe_2_", ".qmoe_2_", "ok"),
        ("a", "a.qmoe_store", "header"),
        ("a", "a.qmoe_stores", "ok"),
    ],
)
def test_sections_of_later_versions_are_left_aside(
    original: dict[str, bytes], tmp_path: Path, name: str, plain: str, outcome: str
) -> None:
    restore(tmp_path / "m", original)
    section(name, plain)(tmp_path / "m")
    assert (c_outcome(tmp_path / "m"), python_outcome(tmp_path / "m")) == (outcome, outcome)


RECORD_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "padding between records": (shard_bytes(padded), "payload"),
    "record that ends within a frame": (shard_bytes(shorter), "size"),
    "record with bytes after its frames": (shard_bytes(longer), "size"),
    "bit of a body": (damaged_frame, "checksum"),
}

MODEL_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    **{name: (spoil, error.kind) for name, (spoil, error, _) in CONTAINER_FAULTS.items()},
    **{f"manifest: {name}": (spoil, error.kind) for name, (spoil, error) in MANIFEST_FAULTS.items()},
    **RECORD_FAULTS,
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_refuses_a_model(tmp_path: Path, original: dict[str, bytes], fault: str) -> None:
    """Every fault that the Python reader is known to refuse, with the same kind."""
    spoil, kind = MODEL_FAULTS[fault]
    out = tmp_path / "out"
    restore(out, original)
    spoil(out)
    if not fault.startswith("manifest: "):
        sign(out)
    for options in (0, READ):
        with pytest.raises(RefusalError) as caught:
            open_everything(out, options)
        assert caught.value.kind == kind, caught.value.message
        assert str(out)[-60:] in caught.value.message


def test_dictionaries_must_rise(tmp_path: Path) -> None:
    frames = [qmoe_codec.build_dictionary(p, 8).frame for p in (0.8, 0.9)]
    frames.sort(key=lambda frame: struct.unpack_from("<I", frame, 28))
    for order, kind in ((frames, "ok"), (frames[::-1], "header"), ([frames[0]] * 2, "header")):
        matrix = qmoe_codec.encode(np.zeros((1, 1), np.int8), np.zeros((1, 2)), None)
        store = matrix + bytes(-len(matrix) % 256)
        index = np.array([[0, len(matrix), 0]], "<i8").tobytes()
        header: dict[str, Any] = {}
        data = b""
        for ending, dtype, shape, content in (
            ("store", "U8", [len(store)], store),
            ("index", "I64", [1, 3], index),
            ("dictionaries", "U8", [len(b"".join(order))], b"".join(order)),
        ):
            extent = [len(data), len(data) + len(content)]
            header[f"a.qmoe_{ending}"] = {"dtype": dtype, "shape": shape, "data_offsets": extent}
            data += content
        (tmp_path / "a.safetensors").write_bytes(join(header, data))
        assert c_outcome(tmp_path / "a.safetensors") == kind


LIMITS: dict[str, tuple[bytes, str]] = {
    "128 levels": (b'{"__metadata__": {}, "a": ' + b"[" * 127 + b"]" * 127 + b"}", "entry"),
    "129 levels": (b'{"__metadata__": {}, "a": ' + b"[" * 128 + b"]" * 128 + b"}", "JSON, at byte"),
    "zero byte": (b'{"a\\u0000b": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', "name"),
    "key twice, once escaped": (b'{"__metadata__": {"a": "", "\\u0061": ""}}', "JSON, at byte"),
    "surrogate pair twice": (
        b'{"__metadata__": {"\\ud83d\\ude00": "", "\xf0\x9f\x98\x80": ""}}',
        "JSON, at byte",
    ),
    "control character": (b'{"__metadata__": {"\n": ""}}', "JSON, at byte"),
    "half an escape": (b'{"__metadata__": {"\\u12"', "JSON, at byte"),
    "overlong UTF-8": (b'{"__metadata__": {"\xc0\x80": ""}}', "JSON, at byte"),
    "surrogate in UTF-8": (b'{"__metadata__": {"\xed\xa0\x80": ""}}', "JSON, at byte"),
    "beyond Unicode": (b'{"__metadata__": {"\xf4\x90\x80\x80": ""}}', "JSON, at byte"),
    "metadata not strings": (b'{"__metadata__": {"a": null}}', "__metadata__"),
}


@pytest.mark.parametrize("fault", LIMITS)
def test_refuses_json(tmp_path: Path, fault: str) -> None:
    text, field = LIMITS[fault]
    (tmp_path / "a.safetensors").write_bytes(join(text, b""))
    with pytest.raises(RefusalError) as caught:
        Model(tmp_path / "a.safetensors")
    assert (caught.value.kind, caught.value.field) == ("header", field)


def test_half_a_surrogate_pair_is_a_name(tmp_path: Path) -> None:
    """As for Python's reader: distinct from the other half, and from the pair."""
    names = ["\ud83d", "\ude00", "\U0001f600", "\ude00\ud83d", "a"]
    header = {name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in names}
    path = tmp_path / "a.safetensors"
    path.write_bytes(join(header, b""))
    assert SafetensorsFile(path).tensors.keys() == set(names)
    with Model(path) as model:
        found = [model.tensor(i).name.decode("utf-8", "surrogatepass") for i in range(model.tensor_count())]
    assert found == sorted(names)


NUMBERS = ["-1", "0", "1", "2", "3", "256", "1.0", "1e3", "-0", "9223372036854775807", "18446744073709551616"]
WORDS = [
    "true",
    "null",
    "NaN",
    "-Infinity",
    "[]",
    "{}",
    "[[0]]",
    '"gate"',
    '"U8"',
    '"1.7"',
    '"2.0"',
    '"1."',
    '"\\u0061"',
]
TOKEN = re.compile(rb'"[^"]*"|-?[0-9.]+|[\[\]{}:,]')


@st.composite
def spoilt_text(draw: st.DrawFn, text: bytes) -> bytes:
    """JSON with a few tokens or bytes changed."""
    for _ in range(draw(st.integers(1, 2))):
        tokens = [*TOKEN.finditer(text)]
        kind = draw(st.integers(0, 5))
        if kind <= 3 and tokens:
            token = draw(st.sampled_from(tokens))
            other = draw(st.sampled_from(tokens))[0]
            new = {
                0: draw(st.sampled_from(NUMBERS)).encode(),
                1: draw(st.sampled_from(WORDS)).encode(),
                2: other,
                3: b"",
            }[kind]
            if kind == 0 and token[0][:1] in b"-0123456789" and draw(st.booleans()):
                digits = token[0].replace(b".", b"")
                new = str(int(digits or b"0") + draw(st.integers(-2, 2))).encode()
            text = text[: token.start()] + new + text[token.end() :]
        else:
            place = draw(st.integers(0, len(text)))
            gone = draw(st.integers(0, 2))
            text = text[:place] + draw(st.binary(max_size=2)) + text[place + gone :]
    return text


@st.composite
def spoilt_data(draw: st.DrawFn, data: bytes, words: bool) -> bytes:
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        if not changed:
            break
        place = draw(st.integers(0, len(changed) - 1))
        if words and draw(st.booleans()) and len(changed) >= 8:
            place -= place % 8
            place = min(place, len(changed) - 8)
            (old,) = struct.unpack_from("<q", changed, place)
            new = draw(
                st.sampled_from([0, -1, 1, 255, 256, 1 << 62, -(1 << 63), old + 1, old + 256, old - 256])
            )
            struct.pack_into("<Q", changed, place, new % (1 << 64))
        else:
            changed[place] ^= 1 << draw(st.integers(0, 7))
    size = draw(st.sampled_from([0] * 8 + [-1, 1, 256, -256]))
    return bytes(changed[:size]) if size < 0 else bytes(changed) + bytes(size)


SPOILT = ("config.json", "manifest.json", "model.safetensors.index.json", "shard header", "index", "shard")


@pytest.mark.parametrize("target", SPOILT)
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_refuses_what_the_python_reader_refuses(small: Path, target: str, data: st.DataObject) -> None:
    """And nothing else; with the same kind of fault, since the order of checks is the same."""
    manifest = (small / "manifest.json").read_bytes()
    with qmoe_format.open(small) as model:
        shards = sorted(model.shards)
        names = {name: list(file.tensors) for name, file in model.shards.items()}
    name = data.draw(st.sampled_from(shards)) if target not in manifest_files(manifest) else target
    if target == "index":  # the three numbers of each expert
        name = shards[0]
    old = (small / name).read_bytes()
    if target == "shard header":
        (size,) = struct.unpack_from("<Q", old)
        text = data.draw(spoilt_text(old[8 : 8 + size].rstrip()))
        align = data.draw(st.sampled_from([256, 256, 256, 8]))
        new = join(text, old[8 + size :], align=align)
    elif target == "index":
        header, body = split(old)
        [tensor] = [entry for key, entry in header.items() if key.endswith(".qmoe_index")]
        begin, end = tensor["data_offsets"]
        start = len(old) - len(body)
        spoilt = data.draw(spoilt_data(old[start + begin : start + end], True))[: end - begin]
        new = old[: start + begin] + spoilt.ljust(end - begin, b"\0") + old[start + end :]
    elif target == "shard":
        new = data.draw(spoilt_data(old, False))
    else:
        new = data.draw(spoilt_text(old))
    try:
        (small / name).write_bytes(new)
        if name != "manifest.json" and data.draw(st.integers(0, 9)):
            sign(small, name)
        expected = python_outcome(small)
        for options in (0, READ):
            assert c_outcome(small, options) == expected, (name, names)
    finally:
        (small / name).write_bytes(old)
        (small / "manifest.json").write_bytes(manifest)


def manifest_files(manifest: bytes) -> set[str]:
    return {*json.loads(manifest)["files"], "manifest.json"}


@given(data=st.data())
def test_headers_of_any_kind(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Headers that are legal, or nearly so, whatever their tensors are called."""
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    position, header = 0, {}
    for number in range(data.draw(st.integers(0, 4))):
        dtype = data.draw(st.sampled_from(["U8", "F4", "F6_E2M3", "BF16", "F32", "C64", "BOOL"]))
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=3))
        bits = {"F4": 4, "F6_E2M3": 6, "BF16": 16, "F32": 32, "C64": 64}.get(dtype, 8)
        end = position + bits * int(np.prod(shape)) // 8
        header[f"t{number}é"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=data.draw(st.booleans())).encode()
    if data.draw(st.booleans()):
        text = data.draw(spoilt_text(text))
    path.write_bytes(join(text, bytes(position), align=data.draw(st.sampled_from([1, 8]))))
    expected: dict[str, Any] | str
    try:
        with SafetensorsFile(path) as file:
            expected = {name: (t.dtype, t.shape, t.start, t.end) for name, t in file.tensors.items()}
    except FormatError as error:
        expected = error.kind
    found: dict[str, Any] | str
    try:
        with Model(path) as model:
            infos = [model.tensor(i) for i in range(model.tensor_count())]
            found = {
                t.name.decode(): (
                    t.dtype.decode(),
                    tuple(t.shape[: t.dimensions]),
                    t.offset,
                    t.offset + t.size,
                )
                for t in infos
            }
    except RefusalError as refusal:
        found = refusal.kind
    assert found == expected


def spoil(packed: Path, into: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(packed, into)
    change(into)
    return into


def test_a_message_names_the_place(small: Path, tmp_path: Path) -> None:
    spoilt = spoil(small, tmp_path / "m", damaged_frame)
    with Model(spoilt) as model:
        with pytest.raises(RefusalError) as caught:
            model.expert(1, 1)
        shard = model.tensor(model.find_tensor(layer_spec(1).prefix + ".qmoe_store")).shard.decode()
        with model.expert(1, 1, SKIP_BODY):  # within bounds, if not right
            pass
    place = f"{spoilt / shard}: {layer_spec(1).prefix}: expert 1: up_proj"
    assert caught.value.place == place[-255:]
    assert caught.value.message.startswith(f"{caught.value.place}: body_crc32c: checksum (found ")


def test_a_long_place_keeps_its_end(small: Path, tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["é" * 50] * 4)
    deep.parent.mkdir(parents=True)
    spoilt = spoil(small, deep, damaged_frame)
    with Model(spoilt) as model, pytest.raises(RefusalError) as caught:
        model.expert(1, 1)
    assert caught.value.place.endswith(f"{layer_spec(1).prefix}: expert 1: up_proj")
    assert 250 <= len(caught.value.place.encode()) <= 255


def version(file: str, keys: list[str], value: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        def edit(content: Any) -> None:
            for key in keys:
                content = content[key]
            content["version"] = value

        edit_json(path / file, edit)
        if file != "manifest.json":
            sign(path, file)

    return change


@pytest.mark.parametrize(("file", "keys"), [("manifest.json", []), ("config.json", ["quantization_config"])])
@pytest.mark.parametrize(
    ("value", "outcome"),
    [("1.0", "ok"), ("1.7", "ok"), ("1.999999999", "ok"), ("2.0", "version"), ("0.9", "version"),
     ("1", "header"), ("1.", "header"), ("1.0.0", "header"), ("1.1234567890", "header"), (" 1.0", "header")],
)  # fmt: skip
def test_versions(small: Path, tmp_path: Path, file: str, keys: list[str], value: str, outcome: str) -> None:
    spoilt = spoil(small, tmp_path / "m", version(file, keys, value))
    assert (c_outcome(spoilt), python_outcome(spoilt)) == (outcome, outcome)


def test_files_that_are_missing_or_no_files(small: Path, tmp_path: Path) -> None:
    for number, name in enumerate(sorted(path.name for path in small.iterdir())):
        gone = spoil(small, tmp_path / f"gone{number}", lambda path, name=name: (path / name).unlink())
        assert c_outcome(gone) == python_outcome(gone) == "truncated"
        folder = spoil(small, tmp_path / f"folder{number}", lambda path, name=name: (path / name).unlink())
        (folder / name).mkdir()
        assert c_outcome(folder) == python_outcome(folder) == "header"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert c_outcome(fifo) == "header"  # and did not wait for a writer
    if os.geteuid() != 0:
        closed = spoil(small, tmp_path / "closed", lambda path: (path / "config.json").chmod(0))
        assert c_outcome(closed) == "system"
    assert c_outcome(small / "config.json" / "x") == "argument"


def test_a_file_that_shrinks_is_refused_where_files_are_read(small: Path, tmp_path: Path) -> None:
    spoilt = spoil(small, tmp_path / "m", lambda path: None)
    with Model(spoilt, READ) as model:
        for layer in range(2):
            os.truncate(
                spoilt
                / model.tensor(model.find_tensor(layer_spec(layer).prefix + ".qmoe_store")).shard.decode(),
                600,
            )
        with pytest.raises(RefusalError) as caught:
            model.expert(0, 0)
        assert (caught.value.kind, caught.value.field) == ("truncated", "file")


def test_the_memory_limit_holds(small: Path, tmp_path: Path) -> None:
    for limit in (1, 1000, 20_000, 100_000):
        with pytest.raises(RefusalError) as caught:
            Model(small, memory_limit=limit)
        assert (caught.value.kind, caught.value.field) == ("memory", "memory_limit")
    with Model(small, memory_limit=64 << 20):
        pass
    many = b"{" + b",".join(b'"%d": 1' % i for i in range(200_000)) + b"}"
    (tmp_path / "many.safetensors").write_bytes(join(many, b""))
    assert_memory_is_small = f"""
import resource, sys
sys.path[:0] = {[str(ROOT / "tests")]!r}
from c_library import Model, RefusalError
Model({str(small)!r}).close()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    Model({str(tmp_path / "many.safetensors")!r}, memory_limit=1 << 20)
except RefusalError as refusal:
    print(refusal.field, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", assert_memory_is_small], capture_output=True, text=True, check=True
    )
    field, kilobytes = done.stdout.split()
    assert field == "memory_limit" and int(kilobytes) < 1024


# ---- by the sanitizers ------------------------------------------------------------------------------------

DICTIONARY = ROOT / "spec/vectors/valid/dictionary-trees-10.qmxd"


def run_in(folder: Path, *command: str | Path) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert not list(folder.iterdir()), "it left something: a finding, or its files"
    return done.stdout


@pytest.mark.slow
def test_mutated_models_do_no_harm(address_build: Path, tmp_path: Path) -> None:
    """For a few seconds; ``make fuzz SECONDS=600`` goes on for longer."""
    counts = json.loads(run_in(tmp_path, address_build / "fuzz_model", "4", "1", DICTIONARY))
    # Enough of each must come about, or nothing was tested.
    assert counts["executions"] > 50 and counts["experts"] > counts["executions"]
    assert min(counts["opened"], counts["refused"], counts["shards"]) > counts["executions"] / 20
    assert counts["limited"]


@pytest.mark.slow
def test_threads_that_share_a_model_do_not_race(thread_build: Path, tmp_path: Path) -> None:
    said = run_in(tmp_path, thread_build / "fuzz_model", "threads", DICTIONARY)
    assert said == "fuzz_model: no fault among threads\n"


# ---- how it is installed ----------------------------------------------------------------------------------


def declared() -> set[str]:
    """Functions that the header declares."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    return set(re.findall(r"QMOE_API[^;(]*?(qmoe_\w+)\(", text))


def test_the_library_exports_what_the_header_declares_with_versions() -> None:
    nm = shutil.which("nm")
    if nm is None or sys.platform != "linux":
        pytest.skip("NOT TESTED: symbols of the library; there is no nm, or this is not Linux")
    path = library()._name
    listed = subprocess.run([nm, "-D", "--defined-only", path], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert symbols == {f"{name}@@QMOE_1.0" for name in declared()} | {"QMOE_1.0"}


def test_the_library_needs_libc_alone() -> None:
    readelf = shutil.which("readelf")
    if readelf is None or sys.platform != "linux":
        pytest.skip("NOT TESTED: what the library needs; there is no readelf, or this is not Linux")
    listed = subprocess.run([readelf, "-d", library()._name], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", listed.stdout))
    if any("san.so" in name for name in needed):
        pytest.skip("this library is built with sanitizers")
    assert {name.partition(".so")[0] for name in needed} <= {
        "libc",
        "libm",
        "libpthread",
        "ld-linux-x86-64",
        "libgcc_s",
    }


CONSUMER_CMAKE = """
cmake_minimum_required(VERSION 3.18)
project(consumer LANGUAGES C)
find_package(qmoe 0.1 REQUIRED)
add_executable(consumer consumer.c)
target_link_libraries(consumer PRIVATE qmoe::qmoe)
"""
CONSUMER_C = """
#include <qmoe.h>
#include <stdio.h>
int main(int count, char **paths) {
    qmoe_model *model;
    qmoe_error error;
    char message[QMOE_MESSAGE_SIZE];
    if (count != 2 || qmoe_model_open(paths[1], 0, 0, &model, &error) != QMOE_OK) {
        puts(qmoe_error_message(&error, message, sizeof message));
        return 1;
    }
    printf("%zu\\n", qmoe_model_layer_count(model));
    qmoe_model_close(model);
    return 0;
}
"""


@pytest.mark.slow
def test_another_project_finds_the_installed_library(
    installed_library: Path, small: Path, tmp_path: Path
) -> None:
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER_CMAKE)
    (tmp_path / "consumer.c").write_text(CONSUMER_C)
    scripts = sysconfig.get_path("scripts")
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    build = tmp_path / "build"
    for command in (
        [
            "cmake",
            "-S",
            tmp_path,
            "-B",
            build,
            f"-DCMAKE_PREFIX_PATH={installed_library}",
            "-DCMAKE_C_FLAGS=-Wall -Werror",
        ],
        ["cmake", "--build", build],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    said = subprocess.run([build / "consumer", small], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "2\n")
    said = subprocess.run([build / "consumer", small / "tokenizer.json"], capture_output=True, text=True)
    assert said.returncode == 1 and said.stdout.startswith(str(small / "tokenizer.json"))
    if sys.platform == "linux":
        assert (installed_library / "lib" / "libqmoe.so.1").exists()
