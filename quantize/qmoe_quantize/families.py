"""Which tensors of a checkpoint are experts: one row of a table per model family.

A family keeps its experts on disk as one tensor per expert and projection, or fuses all experts of a layer
into one. The shapes that a ``config.json`` implies are in :mod:`qmoe_quantize.shapes`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, NoReturn, Protocol

from qmoe_codec.errors import CheckpointError, UnsupportedModelError

from qmoe_format.container import EXPERT, ROLES, Gating, LayerSpec, Projection, natural_key

from .config import ModelConfig

PACKABLE_DTYPES = ("BF16", "F16", "F32")


class TensorInfo(Protocol):
    """What a safetensors header says of a tensor."""

    @property
    def dtype(self) -> str:
        """Safetensors name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        ...


TensorTable = Mapping[str, TensorInfo]
"""Tensor name -> its dtype and shape."""


class Part(NamedTuple):
    """One projection of a family's experts: role (spec 6.3), and tensors, behind the layer's prefix."""

    role: str
    tensor: str
    bias: str | None = None


@dataclass(frozen=True)
class Family:
    """How a family names its expert tensors.

    Attributes
    ----------
    prefix : str
        Regular expression for the name of a layer's experts.
    parts : dict of str to Part
        By the projection's name, in the order of the frames in a record.
    transposed, interleaved : bool
        How matrices lie in fused tensors (spec 6.3).
    gating : callable, optional
        Gives what the experts do between their projections, where that is not act(gate) · up.
    """

    prefix: str
    parts: Mapping[str, Part]
    transposed: bool = False
    interleaved: bool = False
    gating: Callable[[ModelConfig], Gating] | None = None

    @cached_property
    def expert(self) -> re.Pattern[str]:
        """Matches the name of an expert tensor, with the layer's name as group ``prefix``."""
        number = "(?:0|[1-9][0-9]{0,5})"
        tensors = dict.fromkeys(part.tensor for part in self.parts.values())
        names = "|".join(re.escape(tensor).replace(re.escape(EXPERT), number) for tensor in tensors)
        return re.compile(rf"(?P<prefix>{self.prefix})\.(?:{names})")


def _per_expert(prefix: str, names: str) -> Family:
    """Family with a tensor per expert and projection; `names` are those of gate, up and down."""
    parts = {
        name: Part(role, f"{EXPERT}.{name}.weight") for name, role in zip(names.split(), ROLES, strict=True)
    }
    return Family(prefix, parts)


def _fused(gate_up: str, down: str, bias: str | None = None) -> dict[str, Part]:
    """Gate and up in one tensor, down in another one, and their biases under names with `bias` behind."""

    def part(role: str, tensor: str) -> Part:
        return Part(role, tensor, None if bias is None else tensor + bias)

    return {
        "gate_proj": part("gate", gate_up),
        "up_proj": part("up", gate_up),
        "down_proj": part("down", down),
    }


def _gpt_oss_gating(config: ModelConfig) -> Gating:
    # Neither is in the configuration of the first releases, whose code has these numbers
    return Gating(
        "clamped_swiglu", config.decimal("swiglu_alpha", 1.702), config.decimal("swiglu_limit", 7.0)
    )


_GATED = "gate_proj up_proj down_proj"
_LAYER = r"model\.layers\.[0-9]+"
_GATED_MLP = _per_expert(rf"{_LAYER}\.mlp\.experts", _GATED)
_MIXTRAL = _per_expert(rf"{_LAYER}\.block_sparse_moe\.experts", "w1 w3 w2")
_GRANITE = Family(rf"{_LAYER}\.block_sparse_moe", _fused("input_linear.weight", "output_linear.weight"))
FAMILIES: dict[str, Family] = {
    "olmoe": _GATED_MLP,
    "qwen2_moe": _GATED_MLP,
    "qwen3_moe": _GATED_MLP,
    "deepseek_v2": _GATED_MLP,
    "deepseek_v3": _GATED_MLP,
    "mixtral": _MIXTRAL,
    "gpt_oss": Family(
        rf"{_LAYER}\.mlp\.experts",
        _fused("gate_up_proj", "down_proj", "_bias"),
        transposed=True,
        interleaved=True,
        gating=_gpt_oss_gating,
    ),
    "switch_transformers": Family(
        r"(?:encoder|decoder)\.block\.[0-9]+\.layer\.[0-9]+\.mlp\.experts",
        {
            "wi": Part("up", "expert_{expert}.wi.weight"),
            "wo": Part("down", "expert_{expert}.wo.weight"),
        },
    ),
    "nllb-moe": Family(
        r"model\.(?:encoder|decoder)\.layers\.[0-9]+\.ffn\.experts",
        {
            "fc1": Part("up", "expert_{expert}.fc1.weight", "expert_{expert}.fc1.bias"),
            "fc2": Part("down", "expert_{expert}.fc2.weight", "expert_{expert}.fc2.bias"),
        },
    ),
    # Those whose other tensors transformers is asked for (qmoe_quantize.shapes)
    "afmoe": _GATED_MLP,
    "cohere2_moe": _GATED_MLP,
    "dots1": _GATED_MLP,
    "ernie4_5_moe": _GATED_MLP,
    "exaone_moe": _GATED_MLP,
    "flex_olmo": _GATED_MLP,
    "glm4_moe": _GATED_MLP,
    "glm4_moe_lite": _GATED_MLP,
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "hunyuan_v1_moe": _GATED_MLP,
    "hy_v3": _GATED_MLP,
    "jamba": _per_expert(rf"{_LAYER}\.feed_forward\.experts", _GATED),
    "lfm2_moe": _per_expert(rf"{_LAYER}\.feed_forward\.experts", "w1 w3 w2"),
    "minimax": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "phimoe": _MIXTRAL,
    "qwen3_next": _GATED_MLP,
    "solar_open": _GATED_MLP,
}


def family_of(config: ModelConfig) -> Family:
    """The family of a model, by its ``model_type``.

    Raises
    ------
    UnsupportedModelError
        The ``model_type`` is not in the table.
    """
    model_type = config.text("model_type")
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            "this architecture is not supported",
            file=config.file,
            field="model_type",
            value=model_type,
            expected=f"one of {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[model_type]


def find_layers(config: ModelConfig, tensors: TensorTable) -> list[LayerSpec]:
    """Find the expert layers among the tensors of a checkpoint.

    Parameters
    ----------
    config : ModelConfig
        Decides the family and the number of experts.
    tensors : Mapping
        Tensor name -> its dtype and shape.

    Returns
    -------
    list of LayerSpec
        In the order of the model's layers. All tensors that they do not name are dense.

    Raises
    ------
    UnsupportedModelError
        The architecture, an expert tensor's dtype, or a tensor beside the experts' weights is not supported.
    CheckpointError
        Expert tensors are missing, too many, or differ in shape or dtype.
    """
    family = family_of(config)
    experts = config.experts
    found: dict[str, set[str]] = {}
    for name in tensors:
        if match := family.expert.fullmatch(name):
            found.setdefault(match["prefix"], set()).add(name)
    if not found:
        example = f"….{next(iter(family.parts.values())).tensor.replace(EXPERT, '0')}"
        raise CheckpointError(
            f"no expert tensors of {config.text('model_type')}",
            file=config.directory,
            expected=f"tensors such as {example}",
        )
    layers = [
        _layer(config, family, prefix, found[prefix], tensors, experts)
        for prefix in sorted(
            found, key=lambda prefix: (re.search(r"\bdecoder\.", prefix) is not None, natural_key(prefix))
        )
    ]
    _refuse_strangers(config, layers, tensors)
    return layers


def _layer(
    config: ModelConfig,
    family: Family,
    prefix: str,
    names: set[str],
    tensors: TensorTable,
    experts: int,
) -> LayerSpec:
    """The layer `prefix`, after a check that its tensors are complete and alike."""
    first = min(names)
    dtype = tensors[first].dtype
    if dtype not in PACKABLE_DTYPES:
        raise UnsupportedModelError(
            "experts of this dtype cannot be packed; convert the checkpoint to bf16 first",
            file=config.directory,
            field=first,
            value=dtype,
            expected=" or ".join(PACKABLE_DTYPES),
        )
    check = _TensorCheck(config, prefix, experts, tensors)
    projections = []
    for name, part in family.parts.items():
        tensor = f"{prefix}.{part.tensor}"
        sharing = sum(other.tensor == part.tensor for other in family.parts.values())
        if EXPERT in tensor:
            rows, columns = check.per_expert(tensor, dtype)
        else:
            rows, columns = check.fused(tensor, dtype, family.transposed, sharing)
        projections.append(
            Projection(
                name,
                part.role,
                tensor,
                rows,
                columns,
                transposed=family.transposed,
                # One by itself has nothing to take turns with
                interleaved=family.interleaved and sharing > 1,
                bias=None if part.bias is None else f"{prefix}.{part.bias}",
            )
        )
    gating = None if family.gating is None else family.gating(config)
    layer = LayerSpec(prefix, experts, tuple(projections), dtype, gating)
    if beyond := names.difference(layer.tensor_names()):
        raise CheckpointError(
            "an expert beyond the number in config.json",
            file=config.directory,
            field=min(beyond),
            expected=f"{experts} experts in {prefix}",
        )
    check.biases(layer)
    return layer


@dataclass(frozen=True)
class _TensorCheck:
    """Checks the tensors of one layer of a checkpoint."""

    config: ModelConfig
    prefix: str
    experts: int
    tensors: TensorTable

    def per_expert(self, template: str, dtype: str) -> tuple[int, ...]:
        """The shape of a matrix that every expert has."""
        shape: tuple[int, ...] = ()
        for expert in range(self.experts):
            name = template.replace(EXPERT, str(expert))
            tensor = self._find(name)
            shape = shape or tensor.shape
            if len(shape) != 2 or tensor.shape != shape or tensor.dtype != dtype:
                self._refuse(name, f"{dtype} {list(shape) if len(shape) == 2 else 'matrix'}")
        return shape

    def fused(self, name: str, dtype: str, transposed: bool, sharing: int) -> tuple[int, int]:
        """Rows and columns of each of `sharing` projections in a fused tensor."""
        tensor = self._find(name)
        if len(tensor.shape) != 3 or tensor.shape[0] != self.experts or tensor.dtype != dtype:
            self._refuse(name, f"{dtype} [{self.experts}, rows, columns], as config.json says")
        rows, columns = tensor.shape[:0:-1] if transposed else tensor.shape[1:]
        if rows % sharing:
            self._refuse(name, f"a multiple of {sharing} rows")
        return rows // sharing, columns

    def biases(self, layer: LayerSpec) -> None:
        """Compare the biases that a layer names with its projections."""
        for projection in layer.projections:
            if projection.bias is None:
                continue
            shape: tuple[int, ...] = (projection.rows,)
            if projection.fused:
                shape = (layer.experts, layer.fused_rows(projection).total)
            for name in layer.expanded([projection.bias]):
                tensor = self._find(name)
                if tensor.shape != shape or tensor.dtype not in PACKABLE_DTYPES:
                    self._refuse(name, f"{layer.dtype} {list(shape)}")

    def _find(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(
                "missing from the checkpoint",
                file=self.config.directory,
                field=name,
                expected=f"{self.experts} experts in {self.prefix}, as config.json says",
            )
        return self.tensors[name]

    def _refuse(self, name: str, expected: str) -> NoReturn:
        tensor = self.tensors[name]
        raise CheckpointError(
            "unlike the other experts of its layer",
            file=self.config.directory,
            field=name,
            value=f"{tensor.dtype} {list(tensor.shape)}",
            expected=expected,
        )


def _refuse_strangers(config: ModelConfig, layers: Sequence[LayerSpec], tensors: TensorTable) -> None:
    """Refuse tensors of experts that are no weight: a reader would not know what a scale is for."""
    known = {name for layer in layers for name in (*layer.tensor_names(), *layer.bias_names())}
    # A fused layer may be called as the module that its router, too, is in
    inside = tuple(f"{layer.prefix}." for layer in layers if layer.prefix.endswith("experts"))
    for name in tensors:
        if name.startswith(inside) and name not in known:
            raise UnsupportedModelError(
                "a tensor of an expert that is none of its projections",
                file=config.directory,
                field=name,
                expected="one weight per expert and projection",
            )
