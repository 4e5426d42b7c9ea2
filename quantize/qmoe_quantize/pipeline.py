"""Packing a checkpoint: a stream from source tensors to the writer, one expert at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from qmoe_codec import DictionarySet
from qmoe_codec.errors import ArgumentError, CheckpointError, HeaderError, QMoEError
from qmoe_codec.layout import LEVEL_FORMATS

from qmoe_format.container import LayerSpec, Projection
from qmoe_format.paths import refuse_overlap
from qmoe_format.reader import open_model
from qmoe_format.resume import Resume
from qmoe_format.safetensors_io import tensor_bytes
from qmoe_format.writer import PackedModelWriter, WrittenLayer, shard_name

from .checkpoint import SourceCheckpoint, locate
from .config import ModelConfig
from .families import TensorTable, find_layers
from .nearest import LEVEL_RULES, squared_error, ternarize
from .options import CalibrationOptions
from .ranks import Ranks
from .shapes import tensors_of
from .shards import EncodedExpert, Follower, versions, write_together
from .ternary import TernaryExpert, TernaryMatrix
from .text import TokenWindows, read_windows

if TYPE_CHECKING:
    from .allocation import RateCurve
    from .calibrated import StreamedExperts
    from .recipes import RecipeSettings
    from .store import Store
    from .target import LambdaSearch

CALIBRATED_METHODS = ("qmoe", "rd")
METHODS = ("nearest", *CALIBRATED_METHODS)
DENSE_MODES = ("copy", "zstd")

ExpertWeights = Callable[[LayerSpec, Projection, int], npt.NDArray[np.float32]]
Progress = Callable[[int, int], None]
"""Told how many bytes of the source are done, and how many there are."""


@dataclass(frozen=True)
class PackOptions:
    """How to pack.

    Attributes
    ----------
    method : {"nearest", "qmoe", "rd"}, optional
        How the ternary weights are found: by default ``rd`` with calibration, and ``nearest`` without.
    levels : {"minmax", "lsq"}
        Which levels ``nearest`` rounds to, see :func:`qmoe_quantize.nearest.ternarize`.
    level_format : {"bfloat16", "float16", "float32", "e4m4"}, optional
        How levels are stored (spec 4.1): by default ``e4m4`` with calibration, and ``bfloat16`` without.
    dense : {"copy", "zstd"}
        Whether the other tensors are compressed without loss where that makes them smaller.
    force : bool
        Replace an existing output.
    threads : int, optional
        Experts that are ternarized at once, each of which takes memory; by default one for each core, but at
        most 4. It changes no byte of the output.
    calibration : CalibrationOptions, optional
        What is known of the experts' inputs.
    recipe : RecipeSettings, optional
        Settings of a calibrated method; its method and level format are those given here.
    target_bits : float, optional
        Instead of ``recipe.lam``: bits per expert weight that the model shall take, everything counted.
    resume : bool
        Go on from what an interrupted run with calibration has left, if there is something.

    Raises
    ------
    ArgumentError
        A value is none of these.
    """

    method: str = ""
    levels: str = "minmax"
    level_format: str = ""
    dense: str = "copy"
    force: bool = False
    threads: int | None = None
    calibration: CalibrationOptions | None = None
    recipe: RecipeSettings | None = None
    target_bits: float | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        calibrated = self.method in CALIBRATED_METHODS or (not self.method and self.calibration is not None)
        # Frozen, but what was left open is decided here once and for all.
        set_once = object.__setattr__
        set_once(self, "method", self.method or ("rd" if calibrated else "nearest"))
        set_once(self, "level_format", self.level_format or ("e4m4" if calibrated else "bfloat16"))
        for name, choices in (
            ("method", METHODS),
            ("levels", LEVEL_RULES),
            ("level_format", LEVEL_FORMATS),
            ("dense", DENSE_MODES),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ArgumentError("unknown", field=name, value=value, expected=" or ".join(choices))
        if self.threads is not None and self.threads < 1:
            raise ArgumentError("illegal", field="threads", value=self.threads, expected="at least 1")
        if calibrated != (self.calibration is not None):
            raise ArgumentError(
                "goes with calibration" if calibrated else "takes no calibration",
                field="method",
                value=self.method,
                expected="--calib" if calibrated else " or ".join(CALIBRATED_METHODS),
            )
        if calibrated:
            from .recipes import RecipeSettings

            recipe = replace(
                self.recipe or RecipeSettings(), method=self.method, level_format=self.level_format
            )
            set_once(self, "recipe", recipe)
            assert self.calibration is not None
            set_once(self, "calibration", self.calibration.weighted(recipe.gate_weighting))
        if self.target_bits is not None and (self.method != "rd" or not self.target_bits > 0):
            raise ArgumentError(
                "illegal", field="target_bpw", value=self.target_bits, expected="more than 0, with method rd"
            )

    @property
    def thread_count(self) -> int:
        """Threads to use."""
        return self.threads or min(4, os.cpu_count() or 1)


class Ternarizer(Protocol):
    """Turns a layer's experts into ternary matrices.

    This is where recipes differ. :func:`pack` calls :meth:`layer` once for every layer, in the order of the
    model, so that one that calibrates can carry activations from layer to layer.
    """

    @property
    def recipe(self) -> dict[str, object]:
        """What `quantization_config.recipe` shall say (spec 6.3)."""
        ...

    def layer(self, layer: LayerSpec) -> Iterator[tuple[int, TernaryExpert]]:
        """The experts of `layer` that are this rank's, in order, so that few are in memory at once."""
        ...

    def keep(self) -> tuple[dict[str, object], list[str]]:
        """What another run needs to go on after the last layer: JSON values, and names of files."""
        ...

    def kept(self) -> None:
        """It was written down, so what came before is not needed any more."""
        ...


class NearestTernarizer:
    """Rounds every row to its own levels, without calibration; see :mod:`qmoe_quantize.nearest`.

    Parameters
    ----------
    weights : callable
        Reads an expert's matrix: float32 [rows, columns], finite.
    levels, level_format : str
        As for :func:`qmoe_quantize.nearest.ternarize`.
    threads : int
        Experts that are ternarized at once.
    ranks : Ranks, optional
        Each has some of the experts.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        levels: str = "minmax",
        level_format: str = "bfloat16",
        threads: int = 1,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._weights = weights
        self._levels = levels
        self._level_format = level_format
        self._threads = threads

    @property
    def recipe(self) -> dict[str, object]:
        """Method and rule."""
        return {"method": "nearest", "levels": self._levels, "level_format": self._level_format}

    def keep(self) -> tuple[dict[str, object], list[str]]:
        """Nothing: every layer stands by itself."""
        return {}, []

    def kept(self) -> None:
        """Nothing to forget."""

    def layer(self, layer: LayerSpec) -> Iterator[tuple[int, TernaryExpert]]:
        """Ternarize each expert by itself, some of them ahead of the one that is asked for."""
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="ternarize")
        coming: deque[tuple[int, Future[TernaryExpert]]] = deque()
        try:
            for number in self._ranks.share(layer.experts):
                coming.append((number, pool.submit(self._expert, layer, number)))
                if len(coming) > self._threads:
                    first, made = coming.popleft()
                    yield first, made.result()
            for first, made in coming:
                yield first, made.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _expert(self, layer: LayerSpec, number: int) -> TernaryExpert:
        return TernaryExpert(tuple(self._matrix(self._weights(layer, p, number)) for p in layer.projections))

    def _matrix(self, weight: npt.NDArray[np.float32]) -> TernaryMatrix:
        trits, levels = ternarize(weight, self._levels, self._level_format)
        norm = float(np.vdot(weight, weight))
        return TernaryMatrix(trits, levels, float(squared_error(weight, levels).sum()), norm)


@dataclass
class PackSummary:
    """What :func:`pack` did; bytes, weights and sums over all experts.

    Attributes
    ----------
    source_bytes : int
        Tensors of the source.
    packed_bytes : int
        Files of the output.
    layers, experts, weights : int
        Expert layers, experts in them, weights in those.
    zeros : int
        Expert weights that became 0.
    expert_source_bytes, expert_packed_bytes : int
        Experts before, and after with index, levels, dictionaries and padding.
    dense_source_bytes, dense_packed_bytes : int
        The other tensors.
    squared_error, squared_norm : float
        Sums over all expert weights.
    matrices : list of dict
        For every matrix: its name and place, tokens, sparsity, bits per weight in its frame, relative squared
        error of the weights, and what the recipe has to say. Not in :meth:`to_json`.
    """

    source_bytes: int = 0
    packed_bytes: int = 0
    layers: int = 0
    experts: int = 0
    weights: int = 0
    zeros: int = 0
    expert_source_bytes: int = 0
    expert_packed_bytes: int = 0
    dense_source_bytes: int = 0
    dense_packed_bytes: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    matrices: list[dict[str, Any]] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Bits of an expert weight, everything counted."""
        return 8 * self.expert_packed_bytes / self.weights

    def to_json(self) -> dict[str, object]:
        """All numbers, and the ratios people ask for."""
        values = asdict(self)
        del values["matrices"]
        fallbacks = sum("fallback" in matrix for matrix in self.matrices)
        return {
            **values,
            "fallbacks": fallbacks,
            "bits_per_weight": self.bits_per_weight,
            "sparsity": self.zeros / self.weights,
            "relative_error": self.squared_error / self.squared_norm if self.squared_norm else 0.0,
            "ratio": self.source_bytes / self.packed_bytes,
        }


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: PackOptions = PackOptions(),
    *,
    progress: Progress | None = None,
    searching: Progress | None = None,
    curves: Sequence[RateCurve] | None = None,
    ranks: Ranks | None = None,
) -> PackSummary:
    """Pack a Mixture-of-Experts checkpoint.

    Memory holds the experts that are being made, one for each thread, and one that is encoded, or one dense
    tensor, however many experts there are. The output depends on the source and the options alone, to the
    byte.

    Parameters
    ----------
    source : str or Path
        See :class:`SourceCheckpoint`.
    out : str or Path
        A new directory. It appears when it is complete; what stood there is replaced only under `force`.
    options : PackOptions
    progress : callable, optional
        Called after every expert and every dense tensor.
    searching : callable, optional
        Before that, with ``target_bits``: told how many experts have been looked at to find lambda, and how
        many there are.
    curves : sequence of RateCurve, optional
        What :func:`rate_curves` gave for the same source, calibration and recipe, so as not to do it again.
    ranks : Ranks, optional
        The processes that do it together: each calls this, with the same arguments, and sees `source` and
        `out`. Rank 0 alone gets the whole summary.

    Raises
    ------
    ArgumentError, OutputExistsError
        The output is the source, or exists already.
    UnsupportedModelError
        The architecture, or a dtype in it, is not supported.
    CheckpointError, FormatError
        The source is incomplete, damaged, or holds weights that are not numbers.
    """
    ranks = ranks or Ranks()
    path = locate(source)
    refuse_overlap(path, out)
    checkpoint = SourceCheckpoint(path)
    layers = expert_layers(checkpoint.config, checkpoint.tensors)
    run = _Run(checkpoint, layers, options, progress, searching, curves, ranks)
    with contextlib.ExitStack() as stack:
        evidence = _Evidence.gather(checkpoint, layers, options, stack)
        head = evidence.head(checkpoint, options) if evidence is not None else {}
        _check_alike(ranks, checkpoint, layers, options, head)
        if ranks.rank:
            with Follower(ranks) as follower:
                run.follow(follower, evidence)
            return run.summary
        resume = None
        if evidence is not None:
            resume = Resume(head, go_on=options.resume, discard=options.force)
        try:
            with (
                PackedModelWriter(out, force=options.force, resume=resume) as writer,
                ranks.ending(),
            ):
                run.pack(writer, evidence, resume)
        except (QMoEError, KeyboardInterrupt) as error:
            if resume is not None and resume.layers:
                note = f"{len(resume.layers)} of {len(layers)} layers are kept: --resume goes on from them"
                if isinstance(error, KeyboardInterrupt):
                    raise KeyboardInterrupt(note) from None
                error.message += f"; {note}"
            raise
    with open_model(out) as model:
        run.summary.packed_bytes = sum(file.nbytes for file in model.files.values())
        run.summary.expert_packed_bytes = sum(
            len(layer.store) + layer.index.nbytes + len(layer.dictionary_bytes)
            for layer in map(model.layer, model.layers)
        )
    return run.summary


def _check_alike(
    ranks: Ranks,
    checkpoint: SourceCheckpoint,
    layers: list[LayerSpec],
    options: PackOptions,
    head: dict[str, object],
) -> None:
    """Refuse ranks that would not do the same, or more of them than there are experts to share."""
    least = min((layer.experts for layer in layers), default=ranks.size)
    if ranks.size > least:
        raise ArgumentError(
            "more ranks than experts of a layer",
            field="WORLD_SIZE",
            value=ranks.size,
            expected=f"at most {least}",
        )
    if ranks.size > 1:
        tensors = repr([(name, t.dtype, t.shape) for name, t in sorted(checkpoint.tensors.items())])
        names = ("method", "levels", "level_format", "dense")
        ranks.check_alike(
            {
                **versions(calibrated=options.calibration is not None),
                "source": hashlib.sha256(tensors.encode()).hexdigest(),
                "settings": {name: getattr(options, name) for name in names},
                **head,
            }
        )


@dataclass(frozen=True)
class _Evidence:
    """What a calibrated run is made from, all of it read and checked before anything is written."""

    options: CalibrationOptions
    windows: TokenWindows | None
    store: Store | None
    model: str
    data: str

    @classmethod
    def gather(
        cls,
        checkpoint: SourceCheckpoint,
        layers: list[LayerSpec],
        options: PackOptions,
        stack: contextlib.ExitStack,
    ) -> _Evidence | None:
        calibration = options.calibration
        if calibration is None:
            return None
        from .fingerprint import model_digest
        from .store import Store

        model = model_digest(checkpoint)
        if calibration.store is not None:
            store = stack.enter_context(Store(calibration.store))
            store.check(layers, model, gate_weighting=calibration.hessian.gate_weighting)
            return cls(calibration, None, store, model, " ".join(store.provenance.data))
        if calibration.text is None:
            raise ArgumentError("missing", field="calibration", expected="text or a store")
        windows = read_windows(calibration.text, checkpoint.config)
        return cls(calibration, windows, None, model, windows.digest)

    def head(self, checkpoint: SourceCheckpoint, options: PackOptions) -> dict[str, object]:
        """What decides the output, for those who would go on from it."""
        assert options.recipe is not None
        settings = {
            **options.recipe.to_json(),
            **self.options.to_json(),
            "target_bpw": options.target_bits,
            "dense": options.dense,
        }
        if options.target_bits is not None:
            settings.pop("lam", None)
        return {"model": self.model, "calibration data": self.data, "settings": settings}

    def stream(
        self,
        checkpoint: SourceCheckpoint,
        layers: list[LayerSpec],
        windows: TokenWindows,
        folder: Path,
        stage: int | None = None,
        ranks: Ranks | None = None,
    ) -> StreamedExperts:
        """The model with some text going through it, whose activations lie in `folder`."""
        from .calibrated import StreamedExperts

        stream, hessian = self.options.stream, self.options.hessian
        return StreamedExperts(checkpoint, layers, windows, stream, hessian, folder, stage, ranks)

    def search(
        self,
        checkpoint: SourceCheckpoint,
        layers: list[LayerSpec],
        recipe: RecipeSettings,
        folder: Path,
        progress: Progress | None,
        ranks: Ranks | None = None,
    ) -> LambdaSearch:
        """What finds lambda for a rate."""
        from .calibrated import StoreTernarizer
        from .target import LambdaSearch, few_windows

        source: StoreTernarizer | Callable[[bool], StreamedExperts]
        if self.store is not None:
            source = StoreTernarizer(self.store, checkpoint, self.options, recipe)
        else:
            windows = self.windows
            assert windows is not None

            def source(few: bool) -> StreamedExperts:
                seen = few_windows(windows) if few else windows
                return self.stream(checkpoint, layers, seen, folder, ranks=ranks)

        return LambdaSearch(layers, source, recipe, self.options.hessian.seed, progress, ranks)


def rate_curves(
    source: str | os.PathLike[str],
    options: PackOptions,
    folder: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> list[RateCurve]:
    """What :func:`pack` finds out first when ``target_bits`` are wanted; several runs may share it.

    Parameters
    ----------
    source : str or Path
    options : PackOptions
        With calibration.
    folder : str or Path
        Where activations may lie meanwhile.
    progress : callable, optional
        Told how many experts are done, and how many there are.
    """
    checkpoint = SourceCheckpoint(locate(source))
    layers = expert_layers(checkpoint.config, checkpoint.tensors)
    with contextlib.ExitStack() as stack:
        evidence = _Evidence.gather(checkpoint, layers, options, stack)
        if evidence is None or options.recipe is None:
            raise ArgumentError("missing", field="calibration", expected="text or a store")
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        return evidence.search(checkpoint, layers, options.recipe, scratch, progress).first_look()


def expert_layers(config: ModelConfig, tensors: TensorTable) -> list[LayerSpec]:
    """Find the expert layers, and compare them with those that `config` implies.

    Raises
    ------
    UnsupportedModelError, CheckpointError
        As :func:`find_layers`; or a layer that ought to have experts has none, or of another shape.
    """
    layers = {layer.prefix: layer for layer in find_layers(config, tensors)}
    for implied in find_layers(config, tensors_of(config)):
        layer = layers.get(implied.prefix)
        if layer is None:
            raise CheckpointError(
                "missing from the checkpoint",
                file=config.directory,
                field=implied.projections[0].matrix_name(0),
                expected="experts in this layer, as config.json says",
            )
        for found, expected in zip(layer.projections, implied.projections, strict=True):
            if found != expected:
                raise CheckpointError(
                    "not the shape that config.json implies",
                    file=config.directory,
                    field=found.matrix_name(0),
                    value=[found.rows, found.columns],
                    expected=[expected.rows, expected.columns],
                )
    return list(layers.values())


def dense_tensors(tensors: TensorTable, layers: list[LayerSpec]) -> list[str]:
    """Names of the tensors that belong to no expert, in the order of `tensors`."""
    of_experts = {name for layer in layers for name in layer.tensor_names()}
    return [name for name in tensors if name not in of_experts]


def _source_bytes(layer: LayerSpec) -> int:
    """Bytes of an expert in the source."""
    return tensor_bytes(layer.dtype, (sum(p.rows * p.columns for p in layer.projections),))


class _Run:
    """One run of :func:`pack`: the tensors on their way from the checkpoint to the writer, and the count."""

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        layers: list[LayerSpec],
        options: PackOptions,
        progress: Progress | None,
        searching: Progress | None,
        curves: Sequence[RateCurve] | None,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._checkpoint = checkpoint
        self._layers = layers
        self._options = options
        self._progress = progress
        self._searching = searching
        self._curves = curves
        self._done = 0
        self._recipe = options.recipe
        self.summary = PackSummary(source_bytes=checkpoint.nbytes)

    def pack(self, writer: PackedModelWriter, evidence: _Evidence | None, resume: Resume | None) -> None:
        """Write everything."""
        stage = self._go_on(resume) if resume else None
        first = len(resume.layers) if resume else 0
        if self._ranks.size > 1:
            lam = self._recipe.lam if self._recipe else 0.0
            self._ranks.gather([str(writer.folder), writer.share(), first, stage, lam])
            self._ranks.gather(None)
        ternarizer = self._ternarizer(evidence, writer.folder, stage)
        for file in self._checkpoint.other_files:
            writer.add_file(file)
        for number, layer in enumerate(self._layers[first:], first):
            self._add_layer(writer, ternarizer, layer, number)
            if resume is not None:
                working, files = ternarizer.keep()
                summary = asdict(self.summary)
                matrices = [line for line in summary.pop("matrices") if line["layer"] == layer.prefix]
                kept = {
                    "lam": self._recipe.lam if self._recipe else 0.0,
                    "done": self._done,
                    "summary": summary,
                    "matrices": matrices,
                }
                writer.keep_layer({**working, **kept}, files)
                self._ranks.gather(None)  # from here on the others may forget what came before
                ternarizer.kept()
        for name in dense_tensors(self._checkpoint.tensors, self._layers):
            self.add_dense(writer, name)
        writer.finish(dict(self._checkpoint.config.values), ternarizer.recipe)

    def follow(self, follower: Follower, evidence: _Evidence | None) -> None:
        """What every rank but the first does of :meth:`pack`."""
        folder, mark, first, stage, lam = self._ranks.gather(None)[0]
        follower.enter(Path(folder), mark)
        self._ranks.gather(None)
        if self._recipe is not None and first:
            self._recipe = replace(self._recipe, lam=lam)
        self.summary.layers = first
        ternarizer = self._ternarizer(evidence, Path(folder), stage)
        for number, layer in enumerate(self._layers[first:], first):
            self._add_layer_together(Path(folder) / shard_name(number + 1), ternarizer, layer, number)
            if evidence is not None:
                self._ranks.gather(None)
                ternarizer.kept()

    def _go_on(self, resume: Resume) -> int | None:
        """Take up what an interrupted run has done; gives the layer of the model that comes next."""
        if not resume.layers:
            return None
        try:
            working = resume.layers[-1]["working"]
            matrices = [line for state in resume.layers for line in state["working"]["matrices"]]
            self.summary = PackSummary(**working["summary"], matrices=matrices)
            assert self._recipe is not None
            self._recipe = replace(self._recipe, lam=float(working["lam"]))
            self._done = int(working["done"])
            return int(working["stage"]) if "stage" in working else None
        except (KeyError, TypeError, ValueError) as error:
            raise HeaderError(
                "what an interrupted run has left is damaged",
                field="working",
                expected="--force to begin anew",
            ) from error

    def _ternarizer(self, evidence: _Evidence | None, folder: Path, stage: int | None) -> Ternarizer:
        options = self._options
        if evidence is None:
            return NearestTernarizer(
                self._checkpoint.matrix,
                options.levels,
                options.level_format,
                options.thread_count,
                self._ranks,
            )
        from .calibrated import StoreTernarizer, StreamedTernarizer

        recipe = self._recipe
        assert recipe is not None
        if options.target_bits is not None and not self.summary.layers:
            search = evidence.search(
                self._checkpoint, self._layers, recipe, folder, self._searching, self._ranks
            )
            lam = search.find(options.target_bits, self._curves or search.first_look())
            self._recipe = recipe = replace(recipe, lam=lam)
        if evidence.store is not None:
            return StoreTernarizer(evidence.store, self._checkpoint, evidence.options, recipe, self._ranks)
        assert evidence.windows is not None
        stream = evidence.stream(self._checkpoint, self._layers, evidence.windows, folder, stage, self._ranks)
        return StreamedTernarizer(stream, recipe)

    def _add_layer(
        self, writer: PackedModelWriter, ternarizer: Ternarizer, layer: LayerSpec, number: int
    ) -> None:
        if self._ranks.size > 1:
            written, experts = self._add_layer_together(writer.next_shard, ternarizer, layer, number)
            writer.adopt_layer(layer, written)
            for expert in experts:
                self._count(layer, expert)
        else:
            dictionaries = _dictionaries(layer)
            writer.add_layer(layer, self._records(ternarizer, layer, dictionaries), dictionaries)
        self.summary.layers += 1

    def _add_layer_together(
        self, path: Path, ternarizer: Ternarizer, layer: LayerSpec, number: int
    ) -> tuple[WrittenLayer, list[EncodedExpert]]:
        dictionaries = _dictionaries(layer)
        mine = []
        before = self._done
        for expert, ternary in ternarizer.layer(layer):
            mine.append(self._encode(layer, expert, ternary, dictionaries))
            if self._progress:  # the others are about as far
                nbytes = _source_bytes(layer)
                before += nbytes * self._ranks.size
                self._progress(min(before, self.summary.source_bytes), self.summary.source_bytes)
        return write_together(self._ranks, number % self._ranks.size, path, layer, mine, dictionaries)

    def _records(
        self, ternarizer: Ternarizer, layer: LayerSpec, dictionaries: DictionarySet
    ) -> Iterator[tuple[list[bytes], int]]:
        for number, ternary in ternarizer.layer(layer):
            expert = self._encode(layer, number, ternary, dictionaries)
            yield expert.frames, expert.tokens
            self._count(layer, expert)

    def _encode(
        self, layer: LayerSpec, number: int, expert: TernaryExpert, dictionaries: DictionarySet
    ) -> EncodedExpert:
        encoded = EncodedExpert(number, [], expert.tokens)
        for projection, matrix in zip(layer.projections, expert.matrices, strict=True):
            frame = dictionaries.encode(matrix.trits, matrix.levels, self._options.level_format)
            encoded.frames.append(frame)
            weights, zeros = matrix.trits.size, matrix.trits.size - int(np.count_nonzero(matrix.trits))
            norm = matrix.squared_norm
            line: dict[str, object] = {
                "tensor": projection.matrix_name(number),
                "layer": layer.prefix,
                "expert": number,
                "projection": projection.name,
                "rows": projection.rows,
                "columns": projection.columns,
                "tokens": expert.tokens,
                "sparsity": zeros / weights if weights else 0.0,
                "bits": 8 * len(frame) / weights if weights else 0.0,
                "relative_error": matrix.squared_error / norm if norm else 0.0,
            }
            sums = {"zeros": zeros, "squared_error": matrix.squared_error, "squared_norm": norm}
            encoded.matrices.append({**sums, "line": {**matrix.report, **line}})
        return encoded

    def _count(self, layer: LayerSpec, expert: EncodedExpert) -> None:
        """Add an expert to the summary; in the order of the experts, since sums are rounded."""
        summary = self.summary
        for projection, matrix in zip(layer.projections, expert.matrices, strict=True):
            summary.weights += projection.rows * projection.columns
            summary.zeros += matrix["zeros"]
            summary.squared_error += matrix["squared_error"]
            summary.squared_norm += matrix["squared_norm"]
            summary.matrices.append(matrix["line"])
        nbytes = _source_bytes(layer)
        summary.experts += 1
        summary.expert_source_bytes += nbytes
        self._advance(nbytes)

    def add_dense(self, writer: PackedModelWriter, name: str) -> None:
        tensor = self._checkpoint.tensors[name]
        data = self._checkpoint.data(name)
        if self._options.dense == "zstd":
            stored = writer.add_dense_zstd(name, tensor.dtype, tensor.shape, data)
        else:
            writer.add_dense(name, tensor.dtype, tensor.shape, data)
            stored = tensor.nbytes
        self.summary.dense_source_bytes += tensor.nbytes
        self.summary.dense_packed_bytes += stored
        self._advance(tensor.nbytes)

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress:
            self._progress(self._done, self.summary.source_bytes)


def _dictionaries(layer: LayerSpec) -> DictionarySet:
    return DictionarySet(layer.experts * sum(p.rows * p.columns for p in layer.projections))
