"""Speed of the calibrated recipes in weights per second, and how it grows with experts, rows and columns.

    python benchmarks/quantizer_speed.py [--device cuda] [--threads 2]

Held against what `qmoe-pack --dry-run` predicts for each shape from the small problems that it runs. Results
and a chart go to benchmarks/results/quantizer_speed.*.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from qmoe_quantize.cost import Work, measure_rates, problem, seconds_of
from qmoe_quantize.recipes import RecipeSettings
from qmoe_quantize.sweep import environment

from qmoe_format.cli import plot

BASE = (4, 256, 512)  # experts, rows, columns
GROWN = {
    "experts": [(2, 256, 512), BASE, (8, 256, 512), (16, 256, 512)],
    "rows": [(4, 128, 512), BASE, (4, 512, 512), (4, 1024, 512)],
    "columns": [(4, 256, 256), BASE, (4, 256, 1024), (4, 256, 2048)],
}
SHAPES = list(dict.fromkeys(shape for shapes in GROWN.values() for shape in shapes))
SETTINGS = {"qmoe": RecipeSettings("qmoe", "bfloat16"), "rd": RecipeSettings("rd", lam=3e-6)}


def draw(rows: list[dict[str, object]], file: Path) -> None:
    """Time for a weight, by what grows."""
    with plot.save_figure(str(file), (9.0, 3.0)) as figure:
        figure.suptitle("Time to ternarize a weight", fontweight="bold", x=0.01, ha="left")
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (name, shapes) in zip(panels, GROWN.items(), strict=True):
            for method in SETTINGS:
                found = {
                    (r["experts"], r["rows"], r["columns"]): 1e9 / float(str(r["weights_per_second"]))
                    for r in rows
                    if r["method"] == method
                }
                place = list(GROWN).index(name)
                axes.plot([shape[place] for shape in shapes], [found[s] for s in shapes], "o-", label=method)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks([shape[place] for shape in shapes], [str(shape[place]) for shape in shapes])
            axes.set_xlabel(name)
        panels[0].set_ylabel("nanoseconds")
        panels[0].legend()


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
    rates = {}
    for method, settings in SETTINGS.items():
        rates[method] = measure_rates(settings, options.device)
        for shape in SHAPES:
            experts, height, width = shape
            taken = seconds_of(problem(shape, options.device), settings, options.repeats)
            predicted = rates[method].seconds(Work.of(*shape))
            weights = experts * height * width
            rows.append(
                {
                    "method": method,
                    "experts": experts,
                    "rows": height,
                    "columns": width,
                    "seconds": taken,
                    "weights_per_second": weights / taken,
                    "predicted_over_measured": predicted / taken,
                }
            )
            print(
                f"{method:5} {experts:3} experts of {height:4} x {width:4}: {taken:7.2f} s, "
                f"{weights / taken / 1e6:6.2f} M weights/s; predicted {predicted / taken:.2f} of the time",
                flush=True,
            )
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else environment()["processor"]
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": device,
        "threads": options.threads,
        "torch": torch.__version__,
        "settings": {name: asdict(settings) for name, settings in SETTINGS.items()},
        "rates": {method: asdict(found) for method, found in rates.items()},
        "shapes": rows,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    draw(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
