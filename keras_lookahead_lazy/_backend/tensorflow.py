"""TensorFlow: `tf.IndexedSlices`, `tf.distribute`, and XLA's need for fixed shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from keras_lookahead_lazy._rows import Rows

Groups = list[tuple[Any, ...]]

# Whether variables hold the state while `fit` runs.
VARIABLES_HOLD_STATE = True
# Whether an inner optimizer computes every update and then chooses old or new values.
SELECTS_UPDATES = False
# Under XLA, where both have fixed shapes, rows pay when a table has so many times
# more rows than a step has look-ups (measured).
ROWS_PER_LOOK_UP = 8
# A sync under XLA works on so many rows at a time, which bounds what it needs.
ROWS_PER_ROUND = 4096


# Which rows were sampled


def is_dense(ids: Any) -> bool:
    return not isinstance(ids, (tf.SparseTensor, tf.RaggedTensor))


def look_up(table: keras.Variable, ids: Any) -> tf.Tensor:
    """Rows of a table, read from the variable itself and not from a copy of it."""
    ids = tf.convert_to_tensor(ids)
    ids = tf.where(ids < 0, ids + tf.cast(table.shape[0], ids.dtype), ids)
    return tf.gather(table.value, ids)


def row_gradient(gradient: Any, variable: Any) -> None:
    """`tf.IndexedSlices` go through Keras as they are: replicas have to add them."""
    return None


def whole(gradient: Any) -> Any:
    return gradient


def size(indices: tf.Tensor) -> int | None:
    return indices.shape[0]


def find_rows(
    gradient: Any, variables: list, every_row: bool, lookups: Any = None
) -> tuple[Rows, list]:
    """The rows of a table that `gradient` (dense or `tf.IndexedSlices`) touches.

    Under XLA a row that was drawn n times is worked on n times, with the same sum
    and the same result each time.

    Args:
        variables: the table, or the replica of it that is being updated, and what
            is kept for it.
        every_row: whether the step needs the whole table.

    Returns:
        The rows, and the values of each of the variables there.
    """

    def read(indices: Any) -> list:
        return [read_rows(variable, variables[0], indices) for variable in variables]

    slices = isinstance(gradient, tf.IndexedSlices) and not every_row
    if slices and not (_in_xla() and _is_small(variables[0], gradient)):
        if _in_xla():
            indices, position, sums = _sorted_sums(gradient)
            sums = tf.gather(sums, position)
            return Rows(indices, sums, _has_entries(sums)), read(indices)
        gradient = sum_duplicates(gradient)
        # Read before it is known which are idle: the two do not wait for each other.
        sums, indices, *values = _without_idle_rows(
            gradient.values, gradient.indices, *read(gradient.indices)
        )
        return Rows(indices, sums, None), values
    gradient = tf.convert_to_tensor(gradient)
    sampled = _has_entries(gradient)
    if every_row or _in_xla():
        return Rows(None, gradient, sampled), read(None)
    indices = tf.where(sampled)[:, 0]
    return Rows(indices, tf.gather(gradient, indices), None), read(indices)


def _is_small(table: Any, slices: tf.IndexedSlices) -> bool:
    lookups = slices.indices.shape[0]
    return not lookups or table.shape[0] < ROWS_PER_LOOK_UP * lookups


def sum_duplicates(gradient: Any) -> Any:
    """The same gradient with every row of the table in one place: the sum.

    Keras 2 summed; Keras 3 squares the duplicates one by one. Under XLA, where the
    number of different rows may not shape a tensor, zeros take the other places.
    A dense gradient is a sum already.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    if _in_xla():
        indices, position, sums = _sorted_sums(gradient)
        is_first = tf.concat([[True], position[1:] != position[:-1]], axis=0)
        is_first = tf.reshape(is_first, [-1] + [1] * (sums.shape.rank - 1))
        values = tf.where(is_first, tf.gather(sums, position), tf.zeros_like(sums))
    else:
        indices, position = tf.unique(gradient.indices)
        values = tf.math.unsorted_segment_sum(
            gradient.values, position, tf.size(indices)
        )
    return _Slices(values, indices, gradient.dense_shape)


def _sorted_sums(slices: tf.IndexedSlices) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Sums over duplicates in tensors of fixed shape.

    Returns:
        The row ids, sorted; for each of them the position of its sum; the sums, in
        as many rows as there are ids, of which the first are used.
    """
    order = tf.argsort(slices.indices, stable=True)
    indices = tf.gather(slices.indices, order)
    is_new = tf.cast(indices[1:] != indices[:-1], tf.int32)
    position = tf.concat([[0], tf.cumsum(is_new)], axis=0)
    sums = tf.math.unsorted_segment_sum(
        tf.gather(slices.values, order), position, tf.size(indices)
    )
    return indices, position, sums


def _without_idle_rows(gradient: tf.Tensor, *others: tf.Tensor) -> tuple:
    """Leave out rows whose gradient is zero, such as a masked token's.

    They are rare: where no row even begins with a zero, there is none to look for.

    Args:
        others: what else has one entry a row.
    """
    tensors = (gradient, *others)

    def leave_out() -> tuple:
        sampled = _has_entries(gradient)
        return tuple(tf.boolean_mask(tensor, sampled) for tensor in tensors)

    first = tf.reshape(gradient, [tf.shape(gradient)[0], -1])[:, 0]
    return tf.cond(tf.reduce_all(first != 0), lambda: tensors, leave_out)


class _Slices(tf.IndexedSlices):
    """`tf.IndexedSlices` that Keras can divide by a `loss_scale_factor`."""

    def __truediv__(self, divisor: Any) -> _Slices:
        return _Slices(self.values / divisor, self.indices, self.dense_shape)


def _has_entries(gradient: tf.Tensor) -> tf.Tensor:
    return tf.reduce_any(gradient != 0, axis=range(1, gradient.shape.rank))


def _in_xla() -> bool:
    """Whether the code being traced will be compiled by XLA (`jit_compile=True`)."""
    return not tf.executing_eagerly() and (
        control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    )


# Reading and writing rows


def read_rows(variable: Any, like: Any, indices: Any) -> tf.Tensor:
    """Rows of the replica of `variable` that lies where `like` does."""
    native = _replica(variable, like)
    if indices is None:
        return tf.convert_to_tensor(native)
    return native.sparse_read(indices)


def write_rows(variable: Any, like: Any, indices: Any, values: Any) -> None:
    native = _replica(variable, like)
    if indices is None:
        native.assign(values)
    else:
        native.scatter_update(tf.IndexedSlices(values, indices))


def _replica(variable: Any, like: Any) -> tf.Variable:
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


def row_layout(variable: keras.Variable) -> None:
    """Keras lays variables out on JAX alone."""


# Counting and branching inside the graph


def read_count(variable: Any) -> tf.Tensor:
    return tf.identity(tf.convert_to_tensor(variable))


def write_count(variable: keras.Variable, count: tf.Tensor) -> None:
    variable.assign(count)


def update_if(predicate: Any, groups: Groups, function: Callable) -> None:
    """Assign `function` of its values to each group of variables, if `predicate`."""

    def update(*variables: tf.Variable) -> None:
        first = variables[0]
        values = [read_rows(variable, first, None) for variable in variables]
        for variable, value in zip(variables, function(*values), strict=True):
            write_rows(variable, first, None, value)

    _update_groups_if(predicate, groups, update)


def _update_groups_if(predicate: Any, groups: Groups, update: Callable) -> None:
    """Call `update` with each group of variables, if `predicate`.

    The condition stands in cross-replica context: a branch in replica context may
    not merge replicas, which assigning an aggregated variable does.
    """

    def across_replicas(strategy: tf.distribute.Strategy) -> None:
        def update_replica(first: tf.Variable, *others: tf.Variable) -> None:
            update(first, *(_replica(other, first) for other in others))

        def update_all() -> None:
            for group in groups:
                first, *others = map(_native, group)
                strategy.extended.update(
                    first, update_replica, args=others, group=False
                )

        _run_if(predicate, update_all)

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


def _run_if(predicate: tf.Tensor, function: Callable) -> None:
    """`tf.cond` without a second branch.

    For XLA it is written as a loop of at most one round: XLA updates what a loop
    carries in place, but copies what a condition leaves alone.
    """
    if not _in_xla():
        tf.cond(predicate, function, lambda: None)
        return

    def once(pending: tf.Tensor) -> tuple[tf.Tensor]:
        function()
        return (tf.zeros_like(pending),)

    tf.while_loop(lambda pending: pending, once, [predicate])


def back_up_if(predicate: Any, pairs: Groups) -> None:
    """slow := fast, if `predicate`."""

    def back_up(fast: tf.Variable, slow: tf.Variable) -> None:
        value = fast.read_value()
        if _in_xla():
            # Both take one value that XLA cannot see to be `fast`. Were `fast` only
            # read here, XLA would copy it in every step, to be safe from the update.
            value = tf.where(predicate, value, slow)
            fast.assign(value, read_value=False)
        slow.assign(value, read_value=False)

    _update_groups_if(predicate, pairs, back_up)


def sync_if(predicate: Any, pairs: Groups, alpha: float) -> None:
    """slow := slow + alpha (fast - slow); fast := slow, if `predicate`."""

    def sync(fast: tf.Variable, slow: tf.Variable) -> None:
        # In place: no temporaries, and fewer passes over the weights.
        fast.assign_sub(slow, read_value=False)
        tf.raw_ops.ResourceApplyGradientDescent(
            var=slow.handle, alpha=tf.cast(-alpha, slow.dtype), delta=fast
        )
        fast.assign(slow, read_value=False)

    _update_groups_if(predicate, pairs, sync)


def sync_rows_if(
    predicate: Any,
    group: tuple[Any, Any, Any],
    since: Any,
    alpha: float,
    most: int | None,
) -> None:
    """fast := slow + alpha (fast - slow) in rows moved after `since`, if `predicate`.

    Args:
        group: fast weights, slow weights, the update that moved each row last.
        most: how many rows are expected to have moved at most; `None` for all.
    """
    since = tf.cast(since, "int32")

    def sync(fast: tf.Variable, slow: tf.Variable, last_update: tf.Variable) -> None:
        def sync_rows(rows: tf.Tensor) -> None:
            old = slow.sparse_read(rows)
            step = fast.sparse_read(rows) - old
            write_rows(fast, fast, rows, old + tf.cast(alpha, old.dtype) * step)

        if not _in_xla():
            sync_rows(tf.where(last_update > since)[:, 0])
        elif most is None or most >= fast.shape[0]:
            moved = tf.reshape(last_update > since, [-1] + [1] * (fast.shape.rank - 1))
            old, new = tf.convert_to_tensor(slow), tf.convert_to_tensor(fast)
            point = old + tf.cast(alpha, old.dtype) * (new - old)
            fast.assign(tf.where(moved, point, new), read_value=False)
        else:
            _for_chunks(last_update > since, min(most, ROWS_PER_ROUND), sync_rows)

    _update_groups_if(predicate, [group], sync)


def _for_chunks(chosen: tf.Tensor, size: int, function: Callable) -> None:
    """Call `function` with the positions of `chosen`, `size` at a time, under XLA.

    Places that are left over in the last chunk repeat its last position.
    """
    rank = tf.cumsum(tf.cast(chosen, "int32"))
    total = rank[-1]

    def chunk(start: tf.Tensor) -> tuple[tf.Tensor]:
        wanted = tf.minimum(start + tf.range(1, size + 1), total)
        function(_first_at_least(rank, wanted))
        return (start + size,)

    tf.while_loop(lambda start: start < total, chunk, [tf.zeros((), "int32")])


def _first_at_least(ascending: tf.Tensor, wanted: tf.Tensor) -> tf.Tensor:
    """Positions of the first entries that are `wanted` or more, by bisection.

    XLA's `tf.searchsorted` compares all with all.
    """
    length = ascending.shape[0]
    position = tf.zeros_like(wanted)
    for bit in reversed(range(length.bit_length())):
        further = position + 2**bit
        before = tf.gather(ascending, tf.minimum(further, length) - 1)
        is_before = (further <= length) & (before < wanted)
        position = tf.where(is_before, further, position)
    return position


# What else differs


def take_over_tables(optimizer: keras.Optimizer, is_table: Callable) -> None:
    """TensorFlow's optimizers call `update_step` for each weight: nothing to do."""


def is_recording() -> bool:
    """Whether operations are being recorded rather than run."""
    return not tf.executing_eagerly()


def apply(optimizer: keras.Optimizer, grads: list, variables: list | None) -> None:
    optimizer.apply(grads, variables)


def sync_model(model: keras.Model) -> None:
    """The variables of a model in training hold its weights: nothing to do."""


def outside_graph() -> contextlib.AbstractContextManager:
    """A context in which operations run at once, also while a graph is recorded."""
    return tf.init_scope()
