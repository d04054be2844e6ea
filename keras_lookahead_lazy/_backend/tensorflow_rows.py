"""TensorFlow: sum duplicates in `tf.IndexedSlices`, and choose rows under XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import control_flow_util


def in_xla() -> bool:
    """Return whether the traced code will be compiled by XLA (`jit_compile=True`)."""
    return not tf.executing_eagerly() and (
        control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    )


def is_known(values: tf.Tensor) -> tf.Tensor:
    """Return true in a way that XLA cannot simplify, and that depends on `values`."""
    first = tf.reduce_sum(tf.cast(tf.reshape(values, [-1])[:1], "float32"))
    return (first > 0) | (first <= 0) | (first != first)


def has_entries(gradient: tf.Tensor) -> tf.Tensor:
    """Return which rows are not all zero."""
    return tf.reduce_any(gradient != 0, axis=range(1, gradient.shape.rank))


def sum_duplicates(gradient: Any, keeps_length: bool) -> Any:
    """Return the same gradient with the duplicates of each row summed.

    Keras 2 summed them, but Keras 3 squares duplicates separately. A dense gradient is
    already a sum.

    Args:
        gradient: of a table.
        keeps_length: whether there have to be as many slices as before, for XLA, whose
            shapes are fixed, or for replicas, which gather slices of equal shapes.
            Zeros fill the places of duplicates then.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    if keeps_length:
        indices, position, sums = sorted_sums(gradient)
        values = first_of_each(position, tf.gather(sums, position))
    else:
        indices, position = tf.unique(gradient.indices)
        values = _sums(gradient.values, position, tf.size(indices))
    return _Slices(values, indices, gradient.dense_shape)


def _sums(values: tf.Tensor, position: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Sum the rows that have the same position.

    Only few rows share a position, so this adds only those.
    `tf.math.unsorted_segment_sum` adds all rows and is slow in TensorFlow 2.21.
    """
    each = tf.range(tf.size(position))
    first = tf.math.unsorted_segment_min(each, position, count)
    others = tf.where(tf.gather(first, position) != each)[:, 0]
    return tf.tensor_scatter_nd_add(
        tf.gather(values, first),
        tf.gather(position, others)[:, tf.newaxis],
        tf.gather(values, others),
    )


def sorted_sums(slices: tf.IndexedSlices) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Sum duplicates, in tensors of fixed shape.

    Returns:
        The sorted row ids, the position of each id's sum, and the sums. There are as
        many rows for sums as ids, of which the first ones are used.
    """
    order = tf.argsort(slices.indices, stable=True)
    indices = tf.gather(slices.indices, order)
    position = positions_of(indices)
    sums = tf.math.unsorted_segment_sum(
        tf.gather(slices.values, order), position, tf.size(indices)
    )
    return indices, position, sums


def positions_of(indices: tf.Tensor) -> tf.Tensor:
    """Return the position of each of some sorted numbers among the distinct ones."""
    is_new = tf.cast(indices[1:] != indices[:-1], tf.int32)
    return tf.concat([[0], tf.cumsum(is_new)], axis=0)


def first_of_each(position: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Return rows, with zeros in those that have the position of the row before."""
    is_first = tf.concat([[True], position[1:] != position[:-1]], axis=0)
    is_first = tf.reshape(is_first, [-1] + [1] * (values.shape.rank - 1))
    return tf.where(is_first, values, tf.zeros_like(values))


class _Slices(tf.IndexedSlices):
    """`tf.IndexedSlices` that Keras can scale without making them dense."""

    def __mul__(self, factor: Any) -> _Slices:
        return _Slices(self.values * factor, self.indices, self.dense_shape)

    def __truediv__(self, divisor: Any) -> _Slices:
        return _Slices(self.values / divisor, self.indices, self.dense_shape)


def on_values(function: Callable[[list], list], gradients: list) -> list:
    """Call a function of gradients on the values of those from `sum_duplicates`."""
    is_slices = [isinstance(gradient, _Slices) for gradient in gradients]
    values = function(
        [
            gradient.values if each else gradient
            for gradient, each in zip(gradients, is_slices, strict=True)
        ]
    )
    return [
        _Slices(value, gradient.indices, gradient.dense_shape) if each else value
        for value, gradient, each in zip(values, gradients, is_slices, strict=True)
    ]


def without_idle_rows(gradient: tf.Tensor, *others: tf.Tensor) -> tuple:
    """Leave out rows whose gradient is zero, such as a masked token's.

    Such rows are rare. If no row even begins with a zero, there is none.

    Args:
        others: Other tensors with one entry per row.
    """
    tensors = (gradient, *others)

    def leave_out() -> tuple:
        return choose(has_entries(gradient), *tensors)

    first = gradient[(slice(None), *[0] * (gradient.shape.rank - 1))]
    return tf.cond(tf.reduce_all(first != 0), lambda: tensors, leave_out)


def choose(chosen: tf.Tensor, *tensors: tf.Tensor) -> tuple:
    """Return the rows of some tensors that are `True` in the vector `chosen`."""
    rows = tf.where(chosen)[:, 0]
    return tuple(tf.gather(tensor, rows) for tensor in tensors)
