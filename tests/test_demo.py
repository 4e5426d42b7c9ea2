"""The demo, from training to its table, with a model so small that it takes seconds."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from qmoe_codec.errors import QMoEError
from safetensors.torch import load_file, save_file
from transformers import SwitchTransformersConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
import demo_model  # noqa: E402

TINY = demo_model.Settings(
    layers=1, experts=2, hidden=32, width=48, heads=2, batch=2, steps=4, warmup=1, learning_rate=1e-2
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[demo.Row]]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo.run(out, TINY, windows=3, calibration_windows=8)


def test_runs_from_training_to_the_table(finished: tuple[Path, list[demo.Row]]) -> None:
    out, rows = finished
    names = ["original fp32", "original bf16", "unpacked minmax", "packed minmax", "packed lsq", "packed rd"]
    assert [row.name for row in rows] == names
    original, _, unpacked, packed, _, calibrated = rows
    assert original.bits == unpacked.bits == 16
    assert packed.bits < 4  # so small a model is mostly headers
    assert calibrated.bits < packed.bits
    assert original.total_bytes > packed.total_bytes > packed.expert_bytes
    assert all(0 < row.bits_per_byte < 9 for row in rows)
    assert all(min(row.generated_per_second, row.evaluated_per_second) > 1 for row in rows)
    assert abs(unpacked.bits_per_byte - packed.bits_per_byte) <= 1e-4
    for picture in ("inspect.png", "rate-loss.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    text = demo.table(rows)
    assert len(set(map(len, text.splitlines()))) == 1
    assert f"{packed.bits:.3f}" in text


def test_the_comparison_sees_one_changed_weight(
    finished: tuple[Path, list[demo.Row]], tmp_path: Path
) -> None:
    out, _ = finished
    folders = out / "checkpoint", out / "packed-minmax"
    demo.compare(*folders, out / "unpacked-minmax")
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    for change, tensor in (("ternary weights", name), ("dense", "model.norm.weight")):
        tensors = load_file(out / "unpacked-minmax" / "model.safetensors")
        tensors[tensor].view(-1)[7] = -tensors[tensor].view(-1)[7] + 1
        folder = tmp_path / change
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(QMoEError, match=f"{tensor}.*differ"):
            demo.compare(*folders, folder)


def test_training_is_reproducible_and_learns() -> None:
    text = b"abcdefgh" * 200
    first, again = (demo_model.train(TINY, text) for _ in range(2))
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    tokens = torch.tensor([list(text[:64])])
    assert first(input_ids=tokens, labels=tokens).loss.item() < 7.5 * math.log(2)


def test_leaves_other_folders_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("all my work")
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert "not made by this demo" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_says_what_is_wrong_with_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert demo.main([*out, "--model", str(tmp_path / "nothing")]) == 1
    assert "no config.json" in capsys.readouterr().err
    SwitchTransformersConfig().save_pretrained(tmp_path / "switch")
    assert demo.main([*out, "--model", str(tmp_path / "switch")]) == 1
    assert "is_encoder_decoder" in capsys.readouterr().err
