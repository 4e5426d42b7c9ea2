"""What the commands share: parsing, errors, signals, progress."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from qmoe_codec.errors import ArgumentError, QMoEError
from tqdm import tqdm

INTERRUPTED = 130
PROGRESS_DELAY = 1  # seconds before a bar appears
SPEAKING_SECONDS = 1.5


@dataclass(frozen=True)
class Command:
    """A command: what it is called, what it takes, and what it does.

    Attributes
    ----------
    name, help : str
    add_arguments : callable
        Adds its arguments to a parser.
    run : callable
        Does the work; errors are exceptions.
    alone : bool
        Whether the processes that torchrun starts are refused, since each would write the same.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    alone: bool = False


def execute(program: str, commands: Command | Mapping[str, Command], arguments: Sequence[str] | None) -> int:
    """Parse `arguments`, run the command, and turn what it raises into one line and an exit code.

    An exception that is no :class:`QMoEError` is a fault in the program, and passes with its traceback.
    """
    parser = argparse.ArgumentParser(prog=program, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{program} {_version()}")
    if isinstance(commands, Command):
        _prepare(parser, program, commands)
    else:
        parser.description = (
            "Pack Mixture-of-Experts models below one bit per weight, and look after packed ones."
        )
        subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
        for name, command in commands.items():
            subparser = subparsers.add_parser(name, help=command.help, allow_abbrev=False)
            _prepare(subparser, f"{program} {name}", command)
    try:
        with contextlib.redirect_stderr(None) if _is_one_of_many() else contextlib.nullcontext():
            options = parser.parse_args(arguments)
    except SystemExit:
        _let_rank_0_speak()
        raise
    try:
        with _terminable():
            if options.alone:
                _refuse_many()
            options.run(options)
            sys.stdout.flush()
    except QMoEError as error:
        if not getattr(error, "quiet", False):
            print(f"{options.program}: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Who read the output has seen enough of it. What is left in the buffer must not raise at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"{options.program}: error: {error}", file=sys.stderr)
        return QMoEError.exit_code
    except KeyboardInterrupt as stop:
        what_is_left = f": {stop}" if str(stop) else ""
        if not getattr(stop, "quiet", False):
            print(f"{options.program}: interrupted{what_is_left}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _is_one_of_many() -> bool:
    """Whether another process of the same run says what is wrong with the arguments."""
    return os.environ.get("RANK", "0") != "0"


def _let_rank_0_speak() -> None:
    """Be the last to leave: torchrun ends all when one has ended, perhaps before it has said why."""
    if _is_one_of_many():
        time.sleep(SPEAKING_SECONDS)


def _refuse_many() -> None:
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return
    _let_rank_0_speak()
    error = ArgumentError(
        "done by one process",
        field="WORLD_SIZE",
        value=count,
        expected="no torchrun; pack is what several processes do",
    )
    error.quiet = _is_one_of_many()  # type: ignore[attr-defined]
    raise error


def _prepare(parser: argparse.ArgumentParser, program: str, command: Command) -> None:
    parser.description = command.help
    command.add_arguments(parser)
    parser.set_defaults(run=command.run, program=program, alone=command.alone)


def _version() -> str:
    try:
        return importlib.metadata.version("qmoe-format")
    except importlib.metadata.PackageNotFoundError:
        return "(run from a source tree that is not installed)"


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program like Ctrl-C, so that unfinished output is removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def print_json(value: object) -> None:
    """Print a result for machines."""
    print(json.dumps(value, indent=2))


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --json and --quiet."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def count(text: str) -> int:
    """A positive integer, for argparse."""
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"invalid value {text!r}, expected a positive integer")
    return int(text)


class ProgressBar:
    """A progress bar on stderr; none where stderr is not a terminal, or under --quiet.

    Call it with what is done and what there is in all, in bytes or another unit.
    """

    def __init__(self, title: str, *, quiet: bool, unit: str = "B") -> None:
        self._bar = tqdm(
            desc=title,
            unit=unit,
            unit_scale=unit == "B",
            disable=True if quiet else None,
            delay=PROGRESS_DELAY,
            leave=False,
        )

    def __call__(self, done: int, total: int) -> None:
        """Move the bar."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def refuse_options(options: argparse.Namespace, usable: set[str], what: str) -> None:
    """Refuse options that were given and mean nothing here; `options.default_of` gives their defaults.

    Raises
    ------
    ArgumentError
        One that is not in `usable` differs from its default.
    """
    for name, value in vars(options).items():
        default = options.default_of(name)
        if name not in usable and default is not value and default != value:
            raise ArgumentError(f"does not apply to {what}", field=f"--{name.replace('_', '-')}", value=value)


def require(condition: bool, message: str, *, field: str, expected: str) -> None:
    """Refuse a combination of arguments that argparse cannot."""
    if not condition:
        raise ArgumentError(message, field=field, expected=expected)
