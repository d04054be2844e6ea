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


def positions(chosen: tf.Tensor, parts: int) -> list[tf.Tensor]:
    """Call `tf.where` for so many parts of a vector, which run in parallel."""
    size = -(-chosen.shape[0] // parts)
    starts = range(0, parts * size, size)
    return [tf.where(chosen[i : i + size])[:, 0] + i for i in starts]


def choose(chosen: tf.Tensor, *tensors: tf.Tensor) -> tuple:
    """Return the rows of some tensors that are `True` in the vector `chosen`."""
    rows = tf.where(chosen)[:, 0]
    return tuple(tf.gather(tensor, rows) for tensor in tensors)


def in_rounds(chosen: tf.Tensor, size: int, function: Callable) -> None:
    """Call `function` with the positions of `chosen`, `size` at a time, under XLA.

    In the last round, the last position is repeated to fill up. 32 entries are packed
    into a word, so that the searched vector is short.
    """
    padding = -chosen.shape[0] % 32
    pieces = tf.reshape(tf.pad(chosen, [[0, padding]]), [-1, 32])
    bits = tf.constant([2**bit for bit in range(32)], "uint32")
    words = tf.reduce_sum(tf.where(pieces, bits, tf.zeros_like(bits)), axis=1)
    counts = _count_bits(words)
    rank = tf.cumsum(counts)
    total = rank[-1]

    def work(start: tf.Tensor) -> tuple[tf.Tensor]:
        wanted = tf.minimum(start + tf.range(1, size + 1), total)
        word = _first_at_least(rank, wanted)
        before = tf.gather(rank, word) - tf.gather(counts, word)
        bit = _bit(tf.gather(words, word), wanted - before - 1)
        function(32 * word + bit)
        return (start + size,)

    tf.while_loop(lambda start: start < total, work, [tf.zeros((), "int32")])


def _bit(word: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """Return the position of a word's `number`-th set bit, counted from 0."""

    def go_on(
        width: tf.Tensor, place: tf.Tensor, number: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        ones = tf.bitwise.left_shift(tf.constant(1, "uint32"), width) - 1
        shifted = tf.bitwise.right_shift(word, place)
        before = _count_bits(tf.bitwise.bitwise_and(shifted, ones))
        is_further = before <= number
        number = tf.where(is_further, number - before, number)
        return width // 2, tf.where(is_further, place + width, place), number

    width = tf.constant(16, "uint32")
    start = width, tf.zeros_like(word), number
    _, place, _ = tf.while_loop(lambda width, *_: width > 0, go_on, start)
    return tf.cast(place, "int32")


def _count_bits(words: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.raw_ops.PopulationCount(x=words), "int32")


def _first_at_least(ascending: tf.Tensor, wanted: tf.Tensor) -> tf.Tensor:
    """Return, by bisection, positions of the first entries that are `wanted` or more.

    XLA's `tf.searchsorted` compares all entries with all. This uses a loop because XLA
    computes a carried value once. Unrolled, it would compute the first steps again for
    every use.
    """
    length = ascending.shape[0]

    def go_on(distance: tf.Tensor, position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        further = position + distance
        before = tf.gather(ascending, tf.minimum(further, length) - 1)
        is_before = (further <= length) & (before < wanted)
        return distance // 2, tf.where(is_before, further, position)

    start = tf.constant(2 ** (length.bit_length() - 1)), tf.zeros_like(wanted)
    return tf.while_loop(lambda distance, _: distance > 0, go_on, start)[1]


def run_if(predicate: tf.Tensor, function: Callable) -> None:
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
