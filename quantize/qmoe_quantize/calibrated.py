"""Ternarizing with calibration: the streamed model, a recipe, and what goes between them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from qmoe_codec.errors import OutputExistsError
from torch import Tensor

from qmoe_format.container import LayerSpec, Projection

from .activations import Activations
from .checkpoint import SourceCheckpoint
from .fingerprint import model_digest
from .gptq import dequantized
from .mixture import LayerRun, Visitor
from .options import CalibrationOptions, HessianOptions, StreamOptions
from .problem import MatrixGroup
from .ranks import Ranks
from .recipes import RecipeSettings, ternarize_group
from .store import Provenance, Store, StoreWriter
from .streaming import StreamedModel, torch_device
from .ternary import TernaryExpert, TernaryMatrix
from .text import TokenWindows, read_windows

SCRATCH = "scratch-{:05d}.h5"


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
    ranks : Ranks, optional
        Each runs a part of the text, and has some of each layer's experts.
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
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._checkpoint = checkpoint
        self._layers = layers
        self._stream = stream
        self._hessian = hessian
        self._folder = folder
        self._model = StreamedModel(checkpoint, layers, windows, stream, folder, self._ranks)
        self._durable = self._stage = stage or 0
        if stage is None:
            self._model.begin()

    @property
    def stage(self) -> int:
        """The layer of the model that comes next; its activations are on the disk."""
        return self._stage

    def run(self, layer: LayerSpec, visitor: Visitor) -> Iterator[tuple[list[int], LayerRun]]:
        """Show this rank's experts of a layer to `visitor`; yields each group when it is done.

        Layers without experts before it are run first. When the last group is done, and others layers of
        experts follow, the layer is run with what `visitor` has made of its experts.
        """
        wanted = self._model.stage_of(layer.prefix)
        while self._stage < wanted:
            self._model.run_plain(self._stage)
            self._advance()
        scratch_path = self._folder / SCRATCH.format(self._ranks.rank)
        with Activations(scratch_path, create=True) as scratch:
            run = LayerRun(
                self._model,
                self._checkpoint,
                layer,
                self._hessian,
                self._stream.device,
                scratch,
                self._ranks,
                visitor,
            )
            for experts in run.groups():
                yield experts, run
            if any(self._model.stage_of(other.prefix) > wanted for other in self._layers):
                run.output()
                self._model.run_with(layer.prefix, scratch)
        scratch_path.unlink()
        self._advance()

    def _advance(self) -> None:
        """The next layer's activations are complete; forget those before it that are not kept."""
        if self._stage > self._durable:
            self._model.forget(self._stage)
        self._stage += 1

    def files(self) -> list[str]:
        """Names of the files that are needed to go on from here."""
        return self._model.files(self._stage)

    def keep_from_here(self) -> None:
        """A run can go on from here: forget the activations of all layers before."""
        for stage in range(self._durable, self._stage):
            self._model.forget(stage)
        self._durable = self._stage


class TernarizingVisitor:
    """Ternarizes what it sees and goes on with the ternary weights.

    Attributes
    ----------
    corrects : bool
    made : dict of (int, str) to TernaryMatrix
        By expert and projection; whoever takes them removes them.
    """

    def __init__(self, settings: RecipeSettings) -> None:
        self._settings = settings
        self.corrects = settings.method == "rd"
        self.made: dict[tuple[int, str], TernaryMatrix] = {}

    def wants(self, layer: LayerSpec, tokens: Sequence[int]) -> range:
        """All of them."""
        return range(layer.experts)

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


class StreamedTernarizer:
    """Ternarizes each layer with the Hessians of what the ternary layers before it give.

    Parameters
    ----------
    experts : StreamedExperts
    settings : RecipeSettings
    """

    def __init__(self, experts: StreamedExperts, settings: RecipeSettings) -> None:
        self._experts = experts
        self._settings = settings

    @property
    def recipe(self) -> dict[str, object]:
        """The recipe's settings."""
        return self._settings.to_json()

    def layer(self, layer: LayerSpec) -> Iterator[tuple[int, TernaryExpert]]:
        """Ternarize a layer, group by group."""
        visitor = TernarizingVisitor(self._settings)
        for experts, run in self._experts.run(layer, visitor):
            tokens = dict(zip(run.experts, run.tokens, strict=True))
            for expert in experts:
                made = tuple(visitor.made.pop((expert, p.name)) for p in layer.projections)
                yield expert, TernaryExpert(made, tokens[expert])

    def keep(self) -> tuple[dict[str, object], list[str]]:
        """What another run needs to go on after the last layer: JSON values, and names of files."""
        return {"stage": self._experts.stage}, self._experts.files()

    def kept(self) -> None:
        """It was written down, so what came before is not needed any more."""
        self._experts.keep_from_here()


class StoreTernarizer:
    """Ternarizes each layer with the Hessians in a store.

    Parameters
    ----------
    store : Store
    checkpoint : SourceCheckpoint
    options : CalibrationOptions
    settings : RecipeSettings
    """

    def __init__(
        self,
        store: Store,
        checkpoint: SourceCheckpoint,
        options: CalibrationOptions,
        settings: RecipeSettings,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._store = store
        self._checkpoint = checkpoint
        self._size = options.hessian.experts_per_batch
        self._device = torch_device(options.stream.device)
        self._settings = settings

    @property
    def recipe(self) -> dict[str, object]:
        """The recipe's settings."""
        return self._settings.to_json()

    def tokens(self, layer: LayerSpec) -> list[int]:
        """Tokens that each expert of a layer is calibrated on."""
        counts: list[int] = self._store.tokens(layer.prefix).tolist()
        return counts

    def layer(self, layer: LayerSpec) -> Iterator[tuple[int, TernaryExpert]]:
        """Ternarize this rank's experts of a layer, group by group; they are neighbours."""
        tokens = self.tokens(layer)
        own = self._ranks.share(layer.experts)
        size = -(-self._size // self._ranks.size)
        for start in range(own.start, own.stop, size):
            experts = range(start, min(start + size, own.stop))
            made = [
                ternarize_group(self.group(layer, projection, experts), self._settings)
                for projection in layer.projections
            ]
            for place, expert in enumerate(experts):
                yield expert, TernaryExpert(tuple(matrices[place] for matrices in made), tokens[expert])

    def group(self, layer: LayerSpec, projection: Projection, experts: range) -> MatrixGroup:
        """The problem of ternarizing the same projection of some experts."""
        weight = torch.stack(
            [torch.from_numpy(self._checkpoint.matrix(layer, projection, e)) for e in experts]
        )
        return self._store.group(layer, projection, experts, weight.to(self._device), self._device)

    def keep(self) -> tuple[dict[str, object], list[str]]:
        """Nothing: every layer stands by itself."""
        return {}, []

    def kept(self) -> None:
        """Nothing to forget."""


# ---- writing a store ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationSummary:
    """What :func:`calibrate` did.

    Attributes
    ----------
    layers, experts : int
        Of the model.
    windows, available : int
        Windows of text that were used, and that there were.
    tokens : int
        Tokens that count in them.
    unseen : int
        Experts that none of them reached.
    """

    layers: int
    experts: int
    windows: int
    available: int
    tokens: int
    unseen: int


def calibrate(
    checkpoint: SourceCheckpoint,
    layers: list[LayerSpec],
    options: CalibrationOptions,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSummary:
    """Run text through a model as it is, and write its experts' Hessians to a store.

    Parameters
    ----------
    checkpoint : SourceCheckpoint
    layers : list of LayerSpec
        Its layers of experts.
    options : CalibrationOptions
        With text.
    out : path
        The store, which appears when it is complete. Activations lie in a folder beside it meanwhile.
    force : bool
        Replace an existing file.
    progress : callable, optional
        Told how many experts are done, and how many there are.

    Raises
    ------
    QMoEError
        As :func:`.text.read_windows`, :class:`.streaming.StreamedModel` and :class:`.store.StoreWriter`.
    """
    import tempfile

    assert options.text is not None
    if os.path.lexists(out) and not force:
        raise OutputExistsError("exists already", file=out, expected="a new name, or --force")
    windows = read_windows(options.text, checkpoint.config)
    settings = {**options.to_json(), **asdict(options.text), "length": windows.tokens.shape[1]}
    provenance = Provenance(model_digest(checkpoint), (windows.digest,), settings)
    unseen, done, total = 0, 0, sum(layer.experts for layer in layers)
    where = Path(os.path.abspath(out)).parent
    with (
        tempfile.TemporaryDirectory(prefix=".qmoe-calibrate-", dir=where) as folder,
        StoreWriter(out, provenance, force=force) as writer,
    ):
        experts = StreamedExperts(checkpoint, layers, windows, options.stream, options.hessian, Path(folder))
        for layer in layers:
            run = None
            for group, run in experts.run(layer, writer):  # noqa: B007 (the last one is used)
                done += len(group)
                if progress:
                    progress(done, total)
            assert run is not None
            experts.keep_from_here()
            writer.run_done(layer, run)
            unseen += sum(count == 0 for count in run.tokens)
    return CalibrationSummary(
        layers=len(layers),
        experts=total,
        windows=len(windows.tokens),
        available=windows.available,
        tokens=int(windows.counted.sum()),
        unseen=unseen,
    )
