"""Check a packed model completely: structure, every frame, every checksum."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from qmoe_codec import MEMORY_LIMIT, FrameHeader, Matrix, crc32c, flipped_bit, read_frame_header
from qmoe_codec.errors import ChecksumError, FormatError, HeaderError, PayloadError

from .container import CONFIG, MANIFEST, STORE_INDEX
from .files import read_json_object, sha256_file
from .reader import PackedLayer, PackedModel, open_model

_FRAME_HEADER_BYTES = 64


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
    path: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> VerifyReport:
    """Check all of a packed model.

    Frames are checked while another thread takes the SHA-256 of the files. A fault in a frame is reported
    before a hash that differs: by its shard, layer, expert, projection and section. A fault anywhere else is
    reported by its file, and by what in it has no checksum of its own.

    Parameters
    ----------
    path : path
        The model's directory.
    progress : callable, optional
        Called with the bytes done and the bytes in all.
    memory_limit : int
        Most bytes of one decompressed tensor; matrices are checked without being decoded.

    Returns
    -------
    VerifyReport

    Raises
    ------
    FormatError
        The first fault found.
    MemoryLimitError
        A tensor is larger than the limit.
    ArgumentError
        There is no such directory.
    """
    with open_model(path, memory_limit=memory_limit) as model:
        return _Verification(model, progress).run()


class _Stopped(Exception):  # noqa: N818 - not an error
    pass


class _Verification:
    def __init__(self, model: PackedModel, progress: Callable[[int, int], None] | None) -> None:
        self._model = model
        self._progress = progress
        self._lock = threading.Lock()
        self._stopped = False
        self._done = 0
        self._total = (
            sum(len(model.layer(prefix).store) for prefix in model.layers)
            + sum(model.dense_info(name).stored_bytes for name in model.dense_names())
            + sum(record.nbytes for record in model.files.values())
        )

    def _advance(self, count: int) -> None:
        if self._stopped:
            raise _Stopped
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)

    def run(self) -> VerifyReport:
        model = self._model
        self._check_versions()
        with ThreadPoolExecutor(1) as hasher:
            digests: dict[str, Future[str]] = {name: hasher.submit(self._hash, name) for name in model.files}
            try:
                frames = self._check_content()
                for name, record in model.files.items():
                    self._compare(name, record.sha256, digests[name].result())
            finally:
                self._stopped = True  # on an error, nobody waits for the other hashes
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

    def _hash(self, name: str) -> str:
        """A shard's from the very map that is checked, so that its bytes come from the disk once."""
        if name in self._model.shards:
            return self._model.shards[name].sha256(self._advance)
        return sha256_file(self._model.path / name, self._advance)

    def _check_versions(self) -> None:
        """The manifest's version, which no hash covers, against the configuration's, which one does."""
        path = self._model.path / MANIFEST
        found = read_json_object(path).get("version")
        quantization = self._model.config["quantization_config"]
        expected = quantization.get("version") if isinstance(quantization, dict) else None
        if found != expected:
            raise HeaderError(
                f"contradicts {CONFIG}", file=path, field="version", value=found, expected=expected
            )

    def _check_content(self) -> int:
        """All layers and dense tensors; how many of these are frames."""
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
        return frames

    def _compare(self, name: str, expected: str, digest: str) -> None:
        if digest == expected:
            return
        message = "SHA-256 differs from the manifest"
        if name in self._model.shards:
            message += f"; all frames are sound, so the fault is in {self._unguarded(name)}"
        raise ChecksumError(
            message, file=self._model.path / name, field="sha256", value=digest, expected=expected
        )

    def _unguarded(self, shard: str) -> str:
        """What of a shard has no checksum of its own."""
        model = self._model
        plain = [name for name in model.dense_names() if not model.dense_info(name).compressed]
        places = [
            *(prefix + STORE_INDEX for prefix in model.layers if model.layer(prefix).shard == shard),
            *(name for name in plain if model.dense_info(name).shard == shard),
        ]
        some = places[:4] + [f"{len(places) - 4} others"] * (len(places) > 4)
        return " or ".join(["the header", *some])

    def _check_layer(self, layer: PackedLayer) -> None:
        _ = layer.dictionaries  # parsed even where no frame names one
        for expert in range(layer.experts):
            for number, frame in enumerate(layer.frames(expert)):
                try:
                    Matrix(frame, layer.dictionaries, verify=True)
                except ChecksumError as error:
                    error.message += f": {_where(frame)}"
                    raise error.with_file(layer.place(expert, number)) from error
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


def _where(frame: memoryview) -> str:
    """Which bit of a body was flipped, if its checksum can tell."""
    header, body = read_frame_header(frame), frame[_FRAME_HEADER_BYTES:]
    bit = flipped_bit(len(body), header.body_crc32c, crc32c(body))
    if bit is None:
        return "more than one bit of the body is wrong"
    offset = _FRAME_HEADER_BYTES + bit // 8
    return f"one bit is wrong, in {_section(header, offset)} (bit {bit % 8} of byte {offset} of the frame)"


def _section(header: FrameHeader, offset: int) -> str:
    """Name of the section that a byte of a frame lies in (spec 4.2)."""
    starts = {
        "levels": (_FRAME_HEADER_BYTES, header.levels_size),
        "row_index": (header.row_index_start, sum(header.row_index_parts)),
        "codewords" if header.bits else "trits": (header.codewords_start, header.codewords_size),
    }
    for name, (start, size) in starts.items():
        if start <= offset < start + size:
            return name
    return "padding"
