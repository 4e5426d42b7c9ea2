"""Predicting runs of many ranks: what travels, by counting it, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from qmoe_codec.errors import ArgumentError
from qmoe_quantize import CalibrationOptions, PackOptions, TextOptions
from qmoe_quantize.spread import Machines, imbalance, layer_bytes, predict_spread
from source_models import config_of, random_tensors, write_model

from qmoe_format.container import LayerSpec, Projection


def layer(experts: int, width: int = 8, rows: int = 16) -> LayerSpec:
    shapes = {"up": (rows, width), "down": (width, rows)}
    return LayerSpec(
        "l", experts, tuple(Projection(n, n, f"{{expert}}.{n}", *shapes[n]) for n in shapes), "F32"
    )


@pytest.mark.parametrize(("ranks", "choices"), [(2, 1), (4, 2), (8, 6)])
def test_what_travels(ranks: int, choices: int) -> None:
    """As counted for random tokens, whose experts lie on any rank alike."""
    tokens, width = 20_000, 8
    generator = np.random.default_rng(0)
    owners = generator.integers(ranks, size=(tokens, choices))
    home = generator.integers(ranks, size=tokens)
    there = (owners[:, :, None] == np.arange(ranks)).any(axis=1)
    there[np.arange(tokens), home] = False
    counted = 4 * width * (int(there.sum()) + int((owners != home[:, None]).sum()))
    counted += tokens * choices * 8 * (ranks - 1)
    assert layer_bytes(layer(64), tokens, choices, ranks) == pytest.approx(counted, rel=0.02)
    assert layer_bytes(layer(64), tokens, choices, 1) == 0


def test_the_busiest_rank() -> None:
    assert imbalance([layer(64)], 8) == 1
    assert imbalance([layer(10)], 4) == pytest.approx(3 * 4 / 10)


def test_refusals(tmp_path: Path) -> None:
    config = config_of("olmoe")
    source = write_model(tmp_path / "source", config, random_tensors(config))
    with pytest.raises(ArgumentError, match="--calib"):
        predict_spread(source, PackOptions(), Machines(1, 2, 1e9))
    chosen = PackOptions(method="qmoe", calibration=CalibrationOptions(text=TextOptions("text.txt", 4, 16)))
    with pytest.raises(ArgumentError, match="more ranks than experts"):
        predict_spread(source, chosen, Machines(40, 40, 1e9))
    plan, one = predict_spread(source, chosen, Machines(1, 1, 1e9))
    _, two = predict_spread(source, chosen, Machines(2, 1, 1e9))
    assert plan.packed_bytes <= one.disk_bytes
    assert one.sent_bytes == one.network_seconds == 0
    assert two.sent_bytes > 0
    assert two.network_seconds > 0
    assert two.ranks == 2
