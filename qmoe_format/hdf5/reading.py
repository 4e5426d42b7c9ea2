"""The files of a packed model, put together from an HDF5 file that is not trusted."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from qmoe_codec import Dictionary, Matrix, parse_dictionaries
from qmoe_codec.errors import ChecksumError, FormatError, HeaderError, SizeError, TruncatedError

from ..container import (
    CONFIG,
    DICTIONARIES,
    INDEX,
    MANIFEST,
    RECORD_ALIGNMENT,
    STORE,
    STORE_INDEX,
    ZSTD,
    LayerSpec,
    QuantizationConfig,
    check_version,
    parse_manifest,
    read_index,
    round_up,
)
from ..dense import decode_dense
from ..files import (
    CHUNK_BYTES,
    create_file,
    open_regular,
    os_errors,
    read_json_object,
    write_all,
    write_file,
)
from ..safetensors_io import FileRecord, TensorInfo, parse_header
from .layout import (
    EXPERTS,
    FILES,
    FORMAT,
    LAYERS,
    SHARDS,
    TABLES,
    TENSORS,
    TOKENS,
    Meter,
    hdf5_errors,
    link_name,
    load_h5py,
    stored_as,
)


class _Shard:
    """A safetensors file that an HDF5 file stands for: its header, and where its tensors come from."""

    def __init__(self, header: bytes, tensors: Mapping[str, TensorInfo], dense: Sequence[str]) -> None:
        self.header = header
        self.tensors = tensors
        self.dense = dense


class Hdf5Model:
    """The packed model in an HDF5 file, its structure checked; a context manager.

    Datasets are looked up through h5py, and their bytes read from where it says that they lie.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        h5py = self._h5py = load_h5py()
        self._taken = 0
        self._file: Any = None
        self._descriptor = open_regular(self.path)
        try:
            with os_errors(self.path):
                self._size = os.fstat(self._descriptor).st_size
            with hdf5_errors(self.path, HeaderError):
                self._file = h5py.File(self.path, "r", locking=False)  # not every cluster has locks
                self._read_structure()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- objects of the file ----------------------------------------------------------------------------

    def _text(self, name: str) -> str:
        """A short string attribute of the file."""
        if name not in self._file.attrs:
            raise HeaderError("missing: not a packed model in HDF5", file=self.path, field=name)
        attribute = self._file.attrs.get_id(name)
        if attribute.shape != () or attribute.dtype.kind != "S" or attribute.dtype.itemsize > 64:
            raise HeaderError(
                "illegal", file=self.path, field=name, expected="a short string of fixed length"
            )
        return bytes(self._file.attrs[name]).decode("ascii", "replace")

    def _object(self, group: Any, name: str, kind: type[Any]) -> Any:
        """What a group has under a name; only what lies in this very file counts."""
        link, place = link_name(name), f"{group.name.rstrip('/')}/{name}"
        found = group.get(link, getlink=True)
        if found is None:
            raise TruncatedError("missing", file=self.path, field=place)
        if not isinstance(found, self._h5py.HardLink):
            raise HeaderError(
                "leads elsewhere",
                file=self.path,
                field=place,
                value=type(found).__name__,
                expected="a hard link",
            )
        value = group[link]
        if not isinstance(value, kind):
            raise HeaderError(
                "illegal", file=self.path, field=place, value=type(value).__name__, expected=kind.__name__
            )
        return value

    def _group(self, group: Any, name: str) -> Any:
        return self._object(group, name, self._h5py.Group)

    def _dataset(
        self, group: Any, name: str, dtype: str, shape: tuple[int, ...] | None, nbytes: int | None
    ) -> tuple[int, int]:
        """Where the bytes of a dataset lie: offset and size. A `shape` of None is any number of bytes."""
        dataset = self._object(group, name, self._h5py.Dataset)
        place = dataset.name
        properties = dataset.id.get_create_plist()
        plain = (
            properties.get_layout() == self._h5py.h5d.CONTIGUOUS
            and not properties.get_nfilters()
            and not properties.get_external_count()
        )
        if not plain:
            raise HeaderError(
                "not stored plainly",
                file=self.path,
                field=place,
                expected="contiguous, without filters, in this file",
            )
        wanted_dtype, wanted_shape = np.dtype("|u1"), shape
        if shape is not None and nbytes is not None:
            wanted_dtype, wanted_shape = stored_as(dtype, shape, nbytes)
        found_shape = dataset.shape
        right_shape = found_shape == wanted_shape if wanted_shape is not None else len(found_shape or ()) == 1
        if not dataset.id.get_type().equal(self._h5py.h5t.py_create(wanted_dtype)) or not right_shape:
            raise HeaderError(
                "wrong type or shape",
                file=self.path,
                field=place,
                value=f"{dataset.id.get_type().get_size()} bytes {list(found_shape or ())}",
                expected=f"{wanted_dtype.str} {'[bytes]' if wanted_shape is None else list(wanted_shape)}",
            )
        size = int(np.prod(found_shape, dtype=object)) * wanted_dtype.itemsize
        if size == 0:
            return 0, 0
        offset = dataset.id.get_offset()
        if offset is None or dataset.id.get_storage_size() != size or offset + size > self._size:
            raise TruncatedError(
                "claims bytes that the file has not",
                file=self.path,
                field=place,
                value=f"{size} bytes at {offset}",
                expected=f"within {self._size} bytes",
            )
        return offset, size

    def _take(self, extent: tuple[int, int], place: str) -> bytearray:
        """Read bytes; all that is ever read of a file is at most twice what it has."""
        offset, size = extent
        # Once for structure or frames and once for their sums; datasets that share bytes would give more.
        self._taken += size
        if self._taken > 2 * self._size:
            raise SizeError(
                "the datasets share bytes, and claim more than the file has",
                file=self.path,
                field=place,
                expected=f"{self._size} bytes",
            )
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view.nbytes:
            with os_errors(self.path):
                count = os.preadv(self._descriptor, [view[:CHUNK_BYTES]], offset)
            if not count:
                raise TruncatedError("the file ends within it", file=self.path, field=place)
            view, offset = view[count:], offset + count
        return buffer

    def _bytes(self, group: Any, name: str) -> bytearray:
        return self._take(self._dataset(group, name, "U8", None, None), f"{group.name}/{name}")

    # ---- structure --------------------------------------------------------------------------------------

    def _read_structure(self) -> None:
        if self._file.id.get_create_plist().get_userblock():
            raise HeaderError("has a user block", file=self.path, expected="an HDF5 file without one")
        if (found := self._text("format")) != FORMAT:
            raise HeaderError("illegal", file=self.path, field="format", value=repr(found), expected=FORMAT)
        check_version(self._text("version"), self.path, "version")
        files = self._group(self._file, FILES)
        with tempfile.TemporaryDirectory(prefix="qmoe-") as folder:
            directory = Path(folder)
            self._json: dict[str, bytes] = {}
            for name in (MANIFEST, CONFIG, INDEX):
                self._json[name] = bytes(self._bytes(files, name))
                write_file(directory / name, self._json[name])
            try:
                self.files: dict[str, FileRecord] = parse_manifest(directory)
                config = read_json_object(directory / CONFIG)
                self.config = QuantizationConfig.parse(config, CONFIG)
                index = read_index(directory, self.files)
                manifest = read_json_object(directory / MANIFEST)
            except FormatError as error:
                name = Path(error.file or "").name
                error.file = f"{self.path}: files/{name}"
                raise
        quantization = config["quantization_config"]
        assert isinstance(quantization, dict)  # it has been parsed
        self.versions = (manifest.get("version"), quantization.get("version"))
        self._by_tensor: dict[str, tuple[LayerSpec, str]] = {}
        for prefix, spec in self.config.layers.items():
            for suffix in (STORE, STORE_INDEX, DICTIONARIES):
                self._by_tensor[prefix + suffix] = (spec, suffix)
        self.shards = {name: self._open_shard(name, tensors) for name, tensors in index.items()}
        self._check_tensors({name for tensors in index.values() for name in tensors})

    def _open_shard(self, name: str, indexed: Mapping[str, None]) -> _Shard:
        place = Path(f"{self.path}: shards/{name}")
        header = bytes(self._bytes(self._group(self._file, SHARDS), name))
        tensors = parse_header(header, self.files[name].nbytes, place)
        if tensors.keys() != indexed.keys():
            stray = sorted(tensors.keys() ^ indexed.keys())[0]
            raise HeaderError("in the shard or the index, but not in both", file=place, field=stray)
        for tensor, info in tensors.items():
            if tensor in self._by_tensor:
                self._check_layer_tensor(place, tensor, info, tensors)
            elif tensor.endswith(ZSTD):
                size = self.config.dense_zstd.get(tensor.removesuffix(ZSTD))
                if (info.dtype, info.shape) != ("U8", (size,)):
                    raise SizeError(f"contradicts {CONFIG}", file=place, field=tensor, expected=size)
        return _Shard(header, tensors, [tensor for tensor in tensors if tensor not in self._by_tensor])

    def _check_layer_tensor(
        self, place: Path, tensor: str, info: TensorInfo, shard: Mapping[str, TensorInfo]
    ) -> None:
        spec, suffix = self._by_tensor[tensor]
        store_bytes, dictionaries_bytes = self.config.layer_bytes[spec.prefix]
        wanted = {
            STORE: ("U8", (store_bytes,)),
            STORE_INDEX: ("I64", (spec.experts, 3)),
            DICTIONARIES: ("U8", (dictionaries_bytes,)),
        }[suffix]
        if (info.dtype, info.shape) != wanted:
            raise SizeError(
                f"contradicts {CONFIG}",
                file=place,
                field=tensor,
                value=f"{info.dtype} {list(info.shape)}",
                expected=f"{wanted[0]} {list(wanted[1])}",
            )
        if suffix == STORE and info.start % RECORD_ALIGNMENT:
            raise HeaderError(
                "does not start at a multiple of 256", file=place, field=tensor, value=info.start
            )
        if any(spec.prefix + other not in shard for other in (STORE, STORE_INDEX, DICTIONARIES)):
            raise HeaderError("not in one shard with the rest of its layer", file=place, field=tensor)

    def _check_tensors(self, names: set[str]) -> None:
        for name in (*self._by_tensor, *(name + ZSTD for name in self.config.dense_zstd)):
            if name not in names:
                raise HeaderError(f"missing tensor of {CONFIG}", file=self.path, field=name)

    # ---- content ----------------------------------------------------------------------------------------

    def hash_files(self, meter: Meter) -> None:
        """Compare every file with its SHA-256 in the manifest."""
        for name in self.files:
            for _ in self._checked(name, meter):
                pass

    def check_files(self, meter: Meter, memory_limit: int) -> int:
        """The same, and check every frame on the way, no tensor of more than `memory_limit` bytes.

        Returns
        -------
        int
            Dense frames among the tensors.
        """
        if self.versions[0] != self.versions[1]:  # no sum covers the manifest's
            raise HeaderError(
                f"contradicts {CONFIG}",
                file=f"{self.path}: files/{MANIFEST}",
                field="version",
                value=self.versions[0],
                expected=self.versions[1],
            )
        for name in self.files:
            for _ in self._checked(name, meter, memory_limit):
                pass
        return sum(name.endswith(ZSTD) for shard in self.shards.values() for name in shard.dense)

    def write_files(self, directory: Path, meter: Meter) -> None:
        """Write every file into a directory, the manifest last."""
        for name in self.files:
            path = directory / name
            descriptor = create_file(path)
            try:
                for piece in self._checked(name, meter):
                    write_all(descriptor, piece, path)
                with os_errors(path):
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        write_file(directory / MANIFEST, self._json[MANIFEST])

    def _checked(self, name: str, meter: Meter, decode: int | None = None) -> Iterator[bytes | bytearray]:
        """The bytes of a file, piece by piece; at the end compared with what the manifest says.

        Frames are checked if `decode`, the most bytes of a tensor, is given.
        """
        digest, size, record = hashlib.sha256(), 0, self.files[name]
        for piece in self._file_pieces(name, decode):
            size += len(piece)
            if size > record.nbytes:
                break
            digest.update(piece)
            yield piece
            meter.add(len(piece))
        if size != record.nbytes:
            kind = SizeError if size > record.nbytes else TruncatedError
            raise kind(
                "not the size in the manifest", file=self.path, field=name, value=size, expected=record.nbytes
            )
        if digest.hexdigest() != record.sha256:
            raise ChecksumError(
                "SHA-256 differs from the manifest",
                file=self.path,
                field=name,
                value=digest.hexdigest(),
                expected=record.sha256,
            )

    def _file_pieces(self, name: str, decode: int | None) -> Iterator[bytes | bytearray]:
        """The bytes of a file of the directory, piece by piece."""
        if name not in self.shards:
            with hdf5_errors(self.path, HeaderError):
                yield self._json[name] if name in self._json else self._bytes(self._file[FILES], name)
            return
        shard = self.shards[name]
        yield shard.header
        for tensor, info in shard.tensors.items():
            with hdf5_errors(self.path, HeaderError):
                if tensor in self._by_tensor:
                    spec, suffix = self._by_tensor[tensor]
                    layer = _Hdf5Layer(self, spec)
                    yield from layer.pieces(suffix, decode is not None)
                else:
                    yield self._dense_bytes(tensor, info, decode)

    def _dense_bytes(self, name: str, info: TensorInfo, decode: int | None) -> bytearray:
        group = self._group(self._file, TENSORS)
        data = self._take(self._dataset(group, name, info.dtype, info.shape, info.nbytes), f"tensors/{name}")
        if decode is not None and name.endswith(ZSTD):
            try:
                decode_dense(data, memory_limit=decode)
            except FormatError as error:
                raise error.with_file(f"{self.path}: tensors/{name}") from error
        return data

    # What a layer needs of its file.
    group, dataset, take = _group, _dataset, _take

    def layer_group(self, prefix: str) -> Any:
        """The group of a layer."""
        return self._group(self._group(self._file, LAYERS), prefix)


class _Hdf5Layer:
    """The three tensors of one layer, put together from its datasets."""

    def __init__(self, model: Hdf5Model, spec: LayerSpec) -> None:
        self._model, self._spec = model, spec
        self._group = model.layer_group(spec.prefix)
        self._experts = model.group(self._group, EXPERTS)

    def pieces(self, suffix: str, decode: bool) -> Iterator[bytes | bytearray]:
        """The bytes of one tensor."""
        if suffix == STORE:
            return self._store(decode)
        return iter((self._index(),)) if suffix == STORE_INDEX else iter((self._dictionaries(),))

    def _extents(self, expert: int) -> list[tuple[int, int]]:
        """Where the frames of an expert lie."""
        record = self._model.group(self._experts, str(expert))
        return [self._model.dataset(record, p.name, "U8", None, None) for p in self._spec.projections]

    def _store(self, decode: bool) -> Iterator[bytes | bytearray]:
        dictionaries = self._parsed() if decode else {}
        for expert in range(self._spec.experts):
            size = 0
            for number, extent in enumerate(self._extents(expert)):
                projection = self._spec.projections[number]
                place = f"layers/{self._spec.prefix}/experts/{expert}/{projection.name}"
                frame = self._model.take(extent, place)
                if decode:
                    self._check(frame, number, dictionaries, place)
                size += len(frame)
                yield frame
            yield bytes(-size % RECORD_ALIGNMENT)

    def _check(
        self, frame: bytearray, number: int, dictionaries: Mapping[int, Dictionary], place: str
    ) -> None:
        projection = self._spec.projections[number]
        try:
            matrix = Matrix(frame, dictionaries)
        except FormatError as error:
            raise error.with_file(f"{self._model.path}: {place}") from error
        if (matrix.rows, matrix.columns) != (projection.rows, projection.columns):
            raise HeaderError(
                f"not the projection's in {CONFIG}",
                file=f"{self._model.path}: {place}",
                field="rows, columns",
                value=(matrix.rows, matrix.columns),
                expected=(projection.rows, projection.columns),
            )

    def _index(self) -> bytes:
        spec = self._spec
        shape = (spec.experts,)
        extent = self._model.dataset(self._group, TOKENS, "I64", shape, 8 * spec.experts)
        tokens = np.frombuffer(self._model.take(extent, f"layers/{spec.prefix}/tokens"), "<i8")
        index, offset = [], 0
        for expert in range(spec.experts):
            size = sum(size for _, size in self._extents(expert))
            index.append((offset, size, int(tokens[expert])))
            offset = round_up(offset + size, RECORD_ALIGNMENT)
        return np.array(index, "<i8").tobytes()

    def _dictionaries(self) -> bytes:
        tables = self._model.group(self._group, TABLES)
        names = sorted(tables)
        if any(not re.fullmatch("[0-9a-f]{8}", name) for name in names):
            raise HeaderError(
                "not the ids of dictionaries",
                file=self._model.path,
                field=tables.name,
                expected="8 digits each",
            )
        extents = [self._model.dataset(tables, name, "U8", None, None) for name in names]
        return b"".join(self._model.take(extent, tables.name) for extent in extents)

    def _parsed(self) -> dict[int, Dictionary]:
        try:
            return parse_dictionaries(self._dictionaries())
        except FormatError as error:
            raise error.with_file(f"{self._model.path}: {self._group.name}/{TABLES}") from error
