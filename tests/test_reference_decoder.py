"""The decoder in spec/reference, written from the specification alone, says what the codec says."""

import hashlib
import itertools
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from qmoe_codec import (
    BACKENDS,
    Dictionary,
    FormatError,
    build_dictionary,
    crc32c,
    decode,
    encode,
    read_frame_header,
)
from reference_program import SANITIZE, ReferenceProgram, build, sanitizers_work
from safetensors.torch import load_file
from strategies import reseal, some_dictionaries
from valid_streams import random_frame

from qmoe_format.dense import decode_dense

SPEC = Path(__file__).parents[1] / "spec"
VECTORS = SPEC / "vectors"
MANIFEST = json.loads((VECTORS / "manifest.json").read_text())["vectors"]

Run = Callable[..., "bytes | tuple[str, str]"]


@pytest.fixture(scope="module", params=["plain", "sanitized"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    if request.param == "plain":
        return build(folder, ["-O2"])
    if shutil.which("cc") and not sanitizers_work(folder):
        pytest.skip("this compiler has no address and undefined-behaviour sanitizers")
    return build(folder, SANITIZE)


@pytest.fixture
def run(program: Path, tmp_path: Path) -> Run:
    return ReferenceProgram(program, tmp_path)


def select(folder: str, kind: str) -> list[str]:
    return [name for name, entry in MANIFEST.items() if name.startswith(folder) and entry["kind"] == kind]


CONTENTS = {
    "matrix": {"--levels": "levels_sha256", "--trits": "trits_sha256"},
    "dictionary": {"--words": "words_sha256"},
    "dense": {"--content": "content_sha256"},
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_valid_vectors(run: Run, kind: str) -> None:
    names = select("valid", kind)
    assert names
    for name in names:
        expected = MANIFEST[name]["expect"]
        files = [VECTORS / file for file in (name, *MANIFEST[name].get("dictionaries", []))]
        hashes = set(CONTENTS[kind].values())
        summary = json.loads(run(kind, *files))
        assert summary == {key: value for key, value in expected.items() if key not in hashes}, name
        for option, key in CONTENTS[kind].items():
            assert hashlib.sha256(run(kind, option, *files)).hexdigest() == expected[key], (name, key)


@pytest.mark.parametrize("version", sorted(path.stem for path in (VECTORS / "models").glob("*.json")))
def test_whole_models(run: Run, version: str) -> None:
    """Frames found by safetensors, config.json and the sizes in their headers (spec 6), not by our reader."""
    folder = VECTORS / "models" / version
    expected = json.loads((VECTORS / "models" / f"{version}.json").read_text())["expect"]["experts"]
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    tensors = {name: t for shard in folder.glob("*.safetensors") for name, t in load_file(shard).items()}
    seen = 0
    for prefix, layer in layers.items():
        frames: list[bytes] = split(bytes(tensors[f"{prefix}.qmoe_dictionaries"].numpy()), 32, 20, "<I")
        store = bytes(tensors[f"{prefix}.qmoe_store"].numpy())
        for expert, (offset, size, _) in enumerate(tensors[f"{prefix}.qmoe_index"].tolist()):
            records = split(store[offset : offset + size], 64, 32, "<Q")
            for projection, frame in zip(layer["projections"], records, strict=True):
                name = projection["tensor"].replace("{expert}", str(expert))
                if name == projection["tensor"]:
                    name += f"[{expert}]: {projection['name']}"
                for option, key in CONTENTS["matrix"].items():
                    found = run("matrix", option, frame, *frames)
                    assert isinstance(found, bytes)
                    assert hashlib.sha256(found).hexdigest() == expected[name][key], (name, key)
                seen += 1
    assert seen == len(expected)


def split(data: bytes, header: int, place: int, kind: str) -> list[bytes]:
    """Frames one after the other; `place` in each header is the size of what follows it."""
    frames = []
    while data:
        size = header + struct.unpack_from(kind, data, place)[0]
        frames.append(data[:size])
        data = data[size:]
    return frames


@pytest.mark.parametrize("kind", CONTENTS)
def test_invalid_vectors(run: Run, kind: str) -> None:
    names = select("invalid", kind)
    assert names
    for name in names:
        entry = MANIFEST[name]
        files = [VECTORS / file for file in (name, *entry.get("dictionaries", []))]
        assert run(kind, *files) == (entry["error"], entry["field"]), name


def content(trits: np.ndarray, levels: np.ndarray) -> bytes:
    return levels.astype("<f4").tobytes() + trits.tobytes()


def outcome(frame: bytes, dictionaries: dict[int, Dictionary], backend: str = "c") -> "bytes | str":
    try:
        return content(*decode(frame, dictionaries, backend=backend))
    except FormatError as error:
        return error.kind


def kind_of(result: "bytes | tuple[str, str]") -> "bytes | str":
    return result[0] if isinstance(result, tuple) else result


def test_streams_that_no_encoder_makes(run: Run) -> None:
    generator = np.random.default_rng(1)
    for k, dictionary in enumerate(some_dictionaries()):
        known = {dictionary.dictionary_id: dictionary}
        for rows, columns in ((0, 9), (33, 130), (5, 1 + 97 * k)):
            frame = random_frame(
                generator, dictionary.reference, rows=rows, columns=columns, level_format=k % 4
            )
            found = run("matrix", "--levels", "--trits", frame, dictionary.frame)
            assert found == outcome(frame, known)


@pytest.mark.parametrize("level_format", ["float32", "bfloat16", "float16", "e4m4"])
def test_every_level_is_read_alike(run: Run, level_format: str) -> None:
    """Every pattern, or, for float32, the extremes; those that are not finite are refused."""
    words = np.arange(1 << 16)
    patterns = {
        "float32": np.array([0, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x80000000, 0xFF7FFFFF], "<u4"),
        "bfloat16": words[words & 0x7F80 != 0x7F80].astype("<u2"),
        "float16": words[words & 0x7C00 != 0x7C00].astype("<u2"),
        "e4m4": np.repeat(np.arange(256), 2).astype("u1"),  # each as low and as high
    }[level_format]
    shape = (len(words) // 2, 2)
    frame = bytearray(
        encode(np.zeros((shape[0], 1), np.int8), np.zeros(shape), None, level_format=level_format)
    )
    frame[64 : 64 + patterns.nbytes] = patterns.tobytes()
    for exponent in (-126, 0, 112) if level_format == "e4m4" else (0,):
        struct.pack_into("<b", frame, 20, exponent)
        sealed = reseal(frame)
        found = run("matrix", "--levels", "--trits", sealed)
        assert isinstance(found, bytes) and found == outcome(sealed, {})
    infinite = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}.get(level_format)
    for pattern in (infinite, infinite + 1) if infinite else ():
        struct.pack_into("<I" if level_format == "float32" else "<H", frame, 64, pattern)
        assert run("matrix", reseal(frame)) == ("payload", "levels")


def mutated(generator: np.random.Generator, frame: bytes, header_size: int) -> bytearray:
    """One to three changes, at any place or, as often, in the header; at times a byte less or more."""
    copy = bytearray(frame)
    for _ in range(generator.integers(1, 4)):
        place = generator.integers(min(header_size, len(copy)) if generator.random() < 0.4 else len(copy))
        copy[place] ^= 1 << generator.integers(8) if generator.random() < 0.7 else generator.integers(1, 256)
    if generator.random() < 0.05:
        del copy[-1]
    elif generator.random() < 0.05:
        copy.append(0)
    return copy


def test_mutated_matrices(run: Run) -> None:
    generator = np.random.default_rng(2)
    files = [VECTORS / name for name in select("valid", "dictionary")]
    known = {d.dictionary_id: d for d in (Dictionary.from_frame(file.read_bytes()) for file in files)}
    names = select("valid", "matrix")
    kinds = set()
    for k in range(300):
        frame = mutated(generator, (VECTORS / names[k % len(names)]).read_bytes(), 64)
        altered = reseal(frame) if k % 8 and len(frame) > 64 else bytes(frame)
        found = kind_of(run("matrix", "--levels", "--trits", altered, *files))
        assert found == outcome(altered, known), (k, names[k % len(names)])
        kinds.add(found if isinstance(found, str) else "valid")
    assert kinds >= {
        "valid",
        "checksum",
        "header",
        "size",
        "dictionary",
        "index",
        "payload",
        "version",
        "magic",
    }


def test_mutated_dictionaries(run: Run) -> None:
    generator = np.random.default_rng(3)
    # The invalid ones are short, which leaves a change more chances to make something legal again.
    names = select("valid", "dictionary") + select("invalid", "dictionary")
    kinds = set()
    for k in range(200):
        frame = mutated(generator, (VECTORS / names[k % len(names)]).read_bytes(), 32)
        if k % 8 and len(frame) > 32:
            struct.pack_into("<I", frame, 28, crc32c(bytes(frame[32:]), crc32c(bytes(frame[:28]))))
        expected: bytes | str
        try:
            expected = Dictionary.from_frame(bytes(frame)).words.astype("<u4").tobytes()
        except FormatError as error:
            expected = error.kind
        assert kind_of(run("dictionary", "--words", bytes(frame))) == expected, (k, names[k % len(names)])
        kinds.add(expected if isinstance(expected, str) else "valid")
    assert kinds >= {"checksum", "header", "size", "payload", "version", "magic", "truncated"}


def random_tree(generator: np.random.Generator, length: int = 1, nonzeros: int = 0) -> list[int]:
    """Node codes of a random legal tree below one node, in preorder; where it may grow no more, long runs."""
    code = generator.choice(3, p=[0.36, 0.5, 0.14] if nonzeros < 3 else [0.03, 0.97, 0])
    if length == 126 or code == 0:
        return [0]
    nodes = [int(code), *random_tree(generator, length + 1, nonzeros)]
    if code == 2:
        nodes += random_tree(generator, length + 1, nonzeros + 1)
        nodes += random_tree(generator, length + 1, nonzeros + 1)
    return nodes


def test_trees_that_no_builder_makes(run: Run) -> None:
    generator = np.random.default_rng(5)
    legal = 0
    for _ in range(60):
        trees = [
            [code for root in roots for code in random_tree(generator, 1, root)]
            for roots in ((0, 1, 1), (1, 1))
        ]
        threshold = max(tree.count(0) for tree in trees)
        needed = threshold + max(tree.count(1) for tree in trees)
        bits = next((bits for bits in (8, 10, 12) if needed <= 1 << bits), None)
        if bits is None:
            continue
        codes = [*trees[0], *trees[1]]
        payload = bytearray(-(-len(codes) // 4))
        for k, code in enumerate(codes):
            payload[k // 4] |= code << 2 * (k % 4)
        header = struct.pack("<4s4B5I", b"QMXD", 1, 7, 1, bits, 0, threshold, len(codes), len(payload), 0)
        frame = header + struct.pack("<I", crc32c(header + payload)) + payload
        assert (
            run("dictionary", "--words", frame) == Dictionary.from_frame(frame).words.astype("<u4").tobytes()
        )
        legal += 1
    assert legal > 30


def test_mutated_dense_frames(run: Run) -> None:
    """In the header; a change to a plane may ask for a Zstandard decoder, which this one has not."""
    generator = np.random.default_rng(4)
    names = select("valid", "dense")
    for k in range(100):
        frame = bytearray((VECTORS / names[k % len(names)]).read_bytes())
        frame[generator.integers(156)] ^= 1 << generator.integers(8)
        struct.pack_into("<I", frame, 156, crc32c(bytes(frame[:156])))
        expected: bytes | str
        try:
            expected = bytes(decode_dense(bytes(frame))[2])
        except FormatError as error:
            expected = error.kind
        assert kind_of(run("dense", "--content", bytes(frame))) == expected, (k, names[k % len(names)])


def faults_of(frame: bytes) -> dict[str, Callable[[bytearray], None]]:
    """Faults of the body, each of which leaves the sizes as they are, by name."""
    header = read_frame_header(frame)
    rows, count_bits = header.rows, header.count_bits
    bases = -(-(64 + 4 * rows) // 16) * 16
    counts = bases + 4 * -(-rows // 32)
    selectors = counts + -(-rows * count_bits // 32) * 4
    index_end = selectors + -(-rows * 2 // 32) * 4
    codewords = -(-index_end // 16) * 16
    codewords_end = codewords + -(-header.codeword_count * header.bits // 8)
    last_count = (rows - 1) * count_bits
    assert 64 + 4 * rows < bases and index_end < codewords and header.codeword_count * header.bits % 8
    assert rows * count_bits % 32 and rows * 2 % 32 and (rows - 1) % 32

    def flip(offset: int, bits: int) -> Callable[[bytearray], None]:
        def change(data: bytearray) -> None:
            data[offset] ^= bits

        return change

    def put(offset: int, value: bytes) -> Callable[[bytearray], None]:
        def change(data: bytearray) -> None:
            data[offset : offset + len(value)] = value

        return change

    return {
        "padding before the row index": flip(bases - 1, 1),
        "padding before the codewords": flip(codewords - 1, 1),
        "padding at the end": flip(len(frame) - 1, 1),
        "level": put(64, b"\xc0\x7f"),
        "dictionary": flip(40, 1),
        "first base": flip(bases, 1),
        "second base": flip(bases + 4, 1),
        "sum of counts": flip(counts + last_count // 8, 1 << last_count % 8),
        "padding of counts": flip(selectors - 1, 0x80),
        "padding of selectors": flip(index_end - 1, 0x80),
        "selector": put(selectors, b"\x03"),
        "padding of codewords": flip(codewords_end - 1, 0x80),
        "codeword": put(codewords, b"\xff\xff"),
    }


def test_the_order_of_checks(run: Run) -> None:
    """Two faults at once: the one that comes first in the specification's order of checks is reported."""
    dictionaries = [build_dictionary(p, 10) for p in (0.8, 0.9, 0.95)]
    known = {dictionary.dictionary_id: dictionary for dictionary in dictionaries}
    generator = np.random.default_rng(0)
    trits = generator.choice(np.int8([-1, 0, 1]), (37, 97), p=[0.1, 0.8, 0.1])
    frame = encode(trits, np.ones((37, 2)) * (-1, 1), dictionaries, selectors=np.zeros(37))
    faults = faults_of(frame)
    for names in itertools.combinations(faults, 2):
        altered = bytearray(frame)
        for name in names:
            faults[name](altered)
        sealed = reseal(altered)
        found = run("matrix", sealed, *[dictionary.frame for dictionary in dictionaries])
        for backend in BACKENDS:
            assert kind_of(found) == outcome(sealed, known, backend), (names, backend)
