"""Calibration text: from files to windows of tokens, with a mask of those that count.

What is held out for validation is decided here, before anything else is done: a text is cut to a part of
itself (`Fraction` to `Fraction` of its length) and nothing outside of that part is ever tokenized.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from qmoe_codec.errors import (
    ArgumentError,
    CheckpointError,
    HeaderError,
    MissingPackageError,
    QMoEError,
)

from qmoe_format.files import os_errors, parse_json

from .config import ModelConfig

DEFAULT_PART = "0:0.95"
SUFFIXES = (".txt", ".jsonl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "test")
PIECE = 1 << 14  # characters that are tokenized at once; small, so that windows come from all over the text
SURPLUS = 4  # tokens made for every one that is needed, so that windows come from all over a long text

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TextOptions:
    """Where calibration text comes from, and how much of it is used.

    Attributes
    ----------
    source : str
        A ``.txt`` or ``.jsonl`` file; a folder of such files, taken in order of name; or ``hf:NAME`` for the
        training split of a data set on the Hugging Face hub.
    samples : int
        Windows to use; fewer where the text has no more.
    length : int, optional
        Tokens of a window; by default 2048, or as many as the model has positions for.
    part : str
        ``START:STOP``, both as a share of the text from 0 to 1: the rest is held out and never read into a
        window. Shares are of bytes for ``.txt`` files, taken together, and of documents for others.
    seed : int
        Decides which windows are used.
    """

    source: str
    samples: int = 128
    length: int | None = None
    part: str = DEFAULT_PART
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("samples", "length"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ArgumentError("illegal", field=field, value=value, expected="at least 1")
        parse_part(self.part)


@dataclass(frozen=True)
class TokenWindows:
    """Calibration text as the model reads it.

    Attributes
    ----------
    tokens : ndarray
        int64 [samples, length].
    counted : ndarray
        bool [samples, length]: False for special tokens, padding, and what the text's own mask leaves out.
    available : int
        Windows that there were to choose from.
    """

    tokens: npt.NDArray[np.int64]
    counted: Mask
    available: int

    @property
    def digest(self) -> str:
        """SHA-256 of the windows and their mask."""
        digest = hashlib.sha256(repr(self.tokens.shape).encode())
        digest.update(np.ascontiguousarray(self.tokens, "<i8").tobytes())
        digest.update(np.packbits(self.counted).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Document:
    """Bytes or characters that belong together, and which characters do not count: [start, stop) each."""

    text: bytes | str
    left_out: tuple[tuple[int, int], ...] = ()


def parse_part(text: str) -> tuple[Fraction, Fraction]:
    """``START:STOP`` as exact shares.

    Raises
    ------
    ArgumentError
        They are not shares from 0 to 1 in rising order.
    """
    try:
        start, stop = (Fraction(share) for share in text.split(":"))
        if 0 <= start < stop <= 1:
            return start, stop
    except (ValueError, ZeroDivisionError):
        pass
    raise ArgumentError("illegal", field="calib range", value=text, expected="START:STOP from 0 to 1")


def take_part(data: bytes, part: str) -> bytes:
    """The part ``START:STOP`` of `data`; the same cut for calibration and for what is held out from it."""
    start, stop = parse_part(part)
    return data[int(len(data) * start) : int(len(data) * stop)]


def read_windows(options: TextOptions, config: ModelConfig) -> TokenWindows:
    """Read, cut, tokenize, and choose windows.

    Parameters
    ----------
    options : TextOptions
    config : ModelConfig
        Of the model whose tokenizer is used. A model of 256 tokens without one reads bytes.

    Raises
    ------
    CheckpointError
        There is no text, less than one window of it, no tokenizer, or no token that counts.
    HeaderError
        A line of a ``.jsonl`` file is not what it should be.
    MissingPackageError
        The hub or the tokenizer needs a package that is not installed.
    """
    encode = encoder_of(config)
    length = window_length(options, config)
    documents = _documents(options)
    generator = np.random.default_rng(options.seed)
    wanted = SURPLUS * options.samples * length
    tokens, counted = _tokenize(documents, encode, generator, wanted)
    available = len(tokens) // length
    if not available:
        raise CheckpointError(
            "the text is shorter than one sample",
            file=options.source,
            field=f"part {options.part}",
            value=f"{len(tokens)} tokens",
            expected=f"at least {length}",
        )
    chosen = np.sort(generator.permutation(available)[: options.samples])
    windows = TokenWindows(
        tokens[: available * length].reshape(available, length)[chosen],
        counted[: available * length].reshape(available, length)[chosen],
        available,
    )
    vocabulary = config.number("vocab_size")
    if (largest := int(windows.tokens.max())) >= vocabulary:
        raise CheckpointError(
            "the tokenizer gives a token that the model does not have",
            file=config.directory,
            field="vocab_size",
            value=largest,
            expected=f"below {vocabulary}",
        )
    if not windows.counted.any():
        raise CheckpointError("no token that counts: all are special or masked", file=options.source)
    return windows


def window_length(options: TextOptions, config: ModelConfig) -> int:
    """Tokens of a window."""
    return options.length or min(2048, _positions(config))


def _positions(config: ModelConfig) -> int:
    return config.number("max_position_embeddings", config.number("n_positions", 512)) or 512


# ---- reading -----------------------------------------------------------------------------------------------


def _documents(options: TextOptions) -> list[_Document]:
    """The documents of the part that may be used."""
    if options.source.startswith("hf:"):
        rows = _from_hub(options.source[3:])
        return _any_of(_cut(rows, options.part), len(rows), options)
    path = Path(options.source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    elif path.is_file():
        files = [path]
    else:
        raise CheckpointError("not found", file=path, expected="a .txt or .jsonl file, a folder, or hf:NAME")
    for file in files:
        if file.suffix not in SUFFIXES:
            raise CheckpointError("unknown kind of text", file=file, expected=" or ".join(SUFFIXES))
    plain = [_read(file) for file in files if file.suffix == ".txt"]
    lines = [document for file in files if file.suffix == ".jsonl" for document in _json_lines(file)]
    documents = _cut(lines, options.part)
    # One text: the cut must not move when the files are split in another way.
    if text := take_part(b"".join(plain), options.part):
        documents.insert(0, _Document(text))
    return _any_of(documents, len(lines), options)


def _read(file: Path) -> bytes:
    with os_errors(file):
        return file.read_bytes()


def _cut(documents: list[_Document], part: str) -> list[_Document]:
    start, stop = parse_part(part)
    return documents[int(len(documents) * start) : int(len(documents) * stop)]


def _any_of(documents: list[_Document], count: int, options: TextOptions) -> list[_Document]:
    """The documents that may be used, of `count` in all, if there are any."""
    if not documents:
        raise CheckpointError(
            "no calibration text",
            file=options.source,
            field=f"part {options.part}",
            value=f"{count} documents" if count else None,
            expected="text in it",
        )
    return documents


def _json_lines(file: Path) -> list[_Document]:
    """One document a line: ``{"text": …, "mask": [[start, stop], …], "split": …}``, the last two optional."""
    documents = []
    for number, line in enumerate(_read(file).splitlines(), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        entry = parse_json(line, file, place)
        text = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(text, str):
            raise HeaderError("no text", file=file, field=place, expected='an object with "text"')
        if entry.get("split") in HELD_OUT_SPLITS:
            continue
        documents.append(_Document(text, _spans(entry.get("mask"), len(text), file, place)))
    return documents


def _spans(value: Any, length: int, file: Path, place: str) -> tuple[tuple[int, int], ...]:
    """Spans of characters that do not count."""
    if value is None:
        return ()
    spans = []
    for span in value if isinstance(value, list) else [None]:
        ends = span if isinstance(span, list) and all(type(end) is int for end in span) else []
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= length:
            raise HeaderError(
                "illegal",
                file=file,
                field=f"{place}: mask",
                value=json.dumps(span)[:40],
                expected=f"[[start, stop], …] within {length} characters",
            )
        spans.append((ends[0], ends[1]))
    return tuple(spans)


def _from_hub(name: str) -> list[_Document]:
    """The training split of a data set on the hub."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingPackageError(
            "reading a data set from the hub needs a package: pip install datasets", file=f"hf:{name}"
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train")
        texts = rows["text"]
    except KeyError as error:
        raise CheckpointError("has no column of this name", file=f"hf:{name}", field="text") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QMoEError(f"not to be had from the hub: {reason}", file=f"hf:{name}") from error
    return [_Document(text) for text in texts]


# ---- tokens ------------------------------------------------------------------------------------------------


class Encoder:
    """Bytes as tokens.

    Attributes
    ----------
    special : ndarray
        int64: tokens that do not count.
    separator : int or None
        Token that ends a document.
    """

    separator: int | None = None

    def __init__(self, special: Sequence[int]) -> None:
        self.special = np.array(sorted(set(special)), np.int64)

    def __call__(self, text: bytes | str, left_out: Mask | None) -> tuple[npt.NDArray[np.int64], Mask]:
        """Tokens, and which of them count; `left_out` says it of characters."""
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        tokens = np.frombuffer(data, np.uint8).astype(np.int64)
        counted = np.ones(len(tokens), bool)
        if left_out is not None and isinstance(text, str):
            sizes = [len(character.encode("utf-8", "surrogatepass")) for character in text]
            counted = ~np.repeat(left_out, sizes)
        return tokens, counted & ~np.isin(tokens, self.special)


class TokenizerEncoder(Encoder):
    """The checkpoint's own tokenizer."""

    def __init__(self, tokenizer: Any, special: Sequence[int]) -> None:
        super().__init__([*special, *tokenizer.all_special_ids])
        self._tokenizer = tokenizer
        self.separator = tokenizer.eos_token_id

    def __call__(self, text: bytes | str, left_out: Mask | None) -> tuple[npt.NDArray[np.int64], Mask]:
        """Tokens, and which of them count, as the tokenizer has them."""
        characters = text if isinstance(text, str) else text.decode("utf-8", "replace")
        options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
        if left_out is None:
            found = self._tokenizer(characters, **options)
        else:
            try:
                found = self._tokenizer(characters, return_offsets_mapping=True, **options)
            except NotImplementedError as error:
                raise CheckpointError(
                    "this tokenizer does not say where its tokens lie, so a mask cannot be followed",
                    field="mask",
                    expected="text without masks, or a tokenizer.json",
                ) from error
        tokens = np.array(found["input_ids"], np.int64)
        counted = ~np.isin(tokens, self.special)
        if left_out is not None:
            starts = np.array([start for start, _ in found["offset_mapping"]], np.int64)
            counted &= ~left_out[np.minimum(starts, max(0, len(left_out) - 1))] if len(left_out) else True
        return tokens, counted


def encoder_of(config: ModelConfig) -> Encoder:
    """How `config`'s model reads text.

    Raises
    ------
    CheckpointError
        It has no tokenizer, and more or fewer tokens than there are bytes.
    """
    special = [
        value
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        for value in [config.values.get(name)]
        if isinstance(value, int)
    ]
    files = [config.directory / name for name in TOKENIZER_FILES]
    if any(file.exists() for file in files if file.name != "tokenizer_config.json"):
        return TokenizerEncoder(_tokenizer(config.directory), special)
    if config.number("vocab_size") != 256:
        raise CheckpointError(
            "has no tokenizer, which text needs",
            file=config.directory,
            field="vocab_size",
            value=config.number("vocab_size"),
            expected="tokenizer.json or the like, or a vocabulary of 256 for bytes",
        )
    return Encoder(special)


def _tokenizer(directory: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        raise MissingPackageError(
            "transformers is not installed: pip install 'qmoe-format[transformers]'"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(directory))
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the tokenizer cannot be used: {reason}", file=directory) from error
    return tokenizer


def _tokenize(
    documents: list[_Document], encode: Encoder, generator: np.random.Generator, wanted: int
) -> tuple[npt.NDArray[np.int64], Mask]:
    """Tokens of pieces of the text, in order, at least `wanted` of them if there are as many."""
    pieces = [piece for document in documents for piece in _pieces(document)]
    encoded: dict[int, tuple[npt.NDArray[np.int64], Mask]] = {}
    made = 0
    for number in generator.permutation(len(pieces)).tolist():
        text, left_out, last = pieces[number]
        tokens, counted = encode(text, left_out)
        if last and encode.separator is not None:
            tokens, counted = np.append(tokens, encode.separator), np.append(counted, False)
        encoded[number] = tokens, counted
        made += len(tokens)
        if made >= wanted:
            break
    ordered = [encoded[number] for number in sorted(encoded)]
    return np.concatenate([part for part, _ in ordered]), np.concatenate([part for _, part in ordered])


def _pieces(document: _Document) -> Iterator[tuple[bytes | str, Mask | None, bool]]:
    """Parts of a document, their masks, and whether each is the document's last."""
    text = document.text
    left_out = None
    if document.left_out:
        left_out = np.zeros(len(text), bool)
        for start, stop in document.left_out:
            left_out[start:stop] = True
    for start in range(0, max(1, len(text)), PIECE):
        piece = slice(start, start + PIECE)
        yield text[piece], None if left_out is None else left_out[piece], start + PIECE >= len(text)
