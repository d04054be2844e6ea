"""What the backend computes its own way is what the package's formulas say."""

import functools

import keras
import numpy as np
import pytest
from harness import MODES
from keras import ops

from keras_lookahead_lazy._backend import engine
from keras_lookahead_lazy._lookahead import Sync


def pair(shape, seed):
    rng = np.random.default_rng(seed)
    return [keras.Variable(rng.normal(size=shape).astype("float32")) for _ in range(2)]


def arrays(variables):
    return [np.array(ops.convert_to_numpy(v), "float64") for v in variables]


def run(step, variables, mode):
    """Run a function that assigns variables, compiled as `mode` says."""
    if mode == "eager":
        step()
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.function(step, jit_compile=mode == "jit", autograph=False)()
    else:
        import jax

        def stateless(values):
            pairs = list(zip(variables, values, strict=True))
            with keras.StatelessScope(state_mapping=pairs) as scope:
                step()
            return [scope.get_current_value(v) for v in variables]

        values = jax.jit(stateless)([v.value for v in variables])
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_sync_in_place(alpha, mode):
    """phi + alpha (theta - phi), for both, of every weight."""
    pairs = [pair((3, 4), 0), pair((5,), 1), pair((), 2)]
    before = [arrays(each) for each in pairs]
    variables = [variable for each in pairs for variable in each]
    is_sync = ops.equal(variables[0][0, 0], variables[0][0, 0])
    predicate = bool(is_sync) if keras.backend.backend() == "torch" else is_sync
    sync = functools.partial(engine.sync, pairs, Sync(alpha))
    run(lambda: engine.run_if(predicate, sync, variables), variables, mode)
    for each, (fast, slow) in zip(pairs, before, strict=True):
        point = slow + alpha * (fast - slow)
        for value in arrays(each):
            np.testing.assert_allclose(value, point, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("moved", [0, 3, 5000, 39_999])
@pytest.mark.parametrize("rows", [7, 40_000, 40_009, 2**17])
def test_a_sync_of_rows(rows, moved, mode):
    """Fast weights that were updated lately, few or many, of small and large tables."""
    group = pair((rows, 2), 3)
    last_update = np.zeros(rows, "int32")
    chosen = np.random.default_rng(4).permutation(rows)[: min(moved, rows)]
    last_update[chosen] = 9
    before = arrays(group)
    last = keras.Variable(last_update, dtype="int32", trainable=False)
    predicate = (
        True if keras.backend.backend() == "torch" else ops.convert_to_tensor(True)
    )
    sync = functools.partial(
        engine.update_rows, group, last, lambda last: last > 8, Sync(0.4)
    )
    run(lambda: engine.run_if(predicate, sync, group), [*group, last], mode)
    point = before[1] + 0.4 * (before[0] - before[1])
    idle = np.setdiff1d(np.arange(rows), chosen)
    for value, old in zip(arrays(group), before, strict=True):
        np.testing.assert_allclose(value[chosen], point[chosen], rtol=2e-7, atol=2e-7)
        np.testing.assert_array_equal(value[idle], old[idle])


def test_a_row_with_any_entry_is_sampled():
    """Rows of zeros of both signs are not; each other has zeros beside its entry."""
    entries = [0.0, -0.0, 1e-30, -1e-30, np.nan, np.inf, -np.inf]
    gradient = np.zeros((len(entries), 3), "float32")
    gradient[:, 1] = entries
    (table, _) = pair(gradient.shape, 7)
    table = engine.replica(table, table)
    rows, _ = engine.find_rows(ops.convert_to_tensor(gradient), [table], every_row=True)
    sampled = ops.convert_to_numpy(rows.sampled)
    np.testing.assert_array_equal(sampled, [False] * 2 + [True] * 5)
