"""The calibrated recipes: `qmoe`, the paper's own, and `rd`, which trades squared error against bits.

Both ternarize the same projection of a group of experts at once and go the same way: levels, error feedback
(:mod:`.gptq`), and for `rd` the choice among several starts, refitted levels (:mod:`.fit`) and coordinate
descent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np
import torch
from qmoe_codec import round_levels
from qmoe_codec.errors import ArgumentError
from qmoe_codec.layout import LEVEL_FORMATS
from torch import Tensor

from .fit import Target, TernaryFit
from .gptq import Penalty, dequantized, descend, feedback, inverse_factor
from .problem import MatrixGroup
from .ternary import TernaryMatrix

CALIBRATED_METHODS = ("qmoe", "rd")

STARTS = (1.8, 2.4, 3.2)
"""Levels that `rd` starts from, in standard deviations of the row; the row's extremes are one more start."""
FIRST_NONZERO_BITS = 2.5
"""What a non-zero is taken to cost beyond a zero before a row has been ternarized once: about p(0) = 0.74."""
PRIOR_SHARE = 1 / 2
"""Tokens that the router sends to an expert are alike: a sample of all tokens must not outweigh them."""
LEAST_PRIOR = 1 / 4
"""Of :attr:`RecipeSettings.shrinkage`: few tokens say little, even if they are alike."""
DENSITY_WEIGHTS = 32
"""A row's density of zeros is estimated as if it had this many more weights, of the matrix's mean density."""


@dataclass(frozen=True)
class RecipeSettings:
    """How a calibrated recipe ternarizes.

    Attributes
    ----------
    method : {"qmoe", "rd"}
    level_format : {"e4m4", "bfloat16", "float16", "float32"}
        How levels are stored (spec 4.1).
    lam : float
        For `rd`: mean squared error of the layer's output, per calibration token, that one bit is worth.
    damp : float
        Share of the mean of the Hessian's diagonal that is added to it; 0.1 in the paper.
    shrinkage : float
        For `rd`: how many tokens the prior Hessian counts for beside those that an expert has seen, at most:
        it counts for :data:`PRIOR_SHARE` of those, and for no less than :data:`LEAST_PRIOR` of `shrinkage`;
        and for less by as much as the expert's inputs are weaker.
    sweeps : int
        For `rd`: sweeps of coordinate descent, each after the levels are fitted again.
    rules : tuple of (str, dict)
        Regular expressions and what they change of the above; the first that is found in a tensor's name
        decides.

    Raises
    ------
    ArgumentError
        A value is illegal.
    """

    method: str = "rd"
    level_format: str = "e4m4"
    lam: float = 0.0
    damp: float = 0.1
    shrinkage: float = 512.0
    sweeps: int = 6
    rules: tuple[tuple[str, Mapping[str, object]], ...] = field(default=())

    def __post_init__(self) -> None:
        for name, choices in (("method", CALIBRATED_METHODS), ("level_format", LEVEL_FORMATS)):
            if getattr(self, name) not in choices:
                raise ArgumentError(
                    "unknown", field=name, value=getattr(self, name), expected=" or ".join(choices)
                )
        for name in ("lam", "damp", "shrinkage", "sweeps"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise ArgumentError("illegal", field=name, value=value, expected="a number, 0 or more")
        if not isinstance(self.sweeps, int):
            raise ArgumentError("illegal", field="sweeps", value=self.sweeps, expected="an integer")
        names = {known.name for known in fields(self)} - {"method", "level_format", "rules"}
        for pattern, changes in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ArgumentError(
                    f"no regular expression: {error}", field="rules", value=pattern, expected="one"
                ) from error
            if unknown := sorted(changes.keys() - names):
                raise ArgumentError(
                    "no setting that a rule can change",
                    field="rules",
                    value=unknown[0],
                    expected=" or ".join(sorted(names)),
                )
            replace(self, rules=(), **changes)  # type: ignore[arg-type]  # checks the values

    @property
    def gate_weighting(self) -> bool:
        """Whether a token counts in the Hessian with its squared router weight; in the paper it does not."""
        return self.method == "rd"

    def of_tensor(self, name: str) -> RecipeSettings:
        """The settings for one tensor, the rules applied."""
        for pattern, changes in self.rules:
            if re.search(pattern, name):
                return replace(self, rules=(), **changes)  # type: ignore[arg-type]
        return replace(self, rules=())

    def to_json(self) -> dict[str, object]:
        """All settings that the method uses: what ``config.json`` says, and what resuming compares."""
        values = asdict(self)
        if self.method == "qmoe":
            values = {name: values[name] for name in ("method", "level_format", "damp")}
        elif not self.rules:
            del values["rules"]
        return values


def ternarize_group(group: MatrixGroup, settings: RecipeSettings) -> list[TernaryMatrix]:
    """Ternarize the same projection of a group of experts.

    The result for an expert does not depend on which others are in its group, apart from the rounding of
    batched products.

    Parameters
    ----------
    group : MatrixGroup
    settings : RecipeSettings

    Returns
    -------
    list of TernaryMatrix
        One for each expert. Their reports hold ``recipe``, ``tokens``, ``sparsity``, ``output_error`` (share
        of the layer's mean squared output, per calibration token), ``relative_output_error``, ``damp``, and
        where it applies ``fallback`` with the reason.
    """
    members: dict[str, tuple[RecipeSettings, list[int]]] = {}
    for index, name in enumerate(group.names):
        own = settings.of_tensor(name)
        members.setdefault(repr(own), (own, []))[1].append(index)
    matrices: dict[int, TernaryMatrix] = {}
    for own, indices in members.values():
        part = group if len(members) == 1 else group.select(indices)
        matrices.update(zip(indices, _ternarize(part, own), strict=True))
    return [matrices[index] for index in range(len(group.names))]


def _ternarize(group: MatrixGroup, settings: RecipeSettings) -> list[TernaryMatrix]:
    problem = Problem.of(group, settings)
    trits, levels = _qmoe(problem) if settings.method == "qmoe" else _rate_distortion(problem)
    return _results(problem, trits, levels)


@dataclass(frozen=True)
class Problem:
    """A group with its Hessians made definite and factored.

    Attributes
    ----------
    group : MatrixGroup
    settings : RecipeSettings
    target : Target
        The weights that are to be approximated, in the measure of the damped Hessian: the group's own or, for
        `rd`, those that make up best for what its inputs have lost.
    factor : Tensor
        float32 [E, C, C] of :func:`.gptq.inverse_factor`.
    fallbacks : dict
        Why an expert is rounded to nearest.
    """

    group: MatrixGroup
    settings: RecipeSettings
    target: Target
    factor: Tensor
    fallbacks: Mapping[int, str]

    @classmethod
    def of(cls, group: MatrixGroup, settings: RecipeSettings) -> Problem:
        """Damp and factor the Hessians; `rd` adds the prior before."""
        hessian = group.hessian
        share = _prior_share(group, settings)[:, None, None]
        if settings.method == "rd":
            hessian = hessian + share * group.prior
        fallbacks: dict[int, str] = {}
        diagonal = torch.arange(hessian.shape[-1], device=hessian.device)
        scale = hessian[:, diagonal, diagonal].mean(dim=-1)
        finite = torch.isfinite(hessian).flatten(1).all(dim=1)
        for expert in (~finite).nonzero().flatten().tolist():
            fallbacks[expert] = "its Hessian is not finite"
        for expert in (finite & ~(scale > 0)).nonzero().flatten().tolist():
            fallbacks[expert] = "it saw no tokens" if not group.tokens[expert] else "its inputs are all zero"
        usable = torch.tensor([e not in fallbacks for e in range(len(scale))], device=scale.device)
        # Experts without a Hessian of their own: every input counts alike, and as much as with the others.
        usual = scale[usable].mean() if usable.any() else scale.new_ones(())
        scale = torch.where(usable, scale, usual)
        identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
        normalized = torch.where(usable[:, None, None], hessian / scale[:, None, None], identity)
        factor, singular = inverse_factor(normalized, settings.damp)
        for expert in singular:
            fallbacks.setdefault(expert, "its Hessian cannot be factored")
            normalized[expert] = identity
        normalized[:, diagonal, diagonal] += settings.damp
        damped = normalized * scale[:, None, None]
        factor = factor / scale.sqrt()[:, None, None]
        weight = group.weight
        if settings.method == "rd" and group.drift is not None and group.prior_drift is not None:
            drift = group.drift + share * group.prior_drift
            drift[sorted(fallbacks)] = 0.0
            # argmin over V of the error of V x against W x': W E[x' x^T] E[x x^T]^-1
            weight = weight + weight @ drift @ factor.transpose(1, 2) @ factor
        return cls(group, settings, Target.of(weight, damped), factor, fallbacks)


def _prior_share(group: MatrixGroup, settings: RecipeSettings) -> Tensor:
    """What the prior is multiplied with before it is added to the experts' own Hessians: [E].

    Where an expert's inputs are weaker than the sample's, tokens of the sample count for less: else a few of
    them would outweigh all of its own.
    """
    most = settings.shrinkage
    counted = (PRIOR_SHARE * group.tokens).clamp(LEAST_PRIOR * most, most).to(group.hessian)
    own = torch.diagonal(group.hessian, dim1=1, dim2=2) * group.calibration_tokens
    sample = torch.diagonal(group.prior, dim1=1, dim2=2)
    tokens = group.tokens.to(own)[:, None]
    # A median, for the few strongest inputs would decide a mean
    power = torch.where((sample > 0) & (tokens > 0), own / (tokens * sample), 1.0)
    relative = power.median(dim=-1).values.clamp_max(1.0)
    return counted * relative / group.calibration_tokens


def _extremes(weight: Tensor) -> Tensor:
    """The least and greatest weight of each row, 0 where there is none of that sign: [E, R, 2]."""
    return torch.stack((weight.amin(-1).clamp_max(0.0), weight.amax(-1).clamp_min(0.0)), dim=-1)


def _rounded(levels: Tensor, level_format: str) -> Tensor:
    """Levels [E, R, 2] as they will be stored."""
    stored = [round_levels(matrix, level_format) for matrix in levels.cpu().numpy()]
    return torch.from_numpy(np.stack(stored)).to(levels.device)


def _qmoe(problem: Problem) -> tuple[Tensor, Tensor]:
    """QMoE, arXiv 2310.16795, section 3: levels at the row's extremes, threshold at half, error feedback."""
    weight = problem.group.weight
    levels = _rounded(_extremes(weight), problem.settings.level_format)
    return feedback(weight, problem.factor, levels), levels


def _rate_distortion(problem: Problem) -> tuple[Tensor, Tensor]:
    """Decisions that trade squared error against bits; of several starts, each row goes on from its best."""
    settings, target = problem.settings, problem.target
    # An output that never arrives is worth no bit.
    price = settings.lam / problem.group.row_weight.clamp_min(torch.finfo(torch.float32).tiny)
    price = price.clamp_max(torch.finfo(torch.float32).max)
    deviation = target.weight.std(dim=-1, correction=0)
    starts = [_extremes(target.weight)]
    starts += [torch.stack((-scale * deviation, scale * deviation), dim=-1) for scale in STARTS]
    best_trits, best_levels, best_cost = None, None, None
    for levels in starts:
        levels = _rounded(levels, settings.level_format)
        bits = torch.full_like(price, FIRST_NONZERO_BITS)
        trits = feedback(target.weight, problem.factor, levels, Penalty(price, bits))
        fit = TernaryFit(target, trits)
        levels = fit.levels(levels)
        cost = fit.error(levels) + price * _bits(trits)
        if best_trits is None or best_levels is None or best_cost is None:
            best_trits, best_levels, best_cost = trits, levels, cost
            continue
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best_trits = torch.where(better[..., None], trits, best_trits)
        best_levels = torch.where(better[..., None], levels, best_levels)
    assert best_trits is not None and best_levels is not None
    trits, levels = best_trits, best_levels
    fit = TernaryFit(target, trits)
    for _ in range(settings.sweeps):
        levels = _rounded(fit.levels(levels), settings.level_format)
        penalty = Penalty(price, _nonzero_bits(trits))
        trits = descend(fit.gradient(levels), target.hessian, trits, levels, penalty)
        fit = TernaryFit(target, trits)
    return trits, _rounded(fit.levels(levels), settings.level_format)


def _zero_density(trits: Tensor) -> Tensor:
    """Share of zeros of each row, [E, R], drawn towards the matrix's where rows are short."""
    zeros = (trits == 0).to(torch.float32)
    mean = zeros.mean(dim=(1, 2))[:, None]
    density = (zeros.sum(dim=-1) + DENSITY_WEIGHTS * mean) / (trits.shape[-1] + DENSITY_WEIGHTS)
    return density.clamp(1e-3, 1 - 1e-3)


def _nonzero_bits(trits: Tensor) -> Tensor:
    """Bits that a non-zero of each row takes beyond a zero, [E, R]: log2(p(0) / p(1)), with p(1) = p(-1)."""
    density = _zero_density(trits)
    return torch.log2(2 * density / (1 - density)).clamp_min(0.0)


def _bits(trits: Tensor) -> Tensor:
    """Bits that each row takes at the entropy of its density, [E, R]."""
    density = _zero_density(trits)
    nonzeros = (trits != 0).sum(dim=-1)
    zeros = trits.shape[-1] - nonzeros
    return -(zeros * torch.log2(density) + nonzeros * torch.log2((1 - density) / 2))


def _results(problem: Problem, trits: Tensor, levels: Tensor) -> list[TernaryMatrix]:
    """Copy the result to the host, with what it cost."""
    group, settings = problem.group, problem.settings
    error = group.weight - dequantized(trits, levels)
    squared_error = error.double().square().sum(dim=(1, 2)).tolist()
    squared_norm = group.weight.double().square().sum(dim=(1, 2)).tolist()
    # Without damping and prior: what the calibration tokens saw.
    target = problem.target.weight
    error = target - dequantized(trits, levels)
    row_error = ((error @ group.hessian) * error).sum(dim=-1)
    row_power = ((target @ group.hessian) * target).sum(dim=-1)
    output_error = (group.row_weight * row_error).double().sum(dim=-1).tolist()
    output_power = (group.row_weight * row_power).double().sum(dim=-1).tolist()
    results = []
    for index, (matrix, pair) in enumerate(zip(trits.cpu().numpy(), levels.cpu().numpy(), strict=True)):
        report: dict[str, object] = {
            "recipe": settings.method,
            "tokens": int(group.tokens[index]),
            "sparsity": float((matrix == 0).mean()),
            "output_error": output_error[index],
            "relative_output_error": output_error[index] / output_power[index]
            if output_power[index]
            else 0.0,
            "damp": settings.damp,
        }
        if settings.method == "rd":
            report["lam"] = settings.lam
            report["passes"] = settings.sweeps + 1
        if index in problem.fallbacks:
            report["fallback"] = f"rounded to nearest: {problem.fallbacks[index]}"
        results.append(TernaryMatrix(matrix, pair, squared_error[index], squared_norm[index], report))
    return results
