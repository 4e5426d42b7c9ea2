"""From a packed model back to an ordinary checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qmoe_codec import dequantize
from qmoe_codec.errors import ArgumentError, FormatError, OutputExistsError, UnsupportedModelError

from .container import CONFIG, INDEX, MANIFEST, RECORD_ALIGNMENT, LayerSpec, natural_key, round_up
from .files import PartialDirectory, copy_file, flat_names, os_errors, write_file
from .paths import refuse_overlap
from .reader import PackedLayer, PackedModel, open_model
from .safetensors_io import DTYPE_BITS, SafetensorsWriter, header_entry_bytes, tensor_bytes

SHARD_BYTES = 5_000_000_000
SINGLE = "model.safetensors"
#: Safetensors dtype of unpacked experts -> name that the codec has for it.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_SHARD = re.compile(r"model-[0-9]{5,}-of-[0-9]{5,}\.safetensors")


@dataclass(frozen=True)
class UnpackSummary:
    """What :func:`unpack` wrote.

    Attributes
    ----------
    tensors, experts : int
        Tensors in all; experts among them, each of several tensors.
    bytes : int
        Bytes of all tensors.
    shards : int
        Safetensors files.
    """

    tensors: int
    experts: int
    bytes: int
    shards: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write; the other attributes say what it is made from, if it holds experts."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layer: PackedLayer | None = None
    experts: range = range(0)
    projections: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)

    def pieces(self, model: PackedModel) -> Iterator[memoryview]:
        """Its bytes, in row order, an expert at a time."""
        if self.layer is None:
            yield model.dense(self.name)[2]
            return
        for expert in self.experts:
            matrices = [self._matrix(self.layer, expert, number) for number in self.projections]
            yield (
                np.ascontiguousarray(_fuse(self.layer.spec, self.projections, matrices))
                .reshape(-1)
                .view(np.uint8)
                .data
            )

    def _matrix(self, layer: PackedLayer, expert: int, number: int) -> NDArray[Any]:
        frame = layer.frames(expert)[number]
        try:
            weight: NDArray[Any] = dequantize(frame, layer.dictionaries, DTYPES[self.dtype])
        except FormatError as error:
            raise error.with_file(layer.place(expert, number)) from error
        return weight


def _fuse(spec: LayerSpec, numbers: tuple[int, ...], matrices: list[NDArray[Any]]) -> NDArray[Any]:
    """One expert's part of a tensor: its only matrix, or the fused ones as the original had them."""
    projections = [spec.projections[number] for number in numbers]
    first = projections[0]
    if not first.fused:
        return matrices[0]
    fused = np.empty((spec.fused_rows(first).total, first.columns), matrices[0].dtype)
    for projection, matrix in zip(projections, matrices, strict=True):
        fused[spec.fused_rows(projection).part(projection.rows)] = matrix
    return fused.T if first.transposed else fused


def unpack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> UnpackSummary:
    """Write a packed model as an ordinary safetensors checkpoint, which transformers loads unchanged.

    Every expert's matrix gets back to where it was, under its original name, with the ternary values; other
    tensors are those of the source checkpoint, bit for bit. One tensor is in memory at a time, of a fused one
    the part of one expert.

    Parameters
    ----------
    source : path
        Directory of a packed model.
    out : path
        A new directory. It appears when it is complete.
    dtype : {"BF16", "F16", "F32"}, optional
        Of the experts; by default their original one.
    force : bool
        Replace `out`, if it holds nothing but such a checkpoint of the same model.
    shard_bytes : int
        Files larger than this are split, between tensors.
    progress : callable, optional
        Called with the bytes written and the bytes in all.

    Raises
    ------
    ArgumentError, OutputExistsError
        `out` is the source, or exists already.
    FormatError
        The packed model is damaged.
    UnsupportedModelError
        The experts' original dtype is none of the three, and `dtype` was not given.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError("unknown", field="dtype", value=dtype, expected=" or ".join(DTYPES))
    refuse_overlap(source, out)
    with open_model(source) as model:
        tensors = sorted(_tensors(model, dtype), key=lambda tensor: natural_key(tensor.name))
        shards = _deal(tensors, shard_bytes)
        others = sorted(model.files.keys() - model.shards.keys() - {CONFIG, INDEX})
        directory = PartialDirectory(
            out,
            force=force,
            check_replaceable=lambda path: _check_replaceable(path, {*others, CONFIG, INDEX, SINGLE}),
        )
        try:
            _write(model, shards, directory.path, sum(tensor.nbytes for tensor in tensors), progress)
            for name in others:
                copy_file(model.path / name, directory.path / name)
            config = {key: value for key, value in model.config.items() if key != "quantization_config"}
            write_file(directory.path / CONFIG, _json(config))
            directory.commit()
        finally:
            directory.discard()
    return UnpackSummary(
        tensors=len(tensors),
        experts=sum(layer.experts for layer in model.layers.values()),
        bytes=sum(tensor.nbytes for tensor in tensors),
        shards=len(shards),
    )


def _tensors(model: PackedModel, dtype: str | None) -> Iterator[_Tensor]:
    """All tensors of the original checkpoint."""
    for name in model.dense_names():
        info = model.dense_info(name)
        yield _Tensor(name, info.dtype, info.shape)
    for prefix, spec in model.layers.items():
        if (dtype or spec.dtype) not in DTYPES:
            raise UnsupportedModelError(
                "cannot be unpacked to this dtype; choose one with --dtype",
                file=model.path,
                field=prefix,
                value=spec.dtype,
                expected=" or ".join(DTYPES),
            )
        layer = model.layer(prefix)
        sharing: dict[str, list[int]] = {}
        for number, projection in enumerate(spec.projections):
            sharing.setdefault(projection.tensor, []).append(number)
        for numbers in sharing.values():
            first = spec.projections[numbers[0]]
            if first.fused:
                sides = (spec.fused_rows(first).total, first.columns)
                shape = (spec.experts, *(sides[::-1] if first.transposed else sides))
                yield _Tensor(
                    first.tensor, dtype or spec.dtype, shape, layer, range(spec.experts), tuple(numbers)
                )
                continue
            for expert in range(spec.experts):
                yield _Tensor(
                    first.tensor_name(expert),
                    dtype or spec.dtype,
                    (first.rows, first.columns),
                    layer,
                    range(expert, expert + 1),
                    tuple(numbers),
                )


def _deal(tensors: list[_Tensor], limit: int) -> list[list[_Tensor]]:
    """Share the tensors out, in order, to files of at most `limit` bytes."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write(
    model: PackedModel,
    shards: list[list[_Tensor]],
    directory: Path,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write the safetensors files and, if there are several, their index."""
    weight_map, done = {}, 0
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = 256 + sum(header_entry_bytes(tensor.name, len(tensor.shape)) for tensor in shard)
        writer = SafetensorsWriter(directory / name, round_up(header, RECORD_ALIGNMENT))
        try:
            # Wide elements first, so that each tensor is aligned to its elements.
            for tensor in sorted(shard, key=lambda tensor: -DTYPE_BITS[tensor.dtype]):
                writer.begin(tensor.name, len(tensor.shape))
                for piece in tensor.pieces(model):
                    writer.write(piece)
                writer.end(tensor.dtype, tensor.shape)
                weight_map[tensor.name] = name
                done += tensor.nbytes
                if progress:
                    progress(done, total)
            writer.close()
        finally:
            writer.abort()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(directory / INDEX, _json(index))


def _check_replaceable(out: Path, names: set[str]) -> None:
    """Refuse to replace anything but a checkpoint that :func:`unpack` may have written of the same model."""
    for name in flat_names(out):
        if name == MANIFEST or (name not in names and not _SHARD.fullmatch(name)):
            raise OutputExistsError(
                "will not be replaced: it holds a file that is not of an unpacked checkpoint of this model",
                file=out,
                value=name,
                expected="nothing else; move or delete it yourself",
            )
    # An unpacked model's configuration has no trace of the format.
    with os_errors(out):
        config = out / CONFIG
        if config.exists() and b'"quantization_config"' in config.read_bytes():
            raise OutputExistsError("will not be replaced: it is a quantized model", file=out)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
