"""Arguments about calibration, which ``qmoe-pack`` and ``qmoe-calibrate`` share."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmoe_codec.errors import ArgumentError

from ..files import os_errors, parse_json
from .common import count

if TYPE_CHECKING:
    from qmoe_quantize import CalibrationOptions
    from qmoe_quantize.recipes import RecipeSettings


def number(text: str) -> float:
    """A number, for argparse."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}, expected a number") from None


def seed(text: str) -> int:
    """An integer from 0 to 2^20, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) > 1 << 20:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}, expected 0 to {1 << 20}")
    return int(text)


def add_calibration_arguments(parser: argparse.ArgumentParser, *, stores: bool) -> None:
    """Add what says which text is used, and how."""
    what = "calibration text: a .txt or .jsonl file, a folder of them, or hf:NAME of a data set on the hub"
    if stores:
        what += "; or a file .h5 of qmoe-calibrate"
    add = parser.add_argument_group("calibration").add_argument
    add("--calib", metavar="TEXT", help=what)
    add(
        "--calib-range",
        default="0:0.95",
        metavar="START:STOP",
        help="part of the text that may be used, in shares; the rest is held out (default: %(default)s)",
    )
    add("--nsamples", type=count, default=128, metavar="N", help="windows of text (default: %(default)s)")
    add(
        "--seqlen",
        type=count,
        metavar="N",
        help="tokens of a window; an encoder-decoder reads the first half and goes on with the second "
        "(default: 2048, or the model's positions)",
    )
    add("--seed", type=seed, default=0, help="decides which windows and tokens are drawn (default: 0)")
    add(
        "--experts-per-batch",
        type=count,
        default=16,
        metavar="N",
        help="experts in memory at once (default: %(default)s)",
    )
    add(
        "--max-tokens-per-expert",
        type=count,
        metavar="N",
        help="calibrate an expert on so many of its tokens at most, drawn at random (default: all)",
    )
    add("--batch-size", type=count, metavar="N", help="windows at once (default: 4096 tokens)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: %(default)s)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what the layers compute in (default: %(default)s)",
    )


def calibration_options(options: argparse.Namespace) -> CalibrationOptions | None:
    """What the arguments say, or None without ``--calib``."""
    from qmoe_quantize import CalibrationOptions, HessianOptions, StreamOptions, TextOptions

    if options.calib is None:
        return None
    is_store = options.calib.endswith((".h5", ".hdf5"))
    text = TextOptions(
        options.calib, options.nsamples, options.seqlen, part=options.calib_range, seed=options.seed
    )
    return CalibrationOptions(
        text=None if is_store else text,
        store=options.calib if is_store else None,
        stream=StreamOptions(options.device, options.dtype, options.batch_size),
        hessian=HessianOptions(options.experts_per_batch, options.max_tokens_per_expert, seed=options.seed),
    )


def recipe_settings(options: argparse.Namespace) -> RecipeSettings:
    """The recipe that the arguments of ``qmoe-pack`` describe."""
    from qmoe_quantize.recipes import RecipeSettings

    given = {name: getattr(options, name) for name in ("lam", "damp") if getattr(options, name) is not None}
    rules = tuple(rule for text in options.rules or () for rule in _rules(text))
    return RecipeSettings(**given, rules=rules)


def _rules(text: str) -> list[tuple[str, dict[str, Any]]]:
    """``REGEX:NAME=VALUE,…``, or a JSON file of ``[[REGEX, {NAME: VALUE, …}], …]``."""
    if Path(text).suffix == ".json":
        return _rules_of_file(Path(text))
    pattern, colon, changes = text.rpartition(":")
    values: dict[str, Any] = {}
    for change in changes.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\S+)\s*", change)
        if not colon or not match:
            raise ArgumentError(
                "illegal", field="--rules", value=text, expected="REGEX:NAME=VALUE,… or a file .json"
            )
        values[match[1]] = _value(match[2], text)
    return [(pattern, values)]


def _value(text: str, rule: str) -> float | int:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ArgumentError("not a number", field="--rules", value=rule, expected="NAME=NUMBER") from None


def _rules_of_file(file: Path) -> list[tuple[str, dict[str, Any]]]:
    with os_errors(file):
        data = file.read_bytes()
    entries = parse_json(data, file)
    rules = []
    for entry in entries if isinstance(entries, list) else [None]:
        match entry:
            case [str(pattern), dict(changes)]:
                rules.append((pattern, changes))
            case _:
                raise ArgumentError(
                    "illegal",
                    file=file,
                    field="--rules",
                    value=json.dumps(entry)[:60],
                    expected="[[REGEX, {NAME: VALUE, …}], …]",
                )
    return rules
