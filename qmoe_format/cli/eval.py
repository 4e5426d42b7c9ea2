"""``qmoe eval``."""

from __future__ import annotations

import argparse

from .common import Command, ProgressBar, add_output_arguments, count, print_json


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how a text is scored; ``qmoe sweep`` takes the same."""
    parser.add_argument(
        "--text-range",
        default="0:1",
        metavar="START:STOP",
        help="part of the text to score, as shares of it (default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        type=count,
        metavar="N",
        help="tokens that the model sees at once (default: 2048, or its positions)",
    )
    parser.add_argument("--windows", type=count, metavar="N", help="score so many windows at most")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="what it computes in (default: %(default)s)",
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, packed or not")
    parser.add_argument("--text", required=True, metavar="FILE", help="text to predict")
    parser.add_argument(
        "--stride",
        type=count,
        metavar="N",
        help="tokens from one window to the next (default: the window, so that none is seen twice)",
    )
    add_evaluation_arguments(parser)
    add_output_arguments(parser)


def _run(options: argparse.Namespace) -> None:
    from qmoe_quantize.evaluation import EvaluationOptions, evaluate

    settings = EvaluationOptions(
        text=options.text,
        part=options.text_range,
        window=options.window,
        stride=options.stride,
        windows=options.windows,
        device=options.device,
        dtype=options.dtype,
    )
    with ProgressBar("evaluating", unit="window", quiet=options.quiet) as progress:
        result = evaluate(options.model, settings, progress=progress)
    if options.json:
        print_json(result.to_json())
    else:
        print(
            f"{options.model}: {result.bits_per_byte:.4f} bits per byte, perplexity {result.perplexity:.3f}, "
            f"loss {result.loss:.4f} nats per token\n"
            f"{result.tokens:,} tokens in {result.windows:,} windows, "
            f"{result.tokens / max(result.seconds, 1e-9):,.0f} tokens/s"
        )


COMMAND = Command("eval", "Measure how well a model predicts a text, packed or not.", _add_arguments, _run)
