"""From a checkpoint in the layout of QMoE's authors to a packed model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from qmoe_codec import Dictionary, DictionarySet, Matrix, decode, join_dictionaries
from qmoe_codec.codewords import join_codewords
from qmoe_codec.errors import (
    ArgumentError,
    CheckpointError,
    FormatError,
    QMoEError,
    UnsupportedModelError,
)

from qmoe_format.container import LayerSpec
from qmoe_format.paths import refuse_overlap
from qmoe_format.reader import open_model
from qmoe_format.writer import PackedModelWriter

from ..checkpoint import files_beside
from ..config import ModelConfig
from ..families import find_layers
from ..shapes import tensors_of
from . import DENSE, SIZES
from .codewords import covered_columns
from .dictionary import published_dictionary
from .layout import (
    CODEWORDS,
    CONFIG,
    DTYPE_NAMES,
    LEVELS,
    MODEL_TYPE,
    PLACEHOLDER,
    ROW_OFFSETS,
    SHARED,
    TIED,
    expert_files,
    read_sizes,
    read_tensors,
)
from .needs_torch import torch

LEVEL_FORMAT = "bfloat16"
#: The largest model has 61,440. It keeps a configuration from making tables without bound.
MAXIMUM_EXPERTS = 1 << 20


@dataclass
class ImportSummary:
    """What :func:`import_published` did.

    Attributes
    ----------
    layers, experts, weights, zeros : int
        Expert layers, experts in them, weights in those, and how many of them are 0.
    expert_source_bytes, expert_packed_bytes : int
        Experts in the authors' layout (codewords, row offsets, levels), and packed with all that belongs to
        them.
    dense_source_bytes, dense_packed_bytes : int
        Other tensors; those that are one under several names count once.
    source_bytes, packed_bytes : int
        All tensors of the source; all files of the output.
    codewords : str
        ``kept`` or ``re-encoded``.
    """

    layers: int = 0
    experts: int = 0
    weights: int = 0
    zeros: int = 0
    expert_source_bytes: int = 0
    expert_packed_bytes: int = 0
    dense_source_bytes: int = 0
    dense_packed_bytes: int = 0
    source_bytes: int = 0
    packed_bytes: int = 0
    codewords: str = "re-encoded"

    @property
    def bits_per_weight(self) -> float:
        """Bits of an expert weight in the packed model, everything counted."""
        return 8 * self.expert_packed_bytes / max(self.weights, 1)

    @property
    def source_bits_per_weight(self) -> float:
        """Bits of an expert weight in the authors' layout."""
        return 8 * self.expert_source_bytes / max(self.weights, 1)

    def to_json(self) -> dict[str, object]:
        """All numbers, and the ratios people ask for; `gain` is the share of the experts' bytes saved."""
        return {
            **asdict(self),
            "source_bits_per_weight": self.source_bits_per_weight,
            "bits_per_weight": self.bits_per_weight,
            "gain": 1 - self.expert_packed_bytes / max(self.expert_source_bytes, 1),
            "sparsity": self.zeros / max(self.weights, 1),
            "ratio": self.source_bytes / self.packed_bytes,
        }


def import_published(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keep_codes: bool = False,
    dense: str = "copy",
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImportSummary:
    """Pack a checkpoint in the layout of QMoE's authors; every weight stays what it is, to the bit.

    The files are mapped and go through one matrix at a time.

    Parameters
    ----------
    source : path
        A directory with ``config.json``, ``noexp.pt``, ``sizes.pt`` and ``expNN.pt``.
    out : path
        A new directory. It appears when it is complete.
    keep_codes : bool
        Keep the 16-bit codewords as they are, and store the authors' dictionary with every layer. By default
        the matrices are encoded anew, smaller; what is 0 because its level is becomes an ordinary zero.
    dense : {"copy", "zstd"}
        Whether other tensors are compressed without loss where that makes them smaller.
    force : bool
        Replace `out` if it is a packed model.
    progress : callable, optional
        Called with the bytes of the source's tensors done, and the bytes in all.

    Raises
    ------
    ArgumentError, OutputExistsError
        The output is the source, or exists already.
    UnsupportedModelError
        The model is no SwitchTransformers model.
    CheckpointError, FormatError
        The source is incomplete, damaged, or contradicts its configuration.
    """
    if dense not in ("copy", "zstd"):
        raise ArgumentError("unknown", field="dense", value=dense, expected="copy or zstd")
    refuse_overlap(source, out)
    run = _Import(Path(source), keep_codes, dense == "zstd", progress)
    with PackedModelWriter(out, force=force) as writer:
        for file in files_beside(run.directory):
            writer.add_file(file)
        for layer, file in run.layers:
            run.add_layer(writer, layer, file)
        run.add_dense(writer)
        recipe = {"method": "qmoe", "source": "published QMoE checkpoint", "codewords": run.summary.codewords}
        writer.finish(dict(run.config.values), recipe)
    with open_model(out) as model:
        run.summary.packed_bytes = sum(file.nbytes for file in model.files.values())
        run.summary.expert_packed_bytes = sum(
            len(layer.store) + layer.index.nbytes + len(layer.dictionary_bytes)
            for layer in map(model.layer, model.layers)
        )
    return run.summary


class _OneDictionary:
    """The dictionaries of a layer that keeps its codewords."""

    def __init__(self, dictionary: Dictionary) -> None:
        self._dictionary = dictionary

    def to_bytes(self) -> bytes:
        return join_dictionaries([self._dictionary])


def read_config(directory: Path) -> ModelConfig:
    """The configuration, as any transformers of today reads it.

    The largest model has experts in every block. The transformers of its time could not say so, so its file
    has a key of the authors' own, `is_full_sparse`; a step of 1 says it now.
    """
    config = ModelConfig.read(directory / CONFIG)
    if config.text("model_type") != MODEL_TYPE:
        raise UnsupportedModelError(
            "no published QMoE checkpoint is of this architecture",
            file=config.file,
            field="model_type",
            value=config.text("model_type"),
            expected=MODEL_TYPE,
        )
    blocks = config.number("num_layers") + config.number("num_decoder_layers", config.number("num_layers"))
    if blocks * config.experts > MAXIMUM_EXPERTS:
        raise CheckpointError(
            "more experts than any model has",
            file=config.file,
            field="num_experts",
            value=f"{config.experts} in each of {blocks} layers",
            expected=f"at most {MAXIMUM_EXPERTS} in all",
        )
    if "is_full_sparse" in config.values:
        steps = {"encoder_sparse_step": 1, "decoder_sparse_step": 1}
        config = replace(config, values={**config.values, **steps})
    return config


class _Import:
    """One run: what the source holds, checked, and the count."""

    def __init__(
        self,
        directory: Path,
        keep_codes: bool,
        zstd: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.directory = directory
        self.config = read_config(directory)
        self._keep_codes = keep_codes
        self._zstd = zstd
        self._progress = progress
        self._done = 0
        self._dictionary = published_dictionary()
        self._sizes = read_sizes(directory)
        implied = tensors_of(self.config)
        layers = [replace(layer, dtype="BF16") for layer in find_layers(self.config, implied)]
        self.layers = list(self._assign(layers))
        of_experts = {
            projection.tensor_name(expert)
            for layer in layers
            for projection in layer.projections
            for expert in range(layer.experts)
        }
        self._dense = self._open_dense({n: t.shape for n, t in implied.items() if n not in of_experts})
        if twice := sorted(of_experts & self._dense.keys()):
            raise CheckpointError("an expert's weights, unpacked", file=directory / DENSE, field=twice[0])
        self.summary = ImportSummary(codewords="kept" if keep_codes else "re-encoded")
        self.summary.dense_source_bytes = sum(tensor.nbytes for tensor in self._dense.values())
        self.summary.source_bytes = self.summary.dense_source_bytes + sum(self._expert_bytes)

    # ---- what is there ----------------------------------------------------------------------------------

    def _assign(self, layers: list[LayerSpec]) -> Iterator[tuple[LayerSpec, Path]]:
        """Which file holds which layer, after a check of every name and shape."""
        files: dict[str, Path] = {}
        self._expert_bytes: list[int] = []
        by_matrix = {
            _matrix_name(layer, number, expert): layer
            for layer in layers
            for expert in range(layer.experts)
            for number in range(len(layer.projections))
        }
        if unknown := next((name for name in self._sizes if name not in by_matrix), None):
            raise self._stranger(self.directory / SIZES, unknown)
        for file in expert_files(self.directory):
            tensors = read_tensors(file)
            prefix = ""
            for name in tensors:
                matrix, _, kind = name.rpartition(".")
                if matrix not in by_matrix or f".{kind}" not in (CODEWORDS, ROW_OFFSETS, LEVELS, PLACEHOLDER):
                    raise self._stranger(file, name)
                found = by_matrix[matrix].prefix
                if prefix not in ("", found):
                    raise CheckpointError(
                        "experts of two layers in one file",
                        file=file,
                        field=name,
                        expected=f"those of {prefix}",
                    )
                prefix = found
            if prefix in files:
                raise CheckpointError(
                    "experts of one layer in two files", file=file, field=prefix, value=files[prefix].name
                )
            if prefix:
                files[prefix] = file
            self._expert_bytes.append(sum(tensor.nbytes for tensor in tensors.values()))
        for layer in layers:
            if layer.prefix not in files:
                raise CheckpointError(
                    "no file holds the experts of this layer",
                    file=self.directory,
                    field=layer.prefix,
                    expected=f"{len(layers)} files expNN.pt, one for each layer with experts",
                )
            yield layer, files[layer.prefix]

    @staticmethod
    def _stranger(file: Path, name: str) -> CheckpointError:
        return CheckpointError(
            "belongs to no expert of this configuration",
            file=file,
            field=name,
            expected="names such as encoder.block.1.layer.1.mlp.experts.expert_0.wi",
        )

    def _open_dense(self, implied: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """The tensors of ``noexp.pt``, without those that are `shared.weight` under another name."""
        file = self.directory / DENSE
        tensors = read_tensors(file)
        for name, shape in implied.items():
            if name not in tensors:
                raise CheckpointError("missing", file=file, field=name, expected=f"a tensor {list(shape)}")
            if tuple(tensors[name].shape) != shape:
                raise CheckpointError(
                    f"not the shape that {CONFIG} implies",
                    file=file,
                    field=name,
                    value=list(tensors[name].shape),
                    expected=list(shape),
                )
        if self.config.truth("tie_word_embeddings", True):
            for name in TIED:
                if name in tensors and _same(tensors[name], tensors[SHARED]):
                    del tensors[name]
        return tensors

    # ---- its content ------------------------------------------------------------------------------------

    def add_layer(self, writer: PackedModelWriter, layer: LayerSpec, file: Path) -> None:
        """Write one layer of experts."""
        weights = layer.experts * sum(p.rows * p.columns for p in layer.projections)
        if self._keep_codes:
            writer.add_layer(layer, self._records(layer, file, None), _OneDictionary(self._dictionary))
        else:
            dictionaries = DictionarySet(weights)
            writer.add_layer(layer, self._records(layer, file, dictionaries), dictionaries)
        self.summary.layers += 1
        self.summary.weights += weights

    def _records(
        self, layer: LayerSpec, file: Path, dictionaries: DictionarySet | None
    ) -> Iterator[tuple[list[bytes], int]]:
        tensors = read_tensors(file)
        for expert in range(layer.experts):
            frames = []
            for number in range(len(layer.projections)):
                frame, matrix = self._read(layer, number, expert, tensors, file)
                trits = matrix.decode()
                levels = matrix.levels
                _drop_zero_levels(trits, levels)
                self.summary.zeros += trits.size - int(np.count_nonzero(trits))
                if dictionaries is not None:
                    frame = _encode(trits, levels, dictionaries)
                frames.append(frame)
            yield frames, -1
            self.summary.experts += 1

    def _read(
        self, layer: LayerSpec, number: int, expert: int, tensors: Mapping[str, torch.Tensor], file: Path
    ) -> tuple[bytes, Matrix]:
        """One matrix, checked: as a frame with the authors' codewords."""
        projection, name = layer.projections[number], _matrix_name(layer, number, expert)
        rows, columns = projection.rows, projection.columns

        def tensor(kind: str, dtype: torch.dtype, elements: int | None) -> torch.Tensor:
            found = tensors.get(name + kind)
            wanted = f"{DTYPE_NAMES[dtype]} [{'codewords' if elements is None else elements}]"
            if found is None:
                raise CheckpointError("missing", file=file, field=name + kind, expected=wanted)
            if found.dtype != dtype or found.ndim != 1 or elements not in (None, found.numel()):
                value = f"{DTYPE_NAMES[found.dtype]} {list(found.shape)}"
                raise CheckpointError(
                    "wrong dtype or shape", file=file, field=name + kind, value=value, expected=wanted
                )
            return found

        codewords = tensor(CODEWORDS, torch.int16, None).numpy().view(np.uint16)
        offsets = tensor(ROW_OFFSETS, torch.int32, rows + 1).numpy().astype(np.int64)
        levels = tensor(LEVELS, torch.bfloat16, 2 * rows)
        if name + PLACEHOLDER in tensors:
            tensor(PLACEHOLDER, torch.bfloat16, 0)
        if self._sizes.get(name) != len(codewords):
            raise CheckpointError(
                f"contradicts {SIZES}",
                file=file,
                field=name + CODEWORDS,
                value=len(codewords),
                expected=self._sizes.get(name, "an entry there"),
            )
        counts = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != len(codewords) or (counts < 0).any():
            raise CheckpointError(
                "not rising from 0 to the number of codewords",
                file=file,
                field=name + ROW_OFFSETS,
                value=f"{offsets[0]} to {offsets[-1]}",
                expected=f"0 to {len(codewords)}",
            )
        _check_rows(covered_columns(counts, codewords), counts, columns, file, name)
        try:
            frame = join_codewords(
                counts,
                codewords,
                columns,
                _as_float32(levels).reshape(rows, 2),
                self._dictionary,
                LEVEL_FORMAT,
            )
            matrix = Matrix(frame, {self._dictionary.dictionary_id: self._dictionary})
        except FormatError as error:
            raise error.with_file(f"{file}: {name}") from error
        nbytes = codewords.nbytes + 4 * (rows + 1) + levels.nbytes
        self.summary.expert_source_bytes += nbytes
        self._advance(nbytes)
        return frame, matrix

    def add_dense(self, writer: PackedModelWriter) -> None:
        """Write the other tensors."""
        for name, tensor in self._dense.items():
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
            if self._zstd:
                stored = writer.add_dense_zstd(name, dtype, shape, data)
            else:
                writer.add_dense(name, dtype, shape, data)
                stored = tensor.nbytes
            self.summary.dense_packed_bytes += stored
            self._advance(tensor.nbytes)

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress:
            self._progress(self._done, self.summary.source_bytes)


def _matrix_name(layer: LayerSpec, number: int, expert: int) -> str:
    """What the authors call a matrix: its tensor's name without ``.weight``."""
    return layer.projections[number].tensor_name(expert).removesuffix(".weight")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _as_float32(levels: torch.Tensor) -> npt.NDArray[np.float32]:
    # A bfloat16 is the upper half of a float32.
    return (levels.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _check_rows(
    covered: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], columns: int, file: Path, name: str
) -> None:
    """Refuse rows that are not sent whole, or that are longer than the matrix."""
    wrong = covered != columns + columns % 2
    if not wrong.any():
        return
    row = int(wrong.argmax())
    message = "a row's codewords do not make up the row"
    if counts[row] == 0 and len(counts) % 32 and row >= len(counts) // 32 * 32:
        message = "a row without codewords: the authors' packer drops rows beyond a multiple of 32"
    raise CheckpointError(
        message,
        file=file,
        field=f"{name}: row {row}",
        value=f"{covered[row]} columns",
        expected=f"{columns + columns % 2}",
    )


def _drop_zero_levels(trits: npt.NDArray[np.int8], levels: npt.NDArray[np.float32]) -> None:
    """Turn what is 0 because its level is into an ordinary zero, which takes far fewer bits.

    A level of minus zero is left alone: it is another number, to the bit.
    """
    zero = levels.view(np.uint32) == 0
    for column, trit in ((0, -1), (1, 1)):
        for row in np.flatnonzero(zero[:, column]).tolist():
            trits[row][trits[row] == trit] = 0


def _encode(
    trits: npt.NDArray[np.int8], levels: npt.NDArray[np.float32], dictionaries: DictionarySet
) -> bytes:
    """Encode a matrix and make sure that it decodes to itself."""
    frame = dictionaries.encode(trits, levels, LEVEL_FORMAT)
    again, levels_again = decode(frame, dictionaries.dictionaries)
    if not (np.array_equal(again, trits) and np.array_equal(levels_again.view("u4"), levels.view("u4"))):
        raise QMoEError("a matrix encoded anew does not decode to what it was; nothing was written")
    return frame
