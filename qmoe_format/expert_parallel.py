"""Expert parallelism: the experts of a layer spread over several processes, each with its own, packed.

Every rank runs the dense part of the model on tokens of its own. A layer sends each token to the ranks of its
experts and gets back what they make of it, by two all-to-all exchanges (Lepikhin et al., GShard, arXiv
2006.16668, section 2.2).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qmoe_codec.errors import ArgumentError, MissingPackageError, UnsupportedModelError

try:
    import torch
    import torch.distributed as dist
except ModuleNotFoundError as error:
    raise MissingPackageError("torch is not installed: pip install 'qmoe-format[torch]'") from error

from .container import LayerSpec
from .reader import PackedLayer
from .torch import Activation, QMoEExperts


def own_experts(experts: int, rank: int, size: int) -> range:
    """The experts of a rank: neighbours, and as many as any other's, or one fewer."""
    return range(experts * rank // size, experts * (rank + 1) // size)


class ParallelExperts(torch.nn.Module):
    """Experts of one layer over the ranks of a group; called like :class:`.torch.QMoEExperts`.

    Parameters
    ----------
    layer : LayerSpec
        The whole layer.
    activation : callable
    group : ProcessGroup

    Notes
    -----
    All ranks of the group have to call it equally often, if need be with no token at all.

    Raises
    ------
    ArgumentError
        There are more ranks than experts.
    UnsupportedModelError
        The experts have biases.
    """

    def __init__(self, layer: LayerSpec, activation: Activation | None, group: dist.ProcessGroup) -> None:
        super().__init__()
        if "bias" in layer.features:
            raise UnsupportedModelError("experts with biases are not spread over ranks", file=layer.prefix)
        self.layer = layer
        self.num_experts = layer.experts
        self.act_fn = activation
        self._group = group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        if self._size > layer.experts:
            raise ArgumentError(
                "more ranks than experts",
                file=layer.prefix,
                field="expert_parallel",
                value=self._size,
                expected=f"at most {layer.experts}",
            )
        self.experts = own_experts(layer.experts, self._rank, self._size)
        self.local: QMoEExperts | None = None

    def hold(self, packed: PackedLayer, *, verify: bool) -> None:
        """Take this rank's experts from an open packed model; only they are read."""
        start, stop = self.experts.start, self.experts.stop
        index = packed.index[start:stop].copy()
        first = int(index[0, 0])
        last = int(packed.index[stop, 0]) if stop < packed.experts else len(packed.store)
        index[:, 0] -= first
        spec = replace(packed.spec, experts=len(self.experts))
        part = PackedLayer(
            spec, packed.store[first:last], index, packed.dictionary_bytes, place=packed.place(start)
        )
        self.local = QMoEExperts.from_packed(part, self.act_fn, verify=verify)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Route this rank's tokens; shapes and errors are those of :meth:`.torch.QMoEExperts.forward`."""
        if self.local is None:
            raise UnsupportedModelError(
                "has no experts yet: load the model with load()", file=self.layer.prefix
            )
        self.local.check_inputs(hidden_states, top_k_index, top_k_weights, self.num_experts)
        choices = top_k_index.shape[1]
        experts = top_k_index.flatten().long()
        # Sorted by expert, rows for one rank are neighbours; those of nobody come last and stay here.
        order = torch.argsort(experts, stable=True)
        counts = torch.bincount(experts, minlength=self.num_experts)[: self.num_experts]
        order = order[: int(counts.sum())]
        sent = hidden_states[order // choices].float()
        results = sent.new_zeros(experts.numel(), sent.shape[1])
        results[order] = self._through(sent, counts)
        results *= top_k_weights.reshape(-1, 1).float()
        return results.reshape(-1, choices, sent.shape[1]).sum(dim=1).to(hidden_states.dtype)

    def _through(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """What the experts make of rows that are sorted by expert, `counts` for each: as many rows."""
        assert self.local is not None
        here = len(self.experts)
        each = [len(own_experts(self.num_experts, rank, self._size)) for rank in range(self._size)]
        asked = counts.new_empty(self._size * here)
        self._exchange(asked, counts, [here] * self._size, each)
        by_rank = asked.reshape(self._size, here)
        sizes = [int(part.sum()) for part in torch.split(counts, each)]
        found = [int(part.sum()) for part in by_rank]
        received = x.new_empty(sum(found), x.shape[1])
        self._exchange(received, x, found, sizes)
        number = torch.arange(here, device=x.device).repeat(self._size)
        index = number.repeat_interleave(asked)[:, None]
        ones = torch.ones(len(received), 1, dtype=x.dtype, device=x.device)
        made = self.local(received, index, ones)
        returned = torch.empty_like(x)
        self._exchange(returned, made, sizes, found)
        return returned

    def _exchange(
        self, out: torch.Tensor, given: torch.Tensor, out_sizes: list[int], sizes: list[int]
    ) -> None:
        """All to all by rows."""
        dist.all_to_all_single(out, given.contiguous(), out_sizes, sizes, group=self._group)

    def extra_repr(self) -> str:
        """Which of the experts are here."""
        return f"experts={self.experts.start}–{self.experts.stop - 1} of {self.num_experts}"


def parallel_layers(model: Any) -> list[ParallelExperts]:
    """The layers of a model whose experts are spread over ranks."""
    return [module for module in model.modules() if isinstance(module, ParallelExperts)]
