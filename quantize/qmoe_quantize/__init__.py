"""Ternarizing Mixture-of-Experts checkpoints and packing them."""

from __future__ import annotations

from .checkpoint import SourceCheckpoint
from .families import FAMILIES, find_layers
from .nearest import ternarize
from .pipeline import (
    NearestTernarizer,
    PackOptions,
    PackSummary,
    Ternarizer,
    TernaryExpert,
    pack,
)
from .plan import Plan, predict
from .ternary import TernaryMatrix

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
