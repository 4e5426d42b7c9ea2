"""The wheel a user gets: built through the sdist, looked into, installed apart and used from elsewhere."""

import email
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"qmoe_codec", "qmoe_format", "qmoe_gpu_decode", "qmoe_quantize"}

pytestmark = pytest.mark.slow

# Runs in the fresh environment: the codec by way of the C core, then the version in all its places.
SCRIPT = """
import ctypes
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
import qmoe_codec
import qmoe_format

generator = np.random.default_rng(1)
trits = generator.choice([-1, 0, 1], size=(37, 301), p=[0.06, 0.885, 0.055]).astype(np.int8)
levels = np.stack([-generator.uniform(1, 2, 37), generator.uniform(1, 2, 37)], axis=1).astype(np.float32)
dictionary = qmoe_codec.build_dictionary(0.885, 10)
frame = qmoe_codec.encode(trits, levels, dictionary, level_format="float32")
dictionaries = {dictionary.dictionary_id: dictionary}

decoded, decoded_levels = qmoe_codec.decode(frame, dictionaries, backend="c")
np.testing.assert_array_equal(decoded, trits)
np.testing.assert_array_equal(decoded_levels, levels)

weights = np.where(trits < 0, levels[:, :1], np.where(trits > 0, levels[:, 1:], np.float32(0)))
np.testing.assert_array_equal(qmoe_codec.dequantize(frame, dictionaries, "float32"), weights)
x = generator.normal(size=(3, 301)).astype(np.float32)
np.testing.assert_allclose(qmoe_codec.matmul(x, frame, dictionaries), x @ weights.T, rtol=1e-5, atol=1e-4)

[library] = [path for path in files("qmoe_codec").iterdir() if path.name.startswith("libqmoe.")]
core = ctypes.CDLL(str(library))
core.qmoe_version.restype = ctypes.c_char_p
assert core.qmoe_version().decode() == version("qmoe-format"), core.qmoe_version()
print(Path(qmoe_codec.__file__).parent, Path(qmoe_format.__file__).parent, sep="\\n")
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command apart from this checkout's environment; its output, or a failure that shows it."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | {"PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command} failed\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist that was built from this checkout."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    assert len(list(out.glob("qmoe_format-*.tar.gz"))) == 1
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of a fresh environment that has the wheel and what it depends on, nothing else."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=True)
    scripts = home / "bin"
    constraints = ROOT / "constraints-dev.txt"
    run(scripts / "python", "-m", "pip", "install", "--quiet", "-c", constraints, wheel, cwd=home)
    return scripts


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"qmoe_format-\d+\.\d+\.\d+-py3-none-(?!any)\w+\.whl", wheel.name)


def test_the_wheel_holds_the_packages_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        fields = email.message_from_bytes(archive.read(metadata))
    [library] = [name for name in names if re.fullmatch(r"qmoe_codec/libqmoe\.(so|dylib)", name)]
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, metadata.partition("/")[0]}
    assert "qmoe_codec/include/qmoe.h" in names
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    other = [name for name in names if ".dist-info/" not in name and not name.endswith((".py", "/py.typed"))]
    kernels = {name for name in other if re.fullmatch(r"qmoe_gpu_decode/kernels/\w+\.cuh?", name)}
    assert {"qmoe_gpu_decode/kernels/decode.cu", "qmoe_gpu_decode/kernels/common.cuh"} <= kernels
    assert set(other) - kernels == {library, "qmoe_codec/include/qmoe.h"}
    assert not [name for name in names if re.search(r"(^|/)(conftest|tests?)\b|/test_", name)]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    required = [text for text in fields.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert {re.split(r"\W", text)[0] for text in required} == {"numpy", "safetensors", "tqdm", "zstandard"}


def test_the_installed_codec_works(installed: Path, tmp_path: Path) -> None:
    places = run(installed / "python", "-c", SCRIPT, cwd=tmp_path).split("\n")[:2]
    home = installed.parent.resolve()
    assert all(Path(place).resolve().is_relative_to(home) for place in places), places


# As README.md says: PLACE is where the wheel keeps the header and the library.
PLACE = "import qmoe_codec; print(qmoe_codec.__path__[0])"
VERSION = "from importlib.metadata import version; print(version('qmoe-format'))"
PROGRAM = """
#include <qmoe.h>
#include <stdio.h>
int main(void) {
    puts(qmoe_version());
    return 0;
}
"""


def test_a_c_program_links_to_the_installed_library(installed: Path, tmp_path: Path) -> None:
    place = Path(run(installed / "python", "-c", PLACE, cwd=tmp_path).strip())
    assert place.resolve().is_relative_to(installed.parent.resolve())
    (tmp_path / "program.c").write_text(PROGRAM)
    flags = [f"-I{place}/include", f"-L{place}", "-lqmoe", f"-Wl,-rpath,{place}"]
    run(os.environ.get("CC", "cc"), "program.c", *flags, "-o", "program", cwd=tmp_path)
    version = run(installed / "python", "-c", VERSION, cwd=tmp_path)
    assert run(tmp_path / "program", cwd=tmp_path) == version


@pytest.mark.parametrize("command", ["qmoe", "qmoe-pack", "qmoe-unpack", "qmoe-inspect", "qmoe-verify"])
def test_the_installed_commands_explain_themselves(installed: Path, tmp_path: Path, command: str) -> None:
    assert f"usage: {command}" in run(installed / command, "--help", cwd=tmp_path)
