"""Write a packed model: streamed, deterministic, and complete or absent (spec 6)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from qmoe_codec import parse_dictionaries, read_frame_header
from qmoe_codec.errors import (
    ArgumentError,
    CheckpointError,
    ChecksumError,
    FormatError,
    MissingDictionaryError,
    OutputExistsError,
    QMoEError,
)

from .container import (
    CONFIG,
    DICTIONARIES,
    FORMAT,
    INDEX,
    MANIFEST,
    RECORD_ALIGNMENT,
    SECTION,
    STORE,
    STORE_INDEX,
    VERSION,
    VERSION_OF_FEATURES,
    ZSTD,
    LayerSpec,
    parse_manifest,
    round_up,
)
from .dense import can_encode, encode_dense
from .files import (
    MARKER,
    PartialDirectory,
    copy_file,
    flat_bytes,
    flat_names,
    is_plain_name,
    os_errors,
    sha256_file,
    sync_directory,
    write_file,
)
from .reader import open_model
from .resume import Resume
from .safetensors_io import DTYPE_BITS, FileRecord, SafetensorsWriter, header_entry_bytes, tensor_bytes

# Room for the header of the first dense shard, some forty tensors; doubled for each shard whose header got
# full, so that a small model wastes little and a large one has few shards.
_DENSE_HEADER_BYTES = 8 << 10
_DENSE_HEADER_LIMIT = 1 << 20


class Dictionaries(Protocol):
    """The dictionaries of one layer, such as :class:`qmoe_codec.DictionarySet`."""

    def to_bytes(self) -> bytes:
        """Their frames, one after the other, in rising order of id."""
        ...


@dataclass
class _Shard:
    """A shard being written or written; its final name is known at the end."""

    path: Path
    writer: SafetensorsWriter | None
    tensors: list[str] = field(default_factory=list)
    tensor_bytes: int = 0
    record: FileRecord | None = None

    @property
    def open_writer(self) -> SafetensorsWriter:
        assert self.writer is not None
        return self.writer

    def close(self) -> None:
        if self.record is None:
            self.record = self.open_writer.close()


@dataclass(frozen=True)
class WrittenLayer:
    """A shard of experts that is complete on the disk: what :func:`write_experts` gives.

    Attributes
    ----------
    tensors : list of str
        Names in it.
    tensor_bytes : int
        Bytes of them all.
    entry : dict
        The layer in `quantization_config`.
    nbytes : int
    sha256 : str
        Of the file.
    """

    tensors: list[str]
    tensor_bytes: int
    entry: dict[str, object]
    nbytes: int
    sha256: str


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def check_replaceable(out: Path) -> None:
    """Refuse to replace anything but an empty directory or a packed model with nothing else in it.

    Raises
    ------
    OutputExistsError
        `out` is something else.
    """
    names = set(flat_names(out))
    if not names:
        return
    try:
        own = {MANIFEST, *parse_manifest(out)}
    except QMoEError as error:
        raise OutputExistsError(
            f"will not be replaced: not a packed model ({error.message})",
            file=out,
            expected="a packed model; move or delete it yourself",
        ) from error
    if foreign := sorted(names - own):
        raise OutputExistsError(
            "will not be replaced: it holds a file that is not of the packed model",
            file=out,
            value=foreign[0],
            expected="its manifest's files only; move or delete it yourself",
        )


class PackedModelWriter:
    """Write a packed model into a directory that appears whole or not at all; a context manager.

    Everything goes to ``OUT.partial``, which :meth:`finish` moves to `out`. Leaving the context before, by
    an error or otherwise, removes ``OUT.partial``; what a killed process leaves is no packed model, and the
    next writer discards it. An expert's record goes to the disk at once, so memory does not grow with their
    number. The same calls give the same bytes.

    Parameters
    ----------
    out : path
        Directory to make.
    force : bool
        Replace `out` if it is a packed model.
    max_shard_bytes : int
        A dense shard that would grow beyond is followed by another. A layer of experts is one shard always.
    resume : Resume, optional
        Keep ``OUT.partial`` once a layer is finished, and take over the finished layers of an interrupted
        run: they are added already.

    Raises
    ------
    OutputExistsError
        `out` exists and `force` is not set, or it may not be replaced; or another writer is at work on it.
    QMoEError
        The directory cannot be made.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        force: bool = False,
        max_shard_bytes: int = 5_000_000_000,
        resume: Resume | None = None,
    ) -> None:
        self._max_shard_bytes = max_shard_bytes
        self._shards: list[_Shard] = []
        self._dense: dict[int, _Shard] = {}  # the open dense shard of each element size, in bits
        self._dense_header_bytes = _DENSE_HEADER_BYTES
        self._layers: dict[str, dict[str, object]] = {}
        self._tensors: set[str] = set()
        self._dense_zstd: dict[str, int] = {}
        self._files: list[str] = []
        self._finished = False
        self._resume = resume
        # Without finished layers of its own to keep, a run may still find those of another one.
        found = resume or Resume({}, go_on=False, discard=force)
        self._directory = PartialDirectory(
            out, force=force, check_replaceable=check_replaceable, take_over=found.take_over
        )
        if resume is not None:
            try:
                self._restore(resume)
            except BaseException:
                self._directory.leave()
                raise

    @property
    def folder(self) -> Path:
        """The directory that is being made. Other files in it are deleted when it is finished."""
        return self._directory.path

    def share(self) -> str:
        """Let other processes of this run write to :attr:`folder` too, and keep other runs out of it.

        Returns
        -------
        str
            What they find in the marker, and so know the directory by.
        """
        return self._directory.share()

    # ---- going on from an interrupted run ---------------------------------------------------------------

    def keep_layer(self, working: Mapping[str, object], files: Sequence[str]) -> None:
        """Make the layer that was added last one that another run can go on from.

        Parameters
        ----------
        working : mapping
            JSON values that such a run finds in :attr:`Resume.layers` under ``working``.
        files : sequence of str
            Names of other files in :attr:`folder` that it needs, on the disk already.
        """
        assert self._resume is not None
        shard, prefix = self._shards[-1], next(reversed(self._layers))
        assert shard.record is not None
        sync_directory(self.folder)
        state = {
            "prefix": prefix,
            "entry": self._layers[prefix],
            "tensors": shard.tensors,
            "tensor_bytes": shard.tensor_bytes,
            "nbytes": shard.record.nbytes,
            "sha256": shard.record.sha256,
            "files": list(files),
            "working": dict(working),
        }
        self._resume.save(self.folder, state)

    def _restore(self, resume: Resume) -> None:
        for number, state in enumerate(resume.layers, 1):
            shard = _Shard(self._shard_path(number), None, state["tensors"], state["tensor_bytes"])
            # The run may have been stopped while it gave the shards their final names.
            for renamed in self.folder.glob(f"model-{number:05d}-of-*.safetensors"):
                with os_errors(renamed):
                    os.rename(renamed, shard.path)
            shard.record = _record_of(shard.path)
            if (shard.record.nbytes, shard.record.sha256) != (state["nbytes"], state["sha256"]):
                raise ChecksumError(
                    "not what the interrupted run wrote",
                    file=shard.path,
                    value=f"{shard.record.nbytes} bytes",
                    expected=f"{state['nbytes']} bytes and their SHA-256; --force to begin anew",
                )
            self._claim(*shard.tensors)
            self._shards.append(shard)
            self._layers[state["prefix"]] = state["entry"]
        last = len(resume.layers)
        names = flat_names(self.folder)
        kept = {self._shard_path(number).name for number in range(1, last + 1)}
        kept.update(name for name in names if not name.startswith(("shard-", "model-")))
        self._directory.clear(keep=kept)
        resume.begin(self.folder)

    # ---- content ----------------------------------------------------------------------------------------

    def add_file(self, path: str | os.PathLike[str]) -> None:
        """Copy a tokenizer file or the like under its own name.

        Raises
        ------
        ArgumentError
            The name is one that the container uses, or was added already.
        QMoEError
            It cannot be read or written.
        """
        source = Path(path)
        name = source.name
        reserved = (
            name in (CONFIG, INDEX, MANIFEST) or name.endswith(".safetensors") or name.startswith(".qmoe-")
        )
        if reserved or not is_plain_name(name):
            raise ArgumentError(
                "the container makes, or cannot hold, a file of this name", file=path, value=name
            )
        if name in self._files:
            raise ArgumentError("two files of one name", file=path, value=name)
        copy_file(source, self._directory.path / name)
        self._files.append(name)

    def add_layer(
        self, layer: LayerSpec, records: Iterable[tuple[Sequence[bytes], int]], dictionaries: Dictionaries
    ) -> None:
        """Write a layer of experts as one shard.

        Parameters
        ----------
        layer : LayerSpec
        records : iterable of (frames, tokens)
            Per expert, in order: its matrix frames in the order of the projections, and the tokens that it
            saw in calibration, or −1. Taken one at a time.
        dictionaries : Dictionaries
            Asked for its bytes when `records` is exhausted.

        Raises
        ------
        ArgumentError
            The layer was added already, or the records are not what `layer` says.
        FormatError
            A frame has an illegal header or names a dictionary that is not there.
        """
        self.adopt_layer(layer, write_experts(self.next_shard, layer, records, dictionaries))

    @property
    def next_shard(self) -> Path:
        """Where the next layer of experts goes."""
        return self._shard_path(len(self._shards) + 1)

    def adopt_layer(self, layer: LayerSpec, written: WrittenLayer) -> None:
        """Take over a layer that :func:`write_experts` has written to :attr:`next_shard`, here or elsewhere.

        Raises
        ------
        ArgumentError
            The layer was added already.
        """
        self._claim(*written.tensors)
        shard = _Shard(self.next_shard, None, written.tensors, written.tensor_bytes)
        shard.record = FileRecord(written.nbytes, written.sha256)
        self._shards.append(shard)
        self._layers[layer.prefix] = written.entry

    def add_dense(
        self, name: str, dtype: str, shape: Sequence[int], data: bytes | bytearray | memoryview
    ) -> None:
        """Write a tensor as it is.

        Parameters
        ----------
        name : str
            Its name in the source checkpoint.
        dtype : str
            Safetensors name.
        shape : sequence of int
        data : buffer
            Its bytes, in row order.

        Raises
        ------
        CheckpointError
            The name ends as those that the format keeps for itself.
        ArgumentError
            The name was used already, or `data` contradicts `dtype` and `shape`.
        """
        self._check_dense(name, dtype, shape, data)
        self._put(name, dtype, tuple(shape), data)

    def add_dense_zstd(
        self, name: str, dtype: str, shape: Sequence[int], data: bytes | bytearray | memoryview
    ) -> int:
        """Write a tensor as a dense frame, or as it is where that is not smaller.

        Parameters and errors are those of :meth:`add_dense`.

        Returns
        -------
        int
            Bytes that the tensor takes in the file.
        """
        size = self._check_dense(name, dtype, shape, data)
        if can_encode(dtype, shape):
            frame = encode_dense(dtype, shape, data)
            if len(frame) < size:
                self._put(name + ZSTD, "U8", (len(frame),), frame)
                self._dense_zstd[name] = len(frame)
                return len(frame)
        self._put(name, dtype, tuple(shape), data)
        return size

    def _check_dense(
        self, name: str, dtype: str, shape: Sequence[int], data: bytes | bytearray | memoryview
    ) -> int:
        if SECTION.search(name) or name == "__metadata__":
            raise CheckpointError("a tensor of this name cannot be packed", field=name)
        size = tensor_bytes(dtype, tuple(shape))
        if flat_bytes(data).nbytes != size:
            raise ArgumentError(
                "data contradict dtype and shape",
                field=name,
                value=f"{memoryview(data).nbytes} bytes",
                expected=f"{size} bytes",
            )
        self._claim(name)
        return size

    def _put(
        self, name: str, dtype: str, shape: tuple[int, ...], data: bytes | bytearray | memoryview
    ) -> None:
        # Tensors follow each other without holes, and other readers need each aligned to its elements: so a
        # shard holds tensors of one element size.
        size = memoryview(data).nbytes
        bits = DTYPE_BITS[dtype]
        shard = self._dense.get(bits)
        if shard is not None:
            full = not shard.open_writer.has_room(name, len(shape))
            if full:
                self._dense_header_bytes = min(2 * self._dense_header_bytes, _DENSE_HEADER_LIMIT)
            if full or shard.open_writer.position + size > self._max_shard_bytes:
                shard.close()
                shard = None
        if shard is None:
            needed = 8 + header_entry_bytes("__metadata__", 1) + header_entry_bytes(name, len(shape))
            shard = self._new_shard(max(self._dense_header_bytes, round_up(needed, RECORD_ALIGNMENT)))
            self._dense[bits] = shard
        shard.open_writer.add(name, dtype, shape, data)
        shard.tensors.append(name)
        shard.tensor_bytes += size

    def _claim(self, *names: str) -> None:
        if self._finished:
            raise ArgumentError("the model is finished", file=self._directory.out)
        for name in names:
            if name in self._tensors:
                raise ArgumentError("tensor added twice", field=name)
            self._tensors.add(name)

    def _new_shard(self, header_bytes: int) -> _Shard:
        path = self._shard_path(len(self._shards) + 1)
        shard = _Shard(path, SafetensorsWriter(path, header_bytes))
        self._shards.append(shard)
        return shard

    def _shard_path(self, number: int) -> Path:
        return self._directory.path / shard_name(number)

    # ---- the end ----------------------------------------------------------------------------------------

    def _features(self) -> list[str]:
        """What a reader must know for some layer, and that the biases that layers name are there."""
        features: set[str] = set()
        for prefix, entry in self._layers.items():
            layer = LayerSpec.from_json(prefix, entry)
            features |= layer.features
            for name in layer.bias_names():
                if name not in self._tensors:
                    raise ArgumentError("a layer names a tensor of biases that is not there", field=name)
        return sorted(features)

    def finish(self, config: Mapping[str, object], recipe: Mapping[str, object]) -> None:
        """Complete the model and move it into place.

        Writes ``config.json`` and the index, writes the manifest last, reads the result, and renames it.
        An `out` that is replaced is exchanged in one step: at every moment there is an old or a new model.

        Parameters
        ----------
        config : mapping
            The model's own configuration, without `quantization_config`.
        recipe : mapping
            How the weights were made, for people.

        Raises
        ------
        OutputExistsError
            `out` came to be in the meantime. The model stays in ``OUT.partial``, finished.
        FormatError
            What was written is not what should have been.
        QMoEError
            The disk is full, or fails.
        """
        if self._finished:
            raise ArgumentError("the model is finished", file=self._directory.out)
        if "quantization_config" in config:
            raise ArgumentError("there is one already", field="config: quantization_config")
        self._finished = True
        directory = self._directory.path
        records = {name: _record_of(directory / name) for name in self._files}
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, 1):
            shard.close()
            assert shard.record is not None
            name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            with os_errors(directory / name):
                os.rename(shard.path, directory / name)
            records[name] = shard.record
            weight_map.update(dict.fromkeys(shard.tensors, name))
        features = self._features()
        version = VERSION_OF_FEATURES if features else VERSION
        quantization = {
            "quant_method": FORMAT,
            "version": version,
            "layers": self._layers,
            "dense_zstd": self._dense_zstd,
            "recipe": dict(recipe),
        }
        if features:
            quantization["requires"] = features
        total = sum(shard.tensor_bytes for shard in self._shards)
        for name, content in (
            (CONFIG, {**config, "quantization_config": quantization}),
            (INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}),
        ):
            write_file(directory / name, _json(content))
            records[name] = _record_of(directory / name)
        # What only a run that goes on would need; until the manifest is there it needs the layers' entries.
        names = [name for name in flat_names(directory) if name not in records and name != MARKER]
        for name in names:
            if not name.startswith("resume"):
                with os_errors(directory / name):
                    os.unlink(directory / name)
        sync_directory(directory)
        files = {name: {"bytes": record.nbytes, "sha256": record.sha256} for name, record in records.items()}
        write_file(
            directory / (MANIFEST + ".tmp"), _json({"format": FORMAT, "version": version, "files": files})
        )
        with os_errors(directory / MANIFEST):
            os.rename(directory / (MANIFEST + ".tmp"), directory / MANIFEST)
            for name in names:
                (directory / name).unlink(missing_ok=True)
        # Open it as any reader would. The frames were looked at when they came and compared when their shard
        # was closed; to read them here through a map would count the whole model as this process's memory.
        open_model(directory).close()
        self._directory.commit()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for shard in self._shards:
                if shard.writer is not None:
                    shard.writer.abort()
        finally:
            if self._resume is not None and self._resume.layers:
                self._directory.leave()
            else:
                self._directory.discard()


def shard_name(number: int) -> str:
    """What a shard is called until all are there; they are numbered from 1."""
    return f"shard-{number:05d}"


def write_experts(
    path: Path,
    layer: LayerSpec,
    records: Iterable[tuple[Sequence[bytes], int]],
    dictionaries: Dictionaries,
) -> WrittenLayer:
    """Write a layer of experts as one shard; parameters and errors are those of ``add_layer``."""
    names = [layer.prefix + suffix for suffix in (STORE, STORE_INDEX, DICTIONARIES)]
    header = 8 + header_entry_bytes("__metadata__", 1) + sum(header_entry_bytes(name, 2) for name in names)
    writer = SafetensorsWriter(path, round_up(header, RECORD_ALIGNMENT))
    try:
        index, used = [], set()
        # The store comes first, at a multiple of 256; the index after it is then aligned as well.
        writer.begin(names[0], 1)
        for expert, (frames, tokens) in enumerate(records):
            place = f"{layer.prefix}: expert {expert}"
            used |= _check_record(layer, expert, frames, tokens, place)
            offset, size = writer.position - writer.data_start, sum(map(len, frames))
            for frame in frames:
                writer.write(frame)
            writer.write(bytes(-size % RECORD_ALIGNMENT))
            index.append((offset, size, tokens))
        if len(index) != layer.experts:
            raise ArgumentError(
                "not a record for every expert", field=layer.prefix, value=len(index), expected=layer.experts
            )
        store_bytes = writer.position - writer.data_start
        writer.end("U8", (store_bytes,))
        writer.add(names[1], "I64", (layer.experts, 3), np.array(index, "<i8").tobytes())
        data = dictionaries.to_bytes()
        if missing := used - parse_dictionaries(data).keys():
            raise MissingDictionaryError(
                "named by a frame but not among the layer's",
                file=layer.prefix,
                field="dictionary_ids",
                value=", ".join(f"{identity:#010x}" for identity in sorted(missing)),
            )
        writer.add(names[2], "U8", (len(data),), data)
        tensor_bytes = writer.position - writer.data_start
        record = writer.close()
    finally:
        writer.abort()
    entry = {**layer.to_json(), "store_bytes": store_bytes, "dictionaries_bytes": len(data)}
    return WrittenLayer(names, tensor_bytes, entry, record.nbytes, record.sha256)


def _check_record(
    layer: LayerSpec, expert: int, frames: Sequence[bytes], tokens: int, place: str
) -> set[int]:
    """Compare a record with its layer; gives the ids of the dictionaries that it names."""
    if expert >= layer.experts:
        raise ArgumentError("more records than experts", field=layer.prefix, expected=layer.experts)
    if len(frames) != len(layer.projections):
        raise ArgumentError(
            "not a frame for every projection",
            field=place,
            value=len(frames),
            expected=len(layer.projections),
        )
    if type(tokens) is not int or not -1 <= tokens < 1 << 63:
        raise ArgumentError("illegal", field=f"{place}: tokens", value=tokens, expected="a count, or -1")
    used: set[int] = set()
    for frame, projection in zip(frames, layer.projections, strict=True):
        try:
            header = read_frame_header(frame)
        except FormatError as error:
            raise error.with_file(f"{place}: {projection.name}") from error
        found = (header.rows, header.columns, header.frame_size)
        wanted = (projection.rows, projection.columns, len(frame))
        if found != wanted:
            raise ArgumentError(
                "not the projection's frame",
                field=f"{place}: {projection.name}: rows, columns, bytes",
                value=found,
                expected=wanted,
            )
        used.update(header.dictionary_ids)
    return used


def _record_of(path: Path) -> FileRecord:
    with os_errors(path):
        size = path.stat().st_size
    return FileRecord(size, sha256_file(path))
