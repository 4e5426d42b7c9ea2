"""torch, or an error in one line that says how to get it."""

from __future__ import annotations

from qmoe_codec.errors import MissingPackageError

try:
    import torch
except ModuleNotFoundError as error:
    message = "files of tensors (.pt) need torch, which is not installed: pip install 'qmoe-format[torch]'"
    raise MissingPackageError(message) from error

__all__ = ["torch"]
