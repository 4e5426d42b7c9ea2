"""Packing with several ranks on one machine, as measured and as predicted; and ranks that are killed.

    python benchmarks/ranks.py [--runs 1:16 1:8 2:16 4:16]     ranks : experts in memory on all of them
    python benchmarks/ranks.py --kills 10                      kills a rank at random moments and goes on

The first packs a made-up OLMoE with ``rd`` to a wanted rate, one thread a rank, and holds ``--dry-run``
against time, peak memory, what ranks send each other and what lies on the disk. Ranks are started by
torchrun, and talk over TCP. Results are added to those that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from qmoe_format.safetensors_io import SafetensorsWriter

RESULTS = Path(__file__).parent / "results/ranks.json"
LARGE = {"hidden_size": 768, "intermediate_size": 512, "num_experts": 16}
RATE, WINDOWS = 0.8, 32
CASES = [(1, 16), (1, 8), (2, 16), (4, 16)]
SMALL = {"hidden_size": 128, "intermediate_size": 96, "num_experts": 8, "num_hidden_layers": 4}


def make_source(directory: Path, sizes: dict[str, int]) -> None:
    """An OLMoE with random weights."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    config = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "dtype": "bfloat16",
        "vocab_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "pad_token_id": None,
        **sizes,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    writer = SafetensorsWriter(directory / "model.safetensors", 256 * 1024)

    def add(name: str, *shape: int) -> None:
        # Longer tails than a normal distribution has, as trained weights
        values = generator.standard_normal(shape, np.float32)
        values = values * np.abs(values) * np.float32(shape[-1] ** -0.5) if len(shape) > 1 else values * 0 + 1
        writer.add(name, "BF16", shape, (values.view(np.uint32) >> 16).astype("<u2").tobytes())

    add("model.embed_tokens.weight", 256, hidden)
    add("lm_head.weight", 256, hidden)
    add("model.norm.weight", hidden)
    for layer in range(sizes["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            add(f"{prefix}.self_attn.{name}.weight", hidden, hidden)
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
            add(f"{prefix}.{name}.weight", hidden)
        add(f"{prefix}.mlp.gate.weight", sizes["num_experts"], hidden)
        for expert in range(sizes["num_experts"]):
            for name, shape in (
                ("gate", (inner, hidden)),
                ("up", (inner, hidden)),
                ("down", (hidden, inner)),
            ):
                add(f"{prefix}.mlp.experts.{expert}.{name}_proj.weight", *shape)
    writer.close()


def worker(folder: Path, arguments: list[str]) -> int:
    """What torchrun starts: the command, with its process noted once it has joined, and what it took."""
    from qmoe_quantize import ranks

    from qmoe_format.cli import main as command

    sent = 0
    exchange, gather = ranks._DistributedRanks.exchange, ranks._DistributedRanks.gather

    def counted_exchange(self: Any, parts: Any, rows: Any) -> Any:
        nonlocal sent
        sent += sum(part.nbytes for rank, part in enumerate(parts) if rank != self.rank)
        return exchange(self, parts, rows)

    def counted_gather(self: Any, value: Any) -> Any:
        nonlocal sent
        sent += len(json.dumps(value)) * (self.size - 1)
        return gather(self, value)

    ranks._DistributedRanks.exchange = counted_exchange  # type: ignore[method-assign]
    ranks._DistributedRanks.gather = counted_gather  # type: ignore[method-assign]
    rank, join = os.environ["RANK"], ranks.Ranks.join

    def noted_join(*arguments: Any) -> ranks.Ranks:
        joined = join(*arguments)
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        return joined

    ranks.Ranks.join = noted_join  # type: ignore[method-assign]
    code = command(arguments)
    used = resource.getrusage(resource.RUSAGE_SELF)
    note = {
        "peak_rss_bytes": used.ru_maxrss * 1024,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "sent_bytes": sent,
    }
    (folder / f"note-{rank}").write_text(json.dumps(note))
    return code


def start(ranks: int, folder: Path, arguments: list[str]) -> subprocess.Popen[str]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), __file__]
    return subprocess.Popen(
        [*command, "--worker", str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def pack_arguments(source: Path, out: Path, text: Path, windows: int, *more: str) -> list[str]:
    arguments = ["pack", str(source), str(out), "--calib", str(text), "--json", "--quiet"]
    return [*arguments, "--nsamples", str(windows), "--seqlen", "256", "--batch-size", "4", *more]


def lying(folder: Path, notes: Path) -> int:
    """Bytes on the disk below a folder, files without a name that the ranks have open there included."""
    found = 0
    for file in folder.glob("*"):
        with contextlib.suppress(OSError):
            found += 512 * file.stat().st_blocks
    for note in notes.glob("pid-*"):
        for descriptor in Path(f"/proc/{note.read_text()}/fd").glob("*"):
            with contextlib.suppress(OSError):
                place = os.readlink(descriptor)
                if place.startswith(str(folder)) and place.endswith("(deleted)"):
                    found += 512 * descriptor.stat().st_blocks
    return found


def predicted(arguments: list[str], ranks: int) -> dict[str, float]:
    """What the dry run says, with one thread."""
    command = [sys.executable, "-m", "qmoe_format.cli", *arguments, "--dry-run", "--gpus", str(ranks)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True
    )
    many = json.loads(done.stdout)["many"]
    return {name: many[name] for name in ("seconds", "peak_memory_bytes", "sent_bytes", "disk_bytes")}


def _line(row: dict[str, Any]) -> str:
    said, busy = row["predicted"], row["cpu_seconds"]
    return (
        f"{row['ranks']} ranks, {row['experts_at_once']} experts at once: {row['seconds']:.1f} s, processors "
        f"busy {min(busy):.1f} to {max(busy):.1f} s ({said['seconds']:.1f} s predicted); peak "
        f"{max(row['peak_rss_bytes']) / 1e6:.0f} MB a rank ({said['peak_memory_bytes'] / 1e6:.0f}); sent "
        f"{row['sent_bytes'] / 1e6:.1f} MB ({said['sent_bytes'] / 1e6:.1f}); on the disk "
        f"{row['disk_bytes'] / 1e6:.1f} MB ({said['disk_bytes'] / 1e6:.1f}); files {row['sha256'][:12]}"
    )


def measure(cases: list[tuple[int, int]], layers: int, work: Path, text: Path) -> list[dict[str, Any]]:
    make_source(work / "source", {**LARGE, "num_hidden_layers": layers})
    rows: list[dict[str, Any]] = []
    for ranks, experts in cases:
        out, notes = work / "out", work / "notes"
        more = ["--target-bpw", str(RATE), "--experts-per-batch", str(experts)]
        arguments = pack_arguments(work / "source", out, text, WINDOWS, *more)
        prediction = predicted(arguments, ranks)
        began, disk = time.monotonic(), 0
        process = start(ranks, notes, arguments)
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(process.communicate)
            while not ended.done():
                disk = max(disk, lying(out.with_name("out.partial"), notes))
                time.sleep(0.1)
            stdout, stderr = ended.result()
        whole = time.monotonic() - began
        if process.returncode:
            raise SystemExit(stderr)
        summary = json.loads(stdout)
        found = [json.loads((notes / f"note-{rank}").read_text()) for rank in range(ranks)]
        row = {
            "layers": layers,
            "ranks": ranks,
            "experts_at_once": experts,
            "seconds": whole,
            "seconds_of_packing": summary["seconds"],
            "cpu_seconds": [note["cpu_seconds"] for note in found],
            "peak_rss_bytes": [note["peak_rss_bytes"] for note in found],
            "sent_bytes": sum(note["sent_bytes"] for note in found),
            "disk_bytes": disk,
            "bits_per_weight": summary["bits_per_weight"],
            "sha256": hashlib.sha256(json.dumps(digests(out)).encode()).hexdigest(),
            "folder": str(work.parent),
            "predicted": prediction,
        }
        rows.append(row)
        print(_line(row), flush=True)
        shutil.rmtree(out)
    return rows


def kill_some(count: int, seed: int, work: Path, text: Path) -> Iterator[dict[str, Any]]:
    make_source(work / "small", SMALL)
    draw = random.Random(seed)
    out, notes = work / "out", work / "notes"
    arguments = pack_arguments(work / "small", out, text, 16, "--lam", "1e-4")
    began = time.monotonic()
    process = start(2, notes, arguments)
    _, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(stderr)
    whole, expected = time.monotonic() - began, digests(out)
    done = 0
    while done < count:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name("out.partial"), ignore_errors=True)
        ranks = draw.choice((2, 3))
        after, rank = draw.choice([count for count in (1, 2, 3) if count != ranks]), draw.randrange(ranks)
        moment = draw.uniform(0.1, 1.0) * whole * ranks / 2
        began = time.monotonic()
        process = start(ranks, notes, arguments)
        while time.monotonic() - began < moment and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None or not (notes / f"pid-{rank}").exists():
            process.communicate()
            continue  # too late, or too early
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((notes / f"pid-{rank}").read_text()), signal.SIGKILL)
        _, stderr = process.communicate()
        if process.returncode == 0 and out.exists():
            continue  # it had just ended
        said = [line for line in stderr.splitlines() if line.startswith("qmoe pack: error: ")]
        layers = len(list(work.glob("out.partial/resume-*.json")))
        if process.returncode == 0 or len(said) != 1 or f"rank {rank} " not in said[0] or out.exists():
            raise SystemExit(f"killed rank {rank} of {ranks} after {moment:.2f} s: {stderr}")
        resumed = start(after, notes, [*arguments, "--resume"])
        _, stderr = resumed.communicate()
        if resumed.returncode or digests(out) != expected:
            raise SystemExit(f"resumed with {after} ranks: {stderr}")
        about = said[0].removeprefix("qmoe pack: error: ").replace(socket.gethostname(), "HOST")
        done += 1
        print(
            f"{done}: rank {rank} of {ranks} killed after {moment:.1f} s, {layers} layers kept; "
            f"resumed with {after}: identical. {about}",
            flush=True,
        )
        yield {
            "ranks": ranks,
            "killed": rank,
            "seconds": moment,
            "layers_kept": layers,
            "resumed_with": after,
            "said": about,
        }


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(Path(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=case, nargs="+", default=CASES)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--kills", type=int, default=0, help="instead: so many ranks are killed")
    parser.add_argument("--seed", type=int, default=0, help="of these moments")
    parser.add_argument("--folder", type=Path, help="where all files lie meanwhile, such as /dev/shm")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    from qmoe_quantize.sweep import environment

    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        text = work / "text.txt"
        text.write_bytes(
            b"".join(file.read_bytes() for file in sorted(Path(os.__file__).parent.glob("*.py")))
        )
        if options.kills:
            for row in kill_some(options.kills, options.seed, work, text):
                result["kills"] = [*result.get("kills", []), row]
                options.out.write_text(json.dumps(result, indent=2) + "\n")
        else:
            rows = measure(options.runs, options.layers, work, text)
            done = {which(row) for row in rows}
            kept = [row for row in result.get("runs", []) if which(row) not in done]
            result |= {"model": LARGE, "runs": sorted([*kept, *rows], key=which)}
    rows = result.get("runs", [])
    if len({row["sha256"] for row in rows}) != len({row["layers"] for row in rows}):
        raise SystemExit("the bytes differ")
    result |= {"date": datetime.now(UTC).strftime("%Y-%m-%d"), **environment(), "threads_per_rank": 1}
    result["speed_up"] = speed_ups(rows)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def speed_ups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of several ranks over one: of everything, of packing alone, and by how long processors are busy."""
    return [
        {
            "layers": row["layers"],
            "ranks": [1, row["ranks"]],
            "experts_at_once": [one["experts_at_once"], row["experts_at_once"]],
            "whole": one["seconds"] / row["seconds"],
            "packing": one["seconds_of_packing"] / row["seconds_of_packing"],
            "processors": max(one["cpu_seconds"]) / max(row["cpu_seconds"]),
        }
        for row in rows
        for one in rows
        if one["ranks"] == 1 < row["ranks"] and one["layers"] == row["layers"]
    ]


def which(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["layers"], row["ranks"], row["experts_at_once"]


def case(text: str) -> tuple[int, int]:
    ranks, _, experts = text.partition(":")
    return int(ranks), int(experts)


if __name__ == "__main__":
    main()
