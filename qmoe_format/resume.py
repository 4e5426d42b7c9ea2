"""What lets an interrupted run go on: which layers are finished, and what they were made from.

In ``OUT.partial``, ``resume.json`` says what the run is made of, and ``resume-NNNNN.json`` is written when a
layer's shard is complete on the disk. Both appear whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qmoe_codec.errors import ArgumentError, HeaderError, OutputExistsError

from .files import os_errors, read_json_object, sync_directory, write_file

HEAD = "resume.json"
_LAYER = "resume-{:05d}.json"


class Resume:
    """The state of a run that can be gone on with.

    Parameters
    ----------
    head : mapping
        What the run is made of: JSON values under names that an error may show, such as ``model``.
    go_on : bool
        Take over the finished layers of an interrupted run.
    discard : bool
        Without `go_on`: delete them. Otherwise they are in the way.

    Attributes
    ----------
    layers : list of dict
        What :meth:`save` was given for each finished layer, in order.
    """

    def __init__(self, head: Mapping[str, Any], *, go_on: bool, discard: bool) -> None:
        self._head = json.loads(json.dumps(head))
        self._go_on = go_on
        self._discard = discard
        self.layers: list[dict[str, Any]] = []

    def take_over(self, path: Path, names: list[str]) -> Collection[str]:
        """Names of the files in an interrupted run's directory to keep: as ``PartialDirectory`` asks.

        Raises
        ------
        OutputExistsError
            There are finished layers, and nothing was said of them.
        ArgumentError
            They were made from something else.
        HeaderError
            They are not what they should be.
        """
        count = 0
        while _LAYER.format(count + 1) in names:
            count += 1
        if not count or HEAD not in names:
            return ()
        if not self._go_on:
            if self._discard:
                return ()
            raise OutputExistsError(
                f"holds {count} finished {'layer' if count == 1 else 'layers'} of an interrupted run",
                file=path,
                expected="--resume to go on from them, or --force to discard them",
            )
        self._compare(path)
        layers = [read_json_object(path / _LAYER.format(number + 1)) for number in range(count)]
        kept = {HEAD, *(_LAYER.format(number + 1) for number in range(count))}
        for number, layer in enumerate(layers):
            files = layer.get("files")
            if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                raise HeaderError("illegal", file=path / _LAYER.format(number + 1), field="files")
            # Of a layer's working files only the last one's are still needed.
            if number + 1 == count:
                kept.update(files)
        kept.update(name for name in names if name.startswith(("shard-", "model-")))
        self.layers = layers
        return kept

    def _compare(self, path: Path) -> None:
        found = read_json_object(path / HEAD)
        differ = []
        for name, value in self._head.items():
            other = found.get(name)
            if isinstance(value, dict) and isinstance(other, dict):
                keys = sorted(key for key in value.keys() | other.keys() if value.get(key) != other.get(key))
                differ += [f"{name}: {key} {other.get(key)}, now {value.get(key)}" for key in keys]
            elif value != other:
                differ.append(name)
        if differ:
            raise ArgumentError(
                "the interrupted run was made from something else",
                file=path,
                field="--resume",
                value=f"different {'; '.join(differ)}",
                expected="the same model, calibration data and settings, or --force without --resume",
            )

    def begin(self, path: Path) -> None:
        """Write what the run is made of."""
        if not self.layers:
            _replace(path / HEAD, self._head)

    def save(self, path: Path, layer: Mapping[str, Any]) -> None:
        """Write that another layer is finished; what it names must be on the disk already."""
        self.layers.append(dict(layer))
        _replace(path / _LAYER.format(len(self.layers)), layer)


def _replace(file: Path, value: Mapping[str, Any]) -> None:
    partial = file.with_name(file.name + ".tmp")
    partial.unlink(missing_ok=True)
    write_file(partial, json.dumps(value).encode())
    with os_errors(file):
        os.rename(partial, file)
    sync_directory(file.parent)
