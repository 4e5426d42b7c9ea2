"""Damage is found: flipped bits, cut files, files of another model; and it is said where it lies."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
from pathlib import Path
from types import ModuleType

import packed_models as models
import pytest
from qmoe_codec import crc32c, flipped_bit, reference

import qmoe_format
from qmoe_format import ChecksumError, FormatError
from qmoe_format.cli import main_verify

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "spec" / "vectors" / "models" / "1.0"
SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """``benchmarks/bit_flips.py``."""
    spec = importlib.util.spec_from_file_location("bit_flips", ROOT / "benchmarks" / "bit_flips.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path: Path) -> Path:
    models.restore(tmp_path / "model", models.contents(GOLDEN))
    return tmp_path / "model"


# ---- flipped bits ------------------------------------------------------------------------------------------


def test_flipped_bits_anywhere_are_found_and_located(benchmark: ModuleType, tmp_path: Path) -> None:
    """A few hundred; ``benchmarks/results/bit_flips.json`` has 12,000."""
    benchmark.write_model(tmp_path / "model")
    result = benchmark.measure(tmp_path / "model", 250, seed=2)
    assert result["missed"] == [] and result["not_so_named"] == []
    assert result["detected"] == result["named_with_all_that_is_known_of_the_place"] == 250
    assert result["of_these_in_stores_dictionaries_or_dense_frames"] > 100


def test_every_bit_of_the_manifest_matters(model: Path) -> None:
    """It is the one file that no hash covers."""
    data = (model / "manifest.json").read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        (model / "manifest.json").write_bytes(damaged)
        with pytest.raises(FormatError):
            qmoe_format.verify(model)


def test_every_bit_of_the_version_in_the_manifest_matters(model: Path) -> None:
    data = (model / "manifest.json").read_bytes()
    start = data.index(b'"1.0"')
    for bit in range(8 * start, 8 * (start + 5)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (model / "manifest.json").write_bytes(damaged)
        with pytest.raises(FormatError):
            qmoe_format.verify(model)


@pytest.mark.parametrize("size", [1, 3, 64, 4096, 1_000_003])
def test_a_checksum_tells_which_bit_was_flipped(size: int) -> None:
    generator = random.Random(size)
    data = bytearray(generator.randbytes(size))
    stored = crc32c(bytes(data))
    bits = (
        range(8 * size) if size < 4 else [0, 8 * size - 1, *(generator.randrange(8 * size) for _ in range(6))]
    )
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
        assert flipped_bit(size, stored, crc32c(bytes(data))) == bit
        data[bit // 8] ^= 1 << bit % 8
    assert flipped_bit(size, stored, stored) is None


@pytest.mark.parametrize("size", [0, 1, 7, 3071, 3072, 3073, 6144, 9999, 12_288])
def test_the_checksum_of_the_core_is_that_of_the_reference(size: int) -> None:
    """It takes three parts of 1 kB side by side where the processor can."""
    data = random.Random(size).randbytes(size + 3)
    for start, value in ((0, 0), (3, 0xDEADBEEF)):
        part = data[start : start + size]
        assert crc32c(part, value) == reference.crc32c(part, value)
        half = size // 2
        assert crc32c(part[half:], crc32c(part[:half], value)) == reference.crc32c(part, value)


def test_a_checksum_does_not_blame_one_bit_for_several() -> None:
    generator = random.Random(7)
    data = generator.randbytes(2000)
    stored = crc32c(data)
    for count in (2, 3, 40):
        damaged = bytearray(data)
        for bit in generator.sample(range(8 * len(data)), count):
            damaged[bit // 8] ^= 1 << bit % 8
        assert flipped_bit(len(data), stored, crc32c(bytes(damaged))) is None
    assert flipped_bit(0, 0, 1) is None and flipped_bit(1 << 28, 0, 1) is None


def test_what_verify_says_of_a_flipped_bit(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with qmoe_format.open(model) as opened:
        layer = opened.layer("model.layers.0.mlp.experts")
        frame = bytes(layer.frames(2)[1])
    shard = bytearray((model / SHARD).read_bytes())
    at = shard.index(frame) + len(frame) - 20
    shard[at] ^= 16
    (model / SHARD).write_bytes(shard)
    assert main_verify([str(model), "--quiet"]) == 3
    said = capsys.readouterr().err
    assert f"{SHARD}: model.layers.0.mlp.experts: expert 2: up_proj: body_crc32c" in said
    assert f"one bit is wrong, in codewords (bit 4 of byte {len(frame) - 20} of the frame)" in said or (
        f"one bit is wrong, in trits (bit 4 of byte {len(frame) - 20} of the frame)" in said
    )
    shard[at] ^= 3
    (model / SHARD).write_bytes(shard)
    with pytest.raises(ChecksumError, match="more than one bit of the body is wrong"):
        qmoe_format.verify(model)


def test_what_has_no_checksum_of_its_own_is_named(model: Path) -> None:
    with qmoe_format.open(model) as opened:
        name = opened.dense_info("model.norm.weight").shard
        start = opened.shards[name].tensors["model.norm.weight"].start
    shard = bytearray((model / name).read_bytes())
    shard[start] ^= 1
    (model / name).write_bytes(shard)
    with pytest.raises(ChecksumError, match=r"in the header or model\.norm\.weight"):
        qmoe_format.verify(model)


# ---- cut files ---------------------------------------------------------------------------------------------


def test_truncation_at_every_byte(model: Path) -> None:
    """Of every file, of a model of a few kB; with the manifest as it was, and made to agree."""
    for name, data in models.contents(GOLDEN).items():
        for size in reversed(range(len(data))):
            if data[size - 2 : size + 2] == b" " * 4 and size % 64:
                continue  # of a header's long run of spaces, some
            os.truncate(model / name, size)
            if name == "manifest.json" and data[size:].isspace():
                continue  # without its last newline it says the same
            with pytest.raises(FormatError):
                qmoe_format.open(model)
            if name.endswith((".safetensors", "config.json")) and size % 16 == 0:
                manifest = (model / "manifest.json").read_bytes()
                models.sign(model, name)
                with pytest.raises(FormatError):
                    qmoe_format.open(model)
                (model / "manifest.json").write_bytes(manifest)
        (model / name).write_bytes(data)
    assert qmoe_format.verify(model).layers == 1


# ---- files of another model --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [5, 6])
def test_a_shard_of_another_model(model: Path, tmp_path: Path, seed: int) -> None:
    """Of the same shapes, so that its headers agree and nothing but its hash tells."""
    with qmoe_format.open(GOLDEN) as opened:
        layer = opened.layer("model.layers.0.mlp.experts")
        dictionaries, spec = layer.dictionary_bytes, layer.spec
        records = [([bytes(f) for f in layer.frames(e)], int(layer.index[e, 2])) for e in range(4)]

        class Dictionaries:
            def to_bytes(self) -> bytes:
                return bytes(dictionaries)

        changed = [(frames, tokens + seed) for frames, tokens in records]
        with qmoe_format.PackedModelWriter(tmp_path / "other") as writer:
            writer.add_layer(spec, changed, Dictionaries())
            writer.add_dense("x", "U8", (1,), b"x")
            writer.finish({"model_type": "olmoe"}, {})
    other = next(path for path in (tmp_path / "other").iterdir() if path.name.startswith("model-00001"))
    assert other.stat().st_size == (model / SHARD).stat().st_size
    shutil.copyfile(other, model / SHARD)
    with qmoe_format.open(model) as opened:  # which does not read all bytes
        assert opened.layer("model.layers.0.mlp.experts").index[0, 2] == records[0][1] + seed
    with pytest.raises(ChecksumError, match=f"{SHARD}: sha256"):
        qmoe_format.verify(model)


def test_shards_of_one_model_exchanged(model: Path) -> None:
    names = sorted(path.name for path in model.glob("*.safetensors"))
    first, second = ((model / name).read_bytes() for name in names[1:3])
    (model / names[1]).write_bytes(second)
    (model / names[2]).write_bytes(first)
    with pytest.raises(FormatError):
        qmoe_format.open(model)
    models.sign(model)
    with pytest.raises(FormatError, match="in the index but not in the shard"):
        qmoe_format.open(model)


# ---- loading -----------------------------------------------------------------------------------------------


def test_loading_checks_headers_always_and_bodies_by_option(model: Path) -> None:
    with qmoe_format.open(model) as opened:
        frame = bytes(opened.layer("model.layers.0.mlp.experts").frames(0)[0])
    shard = bytearray((model / SHARD).read_bytes())
    start = shard.index(frame)
    body, header = bytearray(shard), bytearray(shard)
    body[start + 64] ^= 1
    header[start + 12] ^= 1
    (model / SHARD).write_bytes(body)
    with qmoe_format.open(model) as opened:
        layer = opened.layer("model.layers.0.mlp.experts")
        assert layer.matrix(0, "gate_proj", verify=False).rows == 9
        with pytest.raises(ChecksumError, match="body_crc32c"):
            layer.matrix(0, "gate_proj")
    (model / SHARD).write_bytes(header)
    with qmoe_format.open(model) as opened, pytest.raises(ChecksumError, match="header_crc32c"):
        opened.layer("model.layers.0.mlp.experts").matrix(0, "gate_proj", verify=False)
