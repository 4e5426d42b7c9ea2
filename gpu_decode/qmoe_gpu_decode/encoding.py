"""Encode on the device: trits and levels there become a frame there, byte for byte as on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qmoe_codec import Dictionary, DictionaryHeader, FrameHeader
from qmoe_codec.errors import ArgumentError
from qmoe_codec.layout import (
    CODEC_DICTIONARY,
    KIND_TREES,
    LEVEL_EXPONENTS,
    MAXIMUM_CODEWORDS,
    MAXIMUM_DICTIONARIES,
    MAXIMUM_SIDE,
    MAXIMUM_WEIGHTS,
)

from .device import Argument, Device, address

FAULTS = {
    1: ("trits", "-1, 0 or 1"),
    2: ("levels", "levels that level_format can hold"),
    4: ("dictionary", "a phrase that matches"),
    8: ("selectors", "a dictionary for each row"),
}
_POLYNOMIAL = 0x82F63B78
_PIECE = 512
_NO_CODEWORD = 0xFFFFFFFF


def _multiply(a: int, b: int) -> int:
    """a * b modulo the polynomial of CRC-32C, bits reflected."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@functools.cache
def _powers() -> NDArray[np.uint32]:
    """x^(8 * 2^k) modulo the polynomial."""
    power = 1 << 23  # x^8; bit 31 is x^0
    powers = []
    for _ in range(48):
        powers.append(power)
        power = _multiply(power, power)
    return np.array(powers, np.uint32)


def _checksum_constant(size: int) -> int:
    """What 0xFFFFFFFF in front and the last xor add to the CRC-32C of `size` bytes."""
    value = 0xFFFFFFFF
    for k, power in enumerate(_powers().tolist()):
        if size >> k & 1:
            value = _multiply(value, power)
    return value ^ 0xFFFFFFFF


@functools.lru_cache(maxsize=64)
def encoder_nodes(dictionary: Dictionary) -> tuple[NDArray[np.uint32], int]:
    """Nodes of the parse trees uint32 [nodes, 4] as kernels/encode.cu reads them, and the root of T1."""
    parts: list[NDArray[np.uint32]] = []
    first, roots = 0, []
    for table in dictionary.words:
        roots.append(first)
        children: list[list[int]] = [[0, 0, 0]]
        codewords = [_NO_CODEWORD]
        for codeword, word in enumerate(table.tolist()):
            if not word:
                continue
            steps = [0] * (word & 127)
            for k in range(3):
                position = word >> (7 + 7 * k) & 127
                if position < len(steps):
                    steps[position] = 1 + (word >> (28 + k) & 1)
            node = 0
            for step in steps:
                if not children[node][step]:
                    children[node][step] = len(children)
                    children.append([0, 0, 0])
                    codewords.append(_NO_CODEWORD)
                node = children[node][step]
            if codewords[node] == _NO_CODEWORD:  # of equal phrases the lowest codeword is sent
                codewords[node] = codeword
        order: list[int] = []
        number, stack = [0] * len(children), [0]
        while stack:
            node = stack.pop()
            number[node] = first + len(order)
            order.append(node)
            stack += [child for child in reversed(children[node]) if child]
        nodes = np.zeros((len(order), 4), np.uint32)
        for place in range(len(order) - 1, -1, -1):
            node = order[place]
            zero, plus, minus = children[node]
            zeros = int(nodes[place + 1, 3]) + 1 if zero else 0
            nodes[place] = codewords[node], number[plus] if plus else 0, number[minus] if minus else 0, zeros
        parts.append(nodes)
        first += len(order)
    return np.concatenate(parts), roots[-1]


def _check(
    rows: int, columns: int, dictionaries: Sequence[Dictionary], level_format: int, selectors: Any
) -> None:
    sides = max(rows, columns) <= MAXIMUM_SIDE and rows * columns <= MAXIMUM_WEIGHTS
    if not sides:
        raise ArgumentError("too large", field="trits", value=(rows, columns), expected="the format's limits")
    if len(dictionaries) > MAXIMUM_DICTIONARIES:
        raise ArgumentError("too many", field="dictionaries", value=len(dictionaries), expected="at most 4")
    identities = {dictionary.dictionary_id for dictionary in dictionaries}
    widths = {dictionary.bits for dictionary in dictionaries}
    if len(identities) != len(dictionaries) or len(widths) > 1:
        raise ArgumentError("not usable", field="dictionaries", expected="different ones of equal bits")
    if level_format not in range(4):
        raise ArgumentError("no such format", field="level_format", value=level_format, expected="0 to 3")
    if len(dictionaries) > 1 and selectors is None:
        raise ArgumentError("none given", field="selectors", expected="a dictionary for each row")


@functools.lru_cache(maxsize=32)
def _uploaded(device: Device, dictionaries: tuple[Dictionary, ...]) -> tuple[Any, Any, Any]:
    """What encoding with these dictionaries reads on the device: trees, nodes, powers of x."""
    parts, trees, first = [np.zeros((1, 4), np.uint32)], np.zeros((MAXIMUM_DICTIONARIES, 4), np.uint32), 1
    for k, dictionary in enumerate(dictionaries):
        nodes, root = encoder_nodes(dictionary)
        kind = DictionaryHeader.parse(memoryview(dictionary.frame)).kind
        trees[k] = first, root, dictionary.threshold, kind == KIND_TREES
        parts.append(nodes)
        first += len(nodes)
    return device.upload(trees), device.upload(np.concatenate(parts)), device.upload(_powers())


def launch_encode(
    device: Device,
    trits: Any,
    levels: Any,
    shape: tuple[int, int],
    dictionaries: Sequence[Dictionary],
    level_format: int,
    *,
    selectors: Any = None,
    stream: int | None = None,
) -> Any:
    """Encode trits int8 [rows, columns] and levels float32 [rows, 2], all arrays on the device.

    Waits once for the device, to learn how large the frame is.

    Returns
    -------
    array of uint8
        The frame, on the device.

    Raises
    ------
    ArgumentError
        Arguments, or values in the arrays, that a frame cannot hold.
    """
    rows, columns = shape
    _check(rows, columns, dictionaries, level_format, selectors)
    u32, u64 = np.uint32, np.uint64
    all_trees, all_nodes, powers = _uploaded(device, tuple(dictionaries))
    summary = device.upload(np.array([_NO_CODEWORD, 0, 0, 0, 0, 0, 0, 0], u32))
    counts, starts = device.empty((max(1, rows),), "uint32"), device.empty((max(1, rows),), "uint32")
    choice = selectors if selectors is not None else counts  # not read where there is one dictionary
    blocks = -(-rows // 64)

    def launch(kernel: str, grid: int, threads: int, *arguments: Argument) -> None:
        device.launch("encode.cu", {}, kernel, (max(1, grid), 1), threads, 0, arguments, stream)

    inputs = (address(trits), address(levels), u32(rows), u32(columns))
    coding = (
        address(all_trees),
        u32(len(dictionaries)),
        address(all_nodes),
        address(choice),
        u32(level_format),
    )
    if rows:
        launch("count_rows", blocks, 64, *inputs, *coding, address(counts), address(summary))
        if dictionaries:
            launch("index_rows", 1, 1024, address(counts), u32(rows), address(starts), address(summary))
    raw_bytes = -(-rows * columns // 5)
    trits_bytes = None
    if not dictionaries:
        trits_bytes = device.empty((max(1, raw_bytes),), "uint8")
        weights = u64(rows * columns)
        grid = min(1 << 20, -(-raw_bytes // 256))
        launch("write_raw", grid, 256, address(trits), weights, address(trits_bytes), address(summary))
    least, most, low, high, faults, top, _, _ = device.download(summary).tolist()
    for bit, (field, expected) in FAULTS.items():
        if faults & bit:
            raise ArgumentError("not usable", field=field, expected=expected)
    total = low | high << 32
    if total > MAXIMUM_CODEWORDS:
        raise ArgumentError("too many", field="trits", value=total, expected="fewer than 2^32 codewords")
    exponent = 0
    if level_format == 3:
        exponent = min(max(top - 256 - 15 if top else -141, LEVEL_EXPONENTS[0]), LEVEL_EXPONENTS[-1])
    if dictionaries:
        header = FrameHeader(
            version_minor=0,
            codec=CODEC_DICTIONARY,
            level_format=level_format,
            rows=rows,
            columns=columns,
            level_exponent=exponent,
            bits=dictionaries[0].bits,
            count_bits=(most - least).bit_length() if rows else 0,
            count_minimum=least if rows else 0,
            codeword_count=total,
            dictionary_ids=tuple(dictionary.dictionary_id for dictionary in dictionaries),
        )
    else:
        header = FrameHeader.raw(rows, columns, level_format)
        header = FrameHeader(**{**header.__dict__, "level_exponent": exponent})
    front = np.zeros(64, np.uint8)
    front[:56] = np.frombuffer(header.pack(lambda data, value=0: 0)[:56], np.uint8)
    front_there, frame = device.upload(front), device.empty((header.frame_size,), "uint8")
    size = header.frame_size
    launch("clear", min(1 << 20, -(-size // 4096)), 256, address(frame), u64(size), address(front_there))
    bases, counts_size, _ = header.row_index_parts
    if rows:
        launch(
            "write_rows",
            blocks,
            64,
            *inputs,
            *coding,
            np.uint32(exponent & 0xFFFFFFFF),
            address(starts),
            address(counts),
            address(frame),
            u64(header.row_index_start),
            u64(header.row_index_start + bases),
            u64(header.row_index_start + bases + counts_size),
            u64(header.codewords_start),
            u32(header.bits),
            u32(header.count_bits),
            u32(header.count_minimum),
            u32(header.selector_bits),
        )
    if trits_bytes is not None and raw_bytes:
        launch(
            "write_raw",
            min(1 << 20, -(-raw_bytes // 256)),
            256,
            address(trits),
            u64(rows * columns),
            u64(int(address(frame)) + header.codewords_start),
            address(summary),
        )
    pieces = -(-header.body_size // _PIECE)
    launch("checksum", -(-pieces // 256), 256, address(frame), u64(header.frame_size), address(powers))
    launch("seal", 1, 32, address(frame), u32(_checksum_constant(header.body_size)))
    return frame
