"""Dictionaries: built for a density, read from a frame, kept by a layer (spec 3)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from . import core, growth
from .errors import ArgumentError, HeaderError
from .layout import (
    KIND_TABLE,
    KIND_TREES,
    WIDTHS,
    Buffer,
    DictionaryHeader,
    as_bytes,
    check,
)
from .reference import DictionaryTables, crc32c, pack_array, read_dictionary


class Dictionary:
    """A map from codewords to phrases of trits. Make one with a class method or :func:`build_dictionary`.

    Attributes
    ----------
    frame : bytes
        The dictionary frame, as it is stored.
    dictionary_id : int
        Checksum of the content; equal ids are equal dictionaries.
    bits, tables, threshold : int
        See spec 3.
    words : ndarray of uint32 [tables, 2**bits]
        The phrases as table words (spec 3.3), 0 where a codeword is unused. Read-only.
    """

    def __init__(self, frame: Buffer) -> None:
        self.frame = bytes(as_bytes(frame))
        handle, error = core.c_void_p(), core.Error()
        library = core.library()
        error.raise_for(
            library.qmoe_dictionary_open(self.frame, len(self.frame), core.byref(handle), core.byref(error))
        )
        self.handle = handle
        weakref.finalize(self, library.qmoe_dictionary_close, handle)
        info = core.DictionaryInfo()
        library.qmoe_dictionary_get_info(handle, core.byref(info))
        self.dictionary_id: int = info.dictionary_id
        self.bits: int = info.bits
        self.tables: int = info.tables
        self.threshold: int = info.threshold

    @classmethod
    def from_frame(cls, frame: Buffer) -> Dictionary:
        """Read a dictionary frame of exactly this size (spec 3.1).

        Raises
        ------
        FormatError
            If the frame is not legal.
        """
        return cls(frame)

    @classmethod
    def from_words(cls, words: NDArray[np.uint32], bits: int) -> Dictionary:
        """A dictionary with one table of any phrases (spec 3.3).

        Parameters
        ----------
        words : ndarray of uint32 [2**bits]
            Table words, 0 for unused codewords.
        bits : int
            Width of a codeword: 8, 10, 12 or 16.
        """
        if bits not in WIDTHS or words.shape != (1 << bits,):
            raise ArgumentError("not a table", field="words", value=words.shape, expected="2**bits words")
        return cls(_make_frame(KIND_TABLE, bits, 1 << bits, 1 << bits, words.astype("<u4").tobytes()))

    @property
    def words(self) -> NDArray[np.uint32]:
        """The phrases as table words, uint32 [tables, 2**bits]."""
        pointer = core.library().qmoe_dictionary_words(self.handle)
        words = np.ctypeslib.as_array(pointer, (self.tables, 1 << self.bits)).copy()
        words.flags.writeable = False
        return words

    @functools.cached_property
    def reference(self) -> DictionaryTables:
        """The dictionary as the reference codec expands it."""
        return read_dictionary(self.frame)

    def __repr__(self) -> str:
        return f"Dictionary(id={self.dictionary_id:#010x}, bits={self.bits}, tables={self.tables})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dictionary) and self.frame == other.frame

    def __hash__(self) -> int:
        return self.dictionary_id

    def __reduce__(self) -> tuple[type[Dictionary], tuple[bytes]]:
        return Dictionary, (self.frame,)


def _make_frame(kind: int, bits: int, threshold: int, entry_count: int, payload: bytes) -> bytes:
    header = DictionaryHeader(0, kind, bits, threshold, entry_count, len(payload), 0)
    identity = crc32c(payload, crc32c(header.pack()[:28]))
    return DictionaryHeader(**{**header.__dict__, "dictionary_id": identity}).pack() + payload


@functools.lru_cache(maxsize=256)
def build_dictionary(p_zero: float, bits: int) -> Dictionary:
    """Build an almost-instantaneous dictionary for ternary weights (see :mod:`.growth`).

    Parameters
    ----------
    p_zero : float
        The share of zeros to build for, between 0 and 1; +1 and -1 are taken to be equally frequent.
    bits : int
        Width of a codeword: 8, 10 or 12. More bits send fewer bits per weight on long rows; fewer bits make
        a smaller table.

    Returns
    -------
    Dictionary
        The same one for the same arguments, on every machine.

    Raises
    ------
    ArgumentError
        If an argument is out of range.
    """
    if bits not in (8, 10, 12):
        raise ArgumentError("no dictionary can be built", field="bits", value=bits, expected="8, 10 or 12")
    if not 0.01 <= p_zero <= 0.9999:
        raise ArgumentError(
            "no dictionary can be built", field="p_zero", value=p_zero, expected="0.01 … 0.9999"
        )
    grown = growth.grow_trees(p_zero, bits)
    codes = [code for tree in grown.trees for code in tree.preorder()]
    return Dictionary(_make_frame(KIND_TREES, bits, grown.threshold, len(codes), pack_array(codes, 2)))


def parse_dictionaries(data: Buffer) -> dict[int, Dictionary]:
    """Dictionaries of a layer: frames one after the other, in rising order of id (spec 6.1).

    Raises
    ------
    FormatError
        If a frame is not legal.
    """
    view = as_bytes(data)
    found: dict[int, Dictionary] = {}
    while len(view):
        size = DictionaryHeader.parse(view).frame_size
        dictionary = Dictionary(view[:size])
        identity = dictionary.dictionary_id
        check(identity > max(found, default=-1), HeaderError, "dictionary_id", identity, "rising ids")
        found[identity] = dictionary
        view = view[size:]
    return found


def join_dictionaries(dictionaries: Iterable[Dictionary]) -> bytes:
    """The frames of `dictionaries`, in rising order of id; what :func:`parse_dictionaries` reads."""
    ordered = sorted(dictionaries, key=lambda dictionary: dictionary.dictionary_id)
    return b"".join(dictionary.frame for dictionary in ordered)


__all__ = ["Dictionary", "build_dictionary", "join_dictionaries", "parse_dictionaries"]
