"""Packed matrices on an NVIDIA GPU: unpacked, multiplied and encoded there, the bytes those of the file.

Needs CuPy when something is called, not to be imported. With torch: :mod:`qmoe_gpu_decode.torch_ops`.
"""

from .experts import (
    ACTIVATIONS,
    CLAMPED_SWIGLU,
    ExpertProjection,
    LentExpert,
    LentExperts,
    PackedExperts,
)
from .verbs import Matrix, decode, dequantize, encode, matmul

__all__ = [
    "ACTIVATIONS",
    "CLAMPED_SWIGLU",
    "ExpertProjection",
    "LentExpert",
    "LentExperts",
    "Matrix",
    "PackedExperts",
    "decode",
    "dequantize",
    "encode",
    "matmul",
]
