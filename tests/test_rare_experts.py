"""Experts that calibration hardly reaches, in a model that was trained: held-out error against rounding."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("h5py")
pytest.importorskip("transformers")

import torch
from qmoe_quantize.calibrated import StreamedExperts, ternary_weight
from qmoe_quantize.checkpoint import SourceCheckpoint
from qmoe_quantize.nearest import ternarize
from qmoe_quantize.options import HessianOptions, StreamOptions
from qmoe_quantize.pipeline import expert_layers
from qmoe_quantize.problem import MatrixGroup
from qmoe_quantize.recipes import RecipeSettings
from qmoe_quantize.ternary import TernaryMatrix
from qmoe_quantize.text import TokenWindows
from test_recipes import at_bits, entropy_bits

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from demo_model import Settings, split, standard_library_text, train

EXPERT = 1

Known = dict[str, tuple[MatrixGroup, torch.Tensor]]


class Looking:
    """Keeps what is known of one expert's matrices."""

    corrects = False

    def __init__(self) -> None:
        self.groups: dict[str, MatrixGroup] = {}

    def wants(self, layer: Any, tokens: list[int]) -> list[int]:
        return [EXPERT]

    def visit(self, layer: Any, projection: Any, experts: list[int], group: MatrixGroup) -> torch.Tensor:
        self.groups[projection.role] = group
        return group.weight


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> Known:
    """By role: an expert's matrix with its prior, and its inputs, weighted, token by token."""
    folder = tmp_path_factory.mktemp("trained")
    text, _ = split(standard_library_text())
    settings = Settings(layers=1, experts=4, hidden=96, width=128, heads=4, batch=8, steps=120, warmup=20)
    train(settings, text).save_pretrained(folder / "model")
    checkpoint = SourceCheckpoint(folder / "model")
    (layer,) = expert_layers(checkpoint.config, checkpoint.tensors)
    tokens = np.frombuffer(text[: 64 * 128], np.uint8).reshape(64, 128).astype(np.int64)
    windows = TokenWindows(tokens, np.ones(tokens.shape, bool), len(tokens))
    look = Looking()
    streamed = StreamedExperts(checkpoint, [layer], windows, StreamOptions(), HessianOptions(), folder)
    for _, run in streamed.run(layer, look):
        x, selection = run._scratch.read("x", 0, tokens.size), run._selections[EXPERT]
    inner = x[selection.tokens]
    gate, up = look.groups["gate"].weight[0], look.groups["up"].weight[0]
    hidden = torch.nn.functional.silu(inner @ gate.T) * (inner @ up.T)
    weight = selection.gates[:, None]
    return {
        "gate": (look.groups["gate"], inner * weight),
        "up": (look.groups["up"], inner * weight),
        "down": (look.groups["down"], hidden * weight),
    }


@pytest.mark.parametrize("role", ["gate", "up", "down"])
@pytest.mark.parametrize("tokens", [0, 16, 64])
def test_rd_is_no_worse_than_rounding(tokens: int, role: str, trained: Known) -> None:
    known, inputs = trained[role]
    assert len(inputs) > 1000
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(tokens))
    seen, unseen = inputs[order[:tokens]], inputs[order[tokens:]]
    group = MatrixGroup(
        names=known.names,
        weight=known.weight,
        hessian=(seen.T @ seen)[None] / known.calibration_tokens,
        prior=known.prior,
        tokens=torch.tensor([tokens]),
        calibration_tokens=known.calibration_tokens,
        row_weight=known.row_weight,
    )

    def error(matrix: TernaryMatrix) -> float:
        lost = unseen @ (group.weight[0] - ternary_weight(matrix)).T
        return float((lost.square() * group.row_weight).sum())

    for rule in ("minmax", "lsq"):
        trits, levels = ternarize(group.weight[0].numpy(), rule, "e4m4")
        nearest = TernaryMatrix(trits, levels, 0.0, 0.0)
        assert error(at_bits(group, entropy_bits(trits), RecipeSettings("rd"))) <= error(nearest), rule
