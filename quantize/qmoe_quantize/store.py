"""Calibration kept for later: an HDF5 file with every expert's Hessians, priors and token counts.

The Hessians are those of the model as it is, without a ternary layer before; so to ternarize from a store
takes no text and no forward pass, but errors of earlier layers are not made up for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from qmoe_codec.errors import (
    ArgumentError,
    CheckpointError,
    HeaderError,
    OutputExistsError,
    VersionError,
)
from torch import Tensor

from qmoe_format.container import LayerSpec, Projection
from qmoe_format.files import sync_directory

from .activations import h5_errors, h5py, reserve
from .mixture import FEW_TOKENS, LayerRun
from .problem import MatrixGroup

FORMAT, VERSION = "qmoe-calibration", 1


@dataclass(frozen=True)
class Provenance:
    """What a store was made from.

    Attributes
    ----------
    model : str
        :func:`.fingerprint.model_digest` of the checkpoint.
    data : tuple of str
        Digests of the calibration windows that went into it, one for each text that was merged.
    settings : Mapping
        JSON values: what text, how Hessians were gathered.
    """

    model: str
    data: tuple[str, ...]
    settings: Mapping[str, Any]


def inputs_of(projection: Projection) -> str:
    """Which Hessian a projection uses: gate and up share theirs."""
    return "hidden" if projection.role == "down" else "input"


class StoreWriter:
    """Writes a store; a context manager, and a visitor of the layers' matrices.

    Parameters
    ----------
    path : path
        Appears when it is complete.
    provenance : Provenance
    force : bool
        Replace an existing file.
    """

    corrects = False

    def __init__(self, path: str | os.PathLike[str], provenance: Provenance, *, force: bool = False) -> None:
        self.path = Path(path)
        if os.path.lexists(self.path) and not force:
            raise OutputExistsError("exists already", file=path, expected="a new name, or --force")
        if self.path.is_dir():
            raise OutputExistsError("will not be replaced: it is a directory", file=path)
        self._partial = self.path.with_name(self.path.name + ".partial")
        head = {
            "format": FORMAT,
            "version": VERSION,
            "model": provenance.model,
            "data": list(provenance.data),
            "settings": dict(provenance.settings),
        }
        self._nbytes = 0
        reserve(self._partial, 0)
        with h5_errors(self._partial):
            self._file = h5py().File(self._partial, "w")
            self._file.attrs["head"] = json.dumps(head, sort_keys=True)
        self._order: list[str] = []

    def wants(self, layer: LayerSpec, tokens: Sequence[int]) -> range:
        """All of them."""
        return range(layer.experts)

    def visit(
        self, layer: LayerSpec, projection: Projection, experts: list[int], group: MatrixGroup
    ) -> Tensor:
        """Keep what is known of the inputs of some matrices; the weights stay as they are."""
        part = slice(experts[0], experts[-1] + 1)
        inputs = inputs_of(projection)
        self.put(layer.prefix, layer.experts, f"{inputs}/hessian", part, group.hessian)
        self.put(layer.prefix, layer.experts, f"{inputs}/prior", part, group.prior)
        self.put(layer.prefix, layer.experts, f"row_weight/{projection.name}", part, group.row_weight)
        return group.weight

    def put(self, prefix: str, count: int, name: str, experts: slice, values: Tensor) -> None:
        """Write values of some of a layer's `count` experts."""
        place = f"{prefix}/{name}"
        if place not in self._file:
            self._nbytes += 4 * count * values[0].numel()
            reserve(self._partial, self._nbytes)
        with h5_errors(self._partial):
            if place not in self._file:
                self._file.create_dataset(place, (count, *values.shape[1:]), "<f4")
            self._file[place][experts] = values.cpu().numpy()

    def layer_done(
        self, prefix: str, calibration_tokens: int, tokens: Sequence[int], gates: Sequence[float]
    ) -> None:
        """Write what is known of a layer's experts as a whole."""
        with h5_errors(self._partial):
            group = self._file[prefix]
            group.attrs["calibration_tokens"] = calibration_tokens
            group.create_dataset("tokens", data=np.array(tokens, "<i8"))
            group.create_dataset("gate_weights", data=np.array(gates, "<f4"))
            self._order.append(prefix)
            self._file.attrs["layers"] = json.dumps(self._order)

    def run_done(self, layer: LayerSpec, run: LayerRun) -> None:
        """As :meth:`layer_done`, from the run itself."""
        self.layer_done(layer.prefix, run.calibration_tokens, run.tokens, run.gate_weights)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with h5_errors(self._partial):
                self._file.close()
            if error is None:
                with h5_errors(self._partial):
                    descriptor = os.open(self._partial, os.O_RDONLY)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
                    os.replace(self._partial, self.path)
                sync_directory(self.path.absolute().parent)
        finally:
            self._partial.unlink(missing_ok=True)


class Store:
    """A store that was written; a context manager.

    Parameters
    ----------
    path : path

    Attributes
    ----------
    provenance : Provenance
    layers : list of str
        Prefixes of its layers.

    Raises
    ------
    CheckpointError
        There is no such file.
    HeaderError, VersionError
        It is no store, or one of another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError("not found", file=path, expected="a calibration store")
        with h5_errors(self.path):
            self._file = h5py().File(self.path, "r")
        try:
            self.provenance, self.layers = self._read_head()
        except BaseException:
            self._file.close()
            raise

    def _read_head(self) -> tuple[Provenance, list[str]]:
        with h5_errors(self.path):
            head = json.loads(str(self._file.attrs.get("head", "null")))
            layers = json.loads(str(self._file.attrs.get("layers", "null")))
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise HeaderError(
                "not a calibration store", file=self.path, expected="what qmoe-calibrate writes"
            )
        if head.get("version") != VERSION:
            raise VersionError(
                "of another version",
                file=self.path,
                field="version",
                value=head.get("version"),
                expected=VERSION,
            )
        model, data, settings = head.get("model"), head.get("data"), head.get("settings")
        if not (isinstance(model, str) and isinstance(settings, dict)):
            raise HeaderError("illegal", file=self.path, field="head")
        for entries in (data, layers):
            if not (isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)):
                raise HeaderError("illegal", file=self.path, field="head")
        return Provenance(model, tuple(data or ()), settings), list(layers or ())

    def calibration_tokens(self, prefix: str) -> int:
        """Tokens of the calibration text that count in this layer."""
        with h5_errors(self.path):
            return int(self._file[prefix].attrs["calibration_tokens"])

    def tokens(self, prefix: str) -> npt.NDArray[np.int64]:
        """Tokens that each expert is calibrated on."""
        return self._array(prefix, "tokens", None).astype(np.int64)

    def gate_weights(self, prefix: str) -> npt.NDArray[np.float32]:
        """Mean router weight of those tokens."""
        return self._array(prefix, "gate_weights", None).astype(np.float32)

    def arrays(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the arrays of a layer that have a row for every expert."""
        found: dict[str, tuple[int, ...]] = {}

        def note(name: str, item: Any) -> None:
            if isinstance(item, h5py().Dataset) and "/" in name:
                found[name] = tuple(item.shape)

        with h5_errors(self.path):
            self._file[prefix].visititems(note)
        return found

    def array(self, prefix: str, name: str, experts: slice) -> npt.NDArray[np.float32]:
        """Rows of one of :meth:`arrays`."""
        return self._array(prefix, name, experts).astype(np.float32, copy=False)

    def _array(self, prefix: str, name: str, experts: slice | None) -> npt.NDArray[Any]:
        with h5_errors(self.path):
            stored = self._file[f"{prefix}/{name}"]
            values: npt.NDArray[Any] = stored[()] if experts is None else stored[experts]
        return values

    def check(self, layers: Sequence[LayerSpec], model: str, *, gate_weighting: bool) -> None:
        """Refuse the store of another model, or of another kind.

        Raises
        ------
        CheckpointError
            It says what differs.
        HeaderError
            An array is missing, or of another shape.
        """
        if self.layers != [layer.prefix for layer in layers]:
            other = sorted(set(self.layers) ^ {layer.prefix for layer in layers})
            raise CheckpointError(
                "the calibration is of another model: its layers differ",
                file=self.path,
                field="layers",
                value=other[0] if other else "another order",
                expected=f"{len(layers)} layers of this model",
            )
        for layer in layers:
            shapes = self.arrays(layer.prefix)
            for projection in layer.projections:
                wanted = {
                    f"{inputs_of(projection)}/hessian": (projection.columns, projection.columns),
                    f"{inputs_of(projection)}/prior": (projection.columns, projection.columns),
                    f"row_weight/{projection.name}": (projection.rows,),
                }
                for name, shape in wanted.items():
                    if shapes.get(name) != (layer.experts, *shape):
                        raise CheckpointError(
                            "the calibration is of another model: shapes differ",
                            file=self.path,
                            field=f"{layer.prefix}/{name}",
                            value=shapes.get(name),
                            expected=(layer.experts, *shape),
                        )
            if len(self.tokens(layer.prefix)) != layer.experts:
                raise HeaderError("illegal", file=self.path, field=f"{layer.prefix}/tokens")
        if self.provenance.model != model:
            raise CheckpointError(
                "the calibration is of another model: its weights or configuration differ",
                file=self.path,
                field="model",
                value=self.provenance.model[:16],
                expected=model[:16],
            )
        if self.provenance.settings.get("gate_weighting") is not gate_weighting:
            raise CheckpointError(
                "the calibration is for another recipe",
                file=self.path,
                field="gate_weighting",
                value=self.provenance.settings.get("gate_weighting"),
                expected=f"{gate_weighting}, as qmoe-calibrate --method makes it",
            )

    def group(
        self, layer: LayerSpec, projection: Projection, experts: range, weight: Tensor, device: torch.device
    ) -> MatrixGroup:
        """The problem of ternarizing the same projection of some neighbouring experts."""
        part = slice(experts.start, experts.stop)
        inputs = inputs_of(projection)

        def read(name: str) -> Tensor:
            return torch.from_numpy(self.array(layer.prefix, name, part)).to(device)

        return MatrixGroup(
            names=tuple(projection.matrix_name(expert) for expert in experts),
            weight=weight,
            hessian=read(f"{inputs}/hessian"),
            prior=read(f"{inputs}/prior"),
            tokens=torch.from_numpy(self.tokens(layer.prefix)[part]),
            calibration_tokens=self.calibration_tokens(layer.prefix),
            row_weight=read(f"row_weight/{projection.name}"),
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def merge(
    sources: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, force: bool = False
) -> None:
    """Merge stores of one model, made from different texts, as if all the text had been read at once.

    Sums of Hessians are added, and so are counts; priors and row weights are averaged by tokens.

    Raises
    ------
    ArgumentError
        They are of different models or settings, or two were made from the same text.
    """
    if len(sources) < 2:
        raise ArgumentError("too few", field="--merge", value=len(sources), expected="two stores or more")
    stores: list[Store] = []
    try:
        stores += [Store(source) for source in sources]
        settings = _check_alike(stores)
        data = [digest for store in stores for digest in store.provenance.data]
        if len(set(data)) != len(data):
            raise ArgumentError("made from the same text twice", field="--merge", expected="different texts")
        first = stores[0]
        with StoreWriter(
            out, Provenance(first.provenance.model, tuple(data), settings), force=force
        ) as writer:
            for prefix in first.layers:
                _merge_layer(stores, prefix, writer)
    finally:
        for store in stores:
            store.close()


# What may differ between stores that are merged: which text, and which of it.
_FREE = ("source", "samples", "part", "seed")


def _check_alike(stores: Sequence[Store]) -> dict[str, Any]:
    first = stores[0]
    kept = {name: value for name, value in first.provenance.settings.items() if name not in _FREE}
    for store in stores[1:]:
        other = {name: value for name, value in store.provenance.settings.items() if name not in _FREE}
        differ = sorted(name for name in kept.keys() | other.keys() if kept.get(name) != other.get(name))
        if store.provenance.model != first.provenance.model or store.layers != first.layers:
            differ.insert(0, "model")
        if differ:
            raise ArgumentError(
                "cannot be merged: not made alike",
                file=store.path,
                field=differ[0],
                value=other.get(differ[0], store.provenance.model[:16]),
                expected=kept.get(differ[0], first.provenance.model[:16]),
            )
    return kept


def _merge_layer(stores: Sequence[Store], prefix: str, writer: StoreWriter) -> None:
    totals = [store.calibration_tokens(prefix) for store in stores]
    tokens = [store.tokens(prefix) for store in stores]
    shapes = stores[0].arrays(prefix)
    experts = len(tokens[0])
    for store in stores:
        if store.arrays(prefix) != shapes or len(store.tokens(prefix)) != experts:
            raise HeaderError("other arrays than in the first store", file=store.path, field=prefix)
    for name in shapes:
        for expert in range(experts):
            part = slice(expert, expert + 1)
            # A Hessian is a sum over the run's tokens, divided by their number; row weights are means over
            # the expert's own tokens, and a few that every expert has.
            if name.startswith("row_weight/"):
                shares = [float(count[expert]) + FEW_TOKENS for count in tokens]
            else:
                shares = [float(total) for total in totals]
            values = sum(
                store.array(prefix, name, part).astype(np.float64) * share
                for store, share in zip(stores, shares, strict=True)
            )
            mean = np.asarray(values) / sum(shares)
            writer.put(prefix, experts, name, part, torch.from_numpy(mean.astype(np.float32)))
    together = np.sum(tokens, axis=0)
    gates = sum(store.gate_weights(prefix) * count for store, count in zip(stores, tokens, strict=True))
    writer.layer_done(
        prefix, sum(totals), together.tolist(), (np.asarray(gates) / np.maximum(together, 1)).tolist()
    )


def token_counts(store: Store) -> Iterator[tuple[str, int, npt.NDArray[np.int64]]]:
    """Layers of a store: prefix, tokens of the calibration text, tokens of each expert."""
    for prefix in store.layers:
        yield prefix, store.calibration_tokens(prefix), store.tokens(prefix)


def is_store(path: str) -> bool:
    """Whether a name is that of a store rather than of text."""
    return path.endswith((".h5", ".hdf5"))
