"""Every golden vector, with every backend: valid files hold what the manifest says, others are refused."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from qmoe_codec import BACKENDS, Dictionary, FormatError, decode
from qmoe_codec.dictionary import parse_dictionaries
from qmoe_codec.errors import FORMAT_ERRORS
from qmoe_codec.reference import read_dictionary

from qmoe_format.dense import decode_dense

SPEC = Path(__file__).parents[1] / "spec"
VECTORS = SPEC / "vectors"
MANIFEST = json.loads((VECTORS / "manifest.json").read_text())["vectors"]


def read(name: str) -> bytes:
    return (VECTORS / name).read_bytes()


def select(folder: str, kind: str) -> list[str]:
    return [name for name, entry in MANIFEST.items() if name.startswith(folder) and entry["kind"] == kind]


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def dictionaries_of(name: str) -> dict[int, Dictionary]:
    found = [Dictionary.from_frame(read(file)) for file in MANIFEST[name]["dictionaries"]]
    return {dictionary.dictionary_id: dictionary for dictionary in found}


def test_no_file_is_missing_from_the_manifest() -> None:
    files = {
        str(path.relative_to(VECTORS))
        for folder in ("valid", "invalid")
        for path in (VECTORS / folder).iterdir()
    }
    assert files == set(MANIFEST)


@pytest.mark.parametrize("name", MANIFEST)
def test_vectors_never_change(name: str) -> None:
    assert hashlib.sha256(read(name)).hexdigest() == MANIFEST[name]["sha256"]


def test_the_script_makes_the_same_vectors() -> None:
    made = subprocess.run(
        [sys.executable, SPEC / "make_vectors.py"], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("name", select("valid", "dictionary"))
def test_valid_dictionary(name: str) -> None:
    expected = MANIFEST[name]["expect"]
    dictionary = Dictionary.from_frame(read(name))
    assert dictionary.dictionary_id == expected["dictionary_id"]
    assert (dictionary.bits, dictionary.tables) == (expected["bits"], expected["tables"])
    assert dictionary.threshold == expected["threshold"]
    for words in (dictionary.words, dictionary.reference.words()):
        assert sha256(words.astype("<u4")) == expected["words_sha256"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", select("valid", "matrix"))
def test_valid_matrix(name: str, backend: str) -> None:
    expected = MANIFEST[name]["expect"]
    trits, levels = decode(read(name), dictionaries_of(name), backend=backend)
    assert trits.dtype == np.int8 and levels.dtype == np.float32
    assert trits.shape == (expected["rows"], expected["columns"])
    assert sha256(trits) == expected["trits_sha256"]
    assert sha256(levels.astype("<f4")) == expected["levels_sha256"]


@pytest.mark.parametrize("name", select("valid", "dense"))
def test_valid_dense(name: str) -> None:
    expected = MANIFEST[name]["expect"]
    dtype, shape, content = decode_dense(read(name))
    assert (dtype, list(shape)) == (expected["dtype"], expected["shape"])
    assert hashlib.sha256(content).hexdigest() == expected["content_sha256"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", select("invalid", "matrix"))
def test_invalid_matrix(name: str, backend: str) -> None:
    entry = MANIFEST[name]
    dictionaries = dictionaries_of(name)
    with pytest.raises(FORMAT_ERRORS[entry["error"]]) as caught:
        decode(read(name), dictionaries, backend=backend)
    assert caught.value.field == entry["field"]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", select("invalid", "dictionary"))
@pytest.mark.parametrize("reader", [Dictionary.from_frame, read_dictionary], ids=BACKENDS)
def test_invalid_dictionary(name: str, reader) -> None:
    entry = MANIFEST[name]
    with pytest.raises(FORMAT_ERRORS[entry["error"]]) as caught:
        reader(read(name))
    assert caught.value.field == entry["field"]


@pytest.mark.parametrize("name", select("invalid", "dense"))
def test_invalid_dense(name: str) -> None:
    entry = MANIFEST[name]
    with pytest.raises(FORMAT_ERRORS[entry["error"]]) as caught:
        decode_dense(read(name))
    assert caught.value.field == entry["field"]


def test_every_kind_of_fault_has_a_vector() -> None:
    assert {entry["error"] for entry in MANIFEST.values() if "error" in entry} == set(FORMAT_ERRORS)


def test_dictionaries_of_a_layer_must_rise() -> None:
    frames = [read(name) for name in select("valid", "dictionary")]
    ordered = sorted(frames, key=lambda frame: Dictionary.from_frame(frame).dictionary_id)
    assert len(parse_dictionaries(b"".join(ordered))) == len(frames)
    for wrong in (ordered[::-1], [ordered[0], ordered[0]]):
        with pytest.raises(FormatError, match="rising"):
            parse_dictionaries(b"".join(wrong))
