"""What the JSON files of a packed model say: layers, `quantization_config`, index and manifest (spec 6).

Parsing is strict about everything that a reader uses and ignores keys it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from qmoe_codec.errors import ArgumentError, FormatError, HeaderError, SizeError, TruncatedError, VersionError

from .files import is_plain_name, open_regular, os_errors, read_json_object
from .safetensors_io import DTYPE_BITS, FileRecord

FORMAT = "qmoe"
VERSION = "1.0"
#: Of a container that needs one of FEATURES: a writer writes the lowest version that has what it uses.
VERSION_OF_FEATURES = "1.1"
#: What `requires` may name (spec 6.3).
FEATURES = frozenset({"bias", "fused", "gating"})

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"

STORE, STORE_INDEX, DICTIONARIES, ZSTD = ".qmoe_store", ".qmoe_index", ".qmoe_dictionaries", ".qmoe_zstd"
#: Endings of tensor names that the format keeps for itself (spec 6.2).
RESERVED_SUFFIXES = (STORE, STORE_INDEX, DICTIONARIES, ZSTD)

#: Endings of sections, known and not: one of a later minor version is left aside (spec 1.2).
SECTION = re.compile(r"\.qmoe_[a-z0-9_]+\Z")

ROLES = ("gate", "up", "down")
EXPERT = "{expert}"
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
        Name in the original checkpoint, with ``{expert}`` for the expert's number; or, without that, of a
        fused tensor [experts, n, columns], whose n rows are those of all projections of the layer that name
        it, in their order.
    rows, columns : int
        Shape, [out, in].
    transposed : bool
        The fused tensor is [experts, columns, n].
    interleaved : bool
        The rows in a fused tensor take turns: row r of the i-th of k projections is number r·k + i.
    bias : str or None
        Name of the tensor of biases, which is not packed: with ``{expert}`` [rows], or fused [experts, n].
    """

    name: str
    role: str
    tensor: str
    rows: int
    columns: int
    transposed: bool = False
    interleaved: bool = False
    bias: str | None = None

    def __post_init__(self) -> None:
        def refuse(field: str, value: object, expected: str) -> ArgumentError:
            return ArgumentError("illegal", field=field, value=repr(value)[:80], expected=expected)

        if not self.name:
            raise refuse("name", self.name, "a name")
        if self.role not in ROLES:
            raise refuse("role", self.role, " or ".join(ROLES))
        if not self.tensor or self.tensor.count(EXPERT) > 1:
            raise refuse("tensor", self.tensor, "a tensor name with {expert} in it at most once")
        for field in ("transposed", "interleaved"):
            if getattr(self, field) and not self.fused:
                raise refuse(field, True, "false, for a tensor of one expert")
        if self.bias is not None and (not self.bias or self.bias.count(EXPERT) != self.tensor.count(EXPERT)):
            raise refuse("bias", self.bias, "a tensor name with {expert} in it as often as in `tensor`")
        for field, side in (("rows", self.rows), ("columns", self.columns)):
            if not 0 <= side <= MAXIMUM_SIDE:
                raise refuse(field, side, f"an integer of 0 to {MAXIMUM_SIDE}")
        if self.rows * self.columns > MAXIMUM_WEIGHTS:
            raise refuse("columns", self.columns, "rows × columns of at most 2^36")

    @property
    def fused(self) -> bool:
        """Whether one tensor of the original checkpoint holds this projection of all experts."""
        return EXPERT not in self.tensor

    def tensor_name(self, expert: int) -> str:
        """Name of the tensor of the original checkpoint that holds an expert's matrix."""
        return self.tensor.replace(EXPERT, str(expert))

    def matrix_name(self, expert: int) -> str:
        """What to call an expert's matrix: its tensor, and where that is fused the place in it."""
        return f"{self.tensor}[{expert}]: {self.name}" if self.fused else self.tensor_name(expert)


@dataclass(frozen=True)
class FusedRows:
    """Which rows of a fused tensor are a projection's: ``start``, ``start + step``, …, of `total` rows."""

    start: int
    step: int
    total: int

    def part(self, rows: int) -> slice:
        """The place of a projection with so many rows."""
        return slice(self.start, self.start + rows * self.step, self.step)


@dataclass(frozen=True)
class Gating:
    """What an expert does between its projections, where that is not act(gate(x)) · up(x) (spec 6.3).

    Attributes
    ----------
    kind : str
        ``clamped_swiglu``: with g = min(gate(x), limit) and u = clamp(up(x), −limit, limit), it is
        (u + 1) · g · sigmoid(alpha · g).
    alpha, limit : float
    """

    kind: str
    alpha: float
    limit: float

    def __post_init__(self) -> None:
        if self.kind != "clamped_swiglu":
            raise ArgumentError(
                "illegal", field="gating: kind", value=repr(self.kind)[:80], expected="'clamped_swiglu'"
            )
        for field, value in (("alpha", self.alpha), ("limit", self.limit)):
            if not 0 < value < float("inf"):
                raise ArgumentError(
                    "illegal", field=f"gating: {field}", value=value, expected="a finite number above 0"
                )

    def to_json(self) -> dict[str, object]:
        """The value of `gating`."""
        return {"kind": self.kind, "alpha": self.alpha, "limit": self.limit}


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
    gating : Gating or None
        None: y = down(act(gate(x)) · up(x)), or down(act(up(x))), with the activation that the model has.
    """

    prefix: str
    experts: int
    projections: tuple[Projection, ...]
    dtype: str
    gating: Gating | None = None

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
        for field in ("name", "role"):
            values = [getattr(projection, field) for projection in self.projections]
            if len(set(values)) != len(values):
                raise ArgumentError(f"two projections with one {field}", field="projections", value=values)
        self._check_tensors()
        if self.gating is not None and {p.role for p in self.projections} != set(ROLES):
            raise ArgumentError(
                "illegal",
                field="gating",
                value=[p.role for p in self.projections],
                expected=f"projections with the roles {', '.join(ROLES)}",
            )

    def _check_tensors(self) -> None:
        """Projections share no tensor, or a fused one in which their rows do not collide."""
        for number, projection in enumerate(self.projections):
            for other in self.projections[:number]:
                if other.tensor != projection.tensor:
                    shared = other.bias is not None and other.bias == projection.bias
                elif not projection.fused:
                    shared = True
                else:
                    alike = ["columns", "transposed", "interleaved"]
                    if projection.interleaved:
                        alike.append("rows")
                    shared = any(getattr(other, field) != getattr(projection, field) for field in alike)
                    # Biases of a fused tensor's projections lie in one tensor as their rows do
                    shared |= other.bias != projection.bias
                if shared:
                    raise ArgumentError(
                        "two projections with one tensor that does not hold both",
                        field="projections",
                        value=[other.name, projection.name],
                    )

    @property
    def features(self) -> frozenset[str]:
        """What of FEATURES a reader needs to know for this layer."""
        used = {
            "bias": any(projection.bias is not None for projection in self.projections),
            "fused": any(projection.fused for projection in self.projections),
            "gating": self.gating is not None,
        }
        return frozenset(name for name, needed in used.items() if needed)

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

    def fused_rows(self, projection: Projection) -> FusedRows:
        """Where the rows of `projection` lie in its fused tensor."""
        sharing = [other for other in self.projections if other.tensor == projection.tensor]
        place, total = sharing.index(projection), sum(other.rows for other in sharing)
        if projection.interleaved:
            return FusedRows(place, len(sharing), total)
        return FusedRows(sum(other.rows for other in sharing[:place]), 1, total)

    def tensor_names(self) -> Iterator[str]:
        """Names of the tensors of the original checkpoint that these experts stand for, biases excepted."""
        return self.expanded(projection.tensor for projection in self.projections)

    def bias_names(self) -> Iterator[str]:
        """Names of the tensors of biases that these experts add."""
        return self.expanded(projection.bias for projection in self.projections if projection.bias)

    def expanded(self, names: Iterable[str]) -> Iterator[str]:
        """These names, each once, those with ``{expert}`` for every expert."""
        for name in dict.fromkeys(names):
            if EXPERT in name:
                yield from (name.replace(EXPERT, str(expert)) for expert in range(self.experts))
            else:
                yield name

    def to_json(self) -> dict[str, object]:
        """The entry of `layers`, without the sizes that only the writer knows."""
        entry: dict[str, object] = {
            "experts": self.experts,
            "projections": [_projection_json(projection) for projection in self.projections],
            "dtype": self.dtype,
        }
        if self.gating is not None:
            entry["gating"] = self.gating.to_json()
        return entry

    @classmethod
    def from_json(
        cls, prefix: str, value: object, file: object = None, features: Collection[str] = FEATURES
    ) -> Self:
        """Read an entry of `layers`; keys that belong to none of `features` are unknown, and left aside.

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
            projections = tuple(_projection(number, item, features) for number, item in enumerate(items))
            gating = entry.get("gating") if "gating" in features else None
            return cls(
                prefix,
                _integer(entry, "experts"),
                projections,
                _string(entry, "dtype"),
                None if gating is None else _gating(gating),
            )
        except ArgumentError as error:
            raise HeaderError(
                error.message,
                file=file,
                field=f"{place}: {error.field}",
                value=error.value,
                expected=error.expected,
            ) from error


def _projection_json(projection: Projection) -> dict[str, object]:
    entry: dict[str, object] = {
        field: getattr(projection, field) for field in ("name", "role", "tensor", "rows", "columns")
    }
    entry.update({field: True for field in ("transposed", "interleaved") if getattr(projection, field)})
    if projection.bias is not None:
        entry["bias"] = projection.bias
    return entry


def _projection(number: int, item: object, features: Collection[str]) -> Projection:
    place = f"projections[{number}]"
    entry = _object(item, ArgumentError, place)
    fused, biased = "fused" in features, "bias" in features and entry.get("bias") is not None
    try:
        projection = Projection(
            name=_string(entry, "name"),
            role=_string(entry, "role"),
            tensor=_string(entry, "tensor"),
            rows=_integer(entry, "rows"),
            columns=_integer(entry, "columns"),
            transposed=fused and _truth(entry, "transposed"),
            interleaved=fused and _truth(entry, "interleaved"),
            bias=_string(entry, "bias") if biased else None,
        )
        if projection.fused and not fused:
            raise ArgumentError(
                "illegal",
                field="tensor",
                value=repr(projection.tensor)[:80],
                expected="a tensor name with {expert} in it once",
            )
        return projection
    except ArgumentError as error:
        error.field = f"{place}: {error.field}"
        raise


def _gating(value: object) -> Gating:
    entry = _object(value, ArgumentError, "gating")
    numbers = {}
    for field in ("alpha", "limit"):
        number = entry.get(field)
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise ArgumentError("illegal", field=f"gating: {field}", value=_type(number), expected="a number")
        numbers[field] = number
    try:
        return Gating(_string(entry, "kind"), **{field: float(number) for field, number in numbers.items()})
    except OverflowError:  # an integer of a thousand digits
        raise ArgumentError("illegal", field="gating", expected="finite numbers") from None


def _truth(entry: Mapping[str, object], field: str) -> bool:
    value = entry.get(field, False)
    if not isinstance(value, bool):
        raise ArgumentError("illegal", field=field, value=_type(value), expected="true or false")
    return value


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
        features = _check_requires(value.get("requires", []), file, f"{name}: requires")
        layers, layer_bytes = {}, {}
        entries = _object(value.get("layers"), HeaderError, f"{name}: layers", file)
        for prefix in sorted(entries, key=natural_key):
            layers[prefix] = LayerSpec.from_json(prefix, entries[prefix], file, features)
            sizes = _object(entries[prefix], HeaderError, prefix, file)
            layer_bytes[prefix] = (
                _size(sizes.get("store_bytes"), file, f"{name}: layers: {prefix}: store_bytes"),
                _size(sizes.get("dictionaries_bytes"), file, f"{name}: layers: {prefix}: dictionaries_bytes"),
            )
        dense = _object(value.get("dense_zstd", {}), HeaderError, f"{name}: dense_zstd", file)
        dense_zstd = {key: _size(size, file, f"{name}: dense_zstd: {key}") for key, size in dense.items()}
        return cls(layers, layer_bytes, dense_zstd)


def _check_requires(value: object, file: object, field: str) -> frozenset[str]:
    """What a reader must know beyond version 1.0 (spec 1.2)."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise HeaderError(
            "illegal", file=file, field=field, value=repr(value)[:40], expected="a list of strings"
        )
    if unknown := [name for name in value if name not in FEATURES]:
        raise VersionError(
            "not known to this reader",
            file=file,
            field=field,
            value=repr(unknown[0])[:40],
            expected=" or ".join(sorted(FEATURES)),
        )
    return frozenset(value)


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
