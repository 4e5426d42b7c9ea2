"""Packed models in transformers, their experts kept packed in memory, or on disk behind a cache.

Importing this module teaches transformers the quantization method ``qmoe``: from then on
``AutoModelForCausalLM.from_pretrained(DIR)`` opens a packed model like any other checkpoint. :func:`load`
does the same and refuses whatever does not fit exactly.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from qmoe_codec.errors import (
    ArgumentError,
    FileChangedError,
    HeaderError,
    MissingPackageError,
    QMoEError,
    UnsupportedModelError,
)

from .container import DICTIONARIES, STORE, STORE_INDEX, ZSTD, LayerSpec, QuantizationConfig
from .dense import decode_dense
from .expert_cache import ExpertCache
from .expert_parallel import ParallelExperts, parallel_layers
from .reader import PackedModel, open_model
from .safetensors_io import SafetensorsFile, file_identity
from .saving import PackedSaver
from .torch import BUFFERS, Activation, QMoEExperts, bias_shapes

try:
    import transformers
except ModuleNotFoundError as error:
    message = "transformers is not installed: pip install 'qmoe-format[transformers]'"
    raise MissingPackageError(message) from error

import numpy as np
import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
)
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    verify: bool = True,
    device_map: Any = None,
    expert_cache: str | int | None = None,
    policy: str = "lru",
    page_cache: bool = True,
    prefetch: bool = False,
    host_cache: str | int | None = None,
    expert_parallel: torch.distributed.ProcessGroup | None = None,
) -> transformers.PreTrainedModel:
    """Load a packed model; its experts stay packed and are computed by the C core, or the GPU's kernels.

    Parameters
    ----------
    path : path
        The directory that ``qmoe-pack`` wrote.
    device : str or torch.device, default "cpu"
        The CPU, or a CUDA device, which needs CuPy.
    dtype : torch.dtype, optional
        Of everything but the experts; default: what ``config.json`` says.
    verify : bool, default True
        Whether each expert's checksum is checked when it is first used.
    device_map : str or dict, optional
        Instead of `device`: where each part of the model goes, as transformers takes it (needs accelerate).
    expert_cache : str or int, optional
        Leave the experts on disk and keep only as many in memory as fit these bytes, such as ``"4GiB"``, or
        this number of experts: in the GPU's memory, if `device` is one. `policy`, `page_cache` and `prefetch`
        are then those of :class:`ExpertCache`, which the model has as attribute ``expert_cache``, with counts
        in its ``stats``.
    host_cache : str or int, optional
        With an `expert_cache` on a GPU: keep so many bytes or experts in pinned host memory, too
        (``expert_cache.host``). Default: they only pass through.
    expert_parallel : ProcessGroup, optional
        Spread the experts of each layer over the ranks of this group of torch.distributed. Each rank reads
        and keeps its own, runs the rest of the model on its own tokens, and has to call the model as often as
        the others do (``generate(..., synced_gpus=True)`` sees to that).

    Returns
    -------
    transformers.PreTrainedModel
        Of the class that ``config.json`` names, in evaluation mode, without gradients.

    Raises
    ------
    ArgumentError
        `expert_cache` or `policy` is nonsense, or the cache too small for the experts of one token.
    FormatError
        The directory is not a sound packed model.
    UnsupportedModelError
        The architecture is unknown to this transformers or has another kind of experts, a tensor is missing
        or left over, or packed experts cannot be on this device.
    MissingPackageError
        The device needs CuPy, or `device_map` accelerate.
    FileChangedError
        A file was changed meanwhile.
    """
    path = Path(path)
    if expert_cache is not None and expert_parallel is not None:
        raise UnsupportedModelError(
            "experts are spread over ranks or cached, not both",
            field="expert_cache, expert_parallel",
            value=(expert_cache, "a group"),
            expected="one of them",
        )
    require_device(device, "device")
    if device_map is not None:
        _require_places(device_map)
        if importlib.util.find_spec("accelerate") is None:
            raise MissingPackageError("device_map needs accelerate: pip install accelerate")
    options = CacheOptions(expert_cache, host_cache, policy, page_cache, prefetch)
    options.check()
    place = None if expert_cache is None else one_place(device if device_map is None else device_map)
    with open_model(path) as packed:
        model_class = _model_class(path, packed.config)
        cache = None
        if place is not None:
            config_class: Any = model_class.config_class
            cache = make_cache(packed, options, place, config_class.from_pretrained(path), verify=verify)
        token, group_token = _CACHE.set(cache), _GROUP.set(expert_parallel)
        before = _identities(packed)
        try:
            loaded: Any = model_class.from_pretrained(
                path, dtype=dtype or "auto", device_map=device_map, output_loading_info=True
            )
        except QMoEError:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            # transformers keeps the text of an error in a conversion, not the error itself: look again
            for name in packed.dense_names():
                packed.dense(name)
            raise UnsupportedModelError(_one_line(error), file=path) from error
        finally:
            _CACHE.reset(token)
            _GROUP.reset(group_token)
        for layer in parallel_layers(loaded[0]):
            layer.hold(packed.layer(layer.layer.prefix), verify=verify)
        if changed := [name for name, identity in _identities(packed).items() if identity != before[name]]:
            raise FileChangedError("changed while it was loaded: load it again", file=path / changed[0])
    model: Any = loaded[0]
    found: dict[str, Any] = loaded[1]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[kind]:
            raise UnsupportedModelError(
                f"the tensors do not fit {model_class.__name__}",
                file=path,
                field=kind,
                value=", ".join(sorted(map(str, found[kind]))[:3]),
            )
    for module in model.modules():
        if isinstance(module, QMoEExperts):
            module.verify = verify
    if device_map is None:
        model.to(device)
    loaded_model: transformers.PreTrainedModel = model
    return loaded_model


def _identities(packed: PackedModel) -> dict[str, tuple[int, ...] | None]:
    """What tells the files of a model from others that come in their place."""
    found: dict[str, tuple[int, ...] | None] = {}
    for name in packed.files:
        try:
            found[name] = file_identity((packed.path / name).stat())
        except FileNotFoundError:
            found[name] = None
    return found


def require_device(place: object, field: str) -> None:
    """Refuse a device that packed experts cannot be on, or whose library is missing.

    Raises
    ------
    UnsupportedModelError
        It is none of the CPU, a CUDA device, or a disk that tensors are offloaded to; or torch finds no GPU.
    MissingPackageError
        It is a CUDA device, and CuPy is not installed.
    """
    name = f"cuda:{place}" if isinstance(place, int) else str(place)
    if name in ("cpu", "disk") or (name in AUTOMATIC and not torch.cuda.is_available()):
        return
    if name not in AUTOMATIC and not re.fullmatch(r"cuda(:[0-9]+)?", name):
        raise UnsupportedModelError(
            "packed experts compute on the CPU or a CUDA device",
            field=field,
            value=place,
            expected="cpu or cuda",
        )
    if not torch.cuda.is_available():
        raise UnsupportedModelError("torch finds no such device", field=field, value=place, expected="cpu")
    if importlib.util.find_spec("cupy") is None:
        raise MissingPackageError(
            "packed experts on a GPU need CuPy: pip install 'qmoe-format[gpu]'", field=field, value=place
        )


def _require_places(device_map: Any) -> None:
    for place in device_map.values() if isinstance(device_map, dict) else [device_map]:
        require_device(place, "device_map")


AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of ``device_map`` with which accelerate looks for GPUs."""

_CACHE: ContextVar[ExpertCache | None] = ContextVar("qmoe_expert_cache", default=None)
_GROUP: ContextVar[torch.distributed.ProcessGroup | None] = ContextVar("qmoe_expert_parallel", default=None)
"""What :func:`load` tells the quantizer, which transformers makes and calls."""

_SAVING: ContextVar[bool] = ContextVar("qmoe_saving", default=False)
"""Whether this thread is within :meth:`QMoEQuantizer.saving`."""


class CacheOptions(NamedTuple):
    """What :func:`load` says of an expert cache."""

    expert_cache: str | int | None = None
    host_cache: str | int | None = None
    policy: str = "lru"
    page_cache: bool = True
    prefetch: bool = False

    def check(self) -> None:
        """Refuse what would be heeded with an expert cache only, where there is none.

        Raises
        ------
        ArgumentError
            There is something.
        """
        for name, value in self._asdict().items():
            if self.expert_cache is None and value != self._field_defaults[name]:
                raise ArgumentError(
                    "is of an expert cache", field=name, value=value, expected="expert_cache= with it"
                )


def one_place(device_map: Any) -> torch.device:
    """The device of a whole model, where its one expert cache goes: of a device, or of a map that has one.

    Raises
    ------
    UnsupportedModelError
        There are several, or it is left open which.
    """
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    found = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in places}
    if len(found) != 1 or not found.isdisjoint({*AUTOMATIC, "disk"}):
        raise UnsupportedModelError(
            "an expert cache is on one device",
            field="device_map",
            value=device_map,
            expected="the same device for all of the model, by name",
        )
    return torch.device(found.pop())


def make_cache(
    packed: PackedModel,
    options: CacheOptions,
    place: torch.device,
    config: transformers.PreTrainedConfig,
    *,
    verify: bool,
) -> ExpertCache:
    """The expert cache of a model with this configuration, all of which is on the device `place`.

    Raises
    ------
    ArgumentError
        An option is nonsense, or the cache too small for the experts of one token.
    FileChangedError
        A shard was changed since `packed` was opened.
    """
    assert options.expert_cache is not None
    if place.type == "cuda":
        from .device_slots import CudaStreams, gpu_cache

        number = torch.cuda.current_device() if str(place) == "cuda" else place.index
        cache = gpu_cache(
            packed,
            options.expert_cache,
            CudaStreams(number),
            host_cache=options.host_cache,
            policy=options.policy,
            verify=verify,
            page_cache=options.page_cache,
            prefetch=options.prefetch,
        )
    elif options.host_cache is not None:
        raise ArgumentError(
            "is what a GPU's expert cache is filled from",
            field="host_cache",
            value=options.host_cache,
            expected=f"none on {place}: expert_cache is in host memory there",
        )
    else:
        cache = ExpertCache(
            packed,
            options.expert_cache,
            policy=options.policy,
            verify=verify,
            page_cache=options.page_cache,
            prefetch=options.prefetch,
        )
    cache.require(_experts_per_token(config), packed.path)
    return cache


def _experts_per_token(config: transformers.PreTrainedConfig) -> int:
    """How many experts of a layer a token goes to; 1 if the configuration does not say."""
    text = config.get_text_config()
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
    values = [getattr(text, name, None) for name in names]
    return max((value for value in values if isinstance(value, int)), default=1)


def _model_class(path: Path, config: dict[str, Any]) -> type[transformers.PreTrainedModel]:
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no such model class",
            file=path / "config.json",
            field="architectures",
            value=architectures,
        )
    return model_class


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


@register_quantization_config("qmoe")
class QMoEConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed model (spec 6.3), as it stands in ``config.json``.

    Or, as an argument of ``from_pretrained``, how to load it:
    ``quantization_config=QMoEConfig(expert_cache="4GiB")``.

    Parameters
    ----------
    verify, expert_cache, host_cache, policy, page_cache, prefetch
        As for :func:`load`; of the loading, never of a file.
    **entries
        What stands in ``config.json``; none in an argument of ``from_pretrained``.

    Raises
    ------
    HeaderError, VersionError
        Something in it is missing or illegal, or it is of another version of the format.
    UnsupportedModelError
        This transformers would not heed it as an argument.
    """

    def __init__(
        self,
        *,
        verify: bool = True,
        expert_cache: str | int | None = None,
        host_cache: str | int | None = None,
        policy: str = "lru",
        page_cache: bool = True,
        prefetch: bool = False,
        **entries: Any,
    ) -> None:
        self.__dict__.update({"quant_method": "qmoe", **entries})
        self.verify = verify
        self.cache = CacheOptions(expert_cache, host_cache, policy, page_cache, prefetch)
        self.cache.check()
        if entries:
            self.parsed()
        elif not _LOADING_TYPES:
            raise UnsupportedModelError(
                f"transformers {transformers.__version__} would not heed it: call load()",
                field="quantization_config",
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What a file says, which does not say how to load it."""
        entries = {name: value for name, value in config_dict.items() if name not in _LOADING}
        config = cls(**{"quant_method": None, **entries})
        return (config, kwargs) if return_unused_kwargs else config

    def get_loading_attributes(self) -> dict[str, Any]:
        """What ``from_pretrained`` takes from a config that it is given; the rest is the checkpoint's."""
        return {"verify": self.verify, "cache": self.cache}

    def to_dict(self) -> dict[str, Any]:
        """What stands in ``config.json``."""
        return {name: value for name, value in super().to_dict().items() if name not in ("verify", "cache")}

    def parsed(self) -> QuantizationConfig:
        """What a reader uses of it."""
        return QuantizationConfig.parse({"quantization_config": self.to_dict()}, "config.json")


_LOADING = ("verify", *CacheOptions._fields)

# Configs of these classes are asked for their loading attributes; transformers has no other way to say so
_LOADING_TYPES: Any = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", ())
if _LOADING_TYPES:
    setattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", (*_LOADING_TYPES, QMoEConfig))  # noqa: B010


@register_quantizer("qmoe")
class QMoEQuantizer(HfQuantizer):
    """Puts packed experts in place of a model's own before its weights are loaded."""

    requires_calibration = True
    quantization_config: QMoEConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise UnsupportedModelError(
                "the checkpoint is not packed", field="quantization_config", expected="what qmoe-pack wrote"
            )
        super().__init__(*args, **kwargs)
        self._expected: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._renamed: list[WeightRenaming] = []
        self._cache: ExpertCache | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse devices that packed experts cannot be on."""
        if device_map is not None:
            _require_places(device_map)

    def _process_model_before_weight_loading(
        self,
        model: transformers.PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> None:
        renamings = [
            change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)
        ]
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        config = self.quantization_config.parsed()
        cache = self._cache = _CACHE.get() or self._new_cache(model, checkpoint_files or (), device_map)
        stored = _stored_shapes(checkpoint_files or ())
        for prefix, layer in config.layers.items():
            if any(re.search(pattern, prefix + STORE) for pattern in ignored):
                continue  # such as DeepSeek's layer for multi-token prediction, which the model does not have
            name = module_name(model, layer, renamings)
            with torch.device("meta"):
                experts = _packed_experts(model.get_submodule(name), layer, config.layer_bytes[prefix], cache)
            model.set_submodule(name, experts)
            _check_stored(experts, prefix, stored)
            if rename_source_key(prefix + STORE, renamings, [])[0].removesuffix(STORE) != name:
                packed = re.escape(prefix) + rf"\.({'|'.join(BUFFERS)})$"
                self._renamed.append(WeightRenaming(packed, rf"{name}.\1"))
            # All its weights are loaded; to initialize them, Switch's block would reach into its experts
            block: Any = model.get_submodule(name.rpartition(".")[0])
            block._is_hf_initialized = True
        _refuse_plain_experts(model)
        if (
            cache is not None or _GROUP.get() is not None
        ):  # transformers reads no tensor that the model does not have
            left = "|".join(re.escape(suffix) for suffix in (STORE, STORE_INDEX, DICTIONARIES))
            model._keys_to_ignore_on_load_unexpected = {*ignored, rf"({left})$"}
        self._expected = {
            name: (parameter.shape, wanted_dtype(model, name)) for name, parameter in model.named_parameters()
        }

    def _new_cache(
        self, model: transformers.PreTrainedModel, files: Sequence[str], device_map: Any
    ) -> ExpertCache | None:
        """The cache that a config given to ``from_pretrained`` asks for."""
        config = self.quantization_config
        if config.cache.expert_cache is None:
            return None
        place = one_place("cpu" if device_map is None else device_map)
        with open_model(Path(files[0]).parent) as packed:
            return make_cache(packed, config.cache, place, model.config, verify=config.verify)

    def _process_model_after_weight_loading(
        self, model: transformers.PreTrainedModel, **kwargs: Any
    ) -> transformers.PreTrainedModel:
        # The oldest transformers compare no shapes of a quantized model and keep dtypes of renamed tensors
        for name, parameter in model.named_parameters():
            shape, dtype = self._expected.get(name, (parameter.shape, parameter.dtype))
            if parameter.shape != shape:
                raise UnsupportedModelError(
                    "the tensors do not fit the model that config.json describes",
                    field=name,
                    value=list(parameter.shape),
                    expected=list(shape),
                )
            if parameter.dtype != dtype and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        # To write them as they came, the dense tensors are not to be turned into frames again
        conversions = getattr(model, "_weight_conversions", None) or []
        kept = [change for change in conversions if change not in self._renamed and not _is_ours(change)]
        anything: Any = model
        anything._weight_conversions = kept
        # The experts have no gradient, so none may be asked of what comes before them
        model.requires_grad_(False)
        anything.save_pretrained = PackedSaver(model)
        if self._cache is not None:
            anything.expert_cache = self._cache
        for module in model.modules():
            if isinstance(module, QMoEExperts):
                module.verify = self.quantization_config.verify
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: transformers.PreTrainedModel | None = None
    ) -> list[Any]:
        """Add the decoding of dense frames (spec 5), before the model's own conversions.

        The oldest transformers do not say which `model`.
        """
        changes = [*self._renamed, *weight_conversions]
        names = self.quantization_config.parsed().dense_zstd
        if not names:
            return changes
        converters = [change for change in weight_conversions if isinstance(change, WeightConverter)]
        for name in names:
            if rename_source_key(name, [], converters)[1] is not None:
                raise UnsupportedModelError(
                    "transformers merges or splits this tensor, so it cannot be a dense frame: "
                    "pack without --dense zstd",
                    field=name,
                )
        return [WeightConverter(re.escape(ZSTD), "", [_DecodeDense()]), *changes]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Only for :class:`PackedSaver`, which adds the packed experts; see :meth:`saving`."""
        return _SAVING.get()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Let transformers write everything but the packed experts."""
        token = _SAVING.set(True)
        try:
            yield
        finally:
            _SAVING.reset(token)

    def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Everything but the packed experts."""
        suffixes = tuple(f".{name}" for name in BUFFERS)
        return {k: v for k, v in model.state_dict().items() if not k.endswith(suffixes)}, {}

    @property
    def is_trainable(self) -> bool:
        """False: packed experts have no gradient."""
        return False


def _is_ours(change: Any) -> bool:
    return any(isinstance(operation, _DecodeDense) for operation in getattr(change, "operations", ()))


def _stored_shapes(files: Iterable[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of the packed tensors in the files of a checkpoint."""
    suffixes = (STORE, STORE_INDEX, DICTIONARIES)
    found = {}
    for file in files:
        with SafetensorsFile(Path(file)) as opened:
            for name, tensor in opened.tensors.items():
                if name.endswith(suffixes):
                    found[name] = (tensor.dtype, tensor.shape)
    return found


def _check_stored(
    module: torch.nn.Module, prefix: str, stored: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Refuse a layer whose packed tensors are not in the checkpoint as ``config.json`` describes them."""
    for buffer, tensor in module.named_buffers(recurse=False):
        name = f"{prefix}.{buffer}"
        expected = ("I64" if tensor.dtype == torch.int64 else "U8", tuple(tensor.shape))
        if stored.get(name) != expected:
            value = "nothing" if name not in stored else "{} {}".format(*stored[name])
            raise HeaderError(
                "the packed layer is not what config.json describes",
                field=name,
                value=value,
                expected="{} {}".format(*expected),
            )


def _refuse_plain_experts(model: transformers.PreTrainedModel) -> None:
    """Refuse a model with experts that nothing packed is for: they would be initialized at random."""
    for name, module in model.named_modules():
        if not isinstance(module, QMoEExperts | ParallelExperts) and type(module).__name__.endswith(
            "Experts"
        ):
            raise HeaderError(
                "no packed layer for these experts of the model that config.json describes",
                field=name,
                value=type(module).__name__,
                expected="an entry of quantization_config: layers",
            )


class _DecodeDense(ConversionOps):
    """From a dense frame to the tensor, in the dtype that the model wants."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        ((frame,),) = input_dict.values()
        name: str = kwargs["full_layer_name"]
        dtype, shape, data = decode_dense(memoryview(frame.numpy()))
        if dtype not in DTYPES:
            raise UnsupportedModelError("torch has no such dtype", field=name, value=dtype)
        tensor = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(DTYPES[dtype]).reshape(shape)
        if tensor.is_floating_point():
            tensor = tensor.to(wanted_dtype(kwargs["model"], name))
        return {name: [tensor]}


def wanted_dtype(model: transformers.PreTrainedModel, name: str) -> torch.dtype:
    """The dtype that transformers itself would cast the tensor `name` to."""
    dtype: torch.dtype = model.get_parameter_or_buffer(name).dtype
    plan = model._get_dtype_plan(dtype)
    if plan:
        alternation, by_group, _ = build_glob_alternation(list(plan))
        if match := alternation.search(name):
            dtype = plan[by_group[str(match.lastgroup)]]
    return dtype


def module_name(model: transformers.PreTrainedModel, layer: LayerSpec, renamings: Iterable[Any]) -> str:
    """Name of the module that the model has for the experts of a layer."""
    first = layer.projections[0]
    if first.fused:  # they may have no module of their own on disk
        name = rename_source_key(first.tensor, list(renamings), [])[0].rpartition(".")[0]
    else:
        name = rename_source_key(layer.prefix + STORE, list(renamings), [])[0].removesuffix(STORE)
    modules = {path for path, _ in model.named_modules()}
    base = f"{model.base_model_prefix}."
    # A checkpoint of the bare model may be loaded into the one with a head, and the other way round
    for candidate in (name, base + name, name.removeprefix(base)):
        if candidate in modules:
            return candidate
    raise UnsupportedModelError(
        f"the {type(model).__name__} that config.json describes has no module for these experts",
        field=layer.prefix,
        expected=name,
    )


def _packed_experts(
    module: torch.nn.Module, layer: LayerSpec, sizes: tuple[int, int], cache: ExpertCache | None
) -> QMoEExperts | ParallelExperts:
    """The packed module that computes what `module` computes."""
    store_bytes, dictionaries_bytes = sizes
    kind = _QMoESwitchExperts if is_switch(module) else QMoEExperts
    activation = experts_activation(module, layer)
    biases = [module.get_parameter(name).dtype for name in bias_shapes(layer)]
    bias_dtype = biases[0] if biases else torch.float32
    if cache is not None:
        return kind(layer, activation, cached=cache.layer(layer.prefix), bias_dtype=bias_dtype)
    if (group := _GROUP.get()) is not None:
        return (_ParallelSwitchExperts if is_switch(module) else ParallelExperts)(layer, activation, group)
    return kind(
        layer,
        activation,
        store_bytes=store_bytes,
        dictionaries_bytes=dictionaries_bytes,
        bias_dtype=bias_dtype,
    )


def is_switch(module: torch.nn.Module) -> bool:
    """Whether `module` is called with a one-hot mask, as the experts of Switch Transformers are."""
    return type(module).__name__ == "SwitchTransformersExperts"


def experts_activation(module: torch.nn.Module, layer: LayerSpec) -> Activation | None:
    """The activation of a model's own experts, after a check that they compute what `layer` says.

    Returns
    -------
    callable or None
        From a tensor to one of the same shape; None where the layer has a gating of its own.

    Raises
    ------
    UnsupportedModelError
        They are experts of an unknown kind.
    HeaderError
        Their shapes are others.
    """
    if type(module).__name__ == "NllbMoeExperts":
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} runs only experts 0 and 1 of this family: its router "
            "gives a mask of zeros and ones, which its experts take for the numbers of experts",
            field=layer.prefix,
            value=type(module).__name__,
            expected="qmoe-unpack, and a runtime that computes NLLB-MoE",
        )
    return _switch_activation(module, layer) if is_switch(module) else _gated_activation(module, layer)


def _gated_activation(module: torch.nn.Module, layer: LayerSpec) -> Activation | None:
    """The activation of experts that compute what spec 6.3 says, in the layer's shapes."""
    biases = bias_shapes(layer)
    gate = getattr(type(module), "_apply_gate", None)
    usual = {"has_gate": True, "has_bias": bool(biases), "has_post_expert_norm": False}
    if layer.gating is None:
        # Set by transformers' decorator use_experts_implementation: all that its own kernels know of a layer
        known = gate is not None and gate.__module__ == "transformers.integrations.moe"
    else:
        known = type(module).__name__ == "GptOssExperts"
    known = known and all(getattr(module, name, value) is value for name, value in usual.items())
    if not known or {name for name, _ in module.named_parameters()} != {"gate_up_proj", "down_proj", *biases}:
        raise UnsupportedModelError(
            "experts of this kind cannot be computed packed", field=layer.prefix, value=type(module).__name__
        )
    shapes = {projection.role: (projection.rows, projection.columns) for projection in layer.projections}
    packed: dict[str, tuple[int, ...]] = dict(biases)
    if shapes.keys() == {"gate", "up", "down"}:
        rows, columns = shapes["up"]
        for name, shape in (("gate_up_proj", (2 * rows, columns)), ("down_proj", shapes["down"])):
            is_transposed = getattr(module, "is_transposed", False)
            packed[name] = (layer.experts, *(shape[::-1] if is_transposed else shape))
    _compare_shapes(layer, packed, module)
    if layer.gating is None:
        found: Any = module
        activation: Activation = found.act_fn
        return activation
    numbers = {"alpha": layer.gating.alpha, "limit": layer.gating.limit}
    if found := {
        name: getattr(module, name, None) for name in numbers if getattr(module, name, None) != numbers[name]
    }:
        raise HeaderError(
            "the packed layer's gating is not that of the model that config.json describes",
            field=f"{layer.prefix}: gating",
            value=numbers,
            expected=found,
        )
    return None


def _switch_activation(module: torch.nn.Module, layer: LayerSpec) -> torch.nn.Module:
    """The activation of the experts of Switch Transformers, whose shapes are those of the packed layer."""
    packed: dict[str, tuple[int, ...]] = {
        f"expert_{expert}.{projection.name}.weight": (projection.rows, projection.columns)
        for expert in range(layer.experts)
        for projection in layer.projections
    }
    _compare_shapes(layer, packed, module)
    return module.get_submodule("expert_0.act")


def _compare_shapes(layer: LayerSpec, packed: dict[str, tuple[int, ...]], module: torch.nn.Module) -> None:
    model = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    apart = {name.partition(".")[0] for name in model if name.startswith("expert_")}
    experts = len(apart) or max(shape[0] for shape in model.values())
    if layer.experts != experts:
        raise HeaderError(
            "the packed layer has another number of experts than the model that config.json describes",
            field=layer.prefix,
            value=layer.experts,
            expected=experts,
        )
    if packed != model:
        name = min(name for name in packed.keys() | model.keys() if packed.get(name) != model.get(name))
        raise HeaderError(
            "the packed layer does not fit the model that config.json describes",
            field=f"{layer.prefix}: {name}",
            value=packed.get(name, "nothing"),
            expected=model.get(name, "nothing"),
        )


class _QMoESwitchExperts(QMoEExperts):
    """Experts of Switch Transformers: called with a one-hot mask, empty for tokens beyond the capacity."""

    def forward(
        self, hidden_states: torch.Tensor, selected_experts: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """Route tokens: hidden states [T, H], mask [T, 1, experts], weights [T, 1]."""
        index = _switch_index(self, selected_experts)
        return super().forward(hidden_states, index, routing_weights)


class _ParallelSwitchExperts(ParallelExperts):
    """The same over several ranks."""

    def forward(
        self, hidden_states: torch.Tensor, selected_experts: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """Route tokens: hidden states [T, H], mask [T, 1, experts], weights [T, 1]."""
        index = _switch_index(self, selected_experts)
        return super().forward(hidden_states, index, routing_weights)


def _switch_index(module: QMoEExperts | ParallelExperts, mask: torch.Tensor) -> torch.Tensor:
    """The expert of each token, and the number of experts where the mask has none: [T, 1]."""
    if module.training:
        message = "packed experts have no dropout: call model.eval()"
        raise UnsupportedModelError(message, file=module.layer.prefix)
    return torch.where(mask.any(dim=-1), mask.argmax(dim=-1), module.num_experts)
