"""Runs of the command by several ranks, forked from one process that has imported everything.

As a program: reads requests from stdin and writes answers to stdout, a line of JSON each. Each rank is a
process of its own, with the environment that torchrun would give it, and talks to the others over TCP.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass
class Outcome:
    """How a rank ended: its exit code, negative for a signal, and what it said."""

    code: int
    stdout: str
    stderr: str


@dataclass
class Request:
    """What to run.

    `arguments` of all ranks, or of some by number; `code` by rank, run before the command; `absent` ranks are
    never started; `interrupt` is sent to all once that file exists.
    """

    size: int
    arguments: list[str]
    own_arguments: dict[int, list[str]] = field(default_factory=dict)
    code: dict[int, str] = field(default_factory=dict)
    absent: list[int] = field(default_factory=list)
    interrupt: str = ""


# Ends a rank at its n-th collective operation, or at its n-th flush to the disk
KILLED_AT_COLLECTIVE = """
from qmoe_quantize import ranks
wait, calls = ranks._DistributedRanks._wait, []
def counted(self, work):
    calls.append(1)
    if len(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    wait(self, work)
ranks._DistributedRanks._wait = counted
"""
KILLED_AT_FLUSH = """
fsync, calls = os.fsync, []
def counted(descriptor):
    calls.append(1)
    if len(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = counted
"""


class RankRunner:
    """Starts the program and asks it; a context manager."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, size: int, arguments: list[object], **rest: Any) -> list[Outcome]:
        assert self._process.stdin and self._process.stdout
        request = {"size": size, "arguments": [str(argument) for argument in arguments], **rest}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return [Outcome(**values) for values in json.loads(self._process.stdout.readline())]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(request: Request, rank: int, port: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), number)
        size = str(request.size)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        exec(request.code.get(rank, ""), {"os": os, "signal": signal})
        from qmoe_format.cli import main

        status = main(request.own_arguments.get(rank, request.arguments))
    except BaseException as error:  # noqa: BLE001 (nothing may return to the parent's code)
        print(f"uncaught {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(request: Request) -> list[dict[str, object]]:
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = {
            rank: start(request, rank, port, folder)
            for rank in range(request.size)
            if rank not in request.absent
        }
        deadline = time.monotonic() + 120
        while request.interrupt and not Path(request.interrupt).exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        codes = dict.fromkeys(range(request.size), -1000)
        if request.interrupt:
            for child in children.values():
                os.kill(child, signal.SIGINT)
        while children:
            for rank, child in list(children.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    del children[rank]
            if time.monotonic() > deadline:
                for child in children.values():
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        return [
            {
                "code": codes[rank],
                **{
                    name: (folder / f"{name}-{rank}").read_text() if codes[rank] != -1000 else ""
                    for name in ("stdout", "stderr")
                },
            }
            for rank in range(request.size)
        ]


def main() -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    import h5py  # noqa: F401
    import numpy as np
    import transformers.models.olmoe.modeling_olmoe
    import transformers.models.switch_transformers.modeling_switch_transformers  # noqa: F401
    from qmoe_codec.selection import DENSEST, NONZERO_SHARES, predict_bits
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: F401

    import qmoe_format.cli  # noqa: F401

    for bits, densest in DENSEST.items():  # else each process would build them anew
        for share in NONZERO_SHARES:
            if share <= densest:
                predict_bits(share, bits, np.zeros(1, np.int64), 1)
    for line in sys.stdin:
        values = json.loads(line)
        for name in ("own_arguments", "code"):
            values[name] = {int(rank): value for rank, value in values.get(name, {}).items()}
        print(json.dumps(serve(Request(**values))), flush=True)


if __name__ == "__main__":
    main()
