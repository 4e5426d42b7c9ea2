"""Files and directories that appear whole or not at all, and small checked reads.

A result is built in ``OUT.partial`` and renamed to ``OUT`` at the end. The partial directory holds a marker
that is locked while its writer lives: so a second writer is told, a stale one is recognised, and a directory
that merely has this name is never touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from qmoe_codec.errors import (
    ArgumentError,
    HeaderError,
    OutputExistsError,
    QMoEError,
    SizeError,
    TruncatedError,
)

MARKER = ".qmoe-partial"
JSON_LIMIT = 100_000_000
CHUNK_BYTES = 1 << 24

_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
# The file system, or the kernel, does not know renameat2 or this flag of it.
_RENAME_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)

_log = logging.getLogger("qmoe_format")


@contextlib.contextmanager
def os_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError about `path` into a one-line :class:`QMoEError`."""
    try:
        yield
    except OSError as error:
        raise QMoEError(error.strerror or str(error), file=path) from error


# ---- reading ----------------------------------------------------------------------------------------------


def open_regular(path: Path) -> int:
    """Open a regular file for reading; links are followed, devices and pipes refused.

    Returns
    -------
    int
        A file descriptor, which the caller closes.

    Raises
    ------
    TruncatedError
        There is no such file.
    HeaderError
        It is something else than a regular file.
    QMoEError
        It cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise TruncatedError("missing", file=path, expected="a regular file") from error
    except OSError as error:
        raise QMoEError(error.strerror or str(error), file=path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise HeaderError("not a regular file", file=path, expected="a regular file")
    return descriptor


def parse_json(text: bytes, file: object, field: str | None = None) -> object:
    """Parse JSON in UTF-8; two equal keys in one object are an error.

    Raises
    ------
    HeaderError
        The text is not such JSON.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, value in pairs:
            if key in result:
                raise HeaderError("duplicate key", file=file, field=field, value=repr(key)[:80])
            result[key] = value
        return result

    try:
        value: object = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a number of thousands of digits
        raise HeaderError(f"not valid JSON: {error}", file=file, field=field) from error
    return value


def read_json_object(path: Path) -> dict[str, object]:
    """Read a small JSON file whose content is one object.

    Raises
    ------
    TruncatedError, HeaderError, SizeError
        The file is missing, is not such a file, or is larger than 100 MB.
    """
    descriptor = open_regular(path)
    with os_errors(path), open(descriptor, "rb") as stream:
        text = stream.read(JSON_LIMIT + 1)
    if len(text) > JSON_LIMIT:
        raise SizeError("too large for a JSON file", file=path, expected=f"at most {JSON_LIMIT} bytes")
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise HeaderError("not a JSON object", file=path, value=type(value).__name__, expected="an object")
    return value


def is_plain_name(name: object) -> bool:
    """Whether `name` is the name of a file within a directory, and nothing that leads out of it."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in "/\\\0" for character in name)
        and name.isprintable()
    )


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read in pieces; `on_bytes` is told the size of each."""
    digest = hashlib.sha256()
    descriptor = open_regular(path)
    with os_errors(path), open(descriptor, "rb", buffering=0) as stream:
        while piece := stream.read(CHUNK_BYTES):
            digest.update(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    return digest.hexdigest()


# ---- writing ----------------------------------------------------------------------------------------------


def create_file(path: Path) -> int:
    """Create a new file and return its descriptor; one that exists already is an error."""
    with os_errors(path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def flat_bytes(data: bytes | bytearray | memoryview) -> memoryview:
    """View any contiguous buffer as a flat run of bytes, without a copy.

    Raises
    ------
    ArgumentError
        It is not contiguous.
    """
    view = memoryview(data)
    if not view.c_contiguous:
        raise ArgumentError("not contiguous", field="data", expected="a buffer in row order")
    return view.cast("B") if view.nbytes else memoryview(b"")  # cast() takes no empty arrays


def write_all(descriptor: int, data: bytes | bytearray | memoryview, path: Path) -> None:
    """Write all of `data`, which one call of write(2) need not do."""
    view = flat_bytes(data)
    with os_errors(path):
        while view.nbytes:
            view = view[os.write(descriptor, view[:CHUNK_BYTES]) :]


def write_file(path: Path, data: bytes) -> None:
    """Create `path` with `data`, flushed to the disk."""
    descriptor = create_file(path)
    try:
        write_all(descriptor, data, path)
        with os_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a regular file to a new file, flushed to the disk."""
    reader = open_regular(source)
    try:
        writer = create_file(target)
        try:
            while True:
                with os_errors(source):
                    piece = os.read(reader, CHUNK_BYTES)
                if not piece:
                    break
                write_all(writer, piece, target)
            with os_errors(target):
                os.fsync(writer)
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk."""
    with os_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    """Rename with flags as one step; False where that cannot be had."""
    if sys.platform != "linux":
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _RENAME_UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(new))


def flat_names(directory: Path) -> list[str]:
    """Names in a directory that has no directories in it.

    Raises
    ------
    OutputExistsError
        It has one, so it is not something that this package made.
    """
    with os_errors(directory), os.scandir(directory) as entries:
        names = []
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                raise OutputExistsError(
                    "will not be replaced: it holds a directory",
                    file=directory,
                    value=entry.name,
                    expected="plain files only; move or delete it yourself",
                )
            names.append(entry.name)
    return sorted(names)


class PartialDirectory:
    """A directory that is built as ``OUT.partial`` and becomes ``OUT`` in one step.

    Parameters
    ----------
    out : path
        Where the result goes. A symbolic link is followed.
    force : bool
        Replace what is at `out`.
    check_replaceable : callable
        Called with an existing `out`, when `force` is set, before anything is written and again before it is
        replaced; raises :class:`OutputExistsError` unless every file in it may be deleted.
    take_over : callable, optional
        Called with what an interrupted run left in ``OUT.partial``, before anything of it is touched: the
        directory and its names. Returns those to keep, or raises; by default nothing is kept.

    Raises
    ------
    OutputExistsError
        `out` exists and `force` is not set; it may not be replaced; another writer is at work; or
        ``OUT.partial`` exists and is not an unfinished result of ours.
    QMoEError
        The directory cannot be made.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        force: bool,
        check_replaceable: Callable[[Path], None],
        take_over: Callable[[Path, list[str]], Collection[str]] | None = None,
    ) -> None:
        self.out = Path(os.path.realpath(out))
        if not self.out.name:
            raise ArgumentError("not a place to write to", file=out, expected="the name of a new directory")
        self.path = self.out.with_name(self.out.name + ".partial")
        self._force = force
        self._check_replaceable = check_replaceable
        self._take_over = take_over
        self._state = "open"
        self._check_out()
        self._lock = self._acquire()

    def _check_out(self) -> None:
        if os.path.lexists(self.out):
            if not self._force:
                raise OutputExistsError("exists already", file=self.out, expected="a new name, or --force")
            if not self.out.is_dir():
                raise OutputExistsError("will not be replaced: it is not a directory", file=self.out)
            self._check_replaceable(self.out)

    def _acquire(self) -> int:
        with os_errors(self.path), contextlib.suppress(FileExistsError):
            os.mkdir(self.path)
        if self.path.is_symlink() or not self.path.is_dir():
            raise OutputExistsError("in the way, and not a directory; move or delete it", file=self.path)
        names = flat_names(self.path)
        # An empty directory may be that of a writer killed before it could set its marker.
        if names and MARKER not in names:
            raise OutputExistsError(
                "in the way, and not an unfinished output; move or delete it (rename it if it is finished)",
                file=self.path,
            )
        marker = self.path / MARKER
        with os_errors(marker):
            lock = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            with os_errors(marker):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # The writer that held the lock may have moved the directory away before it let go.
                    mine = os.path.lexists(marker) and os.path.samestat(os.stat(marker), os.fstat(lock))
                except BlockingIOError:
                    mine = False
            if not mine:
                raise OutputExistsError("another writer is at work on this output", file=self.path)
            if names:
                kept = self._take_over(self.path, names) if self._take_over else ()
                if not kept:
                    _log.warning("%s: discarding what an interrupted run left", self.path)
                self.clear(keep=kept)
        except BaseException:
            os.close(lock)
            raise
        return lock

    def share(self) -> str:
        """Let other processes lock the directory too, in common; gives what the marker says from now on."""
        mark = secrets.token_hex(16)
        with os_errors(self.path / MARKER):
            os.truncate(self._lock, 0)
            os.pwrite(self._lock, mark.encode(), 0)
            os.fsync(self._lock)
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return mark

    def clear(self, keep: Collection[str] = ()) -> None:
        """Delete what is in the partial directory, but for some names."""
        for name in flat_names(self.path):
            if name != MARKER and name not in keep:
                with os_errors(self.path / name):
                    os.unlink(self.path / name)

    def discard(self) -> None:
        """Remove the partial directory, unless it is finished already."""
        if self._state == "open":
            self._state = "closed"
            try:
                self.clear()
                with os_errors(self.path):
                    os.unlink(self.path / MARKER)
                    try:
                        os.rmdir(self.path)
                    except OSError:
                        # Another process of this run has not ended yet: let the next run know what this is
                        (self.path / MARKER).touch()
                        raise
            finally:
                os.close(self._lock)

    def leave(self) -> None:
        """Leave the partial directory as it is, for another run to take over, unless it is finished."""
        if self._state == "open":
            self._state = "closed"
            os.close(self._lock)

    def commit(self) -> None:
        """Move the finished directory to ``OUT``; its files must be flushed to the disk already.

        Raises
        ------
        OutputExistsError
            `out` came to be, or changed, in the meantime. The finished directory then stays where it is.
        """
        sync_directory(self.path)
        with os_errors(self.path):
            os.unlink(self.path / MARKER)
        self._state = "closed"  # from here on it is complete, and worth keeping whatever happens
        try:
            sync_directory(self.path)
            self._check_out()
            old = self._move()
        except QMoEError as error:
            error.message += f"; the finished output is in {self.path}"
            raise
        finally:
            os.close(self._lock)
        sync_directory(self.out.parent)
        if old is not None:
            self._delete(old)

    def _move(self) -> Path | None:
        """Move the directory to OUT; gives the place of what was there before.

        Where the system cannot exchange two names in one step, two renames do it, and for a moment between
        them there is no OUT.
        """
        with os_errors(self.out):
            if not os.path.lexists(self.out):
                try:
                    if not _renameat2(self.path, self.out, _RENAME_NOREPLACE):
                        os.rename(self.path, self.out)
                except FileExistsError as error:
                    raise OutputExistsError("came to be in the meantime", file=self.out) from error
                return None
            if _renameat2(self.path, self.out, _RENAME_EXCHANGE):
                return self.path
            old = self.out.with_name(self.out.name + ".replaced")
            if os.path.lexists(old):
                raise OutputExistsError("in the way; move or delete it", file=old)
            os.rename(self.out, old)
            try:
                os.rename(self.path, self.out)
            except OSError:
                os.rename(old, self.out)
                raise
            return old

    @staticmethod
    def _delete(old: Path) -> None:
        """Delete the replaced output; the new one is in place, so trouble here is only reported."""
        try:
            # Marked first and without its manifest next: were this cut short, the rest is nobody's model.
            (old / MARKER).touch()
            names = flat_names(old)
            for name in sorted(names, key=lambda name: (name == MARKER, name != "manifest.json", name)):
                os.unlink(old / name)
            os.rmdir(old)
        except (OSError, QMoEError) as error:
            _log.warning("%s: the replaced output could not be deleted: %s", old, error)


class PartialFile:
    """A file that is built as ``OUT.partial`` and becomes ``OUT`` in one step; a context manager.

    Leaving the context before :meth:`commit` removes it. What a killed process leaves is in the way of the
    next one, which says so.

    Parameters
    ----------
    out : path
        Where the result goes. A symbolic link is followed.
    force : bool
        Replace what is at `out`.
    check_replaceable : callable
        Called with an existing `out`, when `force` is set, at first and again before it is replaced; raises
        an error unless it may be deleted.

    Raises
    ------
    OutputExistsError
        `out` exists and `force` is not set, or ``OUT.partial`` exists.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        force: bool,
        check_replaceable: Callable[[Path], None],
    ) -> None:
        self.out = Path(os.path.realpath(out))
        self.path = self.out.with_name(self.out.name + ".partial")
        self._force = force
        self._check_replaceable = check_replaceable
        self._check_out()
        try:
            os.close(create_file(self.path))
        except QMoEError as error:
            if isinstance(error.__cause__, FileExistsError):
                raise OutputExistsError(
                    "in the way: of another writer, or left by one that was killed; then delete it",
                    file=self.path,
                ) from error
            raise
        self._unfinished = True

    def _check_out(self) -> None:
        if os.path.lexists(self.out):
            if not self._force:
                raise OutputExistsError("exists already", file=self.out, expected="a new name, or --force")
            if not self.out.is_file():
                raise OutputExistsError("will not be replaced: it is not a regular file", file=self.out)
            try:
                self._check_replaceable(self.out)
            except QMoEError as error:
                raise OutputExistsError(
                    f"will not be replaced: not a file of this kind ({error.message})", file=self.out
                ) from error

    def commit(self) -> None:
        """Flush the file to the disk and give it its name.

        Raises
        ------
        OutputExistsError
            `out` came to be, or changed, in the meantime.
        """
        with os_errors(self.path):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._check_out()
        with os_errors(self.out):
            try:
                if self._force or not _renameat2(self.path, self.out, _RENAME_NOREPLACE):
                    os.rename(self.path, self.out)
            except FileExistsError as error:
                raise OutputExistsError("came to be in the meantime", file=self.out) from error
        self._unfinished = False
        sync_directory(self.out.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._unfinished:
            self._unfinished = False
            with os_errors(self.path):
                os.unlink(self.path)
