"""A calibrated run that ends in the middle goes on to the same bytes, or says why it cannot."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("h5py")
pytest.importorskip("transformers")

from qmoe_codec.errors import ArgumentError, ChecksumError, OutputExistsError, QMoEError
from qmoe_quantize import CalibrationOptions, HessianOptions, PackOptions, TextOptions, pack
from test_calibration import lively_model, text_file

import qmoe_format
from qmoe_format.cli import main


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model(tmp_path_factory.mktemp("models") / "source", num_experts=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


def chosen(text: Path, **changes: Any) -> PackOptions:
    calibration = CalibrationOptions(
        text=TextOptions(str(text), 12, 16), hessian=HessianOptions(experts_per_batch=2)
    )
    return PackOptions(**{"method": "qmoe", "calibration": calibration, **changes})


@pytest.fixture(scope="module")
def expected(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    pack(source, out, chosen(text))
    return files_of(out)


class Stopped(BaseException):
    """Ends a run in the middle."""


def stop_at(layer: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the next run fail when it begins with a layer."""
    from qmoe_quantize import calibrated

    seen = []
    original = calibrated.StreamedTernarizer.layer

    def fail(self: Any, spec: Any) -> Any:
        if len(seen) == layer:
            raise error
        seen.append(spec)
        return original(self, spec)

    monkeypatch.setattr(calibrated.StreamedTernarizer, "layer", fail)


def interrupted(source: Path, text: Path, out: Path, layers: int = 2, **changes: Any) -> Path:
    """A run that ended after some layers; gives its unfinished output."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(layers, patch, Stopped())
        with pytest.raises(Stopped):
            pack(source, out, chosen(text, **changes))
    assert not out.exists()
    return out.with_name(out.name + ".partial")


@pytest.mark.parametrize("layers", [1, 2])
def test_a_run_goes_on(
    layers: int, source: Path, text: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    partial = interrupted(source, text, out, layers)
    finished = {name: data for name, data in files_of(partial).items() if name.startswith("shard-")}
    assert len(finished) == layers + 1  # and one that was begun
    steps: list[tuple[int, int]] = []
    summary = pack(source, out, chosen(text, resume=True), progress=lambda *step: steps.append(step))
    assert files_of(out) == expected
    assert not partial.exists()
    assert len(summary.matrices) == 3 * 3 * 3
    assert (summary.layers, summary.experts) == (3, 9)
    assert steps[-1][0] == steps[-1][1]
    # What was finished was not done again
    assert steps[0][0] > layers * summary.expert_source_bytes / 3


def test_finished_layers_are_not_thrown_away(
    source: Path, text: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    partial = interrupted(source, text, out)
    before = files_of(partial)
    for options in (chosen(text), PackOptions()):
        with pytest.raises(OutputExistsError, match=r"2 finished layers.*--resume.*--force"):
            pack(source, out, options)
        assert files_of(partial) == before
    pack(source, out, chosen(text, force=True))
    assert files_of(out) == expected
    assert not partial.exists()


@pytest.mark.parametrize("what", ["model", "calibration data", "damp", "seed", "method", "dense"])
def test_what_differs_is_named(what: str, source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = interrupted(source, text, out, 1)
    before = files_of(partial)
    options, model = chosen(text, resume=True), source
    if what == "model":
        model = lively_model(tmp_path / "other", num_experts=3, rms_norm_eps=1e-3)
    elif what == "calibration data":
        options = chosen(text_file(tmp_path / "other.txt", seed=1), resume=True)
    elif what == "damp":
        from qmoe_quantize.recipes import RecipeSettings

        options = chosen(text, resume=True, recipe=RecipeSettings(damp=0.2))
    elif what == "seed":
        assert options.calibration is not None
        hessian = replace(options.calibration.hessian, seed=3)
        options = replace(options, calibration=replace(options.calibration, hessian=hessian))
    else:
        options = chosen(text, resume=True, **{what: {"method": "rd", "dense": "zstd"}[what]})
    with pytest.raises(ArgumentError, match=f"--resume.*different.*{what}"):
        pack(model, out, options)
    assert files_of(partial) == before


def test_a_changed_shard_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = interrupted(source, text, out)
    data = bytearray((partial / "shard-00001").read_bytes())
    data[-1] ^= 1
    (partial / "shard-00001").write_bytes(data)
    with pytest.raises(ChecksumError, match="shard-00001"):
        pack(source, out, chosen(text, resume=True))


def test_resume_with_nothing_to_go_on_from(
    source: Path, text: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    pack(source, tmp_path / "out", chosen(text, resume=True))
    assert files_of(tmp_path / "out") == expected


def test_an_error_before_any_layer_leaves_nothing(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(0, monkeypatch, QMoEError("trouble"))
    with pytest.raises(QMoEError, match=r"trouble$"):
        pack(source, tmp_path / "out", chosen(text))
    assert not list(tmp_path.iterdir())


def test_an_error_later_says_that_layers_are_kept(
    source: Path, text: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(1, patch, QMoEError("trouble"))
        with pytest.raises(QMoEError, match=r"trouble; 1 of 3 layers are kept: --resume"):
            pack(source, tmp_path / "out", chosen(text))
    pack(source, tmp_path / "out", chosen(text, resume=True))
    assert files_of(tmp_path / "out") == expected


def test_an_interrupted_command(
    source: Path,
    text: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["pack", str(source), str(tmp_path / "out"), "--calib", str(text), "--method", "qmoe"]
    arguments += ["--nsamples", "12", "--seqlen", "16", "--experts-per-batch", "2"]
    arguments += ["--report", str(tmp_path / "report.jsonl")]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(1, patch, KeyboardInterrupt())
        assert main(arguments) == 130
    message = "qmoe pack: interrupted: 1 of 3 layers are kept: --resume goes on from them\n"
    assert capsys.readouterr().err == message
    assert main([*arguments, "--resume"]) == 0
    assert files_of(tmp_path / "out") == expected
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert len({line["tensor"] for line in lines}) == len(lines) == 27


KILLED = """
import os, shutil, sys
from pathlib import Path
sys.path[:0] = {path!r}
import h5py, torch, transformers.models.olmoe.modeling_olmoe
from transformers.conversion_mapping import get_model_conversion_mapping
from qmoe_quantize import pack
from qmoe_quantize.calibrated import calibrate
from test_resume import chosen, files_of

source, text, folder = map(Path, sys.argv[1:4])
first, step = map(int, sys.argv[4:])

def run(out, kill_at, resume):
    # A child, so that the kill is a real end: nothing is cleaned up, no buffer is flushed
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        calls, fsync = 0, os.fsync
        def counted(descriptor):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os._exit(9)
            fsync(descriptor)
        os.fsync = counted
        try:
            pack(source, out, chosen(text, resume=resume))
            os._exit(0)
        except BaseException as error:
            print(repr(error), error, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert run(folder / "expected", 0, False) == 0
expected, points = files_of(folder / "expected"), 0
for kill_at in range(first, 10**6, step):
    out = folder / "out"
    status = run(out, kill_at, False)
    if status == 0:
        break
    assert status == 9 and not (out.exists() and not (out / "manifest.json").exists())
    points += 1
    partial = folder / "out.partial"
    if not out.exists() and not (partial / ".qmoe-partial").exists():
        # Finished, and killed before it could be moved: the next run says so and leaves it alone
        assert run(out, 0, True) == 1
        partial.rename(out)
    if not out.exists():
        assert run(out, 0, True) == 0
    assert files_of(out) == expected, kill_at
    assert not (folder / "out.partial").exists()
    shutil.rmtree(out)
print(points, "points")
"""


@pytest.mark.slow
def test_killed_anywhere(source: Path, text: Path, tmp_path: Path) -> None:
    """Killed at every few of the moments when something is put on the disk."""
    code = KILLED.format(path=[str(Path(__file__).parent)])
    command = [sys.executable, "-c", code, source, text, tmp_path, "4", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-2]) >= 4


LIMITED = """
import resource, sys
from qmoe_format.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [9_000, 70_000])
def test_a_full_disk(limit: int, source: Path, text: Path, tmp_path: Path) -> None:
    """No room for activations: one line, and nothing in the way of another try."""
    arguments = ["pack", source, tmp_path / "out", "--calib", text, "--method", "qmoe"]
    arguments += ["--nsamples", "96", "--seqlen", "16", "--experts-per-batch", "2"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("qmoe pack: error: ")
    assert "File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_real_interrupt(tmp_path: Path) -> None:
    """SIGINT in the middle of a run of the command."""
    source = lively_model(tmp_path / "source", num_hidden_layers=4, num_experts=6)
    text = text_file(tmp_path / "text.txt")
    arguments = ["pack", source, tmp_path / "out", "--calib", text, "--method", "qmoe"]
    arguments += ["--nsamples", "32", "--seqlen", "64", "--experts-per-batch", "2"]
    command = [sys.executable, "-m", "qmoe_format.cli", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.partial/resume-00001.json").exists():
        assert process.poll() is None, "finished before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in message
    assert "of 4 layers are kept" in message
    assert main([*map(str, arguments), "--resume", "--quiet"]) == 0
    qmoe_format.verify(tmp_path / "out")
