"""The rate-loss curve of the recipes for one model: pack with each setting, score what came out, keep it all.

Every point goes through :func:`.pipeline.pack`, so the bits are those of the files on the disk, with headers,
levels, index, dictionaries and padding.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from qmoe_codec.errors import ArgumentError, OutputExistsError

from qmoe_format.files import os_errors, read_json_object, write_file

from .allocation import RateCurve
from .checkpoint import SourceCheckpoint, locate
from .evaluation import EvaluationOptions, evaluate
from .fingerprint import model_digest
from .options import CalibrationOptions
from .pipeline import METHODS, PackOptions, pack, rate_curves
from .recipes import CALIBRATED_METHODS, RecipeSettings
from .text import parse_part, read_windows, take_part

DEFAULT_BITS = (0.7, 0.85, 1.0, 1.2)
VERSION = 1

Told = Callable[[str], None]
"""Told what is being done now."""


@dataclass(frozen=True)
class SweepOptions:
    """Which points a curve has, and how each is made.

    Attributes
    ----------
    methods : tuple of str
        ``nearest`` (two points: both rules for levels), ``qmoe`` (one point: the paper's recipe has no rate
        to choose) and ``rd`` (one point for each of `bits`).
    bits : tuple of float
        Bits per expert weight, everything counted.
    calibration : CalibrationOptions
        With text.
    evaluation : EvaluationOptions
    recipe : RecipeSettings
        Of ``rd``; ``qmoe`` is the paper's own.

    Raises
    ------
    ArgumentError
        A method is unknown, bits are not positive, or the text that is scored is calibration text.
    """

    calibration: CalibrationOptions
    evaluation: EvaluationOptions
    methods: tuple[str, ...] = METHODS
    bits: tuple[float, ...] = DEFAULT_BITS
    recipe: RecipeSettings = field(default_factory=RecipeSettings)

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ArgumentError("unknown", field="methods", value=method, expected=" or ".join(METHODS))
        if not all(bits > 0 for bits in self.bits):
            raise ArgumentError("illegal", field="bits", value=min(self.bits), expected="more than 0")
        if not self.methods or ("rd" in self.methods and not self.bits):
            raise ArgumentError(
                "missing", field="bits" if self.methods else "methods", expected="at least one"
            )
        if self.calibration.text is None:
            raise ArgumentError("missing", field="calib", expected="text: a store is of the model as it is")
        _keep_apart(self)

    def points(self) -> list[PackOptions]:
        """How to pack each point."""
        chosen = []
        for method in self.methods:
            if method == "nearest":
                chosen += [PackOptions(method=method, levels=levels) for levels in ("minmax", "lsq")]
            elif method == "qmoe":
                paper = RecipeSettings(method=method)
                chosen.append(PackOptions(method=method, calibration=self.calibration, recipe=paper))
            else:
                chosen += [
                    PackOptions(
                        method=method, calibration=self.calibration, recipe=self.recipe, target_bits=bits
                    )
                    for bits in self.bits
                ]
        return chosen


def _keep_apart(options: SweepOptions) -> None:
    """Refuse to score text that is calibrated on."""
    assert options.calibration.text is not None
    files = Path(options.calibration.text.source), Path(options.evaluation.text)
    if not all(file.is_file() for file in files) or not os.path.samefile(*files):
        return
    (start, stop), (first, last) = (
        parse_part(text.part) for text in (options.calibration.text, options.evaluation)
    )
    if max(start, first) < min(stop, last):
        raise ArgumentError(
            "is scored and calibrated on at once",
            file=options.evaluation.text,
            field="text range",
            value=options.evaluation.part,
            expected=f"a part outside of {options.calibration.text.part}",
        )


@dataclass(frozen=True)
class Point:
    """One packed model.

    Attributes
    ----------
    recipe : str
        The method.
    label : str
        The method and what else tells it from its neighbours.
    settings : dict
        All that decides what comes out, beside model and texts.
    bits_per_weight : float
        Bits on the disk for an expert weight, everything counted.
    sparsity : float
        Share of the expert weights that are 0.
    loss, bits_per_byte : float
        See :class:`.evaluation.Evaluation`.
    pack_seconds, evaluation_seconds : float
    """

    recipe: str
    label: str
    settings: Mapping[str, object]
    bits_per_weight: float
    sparsity: float
    loss: float
    bits_per_byte: float
    pack_seconds: float
    evaluation_seconds: float


@dataclass(frozen=True)
class Sweep:
    """A model's curve.

    Attributes
    ----------
    inputs : dict
        Model and texts, with hashes, and how they are used: the same for all points.
    environment : dict
        Machine and versions.
    original : dict
        What the model scores before it is packed, see :class:`.evaluation.Evaluation`.
    points : tuple of Point
    """

    inputs: Mapping[str, object]
    environment: Mapping[str, object]
    original: Mapping[str, object]
    points: tuple[Point, ...] = ()

    def of(self, recipe: str) -> list[Point]:
        """The points of a recipe by rising bits."""
        return sorted(
            (point for point in self.points if point.recipe == recipe), key=lambda p: p.bits_per_weight
        )

    def to_json(self) -> dict[str, object]:
        """All of it."""
        return {"sweep": VERSION, **asdict(self)}


def sweep(
    source: str | os.PathLike[str],
    options: SweepOptions,
    out: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    told: Told | None = None,
) -> Sweep:
    """Pack a model with every setting, and score each.

    Parameters
    ----------
    source : str or Path
        As for :func:`.pipeline.pack`.
    options : SweepOptions
    out : str or Path, optional
        A JSON file, written after every point. Points that it has already are kept.
    force : bool
        Replace a file that belongs to another model, text or way of scoring.
    told : callable, optional

    Raises
    ------
    OutputExistsError
        `out` is another file, or that of another sweep; the message says what differs.
    QMoEError
        As packing and evaluating raise it. Points that are done are in `out` by then.
    """
    path = locate(source)
    tell = told or (lambda _: None)
    inputs = _inputs(path, options)
    known = _known(out, inputs, force)
    original = dict(known.original) if known else {}
    if not original:
        tell("original")
        original = evaluate(path, options.evaluation).to_json()
    result = Sweep(inputs, environment(), original, known.points if known else ())
    _write(out, result)
    curves: list[RateCurve] | None = None
    for point in options.points():
        settings = _settings(point)
        if any(dict(done.settings) == settings for done in result.points):
            continue
        tell(label_of(point))
        with _workplace(out) as folder:
            start = time.perf_counter()
            if point.target_bits is not None and curves is None:  # the same for all of them
                curves = rate_curves(path, point, folder)
            summary = pack(path, folder / "packed", point, curves=curves)
            pack_seconds = time.perf_counter() - start
            score = evaluate(folder / "packed", options.evaluation)
        done = Point(
            recipe=point.method,
            label=label_of(point),
            settings=settings,
            bits_per_weight=summary.bits_per_weight,
            sparsity=summary.zeros / summary.weights,
            loss=score.loss,
            bits_per_byte=score.bits_per_byte,
            pack_seconds=pack_seconds,
            evaluation_seconds=score.seconds,
        )
        result = replace(result, points=(*result.points, done))
        _write(out, result)
    return result


def label_of(point: PackOptions) -> str:
    """What tells a point from the others."""
    if point.method == "nearest":
        return f"nearest {point.levels}"
    return point.method if point.target_bits is None else f"{point.method} {point.target_bits:g}"


def _settings(point: PackOptions) -> dict[str, object]:
    """What decides a point, as JSON has it."""
    values: dict[str, object] = {"method": point.method, "level_format": point.level_format}
    if point.recipe is not None:
        values |= {"recipe": point.recipe.to_json(), "target_bits": point.target_bits}
    else:
        values["levels"] = point.levels
    normal: dict[str, object] = json.loads(json.dumps(values))
    return normal


def _inputs(path: Path, options: SweepOptions) -> dict[str, object]:
    """Model and texts, so that a file is not gone on with for others."""
    assert options.calibration.text is not None
    checkpoint = SourceCheckpoint(path)
    with os_errors(options.evaluation.text):
        scored = take_part(Path(options.evaluation.text).read_bytes(), options.evaluation.part)
    calibration: dict[str, object] = {}
    if any(method in CALIBRATED_METHODS for method in options.methods):
        windows = read_windows(options.calibration.text, checkpoint.config)
        how = {**asdict(options.calibration.text), **options.calibration.to_json()}
        # Decided by each recipe itself, and of no consequence
        calibration = {name: how[name] for name in how.keys() - {"source", "gate_weighting", "batch"}}
        calibration["windows_sha256"] = windows.digest
    evaluation = {name: value for name, value in asdict(options.evaluation).items() if name != "text"}
    inputs = {
        "model": path.name,
        "model_sha256": model_digest(checkpoint),
        "text_sha256": hashlib.sha256(scored).hexdigest(),
        "evaluation": evaluation,
        "calibration": calibration,
    }
    normal: dict[str, object] = json.loads(json.dumps(inputs, sort_keys=True))
    return normal


def environment() -> dict[str, object]:
    """Machine and versions."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(
            (line.partition(": ")[2] for line in lines if line.startswith("model name")), processor
        )
    versions = {}
    for name in ("qmoe-format", "torch", "transformers", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
    }


def _known(out: str | os.PathLike[str] | None, inputs: Mapping[str, object], force: bool) -> Sweep | None:
    """What a file has already, if it belongs to this model and these texts."""
    if out is None or not os.path.lexists(out):
        return None
    try:
        known = read_sweep(Path(out))
    except ArgumentError as error:
        raise OutputExistsError(error.message, file=out, expected="a new name") from error
    differing = sorted(
        name for name in {*known.inputs, *inputs} if known.inputs.get(name) != inputs.get(name)
    )
    if differing and not force:
        raise OutputExistsError(
            "holds the points of another sweep", file=out, field=", ".join(differing),
            expected="the same, or a new name, or --force",
        )  # fmt: skip
    return None if differing else known


def read_sweep(path: Path) -> Sweep:
    """Read what :func:`sweep` has written.

    Raises
    ------
    ArgumentError
        It is no such file.
    """
    values = read_json_object(path)
    try:
        if values["sweep"] != VERSION:
            raise ValueError
        points = tuple(Point(**point) for point in values["points"])  # type: ignore[attr-defined]
        parts = {name: dict(values[name]) for name in ("inputs", "environment", "original")}  # type: ignore[call-overload]
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError("not the file of a sweep", file=path) from error
    return Sweep(**parts, points=points)


def _write(out: str | os.PathLike[str] | None, result: Sweep) -> None:
    if out is None:
        return
    partial = Path(f"{out}.partial")
    with os_errors(partial):
        partial.unlink(missing_ok=True)
    write_file(partial, (json.dumps(result.to_json(), indent=1) + "\n").encode())
    with os_errors(out):
        os.replace(partial, out)


@contextlib.contextmanager
def _workplace(out: str | os.PathLike[str] | None) -> Iterator[Path]:
    """A folder for one packed model, beside `out`."""
    where = None if out is None else Path(os.path.abspath(out)).parent
    with (
        os_errors(where or tempfile.gettempdir()),
        tempfile.TemporaryDirectory(prefix=".qmoe-sweep-", dir=where) as folder,
    ):
        yield Path(folder)


# ---- reading a curve ---------------------------------------------------------------------------------------


def loss_at(points: Sequence[Point], bits: float) -> float | None:
    """Loss of a curve at some bits per weight, between points in a straight line; None beyond its ends."""
    ordered = sorted(points, key=lambda point: point.bits_per_weight)
    if not ordered or not ordered[0].bits_per_weight <= bits <= ordered[-1].bits_per_weight:
        return None
    return float(np.interp(bits, [p.bits_per_weight for p in ordered], [p.loss for p in ordered]))


def bits_at(points: Sequence[Point], loss: float) -> float | None:
    """Bits per weight from which on a curve's loss is at most `loss`; None where its points do not tell."""
    ordered = sorted(points, key=lambda point: point.bits_per_weight)
    if not ordered or ordered[0].loss <= loss:
        return None
    for before, after in itertools.pairwise(ordered):
        if after.loss <= loss:
            share = (before.loss - loss) / (before.loss - after.loss)
            return before.bits_per_weight + share * (after.bits_per_weight - before.bits_per_weight)
    return None


def compare(result: Sweep, recipe: str = "rd", reference: str = "qmoe") -> dict[str, float | None]:
    """A recipe against another's only point, or the one with most bits.

    Returns
    -------
    dict
        ``bits_ratio``: bits of `recipe` at the loss of `reference`, over its bits. ``increase_ratio``: the
        increase of the loss over the original's, of `recipe` at the bits of `reference`, over that of
        `reference`. None where the curve does not reach so far.
    """
    points, others = result.of(recipe), result.of(reference)
    if not points or not others:
        return {"bits_ratio": None, "increase_ratio": None}
    other = others[-1]
    original = float(result.original["loss"])  # type: ignore[arg-type]
    bits, loss = bits_at(points, other.loss), loss_at(points, other.bits_per_weight)
    increase = other.loss - original
    return {
        "bits_ratio": None if bits is None else bits / other.bits_per_weight,
        "increase_ratio": None if loss is None or increase <= 0 else (loss - original) / increase,
    }
