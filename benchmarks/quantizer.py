"""Held-out loss against bits on the disk, for every recipe, on models trained on Python's standard library.

    python benchmarks/quantizer.py MODEL --name wide

MODEL reads bytes, and was trained on the first 95 % of the standard library's source, like those that
benchmarks/train_models.py and the demo make. The same 95 % calibrate; the rest is scored. rd is measured at
shares of the bits that the qmoe recipe takes. Results and a chart go to benchmarks/results/quantizer_NAME.*;
points that are there already, with the same model, text and settings, are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from demo_model import WINDOW, standard_library_text
from qmoe_codec.errors import QMoEError
from qmoe_quantize.config import ModelConfig
from qmoe_quantize.evaluation import EvaluationOptions
from qmoe_quantize.options import CalibrationOptions
from qmoe_quantize.sweep import SweepOptions, compare, sweep
from qmoe_quantize.text import TextOptions

from qmoe_format.cli.sweep_plot import draw_sweep

RESULTS = Path(__file__).resolve().parent / "results"
SHARES = (0.5, 0.6, 0.7, 0.85, 1.05)
HELD_OUT = "0.95:1"
CALIBRATION_TOKENS = 1024 * WINDOW


def measure(
    model: Path, name: str, results: Path, shares: tuple[float, ...], windows: int
) -> dict[str, object]:
    """Sweep a model, with all of rd's points at shares of the bits that qmoe takes."""
    paired = ModelConfig.read(model / "config.json").truth("is_encoder_decoder", False)
    window = 2 * WINDOW if paired else WINDOW
    out = results / f"quantizer_{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "standard-library.txt"
        text.write_bytes(standard_library_text())
        options = SweepOptions(
            calibration=CalibrationOptions(
                text=TextOptions(str(text), samples=CALIBRATION_TOKENS // window, length=window)
            ),
            evaluation=EvaluationOptions(str(text), part=HELD_OUT, window=window, windows=windows),
            methods=("nearest", "qmoe"),
        )
        result = sweep(model, options, out, told=report)
        bits = result.of("qmoe")[-1].bits_per_weight
        options = replace(
            options, methods=("nearest", "qmoe", "rd"), bits=tuple(round(share * bits, 2) for share in shares)
        )
        result = sweep(model, options, out, told=report)
    values = {
        "what": "held-out loss against bits per expert weight on the disk; see benchmarks/quantizer.py",
        "date": datetime.now(UTC).date().isoformat(),
        "rd_over_qmoe": compare(result),
        **result.to_json(),
    }
    out.write_text(json.dumps(values, indent=1) + "\n")
    draw_sweep(result, os.fspath(out.with_suffix(".png")))
    return values


def report(label: str) -> None:
    print(f"{label} …", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", required=True, help="of the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for them (%(default)s)")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=SHARES, help="of qmoe's bits, for rd (%(default)s)"
    )
    parser.add_argument(
        "--windows", type=int, default=1536, help="held-out windows of 128 predictions (%(default)s)"
    )
    options = parser.parse_args()
    try:
        values = measure(options.model, options.name, options.results, tuple(options.shares), options.windows)
    except QMoEError as error:
        print(f"quantizer: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(values["rd_over_qmoe"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
