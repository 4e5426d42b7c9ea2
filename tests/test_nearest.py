"""Rounding to the nearest level: the paper's rule, and the levels with the least squared error."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from qmoe_codec import round_levels
from qmoe_codec.errors import ArgumentError
from qmoe_quantize.nearest import assign, squared_error, ternarize

LEVEL_FORMATS = ("float32", "bfloat16", "float16", "e4m4")


def values_of(trits: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return np.where(trits < 0, levels[:, :1], np.where(trits > 0, levels[:, 1:], np.float32(0)))


def error_of(weight: np.ndarray, rule: str, level_format: str = "bfloat16") -> np.ndarray:
    found = values_of(*ternarize(weight, rule, level_format))
    return ((weight.astype(np.float64) - found) ** 2).sum(axis=1)


weights = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=12),
    elements=st.one_of(
        st.just(0.0), st.floats(-4, 4, width=16), st.sampled_from([-0.5, 0.5, 1.0, 2.0**-9, -(2.0**-9)])
    ),
)


@given(weights, st.sampled_from(["minmax", "lsq"]), st.sampled_from(LEVEL_FORMATS))
def test_trits_are_nearest_and_levels_exact(weight: np.ndarray, rule: str, level_format: str) -> None:
    trits, levels = ternarize(weight, rule, level_format)
    assert trits.dtype == np.int8
    assert trits.shape == weight.shape
    assert levels.shape == (weight.shape[0], 2)
    pairs = levels
    assert (pairs[:, 0] <= 0).all()
    assert (pairs[:, 1] >= 0).all()
    assert np.array_equal(round_levels(pairs, level_format), pairs)
    w = weight
    distance = np.abs(w - values_of(trits, levels))
    for other in (np.zeros_like(w), pairs[:, :1], pairs[:, 1:]):
        assert (distance <= np.abs(w - other)).all()
    # A level that is 0 has no trit: the same matrix would have two encodings.
    assert not ((trits < 0) & (pairs[:, :1] == 0)).any()
    assert not ((trits > 0) & (pairs[:, 1:] == 0)).any()


@given(weights)
def test_minmax_is_the_rule_of_the_paper(weight: np.ndarray) -> None:
    trits, levels = ternarize(weight, "minmax", "float32")
    w = weight
    low, high = w.min(axis=1, initial=0), w.max(axis=1, initial=0)
    assert np.array_equal(levels, np.stack([low, high], axis=1))
    # quantize() of the authors' code: (x > high / 2) * high + (x < low / 2) * low
    paper = (w > high[:, None] / 2) * high[:, None] + (w < low[:, None] / 2) * low[:, None]
    assert np.array_equal(values_of(trits, levels), paper)


@given(weights, st.sampled_from(LEVEL_FORMATS))
def test_lsq_is_never_worse_than_minmax(weight: np.ndarray, level_format: str) -> None:
    assert (error_of(weight, "lsq", level_format) <= error_of(weight, "minmax", level_format)).all()


@pytest.mark.parametrize("draw", ["standard_normal", "random"], ids=["normal", "one sign"])
@pytest.mark.parametrize("level_format", LEVEL_FORMATS)
def test_lsq_on_trained_like_rows(draw: str, level_format: str) -> None:
    base = getattr(np.random.default_rng(1), draw)((64, 300), np.float32)
    for weight in (base, base**3, np.float32(1e-3) * base):
        better, worse = error_of(weight, "lsq", level_format), error_of(weight, "minmax", level_format)
        assert (better <= worse).all()
        assert better.sum() < 0.8 * worse.sum()


@given(arrays(np.float32, st.tuples(st.just(1), st.integers(1, 7)), elements=st.floats(-4, 4, width=16)))
def test_lsq_finds_the_best_partition(weight: np.ndarray) -> None:
    """Against every partition of a short row."""
    row = weight.astype(np.float64)[0]
    least = np.inf
    for choice in itertools.product((-1, 0, 1), repeat=row.size):
        t = np.array(choice)
        error = (row[t == 0] ** 2).sum()
        for sign in (-1, 1):
            chosen = row[t == sign]
            if chosen.size:
                mean = chosen.mean()
                # low <= 0 <= high
                error += ((chosen - (mean if sign * mean > 0 else 0)) ** 2).sum()
        least = min(least, error)
    assert error_of(weight, "lsq", "float32")[0] <= least + 1e-5


@pytest.mark.parametrize("rule", ["minmax", "lsq"])
def test_special_rows(rule: str) -> None:
    weight = np.array([[0, 0, 0, 0], [1, 1, 1, 1], [-2, -2, -2, -2], [0, 3, 0, -1], [0, 0, 0, 5]], np.float32)
    trits, levels = ternarize(weight, rule)
    assert np.array_equal(values_of(trits, levels), weight)


def test_a_level_that_rounds_to_zero_is_not_used() -> None:
    weight = np.array([[1e-12, -1e-12, 0.0]], np.float32)
    trits, levels = ternarize(weight, "minmax", "float16")
    assert not trits.any()
    assert not levels.any()


def test_half_way_becomes_zero() -> None:
    trits, _ = ternarize(np.array([[2.0, 1.0, -1.0, -2.0]], np.float32), "minmax")
    assert trits.tolist() == [[1, 0, 0, -1]]


def test_squared_error_is_that_of_the_assignment() -> None:
    weight = np.random.default_rng(3).standard_normal((17, 40), np.float32)
    trits, levels = ternarize(weight)
    expected = ((weight.astype(np.float64) - values_of(trits, levels)) ** 2).sum(axis=1)
    np.testing.assert_allclose(squared_error(weight, levels), expected, rtol=1e-6)
    assert np.array_equal(assign(weight, levels), trits)


@pytest.mark.parametrize(
    ("weight", "levels", "field"),
    [
        (np.zeros(3, np.float32), "minmax", "weight"),
        (np.zeros((3, 3)), "minmax", "weight"),
        (np.zeros((3, 3), np.float32), "mean", "levels"),
    ],
)
def test_wrong_arguments(weight: np.ndarray, levels: str, field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        ternarize(weight, levels)
    assert caught.value.field == field
