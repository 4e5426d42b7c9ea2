"""Every expert matrix: error of the recipe `rd` over that of `qmoe`, at the bits that `qmoe` takes.

    python benchmarks/quantizer_matrices.py MODEL --calib TEXT [--samples 1024 --length 128]

Both recipes get the same Hessians and the same level format. Bits are the entropy of each row's trits; the
error is the mean squared error in the layer's output. `rd` runs over a range of lambdas, and its error at the
bits of `qmoe` is interpolated between the two nearest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qmoe_quantize import CalibrationOptions, HessianOptions, SourceCheckpoint, TextOptions
from qmoe_quantize.allocation import typical_cost
from qmoe_quantize.calibrated import StoreTernarizer, calibrate
from qmoe_quantize.pipeline import expert_layers
from qmoe_quantize.recipes import RecipeSettings, ternarize_group
from qmoe_quantize.store import Store
from qmoe_quantize.sweep import environment
from qmoe_quantize.ternary import TernaryMatrix
from tqdm import tqdm


def entropy_bits(matrix: TernaryMatrix) -> float:
    share = np.count_nonzero(matrix.trits, axis=1) / matrix.trits.shape[1]
    share = np.clip(share, 1e-9, 1 - 1e-9)
    row = -(1 - share) * np.log2(1 - share) - share * np.log2(share / 2)
    return float(row.mean())


def error(matrix: TernaryMatrix) -> float:
    value = matrix.report["relative_output_error"]
    assert isinstance(value, float)
    return value


def ratio(paper: TernaryMatrix, ours: list[TernaryMatrix]) -> float:
    """Error of `ours`, by falling bits, at the bits of `paper`, over its error."""
    bits = np.array([entropy_bits(matrix) for matrix in ours])[::-1]
    errors = np.array([error(matrix) for matrix in ours])[::-1]
    wanted = entropy_bits(paper)
    if not bits[0] <= wanted <= bits[-1]:
        raise SystemExit(f"{wanted} bits are outside of what rd was run at: {bits}")
    return float(np.exp(np.interp(wanted, bits, np.log(errors)))) / error(paper)


def compare(model: Path, options: CalibrationOptions, level_format: str) -> list[dict[str, Any]]:
    checkpoint = SourceCheckpoint(model)
    layers = expert_layers(checkpoint.config, checkpoint.tensors)
    settings = RecipeSettings("rd", level_format)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.h5"
        calibrate(checkpoint, layers, options, path)
        with Store(path) as store:
            source = StoreTernarizer(store, checkpoint, options, settings)
            steps = [(layer, projection) for layer in layers for projection in layer.projections]
            for layer, projection in tqdm(steps, desc="matrices", unit="projection"):
                group = source.group(layer, projection, range(layer.experts))
                paper = ternarize_group(group, RecipeSettings("qmoe", level_format))
                lams = typical_cost([group]) * 10.0 ** np.arange(-3, 4.5, 0.5)
                runs = [ternarize_group(group, replace(settings, lam=float(lam))) for lam in lams]
                for expert in range(layer.experts):
                    rows.append(
                        {
                            "tensor": projection.tensor_name(expert),
                            "tokens": int(group.tokens[expert]),
                            "bits": entropy_bits(paper[expert]),
                            "qmoe_error": error(paper[expert]),
                            "ratio": ratio(paper[expert], [run[expert] for run in runs]),
                        }
                    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--level-format", default="e4m4")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    calibration = CalibrationOptions(
        text=TextOptions(options.calib, samples=options.samples, length=options.length),
        hessian=HessianOptions(gate_weighting=True),
    )
    rows = compare(options.model, calibration, options.level_format)
    ratios = np.array([row["ratio"] for row in rows])
    print(
        f"{options.model.name}: {len(rows)} matrices; error of rd over that of qmoe at equal bits: median "
        f"{np.median(ratios):.3f}, worst {ratios.max():.3f} ({rows[int(ratios.argmax())]['tensor']}), best "
        f"{ratios.min():.3f}"
    )
    out = options.out or Path(__file__).parent / f"results/quantizer_matrices_{options.model.name}.json"
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": environment()["processor"],
        "torch": torch.__version__,
        "model": options.model.name,
        "windows": options.samples,
        "length": options.length,
        "level_format": options.level_format,
        "median": float(np.median(ratios)),
        "worst": float(ratios.max()),
        "matrices": [
            {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}
            for row in rows
        ],
    }
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
