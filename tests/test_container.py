"""Packed models: written whole or not at all, read as written, every fault of the container refused."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import packed_models as models
import pytest
import qmoe_codec
import safetensors
from safetensors.numpy import load_file

import qmoe_format
from qmoe_format import (
    ArgumentError,
    CheckpointError,
    FormatError,
    HeaderError,
    LayerSpec,
    MissingDictionaryError,
    OutputExistsError,
    PackedModelWriter,
    Projection,
    QMoEError,
    RowIndexError,
    SizeError,
    TruncatedError,
    VersionError,
    files,
)

LAYER_0, LAYER_1 = (f"model.layers.{number}.mlp.experts" for number in range(2))


# ---- what is written is what is read -----------------------------------------------------------------------


@pytest.mark.parametrize("zstd", [False, True])
def test_round_trip(tmp_path: Path, zstd: bool) -> None:
    out = models.write_model(tmp_path / "out", zstd=zstd)
    with qmoe_format.open(out) as model:
        assert model.config["hidden_size"] == 24
        assert model.config["quantization_config"]["recipe"] == models.RECIPE  # type: ignore[index]
        assert list(model.layers) == [LAYER_0, LAYER_1]
        for prefix in model.layers:
            layer = model.layer(prefix)
            assert layer.spec == models.layer_spec(int(prefix.split(".")[2]))
            assert layer.index[:, 2].tolist() == [-1, 9, 19]
            for expert in range(layer.experts):
                frames = layer.frames(expert)
                assert b"".join(frames) == layer.record(expert)
                assert all(frame.readonly for frame in frames)
                for number, p in enumerate(layer.spec.projections):
                    trits = models.trits(p.rows, p.columns, len(prefix), expert, number)
                    found, levels = qmoe_codec.decode(frames[number], layer.dictionaries)
                    assert np.array_equal(found, trits)
                    assert np.array_equal(levels, models.levels(p.rows))
                    assert np.array_equal(layer.matrix(expert, p.name).decode(), trits)
        assert model.dense_names() == sorted(name for name, *_ in models.dense_tensors())
        for name, dtype, shape, data in models.dense_tensors():
            assert model.dense(name) == (dtype, shape, data)
            info = model.dense_info(name)
            assert (info.dtype, info.shape, info.nbytes) == (dtype, shape, len(data))
            assert info.compressed == (info.stored_bytes < info.nbytes)
        assert model.dense_info("model.embed_tokens.weight").compressed == zstd
    assert (out / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert [path.name for path in tmp_path.iterdir() if path != out] == ["tokenizer.json"]


def test_arrays_may_be_given(tmp_path: Path) -> None:
    with PackedModelWriter(tmp_path / "out") as writer:
        writer.add_dense("a", "F32", (2, 3), np.arange(6, dtype="<f4").reshape(2, 3).data)
        writer.add_dense("empty", "F32", (0, 3), np.empty((0, 3), "<f4").data)
        writer.add_dense_zstd("scalar", "F64", (), np.array(1.5).data)
        with pytest.raises(ArgumentError, match="contiguous"):
            writer.add_dense("b", "F32", (3, 2), np.arange(6, dtype="<f4").reshape(2, 3).T.data)
        writer.finish({}, {})
    with qmoe_format.open(tmp_path / "out") as model:
        assert model.dense("a") == ("F32", (2, 3), np.arange(6, dtype="<f4").tobytes())
        assert model.dense("empty") == ("F32", (0, 3), b"")
        assert np.frombuffer(model.dense("scalar")[2], "<f8") == 1.5


def test_layers_are_in_natural_order(tmp_path: Path) -> None:
    with qmoe_format.open(models.write_model(tmp_path / "out", layers=11, experts=1)) as model:
        assert [prefix.split(".")[2] for prefix in model.layers] == [str(number) for number in range(11)]


def test_any_safetensors_reader_opens_the_shards(tmp_path: Path) -> None:
    out = models.write_model(tmp_path / "out", zstd=False)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    dense = {name: data for name, _, _, data in models.dense_tensors()}
    seen = {}
    for path in sorted(out.glob("*.safetensors")):
        content = dict(safetensors.deserialize(path.read_bytes()))
        seen.update(dict.fromkeys(content, path.name))
        for name, tensor in content.items():
            if name in dense:
                assert bytes(tensor["data"]) == dense[name]
        with safetensors.safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
        header, _ = models.split(path.read_bytes())
        for name, entry in header.items():  # so that readers may view the bytes in place
            start = path.stat().st_size - len(models.split(path.read_bytes())[1])
            if name != "__metadata__":
                size = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8}.get(entry["dtype"], 1)
                assert (start + entry["data_offsets"][0]) % size == 0
    assert seen == index["weight_map"]
    layer = load_file(out / seen[LAYER_0 + ".qmoe_store"])
    rows = layer[LAYER_0 + ".qmoe_index"]
    assert rows.dtype == np.int64
    assert rows.shape == (3, 3)
    assert not (rows[:, 0] % 256).any()
    assert index["metadata"]["total_size"] == sum(
        len(models.split(path.read_bytes())[1]) for path in out.glob("*.safetensors")
    )


def test_stores_start_at_multiples_of_256(tmp_path: Path) -> None:
    with qmoe_format.open(models.write_model(tmp_path / "out")) as model:
        for prefix in model.layers:
            file = model.shards[model.layer(prefix).shard]
            assert file.tensors[prefix + ".qmoe_store"].start % 256 == 0
            assert len(model.layer(prefix).store) % 256 == 0


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    one = models.contents(models.write_model(tmp_path / "one"))
    two = models.contents(models.write_model(tmp_path / "two"))
    assert one == two


def test_dense_shards_roll(tmp_path: Path) -> None:
    tensors = {
        f"model.layers.{number}.a.rather.long.name.{'x' * 80}": bytes([number]) * 64 for number in range(200)
    }
    for limit, at_least in ((5_000_000_000, 3), (9_000, 10)):
        with PackedModelWriter(tmp_path / str(limit), max_shard_bytes=limit) as writer:
            for name, data in tensors.items():
                writer.add_dense(name, "F32", (4, 4), data)
            writer.add_dense("n" * 20_000, "F32", (1,), bytes(4))  # longer than the usual room for a header
            writer.finish(models.CONFIG, {})
        with qmoe_format.open(tmp_path / str(limit)) as model:
            assert all(model.dense(name)[2] == data for name, data in tensors.items())
            assert len(model.shards) >= at_least


def test_what_was_taken_from_a_model_outlives_it(tmp_path: Path) -> None:
    with qmoe_format.open(models.write_model(tmp_path / "out")) as model:
        layer = model.layer(LAYER_1)
        matrix = layer.matrix(2, "down_proj")
    assert matrix.rows == 24
    assert len(layer.frames(0)) == 3


def test_asking_for_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no such directory"):
        qmoe_format.open(tmp_path / "absent")
    with qmoe_format.open(models.write_model(tmp_path / "out")) as model:
        for ask in (
            lambda: model.layer("model.layers.9.mlp.experts"),
            lambda: model.layer(LAYER_0).record(3),
            lambda: model.layer(LAYER_0).record(-1),
            lambda: model.layer(LAYER_0).matrix(0, "gate"),
            lambda: model.dense(LAYER_0 + ".qmoe_store"),
        ):
            with pytest.raises(ArgumentError, match="no such"):
                ask()


# ---- arguments of the writer -------------------------------------------------------------------------------


def frame_for(p: Projection, dictionary: qmoe_codec.Dictionary | None = None) -> bytes:
    return qmoe_codec.encode(models.trits(p.rows, p.columns, 0), models.levels(p.rows), dictionary)


def record_of(spec: LayerSpec) -> list[bytes]:
    return [frame_for(p) for p in spec.projections]


SPEC = models.layer_spec(experts=2)
WRONG_RECORDS: dict[str, tuple[Callable[[], list[tuple[list[bytes], Any]]], type[QMoEError]]] = {
    "a record too few": (lambda: [(record_of(SPEC), 0)], ArgumentError),
    "a record too many": (lambda: [(record_of(SPEC), 0)] * 3, ArgumentError),
    "a frame too few": (lambda: [(record_of(SPEC)[:2], 0)] * 2, ArgumentError),
    "frames in another order": (lambda: [(record_of(SPEC)[::-1], 0)] * 2, ArgumentError),
    "bytes after a frame": (
        lambda: [([frame + bytes(16) for frame in record_of(SPEC)], 0)] * 2,
        ArgumentError,
    ),
    "no frame": (lambda: [([b"", b"", b""], 0)] * 2, TruncatedError),
    "tokens below -1": (lambda: [(record_of(SPEC), -2)] * 2, ArgumentError),
    "tokens not a number": (lambda: [(record_of(SPEC), 1.5)] * 2, ArgumentError),
    "a dictionary that is not stored": (
        lambda: [([frame_for(p, qmoe_codec.build_dictionary(0.8, 8)) for p in SPEC.projections], 0)] * 2,
        MissingDictionaryError,
    ),
}


@pytest.mark.parametrize("fault", WRONG_RECORDS)
def test_writer_refuses_records_unlike_the_layer(tmp_path: Path, fault: str) -> None:
    records, error = WRONG_RECORDS[fault]
    with pytest.raises(error), PackedModelWriter(tmp_path / "out") as writer:
        writer.add_layer(SPEC, records(), qmoe_codec.DictionarySet())
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with PackedModelWriter(tmp_path / "out") as writer:
        for suffix in ("qmoe_store", "qmoe_index", "qmoe_dictionaries", "qmoe_zstd"):
            with pytest.raises(CheckpointError, match=suffix):
                writer.add_dense(f"a.{suffix}", "U8", (1,), b"1")
        writer.add_dense("a", "U8", (1,), b"1")
        with pytest.raises(ArgumentError, match="twice"):
            writer.add_dense_zstd("a", "U8", (1,), b"1")
        with pytest.raises(ArgumentError, match="contradict"):
            writer.add_dense("b", "BF16", (1,), b"1")
        with pytest.raises(ArgumentError, match="dtype"):
            writer.add_dense("b", "bf16", (1,), b"12")
        with pytest.raises(ArgumentError, match=r"config\.json"):
            writer.add_file(tmp_path / "config.json")
        writer.add_file(tmp_path / "tokenizer.json")
        with pytest.raises(ArgumentError, match="two files"):
            writer.add_file(tmp_path / "tokenizer.json")
        with pytest.raises(ArgumentError, match="quantization_config"):
            writer.finish({"quantization_config": {}}, {})
        writer.finish({}, {})
        with pytest.raises(ArgumentError, match="finished"):
            writer.add_dense("c", "U8", (1,), b"1")
        with pytest.raises(ArgumentError, match="finished"):
            writer.finish({}, {})
    assert qmoe_format.verify(tmp_path / "out").dense_tensors == 1


@pytest.mark.parametrize(
    "change",
    [
        {"experts": 0},
        {"dtype": "bfloat16"},
        {"prefix": ""},
        {"projections": ()},
        {"projections": SPEC.projections[:1] * 2},
        {
            "projections": (
                Projection("a", "up", "a.{expert}", 1, 1),
                Projection("b", "up", "b.{expert}", 1, 1),
            )
        },
    ],
)
def test_layer_specs_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        LayerSpec(**{"prefix": "a", "experts": 1, "projections": SPEC.projections, "dtype": "BF16", **change})


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"role": "middle"},
        {"tensor": ""},
        {"transposed": True},
        {"interleaved": True},
        {"bias": ""},
        {"bias": "a.bias"},
        {"tensor": "a", "bias": "a.{expert}.bias"},
        {"tensor": "a.{expert}.{expert}"},
        {"rows": -1},
        {"columns": (1 << 24) + 1},
        {"rows": 1 << 20, "columns": 1 << 20},
    ],
)
def test_projections_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        Projection(**{"name": "a", "role": "up", "tensor": "a.{expert}", "rows": 1, "columns": 1, **change})


# ---- whole or not at all -----------------------------------------------------------------------------------


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), PackedModelWriter(tmp_path / "out") as writer:
        writer.add_dense("a", "U8", (1,), b"1")
        assert partial(tmp_path / "out").is_dir()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with PackedModelWriter(tmp_path / "out") as writer:
        writer.add_dense("a", "U8", (1,), b"1")
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_records_is_passed_on(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[list[bytes], int]]:
        yield record_of(SPEC), 0
        raise OSError(errno.EIO, "the source's own trouble")

    with pytest.raises(OSError, match="own trouble"), PackedModelWriter(tmp_path / "out") as writer:
        writer.add_layer(SPEC, broken(), qmoe_codec.DictionarySet())
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused(tmp_path: Path) -> None:
    for content in ("file", "directory", "link"):
        out = tmp_path / content
        if content == "file":
            out.write_text("precious")
        elif content == "directory":
            out.mkdir()
        else:
            out.symlink_to("directory")
        with pytest.raises(OutputExistsError) as caught:
            PackedModelWriter(out)
        assert caught.value.exit_code == 2
        assert not list(tmp_path.glob("*.partial"))


def test_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(OutputExistsError, match=r"finished output is in .*out\.partial"),
        PackedModelWriter(out) as w,
    ):
        w.add_dense("a", "U8", (1,), b"1")
        out.mkdir()
        (out / "precious").touch()
        w.finish({}, {})
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert qmoe_format.verify(partial(out)).dense_tensors == 1  # hours of work are not thrown away
    (out / "precious").unlink()
    out.rmdir()
    with pytest.raises(OutputExistsError, match="rename it if it is finished"):
        PackedModelWriter(out)
    assert qmoe_format.verify(partial(out)).dense_tensors == 1


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_a_packed_model(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_renameat2", lambda *_: False)
    out = models.write_model(tmp_path / "out", layers=2)
    (tmp_path / "link").symlink_to("out")
    models.write_model(tmp_path / "link", layers=1, force=True)
    assert list(qmoe_format.open(out).layers) == [LAYER_0]
    assert qmoe_format.verify(tmp_path / "link").layers == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out", "tokenizer.json"]


def test_force_and_an_error_leave_the_old_model(tmp_path: Path) -> None:
    out = models.write_model(tmp_path / "out")
    before = models.contents(out)
    with pytest.raises(RuntimeError), PackedModelWriter(out, force=True) as writer:
        writer.add_dense("a", "U8", (1,), b"1")
        raise RuntimeError
    assert models.contents(out) == before
    assert not partial(out).exists()


def test_force_replaces_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert qmoe_format.verify(models.write_model(tmp_path / "out", force=True)).layers == 2


@pytest.mark.parametrize(
    "put",
    ["a file", "a checkpoint", "a model and a note", "a model and a directory", "a model without a manifest"],
)
def test_force_deletes_nothing_but_packed_models(tmp_path: Path, put: str) -> None:
    out = tmp_path / "out"
    if put == "a file":
        out.write_text("precious")
    elif put == "a checkpoint":
        out.mkdir()
        (out / "config.json").write_text('{"model_type": "olmoe"}')
        (out / "model.safetensors").write_bytes(b"precious")
    else:
        models.write_model(out)
        if put == "a model and a note":
            (out / "note.txt").write_text("precious")
        elif put == "a model and a directory":
            (out / "original").mkdir()
        else:
            (out / "manifest.json").unlink()
    before = sorted(path.name for path in out.iterdir()) if out.is_dir() else out.read_bytes()
    with pytest.raises(OutputExistsError, match="will not be replaced"):
        PackedModelWriter(out, force=True)
    assert (sorted(path.name for path in out.iterdir()) if out.is_dir() else out.read_bytes()) == before
    assert not partial(out).exists()


def test_a_second_writer_is_told(tmp_path: Path) -> None:
    with PackedModelWriter(tmp_path / "out") as writer:
        writer.add_dense("a", "U8", (1,), b"1")
        with pytest.raises(OutputExistsError, match="another writer is at work"):
            PackedModelWriter(tmp_path / "out")
        writer.finish({}, {})
    assert qmoe_format.verify(tmp_path / "out").dense_tensors == 1


@pytest.mark.parametrize("what", ["a file", "a directory", "a link"])
def test_somebody_elses_partial_is_left_alone(tmp_path: Path, what: str) -> None:
    path = partial(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/precious").write_text("precious")
    if what == "a file":
        path.write_text("precious")
    elif what == "a directory":
        path.mkdir()
        (path / "precious").write_text("precious")
    else:
        path.symlink_to("elsewhere")
    with pytest.raises(OutputExistsError, match="in the way"):
        PackedModelWriter(tmp_path / "out")
    assert (path if what == "a file" else path / "precious").read_text() == "precious"


def test_no_place_to_write(tmp_path: Path) -> None:
    with pytest.raises(QMoEError, match="No such file"):
        PackedModelWriter(tmp_path / "absent" / "out")
    with pytest.raises(ArgumentError):
        PackedModelWriter("/")


CHILD = """
    import sys, time
    from pathlib import Path
    import packed_models as models
    from qmoe_format import files, safetensors_io, writer

    out, moment = Path(sys.argv[1]), sys.argv[2]

    def wait(now):
        if now == moment:
            print("reached", flush=True)
            time.sleep(60)

    def before(module, name, label):
        real = getattr(module, name)
        def wrapped(*args, **kwargs):
            wait(label(*args))
            return real(*args, **kwargs)
        setattr(module, name, wrapped)

    before(models, "layer_spec", lambda number, *_: f"layer {number}")
    before(models.qmoe_codec.DictionarySet, "to_bytes", lambda *_: "dictionaries")
    before(safetensors_io.SafetensorsWriter, "close", lambda *_: "header")
    before(writer, "write_file", lambda path, data: path.name)
    before(writer, "open_model", lambda *_: "check")
    before(files.PartialDirectory, "_move", lambda *_: "move")
    before(files.PartialDirectory, "_delete", lambda *_: "delete")
    models.write_model(out, force=True)
"""
MOMENTS = ("layer 1", "dictionaries", "header", "config.json", "manifest.json.tmp", "check", "move", "delete")


def environment() -> dict[str, str]:
    """For a process that imports what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(models.__file__), *sys.path])}


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )


def child(out: Path, moment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(out), moment],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "reached\n", process.communicate()[1]
    return process


@pytest.mark.parametrize(
    ("moment", "existing"), [*((moment, True) for moment in MOMENTS), ("layer 1", False), ("move", False)]
)
def test_killed(tmp_path: Path, moment: str, existing: bool, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    old: dict[str, bytes] = {}
    if existing:
        old = models.contents(models.write_model(out, layers=1))
    process = child(out, moment)
    process.kill()
    process.communicate()

    new = models.contents(models.write_model(tmp_path / "new"))
    if moment == "delete":
        assert models.contents(out) == new
    elif existing:
        assert models.contents(out) == old
    else:
        assert not out.exists()
    left = partial(out)
    if moment in MOMENTS[:5]:  # before there is a manifest
        with pytest.raises(TruncatedError, match=r"manifest\.json: missing"):
            qmoe_format.verify(left)
        with pytest.raises(TruncatedError, match=r"manifest\.json: missing"):
            qmoe_format.open(left)
    if moment in ("move", "delete"):  # whole: the new one that is not in place yet, or the old one
        assert models.contents(left) == (old if moment == "delete" else new)
        with pytest.raises(OutputExistsError, match="rename it if it is finished"):
            PackedModelWriter(out, force=True)
        assert models.contents(left) == (old if moment == "delete" else new)
    else:
        with caplog.at_level(logging.WARNING, logger="qmoe_format"):
            models.write_model(out, force=True)
        assert "interrupted run" in caplog.text
        assert models.contents(out) == new
        assert not left.exists()


@pytest.mark.parametrize("moment", ["layer 1", "manifest.json.tmp", "check"])
def test_interrupted(tmp_path: Path, moment: str) -> None:
    out = models.write_model(tmp_path / "out", layers=1)
    old = models.contents(out)
    process = child(out, moment)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert "KeyboardInterrupt" in error
    assert models.contents(out) == old
    assert not partial(out).exists()


@pytest.mark.parametrize("limit", [100, 3000, 9000])
def test_full_disk(tmp_path: Path, limit: int) -> None:
    out = models.write_model(tmp_path / "out", layers=1)
    old = models.contents(out)
    script = f"""
        import resource, sys
        from pathlib import Path
        import packed_models as models
        from qmoe_format import QMoEError
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            models.write_model(Path(sys.argv[1]), force=True)
        except QMoEError as error:
            print(error)
            raise SystemExit(error.exit_code)
    """
    done = python(script, str(out))
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(f"{partial(out)}{os.sep}shard-0000")
    assert done.stdout.endswith("File too large\n")
    assert done.stdout.count("\n") == 1
    assert models.contents(out) == old
    assert not partial(out).exists()


def test_memory_does_not_grow_with_experts(tmp_path: Path) -> None:
    script = """
        import resource, sys
        from pathlib import Path
        import packed_models as models
        import qmoe_codec
        from qmoe_format import PackedModelWriter
        spec = models.layer_spec(0, int(sys.argv[2]), 512, 1024)
        record = [
            qmoe_codec.encode(models.trits(p.rows, p.columns, 0), models.levels(p.rows), None)
            for p in spec.projections
        ]
        with PackedModelWriter(Path(sys.argv[1])) as writer:
            copies = (([bytes(bytearray(frame)) for frame in record], 1) for _ in range(spec.experts))
            writer.add_layer(spec, copies, qmoe_codec.DictionarySet())
            writer.finish({}, {})
        print(sum(map(len, record)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    """

    def peak(experts: int) -> tuple[int, int]:
        done = python(script, str(tmp_path / str(experts)), str(experts))
        size, most = done.stdout.split()
        return int(size), int(most)

    (size, few), (_, many) = peak(64), peak(256)  # the smaller layer is one chunk of the reading back already
    assert size > 300_000
    assert many - few < 4 * size


# ---- faults of a container, one each, by somebody who keeps the manifest in step ---------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return models.contents(models.write_model(tmp_path_factory.mktemp("model") / "out"))


def config(edit: Callable[[Any], None]) -> Callable[[Path], None]:
    return lambda out: models.edit_json(out / "config.json", lambda c: edit(c["quantization_config"]))


def layer(edit: Callable[[Any], None]) -> Callable[[Path], None]:
    return config(lambda c: edit(c["layers"][LAYER_0]))


def projection(**change: object) -> Callable[[Path], None]:
    return layer(lambda entry: entry["projections"][1].update(change))


def index(edit: Callable[[Any], None]) -> Callable[[Path], None]:
    return lambda out: models.edit_json(out / "model.safetensors.index.json", lambda i: edit(i["weight_map"]))


def experts(row: int, column: int, value: int) -> Callable[[Path], None]:
    """Set a number of layer 0's index tensor."""

    def spoil(out: Path) -> None:
        path = out / "model-00001-of-00005.safetensors"
        header, data = models.split(path.read_bytes())
        begin = header[LAYER_0 + ".qmoe_index"]["data_offsets"][0] + 8 * (3 * row + column)
        path.write_bytes(
            models.join(header, data[:begin] + value.to_bytes(8, "little", signed=True) + data[begin + 8 :])
        )

    return spoil


def shard(edit: Callable[[Any, bytes], bytes], *, align: int = 256) -> Callable[[Path], None]:
    """Change header and data of layer 0's shard."""

    def spoil(out: Path) -> None:
        path = out / "model-00001-of-00005.safetensors"
        header, data = models.split(path.read_bytes())
        path.write_bytes(models.join(header, edit(header, data), align=align))

    return spoil


def misalign(out: Path) -> None:
    path = out / "model-00001-of-00005.safetensors"
    header, data = models.split(path.read_bytes())
    text = json.dumps(header).encode()
    path.write_bytes(models.join(text + b" " * (-len(text) % 256), data, align=8))


def rename_store(header: Any, data: bytes) -> bytes:
    header["other.qmoe_store"] = header.pop(LAYER_0 + ".qmoe_store")
    return data


def retype_store(header: Any, data: bytes) -> bytes:
    header[LAYER_0 + ".qmoe_store"]["dtype"] = "I8"
    return data


def reshape_index(header: Any, data: bytes) -> bytes:
    header[LAYER_0 + ".qmoe_index"]["shape"] = [9]
    return data


CONTAINER_FAULTS: dict[str, tuple[Callable[[Path], None], type[FormatError], str]] = {
    "no quantization_config": (
        lambda out: (out / "config.json").write_text("{}") and None,
        HeaderError,
        "quantization_config",
    ),
    "config not an object": (
        lambda out: (out / "config.json").write_text("[]") and None,
        HeaderError,
        "config.json",
    ),
    "config not JSON": (lambda out: (out / "config.json").write_text("{") and None, HeaderError, "JSON"),
    "duplicate key in config": (
        lambda out: (out / "config.json").write_text('{"a": 1, "a": 1}') and None,
        HeaderError,
        "duplicate",
    ),
    "another method": (config(lambda c: c.update(quant_method="gptq")), HeaderError, "quant_method"),
    "version 2.0": (config(lambda c: c.update(version="2.0")), VersionError, "2.0"),
    "version 11.0": (config(lambda c: c.update(version="11.0")), VersionError, "11.0"),
    "version a number": (config(lambda c: c.update(version=1.0)), HeaderError, "version"),
    "version without minor": (config(lambda c: c.update(version="1")), HeaderError, "version"),
    "layers a list": (config(lambda c: c.update(layers=[])), HeaderError, "layers"),
    "layers missing": (config(lambda c: c.pop("layers")), HeaderError, "layers"),
    "layer not an object": (config(lambda c: c["layers"].update({LAYER_0: 3})), HeaderError, LAYER_0),
    "experts a string": (layer(lambda e: e.update(experts="3")), HeaderError, "experts"),
    "experts a bool": (layer(lambda e: e.update(experts=True)), HeaderError, "experts"),
    "experts a float": (layer(lambda e: e.update(experts=3.0)), HeaderError, "experts"),
    "experts 0": (layer(lambda e: e.update(experts=0)), HeaderError, "experts"),
    "experts huge": (layer(lambda e: e.update(experts=1 << 70)), HeaderError, "experts"),
    "experts one more": (layer(lambda e: e.update(experts=4)), SizeError, "qmoe_index"),
    "dtype unknown": (layer(lambda e: e.update(dtype="bf16")), HeaderError, "dtype"),
    "dtype a list": (layer(lambda e: e.update(dtype=["BF16"])), HeaderError, "dtype"),
    "projections an object": (layer(lambda e: e.update(projections={})), HeaderError, "projections"),
    "projections empty": (layer(lambda e: e.update(projections=[])), HeaderError, "projections"),
    "projection missing": (layer(lambda e: e["projections"].pop()), SizeError, "expert 0"),
    "projection added": (
        layer(lambda e: e["projections"].pop(0) and e["projections"].insert(0, 1)),
        HeaderError,
        "projections[0]",
    ),
    "two projections of one name": (projection(name="gate_proj"), HeaderError, "name"),
    "name missing": (layer(lambda e: e["projections"][1].pop("name")), HeaderError, "name"),
    "role unknown": (projection(role="side"), HeaderError, "role"),
    "role a list": (projection(role=["up"]), HeaderError, "role"),
    "tensor without {expert}": (projection(tensor="a.weight"), HeaderError, "tensor"),
    "rows negative": (projection(rows=-1), HeaderError, "rows"),
    "rows a float": (projection(rows=40.0), HeaderError, "rows"),
    "rows null": (projection(rows=None), HeaderError, "rows"),
    "rows huge": (projection(rows=1 << 64), HeaderError, "rows"),
    "rows unlike the frames": (projection(rows=41), HeaderError, "expert 0: up_proj"),
    "columns unlike the frames": (projection(columns=23), HeaderError, "expert 0: up_proj"),
    "store_bytes too small": (layer(lambda e: e.update(store_bytes=256)), SizeError, "qmoe_store"),
    "store_bytes missing": (layer(lambda e: e.pop("store_bytes")), HeaderError, "store_bytes"),
    "dictionaries_bytes wrong": (
        layer(lambda e: e.update(dictionaries_bytes=1)),
        SizeError,
        "qmoe_dictionaries",
    ),
    "a layer more": (
        config(lambda c: c["layers"].update(other=c["layers"][LAYER_0])),
        HeaderError,
        "other.qmoe_store",
    ),
    "a layer less": (config(lambda c: c["layers"].pop(LAYER_0)), HeaderError, LAYER_0),
    "dense_zstd a list": (config(lambda c: c.update(dense_zstd=[])), HeaderError, "dense_zstd"),
    "dense_zstd of another size": (
        config(lambda c: c["dense_zstd"].update({"model.embed_tokens.weight": 5})),
        SizeError,
        "embed_tokens",
    ),
    "dense_zstd negative": (
        config(lambda c: c["dense_zstd"].update({"model.embed_tokens.weight": -5})),
        HeaderError,
        "embed_tokens",
    ),
    "dense_zstd of nothing": (config(lambda c: c["dense_zstd"].update(ghost=5)), HeaderError, "ghost"),
    "dense_zstd not told": (config(lambda c: c.update(dense_zstd={})), HeaderError, "qmoe_zstd"),
    "weight_map missing": (
        lambda out: models.edit_json(out / "model.safetensors.index.json", lambda i: i.pop("weight_map")),
        HeaderError,
        "weight_map",
    ),
    "shard outside": (
        index(lambda m: m.update({"model.mask": "../x.safetensors"})),
        HeaderError,
        "plain name",
    ),
    "shard absolute": (
        index(lambda m: m.update({"model.mask": "/x.safetensors"})),
        HeaderError,
        "plain name",
    ),
    "shard ..": (index(lambda m: m.update({"model.mask": ".."})), HeaderError, "plain name"),
    "shard a number": (index(lambda m: m.update({"model.mask": 1})), HeaderError, "plain name"),
    "shard not in the manifest": (
        index(lambda m: m.update({"model.mask": "x.safetensors"})),
        HeaderError,
        "not a file of the manifest",
    ),
    "tensor in the wrong shard": (
        index(lambda m: m.update({"model.mask": "model-00001-of-00005.safetensors"})),
        HeaderError,
        "model.mask",
    ),
    "tensor without a shard": (index(lambda m: m.pop("model.mask")), HeaderError, "model.mask"),
    "offset 0 not 0": (experts(0, 0, 256), RowIndexError, "expert 0"),
    "offset off by one": (experts(1, 0, 1537), RowIndexError, "expert 0"),
    "offsets that do not rise": (experts(2, 0, 0), RowIndexError, "expert 1"),
    "offset past the end": (experts(2, 0, 1 << 40), RowIndexError, "expert"),
    "offset that wraps": (experts(2, 0, (1 << 63) - 1), RowIndexError, "expert"),
    "negative offset": (experts(1, 0, -256), RowIndexError, "expert"),
    "negative size": (experts(1, 1, -1), RowIndexError, "expert 1"),
    "size past the end": (experts(2, 1, 1 << 40), RowIndexError, "expert 2"),
    "size that wraps": (experts(2, 1, (1 << 63) - 1), RowIndexError, "expert 2"),
    "tokens -2": (experts(1, 2, -2), RowIndexError, "expert 1"),
    "store not aligned": (misalign, HeaderError, "multiple of 256"),
    "store of another name": (shard(rename_store), HeaderError, "qmoe_store"),
    "store of another dtype": (shard(retype_store), HeaderError, "qmoe_store"),
    "index of another shape": (shard(reshape_index), HeaderError, "qmoe_index"),
    "trailing bytes in a shard": (shard(lambda _, data: data + b"x"), SizeError, "00001-of"),
    "shard cut": (shard(lambda _, data: data[:-1]), TruncatedError, "00001-of"),
}


@pytest.mark.parametrize("fault", CONTAINER_FAULTS)
def test_refuses(tmp_path: Path, original: dict[str, bytes], fault: str) -> None:
    spoil, error, text = CONTAINER_FAULTS[fault]
    out = tmp_path / "out"
    models.restore(out, original)
    spoil(out)
    models.sign(out)
    with pytest.raises(FormatError) as caught, qmoe_format.open(out) as model:
        for prefix in model.layers:
            for expert in range(model.layer(prefix).experts):
                model.layer(prefix).frames(expert)
    assert type(caught.value) is error, str(caught.value)
    assert text in str(caught.value)
    assert str(out) in str(caught.value)
    assert "\n" not in str(caught.value)


def manifest(edit: Callable[[Any], None]) -> Callable[[Path], None]:
    return lambda out: models.edit_json(out / "manifest.json", edit)


MANIFEST_FAULTS: dict[str, tuple[Callable[[Path], None], type[FormatError]]] = {
    "missing": (lambda out: (out / "manifest.json").unlink(), TruncatedError),
    "a directory": (
        lambda out: (out / "manifest.json").unlink() or (out / "manifest.json").mkdir(),
        HeaderError,
    ),
    "empty": (lambda out: (out / "manifest.json").write_text("") and None, HeaderError),
    "another format": (manifest(lambda m: m.update(format="zip")), HeaderError),
    "version 2.0": (manifest(lambda m: m.update(version="2.0")), VersionError),
    "version missing": (manifest(lambda m: m.pop("version")), HeaderError),
    "files a list": (manifest(lambda m: m.update(files=[])), HeaderError),
    "config.json not named": (manifest(lambda m: m["files"].pop("config.json")), HeaderError),
    "index not named": (manifest(lambda m: m["files"].pop("model.safetensors.index.json")), HeaderError),
    "a name with ..": (
        manifest(lambda m: m["files"].update({"../a": m["files"]["config.json"]})),
        HeaderError,
    ),
    "a name ..": (manifest(lambda m: m["files"].update({"..": m["files"]["config.json"]})), HeaderError),
    "a name with a backslash": (
        manifest(lambda m: m["files"].update({"a\\b": m["files"]["config.json"]})),
        HeaderError,
    ),
    "an absolute name": (
        manifest(lambda m: m["files"].update({"/a": m["files"]["config.json"]})),
        HeaderError,
    ),
    "itself": (
        manifest(lambda m: m["files"].update({"manifest.json": m["files"]["config.json"]})),
        HeaderError,
    ),
    "a file that is missing": (lambda out: (out / "tokenizer.json").unlink(), TruncatedError),
    "a file that is short": (lambda out: os.truncate(out / "tokenizer.json", 3), TruncatedError),
    "a file that is long": (lambda out: os.truncate(out / "tokenizer.json", 300), SizeError),
    "a file that is a pipe": (
        lambda out: (out / "tokenizer.json").unlink() or os.mkfifo(out / "tokenizer.json"),
        HeaderError,
    ),
    "bytes a string": (manifest(lambda m: m["files"]["config.json"].update(bytes="1")), HeaderError),
    "bytes negative": (manifest(lambda m: m["files"]["config.json"].update(bytes=-1)), HeaderError),
    "bytes a bool": (manifest(lambda m: m["files"]["config.json"].update(bytes=True)), HeaderError),
    "sha256 short": (manifest(lambda m: m["files"]["config.json"].update(sha256="ab")), HeaderError),
    "sha256 a number": (manifest(lambda m: m["files"]["config.json"].update(sha256=1)), HeaderError),
}


@pytest.mark.parametrize("fault", MANIFEST_FAULTS)
def test_refuses_a_manifest(tmp_path: Path, original: dict[str, bytes], fault: str) -> None:
    spoil, error = MANIFEST_FAULTS[fault]
    models.restore(tmp_path / "out", original)
    spoil(tmp_path / "out")
    for use in (qmoe_format.open, qmoe_format.verify):
        with pytest.raises(FormatError) as caught:
            use(tmp_path / "out")
        assert type(caught.value) is error, str(caught.value)
        assert str(tmp_path / "out") in str(caught.value)


def test_unknown_keys_and_files_are_ignored(tmp_path: Path, original: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    models.restore(out, {**original, "note.txt": b"hello"})
    config(lambda c: c.update(future=1, version="1.7"))(out)
    projection(bias=False)(out)
    models.sign(out)
    manifest(lambda m: m.update(future=1, version="1.7"))(out)
    assert qmoe_format.verify(out).layers == 2


def test_no_recipe_and_no_dense_zstd_are_fine(tmp_path: Path) -> None:
    out = models.write_model(tmp_path / "out", zstd=False)
    config(lambda c: (c.pop("recipe"), c.pop("dense_zstd")))(out)
    models.sign(out)
    assert qmoe_format.verify(out).dense_frames == 0
