"""Predicting a run of many ranks from a prediction for one: time, memory, what travels; see NOTES.md."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from qmoe_codec.errors import ArgumentError

from qmoe_format.container import LayerSpec

from .checkpoint import SourceCheckpoint, has_weights, locate
from .config import ModelConfig
from .cost import SECOND_LOOKS, START_SECONDS
from .dispatch import EXCHANGE_BYTES
from .families import TensorTable
from .pipeline import PackOptions, expert_layers
from .plan import Plan, predict
from .shapes import tensors_of
from .target import FIRST_SHARE
from .text import window_length

ROUTING_BYTES = 8
"""An expert's number and weight."""
LAUNCH_SECONDS = 3.5
"""torchrun imports torch before it starts the ranks."""
COPIES = 4
"""Of what a rank sends at once: in parts and in one piece, and the same of what it gets."""
HIDDEN_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Machines:
    """What a run has.

    Attributes
    ----------
    nodes : int
    ranks_per_node : int
        Processes: one for each GPU, or as many as are started.
    link : float
        Bytes per second of a node to the others.
    """

    nodes: int
    ranks_per_node: int
    link: float

    @property
    def ranks(self) -> int:
        """All processes."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class SpreadPlan:
    """A prediction of a run with many ranks.

    Attributes
    ----------
    ranks, nodes : int
    seconds : float
        In all.
    start_seconds, compute_seconds, search_seconds, network_seconds : float
        Of that: before there is anything to divide; packing, and finding lambda, by the rank that has most to
        do; what travels between nodes, as if nothing else went on meanwhile.
    peak_memory_bytes : int
        Of each rank.
    sent_bytes : int
        From rank to rank, in the whole run.
    disk_bytes : int
        On the file system of OUT at the end, with the activations and results that lie there meanwhile.
    """

    ranks: int
    nodes: int
    seconds: float
    start_seconds: float
    compute_seconds: float
    search_seconds: float
    network_seconds: float
    peak_memory_bytes: int
    sent_bytes: int
    disk_bytes: int

    def to_json(self) -> dict[str, object]:
        """All numbers."""
        return asdict(self)


def layer_bytes(
    layer: LayerSpec, tokens: int, choices: int, ranks: int, itemsize: int = 4, *, outputs: bool = True
) -> float:
    """Bytes that ranks send each other for a layer of experts: inputs, routing, and outputs if needed.

    Each token's experts are taken to lie on any rank alike.
    """
    width = next(p.columns for p in layer.projections if p.role == "up")
    elsewhere = (ranks - 1) / ranks
    inputs = tokens * width * itemsize * ranks_of(choices, ranks) * elsewhere
    returned = tokens * width * 4 * choices * elsewhere if outputs else 0.0
    return inputs + returned + tokens * choices * ROUTING_BYTES * (ranks - 1)


def ranks_of(choices: int, ranks: int) -> float:
    """How many ranks a token goes to, its experts lying on any rank alike."""
    return ranks * (1 - (1 - 1 / ranks) ** choices)


def imbalance(layers: Sequence[LayerSpec], ranks: int) -> float:
    """How many times longer the busiest rank works than the average one, if all experts take as long."""
    busiest = sum(-(-layer.experts // ranks) for layer in layers)
    return busiest * ranks / sum(layer.experts for layer in layers)


def predict_spread(
    source: str | os.PathLike[str], options: PackOptions, machines: Machines
) -> tuple[Plan, SpreadPlan]:
    """Predict a calibrated run with many ranks; nothing is written.

    Parameters
    ----------
    source : str or Path
    options : PackOptions
        With calibration by text.
    machines : Machines

    Returns
    -------
    Plan
        Of one rank, with as many experts at once as it would have among others.
    SpreadPlan

    Raises
    ------
    ArgumentError
        There is no text, or there are more ranks than experts of a layer.
    QMoEError
        As :func:`.plan.predict`.
    """
    calibration, ranks = options.calibration, machines.ranks
    if calibration is None or calibration.text is None:
        raise ArgumentError("predicted for calibrated runs", field="--nodes, --gpus", expected="--calib TEXT")
    path = locate(source, only_config=True)
    tensors: TensorTable
    if has_weights(path):
        checkpoint = SourceCheckpoint(path)
        config, tensors = checkpoint.config, checkpoint.tensors
    else:
        config = ModelConfig.read(path if path.is_file() else path / "config.json")
        tensors = tensors_of(config)
    layers = expert_layers(config, tensors)
    least = min(layer.experts for layer in layers)
    if ranks > least:
        raise ArgumentError(
            "more ranks than experts of a layer",
            field="--nodes, --gpus",
            value=ranks,
            expected=f"at most {least}",
        )
    size = -(-calibration.hessian.experts_per_batch // ranks)
    share = replace(calibration, hessian=replace(calibration.hessian, experts_per_batch=size))
    plan = predict(source, replace(options, calibration=share))
    assert plan.seconds is not None
    tokens = calibration.text.samples * window_length(calibration.text, config)
    if config.truth("is_encoder_decoder", config.text("model_type") == "switch_transformers"):
        tokens //= 2
    choices = config.number("num_experts_per_tok", 1)
    itemsize = HIDDEN_BYTES[calibration.stream.dtype]
    # Nothing comes behind the last layer of experts that would read what they give
    sent = sum(
        layer_bytes(layer, tokens, choices, ranks, itemsize, outputs=layer is not layers[-1])
        for layer in layers
    )
    if options.target_bits is not None:
        sent *= 1 + 1 / FIRST_SHARE + SECOND_LOOKS
    sent += plan.expert_packed_bytes * (ranks - 1) / ranks
    # Of what a rank sends, this share leaves its node
    leaves = (ranks - machines.ranks_per_node) / (ranks - 1) if ranks > 1 else 0.0
    network = sent * leaves / machines.nodes / machines.link
    divided = imbalance(layers, ranks) / ranks
    compute = (plan.seconds - plan.search_seconds - START_SECONDS) * divided
    search = plan.search_seconds * divided
    begin = START_SECONDS + LAUNCH_SECONDS
    width = max(p.columns for layer in layers for p in layer.projections if p.role == "up")
    # What a layer reads, what its experts read, where they are, and the sum of what they give; then the next
    # layer's, or before that, among others, what each expert gives; and what they read before it was sent.
    rows = itemsize * (1 + ranks_of(choices, ranks)) + 4
    rows += max(itemsize, 4 * choices) + itemsize if ranks > 1 else itemsize
    spread = SpreadPlan(
        ranks=ranks,
        nodes=machines.nodes,
        seconds=begin + compute + search + network,
        start_seconds=begin,
        compute_seconds=compute,
        search_seconds=search,
        network_seconds=network,
        peak_memory_bytes=plan.peak_memory_bytes + (COPIES * EXCHANGE_BYTES if ranks > 1 else 0),
        sent_bytes=round(sent),
        disk_bytes=plan.packed_bytes + round(tokens * width * rows),
    )
    return plan, spread
