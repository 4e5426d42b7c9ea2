"""Dictionary-coded ternary matrices: the codec of the qmoe format (spec/qmoe-format-v1.md).

>>> import numpy as np, qmoe_codec
>>> trits = np.random.default_rng(0).choice([-1, 0, 1], (64, 512), p=[0.06, 0.88, 0.06]).astype(np.int8)
>>> levels = np.tile(np.float32([-0.5, 0.5]), (64, 1))
>>> dictionary = qmoe_codec.build_dictionary(0.88, bits=10)
>>> frame = qmoe_codec.encode(trits, levels, dictionary)
>>> decoded, _ = qmoe_codec.decode(frame, {dictionary.dictionary_id: dictionary})
>>> bool((decoded == trits).all())
True
"""

from .codec import (
    BACKENDS,
    MEMORY_LIMIT,
    Matrix,
    check_memory,
    crc32c,
    decode,
    dequantize,
    encode,
    experts_matmul,
    kernels_name,
    matmul,
    read_frame_header,
    round_levels,
)
from .crc import flipped_bit
from .dictionary import Dictionary, build_dictionary, join_dictionaries, parse_dictionaries
from .errors import (
    ArgumentError,
    CheckpointError,
    ChecksumError,
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
from .layout import LEVEL_FORMATS, DictionaryHeader, FrameHeader
from .selection import DictionarySet

__all__ = [
    "BACKENDS",
    "LEVEL_FORMATS",
    "MEMORY_LIMIT",
    "ArgumentError",
    "CheckpointError",
    "ChecksumError",
    "Dictionary",
    "DictionaryHeader",
    "DictionarySet",
    "FormatError",
    "FrameHeader",
    "HeaderError",
    "MagicError",
    "Matrix",
    "MemoryLimitError",
    "MissingDictionaryError",
    "MissingPackageError",
    "OutputExistsError",
    "PayloadError",
    "QMoEError",
    "RowIndexError",
    "SizeError",
    "TruncatedError",
    "UnsupportedModelError",
    "VersionError",
    "build_dictionary",
    "check_memory",
    "crc32c",
    "decode",
    "dequantize",
    "encode",
    "experts_matmul",
    "flipped_bit",
    "join_dictionaries",
    "kernels_name",
    "matmul",
    "parse_dictionaries",
    "read_frame_header",
    "round_levels",
]
