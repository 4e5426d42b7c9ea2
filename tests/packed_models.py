"""Small packed models, and ways to spoil them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import qmoe_codec

from qmoe_format import LayerSpec, PackedModelWriter, Projection

CONFIG = {"architectures": ["OlmoeForCausalLM"], "hidden_size": 24, "model_type": "olmoe"}
RECIPE = {"method": "nearest", "levels": "minmax"}


def layer_spec(
    number: int = 0, experts: int = 3, hidden: int = 24, width: int = 40, dtype: str = "BF16"
) -> LayerSpec:
    """An OLMoE layer."""
    prefix = f"model.layers.{number}.mlp.experts"
    sides = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    projections = tuple(
        Projection(f"{role}_proj", role, f"{prefix}.{{expert}}.{role}_proj.weight", *sides[role])
        for role in ("gate", "up", "down")
    )
    return LayerSpec(prefix, experts, projections, dtype)


def trits(rows: int, columns: int, *seed: int, p_zero: float = 0.85) -> np.ndarray[Any, np.dtype[np.int8]]:
    """A random ternary matrix."""
    half = (1 - p_zero) / 2
    return np.random.default_rng(seed).choice(
        np.array([-1, 0, 1], np.int8), (rows, columns), p=(half, p_zero, half)
    )


def levels(rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Levels that bfloat16 holds exactly."""
    return np.stack([-0.5 - np.arange(rows) % 8 / 8, 0.25 + np.arange(rows) % 4 / 4], axis=1).astype(
        np.float32
    )


def records(
    layer: LayerSpec,
    dictionaries: qmoe_codec.DictionarySet,
    before: Callable[[int], None] = lambda expert: None,
) -> Iterator[tuple[list[bytes], int]]:
    """The records of a layer; `before` is called ahead of each."""
    for expert in range(layer.experts):
        before(expert)
        yield (
            [
                dictionaries.encode(
                    trits(p.rows, p.columns, len(layer.prefix), expert, number), levels(p.rows)
                )
                for number, p in enumerate(layer.projections)
            ],
            10 * expert - 1,
        )


def dense_tensors() -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Tensors of several dtypes, one with an odd number of elements, one empty, one a scalar."""
    weights = np.random.default_rng(1).normal(0, 0.02, (64, 24)).astype("<f4")
    bf16 = (weights.view("<u4") >> 16).astype("<u2")
    return [
        ("model.embed_tokens.weight", "BF16", (64, 24), bf16.tobytes()),
        ("model.norm.weight", "BF16", (3,), bf16[0, :3].tobytes()),
        ("model.layers.0.mlp.gate.weight", "F32", (64, 24), weights.tobytes()),
        ("model.empty", "F16", (0, 7), b""),
        ("model.steps", "I64", (), struct.pack("<q", 77)),
        ("model.mask", "BOOL", (5,), b"\1\0\1\1\0"),
    ]


def write_model(
    out: Path, *, layers: int = 2, experts: int = 3, zstd: bool = True, force: bool = False, **options: Any
) -> Path:
    """Write a small model; returns `out`."""
    tokenizer = out.parent / "tokenizer.json"
    tokenizer.write_text('{"version": "1.0"}')
    with PackedModelWriter(out, force=force, **options) as writer:
        writer.add_file(tokenizer)
        for number in range(layers):
            spec = layer_spec(number, experts)
            dictionaries = qmoe_codec.DictionarySet()
            writer.add_layer(spec, records(spec, dictionaries), dictionaries)
        for name, dtype, shape, data in dense_tensors():
            (writer.add_dense_zstd if zstd else writer.add_dense)(name, dtype, shape, data)
        writer.finish(CONFIG, RECIPE)
    return out


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def restore(directory: Path, files: dict[str, bytes]) -> None:
    """Make a directory hold exactly these files."""
    directory.mkdir(exist_ok=True)
    for path in directory.iterdir():
        if path.name not in files:
            path.unlink()
    for name, data in files.items():
        (directory / name).write_bytes(data)


def edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    """Change a JSON file by a function that changes the value in place."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def sign(directory: Path, *names: str) -> None:
    """Bring the manifest up to date, for all files or some, as somebody would who means to deceive."""

    def edit(manifest: Any) -> None:
        for name in names or manifest["files"]:
            data = (directory / name).read_bytes()
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit_json(directory / "manifest.json", edit)


def split(shard: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (size,) = struct.unpack_from("<Q", shard)
    return json.loads(shard[8 : 8 + size]), shard[8 + size :]


def join(header: object, data: bytes, *, align: int = 256) -> bytes:
    """A safetensors file; `header` may be JSON text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % align)
    return struct.pack("<Q", len(text)) + text + data
