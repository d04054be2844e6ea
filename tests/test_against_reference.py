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
    assert_follows,
    make,
    make_gradients,
    make_weights,
    name_of,
)
from reference import Reference

from keras_lookahead_lazy import LazyOptimizer, Lookahead

STEPS = 24
TOLERANCE = 5e-6  # relative to the largest entry of a weight
MOMENTS = ("decay", "freeze")
INNER_STATES = ("maintain", "interpolate", "reset")
GRADIENTS = ("dense", "sparse") if "graph" in MODES else ("dense",)


def rotated(*combinations_of):
    """Every optimizer with each of its combinations, each in one of the modes.

    The modes take turns, so that pairs meet: each optimizer and each combination
    occurs in every mode.

    Args:
        combinations_of: the combinations, or for every second optimizer others.
    """
    parameters = []
    for i, case in enumerate(OPTIMIZERS):
        combinations = combinations_of[i % len(combinations_of)]
        for j, combination in enumerate(combinations):
            mode = MODES[(i // 2 + j) % len(MODES)]
            name = "-".join([mode, name_of(case), *combination])
            parameters.append(pytest.param(case, mode, *combination, id=name))
    return parameters


def compare(wrap, case, mode, sparse=False, **around):
    weights = make_weights()
    names = [name.replace("_", "/") for name in NAMES]
    reference = Reference(weights, case, names=names, **around)
    run = Run(wrap(make(case)), weights, mode, (0,) if sparse else ())
    assert_follows(run, reference, make_gradients(STEPS, weights), TOLERANCE)


@pytest.mark.parametrize(
    ("case", "mode", "inner_state"), rotated([(state,) for state in INNER_STATES])
)
def test_lookahead(case, mode, inner_state):
    settings = {"k": 4, "alpha": 0.3, "inner_state": inner_state}
    compare(lambda o: Lookahead(o, **settings), case, mode, lookahead=settings)


@pytest.mark.parametrize(
    ("case", "mode", "moments", "kind"),
    rotated(list(itertools.product(MOMENTS, GRADIENTS))),
)
def test_lazy(case, mode, moments, kind):
    compare(
        lambda o: LazyOptimizer(o, moments=moments),
        case,
        mode,
        sparse=kind == "sparse",
        lazy={"tables": [0], "moments": moments},
    )


# Each optimizer is above in every state of Lookahead and of lazy rows; here it takes
# half of their product: all inner states, and both moments in turn.
DECAY_FIRST, FREEZE_FIRST = (
    list(zip(itertools.cycle(turns), INNER_STATES, strict=False))
    for turns in (MOMENTS, MOMENTS[::-1])
)


@pytest.mark.parametrize(
    ("case", "mode", "moments", "inner_state"), rotated(DECAY_FIRST, FREEZE_FIRST)
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


NESTED = [
    (3, 2, ("maintain", "maintain")),
    (2, 3, ("interpolate", "interpolate")),
    (3, 3, ("maintain", "interpolate")),
    (2, 4, ("maintain", "reset")),
]


@pytest.mark.parametrize("nested", NESTED, ids=str)
@pytest.mark.parametrize("case", OPTIMIZERS[1:4:2], ids=name_of)
@pytest.mark.parametrize("moments", MOMENTS)
def test_lookahead_around_lookahead_around_lazy(case, nested, moments):
    inner_k, outer_k, states = nested
    inner = {"k": inner_k, "alpha": 0.5, "inner_state": states[0]}
    outer = {"k": outer_k, "alpha": 0.3, "inner_state": states[1]}
    turn = NESTED.index(nested) + OPTIMIZERS.index(case) // 2 + MOMENTS.index(moments)
    compare(
        lambda o: Lookahead(
            Lookahead(LazyOptimizer(o, moments=moments), **inner), **outer
        ),
        case,
        MODES[turn % len(MODES)],
        sparse=True,
        lookahead=[inner, outer],
        lazy={"tables": [0], "moments": moments},
    )
