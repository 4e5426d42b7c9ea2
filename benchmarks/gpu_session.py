"""All that there is to do on a GPU that is at hand for a few minutes, in one command.

    python benchmarks/gpu_session.py --out FOLDER --seconds 560 [--qmoe CHECKOUT]

On a machine with a GPU, its driver, Python, torch, CuPy, pytest, hypothesis and a C compiler with CMake; no
network, and nothing of this project installed. In order: what the machine is; build the C core; the kernels'
tests, at whose first failure all ends; the benchmark (gpu.py), with the QMoE authors' kernel where a checkout
of theirs is at hand; other tunings (gpu_sweep.py); the tests of what is built on the kernels, as far as the
packages they need are there; the memory checker, where there is compute-sanitizer. Each stage has a limit,
none runs past --seconds: whatever hangs is ended with all its processes. FOLDER gets a log of each, gpu.json,
gpu-sweep.json and session.json, written as it goes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import qmoe_kernel

ROOT = Path(__file__).resolve().parent.parent
GRACE = 15  # seconds that a stage may take to end once it begins nothing more


@dataclass
class Stage:
    """A command with its limit; `needed`: what comes after makes no sense if it fails.

    One that ran out of time has not failed yet.
    """

    name: str
    command: list[str]
    limit: float
    needed: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    shown: int = 2500  # characters of its log's end


@dataclass
class Outcome:
    """What became of a stage."""

    name: str
    status: int | None  # None: there was no time for it
    seconds: float
    timed_out: bool = False


def run_stage(stage: Stage, log: Path, limit: float) -> Outcome:
    """Run it, its output to `log`; whatever it started is ended with it."""
    begin = time.monotonic()
    timed_out = False
    with log.open("wb") as out:
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env={**os.environ, **stage.environment},
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            timed_out, status = True, 124
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Outcome(stage.name, status, round(time.monotonic() - begin, 1), timed_out)


def program(name: str) -> str | None:
    """Where a program is: on the path, beside Python, or in the CUDA toolkit's folder."""
    folders = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/local/cuda/bin"]
    return shutil.which(name, path=os.pathsep.join(folders))


def has(module: str) -> bool:
    """Whether Python finds it."""
    return importlib.util.find_spec(module) is not None


def stages(out: Path, options: argparse.Namespace) -> list[Stage]:
    """What is done, in order."""
    python = [sys.executable, "-u"]
    build = ROOT / "build" / "gpu-session"
    paths = [str(ROOT / part) for part in ("codec", "gpu_decode", "quantize", ".")]
    environment = {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "QMOE_LIBRARY": str(build / "libqmoe.so"),
    }
    test = [*python, "-m", "pytest", "-x", "-q", "--tb=long", "-p", "no:cacheprovider"]
    test += ["-W", "default"]  # another machine's packages may warn of what ours do not
    kernels = "tests/gpu/test_cuda.py"
    if has("xdist"):
        test += ["-n", str(options.jobs)]
    if has("pytest_timeout"):
        test += ["--timeout", "150", "--timeout-method", "thread"]
    host = ["--host", "--experts", "8"] if options.host else []
    small = ["--shapes", "64x96"] if options.host else []
    peer = ["--qmoe", str(options.qmoe.path.parent.resolve())] if options.qmoe else []
    configure = [program("cmake") or "cmake", "-S", "codec", "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
    if not (build / "CMakeCache.txt").exists() and (ninja := program("ninja")):
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]  # some machines have no make
    checker = program("compute-sanitizer")
    found = [
        Stage("machine", [*python, str(Path(__file__)), "--describe"], 60, environment=environment),
        Stage(
            "build",
            [
                "sh",
                "-c",
                f"{shlex.join(configure)} && {shlex.join([configure[0], '--build', str(build), '-j'])}",
            ],
            120,
            needed=True,
        ),
        Stage(
            "tests",
            [*test, kernels, "-k", "not compiled"],
            180,
            needed=not options.host,
            environment=environment,
        ),
        Stage(
            "benchmark",
            [*python, "benchmarks/gpu.py", "--json", str(out / "gpu.json"), *host, *small, *peer],
            240,
            environment=environment,
            shown=7000,  # the whole table
        ),
        Stage(
            "sweep",
            [*python, "benchmarks/gpu_sweep.py", "--json", str(out / "gpu-sweep.json"), *host, *small],
            200,
            environment=environment,
        ),
    ]
    found.append(
        Stage(
            "more-tests",
            [*test, "tests/gpu", "-k", "compiled or modules or expert_cache"],
            150,
            environment=environment,
        )
    )
    if checker:
        keep = "damaged or test_decode or bytes_of_the_cpu"
        # Each array in memory of its own, so that what lies behind it is nobody's
        exact = {"QMOE_EXACT_BUFFERS": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [checker, "--error-exitcode", "9", "--print-limit", "20", *python, "-m", "pytest"]
        command += [kernels, "-x", "-q", "-p", "no:cacheprovider", "-W", "default", "-k", keep]
        found.append(Stage("memory", command, 150, environment={**environment, **exact}))
    only = set(options.only or [stage.name for stage in found])
    return [stage for stage in found if stage.name in only]


def run(todo: list[Stage], out: Path, seconds: float) -> int:
    """One after the other, within `seconds`; the exit status."""
    begin, outcomes, worst = time.monotonic(), [], 0
    for stage in todo:
        left = seconds - (time.monotonic() - begin)
        if left < 2 * GRACE:
            outcomes.append(Outcome(stage.name, None, 0.0))
            print(f"{stage.name}: no time left", flush=True)
            continue
        limit = min(stage.limit, left)
        if stage.name in ("benchmark", "sweep"):  # these end by themselves, with what they have
            stage.command += ["--seconds", str(round(limit - GRACE))]
        log = out / f"{stage.name}.log"
        outcome = run_stage(stage, log, limit)
        outcomes.append(outcome)
        (out / "session.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n", "utf-8")
        state = "TIMED OUT" if outcome.timed_out else f"status {outcome.status}"
        print(f"==== {stage.name}: {state}, {outcome.seconds} s", flush=True)
        text = log.read_text("utf-8", "replace")
        print(text[-(max(4500, stage.shown) if outcome.status else stage.shown) :], flush=True)
        if outcome.status:
            worst = worst or outcome.status
            if stage.needed and not outcome.timed_out:
                break
    return worst


def describe() -> None:
    """Print what the machine is."""
    for command in (["nvidia-smi"], ["nvcc", "--version"], ["cmake", "--version"], ["cc", "--version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            print("$", *command, done.stdout[:1500], done.stderr[:300])
        except (OSError, subprocess.TimeoutExpired) as error:
            print("$", *command, error)
    for name in ("torch", "cupy", "numpy", "pytest", "zstandard", "safetensors", "hypothesis", "xdist"):
        try:
            print(name, getattr(__import__(name), "__version__", "?"))
        except ImportError as error:
            print(name, "MISSING:", error)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for logs and results")
    parser.add_argument("--seconds", type=float, default=560, help="for everything")
    parser.add_argument("--only", nargs="+", help="these stages and no others")
    parser.add_argument(
        "--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes of the tests"
    )
    parser.add_argument(
        "--qmoe", type=qmoe_kernel.read_source, metavar="CHECKOUT", help="for the benchmark: see gpu.py"
    )
    parser.add_argument("--host", action="store_true", help="try this file without a GPU")
    parser.add_argument("--describe", action="store_true", help="print what the machine is, and end")
    found = parser.parse_args(given)
    if not found.describe and found.out is None:
        parser.error("--out is needed")
    return found


def main() -> int:
    options = arguments()
    if options.describe:
        describe()
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    return run(stages(out, options), out, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
