"""What readers of version 1.0 do with other versions (spec 1.2), and the files that they must open for good.

Readers: the NumPy reference, the C core, the decoder in ``spec/reference``, and for whole models the Python
reader and the one in the C library.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import c_library
import numpy as np
import packed_models as models
import pytest
import qmoe_codec
import torch
from qmoe_codec import BACKENDS, Dictionary, FormatError, crc32c, decode
from qmoe_codec.errors import VersionError
from qmoe_codec.reference import read_dictionary
from reference_program import ReferenceProgram
from safetensors.torch import load_file
from strategies import reseal

import qmoe_format
from qmoe_format.cli import main_verify
from qmoe_format.container import VERSION, VERSION_OF_FEATURES, LayerSpec
from qmoe_format.dense import decode_dense
from qmoe_format.torch import QMoEExperts, bias_shapes
from qmoe_format.unpack import unpack

VECTORS = Path(__file__).parents[1] / "spec" / "vectors"
RELEASED = sorted(path.stem for path in (VECTORS / "models").glob("*.json"))
LAYER = "model.layers.0.mlp.experts"
SHARD = "model-00001-of-00003.safetensors"


# ---- files of every released version ----------------------------------------------------------------------


def test_this_version_has_a_model() -> None:
    assert {VERSION, VERSION_OF_FEATURES} <= set(RELEASED)


def expectations(version: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((VECTORS / "models" / f"{version}.json").read_text())["expect"]
    return found


@pytest.mark.parametrize("version", RELEASED)
def test_models_never_change(version: str) -> None:
    files = json.loads((VECTORS / "models" / f"{version}.json").read_text())["files"]
    found = {path.name: path.read_bytes() for path in (VECTORS / "models" / version).iterdir()}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} == files


def sha256(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("version", RELEASED)
def test_python_opens_every_released_version(version: str) -> None:
    path = VECTORS / "models" / version
    expected = expectations(version)
    assert qmoe_format.verify(path).matrices == len(expected["experts"])
    experts, dense = {}, {}
    with qmoe_format.open(path) as model:
        for prefix in model.layers:
            layer = model.layer(prefix)
            for expert in range(layer.experts):
                for projection in layer.spec.projections:
                    matrix = layer.matrix(expert, projection.name)
                    experts[projection.matrix_name(expert)] = {
                        "shape": [matrix.rows, matrix.columns],
                        "trits_sha256": sha256(matrix.decode()),
                        "levels_sha256": sha256(matrix.levels),
                    }
        for name in model.dense_names():
            dtype, shape, data = model.dense(name)
            dense[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    assert (experts, dense) == (expected["experts"], expected["dense"])


def golden_input(columns: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What `outputs` are the outputs to."""
    return ((np.arange(columns) % 7 - 3) / 4).astype(np.float32)


@pytest.mark.parametrize("version", [version for version in RELEASED if "outputs" in expectations(version)])
def test_experts_of_every_released_version_compute_what_they_did(version: str) -> None:
    """Biases, fused and apart, and a gating: in torch, by the Python reader and the C core."""
    with qmoe_format.open(VECTORS / "models" / version) as model:
        assert model.layers.keys() == expectations(version)["outputs"].keys()
        for prefix, outputs in expectations(version)["outputs"].items():
            layer = model.layer(prefix)
            biases = {
                name: torch.stack(
                    [bias_of(model, name, layer.spec, expert) for expert in range(layer.experts)]
                )
                for name in bias_shapes(layer.spec)
            }
            activation = None if layer.spec.gating else torch.nn.SiLU()
            module = QMoEExperts.from_packed(layer, activation, biases=biases)
            x = torch.from_numpy(golden_input(module.hidden_dim)).repeat(layer.experts, 1)
            index = torch.arange(layer.experts).reshape(-1, 1)
            found = module(x, index, torch.ones(index.shape))
            torch.testing.assert_close(found, torch.tensor(outputs), rtol=1e-5, atol=1e-5)


def bias_of(model: qmoe_format.PackedModel, parameter: str, spec: LayerSpec, expert: int) -> torch.Tensor:
    """One expert's part of a parameter of the torch module, found by its name in the model."""
    apart = f"{spec.prefix}.{expert}.{parameter.removesuffix('_bias')}.bias"
    name = apart if apart in model.dense_names() else f"{spec.prefix}.{parameter}"
    dtype, shape, data = model.dense(name)
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    tensor = torch.frombuffer(bytearray(data), dtype=dtypes[dtype]).reshape(shape).float()
    return tensor if name == apart else tensor[expert]


def test_a_fused_model_is_unpacked_as_it_was(tmp_path: Path) -> None:
    """Spec 6.3 by hand: rows that take turns, transposed."""
    unpack(VECTORS / "models" / "1.1", tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    fused, down = plain[f"{LAYER}.gate_up_proj"], plain[f"{LAYER}.down_proj"]
    assert (fused.shape, down.shape) == ((3, 40, 18), (3, 9, 40))
    with qmoe_format.open(VECTORS / "models" / "1.1") as model:
        layer = model.layer(LAYER)
        for expert in range(3):
            parts = {
                "gate_proj": fused[expert, :, 0::2],
                "up_proj": fused[expert, :, 1::2],
                "down_proj": down[expert],
            }
            for name, part in parts.items():
                weights = torch.from_numpy(layer.matrix(expert, name).dequantize("float32"))
                assert torch.equal(part.T, weights.to(torch.bfloat16))


@pytest.mark.parametrize("version", RELEASED)
def test_the_c_library_opens_every_released_version(version: str) -> None:
    """Every matrix; and, from what it says of biases and gatings, every output."""
    expected = expectations(version)
    seen = 0
    with c_library.Model(VECTORS / "models" / version) as model:
        for number in range(model.layer_count()):
            prefix, entry = model.layer(number).prefix.decode(), json.loads(model.layer_json(number))
            for expert in range(model.layer(number).experts):
                with c_library.Expert(model, number, expert) as opened:
                    for projection, matrix in zip(entry["projections"], opened.matrices, strict=True):
                        tensor = projection["tensor"]
                        name = tensor.replace("{expert}", str(expert))
                        if name == tensor:
                            name = f"{tensor}[{expert}]: {projection['name']}"
                        assert sha256(matrix.decode()) == expected["experts"][name]["trits_sha256"]
                        assert sha256(matrix.levels()) == expected["experts"][name]["levels_sha256"]
                        seen += 1
                    if "outputs" in expected:
                        found = c_output(model, entry, opened, expert)
                        np.testing.assert_allclose(
                            found, expected["outputs"][prefix][expert], rtol=1e-5, atol=1e-5
                        )
    assert seen == len(expected["experts"])


def c_output(
    model: c_library.Model, entry: dict[str, Any], opened: c_library.Expert, expert: int
) -> np.ndarray[Any, Any]:
    """What an expert makes of the golden input, as somebody who links the C library would compute it."""
    number = {projection["role"]: n for n, projection in enumerate(entry["projections"])}

    def product(role: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        projection = entry["projections"][number[role]]
        tensor = model.find_tensor(projection["bias"].replace("{expert}", str(expert)))
        info = model.tensor(tensor)
        data = model.read_tensor(tensor, 0, info.size)
        bias = np.frombuffer(data, "<f4" if info.dtype == b"F32" else "<u2")
        if info.dtype == b"BF16":
            bias = (bias.astype("<u4") << 16).view("<f4")
        if "{expert}" not in projection["tensor"]:
            alike = [n for n, p in enumerate(entry["projections"]) if p["tensor"] == projection["tensor"]]
            bias = bias.reshape(info.shape[0], info.shape[1])[expert, alike.index(number[role]) :: len(alike)]
        return opened.matrices[number[role]].matmul(x[None])[0] + bias

    up = product("up", golden_input(opened.matrices[number["up"]].columns))
    if "gating" not in entry:
        return product("down", up / (1 + np.exp(-up)))
    alpha, limit = entry["gating"]["alpha"], entry["gating"]["limit"]
    gate = np.minimum(product("gate", golden_input(opened.matrices[number["gate"]].columns)), limit)
    inner = (np.clip(up, -limit, limit) + 1) * gate / (1 + np.exp(-alpha * gate))
    return product("down", inner.astype(np.float32))


# ---- frames ------------------------------------------------------------------------------------------------


def vector(name: str) -> bytearray:
    return bytearray((VECTORS / "valid" / name).read_bytes())


def seal_dictionary(frame: bytearray) -> bytes:
    struct.pack_into("<I", frame, 28, crc32c(bytes(frame[32:]), crc32c(bytes(frame[:28]))))
    return bytes(frame)


def seal_dense(frame: bytearray) -> bytes:
    struct.pack_into("<I", frame, 156, crc32c(bytes(frame[:156])))
    return bytes(frame)


DICTIONARY = bytes(vector("dictionary-trees-10.qmxd"))


def answers(kind: str, frame: bytes, reference: ReferenceProgram) -> set[str]:
    """What all readers say to a frame: "read", or the kind and field of their refusal."""
    known = Dictionary.from_frame(DICTIONARY)
    found = {known.dictionary_id: known}
    readers: dict[str, list[Callable[[], object]]] = {
        "dictionary": [lambda: Dictionary.from_frame(frame), lambda: read_dictionary(frame)],
        "matrix": [
            lambda: decode(frame, found, backend="c"),
            lambda: decode(frame, found, backend=BACKENDS[1]),
        ],
        "dense": [lambda: decode_dense(frame)],
    }
    said = set()
    for reader in readers[kind]:
        try:
            reader()
            said.add("read")
        except FormatError as error:
            said.add(f"{error.kind} {error.field}")
    files = (frame, DICTIONARY) if kind == "matrix" else (frame,)
    answer = reference(kind, *files)
    said.add(" ".join(answer) if isinstance(answer, tuple) else "read")
    return said


FRAMES: dict[str, tuple[str, Callable[[bytearray], bytes]]] = {
    "dictionary": ("dictionary-trees-10.qmxd", seal_dictionary),
    "matrix": ("matrix-trees-10-odd.qmxm", reseal),
    "dense": ("dense-F32.qmxz", seal_dense),
}


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "read"),
        ({5: 1}, "read"),  # a newer minor version
        ({5: 255}, "read"),
        ({4: 2}, "version version_major"),
        ({4: 0}, "version version_major"),
        ({4: 2, 5: 9, 6: 99}, "version version_major"),  # whatever else may have changed
        ({8: 1}, "version flags"),
        ({11: 0x80}, "version flags"),
        ({5: 1, 8: 1, 6: 99, 7: 99}, "version flags"),  # a flag comes before what it may give a meaning
    ],
)
def test_versions_of_frames(
    kind: str, change: dict[int, int], expected: str, reference: ReferenceProgram
) -> None:
    name, seal = FRAMES[kind]
    frame = vector(name)
    for offset, value in change.items():
        frame[offset] = value
    assert answers(kind, seal(frame), reference) == {expected}


@pytest.mark.parametrize(
    ("kind", "offset", "field"),
    [
        ("dictionary", 6, "kind"),
        ("matrix", 6, "codec"),
        ("matrix", 7, "level_format"),
        ("dense", 12, "dtype"),
        ("dictionary", 24, "reserved"),
        ("dense", 152, "reserved"),
    ],
)
def test_what_is_unknown_without_a_flag_is_illegal(
    kind: str, offset: int, field: str, reference: ReferenceProgram
) -> None:
    name, seal = FRAMES[kind]
    frame = vector(name)
    frame[5] = 1  # a newer minor version makes no difference
    frame[offset] = 99
    assert answers(kind, seal(frame), reference) == {f"header {field}"}


def test_a_major_version_is_told_even_where_the_header_has_grown(reference: ReferenceProgram) -> None:
    """A checksum of 60 bytes may no longer be where 1.0 has it; the version is looked at first."""
    frame = vector("matrix-trees-10-odd.qmxm")
    frame[4] = 2
    assert answers("matrix", bytes(frame), reference) == {"version version_major"}


# ---- containers --------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    models.restore(tmp_path / "model", models.contents(VECTORS / "models" / "1.0"))
    return tmp_path / "model"


def set_config(path: Path, **changes: object) -> None:
    models.edit_json(path / "config.json", lambda config: config["quantization_config"].update(changes))
    models.sign(path, "config.json")


def set_manifest(path: Path, **changes: object) -> None:
    models.edit_json(path / "manifest.json", lambda manifest: manifest.update(changes))


def model_answers(path: Path) -> set[str]:
    """What both readers of containers say: "read", or the kind of their refusal."""
    said = set()
    try:
        qmoe_format.open(path).close()
        said.add("read")
    except FormatError as error:
        said.add(error.kind)
    try:
        with c_library.Model(path):
            said.add("read")
    except c_library.RefusalError as error:
        said.add(error.kind)
    return said


@pytest.mark.parametrize(
    ("version", "expected"),
    [("1.1", "read"), ("1.999", "read"), ("2.0", "version"), ("0.9", "version"), ("1", "header")],
)
@pytest.mark.parametrize("change", [set_config, set_manifest], ids=["config", "manifest"])
def test_versions_of_containers(
    model: Path, change: Callable[..., None], version: str, expected: str
) -> None:
    change(model, version=version)
    assert model_answers(model) == {expected}


@pytest.mark.parametrize(
    ("requires", "expected"),
    [
        ([], "read"),
        (["column_bands"], "version"),
        ("column_bands", "header"),
        ([1], "header"),
        (None, "header"),
    ],
)
def test_what_a_container_requires(model: Path, requires: object, expected: str) -> None:
    set_config(model, version="1.3", requires=requires)
    assert model_answers(model) == {expected}


def test_unknown_keys_and_files_are_ignored(model: Path) -> None:
    set_config(model, unknown={"a": [1]})
    set_manifest(model, unknown=[2])
    (model / "unknown.bin").write_bytes(b"3")
    assert model_answers(model) == {"read"}
    assert qmoe_format.verify(model).layers == 1


def test_an_unknown_optional_section_is_left_aside(model: Path, tmp_path: Path) -> None:
    header, data = models.split((model / SHARD).read_bytes())
    for name in (f"{LAYER}.qmoe_column_order", "model.norm.weight.qmoe_hint2"):
        header[name] = {"dtype": "U8", "shape": [3], "data_offsets": [len(data), len(data) + 3]}
        data += b"new"
    (model / SHARD).write_bytes(models.join(header, data))

    def edit(index: Any) -> None:
        index["weight_map"].update(dict.fromkeys((n for n in header if n != "__metadata__"), SHARD))

    models.edit_json(model / "model.safetensors.index.json", edit)
    models.sign(model)
    set_config(model, version="1.1")
    set_manifest(model, version="1.1")
    assert model_answers(model) == {"read"}
    with qmoe_format.open(model) as opened:
        assert opened.dense_names() == ["model.embed_tokens.weight", "model.norm.weight"]
    report = qmoe_format.verify(model)
    assert (report.matrices, report.dense_tensors) == (12, 2)
    # Its bytes are covered all the same.
    damaged = bytearray((model / SHARD).read_bytes())
    damaged[-1] ^= 1
    (model / SHARD).write_bytes(damaged)
    with pytest.raises(qmoe_format.ChecksumError, match="sha256"):
        qmoe_format.verify(model)


@pytest.mark.parametrize("suffix", [".qmoe_store", ".qmoe_index", ".qmoe_dictionaries", ".qmoe_zstd"])
def test_a_known_section_that_belongs_to_nothing_is_illegal(model: Path, suffix: str) -> None:
    header, data = models.split((model / SHARD).read_bytes())
    name = f"other{suffix}"
    header[name] = {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}
    (model / SHARD).write_bytes(models.join(header, data + b"x"))
    models.edit_json(model / "model.safetensors.index.json", lambda i: i["weight_map"].update({name: SHARD}))
    models.sign(model)
    assert model_answers(model) == {"header"}


def test_writers_leave_names_of_sections_to_the_format(tmp_path: Path) -> None:
    with qmoe_format.PackedModelWriter(tmp_path / "out") as writer:
        with pytest.raises(qmoe_format.CheckpointError, match="cannot be packed"):
            writer.add_dense("model.norm.weight.qmoe_hint2", "U8", (1,), b"x")
        writer.add_dense("model.qmoe_norm.weight", "U8", (1,), b"x")


def test_both_versions_of_a_model_agree(model: Path) -> None:
    """The manifest is covered by no hash; a flipped bit must not make its version a newer one."""
    set_manifest(model, version="1.1")
    with pytest.raises(qmoe_format.HeaderError, match=r"manifest\.json: version: contradicts config"):
        qmoe_format.verify(model)


# ---- exit codes --------------------------------------------------------------------------------------------


def test_exit_codes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_verify([str(model), "--quiet"]) == 0
    set_config(model, requires=["column_bands"])
    assert main_verify([str(model), "--quiet"]) == 4
    assert "requires" in capsys.readouterr().err
    set_config(model, requires=[], version="2.0")
    assert main_verify([str(model), "--quiet"]) == 4
    set_config(model, version="1.0", layers=[])
    assert main_verify([str(model), "--quiet"]) == 3
    assert VersionError.exit_code == 4 and FormatError.exit_code == 3
    assert qmoe_codec.MemoryLimitError.exit_code == 1
