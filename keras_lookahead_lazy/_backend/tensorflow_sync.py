"""TensorFlow: the rows of tables that have moved, found and updated by a sync."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import tensorflow as tf

from keras_lookahead_lazy._backend import MovedTable
from keras_lookahead_lazy._backend.tensorflow_replicas import (
    only_if,
    read_rows,
    update_replicas,
    write_rows,
)
from keras_lookahead_lazy._backend.tensorflow_rows import in_xla

# A sync under XLA works on chunks of this many rows, which bounds its temporary memory.
ROWS_PER_ROUND = 4096
# If more than one in this many rows has moved, or if the table is small, a sync works
# on the whole table.
PART_OF_TABLE = 8


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
    update_replicas([tuple(variables)], update_replica)


def _update_moved(table: MovedTable, moved: tf.Tensor, parts: int) -> None:
    """Update the rows of so many parts of a table, which run in parallel."""
    found = _positions(moved, parts)
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
            only_if(tf.reduce_any(is_here), functools.partial(update_those, table, own))
            start += length

    def update_few() -> None:
        _in_rounds(joined, ROWS_PER_ROUND, update_next)

    only_if(is_many, update_all)
    only_if(~is_many, update_few)


def _positions(chosen: tf.Tensor, parts: int) -> list[tf.Tensor]:
    """Call `tf.where` for so many parts of a vector, which run in parallel."""
    size = -(-chosen.shape[0] // parts)
    starts = range(0, parts * size, size)
    return [tf.where(chosen[i : i + size])[:, 0] + i for i in starts]


def _in_rounds(chosen: tf.Tensor, size: int, function: Callable) -> None:
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
