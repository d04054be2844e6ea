"""Gradients that are not finite: skipped as a whole, or no further than their rows."""

from typing import Any

import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    GRADIENTS,
    MODES,
    Run,
    assert_agree,
    assert_same_bits,
    both,
    dtype_policy,
    make,
    make_data,
    make_gradients,
    make_model,
    make_weights,
    numpy,
    rotated,
)
from reference import Reference

from keras_lookahead_lazy import LazyOptimizer, Lookahead

CASE = ("Adam", {"learning_rate": 0.05})
LOOKAHEAD: dict[str, Any] = {"k": 3, "alpha": 0.5}
INNER_STATES = ["maintain", "interpolate", "reset"]
SCALE = 2.0**10
# Keras's LossScaleOptimizer on JAX runs in compiled steps only.
SCALING_MODES = [mode for mode in MODES if (BACKEND, mode) != ("jax", "eager")]


def scaled(optimizer):
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=SCALE)


ORDERS = {
    "around": lambda *how: scaled(both(make(CASE), *how)),
    "between": lambda moments, inner_state: Lookahead(
        scaled(LazyOptimizer(make(CASE), moments=moments)),
        inner_state=inner_state,
        **LOOKAHEAD,
    ),
    "inside": lambda *how: both(scaled(make(CASE)), *how),
}


def kept(optimizer):
    """All that an optimizer keeps but the scale of the loss.

    It is read from the variables that are listed before: to list them makes slots
    current.
    """
    own = ("dynamic_scale", "step_counter")
    return [v for v in optimizer.variables if v.path.split("/")[-1] not in own]


def reference_of_both(weights, moments, inner_state):
    return Reference(
        weights,
        CASE,
        lazy={"tables": [0], "moments": moments},
        lookahead={"inner_state": inner_state, **LOOKAHEAD},
    )


@pytest.mark.parametrize(
    ("mode", "order", "moments", "inner_state"),
    rotated(ORDERS, ["decay", "freeze"], INNER_STATES, modes=SCALING_MODES),
)
def test_skipped_step_changes_nothing(mode, order, moments, inner_state):
    """Weights, slots, slow weights, all counters; and the next one goes on from there.

    The steps skipped are the very first one, one within a cycle and the one that
    would have synced; a table's gradient is bad, or that of another weight.
    """
    weights = make_weights()
    reference = reference_of_both(weights, moments, inner_state)
    optimizer = ORDERS[order](moments, inner_state)
    run = Run(optimizer, weights, mode, sparse=(0,))
    variables, scale = run.variables + kept(optimizer), SCALE
    for i, step in enumerate(make_gradients(9, weights)):
        if i in (0, 1, 5):
            bad = [g.copy() for g in step]
            sampled = np.flatnonzero(np.any(bad[i % 2] != 0, axis=1))
            bad[i % 2][sampled[0], 0] = np.nan if i == 1 else np.inf
            before = numpy(variables)
            run.step(bad)
            # Before the first update slow weights and slots stand for nothing.
            count = len(weights) if i == 0 else None
            assert_same_bits(numpy(variables)[:count], before[:count])
            assert int(keras.ops.convert_to_numpy(optimizer.iterations)) == i
            scale /= 2
        reference.apply(step)
        ours = run.step([g * np.float32(scale) for g in step])
        assert_agree(ours, reference.weights)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch: no float16 on a CPU")
@pytest.mark.parametrize("moments", ["decay", "freeze"])
def test_skipped_step_of_fit_in_mixed_float16(moments):
    x, y = make_data(8)
    with dtype_policy("mixed_float16"):
        model = make_model(both(make(CASE), moments, "interpolate"))
    model.train_on_batch(x, y)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    # The automatic scale is large, so the first steps are skipped, too.
    for _ in range(20):
        model.train_on_batch(x, y)
    updates = int(model.optimizer.iterations)
    assert updates > 0
    variables = model.weights + kept(model.optimizer)
    before = numpy(variables)
    for bad in (np.nan, np.inf):
        model.train_on_batch(x, np.full_like(y, bad))
        assert_same_bits(numpy(variables), before)
    model.train_on_batch(x, y)
    assert int(model.optimizer.iterations) == updates + 1
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.parametrize(
    ("mode", "moments", "inner_state", "gradients"),
    rotated(["decay", "freeze"], INNER_STATES, GRADIENTS),
)
def test_nan_stays_in_its_row(mode, moments, inner_state, gradients):
    """All other rows and weights, slow ones too, are those of a finite gradient."""
    weights = make_weights()
    reference = reference_of_both(weights, moments, inner_state)
    optimizer = both(make(CASE), moments, inner_state)
    run = Run(optimizer, weights, mode, (0,) if gradients == "sparse" else ())
    row = 0  # of the commonest word, which is sampled again after the NaN
    others = np.arange(len(weights[0])) != row
    for i, step in enumerate(make_gradients(9, weights)):
        reference.apply(step)
        bad = [g.copy() for g in step]
        if i == 1:
            bad[0][row, 1] = np.nan
        table, *rest = run.step(bad)
        wanted = reference.weights
        assert_agree([table[others], *rest], [wanted[0][others], *wanted[1:]])
        assert np.isnan(table[row]).any() == (i > 0)
    slow = numpy([slow for _, slow in optimizer._pairs])
    wanted = reference.state.slow_weights or []
    assert_agree([slow[0][others], *slow[1:]], [wanted[0][others], *wanted[1:]])
