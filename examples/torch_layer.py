"""A MoE layer of one's own around packed experts: plain torch, without transformers.

    python examples/torch_layer.py MODEL [--cache 64MiB]

MODEL is the directory of a packed model. Runs tokens through the first MoE layer with a router made here
(a real one would load its weights, from ``model.dense(name)``); with ``--cache`` the experts stay on disk.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import qmoe_format
from qmoe_format.expert_cache import ExpertCache
from qmoe_format.torch import QMoEExperts


class MoELayer(nn.Module):
    """Each token goes to its `top_k` likeliest experts, whose outputs are weighted by their probabilities."""

    def __init__(self, experts: QMoEExperts, top_k: int) -> None:
        super().__init__()
        self.experts = experts
        self.top_k = top_k
        self.router = nn.Linear(experts.hidden_dim, experts.num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        probabilities = self.router(tokens).softmax(-1)
        weights, index = probabilities.topk(self.top_k, dim=-1)
        output: Tensor = self.experts(tokens, index, weights / weights.sum(-1, keepdim=True))
        return output.reshape(x.shape)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--cache", help="memory for experts, such as 64MiB; default: all of them")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with qmoe_format.open(arguments.model) as model:
        prefix, spec = next(iter(model.layers.items()))
        if arguments.cache:
            cache = ExpertCache(model, arguments.cache)
            experts = QMoEExperts(spec, nn.SiLU(), cached=cache.layer(prefix))
        else:
            experts = QMoEExperts.from_packed(model.layer(prefix), nn.SiLU())
    layer = MoELayer(experts, arguments.top_k)
    with torch.inference_mode():
        y = layer(torch.randn(1, arguments.tokens, experts.hidden_dim))
    print(f"{prefix}: {tuple(y.shape)}, mean square {y.square().mean():.6g}")
    if arguments.cache:
        print(cache.stats)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
