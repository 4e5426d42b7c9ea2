"""A packed model's frames and tensors as datasets of an HDF5 file."""

from __future__ import annotations

from typing import Any

import numpy as np
from qmoe_codec import read_frame_header

from ..container import DICTIONARIES, MANIFEST, STORE, STORE_INDEX, ZSTD
from ..files import os_errors
from ..reader import PackedModel
from .layout import (
    EXPERTS,
    FILES,
    FORMAT,
    LAYERS,
    SHARDS,
    TABLES,
    TENSORS,
    TOKENS,
    VERSION,
    Meter,
    link_name,
    stored_as,
)


class Hdf5Writer:
    """Puts a packed model into an HDF5 file."""

    def __init__(self, file: Any, model: PackedModel, meter: Meter) -> None:
        self._file, self._model, self._meter = file, model, meter

    def run(self) -> None:
        """Write everything."""
        file, model = self._file, self._model
        file.attrs["format"] = np.bytes_(FORMAT.encode())
        file.attrs["version"] = np.bytes_(VERSION.encode())
        files, shards = file.create_group(FILES), file.create_group(SHARDS)
        layers, tensors = file.create_group(LAYERS), file.create_group(TENSORS)
        for name in (MANIFEST, *model.files):
            if name not in model.shards:
                with os_errors(model.path / name):
                    self._put(files, name, "U8", None, (model.path / name).read_bytes())
        for name, shard in model.shards.items():
            with os_errors(shard.path), shard.path.open("rb") as stream:
                self._put(shards, name, "U8", None, stream.read(shard.data_start))
        for prefix in model.layers:
            self._layer(layers.create_group(link_name(prefix)), prefix)
        of_layers = {prefix + end for prefix in model.layers for end in (STORE, STORE_INDEX, DICTIONARIES)}
        for shard in model.shards.values():
            for stored, tensor in shard.tensors.items():
                if stored not in of_layers:
                    dataset = self._put(tensors, stored, tensor.dtype, tensor.shape, shard.data(stored))
                    dataset.attrs["dtype"] = np.bytes_(tensor.dtype.encode())
                    dataset.attrs["encoding"] = np.bytes_(b"zstd" if stored.endswith(ZSTD) else b"plain")

    def _layer(self, group: Any, prefix: str) -> None:
        layer = self._model.layer(prefix)
        spec = layer.spec
        group.attrs["experts"] = np.int64(spec.experts)
        group.attrs["dtype"] = np.bytes_(spec.dtype.encode())
        group.attrs["projections"] = np.array([p.name.encode() for p in spec.projections], np.bytes_)
        tables = group.create_group(TABLES)
        for identity, dictionary in layer.dictionaries.items():
            dataset = self._put(tables, f"{identity:08x}", "U8", None, dictionary.frame)
            dataset.attrs["bits"] = np.int64(dictionary.bits)
        self._put(group, TOKENS, "I64", (spec.experts,), layer.index[:, 2].astype("<i8").tobytes())
        experts = group.create_group(EXPERTS)
        for expert in range(spec.experts):
            records = experts.create_group(str(expert))
            for projection, frame in zip(spec.projections, layer.frames(expert), strict=True):
                header = read_frame_header(frame)
                dataset = self._put(records, projection.name, "U8", None, frame)
                dataset.attrs["role"] = np.bytes_(projection.role.encode())
                dataset.attrs["rows"] = np.int64(header.rows)
                dataset.attrs["columns"] = np.int64(header.columns)
                dataset.attrs["bits"] = np.int64(header.bits)
                dataset.attrs["dictionary_ids"] = np.array(header.dictionary_ids, "<u4")

    def _put(
        self,
        group: Any,
        name: str,
        dtype: str,
        shape: tuple[int, ...] | None,
        data: bytes | memoryview,
    ) -> Any:
        nbytes = memoryview(data).nbytes
        numpy_dtype, stored_shape = stored_as(dtype, (nbytes,) if shape is None else shape, nbytes)
        array = np.frombuffer(data, numpy_dtype).reshape(stored_shape)
        dataset = group.create_dataset(link_name(name), data=array)
        self._meter.add(nbytes)
        return dataset
