"""Memory of a packed forward pass: no expert is ever unpacked, and none is copied."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packed_models import CONFIG, RECIPE, layer_spec, levels, trits
from qmoe_codec import DictionarySet

from qmoe_format import PackedModelWriter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux"),
]

EXPERTS, HIDDEN, WIDTH = 64, 1024, 2048
THREADS = 2
EXPERT_BF16 = 2 * 3 * HIDDEN * WIDTH
# What is in no formula: pages that are touched for the first time, and parsed headers
MARGIN = 3 << 20

MEASURE = """
import ctypes, json, re, sys
from pathlib import Path
import numpy as np, torch, qmoe_format
from qmoe_format.expert_cache import ExpertCache
from qmoe_format.torch import QMoEExperts

path, small, tokens, mode = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]

def resident(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

def experts(path):
    with qmoe_format.open(path) as model:
        ((prefix, spec),) = model.layers.items()
        if mode == "cached":
            cache = ExpertCache(model, spec.experts // 4, page_cache=False)
            return QMoEExperts(spec, torch.nn.SiLU(), cached=cache.layer(prefix))
        return QMoEExperts.from_packed(model.layer(prefix), torch.nn.SiLU())

@torch.no_grad()
def forward(module):
    experts = module.num_experts
    x = torch.randn(tokens, module.hidden_dim)
    index = torch.arange(8 * tokens).reshape(tokens, 8) % experts
    y = module(x, index, torch.full(index.shape, 0.125))
    assert torch.isfinite(y).all() and len(index.unique()) == experts

torch.set_num_threads(2)
forward(experts(small))  # loads libraries, starts threads
before = resident("VmRSS")
module = experts(path)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
if mode == "dense":  # what must not happen: one matrix, unpacked
    unpacked = module._layer().matrices(0)["up_proj"].dequantize("bfloat16")
forward(module)
if mode == "cached":
    packed = module.cached.cache.slots * module.cached.cache.slot_bytes
else:
    packed = len(module.qmoe_store) + len(module.qmoe_dictionaries)
print(json.dumps({"packed": packed, "grown": resident("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A layer of 64 experts, and a small one."""
    folder = tmp_path_factory.mktemp("models")
    written = []
    for name, hidden, width in (("large", HIDDEN, WIDTH), ("small", 64, 128)):
        spec = layer_spec(0, EXPERTS, hidden, width)
        dictionaries = DictionarySet()
        # Four experts differ; then they come again.
        frames = [
            [
                dictionaries.encode(trits(p.rows, p.columns, expert, number), levels(p.rows))
                for number, p in enumerate(spec.projections)
            ]
            for expert in range(4)
        ]
        with PackedModelWriter(folder / name) as writer:
            records = ((frames[expert % 4], 0) for expert in range(EXPERTS))
            writer.add_layer(spec, records, dictionaries)
            writer.add_dense("model.norm.weight", "F32", (1,), np.ones(1, np.float32).tobytes())
            writer.finish(CONFIG, RECIPE)
        written.append(folder / name)
    return written[0], written[1]


def measure(models: tuple[Path, Path], tokens: int, mode: str = "packed") -> tuple[int, int]:
    """Bytes of the packed layer, and bytes by which loading it and a forward pass grew the process."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *models, str(tokens), mode], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return result["packed"], result["grown"]


def allowance(tokens: int) -> int:
    """Bytes that a forward pass may take beside the packed layer."""
    pairs = 8 * tokens
    # x, gate, up, what the activation makes of it and their product, down, and its share; float32
    activations = 4 * pairs * (3 * HIDDEN + 4 * WIDTH)
    # x once more, as the C core lays it out: triples for one token, else vectors of 4, 8 or 16 tokens
    each = -(-pairs // EXPERTS)
    wide = 3 if each == 1 else next(width for width in (4, 8, -(-each // 16) * 16) if width >= each)
    layout = min(16 << 20, 4 * EXPERTS * wide * (WIDTH + 256))
    # two lists of 16-bit columns for each of 33 rows
    tile = 33 * 2 * 2 * (WIDTH + 128)
    return activations + layout + THREADS * tile + MARGIN


@pytest.mark.parametrize("tokens", [8, 64])
def test_a_forward_pass_over_64_experts_unpacks_none(models: tuple[Path, Path], tokens: int) -> None:
    packed, grown = measure(models, tokens)
    assert packed < EXPERTS * EXPERT_BF16 / 16
    assert grown <= packed + allowance(tokens)
    if tokens == 8:
        assert allowance(tokens) < EXPERT_BF16


def test_one_unpacked_matrix_would_be_seen(models: tuple[Path, Path]) -> None:
    _, grown = measure(models, 8)
    _, with_a_matrix = measure(models, 8, "dense")
    # Not all of it: the scratch of unpacking serves the forward pass too
    assert with_a_matrix - grown > 0.7 * EXPERT_BF16 / 3


@pytest.mark.parametrize("tokens", [8, 64])
def test_experts_on_disk_take_the_memory_of_the_slots(models: tuple[Path, Path], tokens: int) -> None:
    whole, _ = measure(models, tokens)
    slots, grown = measure(models, tokens, "cached")
    assert slots < 1.01 * whole / 4
    assert grown <= slots + allowance(tokens)
