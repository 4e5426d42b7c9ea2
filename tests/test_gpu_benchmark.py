"""The benchmark of the GPU kernels, as far as it goes without a GPU: counts, arguments, table, chart."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402


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
            "frame_bytes": 10**5,
            "1 tokens": cell,
            "8 tokens": cell,
            "decode to bf16": {"ours": times, "written_bytes": 10**6},
            "encode": {"ours": times, "weights": 10**6},
        }
    device = {"name": "made up", "bytes_per_second": 4e12, "lane_instructions_per_second": 3e13}
    return {"date": "2000-01-01", "device": device, "shapes": shapes}


def test_counts() -> None:
    found = gpu.counted(1000, 60, 115, 80, 1, (10, 100))
    assert found["bytes"] == 80 + 2 * 110
    assert found["dense_bytes"] == 2000 + 220
    assert found["lane_instructions"] == round(60 * gpu.PER_CODEWORD + 115 * gpu.PER_NONZERO)
    assert gpu.copies(10**6, 50 << 20) * 10**6 > 2 * (50 << 20)
    assert gpu.copies(10**9, 50 << 20) == 2


def test_table_and_chart(tmp_path: Path) -> None:
    results = made_up()
    assert "2.00x dense bf16" in gpu.table(results)
    source, out = tmp_path / "results.json", tmp_path / "chart.png"
    source.write_text(json.dumps(results), "utf-8")
    subprocess.run([sys.executable, BENCHMARKS / "gpu.py", "--chart", source, "--plot", out], check=True)
    assert out.read_bytes()[:4] == b"\x89PNG"


def test_arguments() -> None:
    assert gpu.arguments(["--shapes", "3x4"]).shapes == [(3, 4)]
    with pytest.raises(SystemExit):
        gpu.arguments(["--chart", "x.json"])
