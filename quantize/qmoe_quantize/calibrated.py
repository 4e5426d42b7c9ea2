"""Ternarizing with calibration: the streamed model, a recipe, and what goes between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qmoe_format.container import LayerSpec, Projection

from .activations import Activations
from .checkpoint import SourceCheckpoint
from .gptq import dequantized
from .mixture import HessianOptions, LayerRun, Visitor
from .problem import MatrixGroup
from .recipes import RecipeSettings, ternarize_group
from .streaming import StreamedModel, StreamOptions
from .ternary import TernaryMatrix
from .text import TokenWindows

SCRATCH = "scratch.h5"


class StreamedExperts:
    """A checkpoint's layers of experts, one after the other, with the activations that reach them.

    Parameters
    ----------
    checkpoint : SourceCheckpoint
    layers : list of LayerSpec
        In the order of the model.
    windows : TokenWindows
    stream : StreamOptions
    hessian : HessianOptions
    folder : Path
        Where activations lie.
    stage : int, optional
        Go on at this layer of the model, whose activations are there already.
    """

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        layers: list[LayerSpec],
        windows: TokenWindows,
        stream: StreamOptions,
        hessian: HessianOptions,
        folder: Path,
        stage: int | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._layers = layers
        self._stream = stream
        self._hessian = hessian
        self._folder = folder
        self._model = StreamedModel(checkpoint, layers, windows, stream, folder)
        self._durable = self._stage = stage or 0
        if stage is None:
            self._model.begin()

    @property
    def stage(self) -> int:
        """The layer of the model that comes next; its activations are on the disk."""
        return self._stage

    def run(self, layer: LayerSpec, visitor: Visitor) -> Iterator[tuple[range, LayerRun]]:
        """Show a layer's experts to `visitor`; yields each group when it is done.

        Layers without experts before it are run first. When the last group is done, and others layers of
        experts follow, the layer is run with what `visitor` has made of its experts.
        """
        wanted = self._model.stage_of(layer.prefix)
        while self._stage < wanted:
            self._model.run_plain(self._stage)
            self._advance()
        scratch_path = self._folder / SCRATCH
        with Activations(scratch_path, create=True) as scratch:
            run = LayerRun(self._model, self._checkpoint, layer, self._hessian, self._stream.device, scratch)
            for experts in run.groups(visitor):
                yield experts, run
            if any(self._model.stage_of(other.prefix) > wanted for other in self._layers):
                self._model.run_with(layer.prefix, scratch)
        scratch_path.unlink()
        self._advance()

    def _advance(self) -> None:
        """The next layer's activations are complete; forget those before it that are not kept."""
        if self._stage > self._durable:
            self._model.path(self._stage).unlink(missing_ok=True)
        self._stage += 1

    def keep_from_here(self) -> None:
        """A run can go on from here: forget the activations of all layers before."""
        for stage in range(self._durable, self._stage):
            self._model.path(stage).unlink(missing_ok=True)
        self._durable = self._stage


class TernarizingVisitor:
    """Ternarizes what it sees and goes on with the ternary weights.

    Attributes
    ----------
    made : dict of (int, str) to TernaryMatrix
        By expert and projection; whoever takes them removes them.
    """

    def __init__(self, settings: RecipeSettings) -> None:
        self._settings = settings
        self.made: dict[tuple[int, str], TernaryMatrix] = {}

    def wants(self, layer: LayerSpec, experts: range) -> list[int]:
        """All of them."""
        return list(experts)

    def visit(
        self, layer: LayerSpec, projection: Projection, experts: list[int], group: MatrixGroup
    ) -> Tensor:
        """Ternarize the matrices of a group."""
        matrices = ternarize_group(group, self._settings)
        weights = group.weight.new_empty(group.weight.shape)
        for place, (expert, matrix) in enumerate(zip(experts, matrices, strict=True)):
            self.made[expert, projection.name] = matrix
            weights[place] = ternary_weight(matrix).to(weights)
        return weights


def ternary_weight(matrix: TernaryMatrix) -> Tensor:
    """The weights that a ternary matrix stands for: float32 [R, C]."""
    trits, levels = torch.from_numpy(matrix.trits)[None], torch.from_numpy(matrix.levels)[None]
    return dequantized(trits, levels)[0]
