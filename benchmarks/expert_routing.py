"""What policies and prefetch of the expert cache do for the routing of a trained model.

    python benchmarks/expert_routing.py TRAINED_MODEL [--json FILE]

TRAINED_MODEL is a byte-level OLMoE (``train_models.py`` makes one). How it routes Python code is replayed,
token by token, through the experts of a packed model of random content and larger matrices: the experts'
products and the reads are real, attention is left out. Reads: see ``offload.py``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import moe_models
import numpy as np
import torch
import transformers
from machine import write_record
from offload import Throttle, ThrottledFile

import qmoe_format
from qmoe_format.expert_cache import ExpertCache
from qmoe_format.torch import QMoEExperts

HIDDEN, WIDTH = 1024, 1024
TOKENS, WARM = 768, 256


def routing_of(path: Path, tokens: int = TOKENS) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Experts [tokens, layers, per token] that a trained byte-level OLMoE chooses for Python code."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()[5000 : 5000 + tokens]))
    with torch.inference_mode():
        logits = model(text.reshape(-1, 128), output_router_logits=True).router_logits
    per_token = model.config.num_experts_per_tok
    return np.stack([layer.topk(per_token, dim=-1).indices.numpy() for layer in logits], axis=1)


def replay(
    path: Path, experts: int, routes: np.ndarray[Any, np.dtype[np.int64]], rates: list[float | None]
) -> list[dict[str, Any]]:
    """Policies and prefetch, token by token; the first tokens fill the cache and are not counted."""
    _, layers, per_token = routes.shape
    x = torch.randn(1, HIDDEN)
    weights = torch.full((1, per_token), 1 / per_token)
    lines = []
    for rate in rates:
        for share in (4, 2):
            for policy in ("lru", "lfu"):
                for prefetch in (False, True):
                    ThrottledFile.throttle = Throttle(rate)
                    slots = layers * experts // share
                    with qmoe_format.open(path) as opened:
                        cache = ExpertCache(
                            opened, slots, policy=policy, prefetch=prefetch, page_cache=rate is not None
                        )
                    modules = [
                        QMoEExperts(layer.spec, torch.nn.SiLU(), cached=layer)
                        for layer in map(cache.layer, opened.layers)
                    ]
                    with torch.inference_mode():
                        for token, chosen in enumerate(torch.from_numpy(routes)):
                            if token == WARM:
                                cache.reset_stats()
                                begun = time.perf_counter()
                            for module, index in zip(modules, chosen, strict=True):
                                module(x, index[None], weights)
                    seconds = (time.perf_counter() - begun) / (len(routes) - WARM)
                    stats = cache.stats
                    cache.close()
                    lines.append(
                        {
                            "rate": "disk" if rate is None else f"{rate / 1e6:.0f} MB/s",
                            "cache": f"1/{share} of the experts",
                            "policy": policy,
                            "prefetch": prefetch,
                            "seconds_per_token": seconds,
                            "stats": stats.as_dict(),
                        }
                    )
                    print(
                        f"{lines[-1]['rate']:>10} {lines[-1]['cache']} {policy} "
                        f"{'prefetch' if prefetch else '':8} {1e3 * seconds:.2f} ms per token  {stats!r}",
                        flush=True,
                    )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rates", type=float, nargs="*", default=[200], help="MB/s")
    parser.add_argument("--folder", type=Path, help="where to keep the model for another run")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    qmoe_format.host_slots.RecordFile = ThrottledFile
    routes = routing_of(arguments.trained)
    experts = transformers.AutoConfig.from_pretrained(arguments.trained).num_experts
    config = moe_models.config_of(HIDDEN, WIDTH, routes.shape[1], experts, routes.shape[2])
    with tempfile.TemporaryDirectory() as temporary:
        path = moe_models.packed_in((arguments.folder or Path(temporary)) / "replayed", config)
        lines = replay(path, experts, routes, [None, *(1e6 * rate for rate in arguments.rates)])
    if arguments.json:
        write_record(
            arguments.json,
            "expert_routing",
            threads=torch.get_num_threads(),
            routing=f"{arguments.trained.name}: {routes.shape[1]} layers x {experts} experts, "
            f"{routes.shape[2]} per token, {TOKENS - WARM} tokens counted",
            experts=f"3 x {WIDTH} x {HIDDEN}",
            results=lines,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
