"""TensorFlow: the replicas of variables, and conditions that assign variables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_lookahead_lazy._backend.tensorflow_rows import in_xla


def num_replicas() -> int:
    return tf.distribute.get_strategy().num_replicas_in_sync


def on_every_replica(predicate: tf.Tensor) -> tf.Tensor:
    context = tf.distribute.get_replica_context()
    if num_replicas() == 1 or context is None:
        return predicate
    others = tf.cast(tf.logical_not(predicate), "float32")
    return context.all_reduce(tf.distribute.ReduceOp.SUM, others) == 0


def own_component(variable: tf.Variable) -> tf.Variable:
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


def replica(variable: Any, like: Any) -> tf.Variable:
    variable = native(variable)
    replicas = _strategy(variable).experimental_local_results(variable)
    if len(replicas) == 1:
        return replicas[0]
    return next(each for each in replicas if each.device == like.device)


def native(variable: Any) -> tf.Variable:
    """Return the `tf.Variable` of a Keras variable, or the `tf.Variable` itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _strategy(variable: tf.Variable) -> tf.distribute.Strategy:
    """Return the strategy that a variable was created under."""
    return getattr(variable, "distribute_strategy", tf.distribute.get_strategy())


def _scope(variable: Any) -> contextlib.AbstractContextManager:
    strategy = getattr(native(variable), "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def update_replicas(groups: Sequence[tuple], update: Callable) -> None:
    """Call `update` with each group of variables, once for each replica of them."""

    def update_replica(first: tf.Variable, *others: tf.Variable) -> None:
        update(first, *(replica(other, first) for other in others))

    for group in groups:
        first, *others = map(native, group)
        with (
            contextlib.nullcontext() if tf.distribute.has_strategy() else _scope(first)
        ):
            _strategy(first).extended.update(
                first, update_replica, args=others, group=False
            )


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


def only_if(predicate: tf.Tensor, function: Callable) -> None:
    """Call `function` if `predicate` is true, like `tf.cond` with one branch.

    For XLA, this is a loop of at most one round. XLA updates values that a loop carries
    in place, but copies values that a conditional leaves unchanged.
    """
    if not in_xla():

        def run() -> None:
            function()

        tf.cond(predicate, run, lambda: None)
        return

    def once(pending: tf.Tensor) -> tuple[tf.Tensor]:
        function()
        return (tf.zeros_like(pending),)

    tf.while_loop(lambda pending: pending, once, [predicate])


def run_if(predicate: Any, function: Callable[[], None], variables: Sequence) -> None:
    """The condition stands in cross-replica context, where variables are updated.

    A branch in replica context may not merge replicas, which assigning an aggregated
    variable does.
    """
    if not variables:
        return
    if tf.distribute.has_strategy():
        tf.__internal__.distribute.interim.maybe_merge_call(
            lambda _: only_if(predicate, function),
            tf.distribute.get_strategy(),
        )
    else:  # outside the scope of the variables' strategy, if they have one
        with _scope(variables[0]):
            only_if(predicate, function)
