"""JAX: the rows of tables that have moved, found and updated in compiled programs."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from keras_lookahead_lazy._backend import MovedTable
from keras_lookahead_lazy._backend.jax_placement import on_owners

# A sync works on chunks of this many rows, which bounds its temporary memory.
ROWS_PER_ROUND = 2048
# If more than one in this many rows has moved, or if the table is small, a sync works
# on the whole table.
PART_OF_TABLE = 8
# The search for rows that moved counts in so many blocks, and packs so many bits.
BLOCKS, WORD = 2**12, 32


def update_rows(tables: Sequence[MovedTable]) -> None:
    """Update small tables as a whole, and search the rows of large ones together.

    One search for many tables is compiled faster than a search for each.
    """
    values = [tuple(v.value for v in table.variables) for table in tables]
    clocks = [table.last_update.value for table in tables]

    def update_own(values: tuple, clocks: tuple) -> tuple:
        each = list(zip(tables, clocks, values, strict=True))
        large = [table for table in each if _is_large(table)]
        updated = iter(_update_large(*zip(*large, strict=True)) if large else ())
        return tuple(
            next(updated) if _is_large(table) else _update_whole(*table)
            for table in each
        )

    new = on_owners(update_own, tables[0].place, (tuple(values), tuple(clocks)))
    for table, new_values in zip(tables, new, strict=True):
        for variable, value in zip(table.variables, new_values, strict=True):
            variable.assign(value)


def _is_large(table: tuple[MovedTable, jax.Array, tuple]) -> bool:
    return len(table[1]) >= PART_OF_TABLE * ROWS_PER_ROUND


def _update_whole(table: MovedTable, clock: jax.Array, values: tuple) -> tuple:
    return _updated(table, table.is_moved(clock), values)


def _updated(table: MovedTable, moved: jax.Array, old: Sequence[jax.Array]) -> tuple:
    """Return the values of a table's variables, with new ones in rows that moved."""
    column = moved.reshape(-1, *[1] * (old[0].ndim - 1))
    pairs = zip(table.function(*old), old, strict=True)
    return tuple(jnp.where(column, *pair) for pair in pairs)


def _update_large(tables: Sequence[MovedTable], clocks: tuple, values: tuple) -> tuple:
    moved = [table.is_moved(clock) for table, clock in zip(tables, clocks, strict=True)]
    lengths = [len(part) for part in moved]
    total, moved_rows = _find_by_rank(_end_to_end(moved))
    is_many = total > sum(lengths) // PART_OF_TABLE

    def update_all(*values: tuple) -> tuple:
        return tuple(map(_updated, tables, moved, values))

    def update_next(carry: tuple) -> tuple:
        start, values = carry
        rows = moved_rows(start, ROWS_PER_ROUND)
        if len(tables) == 1:
            new = [_update_those(tables[0], rows, *values[0])]
            return start + ROWS_PER_ROUND, tuple(new)
        ends = itertools.accumulate(lengths)
        new = []
        for table, end, length, old in zip(tables, ends, lengths, values, strict=True):
            is_here = (rows >= end - length) & (rows < end)
            own = jnp.where(is_here, rows - (end - length), length)
            update_own = functools.partial(_update_those, table, own)
            new.append(once_if(jnp.any(is_here), update_own, old))
        return start + ROWS_PER_ROUND, tuple(new)

    start = jnp.where(is_many, total, 0), values
    _, values = jax.lax.while_loop(lambda carry: carry[0] < total, update_next, start)
    return once_if(is_many, update_all, values)


def _update_those(table: MovedTable, rows: jax.Array, *values: jax.Array) -> tuple:
    """Return the values of a table's variables, with new ones in some rows."""
    new = table.function(*(value.at[rows].get(mode="clip") for value in values))
    pairs = zip(values, new, strict=True)
    return tuple(value.at[rows].set(those, mode="drop") for value, those in pairs)


def _end_to_end(vectors: Sequence[jax.Array]) -> jax.Array:
    """Join vectors of bools, padded so that `_find_by_rank` can divide them."""
    if len(vectors) == 1:
        return vectors[0]
    padding = -sum(map(len, vectors)) % (BLOCKS * WORD)
    return jnp.concatenate([*vectors, jnp.zeros(padding, bool)])


def _find_by_rank(chosen: jax.Array) -> tuple[jax.Array, Callable]:
    """Return how many entries are `True`, and a function that finds them by number.

    This counts in blocks (a power of two of them), so that no device needs the whole
    vector if its entries are divided between devices. It packs short pieces into one
    word each, so that it needs no memory of the vector's size.
    """
    count = len(chosen)
    blocks = math.gcd(count, BLOCKS)
    length = next(n for n in range(WORD, 0, -1) if count // blocks % n == 0)
    pieces = chosen.reshape(blocks, -1, length)
    bits = jnp.uint32(1) << jnp.arange(length, dtype="uint32")
    words = jnp.sum(jnp.where(pieces, bits, 0), axis=2, dtype="uint32")
    rank = jnp.cumsum(_count_bits(words), axis=1)
    ends = jnp.cumsum(rank[:, -1])

    def positions(start: jax.Array, size: int) -> jax.Array:
        """Return the positions of `size` entries from number `start` on.

        If there are fewer, the other positions are past the end.
        """
        numbers = start + jnp.arange(size, dtype="int32")
        ended = jnp.zeros(size, "int32").at[jnp.maximum(ends - start, 0)]
        block = jnp.cumsum(ended.add(1, mode="drop"))
        block = jnp.minimum(block, blocks - 1)
        number = numbers - (ends[block] - rank[block, -1])  # in the block

        def go_on(bit: jax.Array, piece: jax.Array) -> jax.Array:
            further = piece + (1 << (bits - 1 - bit))
            before = rank[block, jnp.minimum(further, rank.shape[1]) - 1]
            is_before = (further <= rank.shape[1]) & (before <= number)
            return jnp.where(is_before, further, piece)

        # XLA computes a value that a loop carries once. Unrolled, it would compute the
        # first steps again for every use.
        bits = rank.shape[1].bit_length()
        piece = jax.lax.fori_loop(0, bits, go_on, jnp.zeros_like(number))
        piece = jnp.minimum(piece, rank.shape[1] - 1)
        word = words[block, piece]
        number -= rank[block, piece] - _count_bits(word)  # in the piece
        found = (block * rank.shape[1] + piece) * length + _bit(word, number)
        return jnp.where(numbers < ends[-1], found, count)

    return ends[-1], positions


def _bit(word: jax.Array, number: jax.Array) -> jax.Array:
    """Return the position of a word's `number`-th set bit, counted from 0."""

    def go_on(step: jax.Array, carry: tuple) -> tuple[jax.Array, jax.Array]:
        place, number = carry
        width = jnp.uint32(16) >> step.astype("uint32")
        low = (word >> place) & ((jnp.uint32(1) << width) - 1)
        before = _count_bits(low)
        is_further = before <= number
        number = jnp.where(is_further, number - before, number)
        return jnp.where(is_further, place + width, place), number

    place, _ = jax.lax.fori_loop(0, 5, go_on, (jnp.zeros_like(word), number))
    return place.astype("int32")


def _count_bits(words: jax.Array) -> jax.Array:
    return jax.lax.population_count(words).astype("int32")


def once_if(predicate: Any, function: Callable[..., tuple], values: tuple) -> tuple:
    """Return `function` of the values if `predicate` is true, else the values.

    This is a loop of at most one round. XLA updates values that a loop carries in
    place, but copies values that a conditional leaves unchanged.
    """
    return jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(carry[0]), *function(*carry[1:])),
        (jnp.asarray(predicate), *values),
    )[1:]
