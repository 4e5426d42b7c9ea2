"""Saving a packed model that transformers runs: a complete packed model again (spec 6).

transformers writes what is not packed, as it does for any model, into a folder beside the output; from there
it goes into the container, together with the packed experts as they lie in the modules' buffers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmoe_codec.errors import ArgumentError, UnsupportedModelError

from .container import CONFIG, INDEX, natural_key
from .expert_cache import parse_size
from .expert_parallel import parallel_layers
from .files import read_json_object
from .reader import PackedLayer
from .safetensors_io import SafetensorsFile
from .torch import QMoEExperts
from .writer import PackedModelWriter


class PackedSaver:
    """Stands for ``save_pretrained`` of a model with packed experts.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
        token: str | bool | None = None,
        force: bool = False,
        **options: Any,
    ) -> None:
        """Write the model as a packed model, which appears when it is complete.

        Parameters
        ----------
        save_directory : path
            A new or empty directory; under `force` a packed model, which is replaced.
        is_main_process : bool
            Whether to write at all.
        max_shard_size : int or str
            Of files of what is not packed. A layer of experts is one file.
        push_to_hub, token, **options
            Refused but for `token`, which nothing needs.

        Raises
        ------
        ArgumentError
            An option that a packed model cannot be saved with.
        OutputExistsError
            The directory exists.
        UnsupportedModelError
            The experts are in an expert cache, or spread over ranks.
        QMoEError
            The disk is full, or fails.
        """
        refused = [name for name, value in {**options, "push_to_hub": push_to_hub}.items() if value]
        if refused:
            raise ArgumentError(
                "a packed model is saved without this option; model.push_to_hub() uploads it",
                field=refused[0],
                value=repr(options.get(refused[0], push_to_hub))[:40],
            )
        if not is_main_process:
            return
        if spread := parallel_layers(self._model):
            raise UnsupportedModelError(
                "experts spread over ranks are not saved again: copy the directory",
                file=spread[0].layer.prefix,
            )
        modules = packed_modules(self._model)
        if cached := [prefix for prefix, module in modules.items() if module.cached is not None]:
            raise UnsupportedModelError(
                "experts in an expert cache are not saved again: copy the directory", file=cached[0]
            )
        out = Path(save_directory)
        out.parent.mkdir(parents=True, exist_ok=True)
        is_empty = out.is_dir() and not any(out.iterdir())
        limit = max_shard_size if isinstance(max_shard_size, int) else parse_size(max_shard_size)
        quantizer = self._model.hf_quantizer
        with (
            PackedModelWriter(out, force=force or is_empty, max_shard_bytes=limit) as writer,
            tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder,
        ):
            with quantizer.saving():
                type(self._model).save_pretrained(self._model, folder)
            names = sorted(os.listdir(folder))
            for name in names:
                if not name.endswith(".safetensors") and name not in (CONFIG, INDEX):
                    writer.add_file(Path(folder) / name)
            for prefix in sorted(modules, key=natural_key):
                layer = _packed_layer(modules[prefix])
                writer.add_layer(layer.spec, _records(layer), _Dictionaries(layer))
            for name in names:
                if name.endswith(".safetensors"):
                    with SafetensorsFile(Path(folder) / name) as file:
                        for tensor, info in file.tensors.items():
                            writer.add_dense(tensor, info.dtype, info.shape, file.data(tensor))
            config = read_json_object(Path(folder) / CONFIG)
            quantization: Any = config.pop("quantization_config")
            writer.finish(config, quantization.get("recipe", {}))


def packed_modules(model: Any) -> dict[str, QMoEExperts]:
    """The packed experts of a model, by their prefixes in the container."""
    return {m.layer.prefix: m for m in model.modules() if isinstance(m, QMoEExperts)}


def _packed_layer(module: QMoEExperts) -> PackedLayer:
    """What lies in the buffers of a module."""
    store, index, dictionaries = (
        getattr(module, name).detach().cpu().contiguous().numpy()
        for name in ("qmoe_store", "qmoe_index", "qmoe_dictionaries")
    )
    return PackedLayer(module.layer, store.data, index, dictionaries.data, place=module.layer.prefix)


def _records(layer: PackedLayer) -> Iterator[tuple[list[bytes], int]]:
    for expert in range(layer.experts):
        yield [bytes(frame) for frame in layer.frames(expert)], int(layer.index[expert, 2])


class _Dictionaries:
    """A layer's dictionaries as a writer takes them."""

    def __init__(self, layer: PackedLayer) -> None:
        self._layer = layer

    def to_bytes(self) -> bytes:
        return bytes(self._layer.dictionary_bytes)
