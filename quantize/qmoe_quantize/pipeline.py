"""Packing a checkpoint: a stream from source tensors to the writer, one expert at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from qmoe_codec import DictionarySet
from qmoe_codec.errors import ArgumentError, CheckpointError
from qmoe_codec.layout import LEVEL_FORMATS

from qmoe_format.container import LayerSpec
from qmoe_format.paths import refuse_overlap
from qmoe_format.reader import open_model
from qmoe_format.writer import PackedModelWriter

from .checkpoint import SourceCheckpoint, locate
from .config import ModelConfig
from .families import TensorTable, find_layers
from .nearest import LEVEL_RULES, squared_error, ternarize
from .shapes import tensors_of
from .ternary import TernaryMatrix

METHODS = ("nearest",)
DENSE_MODES = ("copy", "zstd")

Progress = Callable[[int, int], None]
"""Told how many bytes of the source are done, and how many there are."""


@dataclass(frozen=True)
class PackOptions:
    """How to pack.

    Attributes
    ----------
    method : {"nearest"}
        How the ternary weights are found.
    levels : {"minmax", "lsq"}
        Which levels ``nearest`` rounds to, see :func:`qmoe_quantize.nearest.ternarize`.
    level_format : {"bfloat16", "float16", "float32", "e4m4"}
        How levels are stored (spec 4.1).
    dense : {"copy", "zstd"}
        Whether the other tensors are compressed without loss where that makes them smaller.
    force : bool
        Replace an existing output.
    threads : int, optional
        Experts that are ternarized at once, each of which takes memory; by default one for each core, but at
        most 4. It changes no byte of the output.

    Raises
    ------
    ArgumentError
        A value is none of these.
    """

    method: str = "nearest"
    levels: str = "minmax"
    level_format: str = "bfloat16"
    dense: str = "copy"
    force: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        for field, choices in (
            ("method", METHODS),
            ("levels", LEVEL_RULES),
            ("level_format", LEVEL_FORMATS),
            ("dense", DENSE_MODES),
        ):
            value = getattr(self, field)
            if value not in choices:
                raise ArgumentError("unknown", field=field, value=value, expected=" or ".join(choices))
        if self.threads is not None and self.threads < 1:
            raise ArgumentError("illegal", field="threads", value=self.threads, expected="at least 1")

    @property
    def thread_count(self) -> int:
        """Threads to use."""
        return self.threads or min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class TernaryExpert:
    """The matrices of an expert in the order of the layer's projections.

    Attributes
    ----------
    matrices : tuple of TernaryMatrix
    tokens : int
        How many tokens it saw in calibration; -1 without calibration.
    """

    matrices: tuple[TernaryMatrix, ...]
    tokens: int = -1


class ExpertWeights(Protocol):
    """Gives the matrices of the source."""

    def __call__(self, tensor: str, /) -> npt.NDArray[np.float32]:
        """Read one matrix by its tensor's name: float32 [rows, columns], finite."""
        ...


class Ternarizer(Protocol):
    """Turns a layer's experts into ternary matrices.

    This is where recipes differ. :func:`pack` calls :meth:`layer` once for every layer, in the order of the
    model, so that one that calibrates can carry activations from layer to layer.
    """

    @property
    def recipe(self) -> dict[str, object]:
        """What `quantization_config.recipe` shall say (spec 6.3)."""
        ...

    def layer(self, layer: LayerSpec, weights: ExpertWeights) -> Iterator[TernaryExpert]:
        """The experts of `layer`, in order, one after the other so that few are in memory at once."""
        ...


class NearestTernarizer:
    """Rounds every row to its own levels, without calibration; see :mod:`qmoe_quantize.nearest`.

    Parameters
    ----------
    levels, level_format : str
        As for :func:`qmoe_quantize.nearest.ternarize`.
    threads : int
        Experts that are ternarized at once.
    """

    def __init__(self, levels: str = "minmax", level_format: str = "bfloat16", threads: int = 1) -> None:
        self._levels = levels
        self._level_format = level_format
        self._threads = threads

    @property
    def recipe(self) -> dict[str, object]:
        """Method and rule."""
        return {"method": "nearest", "levels": self._levels, "level_format": self._level_format}

    def layer(self, layer: LayerSpec, weights: ExpertWeights) -> Iterator[TernaryExpert]:
        """Ternarize each expert by itself, some of them ahead of the one that is asked for."""
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="ternarize")
        coming: deque[Future[TernaryExpert]] = deque()
        try:
            for number in range(layer.experts):
                coming.append(pool.submit(self._expert, layer, weights, number))
                if len(coming) > self._threads:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _expert(self, layer: LayerSpec, weights: ExpertWeights, number: int) -> TernaryExpert:
        return TernaryExpert(tuple(self._matrix(weights(p.tensor_name(number))) for p in layer.projections))

    def _matrix(self, weight: npt.NDArray[np.float32]) -> TernaryMatrix:
        trits, levels = ternarize(weight, self._levels, self._level_format)
        norm = float(np.vdot(weight, weight))
        return TernaryMatrix(trits, levels, float(squared_error(weight, levels).sum()), norm)


@dataclass
class PackSummary:
    """What :func:`pack` did; bytes, weights and sums over all experts.

    Attributes
    ----------
    source_bytes : int
        Tensors of the source.
    packed_bytes : int
        Files of the output.
    layers, experts, weights : int
        Expert layers, experts in them, weights in those.
    zeros : int
        Expert weights that became 0.
    expert_source_bytes, expert_packed_bytes : int
        Experts before, and after with index, levels, dictionaries and padding.
    dense_source_bytes, dense_packed_bytes : int
        The other tensors.
    squared_error, squared_norm : float
        Sums over all expert weights.
    """

    source_bytes: int = 0
    packed_bytes: int = 0
    layers: int = 0
    experts: int = 0
    weights: int = 0
    zeros: int = 0
    expert_source_bytes: int = 0
    expert_packed_bytes: int = 0
    dense_source_bytes: int = 0
    dense_packed_bytes: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits of an expert weight, everything counted."""
        return 8 * self.expert_packed_bytes / self.weights

    def to_json(self) -> dict[str, object]:
        """All numbers, and the ratios people ask for."""
        return {
            **asdict(self),
            "bits_per_weight": self.bits_per_weight,
            "sparsity": self.zeros / self.weights,
            "relative_error": self.squared_error / self.squared_norm if self.squared_norm else 0.0,
            "ratio": self.source_bytes / self.packed_bytes,
        }


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: PackOptions = PackOptions(),
    *,
    progress: Progress | None = None,
) -> PackSummary:
    """Pack a Mixture-of-Experts checkpoint.

    Memory holds the experts that are being made, one for each thread, and one that is encoded, or one dense
    tensor, however many experts there are. The output depends on the source and the options alone, to the
    byte.

    Parameters
    ----------
    source : str or Path
        See :class:`SourceCheckpoint`.
    out : str or Path
        A new directory. It appears when it is complete; what stood there is replaced only under `force`.
    options : PackOptions
    progress : callable, optional
        Called after every expert and every dense tensor.

    Raises
    ------
    ArgumentError, OutputExistsError
        The output is the source, or exists already.
    UnsupportedModelError
        The architecture, or a dtype in it, is not supported.
    CheckpointError, FormatError
        The source is incomplete, damaged, or holds weights that are not numbers.
    """
    path = locate(source)
    refuse_overlap(path, out)
    checkpoint = SourceCheckpoint(path)
    layers = expert_layers(checkpoint.config, checkpoint.tensors)
    ternarizer = NearestTernarizer(options.levels, options.level_format, options.thread_count)
    run = _Run(checkpoint, options, ternarizer, progress)
    with PackedModelWriter(out, force=options.force) as writer:
        for file in checkpoint.other_files:
            writer.add_file(file)
        for layer in layers:
            run.add_layer(writer, layer)
        for name in dense_tensors(checkpoint.tensors, layers):
            run.add_dense(writer, name)
        writer.finish(dict(checkpoint.config.values), ternarizer.recipe)
    with open_model(out) as model:
        run.summary.packed_bytes = sum(file.nbytes for file in model.files.values())
        run.summary.expert_packed_bytes = sum(
            len(layer.store) + layer.index.nbytes + len(layer.dictionary_bytes)
            for layer in map(model.layer, model.layers)
        )
    return run.summary


def expert_layers(config: ModelConfig, tensors: TensorTable) -> list[LayerSpec]:
    """Find the expert layers, and compare them with those that `config` implies.

    Raises
    ------
    UnsupportedModelError, CheckpointError
        As :func:`find_layers`; or a layer that ought to have experts has none, or of another shape.
    """
    layers = {layer.prefix: layer for layer in find_layers(config, tensors)}
    for implied in find_layers(config, tensors_of(config)):
        layer = layers.get(implied.prefix)
        if layer is None:
            raise CheckpointError(
                "missing from the checkpoint",
                file=config.directory,
                field=implied.projections[0].tensor_name(0),
                expected="experts in this layer, as config.json says",
            )
        for found, expected in zip(layer.projections, implied.projections, strict=True):
            if found != expected:
                raise CheckpointError(
                    "not the shape that config.json implies",
                    file=config.directory,
                    field=found.tensor_name(0),
                    value=[found.rows, found.columns],
                    expected=[expected.rows, expected.columns],
                )
    return list(layers.values())


def dense_tensors(tensors: TensorTable, layers: list[LayerSpec]) -> list[str]:
    """Names of the tensors that belong to no expert, in the order of `tensors`."""
    of_experts = {
        projection.tensor_name(expert)
        for layer in layers
        for projection in layer.projections
        for expert in range(layer.experts)
    }
    return [name for name in tensors if name not in of_experts]


class _Run:
    """One run of :func:`pack`: the tensors on their way from the checkpoint to the writer, and the count."""

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        options: PackOptions,
        ternarizer: Ternarizer,
        progress: Progress | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._options = options
        self._ternarizer = ternarizer
        self._progress = progress
        self._done = 0
        self.summary = PackSummary(source_bytes=checkpoint.nbytes)

    def add_layer(self, writer: PackedModelWriter, layer: LayerSpec) -> None:
        dictionaries = DictionarySet(layer.experts * sum(p.rows * p.columns for p in layer.projections))
        writer.add_layer(layer, self._records(layer, dictionaries), dictionaries)
        self.summary.layers += 1

    def _records(self, layer: LayerSpec, dictionaries: DictionarySet) -> Iterator[tuple[list[bytes], int]]:
        summary = self.summary
        for number, expert in enumerate(self._ternarizer.layer(layer, self._checkpoint.weight)):
            frames = []
            for matrix in expert.matrices:
                frames.append(dictionaries.encode(matrix.trits, matrix.levels, self._options.level_format))
                summary.weights += matrix.trits.size
                summary.zeros += matrix.trits.size - int(np.count_nonzero(matrix.trits))
                summary.squared_error += matrix.squared_error
                summary.squared_norm += matrix.squared_norm
            yield frames, expert.tokens
            names = (projection.tensor_name(number) for projection in layer.projections)
            nbytes = sum(self._checkpoint.tensors[name].nbytes for name in names)
            summary.experts += 1
            summary.expert_source_bytes += nbytes
            self._advance(nbytes)

    def add_dense(self, writer: PackedModelWriter, name: str) -> None:
        tensor = self._checkpoint.tensors[name]
        data = self._checkpoint.data(name)
        if self._options.dense == "zstd":
            stored = writer.add_dense_zstd(name, tensor.dtype, tensor.shape, data)
        else:
            writer.add_dense(name, tensor.dtype, tensor.shape, data)
            stored = tensor.nbytes
        self.summary.dense_source_bytes += tensor.nbytes
        self.summary.dense_packed_bytes += stored
        self._advance(tensor.nbytes)

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress:
            self._progress(self._done, self.summary.source_bytes)
