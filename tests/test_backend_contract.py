"""What the backend computes its own way is what the package's formulas say."""

import functools

import keras
import numpy as np
import pytest
from harness import MODES
from keras import ops

from keras_lookahead_lazy._backend import MovedTable, engine
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


def table_to_sync(rows, moved, seed):
    """A pair, the update that last moved each row, and the rows that moved lately."""
    last_update = np.zeros(rows, "int32")
    chosen = np.random.default_rng(seed).permutation(rows)[: min(moved, rows)]
    last_update[chosen] = 9
    last = keras.Variable(last_update, dtype="int32", trainable=False)
    return pair((rows, 2), seed), last, chosen


def check_sync_of_rows(tables, mode):
    before = [arrays(group) for group, _, _ in tables]
    predicate = (
        True if keras.backend.backend() == "torch" else ops.convert_to_tensor(True)
    )
    moved = [
        MovedTable(
            variables=tuple(group),
            last_update=last,
            is_moved=lambda last: last > 8,
            function=Sync(0.4),
            place=engine.placement(group[0]),
        )
        for group, last, _ in tables
    ]
    variables = [v for table in moved for v in table.variables]
    written = [*variables, *(last for _, last, _ in tables)]
    sync = functools.partial(engine.update_rows, moved)
    run(lambda: engine.run_if(predicate, sync, variables), written, mode)
    for (group, _, chosen), old in zip(tables, before, strict=True):
        point = old[1] + 0.4 * (old[0] - old[1])
        idle = np.setdiff1d(np.arange(len(point)), chosen)
        for now, then in zip(arrays(group), old, strict=True):
            rounding = np.finfo("float32").eps * (abs(old[0]) + abs(old[1]))
            assert (abs(now - point) <= rounding)[chosen].all()
            np.testing.assert_array_equal(now[idle], then[idle])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("moved", [0, 3, 5000, 39_999])
@pytest.mark.parametrize("rows", [7, 40_000, 40_009, 2**17])
def test_a_sync_of_rows(rows, moved, mode):
    """Fast weights that were updated lately, few or many, of small and large tables."""
    check_sync_of_rows([table_to_sync(rows, moved, 3)], mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "moved",
    [(3, 0, 2, 0), (9, 7000, 4097, 1), (0, 0, 0, 5000), (9, 40_009, 9000, 40_000)],
)
def test_a_sync_of_the_rows_of_many_tables(moved, mode):
    """The rows of the large ones are searched together."""
    sizes = 9, 40_009, 2**17, 40_000
    tables = [
        table_to_sync(rows, count, seed)
        for seed, (rows, count) in enumerate(zip(sizes, moved, strict=True))
    ]
    check_sync_of_rows(tables, mode)


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
