"""Rules about where outputs may go."""

from __future__ import annotations

import os
from pathlib import Path

from qmoe_codec.errors import ArgumentError


def refuse_overlap(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Refuse an output directory that is the source, lies in it, or contains it.

    Parameters
    ----------
    source : path
        A directory, or a file in the source's directory.
    out : path
        Need not exist.

    Raises
    ------
    ArgumentError
        It is one of these; links are followed.
    """
    resolved, target = Path(os.path.realpath(source)), Path(os.path.realpath(out))
    directory = resolved.parent if resolved.is_file() else resolved
    if target == directory:
        raise ArgumentError("the output is the source", field="OUT", value=out, expected="another directory")
    if target in directory.parents or directory in target.parents:
        raise ArgumentError(
            "of source and output, one lies in the other",
            field="OUT",
            value=out,
            expected="separate directories",
        )
