"""Weights after every step against plain NumPy in float64, for each optimizer.

Each backend is within 5e-6 of the same reference, so any two are within 1e-5 of each
other: on the same weights and gradients, in every optimizer and mode.
"""

from typing import Any

import pytest
from harness import (
    GRADIENTS,
    NAMES,
    OPTIMIZERS,
    SCHEDULE_FREE,
    Run,
    assert_agree,
    assert_follows,
    make,
    make_gradients,
    make_weights,
    name_of,
    numpy,
    rotated,
)
from reference import Reference

from keras_lookahead_lazy import LazyOptimizer, Lookahead

STEPS = 24
TOLERANCE = 5e-6  # relative to the largest entry of a weight
MOMENTS = ("decay", "freeze")
INNER_STATES = ("maintain", "interpolate", "reset")


def compare(wrap, case, mode, sparse=False, **around):
    weights = make_weights()
    names = [name.replace("_", "/") for name in NAMES]
    reference = Reference(weights, case, names=names, **around)
    run = Run(wrap(make(case)), weights, mode, (0,) if sparse else ())
    assert_follows(run, reference, make_gradients(STEPS, weights), TOLERANCE)


@pytest.mark.parametrize(
    ("mode", "case", "inner_state"), rotated(OPTIMIZERS, INNER_STATES), ids=name_of
)
def test_lookahead(mode, case, inner_state):
    settings: dict[str, Any] = {"k": 4, "alpha": 0.3, "inner_state": inner_state}
    compare(lambda o: Lookahead(o, **settings), case, mode, lookahead=settings)


@pytest.mark.parametrize(
    ("mode", "case", "is_wrapped"), rotated(SCHEDULE_FREE, [False, True]), ids=name_of
)
def test_schedule_free(mode, case, is_wrapped):
    """As Keras has it, and in Lookahead, which syncs its averages, too."""
    settings: dict[str, Any] = {"k": 4, "alpha": 0.3, "inner_state": "interpolate"}
    if is_wrapped:
        compare(lambda o: Lookahead(o, **settings), case, mode, lookahead=settings)
    else:
        compare(lambda o: o, case, mode)


@pytest.mark.skipif(not SCHEDULE_FREE, reason="came with Keras 3.15")
@pytest.mark.parametrize("beta_1", [0.9, 0.5])
def test_a_sync_of_schedule_free_is_a_sync_of_its_averages(beta_1):
    """phi + alpha (x - phi) for x, where x = (w - (1 - beta_1) z) / beta_1."""
    arguments = {"learning_rate": 0.05, "beta_1": beta_1}
    weights = make_weights()
    runs = [
        Run(wrap(make(("ScheduleFreeAdamW", arguments))), weights, "eager")
        for wrap in (
            lambda o: o,
            lambda o: Lookahead(o, k=4, alpha=0.3, inner_state="interpolate"),
        )
    ]
    for step in make_gradients(4, weights):
        for run in runs:
            run.step(step)
    averages = []
    for run in runs:
        inner = getattr(run.optimizer, "inner_optimizer", run.optimizer)
        z = numpy(inner._momentums)
        pairs = zip(run.weights, z, strict=True)
        averages.append([(w - (1 - beta_1) * z) / beta_1 for w, z in pairs])
    starts = zip(weights, averages[0], strict=True)
    expected = [start + 0.3 * (x - start) for start, x in starts]
    assert_agree(averages[1], expected, TOLERANCE)


@pytest.mark.parametrize(
    ("mode", "case", "moments", "kind"),
    rotated(OPTIMIZERS, MOMENTS, GRADIENTS),
    ids=name_of,
)
def test_lazy(mode, case, moments, kind):
    compare(
        lambda o: LazyOptimizer(o, moments=moments),
        case,
        mode,
        sparse=kind == "sparse",
        lazy={"tables": [0], "moments": moments},
    )


def moments_in_turn(case, inner_state):
    """Half of the product: each optimizer has every inner state and both moments.

    Of each alone it has had the whole product above.
    """
    turn = OPTIMIZERS.index(case) // 2 + INNER_STATES.index(inner_state)
    return MOMENTS[turn % len(MOMENTS)]


@pytest.mark.parametrize(
    ("mode", "case", "moments", "inner_state"),
    [
        (mode, case, moments_in_turn(case, inner_state), inner_state)
        for mode, case, inner_state in rotated(OPTIMIZERS, INNER_STATES)
    ],
    ids=name_of,
)
def test_lookahead_around_lazy(mode, case, moments, inner_state):
    settings: dict[str, Any] = {"k": 3, "alpha": 0.6, "inner_state": inner_state}
    compare(
        lambda o: Lookahead(LazyOptimizer(o, moments=moments), **settings),
        case,
        mode,
        sparse=True,
        lookahead=settings,
        lazy={"tables": [0], "moments": moments},
    )


NESTED = {
    "maintain": (3, 2, ("maintain", "maintain")),
    "interpolate": (2, 3, ("interpolate", "interpolate")),
    "interpolate outside": (3, 3, ("maintain", "interpolate")),
    "reset outside": (2, 4, ("maintain", "reset")),
}


@pytest.mark.parametrize(
    ("mode", "nested", "case", "moments"),
    rotated(NESTED, OPTIMIZERS[1:4:2], MOMENTS),
    ids=name_of,
)
def test_lookahead_around_lookahead_around_lazy(mode, nested, case, moments):
    inner_k, outer_k, states = NESTED[nested]
    inner: dict[str, Any] = {"k": inner_k, "alpha": 0.5, "inner_state": states[0]}
    outer: dict[str, Any] = {"k": outer_k, "alpha": 0.3, "inner_state": states[1]}
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
