"""Matrix frames from codewords and back, for codewords that another program has chosen (spec 4.2, 4.3).

Nothing is encoded or decoded here: what the codewords stand for is not looked at. Open the frame with
:class:`qmoe_codec.Matrix` to have it checked.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .codec import crc32c
from .dictionary import Dictionary
from .errors import ArgumentError
from .layout import (
    BLOCK_ROWS,
    CODEC_DICTIONARY,
    FRAME_HEADER,
    LEVEL_FORMATS,
    MAXIMUM_CODEWORDS,
    Buffer,
    FrameHeader,
    as_bytes,
)
from .reference import pack_array, pack_levels, unpack_array


def join_codewords(
    counts: ArrayLike,
    codewords: ArrayLike,
    columns: int,
    levels: ArrayLike,
    dictionary: Dictionary,
    level_format: str = "bfloat16",
) -> bytes:
    """A matrix frame that holds these codewords.

    Parameters
    ----------
    counts : array_like of int [rows]
        Codewords in each row.
    codewords : array_like of int [sum of counts]
        Those of the first row, then those of the second, and so on.
    columns : int
        Of the matrix.
    levels : array_like of float32 [rows, 2]
        What -1 and +1 stand for in each row.
    dictionary : Dictionary
        What the codewords are of; the frame names it.
    level_format : str
        float32, bfloat16, float16 or e4m4.

    Raises
    ------
    ArgumentError
        The arguments contradict each other, or are more than a frame holds.
    """
    numbers, words = np.asarray(counts, np.int64), np.asarray(codewords)
    pairs = np.ascontiguousarray(levels, np.float32)
    if numbers.ndim != 1 or words.ndim != 1 or pairs.shape != (len(numbers), 2):
        raise ArgumentError(
            "unfit", field="counts, codewords, levels", value=(numbers.shape, words.shape, pairs.shape)
        )
    least, most = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
    if least < 0 or most > columns or int(numbers.sum()) != len(words) or len(words) > MAXIMUM_CODEWORDS:
        raise ArgumentError(
            "contradict the codewords", field="counts", value=int(numbers.sum()), expected=len(words)
        )
    if len(words) and not 0 <= int(words.min()) <= int(words.max()) < 1 << dictionary.bits:
        raise ArgumentError(
            "too large", field="codewords", value=int(words.max()), expected=f"{dictionary.bits} bits"
        )
    if level_format not in LEVEL_FORMATS:
        raise ArgumentError(
            "no such format", field="level_format", value=level_format, expected=LEVEL_FORMATS
        )
    level_bytes, level_exponent = pack_levels(pairs, LEVEL_FORMATS.index(level_format))
    header = FrameHeader(
        version_minor=0,
        codec=CODEC_DICTIONARY,
        level_format=LEVEL_FORMATS.index(level_format),
        rows=len(numbers),
        columns=columns,
        level_exponent=level_exponent,
        bits=dictionary.bits,
        count_bits=(most - least).bit_length(),
        count_minimum=least,
        codeword_count=len(words),
        dictionary_ids=(dictionary.dictionary_id,),
    )
    frame = bytearray(header.frame_size)
    bases = (np.cumsum(numbers) - numbers)[::BLOCK_ROWS].astype("<u4").tobytes()
    index = bases + pack_array(numbers - least, header.count_bits)
    packed = words.astype("<u2").tobytes() if dictionary.bits == 16 else pack_array(words, dictionary.bits)
    for start, section in (
        (FRAME_HEADER.size, level_bytes),
        (header.row_index_start, index),
        (header.codewords_start, packed),
    ):
        frame[start : start + len(section)] = section
    body = memoryview(frame)[FRAME_HEADER.size :]
    frame[: FRAME_HEADER.size] = replace(header, body_crc32c=crc32c(body)).pack(crc32c)
    return bytes(frame)


def split_codewords(frame: Buffer) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Counts and codewords of a matrix frame in codec 1 that has been checked.

    Returns
    -------
    counts : ndarray of int64 [rows]
    codewords : ndarray of uint32 [sum of counts]

    Raises
    ------
    FormatError
        The header is not legal.
    ArgumentError
        The frame is shorter or longer than its header says, or has no codewords.
    """
    view = as_bytes(frame)
    header = FrameHeader.parse(view, crc32c)
    if header.codec != CODEC_DICTIONARY or len(view) != header.frame_size:
        raise ArgumentError("not a whole frame of codewords", field="frame", value=len(view))
    start = header.row_index_start + header.row_index_parts[0]
    counts = unpack_array(view[start:], header.rows, header.count_bits).astype(np.int64)
    section = view[header.codewords_start :]
    if header.bits == 16:
        codewords = np.frombuffer(section, "<u2", header.codeword_count).astype(np.uint32)
    else:
        codewords = unpack_array(section, header.codeword_count, header.bits)
    return counts + header.count_minimum, codewords


__all__ = ["join_codewords", "split_codewords"]
