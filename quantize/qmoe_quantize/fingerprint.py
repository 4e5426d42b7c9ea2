"""What a run is made of, so that it is not gone on with, or a store used, for something else."""

from __future__ import annotations

import hashlib
import json

from .checkpoint import SourceCheckpoint

WHOLE_BYTES = 1 << 20
PIECES, PIECE_BYTES = 16, 1 << 16


def model_digest(checkpoint: SourceCheckpoint) -> str:
    """SHA-256 that stands for a checkpoint: configuration, tensors' names, dtypes and shapes, and content.

    Of a tensor of up to 1 MiB all bytes count; of a longer one 16 pieces of 64 KiB, spread evenly, since to
    read a large checkpoint once more just to tell it from another would take hours.
    """
    digest = hashlib.sha256(json.dumps(dict(checkpoint.config.values), sort_keys=True).encode())
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode())
        if tensor.nbytes <= WHOLE_BYTES:
            digest.update(checkpoint.data(name))
            continue
        for piece in range(PIECES):
            start = (tensor.nbytes - PIECE_BYTES) * piece // (PIECES - 1)
            digest.update(checkpoint.data_piece(name, start, PIECE_BYTES))
    return digest.hexdigest()
