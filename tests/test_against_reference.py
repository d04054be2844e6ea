"""Weights after every step against plain NumPy in float64, for each optimizer.

Each backend is within 5e-6 of the same reference, so any two are within 1e-5 of each
other: on the same weights and gradients, in every optimizer and mode.
"""

import itertools

import pytest
from harness import (
    MODES,
    NAMES,
    OPTIMIZERS,
    Run,
    assert_agree,
    make,
    make_gradients,
    make_weights,
    name_of,
)
from reference import Reference

from keras_lookahead_lazy import LazyOptimizer, Lookahead

STEPS = 50
TOLERANCE = 5e-6  # relative to the largest entry of a weight
MOMENTS = ("decay", "freeze")
INNER_STATES = ("maintain", "interpolate", "reset")
GRADIENTS = ("dense", "sparse") if "graph" in MODES else ("dense",)


def every(*choices):
    """Every optimizer with every combination of `choices`, in the first mode.

    In the other modes, which run the same code, each optimizer takes one of the
    combinations, and all of them occur.
    """
    combinations = list(itertools.product(*choices))
    parameters = []
    for mode in MODES:
        for i, case in enumerate(OPTIMIZERS):
            chosen = combinations
            if mode != MODES[0]:
                chosen = [combinations[i % len(combinations)]]
            parameters += [
                pytest.param(case, mode, *c, id="-".join([mode, name_of(case), *c]))
                for c in chosen
            ]
    return parameters


def compare(wrap, case, mode, sparse=False, **around):
    weights = make_weights()
    names = [name.replace("_", "/") for name in NAMES]
    reference = Reference(weights, case, names=names, **around)
    run = Run(wrap(make(case)), weights, mode, (0,) if sparse else ())
    for step in make_gradients(STEPS, weights):
        reference.apply(step)
        assert_agree(run.step(step), reference.weights, TOLERANCE)


@pytest.mark.parametrize(("case", "mode", "inner_state"), every(INNER_STATES))
def test_lookahead(case, mode, inner_state):
    settings = {"k": 4, "alpha": 0.3, "inner_state": inner_state}
    compare(lambda o: Lookahead(o, **settings), case, mode, lookahead=settings)


@pytest.mark.parametrize(("case", "mode", "moments", "kind"), every(MOMENTS, GRADIENTS))
def test_lazy(case, mode, moments, kind):
    compare(
        lambda o: LazyOptimizer(o, moments=moments),
        case,
        mode,
        sparse=kind == "sparse",
        lazy={"tables": [0], "moments": moments},
    )


@pytest.mark.parametrize(
    ("case", "mode", "moments", "inner_state"), every(MOMENTS, INNER_STATES)
)
def test_lookahead_around_lazy(case, mode, moments, inner_state):
    settings = {"k": 3, "alpha": 0.6, "inner_state": inner_state}
    compare(
        lambda o: Lookahead(LazyOptimizer(o, moments=moments), **settings),
        case,
        mode,
        sparse=True,
        lookahead=settings,
        lazy={"tables": [0], "moments": moments},
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("inner_k", "outer_k", "states"),
    [
        (3, 2, ("maintain", "maintain")),
        (2, 3, ("interpolate", "interpolate")),
        (3, 3, ("maintain", "interpolate")),
        (2, 4, ("maintain", "reset")),
    ],
)
@pytest.mark.parametrize("case", OPTIMIZERS[1:4:2], ids=name_of)
@pytest.mark.parametrize("moments", MOMENTS)
def test_lookahead_around_lookahead_around_lazy(
    case, mode, states, inner_k, outer_k, moments
):
    inner = {"k": inner_k, "alpha": 0.5, "inner_state": states[0]}
    outer = {"k": outer_k, "alpha": 0.3, "inner_state": states[1]}
    compare(
        lambda o: Lookahead(
            Lookahead(LazyOptimizer(o, moments=moments), **inner), **outer
        ),
        case,
        mode,
        sparse=True,
        lookahead=[inner, outer],
        lazy={"tables": [0], "moments": moments},
    )
