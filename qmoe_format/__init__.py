"""The container of qmoe-format: packed models as checkpoint directories.

:func:`open` reads one, :func:`verify` checks one completely, :class:`PackedModelWriter` makes one.
"""

from qmoe_codec.errors import (
    FORMAT_ERRORS,
    ArgumentError,
    CheckpointError,
    ChecksumError,
    FileChangedError,
    FormatError,
    HeaderError,
    MagicError,
    MemoryLimitError,
    MissingDictionaryError,
    MissingPackageError,
    OutputExistsError,
    PayloadError,
    QMoEError,
    RowIndexError,
    SizeError,
    TruncatedError,
    UnsupportedModelError,
    VersionError,
)

from .container import LayerSpec, Projection
from .reader import PackedLayer, PackedModel
from .reader import open_model as open
from .verify import VerifyReport, verify
from .writer import PackedModelWriter

__all__ = [
    "FORMAT_ERRORS",
    "ArgumentError",
    "CheckpointError",
    "ChecksumError",
    "FileChangedError",
    "FormatError",
    "HeaderError",
    "LayerSpec",
    "MagicError",
    "MemoryLimitError",
    "MissingDictionaryError",
    "MissingPackageError",
    "OutputExistsError",
    "PackedLayer",
    "PackedModel",
    "PackedModelWriter",
    "PayloadError",
    "Projection",
    "QMoEError",
    "RowIndexError",
    "SizeError",
    "TruncatedError",
    "UnsupportedModelError",
    "VerifyReport",
    "VersionError",
    "open",
    "verify",
]
