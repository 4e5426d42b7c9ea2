"""Ternarizing Mixture-of-Experts checkpoints and packing them.

Light: what needs torch is in :mod:`.calibrated` (``calibrate``), :mod:`.recipes` (``RecipeSettings``) and
:mod:`.store`.
"""

from __future__ import annotations

from .checkpoint import SourceCheckpoint
from .families import FAMILIES, find_layers
from .nearest import ternarize
from .options import CalibrationOptions, HessianOptions, StreamOptions
from .pipeline import (
    NearestTernarizer,
    PackOptions,
    PackSummary,
    Ternarizer,
    expert_layers,
    pack,
)
from .plan import Plan, predict
from .ternary import TernaryExpert, TernaryMatrix
from .text import TextOptions

__all__ = [
    "FAMILIES",
    "CalibrationOptions",
    "HessianOptions",
    "NearestTernarizer",
    "PackOptions",
    "PackSummary",
    "Plan",
    "SourceCheckpoint",
    "StreamOptions",
    "Ternarizer",
    "TernaryExpert",
    "TernaryMatrix",
    "TextOptions",
    "expert_layers",
    "find_layers",
    "pack",
    "predict",
    "ternarize",
]
