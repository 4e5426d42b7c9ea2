"""Read a packed model: every file mapped, every header checked, nothing decoded until asked for (spec 6)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
from qmoe_codec import MEMORY_LIMIT, Dictionary, Matrix, parse_dictionaries, read_frame_header
from qmoe_codec.errors import (
    ArgumentError,
    FormatError,
    HeaderError,
    MemoryLimitError,
    MissingDictionaryError,
    RowIndexError,
    SizeError,
)

from .container import (
    CONFIG,
    DICTIONARIES,
    RECORD_ALIGNMENT,
    RESERVED_SUFFIXES,
    SECTION,
    STORE,
    STORE_INDEX,
    ZSTD,
    LayerSpec,
    QuantizationConfig,
    read_index,
    read_manifest,
)
from .dense import decode_dense, read_dense_header
from .files import read_json_object
from .safetensors_io import FileRecord, SafetensorsFile, TensorInfo

_FRAME_HEADER_BYTES = 64


@dataclass(frozen=True)
class DenseTensor:
    """A tensor that is not an expert.

    Attributes
    ----------
    dtype : str
        Safetensors name.
    shape : tuple of int
    nbytes, stored_bytes : int
        Bytes of the tensor, and those it takes in the file.
    compressed : bool
        Whether it is stored as a dense frame.
    shard : str
        File it lies in.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    stored_bytes: int
    compressed: bool
    shard: str


class PackedLayer:
    """The experts of one layer: :meth:`PackedModel.layer` gives those of a file.

    Parameters
    ----------
    spec : LayerSpec
    store, index, dictionary_bytes
        Contents of the layer's three tensors; they are kept, not copied.
    place : str
        What to call the layer in messages.
    shard : str, optional
        File that it lies in.
    memory_limit : int
        Given to the matrices.

    Attributes
    ----------
    spec : LayerSpec
        Experts, projections, original dtype.
    experts : int
        Number of experts.
    index : int64 array [experts, 3]
        Per expert: offset in the store, bytes of the record, tokens seen in calibration or −1.
    store : memoryview
        All records; a view of the mapped file.
    dictionary_bytes : memoryview
        The dictionary frames, one after the other.
    shard : str
        File that holds the layer.
    """

    def __init__(
        self,
        spec: LayerSpec,
        store: memoryview,
        index: npt.NDArray[np.int64],
        dictionary_bytes: memoryview,
        *,
        place: str,
        shard: str = "",
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self.spec = spec
        self.experts = spec.experts
        self.store = store
        self.index = index
        self.dictionary_bytes = dictionary_bytes
        self.shard = shard
        self._place = place
        self._memory_limit = memory_limit
        self._dictionaries: dict[int, Dictionary] | None = None
        self._check_index()

    @classmethod
    def from_file(
        cls,
        spec: LayerSpec,
        file: SafetensorsFile,
        sizes: tuple[int, int],
        memory_limit: int = MEMORY_LIMIT,
    ) -> PackedLayer:
        """The layer in a shard; `sizes` are those of store and dictionaries in ``config.json``."""
        names = [spec.prefix + suffix for suffix in (STORE, STORE_INDEX, DICTIONARIES)]
        for name, dtype, shape in zip(
            names,
            ("U8", "I64", "U8"),
            ((sizes[0],), (spec.experts, 3), (sizes[1],)),
            strict=True,
        ):
            tensor = file.tensors[name]
            if tensor.dtype != dtype or len(tensor.shape) != len(shape):
                raise HeaderError(
                    "wrong dtype or shape",
                    file=file.path,
                    field=name,
                    value=f"{tensor.dtype} {list(tensor.shape)}",
                    expected=f"{dtype} {list(shape)}",
                )
            if tensor.shape != shape:
                raise SizeError(
                    f"contradicts {CONFIG}",
                    file=file.path,
                    field=name,
                    value=list(tensor.shape),
                    expected=list(shape),
                )
        start = file.tensors[names[0]].start
        if start % RECORD_ALIGNMENT:
            raise HeaderError(
                "does not start at a multiple of 256",
                file=file.path,
                field=names[0],
                value=start,
                expected=f"a multiple of {RECORD_ALIGNMENT}",
            )
        store, table, dictionaries = (file.data(name) for name in names)
        index = np.frombuffer(table, "<i8").reshape(spec.experts, 3)
        place = f"{file.path}: {spec.prefix}"
        return cls(
            spec,
            store,
            index,
            dictionaries,
            place=place,
            shard=file.path.name,
            memory_limit=memory_limit,
        )

    def _check_index(self) -> None:
        """The rule of spec 6.1, pair by pair, so that no sum can leave 64 bits."""
        offsets, sizes, tokens = self.index.T
        total = len(self.store)
        following = np.append(offsets[1:], total)
        ends = -(-(offsets + sizes) // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
        outside = (offsets < 0) | (offsets > total) | (sizes < 0) | (sizes > total)
        wrong = outside | (tokens < -1) | (ends != following)
        wrong[0] |= offsets[0] != 0
        if wrong.any():
            expert = int(wrong.argmax())
            raise RowIndexError(
                "illegal offset, size or tokens",
                file=self._place,
                field=f"qmoe_index: expert {expert}",
                value=self.index[expert].tolist(),
                expected=f"records one after the other at multiples of 256 in {total} bytes, tokens ≥ -1",
            )

    def detached(self) -> PackedLayer:
        """The same layer with index and dictionaries in memory: a file cut short cannot take them away.

        The store is the same view; nothing of it is touched unless a record is asked for.
        """
        return PackedLayer(
            self.spec,
            self.store,
            self.index.copy(),
            memoryview(bytes(self.dictionary_bytes)),
            place=self._place,
            shard=self.shard,
            memory_limit=self._memory_limit,
        )

    @property
    def dictionaries(self) -> dict[int, Dictionary]:
        """The layer's dictionaries by id, parsed when first asked for.

        Raises
        ------
        FormatError
            A dictionary frame is illegal.
        """
        if self._dictionaries is None:
            place = f"{self._place}: qmoe_dictionaries"
            try:
                parsed = parse_dictionaries(self.dictionary_bytes)
            except FormatError as error:
                raise error.with_file(place) from error
            size = sum(len(dictionary.frame) for dictionary in parsed.values())
            if list(parsed) != sorted(parsed) or size != len(self.dictionary_bytes):
                raise HeaderError("ids do not rise, or one comes twice", file=place, field="dictionary_id")
            self._dictionaries = parsed
        return self._dictionaries

    def _locate(self, expert: int) -> tuple[int, int]:
        if not 0 <= expert < self.experts:
            raise ArgumentError(
                "no such expert", file=self._place, value=expert, expected=f"0 to {self.experts - 1}"
            )
        offset, size, _ = self.index[expert].tolist()
        return offset, size

    def place(self, expert: int, projection: int | None = None) -> str:
        """Where an expert, or one matrix of it, lies, for messages: file, layer, expert, projection."""
        name = "" if projection is None else f": {self.spec.projections[projection].name}"
        return f"{self._place}: expert {expert}{name}"

    def record(self, expert: int) -> memoryview:
        """An expert's frames as one read-only view of the mapped file.

        Raises
        ------
        ArgumentError
            There is no such expert.
        """
        offset, size = self._locate(expert)
        return self.store[offset : offset + size]

    def padding(self, expert: int) -> memoryview:
        """The zero bytes between an expert's record and the next one."""
        offset, size = self._locate(expert)
        end = offset + size
        return self.store[end : end - end % -RECORD_ALIGNMENT]

    def frames(self, expert: int) -> list[memoryview]:
        """An expert's matrix frames, one per projection.

        Their headers are checked against the layer: rows, columns, sizes and dictionaries.

        Raises
        ------
        FormatError
            A header is illegal, or is not what the layer says.
        """
        return self.split_record(expert, self.record(expert))

    def split_record(self, expert: int, record: memoryview) -> list[memoryview]:
        """The same for a record that was read by other means: see :meth:`frames`."""
        frames, position = [], 0
        for number, projection in enumerate(self.spec.projections):
            rest = len(record) - position
            if rest < _FRAME_HEADER_BYTES:
                raise SizeError(
                    "the record ends before this frame",
                    file=self.place(expert, number),
                    value=f"{rest} bytes",
                    expected="exactly one frame per projection",
                )
            try:
                header = read_frame_header(record, position)
            except FormatError as error:
                raise error.with_file(self.place(expert, number)) from error
            if (header.rows, header.columns) != (projection.rows, projection.columns):
                raise HeaderError(
                    f"not the projection's in {CONFIG}",
                    file=self.place(expert, number),
                    field="rows, columns",
                    value=(header.rows, header.columns),
                    expected=(projection.rows, projection.columns),
                )
            if header.frame_size > rest:
                raise SizeError(
                    "the frame reaches past the record",
                    file=self.place(expert, number),
                    field="body_size",
                    value=f"{header.frame_size} bytes",
                    expected=f"at most {rest} bytes",
                )
            for identity in header.dictionary_ids:
                if identity not in self.dictionaries:
                    raise MissingDictionaryError(
                        "not among the layer's",
                        file=self.place(expert, number),
                        field="dictionary_ids",
                        value=f"{identity:#010x}",
                        expected=", ".join(f"{known:#010x}" for known in self.dictionaries) or "none",
                    )
            frames.append(record[position : position + header.frame_size])
            position += header.frame_size
        if position != len(record):
            raise SizeError(
                "bytes after the last frame of the record",
                file=self.place(expert),
                value=f"{len(record)} bytes",
                expected=f"{position} bytes",
            )
        return frames

    def matrix(self, expert: int, projection: str, *, verify: bool = True) -> Matrix:
        """One matrix of an expert, parsed and ready to multiply with.

        Parameters
        ----------
        expert : int
        projection : str
            Its name, such as ``gate_proj``.
        verify : bool
            Check checksum and payload as well; the header, its fit to the layer, and the row index are
            always checked. That reads the whole frame, at 2.2 GB/s of one core or more, and so takes three to
            six times as long (``benchmarks/results/verify.json``).

        Raises
        ------
        ArgumentError
            There is no such expert or projection.
        FormatError
            The frame is illegal.
        """
        number = self.spec.projections.index(self.spec.projection(projection))
        return self._parse(expert, number, self.frames(expert)[number], verify)

    def parse_frames(
        self, expert: int, frames: Sequence[memoryview], *, verify: bool = True
    ) -> dict[str, Matrix]:
        """All matrices of an expert by name, from what :meth:`frames` or :meth:`split_record` gave."""
        return {
            projection.name: self._parse(expert, number, frame, verify)
            for number, (projection, frame) in enumerate(zip(self.spec.projections, frames, strict=True))
        }

    def _parse(self, expert: int, number: int, frame: memoryview, verify: bool) -> Matrix:
        try:
            return Matrix(frame, self.dictionaries, verify=verify, memory_limit=self._memory_limit)
        except FormatError as error:
            raise error.with_file(self.place(expert, number)) from error


class PackedModel:
    """A packed model, opened by :func:`open_model`; a context manager.

    Attributes
    ----------
    path : Path
        Its directory.
    config : dict
        The whole of ``config.json``.
    layers : dict of str to LayerSpec
        By prefix, in natural order.
    files : dict of str to FileRecord
        What the manifest says: size and SHA-256 of every file.
    shards : dict of str to SafetensorsFile
        The mapped shards.
    """

    def __init__(self, path: str | os.PathLike[str], *, memory_limit: int = MEMORY_LIMIT) -> None:
        self.path = Path(path)
        self._memory_limit = memory_limit
        if not self.path.is_dir():
            raise ArgumentError(
                "no such directory", file=self.path, expected="the directory of a packed model"
            )
        self.files: dict[str, FileRecord] = read_manifest(self.path)
        self.config = read_json_object(self.path / CONFIG)
        self._quantization = QuantizationConfig.parse(self.config, self.path / CONFIG)
        self.layers = self._quantization.layers
        index = read_index(self.path, self.files)
        self.shards = {name: SafetensorsFile(self.path / name) for name in index}
        self._owners: dict[str, SafetensorsFile] = {}
        for name, tensors in index.items():
            self._own(self.shards[name], tensors)
        self._layers = {prefix: self._open_layer(prefix) for prefix in self.layers}
        self._dense = self._open_dense()
        self._check_biases()

    def _own(self, file: SafetensorsFile, indexed: dict[str, None]) -> None:
        """Compare a shard's tensors with those that the index has for it."""
        for name in [
            *(n for n in indexed if n not in file.tensors),
            *(n for n in file.tensors if n not in indexed),
        ]:
            fault = (
                "in the index but not in the shard"
                if name in indexed
                else "in the shard but not in the index"
            )
            raise HeaderError(fault, file=file.path, field=name)
        self._owners.update(dict.fromkeys(indexed, file))

    def _open_layer(self, prefix: str) -> PackedLayer:
        names = [prefix + suffix for suffix in (STORE, STORE_INDEX, DICTIONARIES)]
        for name in names:
            if name not in self._owners:
                raise HeaderError(f"missing tensor of a layer in {CONFIG}", file=self.path, field=name)
            if self._owners[name] is not self._owners[names[0]]:
                raise HeaderError(
                    "not in one shard with the layer's store",
                    file=self._owners[name].path,
                    field=name,
                    expected=self._owners[names[0]].path.name,
                )
        return PackedLayer.from_file(
            self.layers[prefix],
            self._owners[names[0]],
            self._quantization.layer_bytes[prefix],
            self._memory_limit,
        )

    def _open_dense(self) -> dict[str, str]:
        """Name of each dense tensor → name under which it is stored."""
        expert = {prefix + suffix for prefix in self.layers for suffix in (STORE, STORE_INDEX, DICTIONARIES)}
        frames = {name + ZSTD: name for name in self._quantization.dense_zstd}
        dense: dict[str, str] = {}
        for stored, file in self._owners.items():
            if stored in expert:
                continue
            if stored.endswith(RESERVED_SUFFIXES) and stored not in frames:
                raise HeaderError(f"belongs to nothing in {CONFIG}", file=file.path, field=stored)
            if SECTION.search(stored) and stored not in frames:
                continue  # an optional section of a later minor version
            name = frames.get(stored, stored)
            if name in dense:
                raise HeaderError("stored both plain and as a dense frame", file=file.path, field=name)
            dense[name] = stored
        for stored, name in frames.items():
            size = self._quantization.dense_zstd[name]
            if stored not in self._owners:
                raise HeaderError(f"missing dense frame of {CONFIG}", file=self.path, field=stored)
            file = self._owners[stored]
            tensor = file.tensors[stored]
            if tensor.dtype != "U8" or len(tensor.shape) != 1:
                raise HeaderError(
                    "wrong dtype or shape",
                    file=file.path,
                    field=stored,
                    value=f"{tensor.dtype} {list(tensor.shape)}",
                    expected="U8 [bytes]",
                )
            if tensor.nbytes != size:
                raise SizeError(
                    f"contradicts dense_zstd in {CONFIG}",
                    file=file.path,
                    field=stored,
                    value=tensor.nbytes,
                    expected=size,
                )
        return dict(sorted(dense.items()))

    def _check_biases(self) -> None:
        """Tensors of biases that layers name are there, in the shape of spec 6.3."""
        for spec in self.layers.values():
            for projection in spec.projections:
                if projection.bias is None:
                    continue
                shape: tuple[int, ...] = (projection.rows,)
                if projection.fused:
                    shape = (spec.experts, spec.fused_rows(projection).total)
                for name in spec.expanded([projection.bias]):
                    found = self.dense_info(name).shape if name in self._dense else None
                    if found != shape:
                        raise HeaderError(
                            "wrong shape" if found is not None else f"missing tensor of a layer in {CONFIG}",
                            file=self.path,
                            field=name,
                            value=None if found is None else list(found),
                            expected=list(shape),
                        )

    def layer(self, prefix: str) -> PackedLayer:
        """The experts of a layer.

        Raises
        ------
        ArgumentError
            There is no such layer.
        """
        if prefix not in self._layers:
            raise ArgumentError(
                "no such layer", file=self.path, value=repr(prefix), expected=list(self._layers)
            )
        return self._layers[prefix]

    def dense_names(self) -> list[str]:
        """Original names of all tensors that are not experts, sorted."""
        return list(self._dense)

    def _stored(self, name: str) -> tuple[str, SafetensorsFile, TensorInfo]:
        if name not in self._dense:
            raise ArgumentError("no such dense tensor", file=self.path, value=repr(name))
        stored = self._dense[name]
        file = self._owners[stored]
        return stored, file, file.tensors[stored]

    def dense_info(self, name: str) -> DenseTensor:
        """Dtype, shape and sizes of a dense tensor; nothing is decompressed.

        Raises
        ------
        ArgumentError
            There is no such tensor.
        FormatError
            The header of its dense frame is illegal.
        """
        stored, file, tensor = self._stored(name)
        if stored == name:
            return DenseTensor(
                tensor.dtype, tensor.shape, tensor.nbytes, tensor.nbytes, False, file.path.name
            )
        try:
            header = read_dense_header(file.data(stored))
        except FormatError as error:
            raise error.with_file(f"{file.path}: {stored}") from error
        return DenseTensor(header.dtype, header.shape, header.nbytes, tensor.nbytes, True, file.path.name)

    def dense(self, name: str) -> tuple[str, tuple[int, ...], memoryview]:
        """A dense tensor: safetensors dtype, shape, and its bytes in row order.

        The bytes are a view of the mapped file, or were decompressed and checked.

        Raises
        ------
        ArgumentError
            There is no such tensor.
        FormatError
            Its dense frame is illegal.
        """
        stored, file, tensor = self._stored(name)
        if stored == name:
            return tensor.dtype, tensor.shape, file.data(name)
        try:
            return decode_dense(file.data(stored), memory_limit=self._memory_limit)
        except (FormatError, MemoryLimitError) as error:
            raise error.with_file(f"{file.path}: {stored}") from error

    def close(self) -> None:
        """Let go of the files. Layers, records and matrices taken before stay usable."""
        for file in self.shards.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_model(path: str | os.PathLike[str], *, memory_limit: int = MEMORY_LIMIT) -> PackedModel:
    """Open a packed model.

    Manifest, sizes of all files, configuration, index, and the headers of all shards are checked; frames are
    checked when they are asked for, and SHA-256 only by :func:`qmoe_format.verify`.

    Parameters
    ----------
    path : path
        The model's directory.
    memory_limit : int
        Most bytes of one decoded matrix or decompressed tensor; what would take more is refused before it is
        allocated (:class:`MemoryLimitError`).

    Returns
    -------
    PackedModel

    Raises
    ------
    ArgumentError
        There is no such directory.
    FormatError
        It is not a packed model, or not a whole one; the message names the file, the field and the fault.
    """
    return PackedModel(path, memory_limit=memory_limit)
