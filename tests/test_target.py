"""The search for the lambda of a wanted rate, over models whose rates are made up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qmoe_codec.errors import ArgumentError
from qmoe_quantize.allocation import RateCurve
from qmoe_quantize.recipes import RecipeSettings
from qmoe_quantize.target import MOST_LOOKS, NEAR, LambdaSearch

WEIGHTS = 8 * 10**6
FIRST_LAMS = np.logspace(-8, -2, 13)


class Model(LambdaSearch):
    """A layer of many weights that takes ``rate(lambda)`` bits for each, seen from `centre`."""

    def __init__(self, rate: Any) -> None:
        super().__init__([], None, RecipeSettings(), 0)  # type: ignore[arg-type]
        self.rate = rate
        self.centres: list[float] = []

    def _look(self, few: bool, begin: Any) -> list[RateCurve]:
        lam = begin.args[0]
        self.centres.append(lam)
        return [self.curve(np.array([lam / NEAR, lam, lam * NEAR]), lam)]

    def curve(self, lams: Any, centre: float) -> RateCurve:
        rates = np.array([self.rate(lam, centre) for lam in lams])
        return RateCurve(WEIGHTS, lams, np.minimum.accumulate(rates * WEIGHTS / 8))


def logistic(lam: float, middle: float, steepness: float) -> float:
    """From 1.6 bits to none."""
    return 1.6 / (1 + (lam / middle) ** steepness)


@settings(max_examples=50)
@given(
    target=st.floats(0.2, 1.4),
    shift=st.floats(-1.5, 1.5),
    steepness=st.floats(0.15, 0.8),
    other=st.floats(0.15, 0.8),
    wobble=st.floats(0, 0.03),
)
def test_a_rate_between_two_that_were_seen(
    target: float, shift: float, steepness: float, other: float, wobble: float
) -> None:
    """However far the first look is off, and though rates differ a little from look to look."""

    def rate(lam: float, centre: float) -> float:
        return logistic(lam, 1e-5, steepness) * (1 + wobble * math.sin(7 * math.log(centre)))

    model = Model(rate)
    first = Model(lambda lam, _: logistic(lam, 1e-5 * 10**shift, other)).curve(FIRST_LAMS, 1e-5)
    try:
        lam = model.find(target, [first])
    except ArgumentError as error:  # the first look's range is too narrow
        assert "cannot be reached" in str(error) and not model.centres
        return
    assert len(model.centres) <= MOST_LOOKS
    assert rate(lam, model.centres[-1]) == pytest.approx(target, rel=0.03 + 2 * wobble)


def test_usually_one_look_is_enough() -> None:
    model = Model(lambda lam, _: logistic(lam, 1e-5, 0.4))
    lam = model.find(0.8, [model.curve(FIRST_LAMS, 1e-5)])
    assert len(model.centres) == 1
    assert lam == pytest.approx(1e-5, rel=0.02)


@pytest.mark.parametrize(("bits", "looks"), [(0.9, MOST_LOOKS), (1.1, 1)])
def test_a_rate_that_no_lambda_gives_is_said(bits: float, looks: int) -> None:
    """The first look takes it to be in reach; the model always takes one bit."""
    model = Model(lambda lam, _: 1.0)
    first = Model(lambda lam, _: logistic(lam, 1e-5, 0.4)).curve(FIRST_LAMS, 1e-5)
    with pytest.raises(ArgumentError, match=rf"target_bpw: no lambda .*found {bits}, expected 1\.000 at"):
        model.find(bits, [first])
    assert len(model.centres) == looks
