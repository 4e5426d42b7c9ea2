"""What a packed model consists of, in numbers: where every byte goes, and how far from the entropy."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from qmoe_codec import decode, read_frame_header
from qmoe_codec.errors import FormatError

from .container import LayerSpec
from .reader import PackedLayer, PackedModel, open_model
from .safetensors_io import DTYPE_BITS

SPARSITY_BINS = 50
SECTIONS = ("codewords", "row_index", "levels", "headers", "padding", "dictionaries", "index")


@dataclass
class DictionaryUse:
    """A dictionary, and the matrix frames that name it. `threshold`: see spec 3."""

    bits: int
    threshold: int
    bytes: int
    frames: int = 0


@dataclass
class ExpertReport:
    """Experts of a layer, or of all layers.

    Attributes
    ----------
    experts, matrices, weights : int
    zeros, positives : int
        Weights that are 0, and those that are the row's `high`.
    section_bytes : dict
        Bytes by purpose. ``padding`` is between sections, frames and records; ``index`` the tensor
        `qmoe_index`.
    entropy_bits : float
        Sum over matrices of the order-0 entropy of their trits, in bits.
    sparsity_histogram : int64 array [50]
        Weights by the share of zeros in their row, from 0 to 1.
    dictionaries : dict
        Id -> use.
    raw_frames : int
        Matrix frames with codec 0.
    """

    experts: int = 0
    matrices: int = 0
    weights: int = 0
    zeros: int = 0
    positives: int = 0
    section_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SECTIONS, 0))
    entropy_bits: float = 0.0
    sparsity_histogram: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(SPARSITY_BINS, np.int64)
    )
    dictionaries: dict[int, DictionaryUse] = field(default_factory=dict)
    raw_frames: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of the three tensors."""
        return sum(self.section_bytes.values())

    @property
    def sparsity(self) -> float:
        """Share of weights that are 0."""
        return self.zeros / self.weights if self.weights else 0.0

    def bits(self, *sections: str) -> float:
        """Bits per weight of some sections; of all without arguments."""
        total = sum(self.section_bytes[section] for section in sections or SECTIONS)
        return 8 * total / self.weights if self.weights else 0.0

    @property
    def entropy(self) -> float:
        """Order-0 entropy of a weight given its matrix, in bits."""
        return self.entropy_bits / self.weights if self.weights else 0.0

    def add(self, other: ExpertReport) -> None:
        """Count another report in."""
        for name in ("experts", "matrices", "weights", "zeros", "positives", "entropy_bits", "raw_frames"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for section in SECTIONS:
            self.section_bytes[section] += other.section_bytes[section]
        self.sparsity_histogram += other.sparsity_histogram
        for identity, use in other.dictionaries.items():
            known = self.dictionaries.setdefault(identity, DictionaryUse(use.bits, use.threshold, 0))
            known.frames += use.frames
            known.bytes += use.bytes

    def to_json(self) -> dict[str, object]:
        """All numbers, with those derived from them."""
        return {
            "experts": self.experts,
            "matrices": self.matrices,
            "raw_frames": self.raw_frames,
            "weights": self.weights,
            "zeros": self.zeros,
            "positives": self.positives,
            "sparsity": self.sparsity,
            "bytes": self.bytes,
            "section_bytes": self.section_bytes,
            "bits_per_weight": {
                "total": self.bits(),
                **{section: self.bits(section) for section in SECTIONS},
            },
            "entropy": self.entropy,
            "ratio_to_bf16": 16 / self.bits() if self.bytes and self.weights else None,
            "sparsity_histogram": self.sparsity_histogram.tolist(),
            "dictionaries": {
                f"{identity:#010x}": asdict(use) for identity, use in sorted(self.dictionaries.items())
            },
        }


@dataclass
class DenseReport:
    """Tensors that are no experts.

    Attributes
    ----------
    tensors, compressed : int
        All of them, and those stored as dense frames.
    elements : int
    bytes, stored_bytes : int
        Uncompressed, and in the files.
    """

    tensors: int = 0
    compressed: int = 0
    elements: int = 0
    bytes: int = 0
    stored_bytes: int = 0


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found.

    Attributes
    ----------
    path : Path
    model_type : str
    recipe : object
        How the weights were made, as the file says.
    specs : dict of str to LayerSpec
    layers : dict of str to ExpertReport
        By prefix.
    total : ExpertReport
    dense : DenseReport
    file_bytes : int
        All files but the manifest.
    """

    path: Path
    model_type: str
    recipe: object
    specs: dict[str, LayerSpec]
    layers: dict[str, ExpertReport]
    total: ExpertReport
    dense: DenseReport
    file_bytes: int

    @property
    def bf16_bytes(self) -> int:
        """The whole model in bfloat16."""
        return 2 * (self.total.weights + self.dense.elements)

    def to_json(self) -> dict[str, object]:
        """Everything, for machines."""
        return {
            "path": str(self.path),
            "model_type": self.model_type,
            "recipe": self.recipe,
            "file_bytes": self.file_bytes,
            "bf16_bytes": self.bf16_bytes,
            "ratio_to_bf16": self.bf16_bytes / self.file_bytes,
            "experts": self.total.to_json(),
            "dense": asdict(self.dense),
            "layers": {
                prefix: {
                    "dtype": self.specs[prefix].dtype,
                    "projections": [
                        [p.name, p.role, p.rows, p.columns] for p in self.specs[prefix].projections
                    ],
                    **report.to_json(),
                }
                for prefix, report in self.layers.items()
            },
        }


def inspect(
    path: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> Inspection:
    """Account for every byte of a packed model's tensors. All experts are decoded, one matrix at a time.

    Parameters
    ----------
    path : path
        Directory of a packed model.
    progress : callable, optional
        Called with the bytes of the expert stores done, and the bytes in all.

    Raises
    ------
    FormatError
        The model is damaged.
    """
    with open_model(path) as model:
        whole = sum(len(model.layer(prefix).store) for prefix in model.layers)
        done = 0
        layers, total = {}, ExpertReport()
        for prefix in model.layers:
            layer, report = model.layer(prefix), ExpertReport()
            _add_tables(report, layer)
            for expert in range(layer.experts):
                _add_expert(report, layer, expert)
                done += len(layer.record(expert)) + len(layer.padding(expert))
                if progress:
                    progress(done, whole)
            layers[prefix] = report
            total.add(report)
        return Inspection(
            path=model.path,
            model_type=str(model.config.get("model_type")),
            recipe=_recipe(model.config),
            specs=dict(model.layers),
            layers=layers,
            total=total,
            dense=_dense(model),
            file_bytes=sum(file.nbytes for file in model.files.values()),
        )


def _recipe(config: dict[str, object]) -> object:
    quantization = config["quantization_config"]
    return quantization.get("recipe") if isinstance(quantization, dict) else None


def _add_tables(report: ExpertReport, layer: PackedLayer) -> None:
    """Count what the experts of a layer share."""
    report.section_bytes["index"] = layer.index.nbytes
    report.section_bytes["dictionaries"] = len(layer.dictionary_bytes)
    for identity, dictionary in layer.dictionaries.items():
        report.dictionaries[identity] = DictionaryUse(
            dictionary.bits, dictionary.threshold, len(dictionary.frame)
        )


def _add_expert(report: ExpertReport, layer: PackedLayer, expert: int) -> None:
    report.experts += 1
    report.section_bytes["padding"] += len(layer.padding(expert))
    for number, frame in enumerate(layer.frames(expert)):
        info = read_frame_header(frame)
        report.matrices += 1
        report.raw_frames += not info.dictionary_ids
        for section, size in info.section_bytes.items():
            report.section_bytes["headers" if section == "header" else section] += size
        for identity in info.dictionary_ids:
            report.dictionaries[identity].frames += 1
        try:
            trits, _ = decode(frame, layer.dictionaries)
        except FormatError as error:
            raise error.with_file(layer.place(expert, number)) from error
        _add_trits(report, trits)


def _add_trits(report: ExpertReport, trits: npt.NDArray[np.int8]) -> None:
    columns = trits.shape[1]
    if not trits.size:
        return
    nonzeros = np.count_nonzero(trits, axis=1)
    counted = int(nonzeros.sum())
    positives = (counted + int(trits.sum(dtype=np.int64))) // 2
    report.weights += trits.size
    report.zeros += trits.size - counted
    report.positives += positives
    shares = np.array([trits.size - counted, positives, counted - positives]) / trits.size
    present = shares[shares > 0]
    report.entropy_bits -= trits.size * float((present * np.log2(present)).sum())
    bins = np.minimum((columns - nonzeros) * SPARSITY_BINS // columns, SPARSITY_BINS - 1)
    report.sparsity_histogram += columns * np.bincount(bins, minlength=SPARSITY_BINS)


def _dense(model: PackedModel) -> DenseReport:
    report = DenseReport()
    for name in model.dense_names():
        info = model.dense_info(name)
        report.tensors += 1
        report.compressed += info.compressed
        report.elements += info.nbytes * 8 // DTYPE_BITS[info.dtype]
        report.bytes += info.nbytes
        report.stored_bytes += info.stored_bytes
    return report
