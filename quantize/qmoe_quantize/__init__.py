"""Ternarizing Mixture-of-Experts checkpoints and packing them."""

from __future__ import annotations

from .calibrated import CalibrationOptions, CalibrationSummary, calibrate
from .checkpoint import SourceCheckpoint
from .families import FAMILIES, find_layers
from .mixture import HessianOptions
from .nearest import ternarize
from .pipeline import (
    NearestTernarizer,
    PackOptions,
    PackSummary,
    Ternarizer,
    expert_layers,
    pack,
)
from .plan import Plan, predict
from .recipes import RecipeSettings
from .streaming import StreamOptions
from .ternary import TernaryExpert, TernaryMatrix
from .text import TextOptions

__all__ = [
    "FAMILIES",
    "CalibrationOptions",
    "CalibrationSummary",
    "HessianOptions",
    "NearestTernarizer",
    "PackOptions",
    "PackSummary",
    "Plan",
    "RecipeSettings",
    "SourceCheckpoint",
    "StreamOptions",
    "Ternarizer",
    "TernaryExpert",
    "TernaryMatrix",
    "TextOptions",
    "calibrate",
    "expert_layers",
    "find_layers",
    "pack",
    "predict",
    "ternarize",
]
