"""Check a packed model completely: structure, every frame, every checksum."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from qmoe_codec import Matrix
from qmoe_codec.errors import ChecksumError, FormatError, PayloadError

from .files import sha256_file
from .reader import PackedLayer, PackedModel, open_model


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and found right.

    Attributes
    ----------
    files, bytes : int
        Files of the manifest, and their bytes.
    layers, experts, matrices : int
        Expert layers, records in them, matrix frames in these.
    weights : int
        Ternary weights.
    dense_tensors, dense_frames : int
        Other tensors, and how many of them are compressed.
    """

    files: int
    bytes: int
    layers: int
    experts: int
    matrices: int
    weights: int
    dense_tensors: int
    dense_frames: int


def verify(
    path: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Check all of a packed model.

    Structure and frames come first and the manifest's SHA-256 after them, so that a fault in a frame is
    reported by its shard, layer, expert, projection and section, and a fault anywhere else by its file.

    Parameters
    ----------
    path : path
        The model's directory.
    progress : callable, optional
        Called with the bytes done and the bytes in all.

    Returns
    -------
    VerifyReport

    Raises
    ------
    FormatError
        The first fault found.
    ArgumentError
        There is no such directory.
    """
    with open_model(path) as model:
        return _Verification(model, progress).run()


class _Verification:
    def __init__(self, model: PackedModel, progress: Callable[[int, int], None] | None) -> None:
        self._model = model
        self._progress = progress
        self._done = 0
        self._total = (
            sum(len(model.layer(prefix).store) for prefix in model.layers)
            + sum(model.dense_info(name).stored_bytes for name in model.dense_names())
            + sum(record.nbytes for record in model.files.values())
        )

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)

    def run(self) -> VerifyReport:
        model = self._model
        for prefix in model.layers:
            self._check_layer(model.layer(prefix))
        frames = 0
        for name in model.dense_names():
            info = model.dense_info(name)
            if info.compressed:
                model.dense(name)
                frames += 1
            self._advance(info.stored_bytes)
        for name, record in model.files.items():
            digest = sha256_file(model.path / name, self._advance)
            if digest != record.sha256:
                raise ChecksumError(
                    "SHA-256 differs from the manifest",
                    file=model.path / name,
                    field="sha256",
                    value=digest,
                    expected=record.sha256,
                )
        layers = model.layers.values()
        return VerifyReport(
            files=len(model.files),
            bytes=sum(record.nbytes for record in model.files.values()),
            layers=len(layers),
            experts=sum(layer.experts for layer in layers),
            matrices=sum(layer.experts * len(layer.projections) for layer in layers),
            weights=sum(layer.experts * p.rows * p.columns for layer in layers for p in layer.projections),
            dense_tensors=len(model.dense_names()),
            dense_frames=frames,
        )

    def _check_layer(self, layer: PackedLayer) -> None:
        _ = layer.dictionaries  # parsed even where no frame names one
        for expert in range(layer.experts):
            for number, frame in enumerate(layer.frames(expert)):
                try:
                    Matrix(frame, layer.dictionaries, verify=True)
                except FormatError as error:
                    raise error.with_file(layer.place(expert, number)) from error
            padding = layer.padding(expert)
            if any(padding):
                raise PayloadError(
                    "not zero",
                    file=layer.place(expert),
                    field="padding after the record",
                    expected="zero bytes",
                )
            self._advance(len(layer.record(expert)) + len(padding))
