"""The calibrated recipes, against brute force, the authors' own results, and each other."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qmoe_codec import round_levels
from qmoe_codec.errors import ArgumentError
from qmoe_quantize.fit import RIDGE, Target, TernaryFit
from qmoe_quantize.gptq import Penalty, dequantized, descend, feedback, inverse_factor
from qmoe_quantize.nearest import ternarize
from qmoe_quantize.problem import MatrixGroup
from qmoe_quantize.recipes import Problem, RecipeSettings, ternarize_group
from qmoe_quantize.ternary import TernaryMatrix

GOLDEN = Path(__file__).parent / "golden"


def values(matrix: TernaryMatrix) -> np.ndarray[Any, np.dtype[np.float32]]:
    low, high = matrix.levels[:, :1], matrix.levels[:, 1:]
    return np.where(matrix.trits > 0, high, np.where(matrix.trits < 0, low, np.float32(0)))


def group_of(
    weight: torch.Tensor, inputs: list[torch.Tensor], prior: torch.Tensor | None = None, tokens: int = 0
) -> MatrixGroup:
    """A group whose experts saw `inputs`."""
    total = tokens or max(1, sum(map(len, inputs)))
    return MatrixGroup(
        names=tuple(f"experts.{number}.up_proj.weight" for number in range(len(weight))),
        weight=weight,
        hessian=torch.stack([x.T @ x for x in inputs]) / total,
        prior=torch.zeros(1, *weight.shape[2:], weight.shape[2]) if prior is None else prior,
        tokens=torch.tensor([len(x) for x in inputs]),
        calibration_tokens=total,
        row_weight=torch.ones(weight.shape[:2]),
    )


def trained_like(
    seed: int, experts: int = 2, rows: int = 48, columns: int = 160, tokens: int = 600, kind: str = "normal"
) -> MatrixGroup:
    """Weights and correlated inputs with a few strong directions, as trained layers have."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = normal(experts, rows, columns) * (0.5 + torch.rand(experts, rows, 1, generator=generator))
    scale = torch.exp(normal(columns))
    if kind == "heavy":  # Student's t with three degrees of freedom
        weight = weight / normal(experts, rows, columns, 3).square().mean(-1).sqrt()
    if kind == "outliers":  # large weights that meet large activations
        weight[:, :, ::40] *= 8
        scale[::40] *= 12
    mixing = normal(columns, columns) / columns**0.5
    inputs = [
        (normal(tokens, columns) @ mixing + 0.3 * normal(tokens, columns)) * scale for _ in range(experts)
    ]
    prior = torch.stack([x.T @ x / len(x) for x in inputs]).mean(0, keepdim=True)
    return group_of(weight / columns**0.5, inputs, prior)


def entropy_bits(trits: np.ndarray[Any, np.dtype[np.int8]]) -> float:
    """Bits of a matrix, each row at the entropy of its own density."""
    share = np.count_nonzero(trits, axis=1) / trits.shape[1]
    share = np.clip(share, 1e-9, 1 - 1e-9)
    return float((-(1 - share) * np.log2(1 - share) - share * np.log2(share / 2)).sum() * trits.shape[1])


def test_the_paper_recipe_equals_the_authors_code() -> None:
    """`quantized` is what batch_gptq of github.com/IST-DASLab/qmoe at 9110baa made of this input, once.

    Among its rows are one without negative weights, one without positive ones, one of zeros and one with an
    outlier; among its experts one without tokens, one with fewer tokens than columns, one with a dead input.
    """
    with np.load(GOLDEN / "qmoe_gptq.npz") as golden:
        weight = torch.from_numpy(golden["weight"]).view(torch.bfloat16).float()
        expected = torch.from_numpy(golden["quantized"]).view(torch.bfloat16).float().numpy()
        inputs = torch.from_numpy(golden["inputs"]).float().split(golden["tokens"].tolist())
    matrices = ternarize_group(group_of(weight, list(inputs)), RecipeSettings("qmoe", "bfloat16", damp=0.1))
    np.testing.assert_array_equal(np.stack([values(matrix) for matrix in matrices]), expected)
    assert [matrix.report.get("fallback") for matrix in matrices] == [
        None,
        None,
        "rounded to nearest: it saw no tokens",
        None,
    ]


def test_factors_do_not_depend_on_the_number_of_threads() -> None:
    inputs = torch.randn(700, 512, generator=torch.Generator().manual_seed(0))
    hessian = (inputs.T @ inputs / 700)[None]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(inverse_factor(hessian, damp=0.1)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = trained_like(1).hessian
    factor, singular = inverse_factor(hessian, damp=0.01)
    damped = hessian + 0.01 * torch.diag_embed(
        hessian.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(2, 160)
    )
    torch.testing.assert_close(factor.transpose(1, 2) @ factor @ damped, torch.eye(160).expand(2, -1, -1),
                               atol=2e-3, rtol=0)  # fmt: skip
    assert not singular


@pytest.mark.parametrize("fault", ["nan", "indefinite"])
def test_a_hessian_that_cannot_be_factored_is_reported(fault: str) -> None:
    group = trained_like(2, experts=3)
    group.hessian[1] = torch.nan if fault == "nan" else -group.hessian[1] - 5 * torch.eye(160)
    for settings in (RecipeSettings("qmoe", "bfloat16"), RecipeSettings("rd", lam=1e-3, shrinkage=0)):
        matrices = ternarize_group(group, settings)
        reasons = [matrix.report.get("fallback") for matrix in matrices]
        assert reasons[0] is reasons[2] is None
        assert "Hessian" in str(reasons[1]) or "zero" in str(reasons[1])
        # The others are what they would be without it.
        alone = ternarize_group(group.select([0, 2]), settings)
        if settings.method == "qmoe":
            np.testing.assert_array_equal(matrices[0].trits, alone[0].trits)
            nearest, _ = ternarize(group.weight[1].numpy(), "minmax", "bfloat16")
            np.testing.assert_array_equal(matrices[1].trits, nearest)


@given(st.integers(0, 1000), st.floats(0, 0.3))
def test_descent_never_raises_the_cost(seed: int, price: float) -> None:
    group = trained_like(seed, experts=2, rows=5, columns=17, tokens=40)
    hessian = group.hessian + 0.01 * torch.eye(17)
    target = Target.of(group.weight, hessian)
    generator = torch.Generator().manual_seed(seed)
    trits = torch.randint(-1, 2, group.weight.shape, generator=generator).to(torch.int8)
    levels = torch.stack((group.weight.amin(-1).clamp_max(0), group.weight.amax(-1).clamp_min(0)), dim=-1)
    penalty = Penalty(torch.full(group.weight.shape[:2], price), torch.full(group.weight.shape[:2], 2.0))

    def cost(trits: torch.Tensor) -> torch.Tensor:
        return TernaryFit(target, trits).error(levels) + penalty.nonzero * (trits != 0).sum(-1)

    before = cost(trits)
    after = cost(descend(TernaryFit(target, trits).gradient(levels), hessian, trits, levels, penalty))
    assert (after <= before * (1 + 1e-4) + 1e-6).all()


def test_a_column_takes_its_best_value() -> None:
    """With a diagonal Hessian every column stands alone, and brute force is easy."""
    weight = torch.linspace(-1, 1, 41).reshape(1, 1, 41)
    hessian = torch.diag_embed(torch.linspace(0.1, 3, 41))[None]
    levels = torch.tensor([[[-0.7, 0.9]]])
    penalty = Penalty(torch.tensor([[0.05]]), torch.tensor([[3.0]]))
    choices = torch.tensor([-1, 0, 1], dtype=torch.int8)
    costs = torch.stack(
        [
            hessian[0].diagonal() * (weight[0, 0] - value) ** 2 + 0.15 * (value != 0)
            for value in (-0.7, 0.0, 0.9)
        ]
    )
    best = choices[costs.argmin(0)]
    start = torch.zeros((1, 1, 41), dtype=torch.int8)
    target = Target.of(weight, hessian)
    swept = descend(TernaryFit(target, start).gradient(levels), hessian, start, levels, penalty)
    assert torch.equal(swept[0, 0], best)
    factor, _ = inverse_factor(hessian, damp=0.0)
    assert torch.equal(feedback(weight, factor, levels, penalty)[0, 0], best)


@given(st.integers(0, 1000))
def test_fitted_levels_are_the_best(seed: int) -> None:
    group = trained_like(seed, experts=1, rows=6, columns=20, tokens=60)
    target = Target.of(group.weight, group.hessian)
    start = torch.stack((group.weight.amin(-1), group.weight.amax(-1)), dim=-1)
    trits = (group.weight > start[..., 1:] / 3).to(torch.int8) - (group.weight < start[..., :1] / 3).to(
        torch.int8
    )
    fit = TernaryFit(target, trits)
    levels = fit.levels(start)
    assert (levels[..., 0] <= 0).all() and (levels[..., 1] >= 0).all()
    error = group.weight - dequantized(trits, levels)
    # float32 sums of terms that cancel: near in the measure of the largest term
    tiny = 1e-5 * float(target.power.max())
    expected = ((error @ group.hessian) * error).sum(-1)
    torch.testing.assert_close(fit.error(levels), expected, rtol=1e-3, atol=tiny)
    tiny = 1e-5 * float(target.product.abs().max())
    torch.testing.assert_close(fit.gradient(levels), error @ group.hessian, rtol=1e-3, atol=tiny)
    # What is minimised is the error and a weak pull towards where the levels were.
    sides = torch.stack(((trits < 0).float(), (trits > 0).float()))
    pull = RIDGE * ((sides @ group.hessian) * sides).sum(-1).amax(0)

    def cost(levels: torch.Tensor) -> torch.Tensor:
        return fit.error(levels) + pull * (levels - start).square().sum(-1)

    fitted = (levels != start).all(-1)
    for change in ((0.02, 0), (-0.02, 0), (0, 0.02), (0, -0.02)):
        other = levels * (1 + torch.tensor(change))
        assert (cost(levels) <= cost(other) * (1 + 1e-4) + 1e-5 * target.power)[fitted].all()
    assert (cost(levels) <= cost(start) * (1 + 1e-4) + 1e-5 * target.power).all()


def test_levels_are_kept_where_a_row_does_not_tell() -> None:
    weight = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(3))
    target = Target.of(weight, torch.eye(12)[None])
    trits = torch.zeros((1, 3, 12), dtype=torch.int8)
    trits[0, 1] = torch.where(weight[0, 1] > 0, 1, 0)
    before = torch.tensor([[[-1.5, 2.5]] * 3])
    levels = TernaryFit(target, trits).levels(before)
    assert torch.equal(levels[0, 0], before[0, 0]) and levels[0, 1, 0] == -1.5 and levels[0, 1, 1] < 2.5


def at_bits(group: MatrixGroup, bits: float, settings: RecipeSettings) -> TernaryMatrix:
    """What a group's only matrix becomes by `rd` with no more than `bits`: the best lambda, by bisection."""
    low, high, best = 1e-10, 1e3, None
    for _ in range(12):  # to within 0.7 %
        lam = (low * high) ** 0.5
        (matrix,) = ternarize_group(group, replace(settings, lam=lam))
        if entropy_bits(matrix.trits) > bits:
            low = lam
        else:
            high, best = lam, matrix
    assert best is not None
    return best


@pytest.mark.parametrize("kind", ["normal", "heavy", "outliers"])
def test_rd_is_no_worse_than_the_paper_on_any_matrix(kind: str) -> None:
    group = trained_like(11, experts=1, kind=kind)
    paper = ternarize_group(group, RecipeSettings("qmoe", "bfloat16"))[0]
    ours = at_bits(group, entropy_bits(paper.trits), RecipeSettings("rd", "bfloat16", shrinkage=0))
    error = {recipe: float(str(m.report["output_error"])) for recipe, m in (("qmoe", paper), ("rd", ours))}
    assert error["rd"] <= 0.8 * error["qmoe"], error


@pytest.mark.parametrize("tokens", [0, 16, 64])
def test_rare_experts_are_no_worse_than_rounding(tokens: int) -> None:
    """On tokens that calibration did not see, at no more bits than round-to-nearest."""
    full = trained_like(5, experts=1, tokens=4000)
    generator = torch.Generator().manual_seed(9)
    factor = torch.linalg.cholesky(full.prior[0] + 1e-4 * torch.eye(160))
    seen = torch.randn(tokens, 160, generator=generator) @ factor.T
    unseen = torch.randn(2000, 160, generator=generator) @ factor.T
    group = replace(group_of(full.weight, [seen], full.prior, tokens=2000))
    for rule in ("minmax", "lsq"):
        trits, levels = ternarize(group.weight[0].numpy(), rule, "bfloat16")
        nearest = TernaryMatrix(trits, levels, 0.0, 0.0)
        best = at_bits(group, entropy_bits(trits), RecipeSettings("rd", "bfloat16"))
        errors = [
            float(((unseen.numpy() @ (group.weight[0].numpy() - values(matrix)).T) ** 2).sum())
            for matrix in (best, nearest)
        ]
        assert errors[0] <= errors[1], (rule, errors)


def test_strong_inputs_of_others_do_not_outweigh_an_experts_own() -> None:
    """Weak inputs unlike those of the layer: on tokens not seen, `rd` is no worse than `qmoe` at its bits."""
    full = trained_like(14, experts=1, tokens=4000)
    own, others = (trained_like(seed, experts=1, tokens=2000).hessian[0] for seed in (15, 16))
    generator = torch.Generator().manual_seed(17)
    factor = torch.linalg.cholesky(own + 1e-4 * torch.eye(160)).T
    seen, unseen = torch.randn(2, 1000, 160, generator=generator) @ factor
    errors = {}
    for strength in (1, 1000):
        group = group_of(full.weight, [seen], strength * others[None], tokens=2000)
        (paper,) = ternarize_group(group, RecipeSettings("qmoe"))
        ours = at_bits(group, entropy_bits(paper.trits), RecipeSettings("rd"))
        lost = [unseen.numpy() @ (full.weight[0].numpy() - values(matrix)).T for matrix in (ours, paper)]
        errors[strength] = [float((outputs**2).sum()) for outputs in lost]
    assert all(ours <= 0.8 * paper for ours, paper in errors.values()), errors
    assert errors[1000][0] <= 1.2 * errors[1][0]


@pytest.mark.parametrize("tokens", [0, 40, 1000])
def test_rd_makes_up_for_what_its_inputs_have_lost(tokens: int) -> None:
    """On tokens that calibration did not see: some inputs have shrunk, and all have noise on them."""
    full = trained_like(12, experts=1, tokens=2000)
    generator = torch.Generator().manual_seed(13)
    factor = torch.linalg.cholesky(full.prior[0] + 1e-4 * torch.eye(160)).T

    def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        given = torch.randn(count, 160, generator=generator) @ factor
        lost = 0.7 * given + 0.1 * torch.randn(count, 160, generator=generator) @ factor
        return given, lost

    (given, lost), (sample, lost_sample), (unseen, lost_unseen) = pairs(tokens), pairs(500), pairs(2000)
    total = 4000
    plain = replace(
        group_of(full.weight, [lost], tokens=total), prior=(lost_sample.T @ lost_sample)[None] / 500
    )
    told = replace(
        plain,
        drift=((given - lost).T @ lost / total)[None],
        prior_drift=((sample - lost_sample).T @ lost_sample / 500)[None],
    )
    settings = RecipeSettings("rd", lam=1e-5)
    errors = []
    for group in (told, plain):
        (matrix,) = ternarize_group(group, settings)
        got = lost_unseen.numpy() @ values(matrix).T
        errors.append(float(((unseen.numpy() @ full.weight[0].numpy().T - got) ** 2).sum()))
    assert errors[0] < 0.85 * errors[1], errors
    # The paper's recipe does nothing of the kind.
    paper = [ternarize_group(group, RecipeSettings("qmoe"))[0].trits for group in (told, plain)]
    np.testing.assert_array_equal(*paper)


def test_more_lambda_means_fewer_bits() -> None:
    group = trained_like(4)
    bits = [
        sum(entropy_bits(m.trits) for m in ternarize_group(group, RecipeSettings("rd", lam=lam)))
        for lam in (1e-5, 1e-4, 1e-3, 1e-2)
    ]
    assert all(after < before for before, after in itertools.pairwise(bits))


def test_an_expert_does_not_depend_on_its_group() -> None:
    group = trained_like(6, experts=3)
    for settings in (RecipeSettings("rd", lam=1e-3), RecipeSettings("qmoe")):
        together = ternarize_group(group, settings)
        for expert in range(3):
            alone = ternarize_group(group.select([expert]), settings)[0]
            assert (together[expert].trits != alone.trits).mean() < 0.01


def test_the_result_is_deterministic_and_stored_exactly() -> None:
    group = trained_like(7)
    settings = RecipeSettings("rd", "e4m4", lam=1e-3)
    first, second = ternarize_group(group, settings), ternarize_group(group, settings)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.trits, b.trits)
        np.testing.assert_array_equal(a.levels, b.levels)
        np.testing.assert_array_equal(round_levels(a.levels, "e4m4"), a.levels)
        error = (group.weight[0].numpy() if a is first[0] else group.weight[1].numpy()) - values(a)
        assert a.squared_error == pytest.approx(float((error.astype(np.float64) ** 2).sum()), rel=1e-4)


def test_outputs_that_never_arrive_take_no_bits() -> None:
    group = trained_like(8)
    group.row_weight[:, ::2] = 0
    for matrix in ternarize_group(group, RecipeSettings("rd", lam=1e-4)):
        assert not matrix.trits[::2].any() and matrix.trits[1::2].any()


def test_a_rule_changes_the_tensors_it_names() -> None:
    group = trained_like(9)
    plain = RecipeSettings("rd", lam=1e-3)
    ruled = replace(plain, rules=((r"experts\.1\.", {"lam": 1e-1}),))
    a, b = ternarize_group(group, plain), ternarize_group(group, ruled)
    np.testing.assert_array_equal(a[0].trits, b[0].trits)
    assert entropy_bits(b[1].trits) < 0.7 * entropy_bits(a[1].trits)
    assert b[1].report["lam"] == 1e-1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"method": "best"}, "method"),
        ({"level_format": "int4"}, "level_format"),
        ({"lam": -1.0}, "lam"),
        ({"lam": float("nan")}, "lam"),
        ({"damp": "much"}, "damp"),
        ({"sweeps": 1.5}, "sweeps"),
        ({"rules": (("(", {}),)}, "rules"),
        ({"rules": (("up", {"colour": 1}),)}, "rules"),
        ({"rules": (("up", {"lam": -1}),)}, "lam"),
    ],
)
def test_illegal_settings(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        RecipeSettings(**changes)
    assert caught.value.field == field


def test_the_weights_of_a_problem_are_its_group() -> None:
    group = trained_like(10)
    problem = Problem.of(group, RecipeSettings("rd", lam=1e-3))
    assert problem.target.weight is group.weight and not problem.fallbacks
