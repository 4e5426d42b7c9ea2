"""Speed of the calibrated recipes in weights per second, and how it grows with experts, rows and columns.

    python benchmarks/quantizer_speed.py [--device cuda] [--threads 2]

Fits the two rates of qmoe_quantize.cost, with which `qmoe-pack --dry-run` predicts times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from qmoe_quantize.cost import matrix_work
from qmoe_quantize.problem import MatrixGroup
from qmoe_quantize.recipes import RecipeSettings, ternarize_group
from qmoe_quantize.sweep import environment

BASE = (4, 256, 512)  # experts, rows, columns
SHAPES = [BASE, (16, 256, 512), (4, 1024, 512), (4, 256, 1024), (2, 512, 2048), (16, 128, 128)]
SETTINGS = {"qmoe": RecipeSettings("qmoe", "bfloat16"), "rd": RecipeSettings("rd", lam=3e-6)}


def group(experts: int, rows: int, columns: int, device: str) -> MatrixGroup:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    hessian = (inputs.T @ inputs / len(inputs))[None]
    weight = torch.randn(experts, rows, columns, generator=generator) * columns**-0.5
    return MatrixGroup(
        names=tuple(f"expert.{number}" for number in range(experts)),
        weight=weight.to(device),
        hessian=(0.1 * hessian.repeat(experts, 1, 1)).to(device),
        prior=hessian.to(device),
        tokens=torch.full((experts,), 1000),
        calibration_tokens=10000,
        row_weight=torch.ones(experts, rows, device=device),
    )


def seconds(problem: MatrixGroup, settings: RecipeSettings, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        ternarize_group(problem, settings)  # ends with a copy to the host
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def fit(rows: list[dict[str, float]]) -> dict[str, float]:
    """Rates that explain the times best, relative errors squared; both positive."""
    terms = np.array([[row["multiplications"], row["column_steps"]] for row in rows])
    times = np.array([row["seconds"] for row in rows])
    best, *_ = np.linalg.lstsq(terms / times[:, None], np.ones(len(times)), rcond=None)
    if (best <= 0).any():  # one of them explains all there is
        column = int(np.argmax(best))
        single, *_ = np.linalg.lstsq(terms[:, [column]] / times[:, None], np.ones(len(times)), rcond=None)
        best = np.full(2, 1e-30)
        best[column] = single[0]
    predicted = terms @ best
    return {
        "multiplications": 1 / best[0],
        "column_steps": 1 / best[1],
        "worst_ratio": float(np.max(np.maximum(predicted / times, times / predicted))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/quantizer_speed.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for method, settings in SETTINGS.items():
        for shape in SHAPES:
            experts, height, width = shape
            taken = seconds(group(*shape, options.device), settings, options.repeats)
            work = matrix_work(height, width, settings, 0.0)
            weights = experts * height * width
            rows.append(
                {
                    "method": method,
                    "experts": experts,
                    "rows": height,
                    "columns": width,
                    "seconds": taken,
                    "weights_per_second": weights / taken,
                    "multiplications": work.multiplications * experts,
                    "column_steps": work.column_steps * experts,
                }
            )
            print(
                f"{method:5} {experts:3} experts of {height:4} x {width:4}: {taken:7.2f} s, "
                f"{weights / taken / 1e6:6.2f} M weights/s",
                flush=True,
            )
    rates = fit(rows)
    print(
        f"fitted: {rates['multiplications'] / 1e9:.1f} G multiplications/s, "
        f"{rates['column_steps'] / 1e6:.1f} M column steps/s, off by at most {rates['worst_ratio']:.2f} times"
    )
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else environment()["processor"]
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": device,
        "threads": options.threads,
        "torch": torch.__version__,
        "settings": {name: asdict(settings) for name, settings in SETTINGS.items()},
        "rates": rates,
        "shapes": rows,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
