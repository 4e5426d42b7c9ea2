"""The known faults of parsers like ours, one by one, each over every reader that it can befall.

Frames are read by the NumPy reference, the C core and the decoder in ``spec/reference``; dense frames by
Python and that decoder; whole models by the Python reader and the one in the C library. All must give
the same kind of error.
The GPU kernels have theirs in ``test_gpu_host.py``, the importer of published checkpoints (pickles) in
``test_import_qmoe.py``.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import c_library
import numpy as np
import packed_models as models
import pytest
import qmoe_codec
import zstandard
from qmoe_codec import (
    BACKENDS,
    ArgumentError,
    Dictionary,
    FormatError,
    Matrix,
    MemoryLimitError,
    build_dictionary,
    crc32c,
    decode,
    encode,
    read_frame_header,
)
from qmoe_codec.reference import read_dictionary
from reference_program import ReferenceProgram
from strategies import reseal, table_dictionary

import qmoe_format
from qmoe_format.dense import HEADER, decode_dense, encode_dense
from qmoe_format.safetensors_io import SafetensorsFile

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "spec" / "vectors" / "models" / "1.0"
LAYER = "model.layers.0.mlp.experts"
SHARD = "model-00001-of-00003.safetensors"
DICTIONARY = build_dictionary(0.85, 10)
KNOWN = {DICTIONARY.dictionary_id: DICTIONARY}
TRITS = models.trits(37, 101, 1)
FRAME = encode(TRITS, models.levels(37), DICTIONARY)
RAW = encode(TRITS, models.levels(37), None)


# ---- what readers say --------------------------------------------------------------------------------------


def outcome(read: Callable[[], object]) -> str:
    try:
        read()
    except FormatError as error:
        assert "\n" not in str(error)
        return error.kind
    except c_library.RefusalError as error:
        return error.kind
    return "read"


def matrix_outcomes(frame: bytes, reference: ReferenceProgram, *dictionaries: Dictionary) -> set[str]:
    known = {d.dictionary_id: d for d in dictionaries} or KNOWN
    said = {outcome(lambda b=b: decode(frame, known, backend=b)) for b in BACKENDS}  # type: ignore[misc]
    answer = reference("matrix", frame, *[d.frame for d in known.values()])
    return said | {answer[0] if isinstance(answer, tuple) else "read"}


def dictionary_outcomes(frame: bytes, reference: ReferenceProgram) -> set[str]:
    answer = reference("dictionary", frame)
    return {
        outcome(lambda: Dictionary.from_frame(frame)),
        outcome(lambda: read_dictionary(frame)),
        answer[0] if isinstance(answer, tuple) else "read",
    }


def dense_outcomes(frame: bytes, reference: ReferenceProgram) -> set[str]:
    answer = reference("dense", frame)
    return {outcome(lambda: decode_dense(frame)), answer[0] if isinstance(answer, tuple) else "read"}


def read_with_python(path: Path) -> None:
    with qmoe_format.open(path) as model:
        for prefix in model.layers:
            layer = model.layer(prefix)
            for expert in range(layer.experts):
                for projection in layer.spec.projections:
                    layer.matrix(expert, projection.name)


def read_with_c(path: Path) -> None:
    with c_library.Model(path) as model:
        for layer in range(model.layer_count()):
            for expert in range(model.layer(layer).experts):
                with c_library.Expert(model, layer, expert):
                    pass


def model_outcomes(path: Path) -> set[str]:
    return {outcome(lambda: read_with_python(path)), outcome(lambda: read_with_c(path))}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The golden model, to be spoiled."""
    models.restore(tmp_path / "model", models.contents(GOLDEN))
    return tmp_path / "model"


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None], more: bytes = b"") -> None:
    """Change the header of the layer's shard; the manifest agrees with what comes of it."""
    header, data = models.split((path / SHARD).read_bytes())
    edit(header)
    (path / SHARD).write_bytes(models.join(header, data + more))
    models.sign(path, SHARD)


def edit_layer(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the layer's entry in config.json."""
    models.edit_json(
        path / "config.json", lambda config: edit(config["quantization_config"]["layers"][LAYER])
    )
    models.sign(path, "config.json")


def edit_bytes(path: Path, tensor: str, edit: Callable[[bytearray], None]) -> None:
    """Change the bytes of a tensor in the layer's shard."""
    place = SafetensorsFile(path / SHARD).tensors[tensor]
    shard = bytearray((path / SHARD).read_bytes())
    part = shard[place.start : place.end]
    edit(part)
    assert len(part) == place.nbytes
    shard[place.start : place.end] = part
    (path / SHARD).write_bytes(shard)
    models.sign(path, SHARD)


def edit_index(path: Path, edit: Callable[[np.ndarray[Any, np.dtype[np.int64]]], None]) -> None:
    """Change the table of records, int64 [experts, 3]."""

    def change(data: bytearray) -> None:
        edit(np.frombuffer(data, "<i8").reshape(-1, 3))

    edit_bytes(path, f"{LAYER}.qmoe_index", change)


def patched(frame: bytes, layout: str, *places: tuple[int, int]) -> bytes:
    """A matrix frame with fields changed, and checksums that fit."""
    copy = bytearray(frame)
    for offset, value in places:
        struct.pack_into("<" + layout, copy, offset, value)
    return reseal(copy)


def dense_header(frame: bytes, **places: tuple[int, ...]) -> bytes:
    """A dense frame with other `shape` or `plane_sizes`, its header's checksum made to fit."""
    copy = bytearray(frame)
    for name, values in places.items():
        struct.pack_into(f"<{len(values)}Q", copy, {"shape": 24, "plane_sizes": 88}[name], *values)
    struct.pack_into("<I", copy, 156, crc32c(bytes(copy[:156])))
    return bytes(copy)


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that Python and NumPy held during `work`."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_all_readers_read_what_is_sound(model: Path, reference: ReferenceProgram) -> None:
    assert matrix_outcomes(FRAME, reference) == matrix_outcomes(RAW, reference) == {"read"}
    assert dictionary_outcomes(DICTIONARY.frame, reference) == {"read"}
    edit_header(model, lambda header: None)
    edit_layer(model, lambda layer: None)
    edit_index(model, lambda index: None)
    assert model_outcomes(model) == {"read"}


# ---- the faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows,columns,kind",
    [
        (1 << 16, 1 << 16, "size"),  # 2^32: zero in 32 bits
        (1 << 20, 1 << 16, "size"),  # 2^36: legal, and more than these bytes hold
        (1 << 24, 1 << 24, "header"),
        ((1 << 32) - 1, (1 << 32) - 1, "header"),  # 1 in 64 bits
    ],
)
def test_products_of_sizes_that_wrap(rows: int, columns: int, kind: str, reference: ReferenceProgram) -> None:
    for frame in (RAW, FRAME):
        levels = -(-(64 + 4 * rows) // 16) * 16 & 0xFFFFFFFF
        frame = bytearray(frame)
        struct.pack_into("<II", frame, 12, rows, columns)
        struct.pack_into("<Q", frame, 32, levels - 64)  # as if the product were 0
        assert matrix_outcomes(reseal(frame), reference) == {kind}


@pytest.mark.parametrize("shape", [(1 << 32, 1 << 32), (1 << 63, 2), (3, 1 << 39, 1 << 25)])
def test_products_of_shapes_that_wrap(
    shape: tuple[int, ...], model: Path, reference: ReferenceProgram
) -> None:
    dense = encode_dense("U8", (2,) * len(shape), bytes(2 ** len(shape)))
    assert dense_outcomes(dense_header(dense, shape=shape), reference) == {"header"}
    edit_header(model, lambda h: h.update(x={"dtype": "F64", "shape": list(shape), "data_offsets": [0, 0]}))
    assert model_outcomes(model) == {"header"}


@pytest.mark.parametrize("beyond", [1 << 32, 1 << 33, 1 << 63])
def test_narrowing_from_64_to_32_bits(beyond: int, model: Path, reference: ReferenceProgram) -> None:
    (size,) = struct.unpack_from("<Q", FRAME, 32)
    assert matrix_outcomes(patched(FRAME, "Q", (32, size + beyond)), reference) == {"size"}
    dense = encode_dense("U8", (4,), b"abcd")
    sizes = struct.unpack_from("<Q", dense, 88)
    assert dense_outcomes(dense_header(dense, plane_sizes=(sizes[0] + beyond,)), reference) == {"truncated"}
    if beyond < 1 << 63:
        edit_index(model, lambda index: index.__setitem__((1, 0), index[1, 0] + beyond))
        assert model_outcomes(model) == {"index"}
    shard = bytearray((GOLDEN / SHARD).read_bytes())
    (header_size,) = struct.unpack_from("<Q", shard)
    struct.pack_into("<Q", shard, 0, header_size + beyond)
    (model / SHARD).write_bytes(shard)
    models.sign(model, SHARD)
    assert model_outcomes(model) == {"header"}


def test_narrowing_of_arguments() -> None:
    matrix = Matrix(FRAME, KNOWN)
    library, error = qmoe_codec.core.library(), qmoe_codec.core.Error()
    for first, count in ((1, 0xFFFFFFFF), (0xFFFFFFFF, 1), (0xFFFFFFFF, 2), (38, 0), (0, 38)):
        status = library.qmoe_matrix_decode(
            matrix.handle, first, count, None, 1, qmoe_codec.core.byref(error)
        )
        with pytest.raises(ArgumentError):
            error.raise_for(status)


def test_extents_past_the_end_of_the_file(model: Path, reference: ReferenceProgram) -> None:
    assert matrix_outcomes(FRAME[:-16], reference) == {"truncated"}
    assert dictionary_outcomes(DICTIONARY.frame[:-1], reference) == {"truncated"}
    dense = encode_dense("U8", (4,), b"abcd")
    assert dense_outcomes(dense[:-1], reference) == {"truncated"}
    size = (model / SHARD).stat().st_size
    os.truncate(model / SHARD, size - 1)
    assert model_outcomes(model) == {"truncated"}  # by the manifest
    models.sign(model, SHARD)
    assert model_outcomes(model) == {"truncated"}  # by the header
    edit_index(prepared(model), lambda index: index.__setitem__((3, 1), index[3, 1] + 256))
    assert model_outcomes(model) == {"index"}


def prepared(model: Path) -> Path:
    """The golden model again."""
    models.restore(model, models.contents(GOLDEN))
    return model


def test_a_truncated_file_that_reads_as_zeros(model: Path) -> None:
    """Cut and made as long as before, as where a file system lost the end: a hole, which a map shows as 0."""
    with qmoe_format.open(model) as opened:
        start = opened.shards[SHARD].tensors[f"{LAYER}.qmoe_store"].start
        offset, size, _ = opened.layer(LAYER).index[3].tolist()
    whole = (model / SHARD).stat().st_size
    for cut in (start + offset + size - 100, start + offset):
        prepared(model)
        os.truncate(model / SHARD, cut)
        os.truncate(model / SHARD, whole)
        models.sign(model, SHARD)
        with pytest.raises(FormatError, match=r"expert 3|qmoe_dictionaries"):
            qmoe_format.verify(model)
        said = model_outcomes(model)
        assert "read" not in said and len(said) == 1


def test_overlaps_holes_trailing_bytes_duplicate_keys(model: Path, reference: ReferenceProgram) -> None:
    store, table = f"{LAYER}.qmoe_store", f"{LAYER}.qmoe_index"

    def shift(by: int) -> Callable[[dict[str, Any]], None]:
        def edit(header: dict[str, Any]) -> None:
            begin, end = header[table]["data_offsets"]
            header[table]["data_offsets"] = [begin + by, end + by]

        return edit

    for edit, more in ((shift(-8), b""), (shift(8), bytes(8)), (lambda header: None, b"\0")):
        edit_header(prepared(model), edit, more)
        assert model_outcomes(model) == {"size"}
    prepared(model)
    header, data = models.split((model / SHARD).read_bytes())
    twice = json.dumps(header)[:-1] + f", {json.dumps(store)}: {json.dumps(header[store])}}}"
    (model / SHARD).write_bytes(models.join(twice.encode(), data))
    models.sign(model, SHARD)
    assert model_outcomes(model) == {"header"}
    for name in ("config.json", "model.safetensors.index.json", "manifest.json"):
        text = (prepared(model) / name).read_text().rstrip()
        key = next(iter(json.loads(text)))
        (model / name).write_text(f"{text[:-1]}, {json.dumps(key)}: 1}}")
        if name != "manifest.json":
            models.sign(model, name)
        assert model_outcomes(model) == {"header"}
    assert matrix_outcomes(FRAME + bytes(16), reference) == {"size"}
    assert dictionary_outcomes(DICTIONARY.frame + b"\0", reference) == {"size"}
    assert dense_outcomes(encode_dense("U8", (4,), b"abcd") + b"\0", reference) == {"size"}


def zeros_frame(rows: int, columns: int) -> bytes:
    """A legal frame of a few kB that stands for any number of zeros: no row has a codeword."""
    columns_field = encode(np.zeros((rows, 1), np.int8), np.zeros((rows, 2)), DICTIONARY, level_format="e4m4")
    return patched(columns_field, "I", (16, columns))


def test_counts_that_allocate_or_loop_without_bound(model: Path, reference: ReferenceProgram) -> None:
    frame = zeros_frame(1 << 12, 1 << 24)  # 2^36 weights
    assert len(frame) < 10_000 and isinstance(reference("matrix", frame, DICTIONARY.frame), bytes)
    assert (Matrix(frame, KNOWN).rows, Matrix(frame, KNOWN).columns) == (1 << 12, 1 << 24)
    started = time.monotonic()

    def refused() -> None:
        for backend in BACKENDS:
            with pytest.raises(MemoryLimitError, match="rows × columns"):
                decode(frame, KNOWN, backend=backend)  # by the default limit
            with pytest.raises(MemoryLimitError):
                qmoe_codec.dequantize(frame, KNOWN, backend=backend)
            with pytest.raises(MemoryLimitError):
                decode(FRAME, KNOWN, backend=backend, memory_limit=TRITS.size - 1)
        with pytest.raises(MemoryLimitError):
            Matrix(frame, KNOWN).decode()
        with pytest.raises(MemoryLimitError):
            Matrix(FRAME, KNOWN, memory_limit=10 * 101 * 4 - 1).dequantize(rows=slice(0, 10))

    assert peak_bytes(refused) < 1 << 20
    assert decode(FRAME, KNOWN, memory_limit=TRITS.size)[0].tobytes() == TRITS.tobytes()
    # The rows that are asked for are what counts.
    some = Matrix(FRAME, KNOWN, memory_limit=10 * 101 * 4).dequantize(rows=slice(0, 10))
    assert some.shape == (10, 101)
    # More codewords than there are bytes, and more nodes than there are codewords.
    assert matrix_outcomes(patched(FRAME, "I", (28, 0xFFFFFFFF)), reference) == {"size"}
    tree = bytearray(DICTIONARY.frame)
    struct.pack_into("<I", tree, 16, 0xFFFFFFFF)
    assert dictionary_outcomes(bytes(tree), reference) == {"header"}
    edit_layer(model, lambda layer: layer.update(experts=1 << 24))
    assert model_outcomes(model) == {"size"}
    edit_layer(model, lambda layer: layer.update(experts=10**30))
    assert model_outcomes(model) == {"header"}
    (prepared(model) / "config.json").write_bytes(b'{"quantization_config":' + b"[" * 100_000)
    models.sign(model, "config.json")
    assert model_outcomes(model) == {"header"}
    assert time.monotonic() - started < 30


def test_counts_that_decompress_without_bound(tmp_path: Path, reference: ReferenceProgram) -> None:
    """32 MB of zeros in about 1 kB, and a header that claims 2^39 elements."""
    size = 1 << 25
    frame = encode_dense("U8", (size,), bytes(size))
    assert len(frame) < 4096

    def refused() -> None:
        with pytest.raises(MemoryLimitError, match="shape"):
            decode_dense(frame, memory_limit=size - 1)

    assert peak_bytes(refused) < 1 << 20
    assert decode_dense(frame, memory_limit=size)[1] == (size,)
    for shape in ((1 << 39,), (1 << 20, 1 << 19)):
        dense = encode_dense("U8", (4,) + (1,) * (len(shape) - 1), b"abcd")
        assert (
            peak_bytes(lambda d=dense, s=shape: outcome(lambda: decode_dense(dense_header(d, shape=s))))
            < 1 << 20
        )  # type: ignore[misc]
        assert dense_outcomes(dense_header(dense, shape=shape), reference) == {"payload"}
    # The plane itself says nothing of its size, and gives more than the header says.
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(size))
    claimed = bytearray(encode_dense("U8", (1000,), bytes(1000))[: HEADER.size] + bomb)
    claimed = bytearray(dense_header(bytes(claimed), plane_sizes=(len(bomb),)))
    assert peak_bytes(lambda: outcome(lambda: decode_dense(bytes(claimed)))) < 1 << 20
    assert outcome(lambda: decode_dense(bytes(claimed))) == "payload"
    with qmoe_format.PackedModelWriter(tmp_path / "out") as writer:
        writer.add_dense_zstd("zeros", "U8", (size,), bytes(size))
        writer.finish({"model_type": "olmoe"}, {})
    opened = qmoe_format.open(tmp_path / "out", memory_limit=size - 1)
    with pytest.raises(MemoryLimitError, match=r"model-.*zeros\.qmoe_zstd: shape"):
        opened.dense("zeros")
    opened.close()
    with pytest.raises(MemoryLimitError):
        qmoe_format.verify(tmp_path / "out", memory_limit=size - 1)
    assert qmoe_format.verify(tmp_path / "out").dense_frames == 1


WRONG: list[object] = [None, True, "1", 1.5, [], {}, -1, 10**40]


@pytest.mark.parametrize("key", ["experts", "projections", "dtype", "store_bytes", "dictionaries_bytes"])
def test_metadata_of_the_wrong_type(key: str, model: Path) -> None:
    for value in WRONG:
        edit_layer(prepared(model), lambda layer, value=value: layer.update({key: value}))  # type: ignore[misc]
        assert model_outcomes(model) in ({"header"}, {"size"}), value


@pytest.mark.parametrize("key", ["name", "role", "tensor", "rows", "columns"])
def test_metadata_of_the_wrong_type_in_projections(key: str, model: Path) -> None:
    for value in WRONG:
        if (key, value) in (("name", "1"), ("rows", True), ("columns", True)):
            continue
        edit_layer(
            prepared(model),
            lambda layer, value=value: layer["projections"][0].update({key: value}),  # type: ignore[misc]
        )
        assert model_outcomes(model) == {"header"}, value


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_metadata_of_the_wrong_type_in_shards(key: str, model: Path) -> None:
    for value in [*WRONG, [-8, 8], ["0", "8"], [0.0, 8.0], [8, 0], [True, 8]]:
        edit_header(
            prepared(model),
            lambda header, value=value: header[f"{LAYER}.qmoe_index"].update({key: value}),  # type: ignore[misc]
        )
        assert model_outcomes(model) in ({"header"}, {"size"}), value


def test_metadata_values_used_as_an_index(model: Path) -> None:
    for value in (-1, 1, 255, 257, 1 << 20, -(1 << 63), (1 << 63) - 1):
        for column in (0, 1):
            edit_index(
                prepared(model),
                lambda index, c=column, v=value: index.__setitem__((2, c), v),  # type: ignore[misc]
            )
            assert model_outcomes(model) == {"index"}, (column, value)
    edit_index(prepared(model), lambda index: index.__setitem__((2, 2), -2))
    assert model_outcomes(model) == {"index"}
    for name in ("x{expert}{expert}", "x", "{layer}"):
        edit_layer(prepared(model), lambda layer, n=name: layer["projections"][0].update(tensor=n))  # type: ignore[misc]
        assert model_outcomes(model) == {"header"}
    with qmoe_format.open(GOLDEN) as opened, c_library.Model(GOLDEN) as other:
        for expert in (-1, 4, 1 << 40):
            with pytest.raises(ArgumentError, match="no such expert"):
                opened.layer(LAYER).record(expert)
        for expert in (4, 0xFFFFFFFF):
            with pytest.raises(c_library.RefusalError, match="expert"):
                c_library.Expert(other, 0, expert)


@pytest.mark.parametrize("bits", [8, 10, 12, 16, 0])
def test_payload_indices_unchecked(bits: int) -> None:
    """Bodies not checked, and changed later: trits are trits, products finite, nothing is written beside.

    `make sanitize` and the fuzzer look at what is read, on every kernel.
    """
    dictionary = table_dictionary(16) if bits == 16 else build_dictionary(0.85, bits) if bits else None
    known = {dictionary.dictionary_id: dictionary} if dictionary else {}
    frame = encode(TRITS, models.levels(37), dictionary)
    start = read_frame_header(frame).codewords_start
    generator = np.random.default_rng(bits)
    for _ in range(20):
        body = np.frombuffer(frame, np.uint8).copy()
        matrix = Matrix(body, known, verify=False)
        body[start:] = generator.integers(0, 256, len(body) - start)  # after it was opened
        trits = np.full((TRITS.size + 512,), 99, np.int8)
        matrix.decode(out=trits[256:-256].reshape(TRITS.shape))
        assert set(np.unique(trits[256:-256])) <= {-1, 0, 1}
        assert (trits[:256] == 99).all() and (trits[-256:] == 99).all()
        assert np.isfinite(matrix.matmul(np.ones((3, 101), np.float32))).all()


def test_a_phrase_of_length_0(reference: ReferenceProgram) -> None:
    """Illegal in a dictionary, as is a codeword without a phrase; unchecked, every walk ends."""
    table = table_dictionary(8)
    frame = bytearray(table.frame)
    struct.pack_into("<I", frame, 32 + 4 * 200, 127 << 7 | 127 << 14 | 127 << 21)  # length 0, no non-zeros
    struct.pack_into("<I", frame, 28, crc32c(bytes(frame[32:]), crc32c(bytes(frame[:28]))))
    assert dictionary_outcomes(bytes(frame), reference) == {"payload"}
    unused = int(np.flatnonzero(table.words[0] == 0)[-1])
    coded = bytearray(encode(TRITS, models.levels(37), table))
    header = read_frame_header(bytes(coded))
    coded[header.codewords_start : header.codewords_start + header.codewords_size] = (
        bytes([unused]) * header.codewords_size
    )
    assert matrix_outcomes(reseal(coded), reference, table) == {"payload"}
    matrix = Matrix(reseal(coded), {table.dictionary_id: table}, verify=False)
    assert not matrix.decode().any() and not matrix.matmul(np.ones((2, 101), np.float32)).any()


def test_offset_tables_that_do_not_rise(model: Path, reference: ReferenceProgram) -> None:
    def swap(index: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        index[[1, 2]] = index[[2, 1]]

    def repeat(index: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        index[2] = index[1]

    for edit in (swap, repeat):
        edit_index(prepared(model), edit)
        assert model_outcomes(model) == {"index"}
    start = read_frame_header(FRAME).row_index_start
    (base,) = struct.unpack_from("<I", FRAME, start + 4)
    for value in (0, base - 1, base + 1, 0xFFFFFFFF):
        assert matrix_outcomes(patched(FRAME, "I", (start + 4, value)), reference) == {"index"}
    assert matrix_outcomes(patched(FRAME, "I", (start, 1)), reference) == {"index"}


def test_frame_geometry_unlike_the_containers(model: Path) -> None:
    def turn(layer: dict[str, Any]) -> None:
        for projection in layer["projections"]:
            projection.update(rows=projection["columns"], columns=projection["rows"])

    edit_layer(model, turn)
    assert model_outcomes(model) == {"header"}
    edit_layer(prepared(model), lambda layer: layer["projections"].reverse())
    assert model_outcomes(model) == {"header"}
    edit_layer(prepared(model), lambda layer: layer["projections"].pop())
    assert model_outcomes(model) == {"size"}  # a frame too many
    extra = {"name": "x", "role": "gate", "tensor": "x{expert}", "rows": 9, "columns": 40}
    edit_layer(prepared(model), lambda layer: layer["projections"].append(extra))
    assert model_outcomes(model) == {"header"}  # a role twice
    # Within a record: a frame that is legal by itself, in the place of another.
    with qmoe_format.open(GOLDEN) as opened:
        gate, up, _ = (bytes(frame) for frame in opened.layer(LAYER).frames(2))
        rest = opened.layer(LAYER).record(2)
    assert len(gate) != len(up) and len(rest)

    def bring_forward(store: bytearray) -> None:
        start = bytes(store).index(gate)
        store[start : start + len(gate) + len(up)] = up + gate

    edit_bytes(prepared(model), f"{LAYER}.qmoe_store", bring_forward)
    assert model_outcomes(model) == {
        "read"
    }  # of one shape, so only the SHA-256 could tell; no bytes go astray


def test_short_headers_whose_extended_fields_are_read(model: Path, reference: ReferenceProgram) -> None:
    dense = encode_dense("U8", (4,), b"abcd")
    for size in (*range(0, 64, 9), 63):
        assert matrix_outcomes(FRAME[:size], reference) == {"truncated"}, size
    for size in (*range(0, 32, 7), 31):
        assert dictionary_outcomes(DICTIONARY.frame[:size], reference) == {"truncated"}, size
    for size in (*range(0, 160, 23), 159):
        assert dense_outcomes(dense[:size], reference) == {"truncated"}, size
    shard = (GOLDEN / SHARD).read_bytes()
    for size in range(0, 12):
        (model / SHARD).write_bytes(shard[:size])
        models.sign(model, SHARD)
        assert model_outcomes(model) == {"truncated"}, size


def test_abort_instead_of_an_error(reference: ReferenceProgram) -> None:
    """Bytes of any kind: no reader ends its process, or raises anything but its own errors."""
    generator = random.Random(4)
    made = [b"", b"QMXM", b"QMXD", b"QMXZ", bytes(200), b"\xff" * 200]
    for magic, start in ((b"QMXM", 64), (b"QMXD", 32), (b"QMXZ", 160)):
        for _ in range(12):
            body = magic + b"\1\0" + generator.randbytes(generator.choice((start - 6, 200, 5000)))
            made.append(body)
    for data in made:
        assert "read" not in matrix_outcomes(data, reference)
        assert "read" not in dictionary_outcomes(data, reference)
        assert "read" not in dense_outcomes(data, reference)


NAMES = [
    "../x.safetensors",
    "a/x.safetensors",
    "/x.safetensors",
    "..",
    ".",
    "",
    "a\\x.safetensors",
    "x\0.safetensors",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_shard_name_that_leads_elsewhere(name: str, model: Path) -> None:
    (model.parent / "x.safetensors").write_bytes((model / SHARD).read_bytes())

    def rename_in_index(index: Any) -> None:
        index["weight_map"] = {
            tensor: name if shard == SHARD else shard for tensor, shard in index["weight_map"].items()
        }

    models.edit_json(model / "model.safetensors.index.json", rename_in_index)
    models.sign(model, "model.safetensors.index.json")
    assert model_outcomes(model) == {"header"}
    prepared(model)
    models.edit_json(model / "manifest.json", lambda m: m["files"].update({name: m["files"][SHARD]}))
    assert model_outcomes(model) == {"header"}


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickle(model: Path, tmp_path: Path) -> None:
    """A stray pickle is nobody's to open; and no module of ours loads one, but torch's with weights_only."""
    trap = pickle.dumps(_Touch(tmp_path / "sprung"))
    for name in ("pytorch_model.bin", "model.pt", "model.pkl", "data.pkl", "extra.safetensors"):
        (model / name).write_bytes(trap)
    assert model_outcomes(model) == {"read"}
    assert qmoe_format.verify(model).layers == 1
    (model / SHARD).write_bytes(trap)
    models.sign(model, SHARD)
    assert model_outcomes(model) == {"header"}
    assert not (tmp_path / "sprung").exists()
    for folder in ("codec", "qmoe_format", "quantize"):
        for source in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(source.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {"dill", "joblib", "marshal", "shelve"} & set(names), source
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                    assert node.attr == "UnpicklingError", source  # to tell what torch refuses
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    safe = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    assert safe.get("weights_only") == "True", source


@pytest.mark.parametrize("bits", [0, 8, 10, 12, 16])
def test_an_encoder_that_loses_an_odd_tail(bits: int, reference: ReferenceProgram) -> None:
    dictionary = table_dictionary(16) if bits == 16 else build_dictionary(0.85, bits) if bits else None
    known = {dictionary.dictionary_id: dictionary} if dictionary else {}
    shapes = [*itertools.product((1, 2, 31, 32, 33), (1, 2, 5, 127, 129)), (3, 4097), (65, 1)]
    for rows, columns in shapes:
        trits = models.trits(rows, columns, rows, columns, bits)
        trits[:, -1] = trits[-1, :] = 1  # what is lost would be seen
        for backend in BACKENDS[: 2 if rows * columns < 300 else 1]:
            frame = encode(trits, models.levels(rows), dictionary, backend=backend)
            for other in BACKENDS[: 2 if rows * columns < 300 else 1]:
                assert (decode(frame, known, backend=other)[0] == trits).all()
    found = reference("matrix", "--trits", frame, *([dictionary.frame] if dictionary else []))
    assert found == trits.tobytes()
    for dtype, element in (("U8", 1), ("BF16", 2), ("F32", 4), ("I64", 8)):
        for count in (1, 3, 17, 255):
            data = np.random.default_rng(count).bytes(count * element)
            assert bytes(decode_dense(encode_dense(dtype, (count,), data))[2]) == data


def test_saving_over_a_file_that_is_mapped(model: Path) -> None:
    """Who has a model open goes on reading it; who opens it again reads the new one."""
    with qmoe_format.open(model) as opened, c_library.Model(model) as other:
        before = [bytes(opened.layer(LAYER).record(expert)) for expert in range(4)]
        models.write_model(model, layers=1, experts=4, force=True)
        assert [bytes(opened.layer(LAYER).record(expert)) for expert in range(4)] == before
        for expert in range(4):
            assert Matrix(opened.layer(LAYER).frames(expert)[0], opened.layer(LAYER).dictionaries).rows == 9
            with c_library.Expert(other, 0, expert) as mapped:
                assert mapped.record() == before[expert]
        with qmoe_format.open(model) as again:
            assert bytes(again.layer(LAYER).record(0)) != before[0]
    with pytest.raises(qmoe_format.OutputExistsError):
        qmoe_format.PackedModelWriter(model)


# ---- the property ------------------------------------------------------------------------------------------


def test_parsing_gives_a_typed_error_or_a_bounded_plan(model: Path) -> None:
    """Any bytes changed, manifest and all made to fit: both readers give one answer, in little memory."""
    generator = random.Random(5)
    original = models.contents(GOLDEN)
    names = sorted(original.keys() - {"manifest.json", "tokenizer.json"})
    said: dict[str, int] = {}
    for _ in range(150):
        name = generator.choice(names)
        data = bytearray(original[name])
        for _ in range(generator.choice((1, 1, 1, 4))):
            data[generator.randrange(len(data))] = generator.randrange(256)
        (model / name).write_bytes(data)
        models.sign(model)
        outcomes = model_outcomes(model)
        for kind in outcomes:
            said[kind] = said.get(kind, 0) + 1
        (model / name).write_bytes(original[name])
    assert len(said) >= 5 and said.get("read", 0) > 5, said


def test_a_process_under_a_memory_limit_survives_every_invalid_vector() -> None:
    """1 GB of address space beside the imports': nothing large is allocated before a file is refused."""
    program = """
import resource, sys
from pathlib import Path
from qmoe_codec import Dictionary, FormatError, decode
from qmoe_format.dense import decode_dense
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
readers = {".qmxd": Dictionary.from_frame, ".qmxm": lambda f: decode(f, {}), ".qmxz": decode_dense}
refused = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        readers[path.suffix](path.read_bytes())
    except FormatError:
        refused += 1
print(refused)
"""
    if not Path("/proc/self/statm").exists() or "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("NOT TESTED: no such limit here, or a sanitizer that takes all address space")
    vectors = ROOT / "spec" / "vectors" / "invalid"
    done = subprocess.run([sys.executable, "-c", program, vectors], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len(list(vectors.iterdir())) - 1  # one dictionary there is sound
