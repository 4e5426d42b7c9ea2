"""Which tensors of a checkpoint are experts: one row of a table per model family.

Every family here keeps its experts on disk as one tensor per expert and projection. The shapes that a
``config.json`` implies are in :mod:`qmoe_quantize.shapes`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from qmoe_codec.errors import CheckpointError, UnsupportedModelError

from qmoe_format.container import LayerSpec, Projection, natural_key

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


@dataclass(frozen=True)
class Family:
    """How a family names its expert tensors.

    Attributes
    ----------
    expert : re.Pattern
        Matches the name of an expert tensor; groups ``prefix``, ``expert`` and ``projection``.
    template : str
        The name again, to be filled in with the same three.
    roles : dict
        Projection name -> role (spec 6.3), in the order of the frames in a record.
    """

    expert: re.Pattern[str]
    template: str
    roles: Mapping[str, str]

    def tensor(self, prefix: str, projection: str) -> str:
        """Name of an expert tensor with ``{expert}`` for the number."""
        return self.template.format(prefix=prefix, expert="{expert}", projection=projection)


def _family(prefix: str, number: str, roles: Mapping[str, str]) -> Family:
    """Family whose layers are named by the regular expression `prefix`, its experts by `number`."""
    return Family(
        re.compile(
            rf"(?P<prefix>{prefix})\.{number.format('(?P<expert>0|[1-9][0-9]{0,5})')}"
            rf"\.(?P<projection>{'|'.join(roles)})\.weight"
        ),
        "{prefix}." + number.format("{expert}") + ".{projection}.weight",
        roles,
    )


_GATED_MLP = _family(
    r"model\.layers\.[0-9]+\.mlp\.experts",
    "{}",
    {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
)
FAMILIES: dict[str, Family] = {
    "olmoe": _GATED_MLP,
    "qwen2_moe": _GATED_MLP,
    "qwen3_moe": _GATED_MLP,
    "deepseek_v2": _GATED_MLP,
    "deepseek_v3": _GATED_MLP,
    "mixtral": _family(
        r"model\.layers\.[0-9]+\.block_sparse_moe\.experts",
        "{}",
        {"w1": "gate", "w3": "up", "w2": "down"},
    ),
    "switch_transformers": _family(
        r"(?:encoder|decoder)\.block\.[0-9]+\.layer\.[0-9]+\.mlp\.experts",
        "expert_{}",
        {"wi": "up", "wo": "down"},
    ),
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
        example = family.template.format(prefix="…", expert=0, projection=next(iter(family.roles)))
        raise CheckpointError(
            f"no expert tensors of {config.text('model_type')}",
            file=config.directory,
            expected=f"tensors such as {example}",
        )
    _refuse_strangers(config, found, tensors)
    return [
        _layer(config, family, prefix, found[prefix], tensors, experts)
        for prefix in sorted(found, key=lambda prefix: (prefix.startswith("decoder."), natural_key(prefix)))
    ]


def _layer(
    config: ModelConfig,
    family: Family,
    prefix: str,
    names: set[str],
    tensors: TensorTable,
    experts: int,
) -> LayerSpec:
    """The layer `prefix`, after a check that its tensors are complete and alike."""
    projections = []
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
    for projection, role in family.roles.items():
        template = family.tensor(prefix, projection)
        shape: tuple[int, ...] = ()
        for expert in range(experts):
            name = template.replace("{expert}", str(expert))
            if name not in names:
                raise CheckpointError(
                    "missing from the checkpoint",
                    file=config.directory,
                    field=name,
                    expected=f"{experts} experts in {prefix}, as config.json says",
                )
            names.remove(name)
            tensor = tensors[name]
            shape = shape or tensor.shape
            if len(shape) != 2 or tensor.shape != shape or tensor.dtype != dtype:
                raise CheckpointError(
                    "unlike the other experts of its layer",
                    file=config.directory,
                    field=name,
                    value=f"{tensor.dtype} {list(tensor.shape)}",
                    expected=f"{dtype} {list(shape) if len(shape) == 2 else 'matrix'}",
                )
        projections.append(Projection(projection, role, template, *shape))
    if names:
        raise CheckpointError(
            "an expert beyond the number in config.json",
            file=config.directory,
            field=min(names),
            expected=f"{experts} experts in {prefix}",
        )
    return LayerSpec(prefix, experts, tuple(projections), dtype)


def _refuse_strangers(config: ModelConfig, found: Mapping[str, set[str]], tensors: TensorTable) -> None:
    """Refuse tensors of experts that are no weight: a reader would not know what a scale or bias is for."""
    for name in tensors:
        inside = (prefix for prefix in found if name.startswith(f"{prefix}."))
        if any(name not in found[prefix] for prefix in inside):
            raise UnsupportedModelError(
                "a tensor of an expert that is none of its projections",
                file=config.directory,
                field=name,
                expected="one weight per expert and projection",
            )
