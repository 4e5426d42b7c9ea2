"""Train a small Mixture-of-Experts model, pack it below one bit per weight, load it back and use it.

    make demo                              trains a byte-level OLMoE on Python's standard library
    make demo MODEL=path/to/checkpoint     the same with a checkpoint of your own

Runs the real commands, compares every weight, and measures what the compression costs.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from demo_model import (
    WINDOW,
    Decode,
    Encode,
    Settings,
    generation_rate,
    sample,
    split,
    standard_library_text,
    train,
)
from qmoe_codec.errors import QMoEError
from qmoe_quantize.evaluation import EvaluationOptions, evaluate
from safetensors import safe_open

import qmoe_format
from qmoe_format.cli.sweep_plot import Mark, draw
from qmoe_format.transformers import load

MARKER = ".qmoe-demo"
PROMPT = b"def read(self, size=-1):\n"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Packed and unpacked model compute the same sums in another order; bits per byte
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
RD_SHARE = 0.8  # of the bits that minmax takes
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass
class Clock:
    """Seconds of each step, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


@dataclass(frozen=True)
class Row:
    """One line of the closing table."""

    name: str
    total_bytes: int
    expert_bytes: int
    expert_weights: int
    bits_per_byte: float
    load_seconds: float
    generated_per_second: float  # tokens, one after the other
    evaluated_per_second: float  # tokens, in batches

    @property
    def bits(self) -> float:
        """Bits per expert weight, everything counted."""
        return 8 * self.expert_bytes / self.expert_weights


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="a checkpoint directory to use instead of training one")
    add("--out", type=Path, default=Path("build/demo"), help="where to work (%(default)s)")
    add("--steps", type=int, default=Settings.steps, help="training steps (%(default)s)")
    add("--windows", type=int, default=768, help="held-out windows of 128 tokens (%(default)s)")
    dtypes = ("float32", "bfloat16")
    add(
        "--dtype",
        choices=dtypes,
        default="float32",
        help="what the models compute in, the original in both (%(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        run(
            options.out,
            replace(Settings(), steps=options.steps),
            model=options.model,
            windows=options.windows,
            dtype=getattr(torch, options.dtype),
        )
    except QMoEError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        print(f"demo: {shlex.join(error.cmd[-4:])} ended with {error.returncode}", file=sys.stderr)
        return error.returncode
    except KeyboardInterrupt:
        return 130
    return 0


def run(
    out: Path,
    settings: Settings,
    *,
    model: Path | None = None,
    windows: int = 768,
    calibration_windows: int = 512,
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """The whole demo; returns the rows of its table."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    clock = Clock()
    claim(out)
    text, held_out = split(standard_library_text())
    training, scored = out / "training.txt", out / "held-out.txt"
    training.write_bytes(text)
    scored.write_bytes(held_out)

    if model is None:
        headline(f"Train a model on {len(text):,} bytes of Python's standard library")
        model = out / "checkpoint"
        with clock.step("train"):
            trained = train(settings, text)
            trained.bfloat16().save_pretrained(model)
        del trained
    require((model / "config.json").is_file(), f"{model}: no config.json, so no checkpoint")
    encode, decode = tokenizer_of(model)

    headline("Pack it, and look at it")
    packed, unpacked = out / "packed-minmax", out / "unpacked-minmax"
    command(clock, "dry run", "qmoe-pack", model, packed, "--dry-run")
    command(clock, "pack", "qmoe-pack", model, packed, "--levels", "minmax", "--force")
    command(clock, "verify", "qmoe-verify", packed)
    command(clock, "inspect", "qmoe-inspect", packed, "--plot", out / "inspect.png")
    command(clock, "unpack", "qmoe-unpack", packed, unpacked, "--force")
    with clock.step("compare"):
        compare(model, packed, unpacked)

    headline("The same with least-squares levels: more bits, less loss")
    packed_lsq = out / "packed-lsq"
    command(clock, "pack lsq", "qmoe-pack", model, packed_lsq, "--levels", "lsq", "--force")

    headline("Calibrated on text, trading squared error against bits: fewer bits, and far less loss")
    packed_rd = out / "packed-rd"
    _, packed_bytes, weights = sizes(packed, packed)
    calibration = ("--calib", training, "--calib-range", "0:1", "--nsamples", str(calibration_windows))
    wanted = f"{RD_SHARE * 8 * packed_bytes / weights:.2f}"
    command(
        clock, "pack rd", "qmoe-pack", model, packed_rd, *calibration, "--seqlen", str(WINDOW),
        "--target-bpw", wanted, "--force",
    )  # fmt: skip

    headline("Load and run")
    rows, samples = [], {}
    auto = transformers.AutoModelForCausalLM
    both = sorted(DTYPES, key=lambda known: known != dtype)  # the one that the others compute in comes first
    models: list[tuple[str, Path, Callable[..., Any], torch.dtype]] = [
        *((f"original {DTYPES[known]}", model, auto.from_pretrained, known) for known in both),
        ("unpacked minmax", unpacked, auto.from_pretrained, dtype),
        ("packed minmax", packed, load, dtype),
        ("packed lsq", packed_lsq, load, dtype),
        ("packed rd", packed_rd, load, dtype),
    ]
    for name, path, loader, compute in models:
        start = time.perf_counter()
        loaded = loader(path, dtype=compute)
        load_seconds = time.perf_counter() - start
        with clock.step(f"evaluate {name}"):
            score = evaluate(
                path, EvaluationOptions(str(scored), window=WINDOW, windows=windows), model=loaded
            )
        with clock.step(f"generate {name}"):
            samples[name] = sample(loaded, PROMPT, encode, decode, tokens=80)
            speed = generation_rate(loaded, PROMPT, encode, tokens=64)
        evaluation_rate = score.tokens / score.seconds
        rows.append(
            Row(name, *sizes(path, packed), score.bits_per_byte, load_seconds, speed, evaluation_rate)
        )
        print(
            f"{name}: {score.bits_per_byte:.4f} bits per held-out byte, {speed:.0f} tokens/s generated",
            flush=True,
        )
    by_name = {row.name: row for row in rows}
    difference = abs(by_name["unpacked minmax"].bits_per_byte - by_name["packed minmax"].bits_per_byte)
    require(
        difference <= LOSS_TOLERANCE[dtype], f"packed and unpacked model differ by {difference} bits per byte"
    )

    headline("What each goes on with")
    for name, continuation in samples.items():
        print(f"--- {name}\n{continuation.rstrip()}")
    marks = [
        Mark("rd" if row.name == "packed rd" else "nearest", row.name, row.bits, row.bits_per_byte)
        for row in rows
        if row.name.startswith("packed")
    ]
    draw(marks, rows[0].bits_per_byte, "What fewer bits cost", str(out / "rate-loss.png"))

    headline("In short")
    print(table(rows))
    print()
    print("seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in clock.seconds.items()))
    print(f"pictures: {out / 'inspect.png'}, {out / 'rate-loss.png'}")
    print(f"tokens per second: on {torch.get_num_threads()} threads each; packed experts compute in float32")
    print(
        "minmax and lsq round weights to the nearest of three levels without looking at any data: minmax\n"
        "takes fewer bits and loses most, lsq takes more and loses less. rd looks at the text that the\n"
        "model was trained on and spends bits where they save error: it takes fewest."
    )
    return rows


def headline(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def claim(out: Path) -> None:
    """Make the demo's folder, or take it again; never one that holds something else."""
    if out.exists() and not (out / MARKER).exists() and (not out.is_dir() or any(out.iterdir())):
        raise QMoEError("exists and was not made by this demo: choose another with --out", file=out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def command(clock: Clock, step: str, name: str, *arguments: str | Path) -> None:
    """Run one of the installed commands as a user would."""
    words = [name, *map(str, arguments)]
    print(f"\n$ {shlex.join(words)}", flush=True)
    script = shutil.which(name, path=sysconfig.get_path("scripts"))
    # In a checkout that is not installed there is no script
    start = [script] if script else [sys.executable, "-m", "qmoe_format.cli", name.removeprefix("qmoe-")]
    with clock.step(step):
        subprocess.run([*start, *words[1:]], check=True)


def tokenizer_of(model: Path) -> tuple[Encode, Decode]:
    """The checkpoint's tokenizer; a model of 256 tokens without one reads and writes bytes."""
    config = transformers.AutoConfig.from_pretrained(model)
    if config.is_encoder_decoder:
        raise QMoEError(
            "the demo measures models that continue a text; qmoe-pack itself can pack this one", file=model,
            field="is_encoder_decoder", value=True,
        )  # fmt: skip
    if any((model / name).exists() for name in TOKENIZER_FILES):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        return (
            lambda text: tokenizer(text.decode(errors="replace"), add_special_tokens=False)["input_ids"],
            lambda tokens: str(tokenizer.decode(tokens)),
        )
    if config.vocab_size != 256:
        raise QMoEError(
            "has no tokenizer",
            file=model,
            field="vocab_size",
            value=config.vocab_size,
            expected="256, for bytes",
        )
    return list, lambda tokens: bytes(tokens).decode(errors="replace")


def compare(model: Path, packed: Path, unpacked: Path) -> None:
    """Check that every ternary weight is the same packed and unpacked, and every other one as before."""
    matrices = weights = 0
    with qmoe_format.open(packed) as opened:
        tensors, originals = tensor_files(unpacked), tensor_files(model)
        experts = set()
        for layer in opened.layers.values():
            for expert in range(layer.experts):
                for projection in layer.projections:
                    name = projection.tensor_name(expert)
                    matrix = opened.layer(layer.prefix).matrix(expert, projection.name)
                    trits, levels = matrix.decode(), matrix.levels
                    tensor = read_tensor(tensors[name], name).float().numpy()
                    expected = np.where(trits > 0, levels[:, 1:], np.where(trits < 0, levels[:, :1], 0))
                    require(np.array_equal(np.sign(tensor), trits), f"{name}: ternary weights differ")
                    require(np.array_equal(tensor, expected), f"{name}: levels differ")
                    experts.add(name)
                    matrices += 1
                    weights += trits.size
        require(tensors.keys() == originals.keys(), "unpacked and original model have different tensors")
        for name in tensors.keys() - experts:
            same = torch.equal(read_tensor(tensors[name], name), read_tensor(originals[name], name))
            require(same, f"{name}: dense tensor differs")
    dense = len(tensors) - matrices
    print(
        f"\nidentical: {weights:,} ternary weights of {matrices} matrices, packed and unpacked; "
        f"and {dense} other tensors, before and after"
    )


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file of an ordinary checkpoint."""
    files = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            files.update(dict.fromkeys(opened.keys(), file))
    return files


def read_tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
        return tensor


def require(condition: bool, message: str) -> None:
    if not condition:
        raise QMoEError(message)


def sizes(path: Path, packed: Path) -> tuple[int, int, int]:
    """Bytes of all tensor files, bytes of the experts, and number of expert weights."""
    with qmoe_format.open(packed) as opened:
        layers = list(opened.layers.values())
    weights = sum(layer.experts * p.rows * p.columns for layer in layers for p in layer.projections)
    files = tensor_files(path)
    prefixes = tuple(f"{layer.prefix}." for layer in layers)
    experts = sum(read_tensor(files[name], name).nbytes for name in files if name.startswith(prefixes))
    return sum(file.stat().st_size for file in set(files.values())), experts, weights


def table(rows: Sequence[Row]) -> str:
    """The closing table as text."""
    cells = [
        [
            "",
            "size MB",
            "experts MB",
            "ratio",
            "bits/weight",
            "bits/byte",
            "load s",
            "generate tok/s",
            "evaluate tok/s",
        ]
    ]
    for row in rows:
        cells.append(
            [
                row.name,
                f"{row.total_bytes / 1e6:.2f}",
                f"{row.expert_bytes / 1e6:.2f}",
                f"{rows[0].expert_bytes / row.expert_bytes:.1f}x",
                f"{row.bits:.3f}",
                f"{row.bits_per_byte:.4f}",
                f"{row.load_seconds:.2f}",
                f"{row.generated_per_second:.0f}",
                f"{row.evaluated_per_second:.0f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *numbers in cells:
        right = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
