"""The layout of the checkpoints that the authors of QMoE published, and reading it without trusting it.

The layout in words, found by reading the authors' program (github.com/IST-DASLab/qmoe), none of which is
here. See also spec/published-qmoe.md.

A directory with ``config.json`` (of a SwitchTransformers model) and pickled tensors:

* ``expNN.pt``, one for each layer with experts, in the order encoder, then decoder. For each expert's matrix
  M, such as ``encoder.block.1.layer.1.mlp.experts.expert_0.wi``, whose rows are outputs:

  * ``M.w_comp``: int16 [codewords], to be read as unsigned; all rows' codewords, one row after the other
  * ``M.row_off``: int32 [rows + 1]; row r has the codewords number row_off[r] up to row_off[r + 1]
  * ``M.ter_minmax``: bfloat16 [2 · rows]; each row's least and greatest weight, least first
  * ``M.weight``: bfloat16 [0]; a placeholder

* ``sizes.pt``: M -> number of codewords
* ``noexp.pt``: every other tensor, in float32 or bfloat16; the embeddings under each of their names

A row is cut greedily into the longest phrases of the dictionary (:mod:`.dictionary`). Its zeros at the end
are sent too, and the last phrase ends exactly with the row, or one zero after it where the number of columns
is odd. Symbol 1 stands for a row's least weight and 2 for its greatest, 0 for zero. In a row without negative
weights the least is zero, and then every zero is sent as 1; in one without positive weights, or all of
zeros, as 2. Rows beyond a multiple of 32 were lost by the authors' packer and have no codewords.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

from qmoe_codec.errors import CheckpointError, SizeError

from qmoe_format.files import open_regular

from . import SIZES
from .needs_torch import torch

CONFIG = "config.json"
CODEWORDS, ROW_OFFSETS, LEVELS, PLACEHOLDER = ".w_comp", ".row_off", ".ter_minmax", ".weight"
MODEL_TYPE = "switch_transformers"
#: Other names of ``shared.weight`` where `tie_word_embeddings` is set.
TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
SHARED = "shared.weight"

TORCH_DTYPES: dict[str, torch.dtype] = {
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
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_EXPERTS = re.compile(r"exp[0-9]{2,6}\.pt")
_SIZES_LIMIT = 1 << 30  # bytes; c-2048, the largest model, has 10 MB

# What torch.load raises on bytes that are not what it expects.
_LOAD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def expert_file(number: int) -> str:
    """Name of the file of the layer with this number among those with experts."""
    return f"exp{number:02d}.pt"


def expert_files(directory: Path) -> list[Path]:
    """The files of expert layers, in the order of their numbers."""
    names = (name for name in os.listdir(directory) if _EXPERTS.fullmatch(name))
    return [directory / name for name in sorted(names, key=lambda name: (int(name[3:-3]), name))]


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.pt`` file: mapped, so that nothing is read before it is used; no code is run.

    Raises
    ------
    CheckpointError
        It is not a file of ``torch.save`` with plain tensors by name.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _load(file, mapped=True).items():
        if not isinstance(tensor, torch.Tensor) or not is_plain(tensor):
            raise CheckpointError(
                "not a plain tensor",
                file=file,
                field=name,
                value=type(tensor).__name__,
                expected="a contiguous tensor that lies in the file",
            )
        tensors[name] = tensor.detach()
    return tensors


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is its own bytes and no more: not sparse, not a view that repeats elements."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPE_NAMES:
        return False
    start = tensor.storage_offset() * tensor.element_size()
    return tensor.is_contiguous() and start + tensor.nbytes <= tensor.untyped_storage().nbytes()


def read_sizes(directory: Path) -> dict[str, int]:
    """``sizes.pt``: matrix -> number of codewords.

    Raises
    ------
    CheckpointError
        It is missing or something else.
    """
    file = directory / SIZES
    if file.exists() and file.stat().st_size > _SIZES_LIMIT:
        raise SizeError("too large", file=file, expected=f"at most {_SIZES_LIMIT} bytes")
    sizes: dict[str, int] = {}
    for name, size in _load(file, mapped=False).items():
        if type(size) is not int or not 0 <= size < 1 << 31:
            raise CheckpointError(
                "not a number of codewords",
                file=file,
                field=name,
                value=repr(size)[:40],
                expected="0 to 2^31 - 1",
            )
        sizes[name] = size
    return sizes


def _load(file: Path, *, mapped: bool) -> Mapping[str, object]:
    """The dictionary that a ``.pt`` file holds, by torch's restricted unpickler."""
    if not file.exists():
        raise CheckpointError("missing", file=file, expected="a checkpoint as the authors of QMoE save it")
    os.close(open_regular(file))
    try:
        loaded: object = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except _LOAD_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"not a file of tensors: {reason}", file=file, expected="as torch.save writes it since torch 1.6"
        ) from error
    if not isinstance(loaded, Mapping) or not all(isinstance(name, str) for name in loaded):
        raise CheckpointError(
            "not tensors by name", file=file, value=type(loaded).__name__, expected="a dictionary"
        )
    return loaded
