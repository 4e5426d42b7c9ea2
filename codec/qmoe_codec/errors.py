"""Errors of every part of qmoe-format: one class per kind of fault, each message one line.

The kinds of :class:`FormatError` are those of the spec, section 1.1.
"""

from __future__ import annotations

import copy
from typing import ClassVar, Self


class QMoEError(Exception):
    """Base of all errors of this project.

    Parameters
    ----------
    message : str
        What is wrong, in one line.
    file : str, optional
        The file, or the place within it, that is at fault.
    field : str, optional
        The field or argument, by the spec's name where it has one.
    value, expected : object, optional
        What was found, and what would have been right.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        field: str | None = None,
        value: object = None,
        expected: object = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.field = field
        self.value = value
        self.expected = expected

    def __str__(self) -> str:
        place = [part for part in (self.file, self.field) if part]
        detail = []
        if self.value is not None:
            detail.append(f"found {self.value}")
        if self.expected is not None:
            detail.append(f"expected {self.expected}")
        text = ": ".join([*place, self.message])
        return (f"{text} ({', '.join(detail)})" if detail else text).replace("\n", " ")

    def with_file(self, file: object) -> Self:
        """The same error, naming `file` in front of what it named before."""
        error = copy.copy(self)
        error.file = f"{file}: {self.file}" if self.file else str(file)
        return error


class ArgumentError(QMoEError, ValueError):
    """An argument, or a combination of arguments, that cannot be meant."""

    exit_code = 2


class OutputExistsError(QMoEError):
    """The output is there already and overwriting it was not asked for."""

    exit_code = 2


class CheckpointError(QMoEError):
    """A source checkpoint is incomplete or holds values that cannot be packed."""


class UnsupportedModelError(QMoEError):
    """A model, layer or device that this version does not know."""


class MissingPackageError(QMoEError):
    """An optional package is not installed."""


class MemoryLimitError(QMoEError):
    """A result would take more memory than is allowed; what it would be decoded from may well be legal."""


class FileChangedError(QMoEError):
    """A file that is in use was changed, replaced or cut short meanwhile."""


class FormatError(QMoEError):
    """A packed file is not what the spec says (spec 1.1)."""

    exit_code = 3
    kind: ClassVar[str] = "format"


class TruncatedError(FormatError):
    """Fewer bytes than the structure needs."""

    kind = "truncated"


class MagicError(FormatError):
    """The first four bytes are not the expected ones."""

    kind = "magic"


class VersionError(FormatError):
    """A major version or a flag that this reader does not know."""

    exit_code = 4
    kind = "version"


class ChecksumError(FormatError):
    """A CRC-32C or SHA-256 differs."""

    kind = "checksum"


class HeaderError(FormatError):
    """A field has an illegal value."""

    kind = "header"


class SizeError(FormatError):
    """More bytes than the structure has, or sizes that contradict each other."""

    kind = "size"


class MissingDictionaryError(FormatError):
    """A dictionary that a frame names is not at hand, or is of another width."""

    kind = "dictionary"


class RowIndexError(FormatError):
    """An index and what it describes contradict each other."""

    kind = "index"


class PayloadError(FormatError):
    """A codeword, tree node, table word, trit byte or level is illegal."""

    kind = "payload"


FORMAT_ERRORS: dict[str, type[FormatError]] = {
    error.kind: error
    for error in (
        TruncatedError,
        MagicError,
        VersionError,
        ChecksumError,
        HeaderError,
        SizeError,
        MissingDictionaryError,
        RowIndexError,
        PayloadError,
    )
}
