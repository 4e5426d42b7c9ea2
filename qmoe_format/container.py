"""What the JSON files of a packed model say: layers, `quantization_config`, index and manifest (spec 6).

Parsing is strict about everything that a reader uses and ignores keys it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from qmoe_codec.errors import ArgumentError, FormatError, HeaderError, SizeError, TruncatedError, VersionError

from .files import is_plain_name, open_regular, os_errors, read_json_object
from .safetensors_io import DTYPE_BITS, FileRecord

FORMAT = "qmoe"
VERSION = "1.0"

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"

STORE, STORE_INDEX, DICTIONARIES, ZSTD = ".qmoe_store", ".qmoe_index", ".qmoe_dictionaries", ".qmoe_zstd"
#: Endings of tensor names that the format keeps for itself (spec 6.2).
RESERVED_SUFFIXES = (STORE, STORE_INDEX, DICTIONARIES, ZSTD)

#: Endings of sections, known and not: one of a later minor version is left aside (spec 1.2).
SECTION = re.compile(r"\.qmoe_[a-z0-9_]+\Z")

ROLES = ("gate", "up", "down")
RECORD_ALIGNMENT = 256
MAXIMUM_SIDE = 1 << 24
MAXIMUM_WEIGHTS = 1 << 36
#: Keeps every sum over the experts of a layer in 64 bits; far above any model.
MAXIMUM_EXPERTS = 1 << 24


def round_up(number: int, multiple: int) -> int:
    """Least multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def natural_key(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key that puts layer 10 after layer 2."""
    parts = re.split(r"([0-9]+)", name)
    # A run of thousands of digits is no number of anything, and int() would refuse it, as it does "²".
    return tuple(
        (True, int(p), "") if p.isascii() and p.isdigit() and len(p) < 20 else (False, 0, p) for p in parts
    )


@dataclass(frozen=True)
class Projection:
    """One matrix of each expert of a layer.

    Attributes
    ----------
    name : str
        As in the model's code, such as ``gate_proj``.
    role : str
        ``gate``, ``up`` or ``down``: y = down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate.
    tensor : str
        Name in the original checkpoint, with ``{expert}`` for the expert's number.
    rows, columns : int
        Shape, [out, in].
    """

    name: str
    role: str
    tensor: str
    rows: int
    columns: int

    def __post_init__(self) -> None:
        def refuse(field: str, value: object, expected: str) -> ArgumentError:
            return ArgumentError("illegal", field=field, value=repr(value)[:80], expected=expected)

        if not self.name:
            raise refuse("name", self.name, "a name")
        if self.role not in ROLES:
            raise refuse("role", self.role, " or ".join(ROLES))
        if self.tensor.count("{expert}") != 1:
            raise refuse("tensor", self.tensor, "a tensor name with {expert} in it once")
        for field, side in (("rows", self.rows), ("columns", self.columns)):
            if not 0 <= side <= MAXIMUM_SIDE:
                raise refuse(field, side, f"an integer of 0 to {MAXIMUM_SIDE}")
        if self.rows * self.columns > MAXIMUM_WEIGHTS:
            raise refuse("columns", self.columns, "rows × columns of at most 2^36")

    def tensor_name(self, expert: int) -> str:
        """Name of an expert's matrix in the original checkpoint."""
        return self.tensor.replace("{expert}", str(expert))


@dataclass(frozen=True)
class LayerSpec:
    """The experts of one MoE layer: one entry of `layers` in `quantization_config` (spec 6.3).

    Attributes
    ----------
    prefix : str
        Name of the experts in the original checkpoint, such as ``model.layers.3.mlp.experts``.
    experts : int
    projections : tuple of Projection
        In the order of the frames in a record.
    dtype : str
        Safetensors name of the experts' original dtype.
    """

    prefix: str
    experts: int
    projections: tuple[Projection, ...]
    dtype: str

    def __post_init__(self) -> None:
        if not self.prefix:
            raise ArgumentError("empty", field="prefix", expected="the name of a layer's experts")
        if not 1 <= self.experts <= MAXIMUM_EXPERTS:
            raise ArgumentError(
                "illegal",
                field="experts",
                value=self.experts,
                expected=f"an integer of 1 to {MAXIMUM_EXPERTS}",
            )
        if self.dtype not in DTYPE_BITS:
            raise ArgumentError(
                "illegal", field="dtype", value=repr(self.dtype)[:80], expected="a safetensors dtype"
            )
        if not self.projections:
            raise ArgumentError("empty", field="projections", expected="at least one projection")
        for field in ("name", "role", "tensor"):
            values = [getattr(projection, field) for projection in self.projections]
            if len(set(values)) != len(values):
                raise ArgumentError(f"two projections with one {field}", field="projections", value=values)

    def projection(self, name: str) -> Projection:
        """The projection of this name.

        Raises
        ------
        ArgumentError
            There is none.
        """
        for projection in self.projections:
            if projection.name == name:
                return projection
        names = [projection.name for projection in self.projections]
        raise ArgumentError("no such projection", field=self.prefix, value=repr(name), expected=names)

    def to_json(self) -> dict[str, object]:
        """The entry of `layers`, without the sizes that only the writer knows."""
        return {
            "experts": self.experts,
            "projections": [
                {"name": p.name, "role": p.role, "tensor": p.tensor, "rows": p.rows, "columns": p.columns}
                for p in self.projections
            ],
            "dtype": self.dtype,
        }

    @classmethod
    def from_json(cls, prefix: str, value: object, file: object = None) -> Self:
        """Read an entry of `layers`.

        Raises
        ------
        HeaderError
            A value has the wrong type or is illegal.
        """
        place = f"quantization_config: layers: {prefix}"
        try:
            entry = _object(value, ArgumentError, "layer")
            items = entry.get("projections")
            if not isinstance(items, list):
                raise ArgumentError("illegal", field="projections", value=_type(items), expected="a list")
            projections = tuple(_projection(number, item) for number, item in enumerate(items))
            return cls(prefix, _integer(entry, "experts"), projections, _string(entry, "dtype"))
        except ArgumentError as error:
            raise HeaderError(
                error.message,
                file=file,
                field=f"{place}: {error.field}",
                value=error.value,
                expected=error.expected,
            ) from error


def _projection(number: int, item: object) -> Projection:
    place = f"projections[{number}]"
    entry = _object(item, ArgumentError, place)
    try:
        return Projection(
            name=_string(entry, "name"),
            role=_string(entry, "role"),
            tensor=_string(entry, "tensor"),
            rows=_integer(entry, "rows"),
            columns=_integer(entry, "columns"),
        )
    except ArgumentError as error:
        error.field = f"{place}: {error.field}"
        raise


def _string(entry: Mapping[str, object], field: str) -> str:
    value = entry.get(field)
    if not isinstance(value, str):
        raise ArgumentError("illegal", field=field, value=_type(value), expected="a string")
    return value


def _integer(entry: Mapping[str, object], field: str) -> int:
    value = entry.get(field)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentError("illegal", field=field, value=_type(value), expected="an integer")
    return value


def _type(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _object(
    value: object, kind: type[ArgumentError] | type[FormatError], field: str, file: object = None
) -> dict[str, object]:
    if not isinstance(value, dict):
        raise kind("illegal", file=file, field=field, value=_type(value), expected="an object")
    return value


def check_version(value: object, file: object, field: str) -> None:
    """Check a ``major.minor`` version: any minor one of ours will do.

    Raises
    ------
    HeaderError, VersionError
        It is not a version, or of another major.
    """
    match = re.fullmatch(r"([0-9]{1,9})\.([0-9]{1,9})", value) if isinstance(value, str) else None
    if match is None:
        raise HeaderError("illegal", file=file, field=field, value=repr(value)[:40], expected="major.minor")
    if int(match[1]) != 1:
        raise VersionError("not known to this reader", file=file, field=field, value=value, expected="1.x")


@dataclass(frozen=True)
class QuantizationConfig:
    """The part of `quantization_config` that a reader uses (spec 6.3).

    Attributes
    ----------
    layers : dict of str to LayerSpec
        By prefix, in natural order.
    layer_bytes : dict of str to (int, int)
        `store_bytes` and `dictionaries_bytes` of each layer.
    dense_zstd : dict of str to int
        Tensor stored as a dense frame → bytes of the frame.
    """

    layers: dict[str, LayerSpec]
    layer_bytes: dict[str, tuple[int, int]]
    dense_zstd: dict[str, int]

    @classmethod
    def parse(cls, config: Mapping[str, object], file: object) -> Self:
        """Read and check `quantization_config` of a model's configuration.

        Raises
        ------
        HeaderError, VersionError
            It is missing, not ours, of another version, or something in it is illegal.
        """
        name = "quantization_config"
        value = _object(config.get(name), HeaderError, name, file)
        if value.get("quant_method") != FORMAT:
            raise HeaderError(
                "illegal",
                file=file,
                field=f"{name}: quant_method",
                value=repr(value.get("quant_method"))[:40],
                expected=repr(FORMAT),
            )
        check_version(value.get("version"), file, f"{name}: version")
        _check_requires(value.get("requires", []), file, f"{name}: requires")
        layers, layer_bytes = {}, {}
        entries = _object(value.get("layers"), HeaderError, f"{name}: layers", file)
        for prefix in sorted(entries, key=natural_key):
            layers[prefix] = LayerSpec.from_json(prefix, entries[prefix], file)
            sizes = _object(entries[prefix], HeaderError, prefix, file)
            layer_bytes[prefix] = (
                _size(sizes.get("store_bytes"), file, f"{name}: layers: {prefix}: store_bytes"),
                _size(sizes.get("dictionaries_bytes"), file, f"{name}: layers: {prefix}: dictionaries_bytes"),
            )
        dense = _object(value.get("dense_zstd", {}), HeaderError, f"{name}: dense_zstd", file)
        dense_zstd = {key: _size(size, file, f"{name}: dense_zstd: {key}") for key, size in dense.items()}
        return cls(layers, layer_bytes, dense_zstd)


def _check_requires(value: object, file: object, field: str) -> None:
    """What a reader must know beyond version 1.0 (spec 1.2): this one knows of nothing."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise HeaderError(
            "illegal", file=file, field=field, value=repr(value)[:40], expected="a list of strings"
        )
    if value:
        raise VersionError(
            "not known to this reader", file=file, field=field, value=repr(value[0])[:40], expected="nothing"
        )


def _size(value: object, file: object, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise HeaderError(
            "illegal", file=file, field=field, value=repr(value)[:40], expected="a number of bytes"
        )
    return value


def read_manifest(directory: Path) -> dict[str, FileRecord]:
    """Read ``manifest.json`` and compare the sizes of the files that it names (spec 6.4).

    Returns
    -------
    dict of str to FileRecord
        By file name; ``config.json`` and the index are among them.

    Raises
    ------
    TruncatedError
        There is no manifest, so this is no packed model, or an unfinished one; or a file is missing or short.
    SizeError, HeaderError, VersionError
        A file is too long; the manifest is malformed; it is of another version.
    """
    files = parse_manifest(directory)
    for name, record in files.items():
        descriptor = open_regular(directory / name)
        with os_errors(directory / name), open(descriptor, "rb", buffering=0) as stream:
            size = stream.seek(0, 2)
        if size != record.nbytes:
            kind = TruncatedError if size < record.nbytes else SizeError
            raise kind(
                "not the size in the manifest",
                file=directory / name,
                value=f"{size} bytes",
                expected=f"{record.nbytes} bytes",
            )
    return files


def parse_manifest(directory: Path) -> dict[str, FileRecord]:
    """Read ``manifest.json`` alone: what :func:`read_manifest` does before it looks at the files."""
    path = directory / MANIFEST
    try:
        manifest = read_json_object(path)
    except TruncatedError as error:
        raise TruncatedError(
            "missing: not a packed model, or one that was not finished",
            file=path,
            expected="written last by qmoe-pack",
        ) from error
    if manifest.get("format") != FORMAT:
        value = repr(manifest.get("format"))[:40]
        raise HeaderError("illegal", file=path, field="format", value=value, expected=repr(FORMAT))
    check_version(manifest.get("version"), path, "version")
    files: dict[str, FileRecord] = {}
    for name, item in _object(manifest.get("files"), HeaderError, "files", path).items():
        if not is_plain_name(name) or name == MANIFEST:
            raise HeaderError(
                "illegal", file=path, field="files", value=repr(name)[:80], expected="plain file names"
            )
        entry = _object(item, HeaderError, f"files: {name}", path)
        digest = entry.get("sha256")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise HeaderError(
                "illegal",
                file=path,
                field=f"files: {name}: sha256",
                value=repr(digest)[:80],
                expected="64 hexadecimal digits",
            )
        files[name] = FileRecord(_size(entry.get("bytes"), path, f"files: {name}: bytes"), digest)
    for name in (CONFIG, INDEX):
        if name not in files:
            raise HeaderError("not named", file=path, field="files", expected=name)
    return files


def read_index(directory: Path, files: Mapping[str, FileRecord]) -> dict[str, dict[str, None]]:
    """Read ``model.safetensors.index.json``.

    Returns
    -------
    dict of str to dict of str to None
        Shard → the names of its tensors, an ordered set.

    Raises
    ------
    HeaderError
        It is malformed, or names a shard that is not a file of the manifest.
    """
    path = directory / INDEX
    shards: dict[str, dict[str, None]] = {}
    for tensor, shard in _object(
        read_json_object(path).get("weight_map"), HeaderError, "weight_map", path
    ).items():
        if not isinstance(shard, str) or not is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise HeaderError(
                "illegal",
                file=path,
                field=f"weight_map: {tensor}",
                value=repr(shard)[:80],
                expected="the plain name of a .safetensors file",
            )
        if shard not in files:
            raise HeaderError(
                "not a file of the manifest", file=path, field=f"weight_map: {tensor}", value=repr(shard)[:80]
            )
        shards.setdefault(shard, {})[tensor] = None
    return dict(sorted(shards.items()))
