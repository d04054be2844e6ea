"""TensorFlow: `tf.IndexedSlices`, `tf.distribute`, and XLA's need for fixed shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_lookahead_lazy import _keras
from keras_lookahead_lazy._backend import (
    FEW_ROWS,
    ONLY_ON_TORCH,
    OTHER_PARTS,
    RowGradient,
    Rows,
    tensorflow_rows,
)
from keras_lookahead_lazy._backend.tensorflow_replicas import (
    native,
    own_component,
    update_replicas,
)
from keras_lookahead_lazy._backend.tensorflow_replicas import (
    num_replicas as num_replicas,
)
from keras_lookahead_lazy._backend.tensorflow_replicas import (
    on_every_replica as on_every_replica,
)
from keras_lookahead_lazy._backend.tensorflow_replicas import read_rows as read_rows
from keras_lookahead_lazy._backend.tensorflow_replicas import replica as replica
from keras_lookahead_lazy._backend.tensorflow_replicas import run_if as run_if
from keras_lookahead_lazy._backend.tensorflow_replicas import write_rows as write_rows
from keras_lookahead_lazy._backend.tensorflow_rows import in_xla
from keras_lookahead_lazy._backend.tensorflow_rows import on_values as on_values
from keras_lookahead_lazy._backend.tensorflow_sync import update_rows as update_rows

VARIABLES_HOLD_STATE = True
# With a GPU, TensorFlow keeps int32 variables in host memory and computes there.
INTEGERS = "int64"
# Under XLA, where shapes are fixed, a step works on rows if the table has at least this
# many times as many rows as the step has lookups (measured).
ROWS_PER_LOOK_UP = 8
# A table that is updated as a whole is joined with others up to this many rows.
ROWS_TO_JOIN = 2**14


# Lookups and their gradients


def look_up(
    table: keras.Variable, ids: Any, dtype: str, place: None
) -> tf.Tensor | tf.RaggedTensor:
    """Read rows of the variable itself, not of a copy."""
    if isinstance(ids, tf.RaggedTensor):
        return ids.with_flat_values(look_up(table, ids.flat_values, dtype, place))
    ids = keras.ops.convert_to_tensor(ids, sparse=False)
    ids = tf.where(ids < 0, ids + tf.cast(table.shape[0], ids.dtype), ids)
    rows = own_component(_keras.stored_value(table))
    if in_xla():
        # Under XLA this does not copy. `tf.vectorized_map` cannot read from a variable.
        rows = tf.convert_to_tensor(rows)
    return tf.cast(tf.gather(rows, ids), dtype)


def takes_rows(gradient: Any) -> bool:
    return isinstance(gradient, tf.IndexedSlices)


def row_gradient(
    gradient: Any, table: keras.Variable, place: Any, is_listed: bool
) -> RowGradient | str:
    if not isinstance(gradient, tf.IndexedSlices):
        return OTHER_PARTS
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


def for_keras(gradient: Any) -> Any:
    return gradient


def sum_duplicates(gradient: Any) -> Any:
    keeps_length = in_xla() or num_replicas() > 1
    return tensorflow_rows.sum_duplicates(gradient, keeps_length)


# Rows of a table


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


def write_list(variable: keras.Variable, count: Any, values: tf.Tensor) -> tf.Tensor:
    number, values = (
        tf.size(values, tf.as_dtype(INTEGERS)),
        tf.cast(values, variable.dtype),
    )
    positions = count + tf.range(number)
    if not in_xla():  # XLA drops writes past the end
        positions = positions[: tf.maximum(variable.shape[0] - count, 0)]
        values = values[: tf.size(positions)]
    write_rows([native(variable)], positions, [values])
    return number


def listed_rows(
    variable: keras.Variable,
    ids: keras.Variable,
    count: Any,
    size: int,
    place: Any,
) -> RowGradient:
    if not in_xla():
        indices, _ = tf.unique(tf.convert_to_tensor(ids)[:count])
        return RowGradient(read_rows(native(variable), indices), indices, None)
    listed = tf.convert_to_tensor(ids)[:size]
    listed = tf.where(
        tf.range(size, dtype=tf.as_dtype(INTEGERS)) < count, listed, listed[0]
    )
    indices = tf.sort(listed)
    position = tensorflow_rows.positions_of(indices)
    values = read_rows(native(variable), indices)
    values = tensorflow_rows.first_of_each(position, values)
    sums = tf.math.unsorted_segment_sum(values, position, size)
    return RowGradient(sums, indices, position)


def clear_rows(variable: keras.Variable, rows: RowGradient, place: Any) -> None:
    """After the rows were read: XLA would otherwise copy the whole before."""
    indices = rows.indices
    if in_xla():
        past_end = tf.constant(variable.shape[0], indices.dtype)
        indices = tf.where(tensorflow_rows.is_known(rows.sums), indices, past_end)
    write_rows([native(variable)], indices, [tf.zeros_like(rows.by_row())])


def split(joined: tf.Tensor, parts: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    sizes = [part.shape[0] for part in parts]
    if None in sizes:
        sizes = [tf.shape(part)[0] for part in parts]
    return tf.split(joined, sizes)


def placement(variable: keras.Variable) -> Any:
    return native(variable).device


def layout_like(variable: keras.Variable, axes: int) -> None:
    """Keras lays variables out on JAX alone."""


# Counting and branching


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


def update(group: tuple, function: Callable[..., tuple]) -> None:
    def update_replica(*variables: tf.Variable) -> None:
        values = function(*(read_rows(variable, None) for variable in variables))
        write_rows(variables, None, values)

    update_replicas([group], update_replica)


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

    update_replicas(pairs, back_up_replica)


def sync(pairs: Sequence[tuple], sync: Any) -> None:
    """Sync in place, without temporaries and with fewer passes over the weights."""

    def sync_replica(fast: tf.Variable, slow: tf.Variable) -> None:
        fast.assign_sub(slow, read_value=False)
        tf.raw_ops.ResourceApplyGradientDescent(
            var=slow.handle, alpha=tf.cast(-sync.alpha, slow.dtype), delta=fast
        )
        fast.assign(slow, read_value=False)

    update_replicas(pairs, sync_replica)


# The rest


def check_processes() -> None:
    raise ValueError(ONLY_ON_TORCH.format("TensorFlow"))


def replicate(*_: Any) -> None:
    check_processes()


def check_distribution(variables: Sequence[Any]) -> None:
    """Raise if the weights were or are created in the scope of parameter servers."""
    in_scope = isinstance(
        tf.distribute.get_strategy(), tf.distribute.ParameterServerStrategy
    )
    if in_scope or any("/job:ps/" in native(v).device for v in variables):
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
    assigned: list[keras.Variable],
) -> None:
    """Apply. If TensorFlow's optimizers skip an update, they write no variable."""
    optimizer.apply(grads, variables)


def uncompiled(function: Callable, *arguments: Any) -> Any:
    return function(*arguments)


def is_recording() -> bool:
    return not tf.executing_eagerly()


def store_state(model: keras.Model) -> None:
    """Do nothing, because variables hold the weights during training."""


def outside_graph() -> contextlib.AbstractContextManager:
    return tf.init_scope()


def keeping_random_state() -> contextlib.AbstractContextManager:
    """Do nothing on TensorFlow, where a dataset has its own generator."""
    return contextlib.nullcontext()
