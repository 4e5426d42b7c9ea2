"""What a measurement ran on, and how it is kept."""

from __future__ import annotations

import json
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import qmoe_codec


def processor() -> str:
    """Name of the processor, as far as the system tells it."""
    information = Path("/proc/cpuinfo")
    names = information.read_text().splitlines() if information.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in names if line.startswith("model name")),
        platform.machine(),
    )


def write_record(file: Path, benchmark: str, *, threads: int, **measured: object) -> None:
    """Keep what a benchmark of whole models in transformers measured as JSON, with what it ran on."""
    record = {
        "benchmark": benchmark,
        "date": date.today().isoformat(),
        "processor": processor(),
        "threads": threads,
        "kernels": qmoe_codec.kernels_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        **measured,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
