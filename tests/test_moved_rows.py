"""What moves at a sync, and what slots hold, where training is not just training.

Weights that somebody sets, layers that are frozen or left out, optimizers that were
trained before: against a few lines of NumPy each.
"""

from typing import Any

import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    MODES,
    Run,
    assert_agree,
    assert_same_bits,
    make_data,
    make_gradients,
    make_model,
    make_weights,
    numpy,
    tensor,
)
from reference import Reference, sampled_rows

from keras_lookahead_lazy import LazyOptimizer, Lookahead

ADAM = "Adam", {"learning_rate": 0.01}
MOMENTUM = "SGD", {"learning_rate": 0.1, "momentum": 0.5}


def adam():
    return keras.optimizers.Adam(0.01)


def slots_of(optimizer, index=0):
    """Adam's slots for a weight, as they are for somebody who reads them."""
    optimizer.catch_up()
    inner = optimizer.inner_optimizer
    return numpy([inner._momentums[index], inner._velocities[index]])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("restarts", [False, True])
def test_weights_set_in_mid_cycle(mode, restarts):
    """The sync pulls rows once they have moved, unless `restart()` is called."""
    k, alpha = 4, 0.25
    weights = make_weights()
    lookahead = Lookahead(LazyOptimizer(adam()), k, alpha)
    run = Run(lookahead, weights, mode, sparse=(0,))
    reference = Reference(weights, ADAM, lazy={"tables": [0]})
    steps = make_gradients(3 * k, weights)
    slow, moved = [w.copy() for w in weights], np.zeros(len(weights[0]), bool)
    new, in_cycle = make_weights(seed=9), 0
    for i, step in enumerate(steps, 1):
        if i == 3:
            for variable, value in zip(run.variables, new, strict=True):
                variable.assign(value)
            reference.weights = [w.astype("float64") for w in new]
            if restarts:
                lookahead.restart()
                slow, in_cycle = list(reference.weights), 0
                moved[:] = False
        moved |= sampled_rows(step[0])
        reference.apply(step)
        in_cycle += 1
        if in_cycle == k:
            pairs = zip(slow, reference.weights, strict=True)
            points = [s + alpha * (w - s) for s, w in pairs]
            table = np.where(moved[:, None], points[0], reference.weights[0])
            slow = [np.where(moved[:, None], points[0], slow[0]), *points[1:]]
            reference.weights = [table, *points[1:]]
            in_cycle, moved[:] = 0, False
        assert_agree(run.step(step), reference.weights, 5e-6)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("restarts", [False, True])
def test_weights_replaced_by_their_averages(lazy, restarts):
    """Keras sets them at the end of `fit`; the next update is Lookahead's first."""
    settings = {"learning_rate": 0.01, "use_ema": True, "ema_momentum": 0.6}
    inner = keras.optimizers.Adam(**settings)
    optimizer = Lookahead(LazyOptimizer(inner) if lazy else inner, k=4)
    weights = make_weights()
    run = Run(optimizer, weights)
    around: dict[str, Any] = {"lazy": {"tables": [0]}} if lazy else {}
    reference = Reference(weights, ("Adam", settings), lookahead={"k": 4}, **around)
    steps = make_gradients(12, weights)
    for i, step in enumerate(steps):
        if i == 6:
            if restarts:  # the same, by hand
                for variable, value in zip(run.variables, reference.averages):  # noqa: B905
                    variable.assign(value.astype("float32"))
                optimizer.restart()
            else:
                optimizer.finalize_variable_values(run.variables)
            reference.weights = list(reference.averages)
            reference.cycles[0].slow_weights = None
            reference.cycles[0].k = 100  # no sync, until
        if i == 9:
            reference.cycles[0].k = 10  # the fourth update from here
        reference.apply(step)
        assert_agree(run.step(step), reference.weights, 5e-6)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras on JAX: all weights or none")
@pytest.mark.parametrize("lazy", [False, True])
def test_frozen_layers_stay(lazy):
    """Frozen after compiling again with the same optimizer; then trained again."""
    model = make_model()
    inner = LazyOptimizer(adam()) if lazy else adam()
    optimizer = Lookahead(inner, k=2, alpha=0.5)
    x, y = make_data(12)
    how = {"batch_size": 4, "shuffle": False, "verbose": 0}
    model.compile(optimizer, "mse")
    model.fit(x, y, **how)
    frozen = [model.layers[0], model.layers[2]]
    for layer in frozen:
        layer.trainable = False
        layer.set_weights([w + 3.0 for w in layer.get_weights()])
    model.compile(optimizer, "mse")
    before = [layer.get_weights() for layer in frozen]
    last = model.layers[-1].get_weights()
    model.fit(x, y, **how)
    for layer, weights in zip(frozen, before, strict=True):
        assert_same_bits(layer.get_weights(), weights)
    assert np.any(model.layers[-1].get_weights()[0] != last[0])

    # The slow copies have followed: no sync pulls towards what was before the 3.
    for layer in frozen:
        layer.trainable = True
    model.compile(optimizer, "mse")
    model.fit(x, y, **how)
    for layer, weights in zip(frozen, before, strict=True):
        assert np.max(np.abs(layer.get_weights()[0] - weights[0])) < 0.2


@pytest.mark.parametrize(("inner_k", "outer_k"), [(2, 3), (3, 2)])
def test_a_lookahead_around_one_that_was_trained(inner_k, outer_k):
    """Rows that moved before it came, after, and both; one that never did."""
    table = keras.Variable(np.ones((4, 2), "float32"), name="table")
    inner = Lookahead(LazyOptimizer(keras.optimizers.SGD(0.1), [table]), inner_k)
    outer = Lookahead(inner, outer_k, alpha=0.3)
    weights = np.ones(4)
    slow_of_inner = slow_of_outer = weights
    for update in range(1, 12):
        is_before = update <= 5
        if update == 6:
            slow_of_outer = weights
        gradient = np.array([1, is_before, not is_before, 0], "float32")
        (inner if is_before else outer).apply(
            [tensor(np.stack([gradient, gradient], axis=1))], [table]
        )
        weights = weights - 0.1 * gradient
        if update % inner_k == 0:
            slow_of_inner = slow_of_inner + 0.5 * (weights - slow_of_inner)
            weights = slow_of_inner
        if not is_before and (update - 5) % outer_k == 0:
            slow_of_outer = slow_of_outer + 0.3 * (weights - slow_of_outer)
            weights = slow_of_outer
        assert_agree(numpy([table]), [np.stack([weights, weights], axis=1)])


@pytest.mark.parametrize("inner_state", ["reset", "interpolate"])
@pytest.mark.parametrize("mode", MODES)
def test_around_an_optimizer_that_was_trained(mode, inner_state):
    """Lagging slots are made current before they are backed up or reset."""
    weights = make_weights()
    steps = make_gradients(13, weights)
    lazy = LazyOptimizer(adam())
    first = Run(lazy, weights, mode, sparse=(0,))
    reference = Reference(weights, ADAM, lazy={"tables": [0]})
    for step in steps[:5]:
        reference.apply(step)
        first.step(step)
    settings = {"k": 3, "alpha": 0.4, "inner_state": inner_state}
    optimizer = Lookahead(lazy, **settings)
    run = Run(optimizer, first.variables, mode, sparse=(0,))
    slow = list(reference.weights), list(reference.slots)
    for i, step in enumerate(steps[5:], 1):
        reference.apply(step)
        if i % 3 == 0:
            pairs = zip(slow[0], reference.weights, strict=True)
            reference.weights = [s + 0.4 * (w - s) for s, w in pairs]
            if inner_state == "reset":
                reference.slots = reference._initial_slots()
            else:
                reference.slots = [
                    {name: s[name] + 0.4 * (w[name] - s[name]) for name in w}
                    for s, w in zip(slow[1], reference.slots, strict=True)
                ]
            slow = list(reference.weights), list(reference.slots)
        assert_agree(run.step(step), reference.weights, 5e-6)
    ours = slots_of(lazy)
    assert_agree(
        ours, [reference.slots[0]["momentum"], reference.slots[0]["velocity"]], 5e-6
    )


@pytest.mark.parametrize("left_out", [False, True])
def test_table_without_a_gradient(left_out):
    """`None`, or not given: no step of zeros. Its slots stay, pending decay apart."""
    weights = make_weights()
    lazy = LazyOptimizer(adam())
    run = Run(lazy, weights)
    reference = Reference(weights, ADAM, lazy={"tables": [0]})
    for i, step in enumerate(make_gradients(9, weights)):
        if i % 3 != 2:
            reference.apply(step)
            run.step(step)
            continue
        table = reference.weights[0], reference.slots[0]
        reference.apply(step)
        reference.weights[0], reference.slots[0] = table
        given = [tensor(g) for g in step[1:]]
        if left_out:
            lazy.apply(given, run.variables[1:])
        else:
            lazy.apply([None, *given], run.variables)
        assert_agree(run.weights, reference.weights, 5e-6)
    assert_agree(
        slots_of(lazy),
        [reference.slots[0]["momentum"], reference.slots[0]["velocity"]],
        5e-6,
    )


def test_inner_optimizer_on_its_own():
    """Used without the LazyOptimizer around it, it is a plain optimizer again."""
    weights = make_weights()
    lazy = LazyOptimizer(adam())
    run = Run(lazy, weights)
    reference = Reference(weights, ADAM, lazy={"tables": [0]})
    steps = make_gradients(8, weights)
    for step in steps[:5]:
        reference.apply(step)
        run.step(step)
    lazy.catch_up()
    reference.tables = ()
    for step in steps[5:]:
        reference.apply(step)
        lazy.inner_optimizer.apply([tensor(g) for g in step], run.variables)
        assert_agree(run.weights, reference.weights, 5e-6)


@pytest.mark.skipif(BACKEND == "jax", reason="on JAX slots lag until catch_up()")
def test_slots_are_current_for_readers():
    weights = make_weights()
    lazy = LazyOptimizer(adam())
    run = Run(lazy, weights)
    reference = Reference(weights, ADAM, lazy={"tables": [0]})
    for step in make_gradients(5, weights):
        reference.apply(step)
        run.step(step)
    expected = reference.slots[0]["momentum"]
    assert_agree(numpy([lazy.inner_optimizer._momentums[0]]), [expected], 5e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("moments", ["decay", "freeze"])
def test_batch_without_a_sampled_row(mode, moments):
    """All padding: it counts, slots decay in "decay", and no row moves."""
    weights = make_weights()
    run = Run(LazyOptimizer(adam(), moments=moments), weights, mode, sparse=(0,))
    reference = Reference(weights, ADAM, lazy={"tables": [0], "moments": moments})
    for i, step in enumerate(make_gradients(8, weights)):
        if i % 2:
            step[0][:] = 0
        reference.apply(step)
        assert_agree(run.step(step), reference.weights, 5e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.IndexedSlices")
@pytest.mark.parametrize("mode", MODES)
def test_slices_without_entries(mode):
    import tensorflow as tf

    weights = make_weights()
    lazy = LazyOptimizer(adam())
    run = Run(lazy, weights)
    reference = Reference(weights, ADAM, lazy={"tables": [0]})

    def apply(gradients):
        shape = tf.constant(weights[0].shape, "int64")
        empty = tf.zeros((0, 4)), tf.zeros((0,), "int64")
        lazy.apply([tf.IndexedSlices(*empty, shape), *gradients], run.variables)

    if mode != "eager":
        apply = tf.function(apply, jit_compile=mode == "jit", autograph=False)
    for step in make_gradients(4, weights):
        step[0][:] = 0
        reference.apply(step)
        apply([tf.constant(g) for g in step[1:]])
        assert_agree(run.weights, reference.weights, 5e-6)


# Gradients in other forms than arrays of the backend


def as_sparse(gradient):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        shape = tf.constant(gradient.shape, "int64")
        return tf.IndexedSlices(tf.constant(gradient), tf.range(len(gradient)), shape)
    if BACKEND == "jax":
        from jax.experimental.sparse import BCOO

        return BCOO.fromdense(gradient)
    import torch

    return torch.tensor(gradient).to_sparse(1)


WRAPPERS = {
    "lazy": lambda: LazyOptimizer(adam()),
    "lookahead": lambda: Lookahead(adam(), k=2),
    "both": lambda: Lookahead(LazyOptimizer(adam()), k=2),
}


@pytest.mark.parametrize("sparse", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_sparse_gradients(wrapper, sparse):
    """As plain Adam takes them, also of weights that are no tables."""
    compare_forms(wrapper, sparse, as_sparse)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_in_numpy(wrapper):
    compare_forms(wrapper, (0, 1, 2), lambda gradient: gradient)


def compare_forms(wrapper, which, convert):
    weights = make_weights()
    optimizer = WRAPPERS[wrapper]()
    run = Run(optimizer, weights)
    reference = Reference(
        weights,
        ADAM,
        lazy={"tables": [0]} if wrapper != "lookahead" else None,
        lookahead={"k": 2} if wrapper != "lazy" else None,
    )
    for step in make_gradients(5, weights):
        reference.apply(step)
        given = [convert(g) if i in which else tensor(g) for i, g in enumerate(step)]
        optimizer.apply(given, run.variables)
        assert_agree(run.weights, reference.weights, 5e-6)
