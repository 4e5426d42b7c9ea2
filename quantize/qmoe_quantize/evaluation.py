"""How well a model predicts a text: loss, perplexity, bits per byte; original, unpacked and packed alike."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qmoe_codec.errors import ArgumentError, CheckpointError, MissingPackageError, QMoEError

from qmoe_format.container import CONFIG
from qmoe_format.files import os_errors, read_json_object

from .config import ModelConfig
from .text import encoder_of, take_part

BATCH_TOKENS = 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Progress = Callable[[int, int], None]
"""Told how many windows are done, and how many there are."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured.

    Attributes
    ----------
    text : str
        A file of plain text.
    part : str
        ``START:STOP``, shares of its bytes: the part that is used.
    window : int, optional
        Tokens that the model sees at once; by default 2048, or as many as it has positions for.
    stride : int, optional
        Tokens from one window to the next; by default `window`. What the window before has seen is only
        context, so a shorter stride gives each token more of it.
    windows : int, optional
        How many windows at most.
    device : str
    dtype : {"float32", "bfloat16", "float16"}
        What the model computes in.
    """

    text: str
    part: str = "0:1"
    window: int | None = None
    stride: int | None = None
    windows: int | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("stride", 1), ("windows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ArgumentError("illegal", field=name, value=value, expected=f"at least {least}")
        if self.dtype not in DTYPES:
            raise ArgumentError(
                "unknown", field="dtype", value=self.dtype, expected=" or ".join(sorted(DTYPES))
            )


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes
    ----------
    loss : float
        Mean negative log likelihood of a scored token, in nats.
    tokens : int
        Tokens scored.
    windows : int
        Windows that they lie in.
    bytes_per_token : float
        Of the whole text; what `bits_per_byte` is converted by.
    seconds : float
        In the model.
    """

    loss: float
    tokens: int
    windows: int
    bytes_per_token: float
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of the text."""
        return self.loss / math.log(2) / self.bytes_per_token

    def to_json(self) -> dict[str, object]:
        """All of it."""
        return {**asdict(self), "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


def load_model(path: str | os.PathLike[str], dtype: str = "float32", device: str = "cpu") -> Any:
    """Load a checkpoint, packed or not, for evaluation.

    Raises
    ------
    CheckpointError
        There is none, or transformers cannot load it.
    MissingPackageError
        transformers is not installed.
    """
    try:
        import transformers

        from qmoe_format.transformers import load
    except ModuleNotFoundError:
        raise MissingPackageError(
            "transformers is not installed: pip install 'qmoe-format[transformers]'"
        ) from None
    config = _config(path).values
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "qmoe":
        return load(path, device=device, dtype=DTYPES[dtype])
    auto: Any = (
        transformers.AutoModelForSeq2SeqLM
        if config.get("is_encoder_decoder")
        else transformers.AutoModelForCausalLM
    )
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: Any = auto.from_pretrained(os.fspath(path), dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot load it: {reason}", file=path) from error
    return model.to(device).eval()


def _config(path: str | os.PathLike[str]) -> ModelConfig:
    file = Path(path) / CONFIG
    if not file.is_file():
        raise CheckpointError("not found", file=file, expected="a checkpoint, packed or not")
    return ModelConfig(file, read_json_object(file))


def evaluate(
    path: str | os.PathLike[str],
    options: EvaluationOptions,
    *,
    model: Any = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how well a model predicts a text.

    A decoder predicts every token of a window but the first. An encoder-decoder reads the first half of each
    window in its encoder, and its decoder predicts the second half, as calibration runs it.

    Parameters
    ----------
    path : path
        A checkpoint, packed or not, with its tokenizer; a vocabulary of 256 without one means bytes.
    options : EvaluationOptions
    model : PreTrainedModel, optional
        The loaded model; by default it is loaded.
    progress : callable, optional

    Raises
    ------
    CheckpointError
        No text, less than two tokens of it, no tokenizer; or the model's loss is not a number.
    ArgumentError
        An encoder-decoder with a stride, or a window beyond the model's positions.
    """
    config = _config(path)
    if not Path(options.text).is_file():
        raise CheckpointError("not found", file=options.text, expected="a file of text")
    with os_errors(options.text):
        text = take_part(Path(options.text).read_bytes(), options.part)
    tokens, _ = encoder_of(config)(text, None)
    seq2seq = config.truth("is_encoder_decoder", config.text("model_type") == "switch_transformers")
    window = options.window or min(2048, config.number("max_position_embeddings", 512))
    starts = _starts(len(tokens), window, options, seq2seq)
    if not starts:
        raise CheckpointError(
            "the text is shorter than one window",
            file=options.text,
            value=f"{len(tokens)} tokens",
            expected="at least two" if not seq2seq else f"at least {window}",
        )
    if model is None:
        model = load_model(path, options.dtype, options.device)
    score = _score_seq2seq if seq2seq else _score
    total, scored, seconds = 0.0, 0, 0.0
    batch = max(1, BATCH_TOKENS // window)
    stride = options.stride or window
    for first in range(0, len(starts), batch):
        chosen = starts[first : first + batch]
        rows = [tokens[start : start + window] for start in chosen]
        # Only the last window may be short, and it then comes by itself.
        groups = [rows] if len(rows[-1]) == len(rows[0]) else [rows[:-1], rows[-1:]]
        for offset, group in zip((0, len(rows) - 1), groups, strict=False):
            if not group:
                continue
            # What an earlier window has scored is context only.
            known = [0 if start == starts[0] else window - stride for start in chosen[offset:][: len(group)]]
            begin = time.perf_counter()
            losses = score(model, torch.from_numpy(np.stack(group)).to(options.device), config)
            seconds += time.perf_counter() - begin
            for row, skip in zip(losses, known, strict=True):
                total += float(row[max(0, skip - 1) :].double().sum())
                scored += len(row) - max(0, skip - 1)
        if not math.isfinite(total):
            raise CheckpointError(
                "the model's loss is not a number",
                file=path,
                field=f"window at token {chosen[0]}",
                value=total,
            )
        if progress:
            progress(min(first + batch, len(starts)), len(starts))
    return Evaluation(total / scored, scored, len(starts), len(text) / len(tokens), seconds)


def _starts(count: int, window: int, options: EvaluationOptions, seq2seq: bool) -> list[int]:
    """First tokens of the windows."""
    stride = options.stride or window
    if stride > window:
        raise ArgumentError("illegal", field="stride", value=stride, expected=f"at most the window, {window}")
    if seq2seq and options.stride is not None and stride != window:
        raise ArgumentError(
            "an encoder-decoder scores halves of windows, which cannot overlap", field="stride", value=stride
        )
    if seq2seq:
        starts = list(range(0, count - window + 1, window))
    else:
        # A window must hold a token to be scored: neither its first, nor one of the window before.
        overlap = max(1, window - stride)
        starts = [s for s in range(0, count, stride) if count - s > (overlap if s else 1)]
    return starts[: options.windows]


@torch.inference_mode()
def _score(model: Any, tokens: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Nats of each token after the first: [windows, length - 1]."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return _cross_entropy(logits, tokens[:, 1:])


@torch.inference_mode()
def _score_seq2seq(model: Any, tokens: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Nats of each token of the second half, given the first: [windows, length - length // 2]."""
    half = tokens.shape[1] // 2
    read, wanted = tokens[:, :half], tokens[:, half:]
    start = config.number("decoder_start_token_id", config.number("pad_token_id", 0))
    behind = wanted.roll(1, dims=1)
    behind[:, 0] = start
    logits = model(input_ids=read, decoder_input_ids=behind, use_cache=False).logits.float()
    return _cross_entropy(logits, wanted)


def _cross_entropy(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    if int(wanted.max()) >= logits.shape[-1]:
        raise QMoEError(
            "the tokenizer gives a token that the model does not have",
            field="token",
            value=int(wanted.max()),
            expected=f"below {logits.shape[-1]}",
        )
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
    return losses.cpu()
