"""Ternarizing Mixture-of-Experts checkpoints and packing them; needs torch."""

from __future__ import annotations

from qmoe_codec.errors import MissingPackageError

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingPackageError("torch is not installed: pip install 'qmoe-format[torch]'") from error

from .checkpoint import SourceCheckpoint
from .families import FAMILIES, find_layers
from .nearest import ternarize
from .pipeline import (
    NearestTernarizer,
    PackOptions,
    PackSummary,
    Ternarizer,
    TernaryExpert,
    TernaryMatrix,
    pack,
)
from .plan import Plan, predict

__all__ = [
    "FAMILIES",
    "NearestTernarizer",
    "PackOptions",
    "PackSummary",
    "Plan",
    "SourceCheckpoint",
    "Ternarizer",
    "TernaryExpert",
    "TernaryMatrix",
    "find_layers",
    "pack",
    "predict",
    "ternarize",
]
