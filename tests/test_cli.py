"""The commands as a user runs them: output, errors in one line, exit codes."""

import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from qmoe_codec import decode
from qmoe_quantize import pack
from qmoe_quantize.pipeline import DENSE_MODES, METHODS, PackOptions
from source_models import random_model

import qmoe_format
from qmoe_format import cli
from qmoe_format.cli.common import ProgressBar
from qmoe_format.cli.text import size, table
from qmoe_format.inspection import SECTIONS, inspect


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("models") / "source")


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    out = source.parent / "packed"
    pack(source, out, PackOptions(dense="zstd"))
    return out


class Result(SimpleNamespace):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object, main: Any = cli.main) -> Result:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = end.code
        out, err = capfd.readouterr()
        return Result(code=code, out=out, err=err)

    return call


def assert_error(result: Result, code: int, *parts: str, program: str = "qmoe ") -> None:
    assert result.code == code
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert result.err.startswith(program)
    assert ": error: " in result.err
    for part in parts:
        assert part in result.err, result.err


# ---- results -----------------------------------------------------------------------------------------------


def test_the_whole_way(run: Any, source: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    done = run("pack", source, out)
    assert done.code == 0
    assert done.err == ""
    assert re.search(r"2 layers, 10 experts, 25,920 weights in [0-9.]+ s", done.out)
    assert "bits/weight" in done.out
    done = run("verify", out)
    assert (done.code, done.err) == (0, "")
    assert "sound" in done.out
    done = run("inspect", out)
    assert (done.code, done.err) == (0, "")
    assert "model.layers.1.mlp.experts" in done.out
    done = run("unpack", out, plain)
    assert (done.code, done.err) == (0, "")
    assert (plain / "model.safetensors").exists()


def test_commands_of_their_own(run: Any, source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "out", "--quiet", main=cli.main_pack).code == 0
    assert run(tmp_path / "out", main=cli.main_verify).code == 0
    assert run(tmp_path / "out", main=cli.main_inspect).code == 0
    assert run(tmp_path / "out", tmp_path / "plain", main=cli.main_unpack).code == 0


def test_pack_json(run: Any, source: Path, tmp_path: Path) -> None:
    done = run(
        "pack", source, tmp_path / "out", "--json", "--dense", "zstd", "--levels", "lsq", "--threads", "1"
    )
    result = done.json
    assert result["experts"] == 10
    assert result["weights"] == 10 * 3 * 24 * 36
    files = [file.stat().st_size for file in (tmp_path / "out").iterdir() if file.name != "manifest.json"]
    assert result["packed_bytes"] == sum(files)
    assert result["ratio"] == pytest.approx(result["source_bytes"] / result["packed_bytes"])
    assert 0 < result["relative_error"] < 1
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["recipe"] == {
        "method": "nearest",
        "levels": "lsq",
        "level_format": "bfloat16",
    }


def test_dry_run(run: Any, source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = run("pack", source, "--dry-run")
    assert done.code == 0
    assert "Prediction, nothing written" in done.out
    assert "assumed: " in done.out
    result = run("pack", source / "config.json", tmp_path / "out", "--dry-run", "--json").json
    assert result["basis"] == "config"
    assert result["packed_bytes"] == result["expert_packed_bytes"] + result["dense_packed_bytes"]
    assert sorted(tmp_path.iterdir()) == before


def test_verify_json(run: Any, packed: Path) -> None:
    result = run("verify", packed, "--json").json
    assert result["ok"] is True
    assert (result["layers"], result["experts"], result["matrices"]) == (2, 10, 30)


def test_unpack_json(run: Any, packed: Path, tmp_path: Path) -> None:
    result = run("unpack", packed, tmp_path / "out", "--dtype", "f32", "--json").json
    assert result["experts"] == 10
    assert result["bytes"] > 4 * 10 * 3 * 24 * 36


def test_inspect_accounts_for_every_byte(run: Any, packed: Path) -> None:
    result = run("inspect", packed, "--json").json
    files = {file.name: file.stat().st_size for file in packed.iterdir() if file.name != "manifest.json"}
    assert result["file_bytes"] == sum(files.values())
    experts = result["experts"]
    assert experts["bytes"] == sum(experts["section_bytes"].values())
    assert set(experts["section_bytes"]) == set(SECTIONS)
    assert experts["bits_per_weight"]["total"] == pytest.approx(8 * experts["bytes"] / experts["weights"])
    with qmoe_format.open(packed) as model:
        stores = sum(
            len(layer.store) + layer.index.nbytes + len(layer.dictionary_bytes)
            for layer in map(model.layer, model.layers)
        )
        assert experts["bytes"] == stores
        zeros = entropy = weights = 0.0
        frames: dict[str, int] = {}
        for layer in map(model.layer, model.layers):
            for expert in range(layer.experts):
                for frame in layer.frames(expert):
                    trits, _ = decode(frame, layer.dictionaries)
                    _, counts = np.unique(trits, return_counts=True)
                    zeros += np.count_nonzero(trits == 0)
                    weights += trits.size
                    entropy -= (counts * np.log2(counts / trits.size)).sum()
                    for identity in qmoe_format.reader.read_frame_header(frame).dictionary_ids:
                        key = f"{identity:#010x}"
                        frames[key] = frames.get(key, 0) + 1
    assert experts["zeros"] == zeros
    assert experts["sparsity"] == pytest.approx(zeros / weights)
    assert experts["entropy"] == pytest.approx(entropy / weights)
    assert {key: use["frames"] for key, use in experts["dictionaries"].items()} == frames
    assert sum(experts["sparsity_histogram"]) == weights
    assert sum(layer["bytes"] for layer in result["layers"].values()) == experts["bytes"]
    dense = result["dense"]
    assert dense["stored_bytes"] < dense["bytes"] == 2 * dense["elements"]
    assert dense["compressed"] > 0


def test_inspect_text_is_aligned(run: Any, packed: Path) -> None:
    text = run("inspect", packed).out
    for block in text.split("\n\n"):
        if "─" in block:
            header, line, *rows = block.splitlines()
            assert set(line) == {"─"}
            assert rows
            assert max(map(len, rows)) <= len(line)
            assert len(header) <= len(line)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(run: Any, packed: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / f"{name}.{suffix}" for name in ("one", "two")]
    for file in files:
        assert run("inspect", packed, "--plot", file).code == 0
    data = files[0].read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert len(data) > 10_000
    assert data == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files


def test_plot_without_matplotlib(
    run: Any, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_error(run("inspect", packed, "--plot", tmp_path / "x.png"), 1, "pip install 'qmoe-format[plot]'")


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["pack"],
        ["pack", "a", "b", "--levels", "best"],
        ["pack", "a", "b", "--threads", "0"],
        ["pack", "a", "b", "--threads", "many"],
        ["pack", "a", "b", "--forc"],
        ["unpack", "a"],
        ["unpack", "a", "b", "--dtype", "int8"],
        ["inspect"],
        ["verify", "a", "b"],
    ],
)
def test_wrong_usage(run: Any, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "usage: qmoe" in done.err


def test_pack_without_an_output(run: Any, source: Path) -> None:
    assert_error(run("pack", source), 2, "OUT", "--dry-run")


def test_errors_name_the_command(run: Any, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert_error(run("verify", missing), 2, str(missing), program="qmoe verify: error: ")
    result = run(missing, main=cli.main_verify)
    assert_error(result, 2, str(missing), program="qmoe-verify: error: ")


def test_an_existing_output(run: Any, source: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    assert_error(run("pack", source, out), 2, str(out), "--force")
    assert_error(run("pack", source, source, "--force"), 2, "OUT", "source")
    assert run("pack", source, out, "--force").code == 0


@pytest.mark.parametrize("command", ["verify", "inspect", "unpack"])
@pytest.mark.parametrize(
    ("fault", "code"),
    [("no manifest", 3), ("altered", 3), ("cut", 3), ("version", 4)],
)
def test_damaged_models(run: Any, packed: Path, tmp_path: Path, command: str, fault: str, code: int) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(packed, path)
    shard = min(path.glob("*.safetensors"))
    if fault == "no manifest":
        (path / "manifest.json").unlink()
    elif fault == "altered":
        data = bytearray(shard.read_bytes())
        data[len(data) // 3] ^= 1
        shard.write_bytes(data)
    elif fault == "cut":
        os.truncate(shard, shard.stat().st_size - 1)
    else:
        config = path / "config.json"
        text = config.read_text().replace('"version": "1.0"', '"version": "2.0"')
        config.write_text(text)
    arguments = [path, tmp_path / "out"] if command == "unpack" else [path]
    assert_error(run(command, *arguments), code, "damaged")
    assert not (tmp_path / "out").exists()


def test_an_unknown_picture(run: Any, packed: Path) -> None:
    assert_error(run("inspect", packed, "--plot", "x.gif"), 2, "--plot", "x.gif")


def test_a_plot_that_cannot_be_written(run: Any, packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert_error(run("inspect", packed, "--plot", tmp_path / "no/x.png"), 1, "x.png", "No such file")


def test_a_fault_of_ours_keeps_its_traceback(run: Any, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("qmoe_format.cli.verify.verify", broken)
    with pytest.raises(ZeroDivisionError):
        run("verify", packed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(run: Any, packed: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr("qmoe_format.cli.verify.verify", lambda *_, **__: signal.raise_signal(number))
    done = run("verify", packed)
    assert (done.code, done.out, done.err) == (130, "", "qmoe verify: interrupted\n")
    assert signal.getsignal(number) is before


def test_a_closed_pipe(packed: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "qmoe_format.cli", "inspect", "--json", packed],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")


def test_a_full_stdout(packed: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qmoe_format.cli", "verify", packed],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


# ---- the program itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qmoe", "qmoe-pack", "qmoe-unpack", "qmoe-inspect", "qmoe-verify"])
def test_version_and_help(run: Any, name: str) -> None:
    main = getattr(cli, "main" + name[4:].replace("-", "_"))
    done = run("--version", main=main)
    assert (done.code, done.out) == (0, f"{name} {importlib.metadata.version('qmoe-format')}\n")
    assert run("--help", main=main).out.startswith(f"usage: {name} ")


def test_pack_offers_what_there_is(run: Any) -> None:
    text = " ".join(run("pack", "--help").out.split())
    for choices in (METHODS, DENSE_MODES, ("minmax", "lsq"), ("bfloat16", "float16", "float32", "e4m4")):
        assert "{" + ",".join(choices) + "}" in text


def test_reading_needs_no_torch(packed: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfor name in ('torch', 'transformers', 'matplotlib', 'qmoe_quantize'):\n"
        "    sys.modules[name] = None\n"
        "from qmoe_format.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    for arguments in (
        ["verify", packed],
        ["inspect", packed],
        ["unpack", packed, tmp_path / "out"],
        ["pack", "-h"],
    ):
        subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.DEVNULL)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("kind", "quiet", "shown"),
    [(Terminal, False, True), (Terminal, True, False), (io.StringIO, False, False)],
)
def test_progress_is_shown_on_a_terminal(
    kind: type[io.StringIO], quiet: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = kind()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("qmoe_format.cli.common.PROGRESS_DELAY", 0)
    with ProgressBar("packing", quiet=quiet) as progress:
        progress(500_000, 2_000_000)
        progress(2_000_000, 2_000_000)
    assert ("packing" in stream.getvalue()) == shown


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (1.5e9, "1.50 GB"),
        (2e12, "2.00 TB"),
        (5e15, "5000 TB"),
    ],
)
def test_sizes(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def test_tables() -> None:
    assert table(("a", "bb"), [("ccc", "1"), ("", "100")]) == "a     bb\n────────\nccc    1\n     100"


def test_inspecting_nothing_but_zeros(tmp_path: Path) -> None:
    import torch
    from source_models import config_of, random_tensors, write_model

    config = config_of("mixtral")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in random_tensors(config).items()}
    pack(write_model(tmp_path / "source", config, tensors), tmp_path / "out")
    found = inspect(tmp_path / "out")
    assert found.total.sparsity == 1
    assert found.total.entropy == 0
    json.dumps(found.to_json())
