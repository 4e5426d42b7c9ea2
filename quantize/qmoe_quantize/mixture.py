"""One layer of experts: their Hessians from the tokens that reach them, group by group, and their output.

Inputs and outputs of the layer lie on the disk; tokens go by in chunks. So memory holds one group of experts,
their Hessians and one chunk, however many tokens and experts there are.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from qmoe_codec.errors import UnsupportedModelError
from torch import Tensor

from qmoe_format.container import LayerSpec, Projection

from .activations import Activations
from .checkpoint import SourceCheckpoint
from .dispatch import Dispatch
from .options import HessianOptions
from .problem import MatrixGroup
from .ranks import Ranks
from .streaming import Routing, StreamedModel

PRIOR_TOKENS = 512
"""Tokens of the layer, drawn at random, that stand in for those that an expert has not seen."""
CHUNK_TOKENS = 4096
MULTIPLICATIONS_PER_COLUMN, COLUMN_STEPS = 28, 40_000
"""What a weight takes: so many multiplications for each column, and for its steps as long as so many more."""
FEW_TOKENS = 16
"""How many tokens the sample counts for beside an expert's own, in means over its tokens."""


def give_back_memory() -> None:
    """Let the system have what is free: glibc keeps tensors of middling size, in pieces that fit nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Visitor(Protocol):
    """Sees the matrices of a layer, group by group.

    Attributes
    ----------
    corrects : bool
        Whether the last projections are to make up for what has become of those before them.
    """

    corrects: bool

    def wants(self, layer: LayerSpec, tokens: Sequence[int]) -> Collection[int]:
        """Those of a layer's experts whose matrices it wants to see, given how many tokens reach each."""
        ...

    def visit(
        self, layer: LayerSpec, projection: Projection, experts: list[int], group: MatrixGroup
    ) -> Tensor:
        """Take the matrices of some experts; gives the weights to go on with, float32 [E, R, C]."""
        ...


@dataclass
class _Selection:
    """The tokens of one expert, in rising order."""

    tokens: Tensor  # int64 [n]
    places: Tensor  # int64 [n]: where their inputs lie
    gates: Tensor  # float32 [n]
    used: Tensor  # bool [n]: counted, and within the cap
    scale: float  # tokens that count for each one that is used

    def within(self, start: int, stop: int) -> slice:
        first, last = torch.searchsorted(self.tokens, torch.tensor([start, stop])).tolist()
        return slice(first, last)


class LayerRun:
    """One layer of experts and all that is known of its tokens.

    Parameters
    ----------
    model : StreamedModel
    checkpoint : SourceCheckpoint
    layer : LayerSpec
    options : HessianOptions
    device : str
    scratch : Activations
        Gets the layer's inputs as ``x`` and its output as ``y``.
    ranks : Ranks
        Each has some of the experts, and the output for its part of the text.
    visitor : Visitor

    Attributes
    ----------
    experts : list of int
        Those of this rank.
    """

    def __init__(
        self,
        model: StreamedModel,
        checkpoint: SourceCheckpoint,
        layer: LayerSpec,
        options: HessianOptions,
        device: str,
        scratch: Activations,
        ranks: Ranks,
        visitor: Visitor,
    ) -> None:
        self.layer = layer
        self._ranks = ranks
        self._visitor = visitor
        self._checkpoint = checkpoint
        self._options = options
        self._device = torch.device(device)
        self._scratch = scratch
        roles = {projection.role: projection for projection in layer.projections}
        if roles.keys() not in ({"gate", "up", "down"}, {"up", "down"}):
            raise UnsupportedModelError(
                "experts of an unknown kind", field=layer.prefix, value=", ".join(sorted(roles))
            )
        self._gate, self._up, self._down = roles.get("gate"), roles["up"], roles["down"]
        self._inner = model.inner(layer.prefix)
        self._biases = {p.name: self._read_biases(p) for p in layer.projections if p.bias is not None}
        routing = model.record(layer.prefix, scratch, "x" if ranks.size == 1 else "own")
        self._stage = model.stage_of(layer.prefix)
        self.calibration_tokens = model.calibration_tokens(layer.prefix)
        self._token_count = len(routing.index)
        counts = torch.bincount(routing.index.flatten().long(), minlength=layer.experts + 1)[: layer.experts]
        drawn = self._draw_sample(routing)
        self._wanted = set(visitor.wants(layer, counts.tolist()))
        parts = ranks.assign([self._cost(*pair) for pair in enumerate(counts.tolist())])
        self.experts = parts[ranks.rank]
        self._dispatch: Dispatch | None = None
        self._present = torch.arange(self._token_count)
        if ranks.size > 1:
            owner = torch.empty(layer.experts, dtype=torch.int64)
            for rank, part in enumerate(parts):
                owner[part] = rank
            self._dispatch = Dispatch(
                ranks,
                routing.index,
                owner,
                model.bounds(layer.prefix),
                self._up.columns,
                drawn,
                scratch.path.parent,
            )
            self._present = self._dispatch.tokens
            scratch.make("x", (len(self._present), self._up.columns), model.dtype)
            self._dispatch.send_inputs(scratch, "own", scratch, "x")
        else:
            scratch.make("y", (self._token_count, self._down.rows), torch.float32, zero=True)
        self._selections = self._select(routing, counts)
        rows = [scratch.read("x", at, at + 1) for at in torch.searchsorted(self._present, drawn).tolist()]
        self._sample = torch.cat(rows).float().to(self._device)
        weights = routing.weight[routing.counted][routing.index[routing.counted] < layer.experts]
        self._sample_gate = float(weights.square().mean()) if len(weights) else 1.0

    @property
    def tokens(self) -> list[int]:
        """Tokens that each of :attr:`experts` is calibrated on."""
        return [int(selection.used.sum()) for selection in self._selections.values()]

    @property
    def gate_weights(self) -> list[float]:
        """Mean router weight of those tokens; 0 where there are none."""
        return [float(s.gates[s.used].mean()) if s.used.any() else 0.0 for s in self._selections.values()]

    def _cost(self, expert: int, tokens: int) -> float:
        """How long an expert that so many tokens reach takes, in multiplications; only to balance ranks."""
        cost = 0.0
        for p in self.layer.projections:
            cost += tokens * p.columns * p.rows
            if expert in self._wanted:
                cost += p.rows * p.columns * (MULTIPLICATIONS_PER_COLUMN * p.columns + COLUMN_STEPS)
                cost += tokens * p.columns**2
        return cost

    def _generator(self, number: int) -> torch.Generator:
        # torch uses 32 bits of a seed on the CPU; a digest puts all that matters into them.
        key = f"{self._options.seed} {self._stage} {number}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:4]))

    def _select(self, routing: Routing, counts: Tensor) -> dict[int, _Selection]:
        choices = routing.index.shape[1]
        experts = routing.index.flatten().long()
        order = torch.argsort(experts, stable=True)
        selections = {}
        ends = counts.cumsum(0).tolist()
        for expert in self.experts:
            end, count = ends[expert], int(counts[expert])
            pairs = order[end - count : end]
            tokens = pairs // choices
            used = routing.counted[tokens].clone()
            wanted, scale = int(used.sum()), 1.0
            if (cap := self._options.max_tokens_per_expert) is not None and wanted > cap:
                kept = torch.randperm(wanted, generator=self._generator(1 + expert))[:cap]
                places = used.nonzero().flatten()[kept]
                used[:] = False
                used[places] = True
                scale = wanted / cap
            places = torch.searchsorted(self._present, tokens)
            selections[expert] = _Selection(tokens, places, routing.weight.flatten()[pairs], used, scale)
        return selections

    def _draw_sample(self, routing: Routing) -> Tensor:
        """Some tokens that stand for all, rising."""
        counted = routing.counted.nonzero().flatten()
        drawn = counted[torch.randperm(len(counted), generator=self._generator(0))[:PRIOR_TOKENS]]
        return drawn.sort().values

    # ---- groups ---------------------------------------------------------------------------------------

    def groups(self) -> Iterator[list[int]]:
        """Let the visitor see all groups of experts, and sum up what they give; yields each when done."""
        # So many are in memory at once on all ranks together
        size = -(-self._options.experts_per_batch // self._ranks.size)
        for start in range(0, len(self.experts), size):
            experts = self.experts[start : start + size]
            self._run_group(experts)
            give_back_memory()
            yield experts

    def output(self) -> None:
        """When all groups are done: have the layer's output for this rank's part of the text in ``y``."""
        if self._dispatch is not None:
            first, last = self._dispatch.own
            self._scratch.make("y", (last - first, self._down.rows), torch.float32)
            self._dispatch.combine(self._scratch, "y")

    def _weights(self, projection: Projection, experts: Sequence[int]) -> Tensor:
        """Matrices of some experts as float32 [E, R, C]."""
        stacked = torch.empty(len(experts), projection.rows, projection.columns)
        for place, expert in enumerate(experts):
            stacked[place] = torch.from_numpy(self._checkpoint.matrix(self.layer, projection, expert))
        return stacked.to(self._device)

    def _read_biases(self, projection: Projection) -> Tensor:
        """What a projection adds, of all the layer's experts: float32 [experts, R]."""
        found = [self._checkpoint.bias(self.layer, projection, e) for e in range(self.layer.experts)]
        return torch.stack([torch.from_numpy(bias) for bias in found if bias is not None]).to(self._device)

    def _run_group(self, experts: Sequence[int]) -> None:
        gate = self._weights(self._gate, experts) if self._gate else None
        up, down = self._weights(self._up, experts), self._weights(self._down, experts)
        wanted = [expert for expert in experts if expert in self._wanted]
        if len(wanted) == len(experts):
            gate, up, down = self._see(wanted, gate, up, down)
        elif wanted:
            inside = [experts.index(expert) for expert in wanted]
            seen = self._see(wanted, gate[inside] if gate is not None else None, up[inside], down[inside])
            if gate is not None and seen[0] is not None:
                gate[inside] = seen[0]
            up[inside], down[inside] = seen[1], seen[2]
        self._put_output(experts, gate, up, down)

    def _see(
        self, experts: list[int], gate: Tensor | None, up: Tensor, down: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Show the matrices of some experts; gives those to go on with."""
        visitor = self._visitor
        hessian, gates, row_weights = self._input_statistics(experts, gate, up, down)
        prior = (self._sample.T @ self._sample / max(1, len(self._sample)))[None] * gates[:, None, None]
        original = (gate, up) if visitor.corrects else None
        if self._gate and gate is not None:
            group = self._problem(self._gate, experts, gate, hessian, prior, row_weights[0])
            gate = visitor.visit(self.layer, self._gate, experts, group)
        group = self._problem(self._up, experts, up, hessian, prior, row_weights[1])
        up = visitor.visit(self.layer, self._up, experts, group)
        del group, hessian, prior
        sums, priors = self._hidden_statistics(experts, original, gate, up, gates)
        ones = torch.ones(len(experts), self._down.rows, device=self._device)
        group = self._problem(self._down, experts, down, sums[0], priors[0], ones)
        if original:
            group = replace(group, drift=sums[1], prior_drift=priors[1])
        return gate, up, visitor.visit(self.layer, self._down, experts, group)

    def _problem(
        self,
        projection: Projection,
        experts: list[int],
        weight: Tensor,
        hessian: Tensor,
        prior: Tensor,
        row_weight: Tensor,
    ) -> MatrixGroup:
        return MatrixGroup(
            names=tuple(projection.matrix_name(expert) for expert in experts),
            weight=weight,
            hessian=hessian,
            prior=prior,
            tokens=torch.tensor([int(self._selections[expert].used.sum()) for expert in experts]),
            calibration_tokens=self.calibration_tokens,
            row_weight=row_weight,
        )

    def _chunks(
        self, experts: Sequence[int], *, used: bool
    ) -> Iterator[tuple[int, int, list[tuple[int, Tensor, Tensor]], Tensor]]:
        """Chunks with tokens of some experts: start, stop, (place, rows in the chunk, gates) of each, x."""
        for start in range(0, self._token_count, CHUNK_TOKENS):
            stop = min(start + CHUNK_TOKENS, self._token_count)
            first, last = torch.searchsorted(self._present, torch.tensor([start, stop])).tolist()
            parts = []
            for place, expert in enumerate(experts):
                selection = self._selections[expert]
                inside = selection.within(start, stop)
                tokens, gates = selection.places[inside] - first, selection.gates[inside]
                if used:
                    kept = selection.used[inside]
                    tokens, gates = tokens[kept], gates[kept]
                if len(tokens):
                    parts.append((place, tokens.to(self._device), gates.to(self._device)))
            if parts:
                yield start, stop, parts, self._scratch.read("x", first, last).to(self._device).float()

    def _factors(self, gates: Tensor) -> Tensor:
        """What each token is multiplied with in a Hessian."""
        return gates if self._options.gate_weighting else torch.ones_like(gates)

    def _project(self, projection: Projection, expert: int, weight: Tensor, x: Tensor) -> Tensor:
        """What a projection of an expert gives, with `weight` in place of its matrix: [tokens, R]."""
        product = x @ weight.T
        biases = self._biases.get(projection.name)
        return product if biases is None else product.add_(biases[expert])

    def _hidden(self, expert: int, gate: Tensor | None, up: Tensor, x: Tensor) -> Tensor:
        """What the last projection of an expert multiplies with: [tokens, R]."""
        return self._inner(*self._outputs(expert, gate, up, x))

    def _outputs(
        self, expert: int, gate: Tensor | None, up: Tensor, x: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """What gate and up give."""
        of_gate = None
        if self._gate is not None and gate is not None:
            of_gate = self._project(self._gate, expert, gate, x)
        return of_gate, self._project(self._up, expert, up, x)

    def _slopes(self, expert: int, gate: Tensor | None, up: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Squared derivatives of :meth:`_hidden` by the outputs of gate and up: [tokens, R] each."""
        of_gate, of_up = self._outputs(expert, gate, up, x)
        given = [value.requires_grad_() for value in (of_gate, of_up) if value is not None]
        with torch.enable_grad():
            found = torch.autograd.grad(self._inner(of_gate, of_up).sum(), given)
        squares = [slope.square() for slope in found]
        return (torch.zeros_like(squares[0]) if of_gate is None else squares[0]), squares[-1]

    def _input_statistics(
        self, experts: list[int], gate: Tensor | None, up: Tensor, down: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Hessians of the inputs, mean squared gates [E], and row weights of gate and up [E, R]."""
        columns, rows = self._up.columns, self._up.rows
        hessian = torch.zeros(len(experts), columns, columns, device=self._device)
        slopes = torch.zeros(2, len(experts), rows, device=self._device)
        weight_sums = torch.zeros(len(experts), device=self._device)
        counts = torch.zeros(len(experts), device=self._device)
        for _, _, parts, x in self._chunks(experts, used=True):
            for place, tokens, gates in parts:
                factors = self._factors(gates)
                inputs = x[tokens]
                weighted = inputs * factors[:, None]
                hessian[place] += weighted.T @ weighted
                of_gate, of_up = self._slopes(experts[place], _one(gate, place), up[place], inputs)
                squares = factors.square()
                slopes[0, place] += squares @ of_gate
                slopes[1, place] += squares @ of_up
                weight_sums[place] += squares.sum()
                counts[place] += len(tokens)
        for place, expert in enumerate(experts):
            hessian[place] *= self._selections[expert].scale / self.calibration_tokens
        usual = self._sample_gate if self._options.gate_weighting else 1.0
        gates = (weight_sums + FEW_TOKENS * usual) / (counts + FEW_TOKENS)
        for place, expert in enumerate(experts):
            of_gate, of_up = self._slopes(expert, _one(gate, place), up[place], self._sample)
            share = FEW_TOKENS * usual
            slopes[0, place] += share * of_gate.mean(dim=0)
            slopes[1, place] += share * of_up.mean(dim=0)
        arrives = down.square().sum(dim=1)
        means = slopes * arrives / (weight_sums + FEW_TOKENS * usual)[:, None]
        return hessian, gates, (means[0], means[1])

    def _hidden_statistics(
        self,
        experts: list[int],
        original: tuple[Tensor | None, Tensor] | None,
        gate: Tensor | None,
        up: Tensor,
        gates: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What the last projections multiply with: sums of :meth:`_moments` over tokens, and over the sample.

        Both are [2, E, R, R]; without `original` [1, E, R, R].
        """
        rows = self._up.rows
        sums = torch.zeros(2 if original else 1, len(experts), rows, rows, device=self._device)
        for _, _, parts, x in self._chunks(experts, used=True):
            for place, tokens, weights in parts:
                factors = self._factors(weights)
                sums[:, place] += self._moments(place, experts[place], original, gate, up, x[tokens], factors)
        prior = torch.empty_like(sums)
        ones = self._sample.new_ones(len(self._sample))
        for place, expert in enumerate(experts):
            sums[:, place] *= self._selections[expert].scale / self.calibration_tokens
            moments = self._moments(place, expert, original, gate, up, self._sample, ones)
            prior[:, place] = moments * (gates[place] / max(1, len(self._sample)))
        return sums, prior

    def _moments(
        self,
        place: int,
        expert: int,
        original: tuple[Tensor | None, Tensor] | None,
        gate: Tensor | None,
        up: Tensor,
        x: Tensor,
        factors: Tensor,
    ) -> Tensor:
        """Sums of h h^T and, if `original` is given, of (h' - h) h^T, h' being from it: [1 or 2, R, R]."""
        hidden = self._hidden(expert, _one(gate, place), up[place], x) * factors[:, None]
        square = (hidden.T @ hidden)[None]
        if original is None:
            return square
        given = self._hidden(expert, _one(original[0], place), original[1][place], x)
        lost = given * factors[:, None] - hidden
        return torch.cat((square, (lost.T @ hidden)[None]))

    def _put_output(self, experts: Sequence[int], gate: Tensor | None, up: Tensor, down: Tensor) -> None:
        """Add what a group gives to the layer's output, or keep it for the ranks that have the tokens."""
        for start, stop, parts, x in self._chunks(experts, used=False):
            y = self._scratch.read("y", start, stop).to(self._device) if self._dispatch is None else None
            for place, tokens, gates in parts:
                expert = experts[place]
                hidden = self._hidden(expert, _one(gate, place), up[place], x[tokens])
                values = self._project(self._down, expert, down[place], hidden) * gates[:, None]
                if y is not None:
                    y.index_add_(0, tokens, values)
                elif self._dispatch is not None:
                    self._dispatch.put(expert, self._selections[expert].within(start, stop), values)
            if y is not None:
                self._scratch.write("y", start, y)


def _one(stacked: Tensor | None, place: int) -> Tensor | None:
    return None if stacked is None else stacked[place]
