"""The benchmark of the GPU kernels and its session, as far as they go without a GPU."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_session  # noqa: E402
import gpu_sweep  # noqa: E402


def made_up() -> dict:
    """Results as the benchmark writes them, with numbers that nobody measured."""
    times = gpu.summary([1.0, 2.0, 3.0, 4.0])
    shapes = {}
    for rows, columns in gpu.SHAPES[:2]:
        count = gpu.counted(
            rows * columns, rows * columns // 15, rows * columns // 9, 10**5, 1, (rows, columns)
        )
        cell = {"ours": times, "dense bf16": gpu.summary([5.0, 5.0, 5.0]), "counted": count}
        shapes[f"{rows}x{columns}"] = {
            "1 tokens": cell,
            "8 tokens": cell,
            "decode to bf16": {"ours": times, "written_bytes": 10**6},
            "encode": {"ours": times, "weights": 10**6},
            f"1 tokens, {gpu.PEER}": {"ours": times, gpu.PEER: gpu.summary([20.0, 20.0, 20.0])},
        }
    shapes["5x7"] = {
        f"1 tokens, {gpu.PEER}": {gpu.UNSUPPORTED: "its shapes are others"}
    }  # cut off before ours
    device = {"name": "made up", "bytes_per_second": 4e12, "lane_instructions_per_second": 3e13}
    return {"date": "2000-01-01", "device": device, "shapes": shapes}


def test_counts() -> None:
    found = gpu.counted(1000, 60, 115, 80, 1, (10, 100))
    assert found["bytes"] == 80 + 2 * 110
    assert found["dense_bytes"] == 2000 + 220
    # 10 rows of 6 codewords: one step, one codeword a lane
    assert found["lane_instructions"] == 320 * (gpu.PER_ROW + gpu.PER_STEP + gpu.PER_CODEWORD)
    more = gpu.counted(1000, 60, 115, 80, 9, (10, 100))["lane_instructions"]
    assert more == found["lane_instructions"] + 2 * 115 * gpu.PER_NONZERO
    assert gpu.copies(10**6, 50 << 20) * 10**6 > 2 * (50 << 20)
    assert gpu.copies(10**9, 50 << 20) == 2


def test_table_and_chart(tmp_path: Path) -> None:
    results = made_up()
    lines = gpu.table(results).splitlines()
    assert "2.00x dense bf16" in lines[0] and "8.00x QMoE's kernel" in lines[4]
    assert lines[-1].endswith("not supported by the peer: its shapes are others")
    source, out = tmp_path / "results.json", tmp_path / "chart.png"
    source.write_text(json.dumps(results), "utf-8")
    subprocess.run([sys.executable, BENCHMARKS / "gpu.py", "--chart", source, "--plot", out], check=True)
    assert out.read_bytes()[:4] == b"\x89PNG"


def test_arguments() -> None:
    assert gpu.arguments(["--shapes", "3x4"]).shapes == [(3, 4)]
    with pytest.raises(SystemExit):
        gpu.arguments(["--chart", "x.json"])


def test_a_run_that_is_cut_off_keeps_what_it_measured(tmp_path: Path) -> None:
    results: dict = {"shapes": {}}
    saved = []

    def fails() -> dict:
        raise RuntimeError("an illegal address")

    def works() -> dict:
        return {"ours": 1}

    todo = [("2x3", "1 tokens", works), ("2x3", "8 tokens", fails), ("grouped", "x", works)]
    wrong = gpu.run_cells(iter(todo), results, 60, lambda: saved.append(json.dumps(results)))
    assert wrong == 1 and len(saved) == 3
    assert results["shapes"]["2x3"]["1 tokens"]["ours"] == results["grouped"]["x"]["ours"] == 1
    assert gpu.run_cells(iter([("2x3", "y", fails)]), results, -1, saved.clear) == 0 and saved
    assert "illegal address" in results["errors"][0] and results["left_out"] == ["2x3: y"]
    gpu.write_json(tmp_path / "out.json", results)
    assert json.loads((tmp_path / "out.json").read_text()) == results
    assert "LEFT OUT  2x3: y" in gpu.table({**made_up(), "left_out": results["left_out"]})


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="NOT TESTED: there is no g++")
def test_benchmark_and_sweep_on_the_host(tmp_path: Path) -> None:
    common = ["--host", "--experts", "8", "--shapes", "40x96"]
    given = [
        *common,
        "--large",
        "300",
        "--json",
        str(tmp_path / "gpu.json"),
        "--plot",
        str(tmp_path / "x.png"),
    ]
    assert gpu.main(given) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    names = {
        "32 by tiles",
        "128 by tiles",
        "1 tokens",
        "8 tokens",
        "32 tokens",
        "300 tokens",
        "decode to bf16",
        "encode",
    }
    assert set(results["shapes"]["40x96"]) == names and len(results["grouped"]) == 2
    operations = ["--operations", "8 tokens", "decode to bf16"]
    given = [*common, *operations, "--seconds", "8", "--json", str(tmp_path / "sweep.json")]
    assert gpu_sweep.main(given) == 0
    sweeps = json.loads((tmp_path / "sweep.json").read_text())["sweeps"]
    assert sweeps["8 tokens"]["tried"][0]["ratio"] == 1 and not any("error" in s for s in sweeps.values())


def test_kernels_are_listed_for_compiling_ahead() -> None:
    options = gpu.arguments(["--shapes", "40x96", "9x5000"])
    place = gpu.OnHost() if shutil.which("g++") else None
    if place is None:
        pytest.skip("NOT TESTED: there is no g++")
    found = gpu.kernels_of(place, options)
    assert {name for _, _, name in found} == {
        "matmul",
        "tiles",
        "decode",
        "route",
        "enter",
        "leave",
        "combine",
    }
    assert all(dict(definitions).get("CODECS", 4) == 4 for _, definitions, _ in found)


def test_a_sweep_keeps_the_best_of_each_axis() -> None:
    def measure(tuning: gpu_sweep.Tuning) -> gpu_sweep.Measured:
        if tuning.share == 4:
            return {"median_us": 0.1}, np.zeros(3)  # fast and wrong
        return {"median_us": 30.0 + abs(tuning.warps - 16) - 2 * tuning.together}, np.ones(3)

    sweep = gpu_sweep.Sweep("8 tokens", {"a": measure, "b": measure})
    best = sweep.search(gpu_sweep.Tuning(), gpu_sweep.PRODUCT, lambda line: True)
    assert (best.warps, best.together, best.share) == (16, 8, 8)
    assert sum("another result" in tried.get("error", "") for tried in sweep.tried) == 1
    assert all(gpu_sweep.legal(gpu_sweep.Tuning(**tried["tuning"])) for tried in sweep.tried)
    assert not gpu_sweep.legal(replace(best, together=3))


def test_a_session_ends_what_hangs_and_what_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = sys.executable
    hangs = "import subprocess, sys, time; print('begun', flush=True); time.sleep(60)"
    todo = [
        gpu_session.Stage("hangs", [python, "-c", hangs], 1.5),
        gpu_session.Stage(
            "fails", [python, "-c", "print('a mismatch'); raise SystemExit(3)"], 20, needed=True
        ),
        gpu_session.Stage("never", [python, "-c", "print('never')"], 20),
    ]
    assert gpu_session.run(todo, tmp_path, 100) == 124
    outcomes = json.loads((tmp_path / "session.json").read_text())
    assert [(o["name"], o["status"], o["timed_out"]) for o in outcomes] == [
        ("hangs", 124, True),
        ("fails", 3, False),
    ]
    printed = capsys.readouterr().out
    assert "hangs: TIMED OUT" in printed and "a mismatch" in printed and "never" not in printed
    assert gpu_session.run(todo[2:], tmp_path, 5) == 0 and "no time left" in capsys.readouterr().out
    # What runs out of time may be right as far as it went
    slow = replace(todo[0], needed=True)
    assert gpu_session.run([slow, todo[2]], tmp_path, 100) == 124 and "never" in capsys.readouterr().out
    listed = gpu_session.stages(tmp_path, gpu_session.arguments(["--out", str(tmp_path)]))
    assert [s.name for s in listed][:5] == ["machine", "build", "tests", "benchmark", "sweep"]
