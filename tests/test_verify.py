"""verify finds any fault, and says where it is."""

from __future__ import annotations

import random
from pathlib import Path

import packed_models as models
import pytest
import qmoe_codec

import qmoe_format
from qmoe_format import (
    ArgumentError,
    ChecksumError,
    FormatError,
    HeaderError,
    LayerSpec,
    MissingDictionaryError,
    PackedModelWriter,
    PayloadError,
    Projection,
    RowIndexError,
    SizeError,
    TruncatedError,
    VerifyReport,
    VersionError,
)
from qmoe_format.safetensors_io import SafetensorsFile

SHARD = "model-00001-of-00003.safetensors"
LAYER = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A very small model with one of everything: raw and dictionary frames, plain and compressed tensors."""
    out = tmp_path_factory.mktemp("model") / "out"
    tokenizer = out.parent / "tokenizer.json"
    tokenizer.write_text("{}")
    projections = tuple(
        Projection(f"{role}_proj", role, f"{LAYER}.{{expert}}.{role}_proj.weight", 6, 20)
        for role in ("up", "down")
    )
    spec = LayerSpec(LAYER, 2, projections, "BF16")
    dictionary = qmoe_codec.build_dictionary(0.8, 8)

    class Dictionaries:
        def to_bytes(self) -> bytes:
            return dictionary.frame

    def records(expert: int) -> list[bytes]:
        return [
            qmoe_codec.encode(models.trits(6, 20, expert, number), models.levels(6), choice)
            for number, choice in enumerate((dictionary, None))
        ]

    with PackedModelWriter(out) as writer:
        writer.add_file(tokenizer)
        writer.add_layer(spec, [(records(0), 5), (records(1), -1)], Dictionaries())
        writer.add_dense_zstd("norm", "F32", (64,), bytes(256))
        writer.add_dense("bias", "BF16", (3,), b"abcdef")
        writer.finish({"model_type": "olmoe"}, {})
    return models.contents(out)


@pytest.fixture
def out(tmp_path: Path, original: dict[str, bytes]) -> Path:
    models.restore(tmp_path / "out", original)
    return tmp_path / "out"


def spans(out: Path) -> dict[str, tuple[int, int]]:
    """Bytes [start, end) of layer 0's shard: the store's records and their padding, and the dictionaries."""
    file = SafetensorsFile(out / SHARD)
    dictionaries = file.tensors[LAYER + ".qmoe_dictionaries"]
    result = {"dictionaries": (dictionaries.start, dictionaries.end)}
    with qmoe_format.open(out) as model:
        layer = model.layer(LAYER)
        start = file.tensors[LAYER + ".qmoe_store"].start
        for expert in range(layer.experts):
            position = start + int(layer.index[expert, 0])
            for projection, frame in zip(layer.spec.projections, layer.frames(expert), strict=True):
                result[f"expert {expert}: {projection.name}"] = (position, position + len(frame))
                position += len(frame)
            result[f"padding {expert}"] = (position, position + len(layer.padding(expert)))
    return result


def test_report_and_progress(out: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = qmoe_format.verify(out, progress=lambda done, total: seen.append((done, total)))
    sizes = [path.stat().st_size for path in out.iterdir() if path.name != "manifest.json"]
    assert report == VerifyReport(
        files=len(sizes),
        bytes=sum(sizes),
        layers=1,
        experts=2,
        matrices=4,
        weights=480,
        dense_tensors=2,
        dense_frames=1,
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {seen[-1][0]}


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no such directory"):
        qmoe_format.verify(tmp_path / "absent")
    with pytest.raises(TruncatedError, match="not a packed model"):
        qmoe_format.verify(tmp_path)


def test_every_byte_of_the_layer_matters_and_is_located(out: Path, original: dict[str, bytes]) -> None:
    data = original[SHARD]
    generator = random.Random(1)
    for place, (start, end) in spans(out).items():
        wanted = f"expert {place[-1]}" if place.startswith("padding") else place
        for position in range(start, end):
            damaged = bytearray(data)
            damaged[position] ^= 1 << generator.randrange(8)
            (out / SHARD).write_bytes(damaged)
            with pytest.raises(FormatError) as caught:
                qmoe_format.verify(out)
            message = str(caught.value)
            assert wanted in message
            assert SHARD in message
            assert LAYER in message


def test_flips_under_a_signed_manifest_give_a_typed_error_or_the_model(
    out: Path, original: dict[str, bytes]
) -> None:
    """Bits that only the manifest guards, such as those of a name, may change; nothing else may happen."""
    generator = random.Random(3)
    refused = 0
    names = sorted(original.keys() - {"manifest.json", "tokenizer.json"})
    for _ in range(400):
        name = generator.choice(names)
        data = bytearray(original[name])
        for _ in range(generator.choice((1, 1, 8))):
            data[generator.randrange(len(data))] = generator.randrange(256)
        (out / name).write_bytes(data)
        models.sign(out)
        try:
            qmoe_format.verify(out)
        except FormatError as error:
            refused += 1
            assert "\n" not in str(error)
        (out / name).write_bytes(original[name])
    assert refused > 100


def test_a_flip_in_a_plain_tensor_is_told_by_its_file(out: Path, original: dict[str, bytes]) -> None:
    name = next(name for name, data in original.items() if data.endswith(b"abcdef"))
    (out / name).write_bytes(original[name][:-1] + b"g")
    with pytest.raises(ChecksumError, match=f"{name}: sha256"):
        qmoe_format.verify(out)
    with qmoe_format.open(out) as model:  # which does not read all bytes
        assert bytes(model.dense("bias")[2]) == b"abcdeg"


def spoil_frame(out: Path, place: str, edit: dict[int, bytes], *, header: bool = True) -> None:
    """Change bytes of a frame, and bring its checksums and the manifest in step."""
    start, end = spans(out)[place]
    shard = bytearray((out / SHARD).read_bytes())
    frame = shard[start:end]
    for position, content in edit.items():
        frame[position : position + len(content)] = content
    if header:
        frame[56:60] = qmoe_codec.crc32c(bytes(frame[64:])).to_bytes(4, "little")
        frame[60:64] = qmoe_codec.crc32c(bytes(frame[:60])).to_bytes(4, "little")
    shard[start:end] = frame
    (out / SHARD).write_bytes(shard)
    models.sign(out)


@pytest.mark.parametrize(
    ("place", "edit", "error", "field"),
    [
        ("expert 0: up_proj", {0: b"QMXD"}, qmoe_format.MagicError, "magic"),
        ("expert 0: up_proj", {4: b"\2"}, VersionError, "version_major"),
        ("expert 0: up_proj", {8: b"\1"}, VersionError, "flags"),
        ("expert 1: up_proj", {12: b"\7"}, HeaderError, "rows, columns"),
        ("expert 1: up_proj", {12: b"\xff"}, SizeError, "body_size"),
        ("expert 1: up_proj", {16: b"\7"}, HeaderError, "columns"),
        ("expert 1: down_proj", {16: b"\x15"}, HeaderError, "rows, columns"),
        ("expert 1: down_proj", {32: b"\x10"}, SizeError, "body_size"),
        ("expert 0: up_proj", {40: b"\1\2\3\4"}, MissingDictionaryError, "dictionary_ids"),
        ("expert 1: up_proj", {96: b"\1"}, RowIndexError, ""),
        ("expert 1: down_proj", {64: b"\x80\x7f"}, PayloadError, "level"),
        ("expert 0: down_proj", {96: b"\xff"}, PayloadError, "trits"),
    ],
)
def test_faults_of_frames_are_located(
    out: Path, place: str, edit: dict[int, bytes], error: type[FormatError], field: str
) -> None:
    spoil_frame(out, place, edit)
    with pytest.raises(FormatError) as caught:
        qmoe_format.verify(out)
    assert type(caught.value) is error, str(caught.value)
    assert f"{out / SHARD}: {LAYER}: {place}" in str(caught.value)
    assert field in str(caught.value)


def test_checksums_of_frames_are_located(out: Path) -> None:
    spoil_frame(out, "expert 1: up_proj", {70: b"\xee"}, header=False)
    with pytest.raises(ChecksumError, match=r"expert 1: up_proj: body_crc32c"):
        qmoe_format.verify(out)


def test_padding_between_records_is_zero(out: Path) -> None:
    start, end = spans(out)["padding 0"]
    assert end > start
    shard = bytearray((out / SHARD).read_bytes())
    shard[end - 1] = 1
    (out / SHARD).write_bytes(shard)
    models.sign(out)
    with pytest.raises(PayloadError, match="expert 0: padding"):
        qmoe_format.verify(out)


def test_a_file_that_changed_is_told_by_its_hash(out: Path) -> None:
    (out / "tokenizer.json").write_text("[]")
    with pytest.raises(ChecksumError, match=r"tokenizer\.json: sha256"):
        qmoe_format.verify(out)


def rewrite_dictionaries(out: Path, data: bytes) -> None:
    header, content = models.split((out / SHARD).read_bytes())
    begin, _ = header[LAYER + ".qmoe_dictionaries"]["data_offsets"]
    header[LAYER + ".qmoe_dictionaries"].update(shape=[len(data)], data_offsets=[begin, begin + len(data)])
    (out / SHARD).write_bytes(models.join(header, content[:begin] + data))
    models.edit_json(
        out / "config.json",
        lambda c: c["quantization_config"]["layers"][LAYER].update(dictionaries_bytes=len(data)),
    )
    models.sign(out)


def test_dictionaries_of_a_layer(out: Path) -> None:
    used = qmoe_codec.build_dictionary(0.8, 8)
    other = qmoe_codec.build_dictionary(0.9, 8)
    rising = sorted((used, other), key=lambda dictionary: dictionary.dictionary_id)
    rewrite_dictionaries(out, rising[0].frame + rising[1].frame)
    assert qmoe_format.verify(out).matrices == 4
    faults: list[tuple[bytes, type[FormatError]]] = [
        (rising[1].frame + rising[0].frame, HeaderError),
        (used.frame * 2, HeaderError),
        (used.frame + b"\0", TruncatedError),
        (used.frame[:-1], TruncatedError),
        (b"", MissingDictionaryError),
        (other.frame, MissingDictionaryError),
    ]
    for data, error in faults:
        rewrite_dictionaries(out, data)
        with pytest.raises(FormatError) as caught:
            qmoe_format.verify(out)
        assert type(caught.value) is error, str(caught.value)
        assert LAYER in str(caught.value)
