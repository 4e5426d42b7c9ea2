"""Predicting a run of many ranks from a prediction for one: time, memory, what travels; see NOTES.md."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from qmoe_codec.errors import ArgumentError

from qmoe_format.container import LayerSpec

from .checkpoint import SourceCheckpoint, has_weights, locate
from .config import ModelConfig
from .families import TensorTable
from .pipeline import PackOptions, expert_layers
from .plan import Plan, predict
from .shapes import tensors_of
from .text import window_length

ROUTING_BYTES = 8
"""An expert's number and weight."""
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
    compute_seconds, search_seconds, network_seconds : float
        Of that: what is divided; what one rank does alone; what travels between nodes, as if nothing else
        went on meanwhile.
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
    compute_seconds: float
    search_seconds: float
    network_seconds: float
    peak_memory_bytes: int
    sent_bytes: int
    disk_bytes: int

    def to_json(self) -> dict[str, object]:
        """All numbers."""
        return asdict(self)


def layer_bytes(layer: LayerSpec, tokens: int, choices: int, ranks: int, itemsize: int = 4) -> float:
    """Bytes that ranks send each other for a layer of experts: inputs, outputs, routing.

    Each token's experts are taken to lie on any rank alike.
    """
    width = next(p.columns for p in layer.projections if p.role == "up")
    elsewhere = (ranks - 1) / ranks
    hit = ranks * (1 - (1 - 1 / ranks) ** choices)  # ranks that a token goes to
    inputs = tokens * width * itemsize * hit * elsewhere
    outputs = tokens * width * 4 * choices * elsewhere
    return inputs + outputs + tokens * choices * ROUTING_BYTES * (ranks - 1)


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
    sent = sum(layer_bytes(layer, tokens, choices, ranks, itemsize) for layer in layers)
    sent += plan.expert_packed_bytes * (ranks - 1) / ranks
    # Of what a rank sends, this share leaves its node
    leaves = (ranks - machines.ranks_per_node) / (ranks - 1) if ranks > 1 else 0.0
    network = sent * leaves / machines.nodes / machines.link
    compute = (plan.seconds - plan.search_seconds) / ranks * imbalance(layers, ranks)
    width = max(p.columns for layer in layers for p in layer.projections if p.role == "up")
    # Hidden states before and after a layer, inputs of its experts where they are, and what they give
    activations = tokens * width * (2 * itemsize + itemsize * min(ranks, choices) + 4 * choices)
    spread = SpreadPlan(
        ranks=ranks,
        nodes=machines.nodes,
        seconds=compute + plan.search_seconds + network,
        compute_seconds=compute,
        search_seconds=plan.search_seconds,
        network_seconds=network,
        peak_memory_bytes=plan.peak_memory_bytes,
        sent_bytes=round(sent),
        disk_bytes=plan.packed_bytes + activations,
    )
    return plan, spread
