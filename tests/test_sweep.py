"""`qmoe sweep`: its points, that it goes on where it was, and what is read off a curve."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qmoe_codec.errors import ArgumentError, OutputExistsError
from qmoe_quantize import pack
from qmoe_quantize.evaluation import EvaluationOptions, evaluate
from qmoe_quantize.options import CalibrationOptions, StreamOptions
from qmoe_quantize.sweep import Point, Sweep, SweepOptions, bits_at, compare, loss_at, sweep
from qmoe_quantize.text import TextOptions
from transformers import OlmoeConfig, OlmoeForCausalLM

from qmoe_format.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level model and a text."""
    folder = tmp_path_factory.mktemp("sweep")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(folder / "model")
    (folder / "text.txt").write_bytes(bytes((i * i) % 95 + 32 for i in range(2000)))
    return folder


def options_of(folder: Path, *methods: str, bits: tuple[float, ...] = (2.0,)) -> SweepOptions:
    text = str(folder / "text.txt")
    return SweepOptions(
        calibration=CalibrationOptions(
            text=TextOptions(text, samples=8, length=32, part="0:0.9"), stream=StreamOptions()
        ),
        evaluation=EvaluationOptions(text, part="0.95:1", window=32),
        methods=methods,
        bits=bits,
    )


def test_each_point_is_what_packing_and_scoring_give(folder: Path, tmp_path: Path) -> None:
    options = options_of(folder, "nearest", "qmoe", "rd", bits=(2.0, 2.5))
    told: list[str] = []
    result = sweep(folder / "model", options, tmp_path / "points.json", told=told.append)
    labels = [point.label for point in result.points]
    assert labels == ["nearest minmax", "nearest lsq", "qmoe", "rd 2", "rd 2.5"]
    assert told == ["original", *labels]
    assert result.original["loss"] == evaluate(folder / "model", options.evaluation).loss
    again = {"nearest lsq", "rd 2"}  # all of them would take long
    for point, settings in zip(result.points, options.points(), strict=True):
        if point.label not in again:
            continue
        summary = pack(folder / "model", tmp_path / point.label, settings)
        score = evaluate(tmp_path / point.label, options.evaluation)
        assert point.bits_per_weight == summary.bits_per_weight
        assert point.loss == pytest.approx(score.loss, rel=1e-5)
    assert result.points[3].bits_per_weight < result.points[4].bits_per_weight
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_the_first_look_for_lambda_serves_all_points(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qmoe_quantize.target import LambdaSearch

    looks: list[int] = []
    original = LambdaSearch.first_look

    def count(self: LambdaSearch) -> Any:
        looks.append(1)
        return original(self)

    monkeypatch.setattr(LambdaSearch, "first_look", count)
    chosen = options_of(folder, "rd", bits=(2.2, 2.6))
    together = sweep(folder / "model", chosen)
    assert len(looks) == 1
    alone = pack(folder / "model", tmp_path / "out", chosen.points()[1])
    (same,) = (point for point in together.of("rd") if point.label == "rd 2.6")
    assert same.bits_per_weight == alone.bits_per_weight


def test_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "points.json"
    first = sweep(folder / "model", options_of(folder, "nearest"), out)
    values = json.loads(out.read_text())
    values["points"][0]["loss"] = 123.0  # so that it is seen whether it was made again
    out.write_text(json.dumps(values))
    told: list[str] = []
    result = sweep(folder / "model", options_of(folder, "nearest"), out, told=told.append)
    assert told == []
    assert result.points == (replace(first.points[0], loss=123.0), first.points[1])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"window": 16}, "evaluation"),
        ({"part": "0.9:0.95"}, "evaluation"),
    ],
)
def test_does_not_go_on_with_another(folder: Path, tmp_path: Path, change: Any, field: str) -> None:
    out = tmp_path / "points.json"
    options = options_of(folder, "nearest")
    options = replace(
        options, calibration=replace(options.calibration, text=TextOptions(str(folder / "model")))
    )
    sweep(folder / "model", options, out)
    before = out.read_bytes()
    other = replace(options, evaluation=replace(options.evaluation, **change))
    with pytest.raises(OutputExistsError, match=field):
        sweep(folder / "model", other, out)
    assert out.read_bytes() == before
    sweep(folder / "model", other, out, force=True)
    assert out.read_bytes() != before


def test_leaves_other_files_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis.json"
    out.write_text('{"title": "Work"}')
    with pytest.raises(OutputExistsError, match="not the file of a sweep"):
        sweep(folder / "model", options_of(folder, "nearest"), out, force=True)
    assert out.read_text() == '{"title": "Work"}'


def test_what_is_scored_is_never_calibrated_on(folder: Path) -> None:
    options = options_of(folder, "rd")
    with pytest.raises(ArgumentError, match="calibrated on at once"):
        replace(options, evaluation=replace(options.evaluation, part="0.8:1"))


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, picture = str(folder / "text.txt"), tmp_path / "curve.png"
    arguments = ["sweep", str(folder / "model"), "--calib", text, "--text", text, "--methods", "nearest,rd"]
    arguments += ["--bits", "2.5,2", "--nsamples", "8", "--seqlen", "32", "--window", "32", "--out"]
    arguments += [str(tmp_path / "points.json"), "--plot", str(picture)]
    assert main(arguments) == 2
    assert "calibrated on at once" in capsys.readouterr().err
    assert main([*arguments, "--text-range", "0.95:1"]) == 0
    assert "rd 2.5" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--text-range", "0.95:1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["points"]) == 4
    with pytest.raises(SystemExit):
        main([*arguments, "--bits", "1,-1"])
    with pytest.raises(SystemExit):
        main([*arguments, "--bits", "one"])
    assert main([*arguments, "--methods", "rd,gptq"]) == 2
    assert "expected nearest or qmoe or rd" in capsys.readouterr().err.splitlines()[-1]


def point_of(recipe: str, bits: float, loss: float) -> Point:
    return Point(recipe, recipe, {}, bits, 0.9, loss, loss, 0.0, 0.0)


def test_what_is_read_off_a_curve() -> None:
    curve = [point_of("rd", 1.0, 2.0), point_of("rd", 0.5, 4.0), point_of("rd", 2.0, 1.5)]
    assert loss_at(curve, 0.75) == pytest.approx(3.0)
    assert loss_at(curve, 2.0) == pytest.approx(1.5)
    assert loss_at(curve, 0.4) is None and loss_at(curve, 2.1) is None
    assert bits_at(curve, 3.0) == pytest.approx(0.75)
    assert bits_at(curve, 1.75) == pytest.approx(1.5)
    assert bits_at(curve, 4.0) is None and bits_at(curve, 1.4) is None
    assert loss_at([], 1.0) is None and bits_at([], 1.0) is None
    qmoe = point_of("qmoe", 1.5, 3.0)
    result = Sweep({}, {}, {"loss": 1.0}, (*curve, qmoe))
    assert compare(result)["bits_ratio"] == pytest.approx(0.75 / 1.5)
    assert compare(result)["increase_ratio"] == pytest.approx((1.75 - 1) / (3 - 1))
    assert compare(replace(result, points=(qmoe,))) == {"bits_ratio": None, "increase_ratio": None}
