"""A packed model as one HDF5 file: lossless both ways, and nothing believed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from packed_models import contents, edit_json, layer_spec, records, sign, write_model
from qmoe_codec import DictionarySet, Matrix, read_frame_header
from source_models import random_model

import qmoe_format
from qmoe_format import PackedModelWriter, QMoEError, cli
from qmoe_format.hdf5 import as_directory, from_hdf5, to_hdf5, verify_hdf5

PREFIX = "model.layers.0.mlp.experts"
FRAME = f"layers/{PREFIX}/experts/1/up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hdf5") / "model")


@pytest.fixture(scope="module")
def file(model: Path) -> Path:
    to_hdf5(model, model.parent / "model.h5")
    return model.parent / "model.h5"


@pytest.fixture
def copy(file: Path, tmp_path: Path) -> Path:
    (tmp_path / "copy.h5").write_bytes(file.read_bytes())
    return tmp_path / "copy.h5"


# ---- lossless ----------------------------------------------------------------------------------------------


def test_both_ways(model: Path, file: Path, tmp_path: Path) -> None:
    from_hdf5(file, tmp_path / "model")
    assert contents(tmp_path / "model") == contents(model)
    assert verify_hdf5(file) == qmoe_format.verify(tmp_path / "model")
    to_hdf5(tmp_path / "model", tmp_path / "again.h5")
    assert (tmp_path / "again.h5").read_bytes() == file.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_any_tensor(tmp_path: Path) -> None:
    """Dtypes that HDF5 has not, too many dimensions, names with slashes and dots, files beside."""
    names = ["a/b", "..", ".", "50%", "%2F", "größe", "a" * 300]
    (tmp_path / "notes.md").write_bytes(bytes(range(256)))
    (tmp_path / "empty.txt").write_bytes(b"")
    with PackedModelWriter(tmp_path / "model") as writer:
        writer.add_file(tmp_path / "notes.md")
        writer.add_file(tmp_path / "empty.txt")
        spec, dictionaries = layer_spec(7, experts=1), DictionarySet()
        writer.add_layer(spec, records(spec, dictionaries), dictionaries)
        for number, name in enumerate(names):
            writer.add_dense(name, "U8", (number,), bytes(range(number)))
        for dtype in ("BF16", "F8_E4M3", "F4", "F6_E2M3", "C64", "I8", "U16", "F64", "BOOL"):
            size = qmoe_format.safetensors_io.tensor_bytes(dtype, (4, 2))
            writer.add_dense(f"dtype.{dtype}", dtype, (4, 2), bytes(range(1, size + 1)))
        writer.add_dense("deep", "I16", (1,) * 40 + (2,), b"abcd")
        writer.add_dense("none", "F32", (0, 5), b"")
        writer.finish({"model_type": "olmoe"}, {})
    to_hdf5(tmp_path / "model", tmp_path / "model.h5")
    from_hdf5(tmp_path / "model.h5", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "model")
    assert verify_hdf5(tmp_path / "model.h5").dense_tensors == len(names) + 11


def test_frames_are_datasets_with_attributes(model: Path, file: Path) -> None:
    """What a program sees that knows HDF5 and the frames, and nothing of this package's reader."""
    data = file.read_bytes()
    with h5py.File(file) as opened, qmoe_format.open(model) as packed:
        assert opened.attrs["format"] == b"qmoe-hdf5"
        layer = packed.layer(PREFIX)
        group = opened["layers"][PREFIX]
        assert group.attrs["experts"] == layer.experts
        assert group["tokens"][:].tolist() == layer.index[:, 2].tolist()
        dictionaries = {
            int(name, 16): qmoe_format.reader.Dictionary.from_frame(table[:].tobytes())
            for name, table in group["dictionaries"].items()
        }
        for expert in range(layer.experts):
            for projection, frame in zip(layer.spec.projections, layer.frames(expert), strict=True):
                dataset = group["experts"][str(expert)][projection.name]
                assert dataset[:].tobytes() == bytes(frame)
                assert (dataset.attrs["rows"], dataset.attrs["columns"]) == (
                    projection.rows,
                    projection.columns,
                )
                assert dataset.attrs["role"] == projection.role.encode()
                assert tuple(dataset.attrs["dictionary_ids"]) == read_frame_header(frame).dictionary_ids
                # The bytes lie in the file as they are, at a multiple of 256 if there are many.
                start = dataset.id.get_offset()
                assert data[start : start + len(frame)] == frame
                assert start % 256 == 0 or len(frame) < 512
                found = Matrix(dataset[:], dictionaries).decode()
                np.testing.assert_array_equal(found, layer.matrix(expert, projection.name).decode())
        norm = opened["tensors"]["model.steps"]
        assert (norm[()], norm.attrs["dtype"]) == (77, b"I64")


def test_kept_codewords(tmp_path: Path) -> None:
    from published_models import write_checkpoint
    from qmoe_quantize.published.importer import import_published

    write_checkpoint(tmp_path / "source", num_experts=1)
    import_published(tmp_path / "source", tmp_path / "model", keep_codes=True)
    to_hdf5(tmp_path / "model", tmp_path / "model.h5")
    from_hdf5(tmp_path / "model.h5", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "model")


def test_a_damaged_model_is_not_converted(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 4  # in the dictionaries
    shard.write_bytes(data)
    with pytest.raises(QMoEError):
        to_hdf5(tmp_path / "model", tmp_path / "model.h5")
    tokenizer = tmp_path / "model/tokenizer.json"
    write_model(tmp_path / "model", force=True)
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b"1", b"2"))
    with pytest.raises(qmoe_format.ChecksumError, match=r"tokenizer\.json: SHA-256 differs"):
        to_hdf5(tmp_path / "model", tmp_path / "model.h5")
    assert not list(tmp_path.glob("*.h5*"))


# ---- where it goes -----------------------------------------------------------------------------------------


def test_output_rules(model: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    out.write_text("mine")
    with pytest.raises(qmoe_format.OutputExistsError, match="exists already"):
        to_hdf5(model, out)
    with pytest.raises(qmoe_format.OutputExistsError, match="not a file of this kind"):
        to_hdf5(model, out, force=True)
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["a"] = 1
    with pytest.raises(qmoe_format.OutputExistsError, match="not a file of this kind"):
        to_hdf5(model, tmp_path / "other.h5", force=True)
    assert out.read_text() == "mine"
    out.unlink()
    to_hdf5(model, out)
    to_hdf5(model, out, force=True)
    assert out.read_bytes() == file.read_bytes()
    (tmp_path / "new.h5.partial").write_text("")
    with pytest.raises(qmoe_format.OutputExistsError, match="in the way"):
        to_hdf5(model, tmp_path / "new.h5")
    with pytest.raises(qmoe_format.ArgumentError, match="lies in the other"):
        to_hdf5(model, model / "inside.h5")
    with pytest.raises(qmoe_format.ArgumentError, match="contains, the source"):
        from_hdf5(out, tmp_path)
    with pytest.raises(qmoe_format.ArgumentError, match="is, or contains"):
        from_hdf5(out, out)
    with pytest.raises(QMoEError):
        to_hdf5(model, tmp_path / "nowhere/out.h5")


def test_an_interrupted_conversion_leaves_nothing(model: Path, file: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert done <= total
        if done > total // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_hdf5(model, tmp_path / "out.h5", progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        from_hdf5(file, tmp_path / "out", progress=interrupt)
    with pytest.raises(KeyboardInterrupt), as_directory(file, tmp_path, progress=interrupt):
        pass
    assert not list(tmp_path.iterdir())


def test_without_h5py(model: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    for call in (
        lambda: to_hdf5(model, tmp_path / "out.h5"),
        lambda: from_hdf5(file, tmp_path / "out"),
        lambda: verify_hdf5(file),
    ):
        with pytest.raises(qmoe_format.MissingPackageError, match=re.escape("'qmoe-format[hdf5]'")):
            call()
    assert not list(tmp_path.iterdir())


# ---- hostile files -----------------------------------------------------------------------------------------

Edit = Callable[[Any], Any]


def replace_frame(data: Any, **options: Any) -> Edit:
    """Replace one frame's dataset by another."""

    def edit(opened: Any) -> None:
        del opened[FRAME]
        opened.create_dataset(FRAME, data=data, **options)

    return edit


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Edit:
    """Change the bytes of a dataset; they may become more or fewer."""

    def edit(opened: Any) -> None:
        data = change(opened[name][()].tobytes())
        del opened[name]
        opened.create_dataset(name, data=np.frombuffer(data, "u1"))

    return edit


def put_link(link: Any, name: str = FRAME) -> Edit:
    def edit(opened: Any) -> None:
        del opened[name]
        opened[name] = link

    return edit


def drop(name: str) -> Edit:
    return lambda opened: opened.__delitem__(name)


def put_huge(opened: Any) -> None:
    """A dataset that claims an exbibyte of which nothing is there."""
    del opened[FRAME]
    opened.create_dataset(FRAME, shape=(1 << 60,), dtype="u1")


def put_external(opened: Any) -> None:
    del opened[FRAME]
    opened.create_dataset(FRAME, shape=(100,), dtype="u1", external=[("/etc/passwd", 0, 100)])


def put_virtual(opened: Any) -> None:
    size = len(opened[FRAME])
    del opened[FRAME]
    layout = h5py.VirtualLayout(shape=(size,), dtype="u1")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "data", shape=(size,))
    opened.create_virtual_dataset(FRAME, layout)


def put_big_endian(opened: Any) -> None:
    name = f"layers/{PREFIX}/tokens"
    tokens = opened[name][:]
    del opened[name]
    opened.create_dataset(name, data=tokens.astype(">i8"))


def rename_dictionary(opened: Any) -> None:
    group = opened[f"layers/{PREFIX}/dictionaries"]
    group.move(next(iter(group)), "zzz")


HOSTILE: dict[str, tuple[Edit, str]] = {
    "soft-link": (put_link(h5py.SoftLink("/files/config.json")), "leads elsewhere .found SoftLink"),
    "soft-link-loop": (put_link(h5py.SoftLink(f"/{FRAME}")), "leads elsewhere"),
    "external-link": (
        put_link(h5py.ExternalLink("other.h5", "/data")),
        "leads elsewhere .found ExternalLink",
    ),
    "group-by-soft-link": (put_link(h5py.SoftLink("/tensors"), "layers"), "/layers: leads elsewhere"),
    "group-by-external-link": (put_link(h5py.ExternalLink("o.h5", "/"), "files"), "/files: leads elsewhere"),
    "external-storage": (put_external, "not stored plainly"),
    "virtual": (put_virtual, "not stored plainly"),
    "chunked": (replace_frame(np.zeros(999, "u1"), chunks=(10,)), "not stored plainly"),
    "compressed": (replace_frame(np.zeros(10**7, "u1"), compression="gzip"), "not stored plainly"),
    "shuffled": (replace_frame(np.zeros(999, "u1"), chunks=(999,), shuffle=True), "not stored plainly"),
    "growing": (replace_frame(np.zeros(999, "u1"), maxshape=(None,)), "not stored plainly"),
    "huge-claim": (put_huge, "claims bytes that the file has not"),
    "wrong-sign": (replace_frame(np.zeros(999, "i1")), "wrong type or shape"),
    "wrong-width": (replace_frame(np.zeros(999, "<u2")), "wrong type or shape"),
    "big-endian": (put_big_endian, "tokens: wrong type or shape"),
    "two-dimensions": (replace_frame(np.zeros((9, 9), "u1")), "wrong type or shape"),
    "scalar": (replace_frame(np.uint8(3)), "wrong type or shape"),
    "text": (replace_frame("abc"), "wrong type or shape"),
    "references": (
        lambda o: put_link(o["files"].ref, FRAME)(o),
        "wrong type or shape",
    ),
    "null": (replace_frame(h5py.Empty("u1")), "wrong type or shape|not stored plainly"),
    "group-for-dataset": (lambda o: (o.__delitem__(FRAME), o.create_group(FRAME)), "found Group"),
    "dataset-for-group": (
        lambda o: (o.__delitem__("layers"), o.create_dataset("layers", data=1)),
        "found Dataset",
    ),
    "type-for-dataset": (
        lambda o: (o.__delitem__(FRAME), o.__setitem__(FRAME, np.dtype("u1"))),
        "found Datatype",
    ),
    "no-frame": (drop(FRAME), "up_proj: missing"),
    "no-expert": (drop(f"layers/{PREFIX}/experts/2"), "experts/2: missing"),
    "no-layer": (drop(f"layers/{PREFIX}"), "missing"),
    "no-tokens": (drop(f"layers/{PREFIX}/tokens"), "tokens: missing"),
    "no-dictionaries": (drop(f"layers/{PREFIX}/dictionaries"), "dictionaries: missing"),
    "no-tensor": (drop("tensors/model.norm.weight"), "model.norm.weight: missing"),
    "no-shard": (
        lambda o: o["shards"].__delitem__(next(iter(o["shards"]))),
        "safetensors: missing",
    ),
    "no-manifest": (drop("files/manifest.json"), "manifest.json: missing"),
    "no-config": (drop("files/config.json"), "config.json: missing"),
    "no-tokenizer": (drop("files/tokenizer.json"), "tokenizer.json: missing"),
    "no-format": (lambda o: o.attrs.__delitem__("format"), "format: missing: not a packed model in HDF5"),
    "other-format": (lambda o: o.attrs.__setitem__("format", np.bytes_(b"keras")), "format: illegal"),
    "format-a-number": (lambda o: o.attrs.__setitem__("format", 3), "format: illegal"),
    "format-of-any-length": (lambda o: o.attrs.__setitem__("format", "qmoe-hdf5"), "format: illegal"),
    "format-an-array": (lambda o: o.attrs.__setitem__("format", np.zeros(3, "S9")), "format: illegal"),
    "format-long": (lambda o: o.attrs.__setitem__("format", np.bytes_(b"q" * 9999)), "format: illegal"),
    "newer-major": (lambda o: o.attrs.__setitem__("version", np.bytes_(b"2.0")), "version: not known"),
    "no-version": (lambda o: o.attrs.__setitem__("version", np.bytes_(b"one")), "version: illegal"),
    "tokens-short": (rewrite(f"layers/{PREFIX}/tokens", lambda data: data[:8]), "wrong type or shape"),
    "tokens-other": (
        lambda o: o[f"layers/{PREFIX}/tokens"].write_direct(np.array([-9, -9, -9], "<i8")),
        "SHA-256 differs",
    ),
    "frame-longer": (rewrite(FRAME, lambda data: data + bytes(16)), "up_proj|size in the manifest"),
    "frame-shorter": (rewrite(FRAME, lambda data: data[:-16]), "up_proj|SHA-256 differs"),
    "frame-empty": (rewrite(FRAME, lambda data: b""), "up_proj|size in the manifest|SHA-256"),
    "frame-of-another": (
        lambda o: put_link(o[FRAME.replace("/1/", "/0/")])(o),
        "size in the manifest|SHA-256 differs",
    ),
    "dictionary-renamed": (rename_dictionary, "not the ids of dictionaries"),
    "header-short": (
        lambda o: rewrite(f"shards/{next(iter(o['shards']))}", lambda data: data[:-1])(o),
        "header size",
    ),
    "header-none": (
        lambda o: rewrite(f"shards/{next(iter(o['shards']))}", lambda data: b"")(o),
        "header size",
    ),
    "manifest-text": (
        rewrite("files/manifest.json", lambda data: b"nothing"),
        "manifest.json: not valid JSON",
    ),
    "manifest-path": (
        rewrite("files/manifest.json", lambda data: data.replace(b"tokenizer.json", b"../okenizer.js")),
        "plain file names",
    ),
    "config-other": (
        rewrite("files/config.json", lambda data: data.replace(b'"rows": 40', b'"rows": 41')),
        "SHA-256 differs|config.json",
    ),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile(copy: Path, tmp_path: Path, fault: str) -> None:
    edit, message = HOSTILE[fault]
    with h5py.File(copy, "r+") as opened:
        edit(opened)
    for call in (verify_hdf5, lambda path: from_hdf5(path, tmp_path / "out")):
        with pytest.raises(QMoEError) as caught:
            call(copy)
        text = str(caught.value)
        assert "\n" not in text
        assert str(copy) in text
        assert re.search(message, text), text
    assert [path.name for path in tmp_path.iterdir()] == ["copy.h5"]


def test_a_user_block(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "moved.h5"
    path.write_bytes(bytes(512) + file.read_bytes())
    with pytest.raises(QMoEError, match="has a user block"):
        verify_hdf5(path)


def test_shared_bytes_do_not_fill_the_disk(tmp_path: Path) -> None:
    """Hundreds of experts that are one dataset; all sums agree, but the file has not so many bytes."""
    spec, dictionaries = layer_spec(0, experts=300), DictionarySet()
    record = next(records(spec, dictionaries))
    with PackedModelWriter(tmp_path / "model") as writer:
        writer.add_layer(spec, [record] * spec.experts, dictionaries)
        writer.finish({"model_type": "olmoe"}, {})
    to_hdf5(tmp_path / "model", tmp_path / "model.h5")
    verify_hdf5(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", "r+") as opened:
        experts = opened["layers"][PREFIX]["experts"]
        for expert in range(1, spec.experts):
            del experts[str(expert)]
            experts[str(expert)] = experts["0"]
    with h5py.File(tmp_path / "model.h5") as opened, h5py.File(tmp_path / "small.h5", "w") as small:
        for name in opened:  # copied, the bytes that nobody has a name for any more are gone
            if name != "layers":
                opened.copy(name, small)
        small.attrs.update({name: np.bytes_(opened.attrs[name]) for name in opened.attrs})
        group = small.create_group("layers").create_group(PREFIX)
        for name in ("tokens", "dictionaries"):
            opened.copy(f"layers/{PREFIX}/{name}", group)
        opened.copy(f"layers/{PREFIX}/experts/0", group, "experts/0")
        for expert in range(1, spec.experts):
            group[f"experts/{expert}"] = group["experts/0"]
    assert (tmp_path / "small.h5").stat().st_size < (tmp_path / "model.h5").stat().st_size / 5
    for call in (verify_hdf5, lambda path: from_hdf5(path, tmp_path / "out")):
        with pytest.raises(qmoe_format.SizeError, match="share bytes, and claim more than the file has"):
            call(tmp_path / "small.h5")
    assert not (tmp_path / "out").exists()


def test_memory_limit(file: Path) -> None:
    verify_hdf5(file, memory_limit=1 << 20)
    with pytest.raises(qmoe_format.QMoEError, match="limit"):
        verify_hdf5(file, memory_limit=100)


def test_frames_are_checked_not_only_sums(tmp_path: Path) -> None:
    """A fault that manifest and sums agree with is found in the frame, and named."""
    model = write_model(tmp_path / "model", zstd=False)
    with qmoe_format.open(model) as opened:
        layer = opened.layer(PREFIX)
        shard = model / layer.shard
        frame = bytes(layer.frames(1)[1])
    data = shard.read_bytes()
    place = data.index(frame)
    spoiled = bytearray(frame)
    spoiled[read_frame_header(frame).codewords_start + 3] ^= 1
    shard.write_bytes(data[:place] + bytes(spoiled) + data[place + len(frame) :])
    sign(model)
    to_hdf5(model, tmp_path / "model.h5")
    with pytest.raises(qmoe_format.ChecksumError, match=f"layers/{PREFIX}/experts/1/up_proj: body_crc32c"):
        verify_hdf5(tmp_path / "model.h5")


def test_contradictions_with_the_configuration(model: Path, tmp_path: Path) -> None:
    """As a directory's reader has it: sizes in config.json, index, dense frames."""

    def spoil(change: Callable[[Any], None], file: str, message: str) -> None:
        with h5py.File(tmp_path / "model.h5", "w") as out, h5py.File(source) as opened:
            for name in opened:
                opened.copy(name, out)
            for name in opened.attrs:
                out.attrs[name] = np.bytes_(opened.attrs[name])
            value = json.loads(opened[f"files/{file}"][()].tobytes())
            change(value)
            del out[f"files/{file}"]
            out.create_dataset(f"files/{file}", data=np.frombuffer(json.dumps(value).encode(), "u1"))
        with pytest.raises(QMoEError, match=message):
            verify_hdf5(tmp_path / "model.h5")

    source = tmp_path / "source.h5"
    to_hdf5(model, source)
    layers = "layers"

    def of(config: Any) -> Any:
        return config["quantization_config"]

    for change, file, message in (
        (lambda c: of(c)[layers][PREFIX].update(store_bytes=256), "config.json", "contradicts config.json"),
        (
            lambda c: of(c)[layers][PREFIX].update(dictionaries_bytes=1),
            "config.json",
            "contradicts config.json",
        ),
        (lambda c: of(c)[layers][PREFIX].update(experts=4), "config.json", "contradicts config.json"),
        (lambda c: of(c)[layers][PREFIX].update(experts=1 << 40), "config.json", "experts: illegal"),
        (lambda c: of(c)[layers].update(other=of(c)[layers][PREFIX]), "config.json", "missing tensor"),
        (lambda c: of(c)["dense_zstd"].update(other=3), "config.json", "missing tensor"),
        (lambda c: of(c)["dense_zstd"].clear(), "config.json", "contradicts config.json"),
        (lambda c: of(c).update(version="2.0"), "config.json", "not known to this reader"),
        (
            lambda i: i["weight_map"].pop(f"{PREFIX}.qmoe_index"),
            "model.safetensors.index.json",
            "not in both",
        ),
        (lambda m: m["files"].pop("config.json"), "manifest.json", "not named"),
        (lambda m: m.update(version="1.7"), "manifest.json", "version: contradicts config.json"),
    ):
        spoil(change, file, message)


@pytest.mark.parametrize("size", [0, 1, 8, 100, 2000, 10_000, -1])
def test_cut_short(file: Path, tmp_path: Path, size: int) -> None:
    data = file.read_bytes()
    (tmp_path / "cut.h5").write_bytes(data[:size])
    with pytest.raises(QMoEError) as caught:
        verify_hdf5(tmp_path / "cut.h5")
    assert "\n" not in str(caught.value)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(QMoEError, match="missing"):
        verify_hdf5(tmp_path / "none.h5")
    os.mkfifo(tmp_path / "pipe.h5")
    with pytest.raises(QMoEError, match="not a regular file"):
        verify_hdf5(tmp_path / "pipe.h5")


FLIPS = """
import sys, numpy
from pathlib import Path
from qmoe_format import QMoEError
from qmoe_format.hdf5 import from_hdf5, verify_hdf5
source, folder, seed = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), int(sys.argv[3])
random = numpy.random.default_rng(seed)
for number in range(120):
    data = bytearray(source)
    data[random.integers(len(data))] ^= 1 << random.integers(8)
    (folder / "flipped.h5").write_bytes(data)
    try:
        verify_hdf5(folder / "flipped.h5")
    except QMoEError as error:
        assert "\\n" not in str(error)
        print("found")
    else:
        from_hdf5(folder / "flipped.h5", folder / f"same-{number}")
        print("same", number)
"""


def test_flipped_bits(file: Path, model: Path, tmp_path: Path) -> None:
    """A flipped bit is found, or lies where nothing is: in attributes for people, or between datasets."""
    program = [sys.executable, "-c", FLIPS, str(file), str(tmp_path), "5"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 120
    assert lines.count("found") > 100
    for line in lines:
        if line != "found":
            assert contents(tmp_path / line.replace(" ", "-")) == contents(model)


# ---- commands ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return (code, *capfd.readouterr())

    yield call


def test_commands(run: Any, model: Path, file: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out.h5", tmp_path / "back"
    assert run("pack", model, out)[0] == 0
    assert out.read_bytes() == file.read_bytes()
    code, text, _ = run("verify", out)
    assert code == 0
    assert text == run("verify", model)[1].replace(str(model), str(out))
    assert json.loads(run("verify", out, "--json")[1]) == json.loads(run("verify", model, "--json")[1])
    code, text, _ = run("pack", out, back)
    assert (code, "same packed model as a directory" in text) == (0, True)
    assert contents(back) == contents(model)
    assert json.loads(run("pack", back, out, "--force", "--json")[1])["bytes"] == out.stat().st_size
    assert run("pack", out, back)[0] == 2
    assert run("pack", out, back, "--force")[0] == 0
    assert contents(back) == contents(model)
    assert run("inspect", out)[1] == run("inspect", model)[1].replace(str(model), str(out))
    assert run("unpack", out, tmp_path / "plain", "--dtype", "f32")[0] == 0
    assert run("unpack", model, tmp_path / "expected", "--dtype", "f32")[0] == 0
    assert contents(tmp_path / "plain") == contents(tmp_path / "expected")
    assert {path.name for path in tmp_path.iterdir()} == {"out.h5", "back", "plain", "expected"}


def test_pack_a_checkpoint_to_hdf5(run: Any, tmp_path: Path) -> None:
    source = random_model(tmp_path / "source")
    assert run("pack", source, tmp_path / "out.h5", "--dense", "zstd")[0] == 0
    assert run("pack", source, tmp_path / "out", "--dense", "zstd")[0] == 0
    assert run("pack", tmp_path / "out.h5", tmp_path / "again")[0] == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    code, _, error = run("pack", source, tmp_path / "out.h5")
    assert (code, "exists already" in error) == (2, True)
    assert not (tmp_path / "out.h5.directory").exists()

    def no_space(*_: Any, **__: Any) -> None:
        raise QMoEError("No space left on device")

    with pytest.MonkeyPatch.context() as patch:  # what took long is not lost
        patch.setattr("qmoe_format.hdf5.to_hdf5", no_space)
        code, _, error = run("pack", source, tmp_path / "full.h5", "--dense", "zstd")
    assert (code, "No space left" in error, "full.h5.directory" in error) == (1, True, True)
    assert contents(tmp_path / "full.h5.directory") == contents(tmp_path / "out")
    assert run("pack", tmp_path / "full.h5.directory", tmp_path / "full.h5")[0] == 0
    assert (tmp_path / "full.h5").read_bytes() == (tmp_path / "out.h5").read_bytes()
    edit_json(source / "config.json", lambda config: config.update(model_type="other"))
    code, _, error = run("pack", source, tmp_path / "new.h5")
    assert code == 1
    assert not list(tmp_path.glob("new*"))
    assert not list(tmp_path.glob(".*"))


def test_refused_commands(run: Any, model: Path, file: Path, tmp_path: Path) -> None:
    code, _, error = run("pack", file, tmp_path / "out.h5")
    assert (code, "between a directory and an HDF5 file" in error) == (2, True)
    code, _, error = run("pack", file)
    assert (code, "between a directory and an HDF5 file" in error) == (2, True)
    code, _, error = run("pack", model, tmp_path / "out.h5", "--levels", "lsq")
    assert (code, "--levels: does not apply to a packed model" in error) == (2, True)
    (tmp_path / "bad.h5").write_bytes(b"nothing")
    for command in (["verify"], ["inspect"], ["unpack", tmp_path / "out"], ["pack", tmp_path / "out"]):
        code, _, error = run(command[0], tmp_path / "bad.h5", *command[1:])
        assert (code, error.count("\n")) == (3, 1), error
