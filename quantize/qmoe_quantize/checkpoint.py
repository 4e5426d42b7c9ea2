"""Source checkpoints: safetensors in a local directory, in one file, or on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
from qmoe_codec.errors import (
    CheckpointError,
    HeaderError,
    MissingPackageError,
    QMoEError,
    TruncatedError,
    UnsupportedModelError,
)

from qmoe_format.container import EXPERT, LayerSpec, Projection
from qmoe_format.files import is_plain_name, open_regular, os_errors, read_json_object
from qmoe_format.safetensors_io import SafetensorsFile, TensorInfo, tensor_bytes

from .config import ModelConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_DTYPES = ("BF16", "F16", "F32")

# What belongs to a checkpoint beside its weights: tokenizer, generation settings, licence, model card.
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".md")
_COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE")
_REPLACED = ("config.json", "manifest.json", INDEX)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class SourceCheckpoint:
    """A checkpoint to be packed. Headers are read at once, tensors one at a time.

    Tensors are read, not mapped: pages of a map count as memory of the process, and a file cut short while it
    is mapped ends the process instead of raising an error.

    Parameters
    ----------
    source : str or Path
        A directory with ``config.json`` and ``model.safetensors`` or ``model.safetensors.index.json``; or a
        ``.safetensors`` file with ``config.json`` beside it; or the name of a model on the Hugging Face hub.

    Attributes
    ----------
    config : ModelConfig
        The model's configuration.
    directory : Path
        Where its files lie.
    tensors : dict of str to TensorInfo
        All tensors, in the order of the files and within them of the bytes.

    Raises
    ------
    CheckpointError
        There is no checkpoint, or a file of it is missing.
    FormatError
        A safetensors file or an index is not what its format says.
    MissingPackageError
        A hub name was given and ``huggingface_hub`` is not installed.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        path = locate(source)
        single = path if path.is_file() else path / SINGLE
        self.directory = single.parent
        self.config = ModelConfig.read(self.directory / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        if single.exists():
            self._add(single)
        elif (self.directory / INDEX).exists():
            self._add_shards(self.directory / INDEX)
        else:
            raise _no_weights(self.directory)

    def _add(self, file: Path) -> None:
        with SafetensorsFile(file) as opened:
            for name, tensor in opened.tensors.items():
                if name in self._files:
                    raise CheckpointError(
                        "in two shards", file=file, field=name, value=self._files[name].name, expected="one"
                    )
                self._files[name] = file
                self.tensors[name] = tensor

    def _add_shards(self, index: Path) -> None:
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise HeaderError("missing or empty", file=index, field="weight_map", expected="tensor -> shard")
        for shard in sorted(set(map(str, weight_map.values()))):
            if not is_plain_name(shard):
                raise HeaderError("illegal shard name", file=index, field="weight_map", value=repr(shard))
            if not (self.directory / shard).exists():
                raise CheckpointError(
                    "shard is missing", file=self.directory / shard, expected=f"as {INDEX} says"
                )
            self._add(self.directory / shard)
        for name, shard in weight_map.items():
            if name not in self._files or self._files[name].name != shard:
                raise CheckpointError(
                    "missing from its shard",
                    file=self.directory / str(shard),
                    field=name,
                    expected=f"as {INDEX} says",
                )

    @property
    def other_files(self) -> list[Path]:
        """Files to copy along: tokenizer, generation settings, licence."""
        return files_beside(self.directory)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def data(self, name: str) -> bytearray:
        """The bytes of a tensor.

        Raises
        ------
        TruncatedError
            The file has become shorter since its header was read.
        """
        return self._read(name, 0, self.tensors[name].nbytes)

    def data_start(self, name: str, nbytes: int) -> bytearray:
        """The first `nbytes` of :meth:`data`; only they are read."""
        return self._read(name, 0, nbytes)

    def data_piece(self, name: str, start: int, nbytes: int) -> bytearray:
        """Bytes [start, start + nbytes) of :meth:`data`; only they are read."""
        return self._read(name, start, nbytes)

    def matrix(self, layer: LayerSpec, projection: Projection, expert: int) -> npt.NDArray[np.float32]:
        """An expert's matrix as float32 [rows, columns], wherever in the checkpoint it lies.

        Raises
        ------
        CheckpointError
            Some weights are infinite or not a number.
        UnsupportedModelError
            It is of a dtype that cannot be packed.
        """
        return self.matrix_rows(layer, projection, expert, 0, projection.rows)

    def matrix_rows(
        self, layer: LayerSpec, projection: Projection, expert: int, start: int, stop: int
    ) -> npt.NDArray[np.float32]:
        """Rows [start, stop) of :meth:`matrix`; only they are read, or all of a fused tensor's expert."""
        name, columns = projection.tensor_name(expert), projection.columns
        if not projection.fused:
            return self._floats(name, start * columns, (stop - start) * columns).reshape(-1, columns)
        rows = layer.fused_rows(projection)
        weight = self._floats(name, expert * rows.total * columns, rows.total * columns)
        if projection.transposed:
            weight = weight.reshape(columns, rows.total).T
        part = weight.reshape(rows.total, columns)[rows.part(projection.rows)]
        return np.ascontiguousarray(part[start:stop])

    def bias(self, layer: LayerSpec, projection: Projection, expert: int) -> npt.NDArray[np.float32] | None:
        """What a projection of an expert adds, as float32 [rows]; None where it adds nothing.

        Raises
        ------
        CheckpointError, UnsupportedModelError
            As for :meth:`matrix`.
        """
        if projection.bias is None:
            return None
        if not projection.fused:
            return self._floats(projection.bias.replace(EXPERT, str(expert)), 0, projection.rows)
        rows = layer.fused_rows(projection)
        values = self._floats(projection.bias, expert * rows.total, rows.total)
        return np.ascontiguousarray(values[rows.part(projection.rows)])

    def _floats(self, name: str, start: int, count: int) -> npt.NDArray[np.float32]:
        """Elements [start, start + count) of a tensor of weights."""
        tensor = self.tensors[name]
        if tensor.dtype not in WEIGHT_DTYPES:
            raise UnsupportedModelError(
                "no weights",
                file=self._files[name],
                field=name,
                value=tensor.dtype,
                expected=" or ".join(WEIGHT_DTYPES),
            )
        size = tensor_bytes(tensor.dtype, (1,))
        weight = _as_float32(self._read(name, start * size, count * size), tensor.dtype)
        if weight.size and not np.isfinite((weight.min(), weight.max())).all():  # both pass NaN on
            raise CheckpointError(
                "weights that are NaN or infinite",
                file=self._files[name],
                field=name,
                value=f"{int((~np.isfinite(weight)).sum())} of {weight.size}",
                expected="finite weights",
            )
        return weight

    def _read(self, name: str, start: int, nbytes: int) -> bytearray:
        file, tensor = self._files[name], self.tensors[name]
        buffer = bytearray(nbytes)
        view = memoryview(buffer)
        descriptor = open_regular(file)
        try:
            position = tensor.start + start
            while view.nbytes:
                with os_errors(file):
                    count = os.preadv(descriptor, [view], position)
                if not count:
                    raise TruncatedError(
                        "the file ends within it", file=file, field=name, expected=tensor.end
                    )
                view, position = view[count:], position + count
        finally:
            os.close(descriptor)
        return buffer


def locate(source: str | os.PathLike[str], *, only_config: bool = False) -> Path:
    """The local directory or file that `source` stands for; a hub name is downloaded.

    Parameters
    ----------
    source : str or Path
        As for :class:`SourceCheckpoint`.
    only_config : bool
        From the hub, fetch nothing but ``config.json``.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".safetensors" or only_config:
            return path
        raise CheckpointError("not a checkpoint", file=path, expected="a directory or a .safetensors file")
    if _HUB_NAME.fullmatch(str(source)) and not path.parent.exists():
        return _download(str(source), only_config)
    raise CheckpointError(
        "not found", file=path, expected="a checkpoint directory, a .safetensors file or a hub name"
    )


def files_beside(directory: Path) -> list[Path]:
    """What belongs to a checkpoint beside weights and configuration: tokenizer, licence and the like."""
    return sorted(
        file
        for file in directory.iterdir()
        if file.is_file()
        and is_plain_name(file.name)
        and not file.name.startswith(".")
        and not file.name.endswith(".index.json")
        and file.name not in _REPLACED
        and (file.suffix in _COPIED_SUFFIXES or file.name in _COPIED_NAMES)
    )


def has_weights(path: Path) -> bool:
    """Whether weights lie at a path that :func:`locate` gave, so that their headers can be read."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return (path / SINGLE).exists() or ((path / INDEX).exists() and any(path.glob("*.safetensors")))


def _as_float32(data: bytearray, dtype: str) -> npt.NDArray[np.float32]:
    """Elements of `dtype` as float32, which holds each of them exactly."""
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        bits = np.frombuffer(data, "<u2").astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return np.frombuffer(data, "<f2" if dtype == "F16" else "<f4").astype(np.float32, copy=False)


def _no_weights(directory: Path) -> CheckpointError:
    hint = ""
    if any(directory.glob("*.bin")):
        hint = "; the .bin files are pickled: load and save them again with transformers"
    return CheckpointError(f"no weights{hint}", file=directory, expected=f"{SINGLE} or {INDEX}")


def _download(name: str, only_config: bool) -> Path:
    """Fetch a model from the hub into its cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingPackageError(
            "not a local path, and fetching from the hub needs a package: pip install 'qmoe-format[hub]'",
            file=name,
        ) from None
    patterns = ["config.json"]
    if not only_config:
        patterns += [
            "model*.safetensors",
            INDEX,
            *(f"*{suffix}" for suffix in _COPIED_SUFFIXES),
            *_COPIED_NAMES,
        ]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (
        OSError,
        ValueError,
    ) as error:  # the hub's own errors, and its complaint about a name, are among these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QMoEError(f"not a local path, and not to be had from the hub: {reason}", file=name) from error
