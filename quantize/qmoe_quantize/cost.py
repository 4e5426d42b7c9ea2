"""What a calibrated run will cost: time, from rates measured on this machine, and peak memory.

The recipe itself is run on small problems, and what it took and held is carried over to the model's shapes;
so neither has to be told what its steps are. What is around it is counted: Hessians, the passes through the
experts and the dense layers.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from qmoe_codec import DictionarySet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qmoe_format.container import LayerSpec
from qmoe_format.safetensors_io import DTYPE_BITS

from .allocation import LAM_STEPS
from .config import ModelConfig
from .families import TensorTable
from .mixture import CHUNK_TOKENS, PRIOR_TOKENS
from .options import CalibrationOptions
from .problem import MatrixGroup
from .recipes import RecipeSettings, ternarize_group
from .streaming import torch_device
from .target import (
    FEWEST_ROWS,
    FIRST_EXPERTS,
    FIRST_SHARE,
    SAMPLED_EXPERTS,
    SAMPLED_ROWS,
)
from .text import window_length

Shape = tuple[int, int, int]
"""Experts, rows, columns."""

REHEARSED: tuple[Shape, ...] = (
    (2, 16, 64), (2, 16, 256), (1, 16, 640), (8, 128, 128), (16, 256, 128), (1, 256, 512),
    (1, 64, 1536),
)  # fmt: skip
"""Small problems that differ in what takes the time."""
PRODUCT = 1024  # rows and columns of the products that are timed
ENCODED = (512, 512)

# Measured with benchmarks/quantizer_memory.py: interpreter, torch, transformers, codec, what malloc keeps.
BASE_BYTES = 420_000_000
START_SECONDS = 6.0  # torch, transformers, the codec's dictionaries
MATRIX_BYTES = 2_500
"""Kept of every matrix of the model: its name, where it lies, its line of the report."""
SECOND_LOOKS = 2
"""How often the second look for lambda is taken, as a rule."""
SKEW = 4
"""How many times the tokens of an average expert a busy one is taken to see in a chunk."""
HIDDEN_COPIES = 12
"""Hidden states that a dense layer holds at once."""


@dataclass(frozen=True)
class Work:
    """Of the recipe: sums over the matrices of a run.

    Attributes
    ----------
    cubes : float
        C^3 of each matrix's Hessian: factors.
    squares : float
        R C^2: products with the Hessian.
    weights : float
        R C: decisions.
    columns : float
        C of each group of matrices that go together: calls, however small.
    """

    cubes: float = 0.0
    squares: float = 0.0
    weights: float = 0.0
    columns: float = 0.0

    @classmethod
    def of(cls, experts: float, rows: float, columns: int, groups: float = 1.0) -> Work:
        """Matrices of some experts, in so many groups."""
        weights = experts * rows * columns
        return cls(experts * columns**3, weights * columns, weights, groups * columns)

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * part for part in self.parts))

    @property
    def parts(self) -> tuple[float, float, float, float]:
        """The four."""
        return self.cubes, self.squares, self.weights, self.columns


@dataclass(frozen=True)
class Rates:
    """What this machine takes; seconds.

    Attributes
    ----------
    recipe : tuple of float
        For each of :attr:`Work.parts`.
    multiplication : float
        Of a matrix product, its addition included.
    encoding : float
        For a weight, in the codec.
    where : str
        The machine.
    """

    recipe: tuple[float, ...]
    multiplication: float
    encoding: float
    where: str

    def seconds(self, work: Work) -> float:
        """Time for work of the recipe."""
        return sum(rate * part for rate, part in zip(self.recipe, work.parts, strict=True))


@dataclass(frozen=True)
class Cost:
    """What a run is predicted to take.

    Attributes
    ----------
    seconds : float
        Of all.
    search_seconds : float
        Of these, for finding lambda.
    peak_memory_bytes : int
    rates : str
        Where the rates are from.
    """

    seconds: float
    search_seconds: float
    peak_memory_bytes: int
    rates: str


# ---- rehearsal ---------------------------------------------------------------------------------------------


def problem(shape: Shape, device: str = "cpu", seed: int = 0) -> MatrixGroup:
    """A group of random matrices, with Hessians of random inputs."""
    experts, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    hessian = (inputs.T @ inputs / len(inputs))[None]
    weight = torch.randn(experts, rows, columns, generator=generator) * columns**-0.5
    return MatrixGroup(
        names=tuple(f"expert.{number}" for number in range(experts)),
        weight=weight.to(device),
        hessian=(0.1 * hessian.repeat(experts, 1, 1)).to(device),
        prior=hessian.to(device).repeat(experts, 1, 1),
        tokens=torch.full((experts,), 1000),
        calibration_tokens=10000,
        row_weight=torch.ones(experts, rows, device=device),
    )


def seconds_of(group: MatrixGroup, settings: RecipeSettings, repeats: int = 1) -> float:
    """How long the recipe takes for a group; the least of some times."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        ternarize_group(group, settings)  # ends with a copy to the host
        times.append(time.perf_counter() - start)
    return min(times)


def measure_rates(settings: RecipeSettings, device: str = "cpu") -> Rates:
    """Run small problems here and now; takes a few seconds on a slow machine.

    Raises
    ------
    UnsupportedModelError
        There is no such device.
    """
    torch_device(device)
    lively = replace(settings, rules=(), lam=settings.lam or 1e-6)
    ternarize_group(problem((1, 16, 64), device), lively)  # loads libraries, starts threads
    rows = []
    for shape in REHEARSED:
        rows.append((Work.of(*shape).parts, seconds_of(problem(shape, device), lively, 3)))
    return Rates(
        recipe=fit([parts for parts, _ in rows], [taken for _, taken in rows]),
        multiplication=_multiplication_seconds(device),
        encoding=_encoding_seconds(settings.level_format),
        where=torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads",
    )


def fit(parts: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Rates, none negative, that explain times with the least relative errors squared."""
    terms, times = np.array(parts), np.array(seconds)
    terms = terms / times[:, None]
    scale = terms.max(axis=0)
    best, least = np.zeros(terms.shape[1]), math.inf
    for count in range(1, terms.shape[1] + 1):
        for chosen in itertools.combinations(range(terms.shape[1]), count):
            columns = (terms / scale)[:, chosen]
            found, *_ = np.linalg.lstsq(columns, np.ones(len(times)), rcond=None)
            error = float(np.square(columns @ found - 1).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(terms.shape[1]), error
                best[list(chosen)] = found
    return tuple((best / scale).tolist())


def _multiplication_seconds(device: str) -> float:
    matrix = torch.randn(PRODUCT, PRODUCT, device=device)
    float((matrix @ matrix)[0, 0])
    start = time.perf_counter()
    for _ in range(2):
        float((matrix @ matrix)[0, 0])  # waits for the device
    return (time.perf_counter() - start) / 2 / PRODUCT**3


def _encoding_seconds(level_format: str) -> float:
    generator = np.random.default_rng(0)
    trits = generator.choice(np.array([-1, 0, 1], np.int8), ENCODED, p=[0.1, 0.8, 0.1])
    levels = np.tile(np.array([-1, 1], np.float32), (ENCODED[0], 1))
    dictionaries = DictionarySet(1 << 24)
    dictionaries.encode(trits, levels, level_format)
    start = time.perf_counter()
    dictionaries.encode(trits, levels, level_format)
    return (time.perf_counter() - start) / trits.size


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operators make, while they are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._alive: dict[int, int] = {}  # tensors by the address of what they share

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                address, nbytes = storage.data_ptr(), storage.nbytes()
                if address in given and address not in self._alive:
                    continue  # a view of something that was there before
                self._alive[address] = self._alive.get(address, 0) + 1
                if self._alive[address] == 1:
                    self.now += nbytes
                    self.most = max(self.most, self.now)
                weakref.finalize(tensor, self._forget, address, nbytes)
        return out

    def _forget(self, address: int, nbytes: int) -> None:
        self._alive[address] -= 1
        if not self._alive[address]:
            del self._alive[address]
            self.now -= nbytes


@contextmanager
def bytes_held() -> Iterator[_Held]:
    """Count what operators hold at most (``most``), apart from what was there before."""
    with _Held() as held:
        yield held


SHRUNKEN = 256
"""Columns that matrices are scaled down to, to see what the recipe holds at once."""


def held_bytes(shape: Shape, settings: RecipeSettings) -> int:
    """What the recipe holds at most for a group, beside the group itself: from a smaller one alike."""
    experts, rows, columns = shape
    shrink = max(1.0, columns / SHRUNKEN)
    small = (max(1, round(rows / shrink)), max(1, round(columns / shrink)))
    once = replace(settings, rules=(), lam=settings.lam or 1e-6, sweeps=min(1, settings.sweeps))
    small_elements = small[1] * (small[0] + small[1])
    return round(_most_held(*small, once) * experts * columns * (rows + columns) / small_elements)


@functools.cache  # layers are mostly alike
def _most_held(rows: int, columns: int, settings: RecipeSettings) -> int:
    """What operators hold at most while the recipe runs on one matrix."""
    group = problem((1, rows, columns))
    with bytes_held() as held:
        ternarize_group(group, settings)
    return held.most


# ---- the run -----------------------------------------------------------------------------------------------


def predict_cost(
    config: ModelConfig,
    tensors: TensorTable,
    layers: Sequence[LayerSpec],
    dense: Sequence[str],
    calibration: CalibrationOptions,
    settings: RecipeSettings,
    *,
    search: bool,
    rates: Rates | None = None,
    rough: Rates | None = None,
) -> Cost:
    """Time and peak memory of a calibrated run of :func:`.pipeline.pack`.

    Counted with tokens spread evenly over the experts. Reading the checkpoint and writing are not counted.

    Parameters
    ----------
    config : ModelConfig
    tensors : TensorTable
    layers : sequence of LayerSpec
    dense : sequence of str
        Names of the other tensors.
    calibration : CalibrationOptions
    settings : RecipeSettings
    search : bool
        Whether lambda is to be found for a rate.
    rates : Rates, optional
        By default :func:`measure_rates`.
    rough : Rates, optional
        Of error feedback alone, as the paper's recipe does it; by default measured, too.
    """
    device = calibration.stream.device
    rates = rates or measure_rates(settings, device)
    run = _Run(config, tensors, layers, dense, calibration, settings)
    seconds = (
        START_SECONDS
        + rates.seconds(run.recipe_work())
        + rates.multiplication * run.multiplications(1.0, None)
    )
    seconds += rates.encoding * sum(layer.experts * _weights(layer) for layer in layers)
    searching = 0.0
    if search:
        rough = rough or measure_rates(RecipeSettings("qmoe", settings.level_format), device)
        searching = run.search_seconds(rates, rough)
    return Cost(seconds + searching, searching, run.peak_bytes(search=search), rates.where)


def _weights(layer: LayerSpec) -> int:
    return sum(projection.rows * projection.columns for projection in layer.projections)


class _Run:
    """The numbers that time and memory of a run follow from."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: TensorTable,
        layers: Sequence[LayerSpec],
        dense: Sequence[str],
        calibration: CalibrationOptions,
        settings: RecipeSettings,
    ) -> None:
        self._layers = layers
        self._settings = settings
        self._calibration = calibration
        self._size = calibration.hessian.experts_per_batch
        self._streamed = calibration.text is not None
        self._tokens = self._length = 0
        if calibration.text is not None:
            self._length = window_length(calibration.text, config)
            if config.truth("is_encoder_decoder", config.text("model_type") == "switch_transformers"):
                self._length = max(1, self._length // 2)  # half of it in each stack
            self._tokens = calibration.text.samples * self._length
        self._choices = config.number("num_experts_per_tok", 1)
        self._heads = config.number("num_attention_heads", config.number("num_heads", 1))
        self._dense = _dense_elements(tensors, dense)
        self._largest = max((DTYPE_BITS[tensors[n].dtype] // 8 * math.prod(tensors[n].shape) for n in dense),
                            default=0)  # fmt: skip

    def _groups(self, layer: LayerSpec) -> int:
        return -(-layer.experts // self._size)

    def recipe_work(self) -> Work:
        """All matrices."""
        total = Work()
        for layer in self._layers:
            for projection in layer.projections:
                total += Work.of(layer.experts, projection.rows, projection.columns, self._groups(layer))
        return total

    def multiplications(self, share: float, seen: int | None) -> float:
        """Of products outside the recipe: Hessians of `seen` experts of a layer, or of all, and both passes.

        `share` is that of the text.
        """
        if not self._streamed:
            return 0.0
        tokens = share * self._tokens
        total = 2 * tokens * self._dense["layers"]
        for layer in self._layers:
            roles = {projection.role: projection for projection in layer.projections}
            rows, columns = roles["up"].rows, roles["up"].columns
            inner = len(layer.projections) - 1  # gate and up, or up alone
            hidden = inner * rows * columns
            pairs = tokens * self._choices
            counted = 1.0 if seen is None else min(1.0, seen / layer.experts)
            used = pairs
            if (cap := self._calibration.hessian.max_tokens_per_expert) is not None:
                used = min(pairs, cap * layer.experts)
            of_priors = counted * layer.experts * min(PRIOR_TOKENS, tokens)
            total += counted * used * (columns**2 + rows**2 + 2 * hidden)
            total += of_priors * (rows**2 + 2 * hidden) + pairs * (hidden + rows * columns)
        return total

    def search_seconds(self, rates: Rates, rough: Rates) -> float:
        """Two looks at the model to find lambda."""
        first, second, sampled = Work(), Work(), Work()
        for layer in self._layers:
            seen = min(FIRST_EXPERTS, layer.experts)
            many = min(SAMPLED_EXPERTS, layer.experts)
            height = max(FEWEST_ROWS, SAMPLED_ROWS // layer.experts)
            groups = seen if not self._streamed else min(self._groups(layer), seen)
            calls = many if not self._streamed else min(self._groups(layer), many)
            for projection in layer.projections:
                columns = projection.columns
                rows = len(LAM_STEPS) * min(FEWEST_ROWS, projection.rows)
                first += Work.of(seen, rows, columns, groups)
                sampled += Work.of(many, 3 * min(height, projection.rows), columns, calls)
                second += Work.of(layer.experts, projection.rows, columns, self._groups(layer))
        seconds = rates.seconds(first) + SECOND_LOOKS * rates.seconds(sampled)
        if self._streamed:
            seconds += SECOND_LOOKS * rough.seconds(second) + rates.multiplication * (
                self.multiplications(1 / FIRST_SHARE, FIRST_EXPERTS)
                + SECOND_LOOKS * self.multiplications(1.0, None)
            )
        return seconds

    def peak_bytes(self, *, search: bool) -> int:
        """Of the process, everything that is resident."""
        matrices = sum(layer.experts * len(layer.projections) for layer in self._layers)
        base = BASE_BYTES + MATRIX_BYTES * matrices
        experts = max((self._experts_bytes(layer) for layer in self._layers), default=0)
        if not self._streamed:
            return base + max(experts, 2 * self._largest)
        width = max((layer.projections[0].columns for layer in self._layers), default=0)
        pairs = self._tokens * self._choices
        batch = self._calibration.stream.batch_windows(self._length) * self._length
        batch = min(batch, self._tokens)
        running = 4 * batch * (HIDDEN_COPIES * width + 2 * self._heads * self._length)
        layer = 4 * (self._dense["largest layer"] + self._dense["ends"]) + self._largest
        return base + 40 * pairs + max(experts, layer + running, 2 * self._largest)

    def _experts_bytes(self, layer: LayerSpec) -> int:
        """Of one group of experts, at its largest."""
        size = min(self._size, layer.experts)
        weights = size * _weights(layer)
        most = 0
        for projection in layer.projections:
            shape = (size, projection.rows, projection.columns)
            # Of the experts and the prior; `rd` takes the drift of the last projection's inputs too
            drifts = self._streamed and self._settings.method == "rd" and projection.role == "down"
            hessians = (4 if drifts else 2) * 4 * size * projection.columns**2
            most = max(most, hessians + held_bytes(shape, self._settings))
        # As they were and as they are now, float32; trits until they are encoded
        return 2 * 4 * weights + weights + most + self._chunk_bytes(layer)

    def _chunk_bytes(self, layer: LayerSpec) -> int:
        """Of a chunk of tokens, and of what one expert makes of its part."""
        if not self._streamed:
            return 0
        chunk = min(CHUNK_TOKENS, self._tokens)
        busy = min(chunk, SKEW * chunk * self._choices // layer.experts)
        width, rows = layer.projections[0].columns, layer.projections[0].rows
        return 4 * (3 * chunk * width + busy * (3 * width + 6 * rows))


def _dense_elements(tensors: TensorTable, dense: Sequence[str]) -> Mapping[str, int]:
    """Elements of dense matrices: of all layers, of the largest one, and of what is around the layers."""
    layers: dict[str, int] = {}
    ends = 0
    for name in dense:
        size = math.prod(tensors[name].shape)
        pieces = name.split(".")
        places = [n for n, piece in enumerate(pieces) if piece in ("layers", "block")]
        if places:
            layer = ".".join(pieces[: places[0] + 2])
            layers[layer] = layers.get(layer, 0) + size
        elif "lm_head" not in name:
            ends += size
    return {"layers": sum(layers.values()), "largest layer": max(layers.values(), default=0), "ends": ends}
