"""TensorFlow: `tf.IndexedSlices`, `tf.distribute`, and XLA's need for fixed shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_lookahead_lazy._backend import RowGradient, Rows, tensorflow_rows
from keras_lookahead_lazy._backend.tensorflow_rows import in_xla

VARIABLES_HOLD_STATE = True
KERAS_TAKES_ROWS = True
# Under XLA, where both have fixed shapes, rows pay when a table has so many times
# more rows than a step has look-ups (measured).
ROWS_PER_LOOK_UP = 8
# A sync under XLA works on so many rows at a time, which bounds what it needs.
ROWS_PER_ROUND = 4096
# It takes the whole table where one in so many rows has moved, or it is small.
PART_OF_TABLE = 8


# Look-ups and their gradients


def is_dense(ids: Any) -> bool:
    return not isinstance(ids, (tf.SparseTensor, tf.RaggedTensor))


def look_up(table: keras.Variable, ids: Any) -> tf.Tensor:
    """Rows of the variable itself, and not of a copy of it."""
    ids = tf.convert_to_tensor(ids)
    ids = tf.where(ids < 0, ids + tf.cast(table.shape[0], ids.dtype), ids)
    return tf.gather(table.value, ids)


def row_gradient(gradient: Any, table: keras.Variable) -> RowGradient | None:
    """With one replica; those of several have to be added up as they are."""
    is_one = tf.distribute.get_strategy().num_replicas_in_sync == 1
    if not (is_one and isinstance(gradient, tf.IndexedSlices)):
        return None
    if in_xla():
        indices, position, sums = tensorflow_rows.sorted_sums(gradient)
        is_small = _is_small(table, gradient)
        return None if is_small else RowGradient(sums, indices, position)
    gradient = sum_duplicates(gradient)
    return RowGradient(gradient.values, gradient.indices, None)


def step_in_rounds(gradient: Any, variables: Sequence, step: Callable) -> None:
    """In one: a replica has the look-ups of its own part of the batch."""
    step(gradient, variables)


def whole(gradient: Any) -> Any:
    return gradient


sum_duplicates = tensorflow_rows.sum_duplicates


# Rows of a table


def replica(variable: Any, like: Any) -> tf.Variable:
    variable = _native(variable)
    replicas = _strategy(variable).experimental_local_results(variable)
    if len(replicas) == 1:
        return replicas[0]
    return next(replica for replica in replicas if replica.device == like.device)


def _native(variable: Any) -> tf.Variable:
    """The `tf.Variable` in a Keras variable; a model may have such itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _strategy(variable: tf.Variable) -> tf.distribute.Strategy:
    """The strategy that a variable was created under."""
    return getattr(variable, "distribute_strategy", tf.distribute.get_strategy())


def find_rows(
    gradient: Any, variables: Sequence[tf.Variable], every_row: bool
) -> tuple[Rows, list]:
    """Different rows; under XLA one for each look-up, with the same sum each time."""

    def read(indices: Any) -> list:
        return [read_rows(variable, indices) for variable in variables]

    slices = isinstance(gradient, tf.IndexedSlices) and not every_row
    if slices and not (in_xla() and _is_small(variables[0], gradient)):
        if in_xla():
            indices, position, sums = tensorflow_rows.sorted_sums(gradient)
            sums = tf.gather(sums, position)
            sampled = tensorflow_rows.has_entries(sums)
            return Rows(indices, sums, sampled), read(indices)
        gradient = sum_duplicates(gradient)
        # Read before it is known which are idle: the two do not wait for each other.
        sums, indices, *values = tensorflow_rows.without_idle_rows(
            gradient.values, gradient.indices, *read(gradient.indices)
        )
        return Rows(indices, sums, None), values
    gradient = tf.convert_to_tensor(gradient)
    sampled = tensorflow_rows.has_entries(gradient)
    if every_row or in_xla():
        return Rows(None, gradient, sampled), read(None)
    indices = tf.where(sampled)[:, 0]
    return Rows(indices, tf.gather(gradient, indices), None), read(indices)


def mark_idle(indices: tf.Tensor, gradient: tf.Tensor) -> Rows:
    return Rows(indices, gradient, tensorflow_rows.has_entries(gradient))


def _is_small(table: Any, slices: tf.IndexedSlices) -> bool:
    look_ups = slices.indices.shape[0]
    return not look_ups or table.shape[0] < ROWS_PER_LOOK_UP * look_ups


def read_rows(variable: tf.Variable, indices: Any) -> tf.Tensor:
    if indices is None:
        return tf.convert_to_tensor(variable)
    return variable.sparse_read(indices)


def write_rows(
    variables: Sequence[tf.Variable], indices: Any, values: Sequence[tf.Tensor]
) -> None:
    for variable, value in zip(variables, values, strict=True):
        if indices is None:
            variable.assign(value, read_value=False)
        else:
            variable.scatter_update(tf.IndexedSlices(value, indices))


def write_chosen_rows(
    variable: tf.Variable, indices: tf.Tensor, value: tf.Tensor, chosen: tf.Tensor
) -> None:
    if in_xla():  # which drops what lies past the table's end
        past_end = tf.constant(variable.shape[0], indices.dtype)
        indices = tf.where(chosen, indices, past_end)
    else:
        value, indices = tensorflow_rows.choose(chosen, value, indices)
    write_rows([variable], indices, [value])


def row_layout(variable: keras.Variable) -> None:
    """Keras lays variables out on JAX alone."""


# Counting and branching


def read_count(variable: Any) -> tf.Tensor:
    return tf.cast(tf.convert_to_tensor(variable), "int32")


def write_count(variable: keras.Variable, count: Any) -> None:
    variable.assign(count)


def update_if(
    predicate: Any, groups: Sequence[tuple], function: Callable[..., tuple]
) -> None:
    def update(*variables: tf.Variable) -> None:
        values = [read_rows(variable, None) for variable in variables]
        write_rows(variables, None, function(*values))

    _update_groups_if(predicate, groups, update)


def _update_groups_if(
    predicate: Any, groups: Sequence[tuple], update: Callable
) -> None:
    """Call `update` with each group of variables, if `predicate`.

    The condition stands in cross-replica context: a branch in replica context may
    not merge replicas, which assigning an aggregated variable does.
    """

    def across_replicas(strategy: tf.distribute.Strategy) -> None:
        def update_replica(first: tf.Variable, *others: tf.Variable) -> None:
            update(first, *(replica(other, first) for other in others))

        def update_all() -> None:
            for group in groups:
                first, *others = map(_native, group)
                strategy.extended.update(
                    first, update_replica, args=others, group=False
                )

        tensorflow_rows.run_if(predicate, update_all)

    if not groups:
        return
    if tf.distribute.has_strategy():
        tf.__internal__.distribute.interim.maybe_merge_call(
            across_replicas, tf.distribute.get_strategy()
        )
    else:  # outside the scope of the variables' strategy, if they have one
        strategy = _strategy(_native(groups[0][0]))
        with strategy.scope():
            across_replicas(strategy)


def back_up_if(predicate: Any, pairs: Sequence[tuple]) -> None:
    def back_up(fast: tf.Variable, slow: tf.Variable) -> None:
        value = fast.read_value()
        if in_xla():
            # Both take one value that XLA cannot see to be `fast`. Were `fast` only
            # read here, XLA would copy it in every step, to be safe from the update.
            value = tf.where(predicate, value, slow)
            fast.assign(value, read_value=False)
        slow.assign(value, read_value=False)

    _update_groups_if(predicate, pairs, back_up)


def sync_if(predicate: Any, pairs: Sequence[tuple], sync: Any) -> None:
    """In place: no temporaries, and fewer passes over the weights."""

    def sync_in_place(fast: tf.Variable, slow: tf.Variable) -> None:
        fast.assign_sub(slow, read_value=False)
        tf.raw_ops.ResourceApplyGradientDescent(
            var=slow.handle, alpha=tf.cast(-sync.alpha, slow.dtype), delta=fast
        )
        fast.assign(slow, read_value=False)

    _update_groups_if(predicate, pairs, sync_in_place)


def sync_rows_if(
    predicate: Any, group: tuple[Any, Any, Any], since: Any, sync: Callable
) -> None:
    def sync_table(
        fast: tf.Variable, slow: tf.Variable, last_update: tf.Variable
    ) -> None:
        moved = last_update > since

        def points(rows: tf.Tensor | None) -> tf.Tensor:
            return sync(read_rows(fast, rows), read_rows(slow, rows))[0]

        def sync_rows(rows: tf.Tensor) -> None:
            write_rows([fast], rows, [points(rows)])

        def sync_all() -> None:
            is_moved = tf.reshape(moved, [-1] + [1] * (fast.shape.rank - 1))
            new = tf.where(is_moved, points(None), read_rows(fast, None))
            write_rows([fast], None, [new])

        def sync_few() -> None:
            tensorflow_rows.in_rounds(moved, ROWS_PER_ROUND, sync_rows)

        if not in_xla():
            halves = tensorflow_rows.positions(moved)
            new = [points(rows) for rows in halves]  # all before the first is written
            for rows, value in zip(halves, new, strict=True):
                write_rows([fast], rows, [value])
        elif fast.shape[0] < PART_OF_TABLE * ROWS_PER_ROUND:
            sync_all()
        else:
            count = tf.reduce_sum(tf.cast(moved, "int32"))
            is_many = count > fast.shape[0] // PART_OF_TABLE
            tensorflow_rows.run_if(is_many, sync_all)
            tensorflow_rows.run_if(~is_many, sync_few)

    since = tf.cast(since, "int32")
    _update_groups_if(predicate, [group], sync_table)


# The rest


def check_distribution(variables: Sequence[Any]) -> None:
    """Refuse parameter servers, in whose scope the weights are or have been made."""
    in_scope = isinstance(
        tf.distribute.get_strategy(), tf.distribute.ParameterServerStrategy
    )
    if in_scope or any("/job:ps/" in _native(v).device for v in variables):
        raise ValueError(
            "Lookahead and LazyOptimizer count the updates that all workers make "
            "together. Under tf.distribute.ParameterServerStrategy each worker makes "
            "updates of its own, at any time. Use tf.distribute.MirroredStrategy on "
            "one machine, or tf.distribute.MultiWorkerMirroredStrategy on several."
        )


def apply(
    optimizer: keras.Optimizer,
    grads: list,
    variables: list | None,
    written: list[keras.Variable],
) -> None:
    """TensorFlow's optimizers write no variable where they skip an update."""
    optimizer.apply(grads, variables)


def is_recording() -> bool:
    return not tf.executing_eagerly()


def store_state(model: keras.Model) -> None:
    """The variables of a model in training hold its weights: nothing to do."""


def outside_graph() -> contextlib.AbstractContextManager:
    return tf.init_scope()


def keeping_random_state() -> contextlib.AbstractContextManager:
    """Any: a dataset has a generator of its own."""
    return contextlib.nullcontext()
