"""Experts of one MoE layer as a torch module that keeps them packed.

The three tensors of a layer (spec 6.1) are buffers of the module, so that ordinary ``state_dict`` loading
fills them; or the module has none, and a cache lends it the experts that it needs. The C core multiplies with
the matrices as they lie in the buffer or in the cache: no expert is ever unpacked.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from qmoe_codec import Matrix, experts_matmul, parse_dictionaries
from qmoe_codec.errors import ArgumentError, MissingPackageError, UnsupportedModelError

from .container import EXPERT, Gating, LayerSpec, Projection
from .expert_cache import CachedLayer, Portion
from .reader import PackedLayer

try:
    import torch
except ModuleNotFoundError as error:
    raise MissingPackageError("torch is not installed: pip install 'qmoe-format[torch]'") from error

Activation = Callable[[torch.Tensor], torch.Tensor]
"""From a tensor to a tensor of the same shape."""

BUFFERS = ("qmoe_store", "qmoe_index", "qmoe_dictionaries")
"""Names of the buffers: those of the tensors in the container, without the layer's prefix."""


class QMoEExperts(torch.nn.Module):
    """Packed experts, called like the experts modules of transformers.

    ``y[t] = sum_k top_k_weights[t, k] * down(act(gate(x[t])) * up(x[t]))`` over the experts
    ``top_k_index[t, k]``; ``down(act(up(x)))`` where the layer has no gate; another formula where it has a
    gating (spec 6.3, `role` and `gating`). Biases are parameters, under their names in the original
    checkpoint, or stacked [experts, rows] as ``NAME_bias`` of the projection NAME where they were apart.

    Parameters
    ----------
    layer : LayerSpec
        Number of experts, and the shape and role of their matrices.
    activation : callable, optional
        From a tensor to a tensor of the same shape, for example ``torch.nn.SiLU()``; none for a layer with a
        gating.
    store_bytes, dictionaries_bytes : int
        Sizes of the two byte buffers; both are in the layer's entry of ``quantization_config``.
    verify : bool, default True
        Whether checksum and content of a matrix are checked too when it is first used. Headers always are.
    cached : CachedLayer, optional
        Lends the matrices; the module then has no buffers, and sizes and `verify` mean nothing.
    bias_dtype : torch.dtype, default float32
        Of the parameters, if the layer has biases.

    Raises
    ------
    UnsupportedModelError
        The layer has projections that make no expert, or of shapes that do not fit each other.
    ArgumentError
        An activation is missing, or given to a layer with a gating.

    Notes
    -----
    Computes in float32, for inference, where the buffers are: on the CPU, or on a CUDA device by
    `qmoe_gpu_decode` (which needs CuPy). An index equal to the number of experts is skipped, as in
    transformers, where it marks a token that belongs to another device. Under ``torch.compile`` it is one
    operator, ``torch.ops.qmoe.packed_experts``.
    """

    qmoe_store: torch.Tensor
    qmoe_index: torch.Tensor
    qmoe_dictionaries: torch.Tensor

    def __init__(
        self,
        layer: LayerSpec,
        activation: Activation | None,
        *,
        store_bytes: int = 0,
        dictionaries_bytes: int = 0,
        verify: bool = True,
        cached: CachedLayer | None = None,
        bias_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if (activation is None) != (layer.gating is not None):
            raise ArgumentError(
                "missing" if activation is None else "the layer has a gating of its own",
                file=layer.prefix,
                field="activation",
            )
        self.layer = layer
        self.act_fn = activation
        self.verify = verify
        self.num_experts = layer.experts
        self.gate, self.up, self.down = _roles(layer)
        self.hidden_dim = self.up.columns
        self.intermediate_dim = self.up.rows
        self.cached = cached
        if cached is None:
            # The store may be large, and is filled by whoever loads: until then the index is illegal
            self.register_buffer("qmoe_store", torch.empty(store_bytes, dtype=torch.uint8))
            self.register_buffer("qmoe_index", torch.full((layer.experts, 3), -1, dtype=torch.int64))
            self.register_buffer("qmoe_dictionaries", torch.zeros(dictionaries_bytes, dtype=torch.uint8))
        for name, shape in bias_shapes(layer).items():
            bias = torch.zeros(shape, dtype=bias_dtype)
            self.register_parameter(name, torch.nn.Parameter(bias, requires_grad=False))
        self._parsed: _ParsedLayer | None = None
        self._gpu: _GpuLayer | None = None
        self._number = _register(self)

    @classmethod
    def from_packed(
        cls,
        packed: PackedLayer,
        activation: Activation | None,
        *,
        verify: bool = True,
        biases: Mapping[str, torch.Tensor] | None = None,
    ) -> Self:
        """The experts of one layer of an open packed model, copied into memory.

        Parameters
        ----------
        packed : PackedLayer
        activation, verify
            As for the class.
        biases : mapping of str to Tensor
            By the name of the parameter; needed where the layer has biases.
        """
        store, dictionaries = (
            np.frombuffer(view, np.uint8).copy() for view in (packed.store, packed.dictionary_bytes)
        )
        module = cls(
            packed.spec,
            activation,
            store_bytes=store.size,
            dictionaries_bytes=dictionaries.size,
            verify=verify,
        )
        module.qmoe_store = torch.from_numpy(store)
        module.qmoe_index = torch.from_numpy(packed.index.copy())
        module.qmoe_dictionaries = torch.from_numpy(dictionaries)
        biases = biases or {}
        for name, parameter in module.named_parameters(recurse=False):
            if name not in biases or biases[name].shape != parameter.shape:
                raise ArgumentError(
                    "the layer has biases",
                    file=packed.spec.prefix,
                    field=f"biases: {name}",
                    value=tuple(biases[name].shape) if name in biases else None,
                    expected=tuple(parameter.shape),
                )
            parameter.data = biases[name].detach().clone()
        return module

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Route tokens through the experts.

        Parameters
        ----------
        hidden_states : Tensor [T, H], floating point
        top_k_index : Tensor [T, K], integer, 0 … num_experts
        top_k_weights : Tensor [T, K], floating point

        Returns
        -------
        Tensor [T, H] of the dtype of `hidden_states`

        Raises
        ------
        ArgumentError
            A shape or an index does not fit.
        UnsupportedModelError
            A gradient is needed, or something is neither on the CPU nor, like the rest, on a CUDA device.
        FormatError
            The packed bytes are not what the spec says.
        """
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            raise UnsupportedModelError(
                "packed experts have no gradient: call the model under torch.no_grad()",
                file=self.layer.prefix,
            )
        if torch.compiler.is_compiling():
            output: torch.Tensor = packed_experts(hidden_states, top_k_index, top_k_weights, self._number)
            return output
        return self.compute(hidden_states, top_k_index, top_k_weights)

    def compute(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """What :meth:`forward` does when it is called and not traced."""
        self.check_inputs(hidden_states, top_k_index, top_k_weights, self.num_experts)
        if self.cached is not None and not self.cached.cache.backing.in_host_memory:
            from . import device_slots

            return device_slots.compute(
                self.cached,
                (hidden_states, top_k_index, top_k_weights),
                self._gpu_activation(),
                {p.role: self._bias(p) for p in self.layer.projections if p.bias is not None},
            )
        if hidden_states.is_cuda:
            return self._on_gpu(hidden_states, top_k_index, top_k_weights)
        # In NumPy, which stays on this thread: for few tokens, torch's threads take longer to meet than this.
        choices = top_k_index.shape[1]
        experts = top_k_index.reshape(-1).numpy()
        counts = np.bincount(experts, minlength=self.num_experts)[: self.num_experts]
        # All pairs of token and expert, sorted by expert; those of nobody come last and are left out.
        order = np.argsort(experts, kind="stable")[: counts.sum()]
        results = np.zeros((experts.size, self.hidden_dim), np.float32)
        if order.size:
            x = _as_array(hidden_states)[order // choices]
            results[order] = self._experts(np.flatnonzero(counts), x, np.cumsum(counts[counts > 0]))
        results *= _as_array(top_k_weights).reshape(-1, 1)
        output = results.reshape(*top_k_index.shape, self.hidden_dim).sum(axis=1)
        return torch.from_numpy(output).to(hidden_states.dtype)

    def _experts(
        self, hit: NDArray[np.intp], x: NDArray[np.float32], ends: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        """What each expert makes of its tokens, which are those of `x` up to its end."""
        source = self._layer() if self.cached is None else self.cached
        output = np.empty_like(x)
        with closing(source.lend(hit.tolist())) as portions:
            for positions, matrices in portions:
                if len(positions) == len(hit):
                    return self._multiply(hit, matrices, x, ends)
                starts = np.append(0, ends[:-1])
                rows = np.concatenate([np.arange(starts[p], ends[p]) for p in positions])
                output[rows] = self._multiply(
                    hit[positions], matrices, x[rows], np.cumsum(ends[positions] - starts[positions])
                )
        return output

    def _multiply(
        self,
        experts: NDArray[np.intp],
        matrices: Sequence[Mapping[str, Matrix]],
        x: NDArray[np.float32],
        ends: NDArray[np.intp],
    ) -> NDArray[np.float32]:
        threads = torch.get_num_threads()

        def multiply(projection: Projection, inputs: NDArray[np.float32]) -> torch.Tensor:
            chosen = [by_name[projection.name] for by_name in matrices]
            product = torch.from_numpy(experts_matmul(chosen, inputs, ends, threads=threads))
            if projection.bias is None:
                return product
            counts = torch.from_numpy(np.diff(ends, prepend=0))
            bias = self._bias(projection)[torch.from_numpy(experts)].to(torch.float32)
            return product.add_(bias.repeat_interleave(counts, dim=0))

        gate = None if self.gate is None else multiply(self.gate, x)
        hidden = inner(gate, multiply(self.up, x), self.act_fn, self.layer.gating)
        return multiply(self.down, hidden.numpy()).numpy()

    def _bias(self, projection: Projection) -> torch.Tensor:
        """The biases of a projection: [experts, rows]."""
        bias = self.get_parameter(_bias_name(self.layer, projection))
        if not projection.fused:
            return bias
        return bias[:, self.layer.fused_rows(projection).part(projection.rows)]

    def _on_gpu(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The same by the GPU's kernels, on torch's stream, with no word to or from the host."""
        from qmoe_gpu_decode import torch_ops

        tensors = (*self._packed_buffers(), *self.parameters(recurse=False))
        if self._gpu is None or not self._gpu.is_of(tensors):
            biases = {p.role: self._bias(p) for p in self.layer.projections if p.bias is not None}
            self._gpu = _GpuLayer(self.layer, tensors, biases, self.verify)
        output: torch.Tensor = torch_ops.experts(self._gpu.number, x, index, weights, *self._gpu_activation())
        return output

    def _gpu_activation(self) -> tuple[str, float, float]:
        """What the GPU's operator calls the activation, and the numbers of a gating."""
        from qmoe_gpu_decode import CLAMPED_SWIGLU

        if self.layer.gating is not None:
            return CLAMPED_SWIGLU, self.layer.gating.alpha, self.layer.gating.limit
        assert self.act_fn is not None
        return _activation_name(self.act_fn, self.layer.prefix), 0.0, 0.0

    def _packed_buffers(self) -> tuple[torch.Tensor, ...]:
        return (self.qmoe_store, self.qmoe_index, self.qmoe_dictionaries)

    def check_inputs(
        self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: int
    ) -> None:
        """What :meth:`forward` refuses, where a token may choose among so many experts."""
        prefix = self.layer.prefix
        place = hidden_states.device
        if self.cached is not None:
            self.cached.cache.require(index.shape[-1], prefix)
            if str(place) != self.cached.cache.backing.place:
                raise UnsupportedModelError(
                    "the expert cache is elsewhere",
                    file=prefix,
                    field="hidden_states",
                    value=place,
                    expected=f"{self.cached.cache.backing.place}: load(…, device=…) puts the cache there",
                )
        own = (*self.named_buffers(recurse=False), *self.named_parameters(recurse=False))
        for name, tensor in (("hidden_states", hidden_states), *own):
            if tensor.device != place or place.type not in ("cpu", "cuda"):
                raise UnsupportedModelError(
                    "packed experts compute on the CPU or a CUDA device, where their buffers are",
                    file=prefix,
                    field=name,
                    value=tensor.device,
                    expected="cpu or cuda, the same for all",
                )
        if hidden_states.ndim != 2 or hidden_states.shape[1] != self.hidden_dim:
            raise ArgumentError(
                "wrong shape",
                file=prefix,
                field="hidden_states",
                value=tuple(hidden_states.shape),
                expected=f"[tokens, {self.hidden_dim}]",
            )
        if index.ndim != 2 or index.shape[0] != hidden_states.shape[0] or index.shape != weights.shape:
            raise ArgumentError(
                "wrong shape",
                file=prefix,
                field="top_k_index, top_k_weights",
                value=f"{tuple(index.shape)}, {tuple(weights.shape)}",
                expected=f"both [{hidden_states.shape[0]}, experts per token]",
            )
        # On a GPU a look at the index would wait for it; the kernels skip what is no expert's.
        if place.type == "cpu":
            check_index(index.numpy(), experts, prefix)

    def _layer(self) -> _ParsedLayer:
        """The parsed layer, made anew when a buffer was replaced, moved or loaded into."""
        buffers = self._packed_buffers()
        if self._parsed is None or not self._parsed.is_of(buffers):
            self._parsed = _ParsedLayer(self.layer, buffers, self.verify)
        return self._parsed

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._parsed = self._gpu = None  # the buffers are written in place, which is_of() does not see
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parsed": None, "_gpu": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = _register(self)

    def extra_repr(self) -> str:
        """Experts, width and bits per weight."""
        weights = self.num_experts * sum(p.rows * p.columns for p in self.layer.projections)
        stored = self.qmoe_store.numel() if self.cached is None else self.cached.store_bytes
        return (
            f"experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}, "
            f"bits_per_weight={8 * stored / weights:.3f}"
        )


_numbers = itertools.count(1)
_modules: weakref.WeakValueDictionary[int, QMoEExperts] = weakref.WeakValueDictionary()


def _register(module: QMoEExperts) -> int:
    """The number by which :func:`packed_experts` knows the module, as long as that lives."""
    number = next(_numbers)
    _modules[number] = module
    return number


@torch.library.custom_op("qmoe::packed_experts", mutates_args=())
def packed_experts(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, module: int) -> torch.Tensor:
    """Route x [tokens, hidden] through the :class:`QMoEExperts` of this number: the operator of a graph."""
    found = _modules.get(module)
    if found is None:
        raise ArgumentError("no module has this number", field="module", value=module)
    return found.compute(x, index, weights)


@packed_experts.register_fake
def _(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, module: int) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def inner(
    gate: torch.Tensor | None,
    up: torch.Tensor,
    activation: Activation | None,
    gating: Gating | None,
) -> torch.Tensor:
    """What an expert's last projection multiplies with (spec 6.3), from what the others gave."""
    if gating is not None and gate is not None:
        gate = gate.clamp(max=gating.limit)
        up = up.clamp(-gating.limit, gating.limit)
        return (up + 1) * (gate * torch.sigmoid(gating.alpha * gate))
    assert activation is not None
    return activation(up) if gate is None else activation(gate) * up


def check_index(index: NDArray[np.integer[Any]], experts: int, prefix: str) -> None:
    """Refuse an index of none of so many experts, nor of nobody.

    Raises
    ------
    ArgumentError
        There is one.
    """
    if index.size and not 0 <= index.min() <= index.max() <= experts:
        raise ArgumentError(
            "no such expert",
            file=prefix,
            field="top_k_index",
            value=f"{index.min()} … {index.max()}",
            expected=f"0 … {experts}",
        )


def bias_shapes(layer: LayerSpec) -> dict[str, tuple[int, int]]:
    """Names and shapes of the parameters that a :class:`QMoEExperts` of this layer has."""
    return {
        _bias_name(layer, projection): (
            layer.experts,
            layer.fused_rows(projection).total if projection.fused else projection.rows,
        )
        for projection in layer.projections
        if projection.bias is not None
    }


def _bias_name(layer: LayerSpec, projection: Projection) -> str:
    assert projection.bias is not None
    if EXPERT in projection.bias:
        return f"{projection.name}_bias"
    return projection.bias.removeprefix(f"{layer.prefix}.").replace(".", "_")


class _ParsedLayer(PackedLayer):
    """A layer in the buffers of a module instead of a file; each matrix is parsed when first asked for."""

    def __init__(self, spec: LayerSpec, buffers: tuple[torch.Tensor, ...], verify: bool) -> None:
        store, index, dictionaries = (buffer.contiguous().numpy() for buffer in buffers)
        super().__init__(spec, store.data, index, dictionaries.data, place=spec.prefix)
        self._buffers = buffers
        self._pointers = [buffer.data_ptr() for buffer in buffers]
        self._verify = verify
        self._matrices: list[Mapping[str, Matrix] | None] = [None] * spec.experts

    def is_of(self, buffers: tuple[torch.Tensor, ...]) -> bool:
        """Whether these are still the same tensors at the same place in memory."""
        same = all(new is old for new, old in zip(buffers, self._buffers, strict=True))
        return same and [buffer.data_ptr() for buffer in buffers] == self._pointers

    def lend(self, experts: Sequence[int]) -> Generator[Portion]:
        """All of these experts in one portion: what :meth:`CachedLayer.lend` does in several."""
        yield list(range(len(experts))), [self.matrices(expert) for expert in experts]

    def matrices(self, expert: int) -> Mapping[str, Matrix]:
        """Matrices of one expert by name, parsed once."""
        found = self._matrices[expert]
        if found is None:
            found = self.parse_frames(expert, self.frames(expert), verify=self._verify)
            self._matrices[expert] = found
        return found


class _GpuLayer:
    """A layer whose buffers are on a GPU: checked on the host once, multiplied where it lies."""

    def __init__(
        self,
        spec: LayerSpec,
        tensors: tuple[torch.Tensor, ...],  # the buffers, then what `biases` are views of
        biases: Mapping[str, torch.Tensor],
        verify: bool,
    ) -> None:
        from qmoe_gpu_decode import ExpertProjection, PackedExperts, torch_ops
        from qmoe_gpu_decode.device import cuda_device

        buffers = tensors[: len(BUFFERS)]
        device = cuda_device(buffers[0].device.index)
        store, index, dictionaries = (buffer.contiguous().cpu().numpy() for buffer in buffers)
        projections = [ExpertProjection(p.role, p.rows, p.columns) for p in spec.projections]
        self.experts = PackedExperts(
            store.data,
            index,
            parse_dictionaries(dictionaries.data),
            projections,
            device,
            device_store=buffers[0].contiguous(),
            biases={role: bias.to(torch.float32).contiguous() for role, bias in biases.items()},
            verify=verify,
        )
        self.number = torch_ops.register(self.experts)
        self._tensors = tensors
        self._pointers = [tensor.data_ptr() for tensor in tensors]

    def is_of(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        """Whether these are still the same tensors at the same place in memory."""
        same = all(new is old for new, old in zip(tensors, self._tensors, strict=True))
        return same and [tensor.data_ptr() for tensor in tensors] == self._pointers


def _activation_name(activation: Activation, prefix: str) -> str:
    """The activation's name among those that the GPU's kernels have."""
    if isinstance(activation, torch.nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    names = {
        "SiLU": "silu",
        "silu": "silu",  # torch.nn.functional's
        "SiLUActivation": "silu",
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
        "NewGELUActivation": "gelu_tanh",
        "ReLU": "relu",
        "Identity": "none",
    }
    kind = getattr(activation, "__name__", type(activation).__name__)
    name = names.get(kind)
    if name is None:
        raise UnsupportedModelError(
            "the GPU's kernels do not have this activation",
            file=prefix,
            field="activation",
            value=kind,
            expected=sorted(names),
        )
    return name


def _as_array(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().to(torch.float32).numpy()
    return array


def _roles(layer: LayerSpec) -> tuple[Projection | None, Projection, Projection]:
    """Gate (or None), up and down projection of a layer whose shapes fit each other."""
    by_role = {projection.role: projection for projection in layer.projections}
    if len(by_role) != len(layer.projections) or not {"up", "down"} <= by_role.keys():
        raise UnsupportedModelError(
            "cannot compute with these projections",
            file=layer.prefix,
            field="role",
            value=[projection.role for projection in layer.projections],
            expected="gate, up, down or up, down",
        )
    gate, up, down = by_role.get("gate"), by_role["up"], by_role["down"]
    shapes = [(p.rows, p.columns) for p in (up, *([gate] if gate else []))] + [(down.columns, down.rows)]
    if len(set(shapes)) != 1:
        raise UnsupportedModelError(
            "shapes of the projections do not fit each other",
            file=layer.prefix,
            field="rows, columns",
            value={p.role: (p.rows, p.columns) for p in layer.projections},
        )
    return gate, up, down
