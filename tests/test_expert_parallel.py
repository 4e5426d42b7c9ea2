"""Experts spread over two processes compute what one process computes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
import torch.distributed as dist
from qmoe_codec.errors import ArgumentError, UnsupportedModelError
from rank_runs import free_port
from test_transformers import source

import qmoe_format.transformers
from qmoe_format.cli import main
from qmoe_format.container import LayerSpec, Projection
from qmoe_format.expert_parallel import ParallelExperts

RANK = """
import json, os, sys
import torch, torch.distributed as dist
import qmoe_format, qmoe_format.transformers
from qmoe_format.expert_parallel import parallel_layers

packed, port, out, size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
torch.manual_seed(0)
texts = [torch.randint(1, 40, (2, 5 + 4 * rank)) for rank in range(size)]

def results(model, ids, **more):
    decoder = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits = model(input_ids=ids, **decoder).logits
        made = model.generate(input_ids=ids, max_new_tokens=6 + ids.shape[1] % 3, do_sample=False, **more)
    return logits, made

def run(rank):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    model = qmoe_format.transformers.load(packed, dtype=torch.float32, expert_parallel=dist.group.WORLD)
    stores = [layer.local.qmoe_store.numel() for layer in parallel_layers(model)]
    logits, made = results(model, texts[rank], synced_gpus=True)
    dist.barrier()
    dist.destroy_process_group()
    whole = qmoe_format.transformers.load(packed, dtype=torch.float32)
    expected, expected_made = results(whole, texts[rank])
    whole_stores = [module.qmoe_store.numel() for module in whole.modules() if hasattr(module, "qmoe_store")]
    return {
        "difference": float((logits - expected).abs().max() / expected.abs().max()),
        "same_text": made.tolist() == expected_made.tolist(),
        "stores": stores,
        "whole_stores": whole_stores,
        "layers": len(stores),
    }

children = []
for rank in range(size):
    child = os.fork()
    if not child:
        status = 1
        try:
            with open(f"{out}/{rank}", "w") as file:
                json.dump(run(rank), file)
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.parametrize(("model_type", "size"), [("olmoe", 2), ("switch_transformers", 3)])
def test_as_one_process(model_type: str, size: int, tmp_path: Path) -> None:
    model = source(tmp_path / "source", model_type)
    assert main(["pack", str(model), str(tmp_path / "packed"), "--levels", "lsq", "--quiet"]) == 0
    command = [sys.executable, "-c", RANK, tmp_path / "packed", free_port(), tmp_path, size]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(size)]
    for result in found:
        assert result["difference"] < 1e-5
        assert result["same_text"]
        assert result["layers"] > 0
    # Each rank has its own experts and no others
    for layer, whole in enumerate(found[0]["whole_stores"]):
        parts = [result["stores"][layer] for result in found]
        assert sum(parts) == whole
        assert max(parts) < whole


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UnsupportedModelError, match="not both"):
            qmoe_format.transformers.load(tmp_path, expert_cache=3, expert_parallel=dist.group.WORLD)
        shape = {"up": (4, 2), "down": (2, 4)}
        projections = tuple(Projection(n, n, f"{{expert}}.{n}", *shape[n]) for n in shape)
        layer = LayerSpec("l", 3, projections, "F32")
        module = ParallelExperts(layer, torch.nn.ReLU(), dist.group.WORLD)
        with pytest.raises(UnsupportedModelError, match="no experts yet"):
            module(torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))
        biased = replace(
            layer, projections=tuple(replace(p, bias=f"{{expert}}.{p.name}_b") for p in projections)
        )
        with pytest.raises(UnsupportedModelError, match="l: experts with biases are not spread"):
            ParallelExperts(biased, torch.nn.ReLU(), dist.group.WORLD)
        monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
        with pytest.raises(ArgumentError, match="more ranks than experts"):
            ParallelExperts(layer, torch.nn.ReLU(), dist.group.WORLD)
        monkeypatch.undo()
    finally:
        dist.destroy_process_group()
