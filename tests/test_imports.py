"""The packages depend on each other in one direction only, and light imports stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Where the packages lie; one that is not there yet has no modules to check.
FOLDERS = ("codec", "gpu_decode", "quantize", ".")
HEAVY = ("torch", "cupy", "transformers", "h5py", "matplotlib", "huggingface_hub")


class Rule(NamedTuple):
    """What a unit may import beside the standard library and itself.

    Names are units or third-party packages. `lazily` may be imported inside functions alone (and for types).
    """

    may: AbstractSet[str]
    lazily: AbstractSet[str] = frozenset()


# A unit is a package, or a leaf module of `qmoe_format` that nothing but the units named here imports.
CONTAINER = {"numpy", "safetensors", "zstandard", "qmoe_codec"}
RULES = {
    "qmoe_codec": Rule({"numpy"}),
    "qmoe_gpu_decode": Rule({"numpy", "qmoe_codec"}, {"cupy"}),
    "qmoe_gpu_decode.torch_ops": Rule({"numpy", "qmoe_codec", "qmoe_gpu_decode", "torch"}),
    "qmoe_format": Rule(CONTAINER),
    "qmoe_format.torch": Rule(
        {*CONTAINER, "qmoe_format", "torch"},
        {"qmoe_gpu_decode", "qmoe_gpu_decode.torch_ops", "qmoe_format.device_slots"},
    ),
    "qmoe_format.device_slots": Rule(
        {
            *CONTAINER,
            "qmoe_format",
            "qmoe_format.torch",
            "qmoe_gpu_decode",
            "qmoe_gpu_decode.torch_ops",
            "torch",
        }
    ),
    "qmoe_format.expert_parallel": Rule({*CONTAINER, "qmoe_format", "qmoe_format.torch", "torch"}),
    "qmoe_format.saving": Rule(
        {*CONTAINER, "qmoe_format", "qmoe_format.torch", "qmoe_format.expert_parallel", "torch"}
    ),
    "qmoe_format.transformers": Rule(
        {
            *CONTAINER,
            "qmoe_format",
            "qmoe_format.torch",
            "qmoe_format.saving",
            "qmoe_format.expert_parallel",
            "torch",
            "transformers",
        },
        {"qmoe_format.device_slots"},
    ),
    "qmoe_format.hdf5": Rule({*CONTAINER, "qmoe_format"}, {"h5py"}),
    "qmoe_quantize": Rule(
        {*CONTAINER, "qmoe_format", "torch"},
        {
            "datasets",
            "h5py",
            "huggingface_hub",
            "qmoe_format.torch",
            "qmoe_format.transformers",
            "transformers",
        },
    ),
    "qmoe_format.cli": Rule(
        {*CONTAINER, "qmoe_format", "tqdm"},
        {
            "qmoe_gpu_decode",
            "qmoe_quantize",
            "qmoe_format.hdf5",
            "qmoe_format.torch",
            "qmoe_format.transformers",
            *HEAVY,
        },
    ),
}


def unit_of(name: str) -> str:
    """The unit of a dotted name: the longest one it lies in, or the top-level package."""
    inside = [unit for unit in RULES if name == unit or name.startswith(f"{unit}.")]
    return max(inside, key=len, default=name.partition(".")[0])


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree: ast.AST, package: str, lazy: bool = False) -> Iterator[tuple[str, bool, int]]:
    """Every name that a syntax tree imports: (absolute dotted name, whether lazily, line)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (
                (str(name.value), lazy, node.lineno) for name in node.args if isinstance(name, ast.Constant)
            )
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node)
        yield from imports(node, package, inside)


def breaches(source: str, module: str, *, is_package: bool) -> list[str]:
    """What a module's source imports against the rules, one line each."""
    unit = unit_of(module)
    rule = RULES[unit]
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for name, lazy, line in imports(ast.parse(source), package):
        target = unit_of(name)
        if target == unit or target in sys.stdlib_module_names or target in rule.may:
            continue
        if target in rule.lazily:
            if lazy:
                continue
            found.append(f"{module}:{line}: imports {name} at its top, not inside a function")
        else:
            found.append(f"{module}:{line}: imports {name}")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for folder in FOLDERS:
        for package in sorted((ROOT / folder).glob("qmoe_*/")):
            for path in sorted(package.rglob("*.py")):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                yield ".".join(part for part in parts if part != "__init__"), path


MODULES = dict(modules())


def test_every_package_is_seen() -> None:
    assert {name.partition(".")[0] for name in MODULES} >= {"qmoe_codec", "qmoe_format", "qmoe_quantize"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    path = MODULES[module]
    assert not breaches(path.read_text("utf-8"), module, is_package=path.name == "__init__.py")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qmoe_codec.frame", "import torch"),
        ("qmoe_codec.frame", "def f():\n    from qmoe_format import reader"),
        ("qmoe_codec.frame", "import importlib\nimportlib.import_module('zstandard')"),
        ("qmoe_format.reader", "from . import cli"),
        ("qmoe_format.reader", "def f():\n    from .torch import QMoEExperts"),
        ("qmoe_format.reader", "try:\n    import qmoe_quantize.plan\nexcept ImportError:\n    pass"),
        ("qmoe_format.torch", "from qmoe_format.transformers import load"),
        ("qmoe_format.torch", "import qmoe_gpu_decode"),
        ("qmoe_gpu_decode.device", "import cupy"),
        ("qmoe_gpu_decode.verbs", "def f():\n    from .torch_ops import register"),
        ("qmoe_format.hdf5", "import h5py"),
        ("qmoe_format.reader", "def f():\n    from .hdf5 import to_hdf5"),
        ("qmoe_format.cli.pack", "import qmoe_quantize"),
        ("qmoe_format.cli.pack", "from ..transformers import load"),
        ("qmoe_quantize.pipeline", "import qmoe_format.cli"),
    ],
)
def test_a_breach_is_found(module: str, source: str) -> None:
    assert len(breaches(source, module, is_package=False)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qmoe_codec.frame", "import struct\nimport numpy as np\nfrom .errors import QMoEError"),
        ("qmoe_format.torch", "import torch\nfrom . import reader"),
        ("qmoe_format.transformers", "from .torch import QMoEExperts"),
        ("qmoe_format.cli.pack", "def main():\n    from qmoe_quantize import pack\n    from .. import open"),
        ("qmoe_format.cli.pack", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ],
)
def test_what_the_rules_allow(module: str, source: str) -> None:
    assert not breaches(source, module, is_package=False)


def test_light_imports_stay_light() -> None:
    code = f"import sys, qmoe_codec, qmoe_format; print(*(name for name in {HEAVY} if name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""
