"""TensorFlow: `tf.IndexedSlices`, `tf.distribute`, and XLA's need for fixed shapes."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_lookahead_lazy import _keras
from keras_lookahead_lazy._backend import (
    FEW_ROWS,
    OTHER_PARTS,
    MovedTable,
    RowGradient,
    Rows,
    tensorflow_rows,
)
from keras_lookahead_lazy._backend.tensorflow_rows import in_xla

VARIABLES_HOLD_STATE = True
# With a GPU, TensorFlow keeps int32 variables in host memory and computes there.
INTEGERS = "int64"
# Under XLA, where shapes are fixed, a step works on rows if the table has at least this
# many times as many rows as the step has lookups (measured).
ROWS_PER_LOOK_UP = 8
# A table that is updated as a whole is joined with others up to this many rows.
ROWS_TO_JOIN = 2**14
# A sync under XLA works on chunks of this many rows, which bounds its temporary memory.
ROWS_PER_ROUND = 4096
# If more than one in this many rows has moved, or if the table is small, a sync works
# on the whole table.
PART_OF_TABLE = 8


# Lookups and their gradients


def look_up(table: keras.Variable, ids: Any) -> tf.Tensor | tf.RaggedTensor:
    """Read rows of the variable itself, not of a copy."""
    if isinstance(ids, tf.RaggedTensor):
        return ids.with_flat_values(look_up(table, ids.flat_values))
    ids = keras.ops.convert_to_tensor(ids, sparse=False)
    ids = tf.where(ids < 0, ids + tf.cast(table.shape[0], ids.dtype), ids)
    rows = _own_component(_keras.stored_value(table))
    if in_xla():
        # Under XLA this does not copy. `tf.vectorized_map` cannot read from a variable.
        rows = tf.convert_to_tensor(rows)
    return tf.gather(rows, ids)


def _own_component(variable: tf.Variable) -> tf.Variable:
    """Return the replica of a variable for the replica that runs this.

    `tf.gather` on a mirrored variable would read the whole variable.
    """
    context = tf.distribute.get_replica_context()
    if num_replicas() == 1 or context is None:
        return variable
    replicas = _strategy(variable).experimental_local_results(variable)
    number = tf.get_static_value(context.replica_id_in_sync_group)
    is_here = len(replicas) == num_replicas() and number is not None
    return replicas[number if is_here else 0] if len(replicas) > 1 else replicas[0]


def takes_rows(gradient: Any) -> bool:
    return isinstance(gradient, tf.IndexedSlices)


def row_gradient(gradient: Any, table: keras.Variable) -> RowGradient | str:
    """Return row gradients for one replica. Several replicas add up gradients as is."""
    if not isinstance(gradient, tf.IndexedSlices):
        return OTHER_PARTS
    if num_replicas() > 1:
        return "replicas add up clipped or scaled gradients as a whole"
    if in_xla():
        if _is_small(table, gradient):
            return FEW_ROWS
        indices, position, sums = tensorflow_rows.sorted_sums(gradient)
        return RowGradient(sums, indices, position)
    gradient = tensorflow_rows.sum_duplicates(gradient, keeps_length=False)
    return RowGradient(gradient.values, gradient.indices, None)


def fixed_length(indices: tf.Tensor) -> int | None:
    return indices.shape[0] if in_xla() else None


def may_join(gradient: Any, table: tf.Variable) -> bool:
    return (
        isinstance(gradient, (RowGradient, tf.IndexedSlices))
        or table.shape[0] <= ROWS_TO_JOIN
    )


def rows_to_join(gradient: Any, table: tf.Variable) -> tuple[Any, tf.Tensor]:
    if isinstance(gradient, RowGradient):
        return gradient.indices, gradient.by_row()
    if not isinstance(gradient, tf.IndexedSlices) or (
        in_xla() and _is_small(table, gradient)
    ):
        return None, tf.convert_to_tensor(gradient)
    if in_xla():
        indices, position, sums = tensorflow_rows.sorted_sums(gradient)
        return indices, tf.gather(sums, position)
    gradient = tensorflow_rows.sum_duplicates(gradient, keeps_length=False)
    return gradient.indices, gradient.values


def sampled(gradient: tf.Tensor) -> tf.Tensor:
    return tensorflow_rows.has_entries(gradient)


def step_in_rounds(
    gradient: Any, variables: Sequence, place: Any, step: Callable
) -> None:
    step(gradient, variables)


def whole(gradient: Any) -> Any:
    return gradient


def sum_duplicates(gradient: Any) -> Any:
    keeps_length = in_xla() or num_replicas() > 1
    return tensorflow_rows.sum_duplicates(gradient, keeps_length)


# Rows of a table


def replica(variable: Any, like: Any) -> tf.Variable:
    variable = _native(variable)
    replicas = _strategy(variable).experimental_local_results(variable)
    if len(replicas) == 1:
        return replicas[0]
    return next(replica for replica in replicas if replica.device == like.device)


def _native(variable: Any) -> tf.Variable:
    """Return the `tf.Variable` of a Keras variable, or the `tf.Variable` itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _strategy(variable: tf.Variable) -> tf.distribute.Strategy:
    """Return the strategy that a variable was created under."""
    return getattr(variable, "distribute_strategy", tf.distribute.get_strategy())


def find_rows(
    gradient: Any, variables: Sequence[tf.Variable], every_row: bool
) -> tuple[Rows, list]:
    """Return distinct rows, or under XLA one per lookup, each with its row's sum."""

    def read(indices: Any) -> list:
        return [read_rows(variable, indices) for variable in variables]

    if every_row:
        gradient = tf.convert_to_tensor(gradient)
        return Rows(None, gradient, sampled(gradient)), read(None)
    if in_xla():
        indices, gradient = rows_to_join(gradient, variables[0])
        return Rows(indices, gradient, sampled(gradient)), read(indices)
    if isinstance(gradient, tf.IndexedSlices):
        gradient = tensorflow_rows.sum_duplicates(gradient, keeps_length=False)
        # Rows are read before it is known which are idle, so that both run in parallel.
        sums, indices, *values = tensorflow_rows.without_idle_rows(
            gradient.values, gradient.indices, *read(gradient.indices)
        )
        return Rows(indices, sums, None), values
    gradient = tf.convert_to_tensor(gradient)
    indices = tf.where(sampled(gradient))[:, 0]
    return Rows(indices, tf.gather(gradient, indices), None), read(indices)


def mark_idle(indices: tf.Tensor, gradient: tf.Tensor) -> Rows:
    return Rows(indices, gradient, sampled(gradient))


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


def write_list(variable: keras.Variable, count: Any, values: tf.Tensor) -> tf.Tensor:
    number, values = (
        tf.size(values, tf.as_dtype(INTEGERS)),
        tf.cast(values, variable.dtype),
    )
    positions = count + tf.range(number)
    if not in_xla():  # XLA drops writes past the end
        positions = positions[: tf.maximum(variable.shape[0] - count, 0)]
        values = values[: tf.size(positions)]
    write_rows([_native(variable)], positions, [values])
    return number


def listed_rows(
    variable: keras.Variable, ids: keras.Variable, count: Any, size: int
) -> RowGradient:
    if not in_xla():
        indices, _ = tf.unique(tf.convert_to_tensor(ids)[:count])
        return RowGradient(read_rows(_native(variable), indices), indices, None)
    listed = tf.convert_to_tensor(ids)[:size]
    listed = tf.where(
        tf.range(size, dtype=tf.as_dtype(INTEGERS)) < count, listed, listed[0]
    )
    indices = tf.sort(listed)
    position = tensorflow_rows.positions_of(indices)
    values = read_rows(_native(variable), indices)
    values = tensorflow_rows.first_of_each(position, values)
    sums = tf.math.unsorted_segment_sum(values, position, size)
    return RowGradient(sums, indices, position)


def clear_rows(variable: keras.Variable, rows: RowGradient) -> None:
    """After the rows were read: XLA would otherwise copy the whole before."""
    indices = rows.indices
    if in_xla():
        past_end = tf.constant(variable.shape[0], indices.dtype)
        indices = tf.where(tensorflow_rows.is_known(rows.sums), indices, past_end)
    write_rows([_native(variable)], indices, [tf.zeros_like(rows.by_row())])


def split(joined: tf.Tensor, parts: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    sizes = [part.shape[0] for part in parts]
    if None in sizes:
        sizes = [tf.shape(part)[0] for part in parts]
    return tf.split(joined, sizes)


def placement(variable: keras.Variable) -> Any:
    return _native(variable).device


def row_layout(variable: keras.Variable) -> None:
    """Keras lays variables out on JAX alone."""


# Counting and branching


def num_replicas() -> int:
    return tf.distribute.get_strategy().num_replicas_in_sync


def read_count(variable: Any) -> tf.Tensor:
    return tf.cast(tf.convert_to_tensor(variable), INTEGERS)


def write_count(variable: keras.Variable, count: Any) -> None:
    variable.assign(count)


def once_known(gradients: Sequence[Any], predicate: Any) -> Any:
    for gradient in gradients if in_xla() else ():
        if gradient is None:
            continue
        part = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
        predicate &= tensorflow_rows.is_known(part)
    return predicate


def run_if(predicate: Any, function: Callable[[], None], variables: Sequence) -> None:
    """The condition stands in cross-replica context, where variables are updated.

    A branch in replica context may not merge replicas, which assigning an aggregated
    variable does.
    """
    if not variables:
        return
    if tf.distribute.has_strategy():
        tf.__internal__.distribute.interim.maybe_merge_call(
            lambda _: tensorflow_rows.run_if(predicate, function),
            tf.distribute.get_strategy(),
        )
    else:  # outside the scope of the variables' strategy, if they have one
        with _scope(variables[0]):
            tensorflow_rows.run_if(predicate, function)


def _scope(variable: Any) -> contextlib.AbstractContextManager:
    strategy = getattr(_native(variable), "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def update(group: tuple, function: Callable[..., tuple]) -> None:
    def update_replica(*variables: tf.Variable) -> None:
        values = function(*(read_rows(variable, None) for variable in variables))
        write_rows(variables, None, values)

    _update_replicas([group], update_replica)


def _update_replicas(groups: Sequence[tuple], update: Callable) -> None:
    """Call `update` with each group of variables, once for each replica of them."""

    def update_replica(first: tf.Variable, *others: tf.Variable) -> None:
        update(first, *(replica(other, first) for other in others))

    for group in groups:
        first, *others = map(_native, group)
        with (
            contextlib.nullcontext() if tf.distribute.has_strategy() else _scope(first)
        ):
            _strategy(first).extended.update(
                first, update_replica, args=others, group=False
            )


def back_up(pairs: Sequence[tuple], predicate: Any) -> None:
    def back_up_replica(fast: tf.Variable, slow: tf.Variable) -> None:
        value = fast.read_value()
        if in_xla():
            # Assign both a value that XLA cannot identify as `fast`. If `fast` were
            # only read here, XLA would copy it in every step, to protect it from the
            # update.
            value = tf.where(predicate, value, slow)
            fast.assign(value, read_value=False)
        slow.assign(value, read_value=False)

    _update_replicas(pairs, back_up_replica)


def sync(pairs: Sequence[tuple], sync: Any) -> None:
    """Sync in place, without temporaries and with fewer passes over the weights."""

    def sync_replica(fast: tf.Variable, slow: tf.Variable) -> None:
        fast.assign_sub(slow, read_value=False)
        tf.raw_ops.ResourceApplyGradientDescent(
            var=slow.handle, alpha=tf.cast(-sync.alpha, slow.dtype), delta=fast
        )
        fast.assign(slow, read_value=False)

    _update_replicas(pairs, sync_replica)


def update_rows(tables: Sequence[MovedTable]) -> None:
    """Under XLA, search the rows of large tables together.

    One search for many tables is compiled faster than a search for each.
    """

    def update_replica(*variables: tf.Variable) -> None:
        left, large = iter(variables), []
        own = [
            table._replace(
                last_update=next(left),
                variables=tuple(itertools.islice(left, len(table.variables))),
            )
            for table in tables
        ]
        for table in own:
            moved = table.is_moved(tf.convert_to_tensor(table.last_update))
            if not in_xla():
                _update_moved(table, moved, 2 if len(own) == 1 else 1)
            elif table.last_update.shape[0] < PART_OF_TABLE * ROWS_PER_ROUND:
                _update_whole(table, moved)
            else:
                large.append((table, moved))
        if large:
            _update_large(*zip(*large, strict=True))

    variables = [v for table in tables for v in (table.last_update, *table.variables)]
    _update_replicas([tuple(variables)], update_replica)


def _update_moved(table: MovedTable, moved: tf.Tensor, parts: int) -> None:
    """Update the rows of so many parts of a table, which run in parallel."""
    found = tensorflow_rows.positions(moved, parts)
    # Keras on TensorFlow cannot add tensors that are known to have no rows.
    rows_of_parts = [rows for rows in found if rows.shape[0] != 0]
    # Read all before writing.
    new = [table.function(*_read_all(table, rows)) for rows in rows_of_parts]
    for rows, values in zip(rows_of_parts, new, strict=True):
        write_rows(table.variables, rows, values)


def _update_whole(table: MovedTable, moved: tf.Tensor) -> None:
    old = _read_all(table, None)
    column = tf.reshape(moved, [-1] + [1] * (old[0].shape.rank - 1))
    pairs = zip(table.function(*old), old, strict=True)
    write_rows(table.variables, None, [tf.where(column, *pair) for pair in pairs])


def _read_all(table: MovedTable, rows: tf.Tensor | None) -> list[tf.Tensor]:
    return [read_rows(variable, rows) for variable in table.variables]


def _update_large(tables: Sequence[MovedTable], moved: Sequence[tf.Tensor]) -> None:
    """Update chunks of rows under XLA; whole tables if many rows have moved."""
    joined = moved[0] if len(moved) == 1 else tf.concat(moved, axis=0)
    count = tf.reduce_sum(tf.cast(joined, "int32"))
    is_many = count > joined.shape[0] // PART_OF_TABLE

    def update_all() -> None:
        for table, rows in zip(tables, moved, strict=True):
            _update_whole(table, rows)

    def update_those(table: MovedTable, rows: tf.Tensor) -> None:
        write_rows(table.variables, rows, table.function(*_read_all(table, rows)))

    def update_next(rows: tf.Tensor) -> None:
        if len(tables) == 1:
            update_those(tables[0], rows)
            return
        start = 0
        for table, part in zip(tables, moved, strict=True):
            length = part.shape[0]
            is_here = (rows >= start) & (rows < start + length)
            own = tf.where(is_here, rows - start, length)  # XLA drops the others
            tensorflow_rows.run_if(
                tf.reduce_any(is_here), functools.partial(update_those, table, own)
            )
            start += length

    def update_few() -> None:
        tensorflow_rows.in_rounds(joined, ROWS_PER_ROUND, update_next)

    tensorflow_rows.run_if(is_many, update_all)
    tensorflow_rows.run_if(~is_many, update_few)


# The rest


def check_distribution(variables: Sequence[Any]) -> None:
    """Raise if the weights were or are created in the scope of parameter servers."""
    in_scope = isinstance(
        tf.distribute.get_strategy(), tf.distribute.ParameterServerStrategy
    )
    if in_scope or any("/job:ps/" in _native(v).device for v in variables):
        raise ValueError(
            "Lookahead and LazyOptimizer count updates that all workers make "
            "together, but under tf.distribute.ParameterServerStrategy each worker "
            "updates the weights at its own time. Use tf.distribute.MirroredStrategy "
            "on one machine, or tf.distribute.MultiWorkerMirroredStrategy on several."
        )


def apply(
    optimizer: keras.Optimizer,
    grads: list,
    variables: list | None,
    written: list[keras.Variable],
) -> None:
    """Apply. If TensorFlow's optimizers skip an update, they write no variable."""
    optimizer.apply(grads, variables)


def is_recording() -> bool:
    return not tf.executing_eagerly()


def store_state(model: keras.Model) -> None:
    """Do nothing, because variables hold the weights during training."""


def outside_graph() -> contextlib.AbstractContextManager:
    return tf.init_scope()


def keeping_random_state() -> contextlib.AbstractContextManager:
    """Do nothing on TensorFlow, where a dataset has its own generator."""
    return contextlib.nullcontext()
