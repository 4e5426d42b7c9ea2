"""The commands ``qmoe-pack``, ``qmoe-unpack``, ``qmoe-inspect``, ``qmoe-verify`` and so on, ``qmoe`` for all.

``qmoe eval`` and ``qmoe sweep`` have no commands of their own.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 damaged file, 4 file of an unknown version, 130 interrupted.
Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import calibrate, inspect, pack, sweep, unpack, verify
from . import eval as evaluation
from .common import Command, execute

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        pack.COMMAND,
        unpack.COMMAND,
        inspect.COMMAND,
        verify.COMMAND,
        calibrate.COMMAND,
        evaluation.COMMAND,
        sweep.COMMAND,
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """``qmoe``: the commands as subcommands."""
    return execute("qmoe", COMMANDS, arguments)


def main_pack(arguments: Sequence[str] | None = None) -> int:
    """``qmoe-pack``."""
    return execute("qmoe-pack", pack.COMMAND, arguments)


def main_unpack(arguments: Sequence[str] | None = None) -> int:
    """``qmoe-unpack``."""
    return execute("qmoe-unpack", unpack.COMMAND, arguments)


def main_inspect(arguments: Sequence[str] | None = None) -> int:
    """``qmoe-inspect``."""
    return execute("qmoe-inspect", inspect.COMMAND, arguments)


def main_verify(arguments: Sequence[str] | None = None) -> int:
    """``qmoe-verify``."""
    return execute("qmoe-verify", verify.COMMAND, arguments)


def main_calibrate(arguments: Sequence[str] | None = None) -> int:
    """``qmoe-calibrate``."""
    return execute("qmoe-calibrate", calibrate.COMMAND, arguments)
