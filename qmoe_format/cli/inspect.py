"""``qmoe-inspect``."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from ..container import LayerSpec
from ..inspection import ExpertReport, Inspection, inspect
from . import plot
from .common import Command, ProgressBar, add_output_arguments, print_json
from .hdf5 import directory_input
from .text import size, table


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="directory of a packed model, or HDF5 file")
    parser.add_argument("--plot", metavar="FILE", help="also draw a chart; .png, .svg or .pdf")
    add_output_arguments(parser)


def _run(options: argparse.Namespace) -> None:
    if options.plot:
        plot.check(options.plot)
    with (
        directory_input(options.path, tempfile.gettempdir(), quiet=options.quiet) as path,
        ProgressBar("inspecting", quiet=options.quiet) as progress,
    ):
        found = replace(inspect(path, progress=progress), path=Path(options.path))
    if options.plot:
        plot.draw(found, options.plot)
    print_json(found.to_json()) if options.json else print(_text(found))


def _text(found: Inspection) -> str:
    total, dense = found.total, found.dense
    kept = f", {dense.compressed} of them compressed" if dense.compressed else ""
    parts = [
        f"{found.path}: {found.model_type}, {len(found.layers)} expert layers, {total.experts} experts, "
        f"{total.weights:,} weights, {total.sparsity:.1%} zero",
        *_shapes(found),
        "",
        _layer_table(found),
        "",
        _byte_table(found),
        "",
        f"other tensors: {dense.tensors}{kept}",
        f"dictionaries: {len(total.dictionaries)} different for {total.matrices} matrices"
        + (f", {total.raw_frames} of them raw" if total.raw_frames else ""),
        "",
        _dictionary_table(total),
    ]
    return "\n".join(parts)


def _shapes(found: Inspection) -> list[str]:
    """A line for each kind of layer."""
    lines: dict[str, int] = {}
    for spec in found.specs.values():
        line = _shape(spec)
        lines[line] = lines.get(line, 0) + 1
    return [f"{count} × {line}" for line, count in lines.items()]


def _shape(spec: LayerSpec) -> str:
    matrices = ", ".join(f"{p.name} {p.rows}×{p.columns}" for p in spec.projections)
    return f"{spec.experts} experts of {spec.dtype}: {matrices}"


def _layer_table(found: Inspection) -> str:
    header = (
        *("bits per weight", "experts", "zero", "codewords", "row index", "levels", "headers", "padding"),
        *("tables", "total", "entropy", "vs bf16"),
    )

    def row(name: str, report: ExpertReport) -> tuple[str, ...]:
        return (
            name,
            str(report.experts),
            f"{report.sparsity:.2%}",
            *(
                f"{report.bits(section):.4f}"
                for section in ("codewords", "row_index", "levels", "headers", "padding")
            ),
            f"{report.bits('dictionaries', 'index'):.4f}",
            f"{report.bits():.4f}",
            f"{report.entropy:.4f}",
            f"{16 / report.bits():.1f}×" if report.bytes and report.weights else "–",
        )

    rows = [row(prefix, report) for prefix, report in found.layers.items()]
    return table(header, [*rows, row("all layers", found.total)])


def _byte_table(found: Inspection) -> str:
    total, dense = found.total, found.dense

    def row(name: str, bf16: int, stored: int) -> tuple[str, ...]:
        return (
            name,
            size(bf16),
            size(stored),
            f"{bf16 / stored:.2f}×" if stored else "–",
            f"{stored / whole:.1%}",
        )

    whole = max(1, found.file_bytes)
    rest = found.file_bytes - total.bytes - dense.stored_bytes
    return table(
        ("bytes", "in bf16", "here", "ratio", "share"),
        [
            row("experts", 2 * total.weights, total.bytes),
            row("other tensors", 2 * dense.elements, dense.stored_bytes),
            ("file headers, JSON, tokenizer", "", size(rest), "", f"{rest / whole:.1%}"),
            row("all", found.bf16_bytes, found.file_bytes),
        ],
    )


def _dictionary_table(total: ExpertReport) -> str:
    rows = [
        (f"{identity:#010x}", str(use.bits), str(use.threshold), str(use.frames), size(use.bytes))
        for identity, use in sorted(total.dictionaries.items(), key=lambda item: (-item[1].frames, item[0]))
    ]
    return table(("dictionary", "bits", "threshold", "matrices", "bytes"), rows)


COMMAND = Command(
    "inspect", "Say what a packed model consists of, and where its bytes go.", _add_arguments, _run
)
