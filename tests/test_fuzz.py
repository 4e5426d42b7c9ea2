"""The fuzzers, for a few seconds; ``make fuzz SECONDS=600`` runs them for longer."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import packed_models as models
import pytest
import reference_program
from hypothesis import given
from hypothesis import strategies as st
from sanitizers import KERNELS, ROOT, compiler, each_kernels, output_of

import qmoe_format
from qmoe_format import FormatError

pytestmark = pytest.mark.slow

SECONDS = 8
VECTORS = sorted(path for path in (ROOT / "spec/vectors").glob("*/*") if path.suffix in (".qmxd", ".qmxm"))


@pytest.fixture(scope="module")
def fuzzers(
    address_build: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, subprocess.Popen[str]]]]:
    folder = tmp_path_factory.mktemp("findings")
    with each_kernels([address_build / "fuzz_core", str(SECONDS), "1", *VECTORS], folder, {}) as running:
        yield folder, running


@pytest.mark.parametrize("kernels", KERNELS)
def test_mutated_frames_do_no_harm(
    fuzzers: tuple[Path, dict[str, subprocess.Popen[str]]], kernels: str
) -> None:
    folder, running = fuzzers
    counts = json.loads(output_of(running, kernels))
    assert counts["kernels"] == kernels
    # Most inputs must come past the checks of headers and checksums, or nothing was tested.
    assert counts["executions"] > 100
    assert counts["unchecked"] >= counts["checked"] > counts["executions"] / 10
    assert min(counts["dictionaries"], counts["products"], counts["encoded"]) > counts["executions"] / 4
    assert not list(folder.iterdir())


def test_the_corpus_of_the_core_does_no_harm(address_build: Path) -> None:
    """Inputs that together reach what guided fuzzing reached."""
    corpus = sorted((ROOT / "codec/fuzz/corpus").iterdir())
    assert len(corpus) > 50
    done = subprocess.run(
        [address_build / "fuzz_core", "replay", *corpus], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def fuzz_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fuzzer of the decoder in ``spec/reference``."""
    folder = tmp_path_factory.mktemp("reference")
    if not reference_program.sanitizers_work(folder):
        pytest.skip("NOT FUZZED: this compiler has no address and undefined-behaviour sanitizers")
    source = ROOT / "spec/reference/fuzz_reference.c"
    command = [compiler(), "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    made = subprocess.run(
        [*command, *reference_program.SANITIZE, "-o", folder / "fuzz", source], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return folder / "fuzz"


def test_the_reference_decoder_takes_no_harm(fuzz_reference: Path, tmp_path: Path) -> None:
    files = [*VECTORS, *(ROOT / "spec/vectors").glob("*/*.qmxz")]
    done = subprocess.run(
        [fuzz_reference, "3", "1", *files], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-6000:]
    counts = json.loads(done.stdout)
    assert counts["executions"] > 1000 and min(counts["decoded"], counts["refused"]) > 50
    assert not list(tmp_path.iterdir())


def test_the_corpus_of_the_reference_decoder_does_no_harm(fuzz_reference: Path, tmp_path: Path) -> None:
    corpus = sorted((ROOT / "spec/reference/corpus").iterdir())
    assert len(corpus) > 50
    done = subprocess.run(
        [fuzz_reference, "replay", *corpus], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-6000:]


GOLDEN = models.contents(ROOT / "spec/vectors/models/1.0")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def change_json(data: st.DataObject, value: object) -> object:
    """The value with some part of it replaced or left out."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 4)):
        key = data.draw(st.sampled_from(sorted(value)))
        if data.draw(st.integers(0, 9)) == 0:
            return {name: part for name, part in value.items() if name != key}
        return {**value, key: change_json(data, value[key])}
    if isinstance(value, list) and value and data.draw(st.integers(0, 4)):
        place = data.draw(st.integers(0, len(value) - 1))
        return [*value[:place], change_json(data, value[place]), *value[place + 1 :]]
    return data.draw(JSON)


@given(data=st.data())
def test_python_readers_give_typed_errors(data: st.DataObject) -> None:
    """Whatever a model holds, with a manifest that agrees: an error of ours, or all of it can be read."""
    name = data.draw(st.sampled_from(sorted(GOLDEN.keys() - {"tokenizer.json"})))
    content = GOLDEN[name]
    if name.endswith(".json"):
        content = json.dumps(change_json(data, json.loads(content))).encode("utf-8", "surrogatepass")
    elif data.draw(st.booleans()):
        header, rest = models.split(content)
        content = models.join(change_json(data, header), rest)
    else:
        changed = bytearray(content)
        for _ in range(data.draw(st.integers(1, 3))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        content = bytes(changed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        models.restore(path, {**GOLDEN, name: content})
        if name != "manifest.json":
            models.sign(path)
        try:
            qmoe_format.verify(path)
            with qmoe_format.open(path) as model:
                for prefix in model.layers:
                    layer = model.layer(prefix)
                    for expert in range(layer.experts):
                        for projection in layer.spec.projections:
                            layer.matrix(expert, projection.name).dequantize()
                for tensor in model.dense_names():
                    model.dense(tensor)
        except FormatError as error:
            assert "\n" not in str(error)
