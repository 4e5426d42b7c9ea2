"""Predicting what packing will give, before it is done.

A few rows are ternarized and encoded for real, and the rest is taken to be like them. Where the weights are
at hand the rows are theirs; otherwise they are drawn from a normal distribution, which has shorter tails than
trained weights have, so that the prediction is on the large side for ``minmax``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from math import prod

import numpy as np
import numpy.typing as npt
from qmoe_codec import DictionarySet
from qmoe_codec.layout import round_up

from qmoe_format.container import RECORD_ALIGNMENT, LayerSpec, Projection
from qmoe_format.dense import encode_dense
from qmoe_format.safetensors_io import DTYPE_BITS, tensor_bytes

from .checkpoint import SourceCheckpoint, has_weights, locate
from .config import ModelConfig
from .families import TensorTable
from .nearest import ternarize
from .pipeline import PackOptions, dense_tensors, expert_layers
from .shapes import tensors_of
from .sizes import grown_frame_bytes
from .text import window_length

SAMPLE_WEIGHTS = 1 << 19  # for each shape of matrix
SAMPLE_MATRICES = 6
SAMPLE_DENSE_BYTES = 1 << 20

# Measured with benchmarks/pack_memory.py: interpreter, NumPy, codec and its dictionaries; and bytes held at
# once for each byte of a dense tensor.
BASE_BYTES = 60_000_000
BYTES_PER_DENSE_BYTE = {"copy": 1.0, "zstd": 3.6}


@dataclass(frozen=True)
class Plan:
    """A prediction of what :func:`qmoe_quantize.pipeline.pack` will give. Bytes and weights.

    Attributes
    ----------
    basis : {"config", "weights"}
        Whether only the configuration was there, or the weights too.
    layers, experts, weights : int
        Expert layers, experts in them, weights in those.
    source_bytes, expert_source_bytes, dense_source_bytes : int
        Tensors of the source: exact.
    expert_packed_bytes, dense_packed_bytes : int
        Tensors of the output: predicted, except that dense tensors that are copied keep their size.
    sparsity : float or None
        Share of expert weights that become 0: predicted, where it can be.
    peak_memory_bytes : int
        Resident memory of the process at its largest: a bound, predicted.
    seconds : float or None
        Time: predicted for a calibrated run.
    assumptions : tuple of str
        What the prediction rests on.
    search_seconds : float
        Of ``seconds``, for finding lambda.
    """

    basis: str
    layers: int
    experts: int
    weights: int
    source_bytes: int
    expert_source_bytes: int
    dense_source_bytes: int
    expert_packed_bytes: int
    dense_packed_bytes: int
    sparsity: float | None
    peak_memory_bytes: int
    seconds: float | None
    assumptions: tuple[str, ...]
    search_seconds: float = 0.0

    @property
    def packed_bytes(self) -> int:
        """Tensors of the output."""
        return self.expert_packed_bytes + self.dense_packed_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of an expert weight, everything counted."""
        return 8 * self.expert_packed_bytes / self.weights

    def to_json(self) -> dict[str, object]:
        """All numbers, and the ratios people ask for."""
        return {
            **asdict(self),
            "packed_bytes": self.packed_bytes,
            "bits_per_weight": self.bits_per_weight,
            "ratio": self.source_bytes / self.packed_bytes,
        }


def predict(source: str | os.PathLike[str], options: PackOptions = PackOptions()) -> Plan:  # noqa: B008 (immutable)
    """Predict size, memory, and for a calibrated run time; nothing is written.

    Parameters
    ----------
    source : str or Path
        As for :func:`qmoe_quantize.pipeline.pack`; a directory with only a ``config.json``, or that file
        itself, will do.
    options : PackOptions

    Raises
    ------
    UnsupportedModelError, CheckpointError, FormatError
        As far as they can be seen from what is there.
    """
    path = locate(source, only_config=True)
    if has_weights(path):
        checkpoint = SourceCheckpoint(path)
        config, tensors = checkpoint.config, checkpoint.tensors
        return _predict(config, tensors, options, _Sample(checkpoint))
    config = ModelConfig.read(path if path.is_file() else path / "config.json")
    return _predict(config, tensors_of(config), options, _Sample(None))


class _Sample:
    """Rows to look at: of the checkpoint, or random ones in its stead."""

    def __init__(self, checkpoint: SourceCheckpoint | None) -> None:
        self.checkpoint = checkpoint
        self._generator = np.random.default_rng(0)

    def rows(self, layers: list[LayerSpec], projection: Projection, count: int) -> npt.NDArray[np.float32]:
        """At most `count` rows of matrices like `projection` in some of `layers`: float32."""
        if not self.checkpoint:
            return self._normal(min(count, projection.rows), projection.columns)
        # Experts spread over layers and numbers alike.
        chosen = layers[:: max(1, len(layers) // SAMPLE_MATRICES)][:SAMPLE_MATRICES]
        each = min(max(1, count // len(chosen)), projection.rows)
        start = (projection.rows - each) // 2
        parts = []
        for number, layer in enumerate(chosen):
            expert = number * layer.experts // len(chosen)
            own = layer.projection(projection.name)
            parts.append(self.checkpoint.matrix_rows(layer, own, expert, start, start + each))
        return np.concatenate(parts)

    def dense(self, name: str, dtype: str, elements: int) -> bytes:
        """Bytes of the first `elements` of a dense tensor."""
        if self.checkpoint:
            return bytes(self.checkpoint.data_start(name, tensor_bytes(dtype, (elements,))))
        normal = self._normal(1, elements)
        if dtype == "BF16":
            return (normal.view(np.uint32) >> 16).astype("<u2").tobytes()
        return normal.astype("<f2" if dtype == "F16" else "<f4").tobytes()

    def _normal(self, rows: int, columns: int) -> npt.NDArray[np.float32]:
        return np.float32(0.02) * self._generator.standard_normal((rows, columns), np.float32)


def _predict(config: ModelConfig, tensors: TensorTable, options: PackOptions, sample: _Sample) -> Plan:
    layers = expert_layers(config, tensors)
    dense = dense_tensors(tensors, layers)
    sizes = {name: tensor_bytes(tensors[name].dtype, tensors[name].shape) for name in dense}
    expert_weights = [sum(p.rows * p.columns for p in layer.projections) for layer in layers]
    weights = sum(layer.experts * each for layer, each in zip(layers, expert_weights, strict=True))
    expert_source = sum(
        layer.experts * tensor_bytes(layer.dtype, (each,))
        for layer, each in zip(layers, expert_weights, strict=True)
    )
    packed, sparsity, basis = _predict_experts(layers, weights, options, sample)
    dense_packed, kept = sum(sizes.values()), 1.0
    if options.dense == "zstd":
        kept = _dense_share(sample, sizes, tensors)
        dense_packed = round(kept * dense_packed)
    search = 0.0
    notes = [basis]
    if options.calibration is None:
        seconds, peak = None, _peak_memory(layers, max(sizes.values(), default=0), options)
        notes.append(f"{options.thread_count} threads; memory by a formula that was checked on Linux")
    else:
        seconds, search, peak, more = _predict_calibrated(config, tensors, layers, dense, options)
        notes += more
    if options.dense == "zstd":
        whose = "the start of the largest dense tensor" if sample.checkpoint else "random weights"
        notes.append(f"dense tensors compress to {kept:.0%}, as {whose} did")
    return Plan(
        basis="weights" if sample.checkpoint else "config",
        layers=len(layers),
        experts=sum(layer.experts for layer in layers),
        weights=weights,
        source_bytes=expert_source + sum(sizes.values()),
        expert_source_bytes=expert_source,
        dense_source_bytes=sum(sizes.values()),
        expert_packed_bytes=packed,
        dense_packed_bytes=dense_packed,
        sparsity=sparsity,
        peak_memory_bytes=peak,
        seconds=seconds,
        assumptions=tuple(notes),
        search_seconds=search,
    )


def _predict_experts(
    layers: list[LayerSpec], weights: int, options: PackOptions, sample: _Sample
) -> tuple[int, float | None, str]:
    """Bytes of the experts, share of zeros, and what both rest on."""
    if options.target_bits is not None:
        return (
            round(options.target_bits * weights / 8),
            None,
            "size: the wanted bits, as asked for",
        )
    if options.method == "rd":
        most = sum(layer.experts * (_raw_bytes(layer) + RECORD_ALIGNMENT) for layer in layers)
        return (
            most,
            None,
            "size: a bound, for what lambda is worth only calibration can tell; see --target-bpw",
        )
    packed, zeros = 0, 0.0
    for alike in _alike(layers):
        layer_bytes, layer_zeros = _predict_layer(alike, options, sample)
        packed += len(alike) * layer_bytes
        zeros += len(alike) * layer_zeros
    sparsity = zeros / weights if weights else 0.0
    if sample.checkpoint:
        basis = f"a sample of rows of up to {SAMPLE_MATRICES} experts stands for all"
    else:
        basis = (
            f"weights follow a normal distribution, so that {sparsity:.1%} become 0; "
            "trained weights have longer tails, so with minmax more of them do"
        )
    if options.method == "qmoe":
        basis += "; as if rounded to nearest: error feedback makes fewer zeros, and up to 1.25 times the bits"
    return packed, sparsity, basis


def _raw_bytes(layer: LayerSpec) -> int:
    """Bytes of an expert in five trits a byte, with levels and index at their largest."""
    return sum(p.rows * (-(-p.columns // 5) + 12) + 256 for p in layer.projections)


def _predict_calibrated(
    config: ModelConfig,
    tensors: TensorTable,
    layers: list[LayerSpec],
    dense: list[str],
    options: PackOptions,
) -> tuple[float, float, int, list[str]]:
    """Seconds, those of the search, and peak memory of a calibrated run, and what they rest on."""
    from .cost import predict_cost

    calibration, recipe = options.calibration, options.recipe
    assert calibration is not None and recipe is not None
    search = options.target_bits is not None
    cost = predict_cost(config, tensors, layers, dense, calibration, recipe, search=search)
    notes = [
        f"time: rates of the recipe measured just now on {cost.rates}; reading and writing not counted",
        f"memory: {calibration.hessian.experts_per_batch} experts at once, on Linux",
    ]
    if search:
        notes[0] += f"; {cost.search_seconds / cost.seconds:.0%} of it to find lambda"
    if calibration.text is not None:
        length = window_length(calibration.text, config)
        notes.append(
            f"text: {calibration.text.samples} windows of {length} tokens, if it has as many; "
            "tokens spread evenly over the experts"
        )
    return cost.seconds, cost.search_seconds, cost.peak_memory_bytes, notes


def _alike(layers: list[LayerSpec]) -> list[list[LayerSpec]]:
    """Layers grouped by number of experts and shapes."""

    def geometry(layer: LayerSpec) -> tuple[object, ...]:
        return (layer.experts, *((p.name, p.rows, p.columns) for p in layer.projections))

    return [list(group) for _, group in groupby(sorted(layers, key=geometry), key=geometry)]


def _predict_layer(layers: list[LayerSpec], options: PackOptions, sample: _Sample) -> tuple[int, float]:
    """Bytes and zeros of one of some layers with the same geometry."""
    record, zeros = 0.0, 0.0
    dictionaries = DictionarySet(layers[0].experts * sum(p.rows * p.columns for p in layers[0].projections))
    for projection in layers[0].projections:
        rows = sample.rows(layers, projection, max(1, SAMPLE_WEIGHTS // max(1, projection.columns)))
        trits, levels = ternarize(rows, options.levels, options.level_format)
        frame = dictionaries.encode(trits, levels, options.level_format)
        scale = projection.rows / max(1, len(rows))
        record += grown_frame_bytes(frame, scale)
        zeros += layers[0].experts * scale * int((trits == 0).sum())
    store = layers[0].experts * round_up(round(record), 256)
    return store + 24 * layers[0].experts + len(dictionaries.to_bytes()), zeros


def _dense_share(sample: _Sample, sizes: Mapping[str, int], tensors: TensorTable) -> float:
    """Share of the bytes that compression leaves, by the start of the largest dense tensor."""
    name = max(sizes, key=lambda name: sizes[name], default="")
    if not name or not sizes[name]:
        return 1.0
    dtype, elements = tensors[name].dtype, prod(tensors[name].shape)
    elements = max(1, elements * min(SAMPLE_DENSE_BYTES, sizes[name]) // sizes[name])
    data = sample.dense(name, dtype, elements)
    return min(1.0, len(encode_dense(dtype, (elements,), data)) / len(data))


def _peak_memory(layers: list[LayerSpec], largest_dense: int, options: PackOptions) -> int:
    """Upper bound of resident memory, if the formula holds."""
    experts = 0
    for layer in layers:
        matrices = [projection.rows * projection.columns for projection in layer.projections]
        # Each thread holds a matrix as stored and as float32; besides there are trits: of the experts that
        # the threads work on, and of one that is encoded.
        making = (DTYPE_BITS[layer.dtype] // 8 + 4) * max(matrices)
        threads = options.thread_count
        experts = max(experts, threads * making + (threads + 1) * sum(matrices))
    return BASE_BYTES + max(experts, round(BYTES_PER_DENSE_BYTE[options.dense] * largest_dense))
