"""Weights after every step against plain NumPy in float64, for each optimizer."""

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

STEPS = 14
every_optimizer = pytest.mark.parametrize("case", OPTIMIZERS, ids=name_of)
every_mode = pytest.mark.parametrize("mode", MODES)


def compare(wrap, case, mode, sparse=(), steps=STEPS, **around):
    weights = make_weights()
    gradients = make_gradients(steps, weights)
    names = [name.replace("_", "/") for name in NAMES]
    reference = Reference(weights, case, names=names, **around)
    run = Run(wrap(make(case)), weights, mode, sparse)
    for step in gradients:
        reference.apply(step)
        assert_agree(run.step(step), reference.weights)
    return run, reference


@every_mode
@every_optimizer
@pytest.mark.parametrize("inner_state", ["maintain", "interpolate", "reset"])
def test_lookahead(case, inner_state, mode):
    if mode == "eager" and case[0] not in ("SGD", "Adam") and len(MODES) > 1:
        pytest.skip("eager runs the same code; two optimizers show that it does")
    settings = {"k": 4, "alpha": 0.3, "inner_state": inner_state}
    compare(lambda o: Lookahead(o, **settings), case, mode, lookahead=settings)


@every_mode
@every_optimizer
@pytest.mark.parametrize("moments", ["decay", "freeze"])
@pytest.mark.parametrize("gradient", ["dense", "sparse"])
def test_lazy(case, moments, gradient, mode):
    if gradient == "sparse" and "graph" not in MODES:
        pytest.skip("only TensorFlow has sparse gradients")
    compare(
        lambda o: LazyOptimizer(o, moments=moments),
        case,
        mode,
        sparse=(0,) if gradient == "sparse" else (),
        lazy={"tables": [0], "moments": moments},
    )


@every_mode
@every_optimizer
@pytest.mark.parametrize("moments", ["decay", "freeze"])
@pytest.mark.parametrize("inner_state", ["maintain", "interpolate", "reset"])
def test_lookahead_around_lazy(case, moments, inner_state, mode):
    if mode == "eager" and case[0] not in ("SGD", "Adam") and len(MODES) > 1:
        pytest.skip("eager runs the same code; two optimizers show that it does")
    settings = {"k": 3, "alpha": 0.6, "inner_state": inner_state}
    compare(
        lambda o: Lookahead(LazyOptimizer(o, moments=moments), **settings),
        case,
        mode,
        sparse=(0,),
        lookahead=settings,
        lazy={"tables": [0], "moments": moments},
    )
