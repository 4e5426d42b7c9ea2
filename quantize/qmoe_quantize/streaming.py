"""A transformers model run one layer at a time: only that layer's dense weights are in memory.

The model is built without weights. The layers' other arguments (masks, positions, biases) do not depend on
the text, so they are caught once, from a call in which every layer only notes what it is given. Hidden states
lie on the disk between layers: ``activations-N-….h5`` hold what layer N reads, and are never changed once
they are complete, so that a run can go on from them. With several ranks each runs its part of the text.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from qmoe_codec.errors import (
    ArgumentError,
    CheckpointError,
    MissingPackageError,
    QMoEError,
    UnsupportedModelError,
)
from torch import Tensor, nn

from qmoe_format.container import LayerSpec

from .activations import Activations
from .checkpoint import SourceCheckpoint
from .options import StreamOptions
from .parts import PartReader, part_path, parts_of
from .ranks import Ranks
from .text import TokenWindows

MEMORY = "memory"  # what an encoder gives to its decoder
Inner = Callable[[Tensor | None, Tensor], Tensor]
"""From what gate (if there is one) and up give to what an expert's last projection multiplies with."""
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Routing:
    """What a layer's experts were asked for.

    Attributes
    ----------
    index, weight : Tensor
        int32 and float32 [tokens, choices]; an index equal to the number of experts is nobody.
    counted : Tensor
        bool [tokens]: whether a token counts for calibration.
    """

    index: Tensor
    weight: Tensor
    counted: Tensor


class ExpertsRecorder(nn.Module):
    """Stands in for a layer's experts: notes what they are given, and returns what it is told to."""

    def __init__(self, experts: int, *, one_hot: bool) -> None:
        super().__init__()
        self.num_experts = experts
        self._one_hot = one_hot
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.answer: Tensor | None = None

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Called as the experts modules of transformers are."""
        if self.answer is not None:
            return self.answer.to(hidden)
        if self._one_hot:  # Switch Transformers; an empty mask is a token beyond the expert's capacity
            index = torch.where(index.any(dim=-1), index.argmax(dim=-1), self.num_experts)
        self.seen.append((hidden, index.to(torch.int32), weights.float()))
        return torch.zeros_like(hidden)


@dataclass
class _Stack:
    """Layers that are run one after the other, and what feeds them."""

    name: str  # of its module within the model; empty for the model itself
    module: Any
    layers: Any
    tokens: Tensor
    counted: Tensor
    reads_memory: bool = False
    calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)

    def layer_name(self, number: int) -> str:
        kind = "layers" if hasattr(self.module, "layers") else "block"
        return f"{self.name}.{kind}.{number}" if self.name else f"{kind}.{number}"


class StreamedModel:
    """A checkpoint's model, layer by layer.

    Parameters
    ----------
    checkpoint : SourceCheckpoint
    layers : list of LayerSpec
        Its layers of experts.
    windows : TokenWindows
        An encoder-decoder reads the first half of each window in its encoder, and its decoder goes on with
        the second half, shifted by one behind the start token.
    options : StreamOptions
    folder : Path
        Where activations lie.
    ranks : Ranks

    Raises
    ------
    UnsupportedModelError
        transformers does not know the model, or it has layers or experts of an unknown kind.
    CheckpointError
        A dense tensor is missing, or of another shape.
    """

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        layers: list[LayerSpec],
        windows: TokenWindows,
        options: StreamOptions,
        folder: Path,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._checkpoint = checkpoint
        self._folder = folder
        self._device = torch_device(options.device)
        self._dtype = COMPUTE_DTYPES[options.dtype]
        self._batch = options.batch_windows(windows.tokens.shape[1])
        self._model, self._sources = _build(checkpoint, self._dtype)
        self._inners: dict[str, Inner] = {}
        self._recorders: dict[str, ExpertsRecorder] = {}
        places = self._put_recorders(layers)
        self._stacks = _stacks(self._model, checkpoint, windows)
        self._stages = [
            (stack, number) for stack in self._stacks for number in range(len(stack.layers))
        ]  # stage number -> layer
        self._stage_of = {}
        for prefix, name in places.items():
            inside = [s for s, (k, n) in enumerate(self._stages) if name.startswith(k.layer_name(n) + ".")]
            if len(inside) != 1:
                raise UnsupportedModelError(
                    "experts outside of the layers of the model", file=checkpoint.directory, field=prefix
                )
            self._stage_of[prefix] = inside[0]
        self._check_complete()

    # ---- building -------------------------------------------------------------------------------------

    def _put_recorders(self, layers: list[LayerSpec]) -> dict[str, str]:
        """Replace every layer's experts; gives the names of their modules by the layers' prefixes."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        from qmoe_format.torch import inner
        from qmoe_format.transformers import experts_activation, is_switch, module_name

        renamings = [
            change
            for change in get_model_conversion_mapping(self._model)
            if isinstance(change, WeightRenaming)
        ]
        places = {}
        for layer in layers:
            name = module_name(self._model, layer, renamings)
            module = self._model.get_submodule(name)
            try:
                activation = experts_activation(module, layer)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(
                    f"cannot be calibrated: {error.message}",
                    file=self._checkpoint.directory,
                    field=layer.prefix,
                    value=type(module).__name__,
                    expected="--method nearest, without --calib",
                ) from error
            self._inners[layer.prefix] = partial(inner, activation=activation, gating=layer.gating)
            recorder = ExpertsRecorder(layer.experts, one_hot=is_switch(module))
            self._recorders[layer.prefix] = recorder
            self._model.set_submodule(name, recorder)
            places[layer.prefix] = name
        return places

    def _check_complete(self) -> None:
        for name, tensor in _tensors(self._model):
            if not tensor.is_meta:
                continue
            if name not in self._sources:
                raise CheckpointError(
                    "missing from the checkpoint", file=self._checkpoint.directory, field=name
                )
            found = self._checkpoint.tensors[self._sources[name]].shape
            if found != tuple(tensor.shape):
                raise CheckpointError(
                    "not the shape that config.json implies",
                    file=self._checkpoint.directory,
                    field=self._sources[name],
                    value=list(found),
                    expected=list(tensor.shape),
                )

    @contextlib.contextmanager
    def _loaded(self, *names: str) -> Iterator[None]:
        """Have the weights of some modules in memory."""
        from qmoe_format.transformers import wanted_dtype

        empty: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for name, tensor in _tensors(self._model):
                if tensor.is_meta and any(name.startswith(f"{part}.") for part in names):
                    module = self._model.get_submodule(name.rpartition(".")[0])
                    leaf = name.rpartition(".")[2]
                    values = self._read(self._sources[name])
                    if values.is_floating_point():
                        values = values.to(wanted_dtype(self._model, name))
                    values = values.to(self._device)
                    if leaf in module._parameters:
                        table: dict[str, Any] = module._parameters
                        values = nn.Parameter(values, requires_grad=False)
                    else:
                        table = module._buffers
                    empty.append((table, leaf, tensor))
                    table[leaf] = values
            yield
        finally:
            for table, leaf, tensor in empty:
                table[leaf] = tensor

    def _read(self, name: str) -> Tensor:
        from qmoe_format.transformers import DTYPES

        tensor = self._checkpoint.tensors[name]
        if tensor.dtype not in DTYPES:
            raise UnsupportedModelError(
                "torch has no such dtype", file=self._checkpoint.directory, field=name, value=tensor.dtype
            )
        data = self._checkpoint.data(name)
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return flat.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    # ---- running --------------------------------------------------------------------------------------

    @property
    def stages(self) -> int:
        """Number of layers, with and without experts."""
        return len(self._stages)

    def stage_of(self, prefix: str) -> int:
        """The layer that the experts `prefix` belong to."""
        return self._stage_of[prefix]

    def inner(self, prefix: str) -> Inner:
        """What the experts `prefix` compute between their projections."""
        return self._inners[prefix]

    def calibration_tokens(self, prefix: str) -> int:
        """Tokens that count among those that reach the layer of the experts `prefix`."""
        return int(self._stages[self._stage_of[prefix]][0].counted.sum())

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return self._dtype

    def path(self, stage: int) -> Path:
        """The file of this rank's part of what a stage reads."""
        return part_path(self._folder, _stage_name(stage), self._ranks.rank, self._ranks.size)

    def forget(self, stage: int) -> None:
        """Delete what a stage reads: this rank's part, and what another run left."""
        name = _stage_name(stage)
        self.path(stage).unlink(missing_ok=True)
        if self._ranks.rank == 0:
            own = self._names(name)
            for path in parts_of(self._folder, name):
                if path.name not in own:
                    path.unlink(missing_ok=True)

    def files(self, stage: int) -> list[str]:
        """Names of the files of all ranks that are needed to go on at a stage."""
        if stage >= self.stages or not self.path(stage).exists():
            return []
        if not self._memory_path.exists():
            foreign = [path.name for path in parts_of(self._folder, MEMORY)]
            return [*self._names(_stage_name(stage)), *foreign]
        return [*self._names(_stage_name(stage)), *self._names(MEMORY)]

    def _names(self, name: str) -> list[str]:
        """Names of the files of all ranks."""
        size = self._ranks.size
        return [part_path(self._folder, name, rank, size).name for rank in range(size)]

    def bounds(self, prefix: str) -> list[int]:
        """First token of each rank's part among those that reach the experts `prefix`, and their number."""
        return self._bounds(self._stages[self._stage_of[prefix]][0], self._ranks.size)

    @property
    def _memory_path(self) -> Path:
        return part_path(self._folder, MEMORY, self._ranks.rank, self._ranks.size)

    def _bounds(self, stack: _Stack, parts: int) -> list[int]:
        """The first token of each of some parts of the text, which begin with a batch, and their number."""
        count, length = stack.tokens.shape
        batches = -(-count // self._batch)
        return [min(count, batches * part // parts * self._batch) * length for part in range(parts + 1)]

    def _first(self, stack: _Stack) -> int:
        """The first token of this rank's part."""
        return self._bounds(stack, self._ranks.size)[self._ranks.rank]

    def _source(self, stage: int) -> PartReader:
        stack = self._stages[stage][0]
        return PartReader(
            self._folder, _stage_name(stage), lambda parts: self._bounds(stack, parts), self._ranks
        )

    def begin(self) -> None:
        """Write what the first layer reads."""
        self._embed(self._stacks[0], 0)

    def run_plain(self, stage: int) -> None:
        """Run a layer without experts: from what it reads to what the next one reads."""
        stack, number = self._stages[stage]
        with (
            self._loaded(stack.layer_name(number)),
            self._source(stage) as source,
            self._next(stage) as target,
        ):
            for start, stop in self._batches(stack):
                self._put(stage, target, stack, start, self._forward(stage, source, start, stop))
        self._change_stack(stage)

    def record(self, prefix: str, scratch: Activations, name: str) -> Routing:
        """Run a layer up to its experts, and tell all ranks what they are asked for.

        Their inputs go to `name` in `scratch`, [tokens, columns]: those of this rank's part of the text.
        """
        stage = self._stage_of[prefix]
        stack, number = self._stages[stage]
        recorder = self._recorders[prefix]
        indices, weights = [], []
        columns, first = 0, self._first(stack)
        with self._loaded(stack.layer_name(number)), self._source(stage) as source:
            for start, stop in self._batches(stack):
                recorder.seen.clear()
                self._forward(stage, source, start, stop)
                if len(recorder.seen) != 1:
                    raise UnsupportedModelError(
                        "the experts are not called once in a pass", field=prefix, value=len(recorder.seen)
                    )
                x, index, weight = recorder.seen.pop()
                self._check_finite(x, prefix)
                if not columns:
                    columns = x.shape[1]
                    own = self._bounds(stack, self._ranks.size)[self._ranks.rank + 1] - first
                    scratch.make(name, (own, columns), self._dtype)
                scratch.write(name, start * stack.tokens.shape[1] - first, x)
                indices.append(index.cpu())
                weights.append(weight.cpu())
        # A rank may have experts and no text
        choices = indices[0].shape[1] if indices else 0
        columns, choices = map(max, zip(*self._ranks.gather([columns, choices]), strict=True))
        if not indices:
            scratch.make(name, (0, columns), self._dtype)
            indices, weights = [torch.empty(0, choices, dtype=torch.int32)], [torch.empty(0, choices)]
        found = [torch.cat(indices), torch.cat(weights)]
        if self._ranks.size > 1:
            bounds = self._bounds(stack, self._ranks.size)
            counts = [stop - start for start, stop in itertools.pairwise(bounds)]
            found = [torch.cat(self._ranks.exchange([own] * self._ranks.size, counts)) for own in found]
        return Routing(found[0], found[1], stack.counted.flatten())

    def run_with(self, prefix: str, scratch: Activations) -> None:
        """Run the layer again; its experts give what lies in ``y`` in `scratch`: tokens of this rank."""
        stage = self._stage_of[prefix]
        stack, number = self._stages[stage]
        recorder, length, first = self._recorders[prefix], stack.tokens.shape[1], self._first(stack)
        with (
            self._loaded(stack.layer_name(number)),
            self._source(stage) as source,
            self._next(stage) as target,
        ):
            try:
                for start, stop in self._batches(stack):
                    recorder.answer = scratch.read("y", start * length - first, stop * length - first).to(
                        self._device
                    )
                    self._put(stage, target, stack, start, self._forward(stage, source, start, stop))
            finally:
                recorder.answer = None
        self._change_stack(stage)

    def _next(self, stage: int) -> Any:
        """The file of what the stage after this one reads; nothing where it is made in another way."""
        stack, number = self._stages[stage]
        if number + 1 < len(stack.layers):
            return Activations(self.path(stage + 1), create=True)
        if stage + 1 < len(self._stages):
            return Activations(self._memory_path, create=True)
        return contextlib.nullcontext()

    def _put(self, stage: int, target: Activations | None, stack: _Stack, start: int, hidden: Tensor) -> None:
        place = f"{self._stages[stage][0].layer_name(self._stages[stage][1])}"
        self._check_finite(hidden, place)
        if target is None:
            return
        bounds = self._bounds(stack, self._ranks.size)
        first, last = bounds[self._ranks.rank : self._ranks.rank + 2]
        if "hidden" not in target:
            target.make("hidden", (last - first, hidden.shape[-1]), self._dtype)
        target.write("hidden", start * stack.tokens.shape[1] - first, hidden.flatten(0, 1))

    def _change_stack(self, stage: int) -> None:
        """After the last layer of an encoder: what the decoder's first layer reads."""
        stack, number = self._stages[stage]
        if number + 1 == len(stack.layers) and stage + 1 < len(self._stages):
            length, first = stack.tokens.shape[1], self._first(stack)
            with (
                self._loaded(*_ends(stack)),
                Activations(self._memory_path, create=False, change=True) as memory,
            ):
                for start, stop in self._batches(stack):
                    at = start * length - first
                    hidden = memory.read("hidden", at, stop * length - first).to(self._device)
                    with torch.inference_mode():
                        memory.write("hidden", at, stack.module.final_layer_norm(hidden))
            self._embed(self._stages[stage + 1][0], stage + 1)

    def _forward(self, stage: int, source: PartReader, start: int, stop: int) -> Tensor:
        """One layer for windows [start, stop): [windows, length, columns]."""
        stack, number = self._stages[stage]
        length = stack.tokens.shape[1]
        hidden = source.read(start * length, stop * length).to(self._device)
        hidden = hidden.reshape(stop - start, length, -1)
        self._prepare(stack, stop - start)
        arguments, named = stack.calls[stop - start][number]
        if stack.reads_memory:
            memory = self._memory(start, stop)
            arguments = tuple(memory if value is _MEMORY else value for value in arguments)
            named = {name: memory if value is _MEMORY else value for name, value in named.items()}
        with torch.inference_mode():
            output = stack.layers[number](hidden, *arguments, **named)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _memory(self, start: int, stop: int) -> Tensor:
        """What the encoder gave for windows [start, stop)."""
        stack = self._stacks[0]
        length = stack.tokens.shape[1]
        with PartReader(
            self._folder, MEMORY, lambda parts: self._bounds(stack, parts), self._ranks
        ) as memory:
            rows = memory.read(start * length, stop * length)
        return rows.to(self._device).reshape(stop - start, length, -1)

    def _embed(self, stack: _Stack, stage: int) -> None:
        """Write what a stack's first layer reads."""
        with Activations(self.path(stage), create=True) as target, self._loaded(*_ends(stack)):
            for start, stop in self._batches(stack):
                with _noting(stack) as notes:
                    self._call(stack, stack.tokens[start:stop])
                self._put(stage, target, stack, start, notes[0][0])

    def _call(self, stack: _Stack, tokens: Tensor) -> Tensor | None:
        """Call the whole stack; gives what stood in for the encoder's output."""
        named: dict[str, Any] = {}
        memory = None
        if stack.reads_memory:
            length = self._stacks[0].tokens.shape[1]
            width = self._model.config.hidden_size
            memory = torch.zeros(len(tokens), length, width, dtype=self._dtype, device=self._device)
            named["encoder_hidden_states"] = memory
        with torch.inference_mode():
            stack.module(input_ids=tokens.to(self._device), use_cache=False, **named)
        return memory

    def _prepare(self, stack: _Stack, windows: int) -> None:
        """Catch the other arguments of the layers of a stack, for a batch of so many windows."""
        if windows in stack.calls:
            return
        with self._loaded(*_ends(stack)):
            with _noting(stack) as notes:
                memory = self._call(stack, stack.tokens[:windows])
            calls = []
            for _, arguments, named in notes:
                kept = tuple(_MEMORY if value is memory is not None else value for value in arguments)
                calls.append((kept, {k: _MEMORY if v is memory is not None else v for k, v in named.items()}))
            if hasattr(stack.module, "block"):
                calls = self._share_biases(stack, notes, calls)
            stack.calls[windows] = calls

    def _share_biases(self, stack: _Stack, notes: list[Any], calls: list[Any]) -> list[Any]:
        """Layers of T5 use the position biases that the first one has made."""
        hidden, arguments, named = notes[0]
        with self._loaded(stack.layer_name(0)), torch.inference_mode():
            recorders = [m for m in stack.layers[0].modules() if isinstance(m, ExpertsRecorder)]
            _, own, cross = stack.layers[0](torch.zeros_like(hidden), *arguments, **named)
            for recorder in recorders:
                recorder.seen.clear()
        shared = [calls[0]]
        for values, names in calls[1:]:
            values = list(values)
            values[1], values[4] = own, cross
            shared.append((tuple(values), names))
        return shared

    def _batches(self, stack: _Stack) -> list[tuple[int, int]]:
        """Batches of windows of this rank's part; the same windows make a batch whoever runs it."""
        count = len(stack.tokens)
        batches = [(start, min(start + self._batch, count)) for start in range(0, count, self._batch)]
        return [batches[number] for number in self._ranks.share(len(batches))]

    def _check_finite(self, values: Tensor, place: str) -> None:
        if not torch.isfinite(values).all():
            raise CheckpointError(
                "activations that are NaN or infinite",
                file=self._checkpoint.directory,
                field=place,
                value=f"{int((~torch.isfinite(values)).sum())} of {values.numel()}",
                expected="finite activations; in bfloat16 or with outliers try float32",
            )


def _stage_name(stage: int) -> str:
    return f"activations-{stage:05d}"


class _Memory:
    """Stands for the encoder's output among the arguments of a layer."""


_MEMORY: Any = _Memory()


def torch_device(name: str) -> torch.device:
    """The device of a name.

    Raises
    ------
    UnsupportedModelError
        torch finds no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModelError("torch finds no such device", field="device", value=name)
    return torch.device(name)


def _build(checkpoint: SourceCheckpoint, dtype: torch.dtype) -> tuple[Any, dict[str, str]]:
    """The model without weights, and which of the checkpoint's tensors each of its own is."""
    try:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ModuleNotFoundError:
        raise MissingPackageError(
            "transformers is not installed: pip install 'qmoe-format[transformers]'"
        ) from None
    logger = transformers.utils.logging.get_logger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    auto: Any = transformers.AutoModel
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.directory)
        with torch.device("meta"):
            model: Any = auto.from_config(config, dtype=dtype)
    except QMoEError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(
            f"transformers cannot build this model: {reason}", file=checkpoint.config.file
        ) from error
    finally:
        logger.setLevel(level)
    model.eval().requires_grad_(False)
    with torch.device("cpu"):
        for name, module in list(model.named_modules()):
            # Rotary embeddings make their tables themselves; no checkpoint holds them
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)) and name.endswith(
                "rotary_emb"
            ):
                model.set_submodule(name, type(module)(module.config))
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    own = {name for name, _ in _tensors(model)}
    base = f"{model.base_model_prefix}."
    sources = {}
    for tensor in checkpoint.tensors:
        renamed, _ = rename_source_key(tensor, renamings, [])
        for candidate in (renamed, renamed.removeprefix(base)):
            if candidate in own:
                sources[candidate] = tensor
    tied = model._tied_weights_keys if isinstance(model._tied_weights_keys, dict) else {}
    for name, target in tied.items():
        if name not in sources and target in sources:
            sources[name] = sources[target]
    return model, sources


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and buffers by name, shared ones under each of their names."""
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _ends(stack: _Stack) -> list[str]:
    """Names of a stack's modules that are no layers: embedding, final norm."""
    names = [name for name, child in stack.module.named_children() if child is not stack.layers]
    return [f"{stack.name}.{name}" if stack.name else name for name in names]


def _stacks(model: Any, checkpoint: SourceCheckpoint, windows: TokenWindows) -> list[_Stack]:
    """The stacks of layers in the order in which they run."""
    tokens, counted = torch.from_numpy(windows.tokens), torch.from_numpy(windows.counted)
    if isinstance(getattr(model, "layers", None), nn.ModuleList):
        return [_Stack("", model, model.layers, tokens, counted)]
    encoder, decoder = getattr(model, "encoder", None), getattr(model, "decoder", None)
    if all(isinstance(getattr(stack, "block", None), nn.ModuleList) for stack in (encoder, decoder)):
        half = tokens.shape[1] // 2
        if not half:
            raise ArgumentError(
                "too short for an encoder and a decoder", field="length", value=1, expected="at least 2"
            )
        start = checkpoint.config.number(
            "decoder_start_token_id", checkpoint.config.number("pad_token_id", 0)
        )
        read, continued = tokens[:, :half], tokens[:, half:].roll(1, dims=1)
        behind = counted[:, half:].roll(1, dims=1)
        continued[:, 0], behind[:, 0] = start, False
        return [
            stack
            for stack in (
                _Stack("encoder", encoder, _part(encoder, "block"), read, counted[:, :half]),
                _Stack("decoder", decoder, _part(decoder, "block"), continued, behind, reads_memory=True),
            )
            if len(stack.layers)
        ]
    raise UnsupportedModelError(
        "a model of layers of an unknown kind", file=checkpoint.config.file, value=type(model).__name__
    )


def _part(module: Any, name: str) -> Any:
    return getattr(module, name)


@contextlib.contextmanager
def _noting(stack: _Stack) -> Iterator[list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]]:
    """Let every layer of a stack only note what it is given: hidden states, other arguments, named ones."""
    notes: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    is_tuple = hasattr(stack.module, "block")

    def note(hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        notes.append((hidden, arguments, named))
        return (hidden, None, None) if is_tuple else hidden

    try:
        for layer in stack.layers:
            layer.forward = note
        yield notes
    finally:
        for layer in stack.layers:
            vars(layer).pop("forward", None)
