"""Packing with several ranks on one machine: bytes, time, peak memory; and ranks that are killed.

    python benchmarks/ranks.py [--ranks 1 2 4]        packs a made-up OLMoE with rd, one thread a rank
    python benchmarks/ranks.py --kills 10             kills a rank at random moments and goes on

Ranks are started by torchrun, and talk over TCP. Results are added to those that are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from qmoe_format.safetensors_io import SafetensorsWriter

RESULTS = Path(__file__).parent / "results/ranks.json"
LARGE = {"hidden_size": 768, "intermediate_size": 512, "num_experts": 16, "num_hidden_layers": 2}
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
    """What torchrun starts: the command, with its process noted before and its peak memory after."""
    from qmoe_format.cli import main as command

    rank = os.environ["RANK"]
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    code = command(arguments)
    (folder / f"rss-{rank}").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
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


def pack_arguments(source: Path, out: Path, text: Path, windows: int) -> list[str]:
    arguments = ["pack", str(source), str(out), "--calib", str(text), "--lam", "1e-4", "--json", "--quiet"]
    return [*arguments, "--nsamples", str(windows), "--seqlen", "256", "--batch-size", "4"]


def measure(counts: list[int], work: Path, text: Path) -> list[dict[str, object]]:
    make_source(work / "source", LARGE)
    rows: list[dict[str, object]] = []
    for ranks in counts:
        out, notes = work / f"out{ranks}", work / "notes"
        began = time.monotonic()
        process = start(ranks, notes, pack_arguments(work / "source", out, text, 32))
        stdout, stderr = process.communicate()
        if process.returncode:
            raise SystemExit(stderr)
        summary = json.loads(stdout)
        rss = [int((notes / f"rss-{rank}").read_text()) for rank in range(ranks)]
        row = {
            "ranks": ranks,
            "seconds": summary["seconds"],
            "seconds_with_start": time.monotonic() - began,
            "peak_rss_bytes": rss,
            "weights": summary["weights"],
            "sha256": hashlib.sha256(json.dumps(digests(out)).encode()).hexdigest(),
        }
        rows.append(row)
        print(
            f"{ranks} ranks: {summary['seconds']:.1f} s, {row['seconds_with_start']:.1f} s with starting, "
            f"peak {max(rss) / 1e6:.0f} MB a rank, files {str(row['sha256'])[:12]}",
            flush=True,
        )
        shutil.rmtree(out)
    return rows


def kill_some(count: int, seed: int, work: Path, text: Path) -> list[dict[str, object]]:
    make_source(work / "small", SMALL)
    draw = random.Random(seed)
    out, notes = work / "out", work / "notes"
    arguments = pack_arguments(work / "small", out, text, 64)
    began = time.monotonic()
    process = start(2, notes, arguments)
    _, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(stderr)
    whole, expected = time.monotonic() - began, digests(out)
    rows: list[dict[str, object]] = []
    while len(rows) < count:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name("out.partial"), ignore_errors=True)
        ranks, after, rank = draw.choice((2, 3)), draw.choice((1, 2, 3)), draw.choice((0, 1))
        moment = draw.uniform(0.1, 1.0) * whole * ranks / 2
        began = time.monotonic()
        process = start(ranks, notes, arguments)
        while time.monotonic() - began < moment and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None or not (notes / f"pid-{rank}").exists():
            process.communicate()
            continue  # too late, or too early
        os.kill(int((notes / f"pid-{rank}").read_text()), signal.SIGKILL)
        _, stderr = process.communicate()
        said = [line for line in stderr.splitlines() if line.startswith("qmoe pack: error: ")]
        layers = len(list(work.glob("out.partial/resume-*.json")))
        if process.returncode == 0 or len(said) != 1 or f"rank {rank} " not in said[0] or out.exists():
            raise SystemExit(f"killed rank {rank} of {ranks} after {moment:.2f} s: {stderr}")
        resumed = start(after, notes, [*arguments, "--resume"])
        _, stderr = resumed.communicate()
        if resumed.returncode or digests(out) != expected:
            raise SystemExit(f"resumed with {after} ranks: {stderr}")
        rows.append(
            {"ranks": ranks, "killed": rank, "seconds": moment, "layers_kept": layers, "resumed_with": after}
        )
        print(f"{len(rows)}: rank {rank} of {ranks} killed after {moment:.1f} s, {layers} layers kept; "
              f"resumed with {after}: identical. {said[0]}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(Path(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--kills", type=int, default=0, help="instead: so many ranks are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    from qmoe_quantize.sweep import environment

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        text = work / "text.txt"
        text.write_bytes(
            b"".join(file.read_bytes() for file in sorted(Path(os.__file__).parent.glob("*.py")))
        )
        if options.kills:
            found = {"kills": kill_some(options.kills, options.seed, work, text), "seed": options.seed}
        else:
            rows = measure(options.ranks, work, text)
            if len({row["sha256"] for row in rows}) != 1:
                raise SystemExit("the bytes differ")
            found = {"model": LARGE, "runs": rows}
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    if "runs" in found and "runs" in result:
        kept = [row for row in result["runs"] if row["ranks"] not in options.ranks]
        found["runs"] = sorted([*kept, *found["runs"]], key=lambda row: row["ranks"])
        if len({row["sha256"] for row in found["runs"]}) != 1:
            raise SystemExit("the bytes differ from those of earlier runs")
    result |= {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **environment(),
        "threads_per_rank": 1,
        **found,
    }
    if "runs" in result:
        seconds = {row["ranks"]: row["seconds"] for row in result["runs"]}
        result["speed_up"] = {
            str(ranks): seconds[1] / time for ranks, time in seconds.items() if 1 in seconds
        }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
