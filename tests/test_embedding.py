"""The examples of embedding: an expert run from C, C++, Rust and JAX, and decoded by NumPy alone."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import packed_models
import pytest
import qmoe_codec
from strategies import table_dictionary

import qmoe_format
from qmoe_format import LayerSpec, PackedModelWriter

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
STRICT = "-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror"
FORMATS = ("float32", "bfloat16", "float16", "e4m4")

Floats = npt.NDArray[np.float32]


def skip_loudly(what: str, missing: str) -> None:
    """Skip a test in a way that is seen in the summary of a run that passes."""
    warnings.warn(f"{missing}: {what} is NOT tested", stacklevel=2)
    pytest.skip(f"{missing}: {what} is NOT tested")


# ---- the model --------------------------------------------------------------------------------------------


def all_kinds(layer: LayerSpec, used: qmoe_codec.DictionarySet) -> Iterator[tuple[list[bytes], int]]:
    """Records that use all that the format has: every codec, dictionary kind, width and level format."""
    choices: list[list[qmoe_codec.Dictionary] | None] = [
        None,
        [table_dictionary(8)],
        [table_dictionary(16)],
        *([qmoe_codec.build_dictionary(0.8, bits)] for bits in (8, 10, 12)),
        [qmoe_codec.build_dictionary(p, 10) for p in (0.7, 0.9)],
        [qmoe_codec.build_dictionary(p, 12) for p in (0.7, 0.9, 0.97)],
    ]
    generator = np.random.default_rng(len(layer.projections))
    for expert in range(layer.experts):
        frames = []
        for number, projection in enumerate(layer.projections):
            rows, columns = projection.rows, projection.columns
            chosen = choices[(3 * expert + number) % len(choices)]
            zeros = generator.uniform(0.5, 1, rows)
            trits = np.where(generator.random((rows, columns)) < zeros[:, None], 0, 1)
            trits *= generator.choice([-1, 1], (rows, columns))
            trits[generator.integers(rows)] = 0
            levels = np.exp(generator.normal(-1, 0.5, (rows, 2))).astype(np.float32) * np.float32([-1, 1])
            selectors = None if chosen is None else generator.integers(0, len(chosen), rows)
            frames.append(
                qmoe_codec.encode(
                    trits.astype(np.int8),
                    levels,
                    chosen,
                    selectors=selectors,
                    level_format=FORMATS[(expert + number) % 4],
                )
            )
            used.dictionaries.update({d.dictionary_id: d for d in chosen or ()})
        yield frames, expert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of eight experts, the second without gates."""
    out = tmp_path_factory.mktemp("model") / "packed"
    gated = packed_models.layer_spec(0, 8, hidden=37, width=70)
    plain = packed_models.layer_spec(1, 8, hidden=33, width=41)
    plain = LayerSpec(plain.prefix, plain.experts, plain.projections[1:], plain.dtype)
    with PackedModelWriter(out) as writer:
        for spec in (gated, plain):
            dictionaries = qmoe_codec.DictionarySet()
            records = list(all_kinds(spec, dictionaries))  # the dictionaries are known afterwards
            writer.add_layer(spec, iter(records), dictionaries)
        writer.finish(packed_models.CONFIG, packed_models.RECIPE)
    return out


def expected_output(model: Path, prefix: str, expert: int) -> Floats:
    """What the examples print, by the codec's reference, in double precision."""
    with qmoe_format.open(model) as packed:
        layer = packed.layer(prefix)
        weights = {}
        for projection, frame in zip(layer.spec.projections, layer.frames(expert), strict=True):
            trits, levels = qmoe_codec.decode(frame, layer.dictionaries, backend="reference")
            weights[projection.role] = np.where(
                trits < 0, levels[:, :1], np.where(trits > 0, levels[:, 1:], 0)
            ).astype(np.float64)
    x = ((37 * np.arange(weights["up"].shape[1]) + 11) % 101 - 50) / 64
    up = weights["up"] @ x
    gate = weights["gate"] @ x if "gate" in weights else up
    inner = gate / (1 + np.exp(-gate)) * (up if "gate" in weights else 1)
    return np.asarray(weights["down"] @ inner, np.float32)


def check(command: list[str | Path], model: Path, environment: dict[str, str] | None = None) -> None:
    """Run an example for experts of both layers and compare; and see how it refuses."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            cwd="/",
            env={**os.environ, **(environment or {})},
        )

    with qmoe_format.open(model) as packed:
        prefixes = list(packed.layers)
    for prefix, expert in ((prefixes[0], 0), (prefixes[0], 5), (prefixes[1], 7)):
        done = run(model, prefix, str(expert))
        assert done.returncode == 0, done.stderr
        expected = expected_output(model, prefix, expert)
        found = np.array(done.stdout.split(), np.float32)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    for arguments in ([model, prefixes[0], "8"], [model, "no.such.layer", "0"], [model, prefixes[0], "x"]):
        done = run(*arguments)
        assert done.returncode in (1, 2) and not done.stdout
        assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr


# ---- the toolchains ---------------------------------------------------------------------------------------


def build_with_cmake(source: Path, into: Path, prefix: Path, *options: str) -> Path:
    """Build an example against the installed library, found by find_package."""
    environment = {**os.environ, "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"}
    for command in (
        ["cmake", "-S", source, "-B", into, f"-DCMAKE_PREFIX_PATH={prefix}", *options],
        ["cmake", "--build", into],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return into


def test_an_expert_runs_from_c(installed_library: Path, model: Path, tmp_path: Path) -> None:
    built = build_with_cmake(EXAMPLES / "c", tmp_path, installed_library, f"-DCMAKE_C_FLAGS={STRICT}")
    check([built / "run_expert"], model)


def test_an_expert_runs_from_cpp(installed_library: Path, model: Path, tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        skip_loudly("examples/cpp", "no C++ compiler")
    built = build_with_cmake(EXAMPLES / "cpp", tmp_path, installed_library, f"-DCMAKE_CXX_FLAGS={STRICT}")
    check([built / "run_expert"], model)


def test_an_expert_runs_from_rust(installed_library: Path, model: Path, tmp_path: Path) -> None:
    if shutil.which("cargo") is None:
        skip_loudly("examples/rust", "no Rust toolchain (cargo)")
    done = subprocess.run(
        ["cargo", "build", "--offline", "--locked", "--quiet", "--target-dir", tmp_path],
        cwd=EXAMPLES / "rust",
        env={**os.environ, "QMOE_PREFIX": str(installed_library), "RUSTFLAGS": "-D warnings"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check([tmp_path / "debug" / "run_expert"], model)


def test_rust_declares_what_the_header_does() -> None:
    """Functions with as many arguments, and the length of every array in a structure."""
    header = re.sub(r"/\*.*?\*/", "", (ROOT / "codec/include/qmoe.h").read_text(), flags=re.DOTALL)
    rust = (EXAMPLES / "rust/src/qmoe.rs").read_text()
    arguments = {name: len(text.split(",")) for name, text in re.findall(r"(qmoe_\w+)\(([^)]*)\);", header)}
    declared = re.findall(r"pub fn (qmoe_\w+)\(([^)]*)\)", rust)
    assert len(declared) >= 10
    for name, text in declared:
        assert arguments[name] == len([part for part in text.split(",") if ":" in part]), name
    for field, length in re.findall(r"char (\w+)\[(\d+)\];", header):
        assert f"pub {field}: [c_char; {length}]," in rust
    [size] = re.findall(r"#define QMOE_MESSAGE_SIZE (\d+)", header)
    assert f"MESSAGE_SIZE: usize = {size};" in rust


def test_numpy_alone_decodes_an_expert(model: Path) -> None:
    """An import hook refuses all but NumPy and the standard library."""
    script = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top != "numpy" and top not in sys.stdlib_module_names:
            raise ImportError(f"{name} is not NumPy")

sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    check([sys.executable, "-c", script, EXAMPLES / "numpy_expert.py"], model)


def python_with_jax() -> str:
    """An interpreter that has JAX: this one, or the one that ``QMOE_JAX_PYTHON`` names."""
    other = os.environ.get("QMOE_JAX_PYTHON")
    if other:
        return other
    found = importlib.util.find_spec("jax")
    if found is None or found.origin is None:  # examples/jax, where examples/ is on the path, is no JAX
        skip_loudly("examples/jax", "no JAX (pip install jax, or QMOE_JAX_PYTHON=an interpreter that has it)")
    return sys.executable


JAX_SCRIPT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import jax, jax.numpy as jnp, numpy as np
from run_expert import PackedExpert

library, model, prefix = sys.argv[1:4]
expert = PackedExpert(library, model, prefix, 5, threads=2)
_, rows, columns = expert.projections["up"]
x = jax.random.normal(jax.random.key(0), (4, columns))
compiled = jax.jit(expert)
y = compiled(x)
np.testing.assert_allclose(y, expert(x), rtol=1e-5, atol=1e-5)
np.testing.assert_allclose(y[1:2], compiled(x[1:2]), rtol=1e-5, atol=1e-5)
np.testing.assert_allclose(y, jax.vmap(lambda row: expert(row[None])[0])(x), rtol=1e-5, atol=1e-5)
half = x.astype(jnp.bfloat16)
exact = expert.product("up", half.astype(jnp.float32))
np.testing.assert_allclose(expert.product("up", half), exact, rtol=1e-5, atol=1e-5)
for wrong in (x[:, 1:], x[0]):
    try:
        compiled(wrong)
    except ValueError as error:
        assert "expected [tokens" in str(error), error
    else:
        raise AssertionError("a wrong shape was taken")
try:
    expert.product("up", x.astype(jnp.int32)).block_until_ready()
except Exception as error:
    assert "must be float32" in str(error), error
else:
    raise AssertionError("a wrong dtype was taken")
expert.close()
try:
    compiled(x).block_until_ready()
except Exception as error:
    assert "no such open expert" in str(error), error
else:
    raise AssertionError("a closed expert was used")
assert "torch" not in sys.modules
print("fine")
"""


def test_an_expert_runs_in_jax(installed_library: Path, model: Path, tmp_path: Path) -> None:
    python = python_with_jax()
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        skip_loudly("examples/jax", "no C++ compiler")
    asked = subprocess.run(
        [python, "-c", "import jax.ffi; print(jax.ffi.include_dir())"],
        capture_output=True,
        text=True,
        check=True,
    )
    include = f"-DXLA_INCLUDE={asked.stdout.strip()}"
    built = build_with_cmake(
        EXAMPLES / "jax", tmp_path, installed_library, include, f"-DCMAKE_CXX_FLAGS={STRICT}"
    )
    environment = {"JAX_PLATFORMS": "cpu"}
    check([python, EXAMPLES / "jax" / "run_expert.py", built / "libqmoe_jax.so"], model, environment)
    done = subprocess.run(
        [
            python,
            "-c",
            JAX_SCRIPT,
            EXAMPLES / "jax",
            built / "libqmoe_jax.so",
            model,
            packed_models.layer_spec(0).prefix,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0 and done.stdout == "fine\n", done.stderr
