"""From a packed model to the layout of QMoE's authors, which their program runs."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from qmoe_codec import Matrix, read_frame_header
from qmoe_codec.codewords import split_codewords
from qmoe_codec.errors import FormatError, OutputExistsError, UnsupportedModelError

from qmoe_format.container import CONFIG, INDEX, natural_key
from qmoe_format.files import PartialDirectory, copy_file, flat_names, os_errors, write_file
from qmoe_format.paths import refuse_overlap
from qmoe_format.reader import PackedLayer, PackedModel, open_model

from . import DENSE, SIZES
from .codewords import covered_columns, published_codewords
from .dictionary import published_dictionary
from .layout import (
    CODEWORDS,
    LEVELS,
    MODEL_TYPE,
    PLACEHOLDER,
    ROW_OFFSETS,
    SHARED,
    TIED,
    TORCH_DTYPES,
    expert_file,
)
from .needs_torch import torch

_MOST_CODEWORDS = (1 << 31) - 1


@dataclass(frozen=True)
class ExportSummary:
    """What :func:`export_published` wrote.

    Attributes
    ----------
    layers, experts, matrices : int
        Expert layers, experts in all, matrices in all.
    kept : int
        Matrices whose codewords were the authors' already and were taken as they are.
    bytes : int
        Of all files.
    """

    layers: int
    experts: int
    matrices: int
    kept: int
    bytes: int


def export_published(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportSummary:
    """Write a packed SwitchTransformers model as the authors of QMoE save theirs.

    What was imported from there becomes again what it was: the same tensors, to the bit. One layer of experts
    is in memory at a time, encoded.

    Parameters
    ----------
    source : path
        Directory of a packed model.
    out : path
        A new directory. It appears when it is complete.
    force : bool
        Replace `out`, if it holds nothing but such a checkpoint.
    progress : callable, optional
        Called with the bytes of the packed experts done, and the bytes in all.

    Raises
    ------
    ArgumentError, OutputExistsError
        `out` is the source, or exists already.
    UnsupportedModelError
        The model is of another architecture, or has levels that bfloat16 does not hold.
    FormatError
        The packed model is damaged.
    """
    refuse_overlap(source, out)
    with open_model(source) as model:
        if model.config.get("model_type") != MODEL_TYPE:
            raise UnsupportedModelError(
                "the layout of QMoE's authors is for SwitchTransformers models only",
                file=model.path,
                field="model_type",
                value=model.config.get("model_type"),
                expected=MODEL_TYPE,
            )
        others = sorted(model.files.keys() - model.shards.keys() - {CONFIG, INDEX})
        directory = PartialDirectory(
            out, force=force, check_replaceable=lambda path: _check_replaceable(path, set(others))
        )
        try:
            run = _Export(model, progress)
            prefixes = sorted(model.layers, key=lambda p: (not p.startswith("encoder."), natural_key(p)))
            for number, prefix in enumerate(prefixes):
                _save(run.layer(model.layer(prefix)), directory.path / expert_file(number))
            _save(run.sizes, directory.path / SIZES)
            _save(_dense(model), directory.path / DENSE)
            for name in others:
                copy_file(model.path / name, directory.path / name)
            write_file(directory.path / CONFIG, _config(model.config))
            nbytes = sum((directory.path / name).stat().st_size for name in flat_names(directory.path))
            directory.commit()
        finally:
            directory.discard()
    experts = sum(layer.experts for layer in model.layers.values())
    return ExportSummary(len(prefixes), experts, len(run.sizes), run.kept, nbytes)


class _Export:
    """One run: the matrices on their way, and the count."""

    def __init__(self, model: PackedModel, progress: Callable[[int, int], None] | None) -> None:
        self.sizes: dict[str, int] = {}
        self.kept = 0
        self._progress = progress
        self._done = 0
        self._total = sum(len(model.layer(prefix).store) for prefix in model.layers)

    def layer(self, layer: PackedLayer) -> dict[str, torch.Tensor]:
        """The tensors of one ``expNN.pt``."""
        tensors: dict[str, torch.Tensor] = {}
        for expert in range(layer.experts):
            for number, frame in enumerate(layer.frames(expert)):
                place = layer.place(expert, number)
                name = layer.spec.projections[number].tensor_name(expert).removesuffix(".weight")
                counts, codewords, levels = self._matrix(frame, layer, place)
                if len(codewords) > _MOST_CODEWORDS:
                    raise UnsupportedModelError("too many codewords", file=place, value=len(codewords))
                offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
                bits = (levels.view(np.uint32) >> 16).astype(np.uint16).reshape(-1)
                tensors[name + CODEWORDS] = torch.from_numpy(codewords.astype(np.uint16).view(np.int16))
                tensors[name + ROW_OFFSETS] = torch.from_numpy(offsets)
                tensors[name + LEVELS] = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
                tensors[name + PLACEHOLDER] = torch.zeros(0, dtype=torch.bfloat16)
                self.sizes[name] = len(codewords)
            self._done += len(layer.record(expert)) + len(layer.padding(expert))
            if self._progress:
                self._progress(self._done, self._total)
        return tensors

    def _matrix(
        self, frame: memoryview, layer: PackedLayer, place: str
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer], npt.NDArray[np.float32]]:
        """Counts, codewords and levels of a matrix."""
        try:
            matrix = Matrix(frame, layer.dictionaries)
        except FormatError as error:
            raise error.with_file(place) from error
        levels = matrix.levels
        if (levels.view(np.uint32) & 0xFFFF).any():
            raise UnsupportedModelError(
                "levels that bfloat16 does not hold, which is all that this layout has for them",
                file=place,
                field="levels",
                expected="a model packed with --level-format bfloat16 or e4m4",
            )
        if read_frame_header(frame).dictionary_ids == (published_dictionary().dictionary_id,):
            counts, codewords = split_codewords(frame)
            if (covered_columns(counts, codewords) == matrix.columns + matrix.columns % 2).all():
                self.kept += 1
                return counts, codewords, levels
        trits = matrix.decode()
        _as_the_authors_pack(trits, levels)
        return *published_codewords(trits), levels


def _as_the_authors_pack(trits: npt.NDArray[np.int8], levels: npt.NDArray[np.float32]) -> None:
    """Rename weights that two symbols could stand for: the greatest first, then the least, then zero."""
    bits = levels.view(np.uint32)
    for row in np.flatnonzero((bits[:, 0] == 0) | (bits[:, 1] == 0) | (bits[:, 0] == bits[:, 1])).tolist():
        low, high = bits[row].tolist()
        if low == 0:
            trits[row][trits[row] == 0] = -1
        if high == 0:
            trits[row][trits[row] == 0] = 1
        if low == high:
            trits[row][trits[row] == -1] = 1


def _dense(model: PackedModel) -> dict[str, torch.Tensor]:
    """All tensors but the experts', the embeddings under each of their names."""
    tensors: dict[str, torch.Tensor] = {}
    for name in model.dense_names():
        dtype, shape, data = model.dense(name)
        if dtype not in TORCH_DTYPES:
            raise UnsupportedModelError(
                "no such dtype in this layout",
                file=model.path,
                field=name,
                value=dtype,
                expected=", ".join(TORCH_DTYPES),
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mapped file cannot be written, which nobody tries
            flat = torch.from_numpy(np.frombuffer(data, np.uint8))
        tensors[name] = flat.view(TORCH_DTYPES[dtype]).reshape(shape)
    if model.config.get("tie_word_embeddings", True) and SHARED in tensors:
        for name in TIED:
            tensors.setdefault(name, tensors[SHARED])
    return tensors


def _config(config: Mapping[str, object]) -> bytes:
    """The model's own configuration, with the dtype under the name that their transformers knows."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    kept.setdefault("torch_dtype", "bfloat16")
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def _save(value: object, path: Path) -> None:
    with os_errors(path):
        torch.save(value, path)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _check_replaceable(out: Path, others: set[str]) -> None:
    """Refuse to replace anything but a checkpoint that :func:`export_published` may have written."""
    names = flat_names(out)
    own = {*others, CONFIG, DENSE, SIZES}
    foreign = [name for name in names if name not in own and not re.fullmatch(r"exp[0-9]{2,}\.pt", name)]
    if foreign or (names and DENSE not in names):
        raise OutputExistsError(
            "will not be replaced: not a checkpoint in the layout of QMoE's authors, or not only that",
            file=out,
            value=foreign[0] if foreign else None,
            expected="nothing else; move or delete it yourself",
        )
