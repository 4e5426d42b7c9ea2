"""`qmoe eval`: what it scores, against sums done by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from qmoe_codec.errors import ArgumentError, CheckpointError
from qmoe_quantize import PackOptions, pack
from qmoe_quantize.evaluation import EvaluationOptions, evaluate, load_model
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from qmoe_format.cli import main
from qmoe_format.unpack import unpack

TEXT = bytes(range(32, 127)) * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level model, as it is, packed and unpacked, and a text."""
    folder = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(folder / "model")
    pack(folder / "model", folder / "packed", PackOptions())
    unpack(folder / "packed", folder / "unpacked")
    (folder / "text.txt").write_bytes(TEXT)
    return folder


def by_hand(model: Path, windows: list[bytes], scored_from: list[int]) -> tuple[float, int]:
    loaded, total, count = load_model(model), 0.0, 0
    for window, first in zip(windows, scored_from, strict=True):
        tokens = torch.tensor([list(window)])
        with torch.inference_mode():
            logs = loaded(input_ids=tokens).logits[0].double().log_softmax(-1)
        for place in range(first, len(window)):
            total -= float(logs[place - 1, window[place]])
            count += 1
    return total / count, count


@pytest.mark.parametrize("name", ["model", "packed", "unpacked"])
@pytest.mark.parametrize(
    ("window", "stride", "length"),
    [(16, None, 80), (16, None, 85), (16, 5, 50), (16, 16, 33), (64, None, 40)],
)
def test_scores_are_those_done_by_hand(
    folder: Path, name: str, window: int, stride: int | None, length: int
) -> None:
    text = folder / f"{length}.txt"
    text.write_bytes(TEXT[:length])
    windows, scored, seen = [], [], 0
    for start in range(0, length, stride or window):
        piece = TEXT[:length][start : start + window]
        first = max(1, seen - start)
        if first < len(piece):
            windows.append(piece)
            scored.append(first)
            seen = start + len(piece)
    loss, count = by_hand(folder / name, windows, scored)
    result = evaluate(folder / name, EvaluationOptions(str(text), window=window, stride=stride))
    assert result.tokens == count
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_packed_and_unpacked_agree_and_differ_from_the_original(folder: Path) -> None:
    losses = {
        name: evaluate(folder / name, EvaluationOptions(str(folder / "text.txt"))).loss
        for name in ("model", "packed", "unpacked")
    }
    assert losses["packed"] == pytest.approx(losses["unpacked"], rel=1e-4)
    assert abs(losses["packed"] - losses["model"]) > 1e-6


def test_only_the_part_counts(folder: Path) -> None:
    changed = folder / "changed.txt"
    changed.write_bytes(b"#" * (len(TEXT) // 2) + TEXT[len(TEXT) // 2 :])
    results = [
        evaluate(folder / "model", EvaluationOptions(str(file), part="1/2:1", window=10))
        for file in (folder / "text.txt", changed)
    ]
    assert results[0].loss == results[1].loss
    assert results[0].tokens == 19 * 9


def test_an_encoder_decoder_goes_on_with_the_first_half(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=256, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=2, num_heads=2,
        num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_bytes(TEXT[:70])
    total = 0.0
    for start in (0, 20, 40):
        window = torch.tensor([list(TEXT[start : start + 20])])
        with torch.inference_mode():
            logs = (
                model(
                    input_ids=window[:, :10],
                    decoder_input_ids=torch.cat((torch.zeros(1, 1, dtype=torch.long), window[:, 10:-1]), 1),
                )
                .logits[0]
                .log_softmax(-1)
            )
        total -= float(logs[torch.arange(10), window[0, 10:]].sum())
    result = evaluate(tmp_path / "model", EvaluationOptions(str(tmp_path / "text.txt"), window=20))
    assert result.tokens == 30 and result.windows == 3
    assert result.loss == pytest.approx(total / 30, rel=1e-5)
    with pytest.raises(ArgumentError, match="overlap"):
        evaluate(tmp_path / "model", EvaluationOptions(str(tmp_path / "text.txt"), window=20, stride=10))


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(folder / "packed"), "--text", str(folder / "text.txt"), "--windows", "3"]
    assert main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["windows"] == 3 and values["tokens"] == 3 * 63
    assert main(arguments) == 0
    assert f"{values['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{model}", "--text", "{folder}/none.txt"], "not found"),
        (["{folder}", "--text", "{text}"], "not found"),
        (["{model}", "--text", "{folder}/empty.txt"], "shorter than one window"),
        (["{model}", "--text", "{text}", "--text-range", "1:0"], "expected START:STOP"),
        (["{model}", "--text", "{text}", "--window", "8", "--stride", "9"], "at most the window"),
    ],
)
def test_what_it_refuses(
    folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty.txt").write_bytes(b"")
    names = {"folder": folder, "model": folder / "model", "text": folder / "text.txt"}
    assert main(["eval", *(argument.format(**names) for argument in arguments)]) != 0
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_loss_that_is_not_a_number(folder: Path) -> None:
    model = load_model(folder / "model")
    model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(CheckpointError, match="not a number"):
        evaluate(folder / "model", EvaluationOptions(str(folder / "text.txt")), model=model)
